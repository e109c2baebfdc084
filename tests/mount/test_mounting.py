"""Mounting and unmounting: what can be in the way, and what is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mendfs.errors import MendfsError, UsageError
from mendfs.fuse import device
from mendfs.fuse.mount_options import MountFlags
from mendfs.fuse.server import MountOptions, serve_mount
from mendfs.model import Attributes, Inode
from tests.mount.conftest import LoopThread, Mounted, Mounting
from tests.mount.fake_volume import FakeVolume
from tests.real_cluster import needs_mounts, needs_root

pytestmark = needs_mounts

SERVE = """
import asyncio, sys
from mendfs.fuse.server import serve_mount
from tests.mount.fake_volume import FakeVolume
async def main():
    mount = await serve_mount(FakeVolume(), sys.argv[1])
    print("mounted", flush=True)
    await mount.wait()
    print(await mount.unmount(), flush=True)
asyncio.run(main())
"""


@contextlib.contextmanager
def serving(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that serves a mount."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(path)], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "mounted\n"
        yield process
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
        if device.find_mount(str(path)) is not None:
            device.unmount(str(path), detach=True)


def refusal(path: Path, options: MountOptions | None = None) -> str:
    thread = LoopThread()
    try:
        with pytest.raises(UsageError) as caught:
            thread.run(serve_mount(FakeVolume(), str(path), options))
        return str(caught.value)
    finally:
        thread.close()


def test_a_missing_mount_point_is_named(tmp_path: Path) -> None:
    path = tmp_path / "none"
    assert refusal(path) == f"mount point {path} does not exist: mkdir {path}"
    path.touch()
    assert refusal(path) == f"mount point {path} is not a directory"


def test_files_are_not_hidden_by_accident(tmp_path: Path, mounting: Mounting) -> None:
    (tmp_path / "file").touch()
    assert "is not empty" in refusal(tmp_path)
    thread = LoopThread()
    options = MountOptions(flags=MountFlags(allow_nonempty=True))
    mount = thread.run(serve_mount(FakeVolume(), str(tmp_path), options))
    assert os.listdir(tmp_path) == []
    thread.run(mount.unmount())
    thread.close()
    assert os.listdir(tmp_path) == ["file"]


def test_a_mount_point_in_use_is_named(fake: Mounted) -> None:
    assert refusal(fake.path) == f"{fake.path} is already a mount point: mendfs umount {fake.path}"


def test_strange_paths_are_found_in_the_mount_table(tmp_path: Path) -> None:
    path = tmp_path / "with space\tand\\tab ü"
    path.mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    with serving(link / path.name):
        assert device.find_mount(str(path)) is not None
        device.unmount_command(str(link / path.name))
        assert device.find_mount(str(path)) is None


def test_unmounting_ends_the_server(tmp_path: Path) -> None:
    with serving(tmp_path) as process:
        (tmp_path / "file").write_bytes(b"x")
        device.unmount_command(str(tmp_path))
        assert process.wait(60) == 0
    with pytest.raises(UsageError, match="is not a mendfs mount"):
        device.unmount_command(str(tmp_path))


def test_a_busy_mount_is_not_taken_from_its_user(tmp_path: Path) -> None:
    with serving(tmp_path) as process:
        with (tmp_path / "file").open("wb"), pytest.raises(MendfsError, match="is in use"):
            device.unmount_command(str(tmp_path))
        device.unmount_command(str(tmp_path))
        assert process.wait(60) == 0


@pytest.mark.parametrize("is_unmounted", [True, False])
def test_a_mount_whose_process_was_killed_can_be_cleaned(tmp_path: Path, is_unmounted: bool) -> None:
    with serving(tmp_path) as process:
        (tmp_path / "file").write_bytes(b"x")
        process.send_signal(signal.SIGKILL)
        process.wait()
        with pytest.raises(OSError, match="endpoint is not connected"):
            os.listdir(tmp_path)
        if is_unmounted:
            device.unmount_command(str(tmp_path))
            assert os.listdir(tmp_path) == []
    with serving(tmp_path):  # a dead mount is taken away by the next one
        assert os.listdir(tmp_path) == []


def test_unmounting_closes_what_is_still_open(mounting: Mounting) -> None:
    """Ctrl-C while a shell stands in the mount: the mount goes, what was written is flushed, the volume is closed."""
    fake = mounting()
    fd = os.open(fake.path / "file", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"x")
    inode = os.fstat(fd).st_ino
    assert fake.thread.run(fake.mount.unmount()) == ()
    assert fake.volume.is_closed
    assert {node.opens for node in fake.volume.nodes.values() if node.inode == inode} == {0}
    for call in (lambda: os.write(fd, b"y"), lambda: os.close(fd)):
        with pytest.raises(OSError, match="not connected"):
            call()


def test_unmounting_says_what_was_not_done_in_time(mounting: Mounting) -> None:
    fake = mounting()
    fake.volume.writes_wait = True
    fake.volume.is_open_gate.clear()
    writer = subprocess.Popen(["sh", "-c", f"echo x > {fake.path}/file"], stderr=subprocess.DEVNULL)
    while not fake.volume.waiting_at_gate:
        os.stat(fake.path)
    assert fake.thread.run(fake.mount.unmount(0.2)) == ("1 requests were not answered in 0.2 s",)
    assert writer.wait(60) != 0


def test_read_only_mounts_refuse_changes(mounting: Mounting) -> None:
    fake = mounting(MountOptions(flags=MountFlags(is_read_only=True)))
    with pytest.raises(OSError, match="Read-only"):
        (fake.path / "file").touch()


@needs_root
def test_devices_and_set_id_bits_count_only_when_asked_for(mounting: Mounting) -> None:
    def options(path: Path) -> list[str]:
        entry = subprocess.run(["findmnt", "-no", "OPTIONS", path], capture_output=True, text=True).stdout
        return entry.strip().split(",")

    careful, trusting = mounting(), mounting(MountOptions(flags=MountFlags(allow_suid=True, allow_devices=True)))
    assert {"nosuid", "nodev", "default_permissions", "allow_other"} <= set(options(careful.path))
    assert not {"nosuid", "nodev"} & set(options(trusting.path))


def test_invalidations_reach_the_kernel(mounting: Mounting) -> None:
    """With long timeouts the kernel answers from its memory, until it is told to forget."""
    fake = mounting(MountOptions(entry_timeout_s=60, attribute_timeout_s=60))
    path = fake.path / "file"
    path.write_bytes(b"old")
    node = next(node for node in fake.volume.nodes.values() if node.data == b"old")
    assert path.stat().st_size == 3
    node.data[:] = b"longer"
    assert path.stat().st_size == 3
    fake.mount.invalidate_inode(node.inode)
    while path.stat().st_size != 6:
        os.sched_yield()
    assert path.read_bytes() == b"longer"
    del fake.volume.nodes[node.parent].names[b"file"]
    assert path.exists()
    fake.mount.invalidate_entry(node.parent, b"file")
    while path.exists():
        os.sched_yield()


def test_a_missing_or_closed_device_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "DEVICE", str(tmp_path / "none"))
    (tmp_path / "mnt").mkdir()
    assert refusal(tmp_path / "mnt").startswith(
        f"there is no {tmp_path}/none: load the kernel's module (modprobe fuse)"
    )
    if device.is_root():
        monkeypatch.setattr(device, "DEVICE", str(tmp_path / "mnt"))
        assert refusal(tmp_path / "mnt").startswith(f"cannot open {tmp_path}/mnt: Is a directory")
        return
    closed = tmp_path / "closed"
    closed.touch(0o000)
    monkeypatch.setattr(device, "DEVICE", str(closed))
    assert refusal(tmp_path / "mnt").startswith(f"only root may open {closed} here")


class SilentVolume(FakeVolume):
    """Its servers are gone: nobody learns anything of its files."""

    async def attributes(self, inode: Inode) -> Attributes:
        await self.gate()
        return await super().attributes(inode)


def test_a_living_mount_that_cannot_answer_is_unmounted_at_once(mounting: Mounting) -> None:
    """To ask it for anything would take the minute that a call waits for its servers."""
    silent = mounting(volume=SilentVolume())
    silent.volume.is_open_gate.clear()
    began_s = time.monotonic()
    device.unmount_command(str(silent.path))
    assert device.find_mount(str(silent.path)) is None
    assert time.monotonic() - began_s < 10


def test_a_second_mount_over_one_that_cannot_answer_is_refused_soon(mounting: Mounting) -> None:
    silent = mounting(volume=SilentVolume())
    silent.volume.is_open_gate.clear()
    assert refusal(silent.path) == f"{silent.path} is already a mount point: mendfs umount {silent.path}"
