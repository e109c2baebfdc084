"""Disks of data servers that are full, filled by others, read-only, or hang: what applications and people see.

The folders of the servers lie on small file systems of their own (tmpfs, and ext4 on a loop device).
"""

import contextlib
import errno
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.real_cluster import RealCluster, needs_mounts, until

pytestmark = [needs_mounts, pytest.mark.timeout(300)]

KiB = 1 << 10
MiB = 1 << 20
SMALL = 64 * MiB


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"{command}: {done.stderr}"


def is_possible(*command: object) -> bool:
    return subprocess.run([str(part) for part in command], capture_output=True, timeout=60).returncode == 0


class Disks:
    """A file system for the folder of each data server."""

    def __init__(self, cluster: RealCluster) -> None:
        self.cluster = cluster
        self._thaws: list[threading.Timer] = []

    def folder(self, server: int) -> Path:
        return self.cluster.dir / f"data-{server}"

    def memory(self, server: int, size: int) -> None:
        """A tmpfs of `size` bytes, or make the one that is there as big."""
        folder = self.folder(server)
        if os.path.ismount(folder):
            run("mount", "-o", f"remount,size={size}", folder)
            return
        folder.mkdir(parents=True)
        if not is_possible("mount", "-t", "tmpfs", "-o", f"size={size},mode=700", "mendfs-test", folder):
            pytest.skip("a tmpfs cannot be mounted here")

    def ext4(self, server: int) -> None:
        """An ext4 in a file."""
        image, folder = self.cluster.path / f"disk-{server}", self.folder(server)
        folder.mkdir(parents=True)
        image.touch()
        os.truncate(image, 256 * MiB)
        made = is_possible("mkfs.ext4", "-q", image) and is_possible("mount", "-o", "loop", image, folder)
        if not made:
            pytest.skip("no ext4 on a loop device can be made here")

    def freeze(self, server: int) -> None:
        """Whatever writes to it waits. It thaws by itself in time, for a frozen process cannot be killed."""
        run("fsfreeze", "-f", self.folder(server))
        thaw = threading.Timer(60, self.thaw, [server])
        thaw.start()
        self._thaws.append(thaw)

    def thaw(self, server: int) -> None:
        is_possible("fsfreeze", "-u", self.folder(server))

    def clean_up(self) -> None:
        for thaw in self._thaws:
            thaw.cancel()
        folders = [folder for folder in self.cluster.dir.glob("data-*") if os.path.ismount(folder)]
        for folder in folders:
            is_possible("fsfreeze", "-u", folder)
        self.cluster.clean_up()
        for folder in folders:
            is_possible("umount", "-l", folder)

    def troubles(self, server: int) -> str:
        return " ".join(self.server(server)["troubles"])

    def server(self, server: int) -> Any:
        return self.cluster.json("status")["servers"][server]


@pytest.fixture
def disks(cluster: RealCluster) -> Iterator[Disks]:
    made = Disks(cluster)
    try:
        yield made
    finally:
        made.clean_up()


def store(path: Path, data: bytes) -> None:
    """Write and fsync; the first error of write, fsync or close is raised."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    except OSError:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise
    os.close(fd)


def error_of(action: Callable[[], object]) -> int | None:
    try:
        action()
    except OSError as error:
        return error.errno
    return None


def test_full_servers_are_written_round_and_when_all_are_full_the_application_is_told(disks: Disks) -> None:
    for server, size in enumerate((1024 * MiB, SMALL, 1024 * MiB)):
        disks.memory(server, size)
    disks.cluster.up("--servers", 3)
    one_server_is_full(disks)
    for server in (0, 2):
        disks.memory(server, SMALL)
    until(lambda: disks.server(0)["bytes_free"] < SMALL, within_s=60)
    all_servers_are_full(disks)


def one_server_is_full(disks: Disks) -> None:
    """Writing goes on; what is freed is room again, on the disk and in what the server says."""
    cluster = disks.cluster
    first = random.Random(1).randbytes(90 * MiB)
    store(cluster.mnt / "first", first)
    until(lambda: says_full(disks, 1), within_s=60)
    until(lambda: disks.server(0)["bytes_used"] > SMALL, within_s=60)
    status = cluster.json("status")
    assert status["health"] == "degraded" and status["owed"] > 0
    assert [server["state"] for server in status["servers"]] == ["up"] * 3
    assert disks.server(1)["bytes_used"] < SMALL
    free = os.statvfs(cluster.mnt)
    assert free.f_bavail * free.f_frsize < 5 * MiB, "with all copies there is room for no more"
    cluster.drop_caches()
    assert (cluster.mnt / "first").read_bytes() == first
    os.unlink(cluster.mnt / "first")
    until(lambda: disks.server(1)["bytes_used"] < 5 * MiB and not disks.troubles(1), within_s=60)


def says_full(disks: Disks, server: int) -> bool:
    """By its own limit, or because the disk has said so first: what is written beside blocks takes room too."""
    troubles = disks.troubles(server)
    return "no new blocks are taken" in troubles or "no room on the disk" in troubles


def all_servers_are_full(disks: Disks) -> None:
    """The application gets ENOSPC, what was stored is there, and after space is freed writing works again."""
    cluster, rng = disks.cluster, random.Random(4)
    kept, again = rng.randbytes(20 * MiB), rng.randbytes(6 * MiB)
    store(cluster.mnt / "kept", kept)
    assert error_of(lambda: store(cluster.mnt / "too big", rng.randbytes(60 * MiB))) == errno.ENOSPC
    assert error_of(lambda: store(cluster.mnt / "late", rng.randbytes(8 * MiB))) == errno.ENOSPC
    until(lambda: sum(says_full(disks, server) for server in range(3)) >= 2, within_s=60)
    assert cluster.server_states() == ["up"] * 3
    cluster.drop_caches()
    assert (cluster.mnt / "kept").read_bytes() == kept
    (cluster.mnt / "too big").unlink()
    (cluster.mnt / "late").unlink()
    # What was committed is freed. Blocks of writes that failed stay until there is reconcile: a small file fits.
    until(lambda: all(disks.server(server)["bytes_used"] < 50 * MiB for server in range(3)), within_s=60)
    until(lambda: error_of(lambda: store(cluster.mnt / "again", again)) is None, within_s=60)
    cluster.drop_caches()
    assert (cluster.mnt / "again").read_bytes() == again
    assert (cluster.mnt / "kept").read_bytes() == kept


def replicas(cluster: RealCluster, path: str) -> list[Any]:
    """Of the blocks of a file; each was read and checked by its server."""
    slots = cluster.json("where", path)["slots"]
    return [replica for slot in slots for extent in slot["extents"] for replica in extent["replicas"]]


@pytest.mark.seed("C13")
def test_disks_that_others_fill_that_are_read_only_or_emptied_heal_by_themselves(disks: Disks) -> None:
    for server in range(3):
        disks.memory(server, SMALL)
    disks.cluster.up("--servers", 3, "--block-size", "16KiB")
    before = random.Random(2).randbytes(MiB)
    store(disks.cluster.mnt / "before", before)
    no_room_even_for_the_index(disks, before)
    read_only_when_the_server_starts(disks, before)
    segments_deleted_under_the_running_server(disks, before)


BLOCKS = 256
"""Of the file that is deleted: noting that takes more than what is left of the last page of the index's log."""


@contextlib.contextmanager
def filled_to_the_last_byte(folder: Path) -> Iterator[None]:
    with open(folder / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    yield
    (folder / "filler").unlink()


def no_room_even_for_the_index(disks: Disks, before: bytes) -> None:
    """That server is read, the others take what is new, what is deleted is deleted, and nothing was started again."""
    cluster = disks.cluster
    pid = cluster.pid("data-1")
    store(cluster.mnt / "deleted", bytes(BLOCKS * 16 * KiB))
    # A heartbeat tells: until then the status counts what was there before.
    until(lambda: disks.server(1)["blocks"] >= BLOCKS, within_s=60)
    blocks = disks.server(1)["blocks"]
    until((disks.folder(1) / "spare").exists, within_s=60)
    with filled_to_the_last_byte(disks.folder(1)):
        store(cluster.mnt / "small", b"small" * 1000)
        assert disks.server(1)["state"] == "up"
        read_from_that_one_alone(disks, before)
        (cluster.mnt / "deleted").unlink()
        until(partial(has_at_most, disks, blocks - BLOCKS // 2), within_s=60)
    until(lambda: not disks.troubles(1) and disks.server(1)["state"] == "up", within_s=60)
    cluster.wait_all_up()
    until(lambda: stored_on_all(cluster, "after", before), within_s=60)
    assert (cluster.mnt / "small").read_bytes() == b"small" * 1000
    assert cluster.pid("data-1") == pid


def has_at_most(disks: Disks, blocks: int) -> bool:
    return bool(disks.server(1)["blocks"] <= blocks)


def read_from_that_one_alone(disks: Disks, before: bytes) -> None:
    others = [disks.cluster.pid(f"data-{server}") for server in (0, 2)]
    for pid in others:
        os.kill(pid, signal.SIGSTOP)
    try:
        disks.cluster.drop_caches()
        assert (disks.cluster.mnt / "before").read_bytes() == before
    finally:
        for pid in others:
            os.kill(pid, signal.SIGCONT)


def read_only_when_the_server_starts(disks: Disks, before: bytes) -> None:
    """It says so, the others go on at once, and it comes when its folder can be written."""
    cluster = disks.cluster
    cluster.kill("data-1")
    until(lambda: is_possible("mount", "-o", "remount,ro", disks.folder(1)), within_s=60)
    began_s = time.monotonic()
    store(cluster.mnt / "meanwhile", before)
    assert time.monotonic() - began_s < 10
    until(lambda: "Read-only file system" in cluster.logs(), within_s=60)
    assert disks.server(1)["state"] == "down"
    run("mount", "-o", "remount,rw", disks.folder(1))
    cluster.wait_all_up()
    until(lambda: stored_on_all(cluster, "at last", before), within_s=60)


def segments_deleted_under_the_running_server(disks: Disks, before: bytes) -> None:
    """Noticed, said, and nothing ends; what is stored from then on is stored."""
    cluster = disks.cluster
    for segment in (disks.folder(1) / "segments").iterdir():
        segment.unlink()
    until(lambda: "from other servers" in disks.troubles(1), within_s=60)
    assert disks.server(1)["state"] == "up"
    cluster.drop_caches()
    assert (cluster.mnt / "before").read_bytes() == before
    until(lambda: stored_on_all(cluster, "new", before), within_s=60)


def stored_on_all(cluster: RealCluster, name: str, data: bytes) -> bool:
    """Write it; whether each replica of each block is there and right."""
    store(cluster.mnt / name, data)
    return {replica["state"] for replica in replicas(cluster, "/" + name)} == {"ok"}


def store_small_files(cluster: RealCluster) -> float:
    """The seconds that takes."""
    began_s = time.monotonic()
    for number in range(20):
        store(cluster.mnt / f"small {number}", b"%d" % number)
    return time.monotonic() - began_s


def test_a_disk_that_hangs_is_gone_round_within_seconds_and_serves_again_when_it_answers(disks: Disks) -> None:
    cluster, rng = disks.cluster, random.Random(3)
    disks.ext4(1)
    cluster.up("--servers", 3)
    before = rng.randbytes(10 * MiB)
    store(cluster.mnt / "before", before)
    usual_s = store_small_files(cluster)
    disks.freeze(1)
    meanwhile = rng.randbytes(10 * MiB)
    began_s = time.monotonic()
    store(cluster.mnt / "meanwhile", meanwhile)
    first_s = time.monotonic() - began_s
    until(lambda: disks.server(1)["state"] == "down", within_s=60)
    later_s = store_small_files(cluster)
    assert (cluster.mnt / "before").read_bytes() == before
    assert first_s < 15, f"{first_s:.1f} s while it was found out"
    # Each would wait for seconds; what the machine has to do besides costs the same with all servers.
    assert later_s < 5 + 2 * usual_s, f"{later_s:.1f} s afterwards, {usual_s:.1f} s before"
    disks.thaw(1)
    until(lambda: disks.server(1)["state"] == "up", within_s=60)
    cluster.drop_caches()
    assert (cluster.mnt / "before").read_bytes() == before
    assert (cluster.mnt / "meanwhile").read_bytes() == meanwhile
    until(lambda: stored_on_all(cluster, "after", before), within_s=60)
