"""What needs a hand in the volume: errors, waiting, other mounts. The volume is one in memory."""

import errno
import mmap
import os
import shlex
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from mendfs.fuse.server import MountOptions
from mendfs.model import ROOT_INODE, Inode
from tests.mount.calls import compare_random_writes, fails, opened
from tests.mount.conftest import Mounted, Mounting
from tests.real_cluster import needs_mounts

pytestmark = [needs_mounts, pytest.mark.seed("C12")]


def test_writes_that_wait_for_room_are_right(fake: Mounted, tmp_path: Path) -> None:
    fake.volume.writes_wait = True
    compare_random_writes(fake.path / "file", tmp_path / "file")


def test_an_append_goes_to_the_end_that_another_mount_has_moved(fake: Mounted) -> None:
    """The kernel's idea of the end is old: only the volume knows it."""
    path = fake.path / "log"
    with opened(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT) as fd:
        os.write(fd, b"first\n")
        fake.volume.nodes[fake.volume.nodes[ROOT_INODE].names[b"log"]].data.extend(b"other\n")
        os.write(fd, b"last\n")
    assert path.read_bytes() == b"first\nother\nlast\n"


def test_statfs_is_what_the_volume_says(fake: Mounted) -> None:
    room = os.statvfs(fake.path)
    assert room.f_blocks * room.f_frsize == 100 << 30
    assert room.f_bavail * room.f_frsize == 60 << 30


def test_a_file_made_by_another_mount_meanwhile_is_opened(fake: Mounted) -> None:
    """The kernel looks, finds nothing and creates; another mount was faster: as on a local disk, the file is opened."""
    fake.volume.made_meanwhile |= {b"shared", b"mine"}
    with opened(fake.path / "shared", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, b"x")
    assert (fake.path / "shared").read_bytes() == b"x"
    with fails(errno.EEXIST):
        os.open(fake.path / "mine", os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def test_fsync_reaches_the_volume(fake: Mounted) -> None:
    with opened(fake.path / "file", os.O_WRONLY | os.O_CREAT) as fd:
        os.fsync(fd)
        os.fdatasync(fd)
        inode = Inode(os.fstat(fd).st_ino)
    with opened(fake.path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)
    assert fake.volume.calls.count(("fsync", inode)) == 2
    assert ("sync_committed", ROOT_INODE) in fake.volume.calls


@pytest.mark.parametrize("also", [0, os.O_APPEND, os.O_DIRECT, os.O_APPEND | os.O_DIRECT])
@pytest.mark.parametrize("synchronous", [os.O_DSYNC, os.O_SYNC])
def test_a_synchronous_write_reaches_the_volume_as_an_fsync(fake: Mounted, also: int, synchronous: int) -> None:
    """A log opened with O_APPEND and O_DSYNC, say: a write that has returned must survive a power cut."""
    fd = os.open(fake.path / "log", os.O_WRONLY | os.O_CREAT | synchronous | also)
    try:
        os.write(fd, mmap.mmap(-1, 4096))
        assert ("fsync", Inode(os.fstat(fd).st_ino)) in fake.volume.calls
    finally:
        os.close(fd)


def test_close_tells_what_went_wrong(fake: Mounted) -> None:
    fd = os.open(fake.path / "file", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"x")
    fake.volume.flush_error = errno.ENOSPC
    with fails(errno.ENOSPC):
        os.close(fd)
    fake.volume.flush_error = 0


@pytest.mark.parametrize("command", ["cat {}", "dd if=/dev/zero of={} bs=1M count=1", "sh -c 'echo x >> {}'"])
def test_who_waits_for_dead_servers_can_be_killed(mounting: Mounting, command: str) -> None:
    """Ctrl-C and kill end a program that waits for servers which do not answer; others go on meanwhile."""
    fake = mounting(MountOptions(interrupt_after_s=0.05))
    path = fake.path / "file"
    path.write_bytes(b"x" * 100)
    fake.volume.writes_wait = True
    fake.volume.is_open_gate.clear()
    waiting = subprocess.Popen(
        shlex.split(command.format(path)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not fake.volume.waiting_at_gate:
        path.stat()
    os.killpg(waiting.pid, signal.SIGINT)
    assert waiting.wait(60) != 0
    assert path.stat().st_size in (0, 100)


def test_many_waiting_writes_do_not_fill_the_memory(fake: Mounted) -> None:
    """Past a bound the writers' data stays with the kernel; all of it arrives in the end."""
    fake.volume.writes_wait = True
    fake.volume.is_open_gate.clear()

    def write(number: int) -> None:
        (fake.path / str(number)).write_bytes(bytes([number]) * (1 << 20))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(150)]
    for writer in writers:
        writer.start()
    while fake.volume.waiting_at_gate < 128:
        os.sched_yield()
    assert fake.volume.waiting_at_gate == 128
    fake.thread.loop.call_soon_threadsafe(fake.volume.is_open_gate.set)
    for writer in writers:
        writer.join()
    for number in range(150):
        assert (fake.path / str(number)).read_bytes() == bytes([number]) * (1 << 20)
