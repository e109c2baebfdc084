"""The room that files take: fallocate, holes, sparse copies, through the kernel on a cluster."""

import contextlib
import ctypes
import errno
import os
import random
import subprocess
from pathlib import Path

import pytest

from tests.mount.calls import fails, opened
from tests.real_cluster import RealCluster, needs_mounts, until

pytestmark = needs_mounts

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE = 1, 2, 8, 16
MiB = 1 << 20
_libc = ctypes.CDLL(None, use_errno=True)


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def seek(path: Path, offset: int, whence: int) -> int:
    """By a descriptor that cannot be mapped for writing; -1: nothing follows."""
    with opened(path, os.O_RDONLY) as fd:
        try:
            return os.lseek(fd, offset, whence)
        except OSError as error:
            assert error.errno == errno.ENXIO
            return -1


@pytest.fixture
def path(real: RealCluster, request: pytest.FixtureRequest) -> Path:
    """A name for a file."""
    return real.mnt / f"space-{request.node.name}"


def test_posix_fallocate_makes_the_file_longer_and_writes_nothing(path: Path) -> None:
    """What databases and downloads do first: glibc would write a byte into each 4 KiB if we refused."""
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.posix_fallocate(fd, 0, 100 * MiB)
        assert os.fstat(fd).st_size == 100 * MiB
        assert os.fstat(fd).st_blocks == 0
        os.pwrite(fd, b"here", 5 * MiB)
        os.posix_fallocate(fd, MiB, MiB)  # inside: the size stays
        assert os.fstat(fd).st_size == 100 * MiB
        assert os.pread(fd, 4, 5 * MiB) == b"here"
    assert path.stat().st_size == 100 * MiB


def test_more_than_there_is_room_for_is_refused_at_once(path: Path) -> None:
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        room = os.statvfs(path.parent)
        with fails(errno.ENOSPC):
            os.posix_fallocate(fd, 0, 2 * room.f_blocks * room.f_frsize)
        assert os.fstat(fd).st_size == 0


def test_other_modes_are_refused(path: Path) -> None:
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        for mode in (KEEP_SIZE, COLLAPSE_RANGE, ZERO_RANGE | COLLAPSE_RANGE):
            with fails(errno.EOPNOTSUPP):
                fallocate(fd, mode, 0, 4096)


def test_a_punched_hole_is_zeros_and_gives_its_room_back(real: RealCluster, path: Path) -> None:
    content = random.Random(1).randbytes(12 * MiB)
    path.write_bytes(content)
    assert path.stat().st_blocks == 12 * MiB // 512
    before = real.json("status")["blocks"]["live"]
    with opened(path, os.O_WRONLY) as fd:
        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, MiB + 1, 10 * MiB)
    expected = content[: MiB + 1] + bytes(10 * MiB) + content[11 * MiB + 1 :]
    assert path.read_bytes() == expected
    assert path.stat().st_blocks == 2 * MiB // 512
    until(lambda: real.json("status")["blocks"]["live"] == before - 1, within_s=60)  # the middle one of three
    assert path.read_bytes() == expected
    assert seek(path, 0, os.SEEK_HOLE) == MiB + 1
    assert seek(path, MiB + 1, os.SEEK_DATA) == 11 * MiB + 1


def test_zeroed_ranges_may_make_the_file_longer(path: Path) -> None:
    path.write_bytes(b"x" * 1000)
    with opened(path, os.O_WRONLY) as fd:
        fallocate(fd, ZERO_RANGE | KEEP_SIZE, 900, 1000)
        assert os.fstat(fd).st_size == 1000
        fallocate(fd, ZERO_RANGE, 800, 1000)
    assert path.read_bytes() == b"x" * 800 + bytes(1000)


def test_random_holes_and_writes_equal_those_of_a_local_file(path: Path, tmp_path: Path) -> None:
    """Small, so that ranges meet in every way: bytes still in a buffer, committed ones, holes, both ends of slots."""
    rng = random.Random(7)
    paths = (path, tmp_path / "local")
    size = 9 * MiB
    with contextlib.ExitStack() as stack:
        fds = [stack.enter_context(opened(each, os.O_RDWR | os.O_CREAT)) for each in paths]
        for _ in range(120):
            offset, length = rng.randrange(size), rng.choice((1, 511, 4096, 100_000, MiB, 5 * MiB))
            match rng.choice(("write", "write", "punch", "zero", "grow", "sync", "read")):
                case "write":
                    data = rng.randbytes(length)
                    assert {os.pwrite(fd, data, offset) for fd in fds} == {length}
                case "punch":
                    for fd in fds:
                        fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, length)
                case "zero":
                    for fd in fds:
                        fallocate(fd, ZERO_RANGE | KEEP_SIZE, offset, length)
                case "grow":
                    for fd in fds:
                        fallocate(fd, 0, offset, length)
                case "sync":
                    os.fsync(fds[0])
                case "read":
                    assert os.pread(fds[0], length, offset) == os.pread(fds[1], length, offset)
            assert os.fstat(fds[0]).st_size == os.fstat(fds[1]).st_size
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_holes_are_found_between_committed_and_unflushed_bytes(path: Path) -> None:
    with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
        os.pwrite(fd, b"a" * 1000, 0)
        os.pwrite(fd, b"b" * 1000, 9 * MiB)
        os.fsync(fd)
        os.pwrite(fd, b"c" * 1000, 5 * MiB)  # not flushed yet
        os.ftruncate(fd, 20 * MiB)
        data, at = [], 0
        while (begin := seek(path, at, os.SEEK_DATA)) >= 0:
            at = seek(path, begin, os.SEEK_HOLE)
            data.append((begin, at))
        assert data == [(at, at + 1000) for at in (0, 5 * MiB, 9 * MiB)]
        assert seek(path, 19 * MiB, os.SEEK_HOLE) == 19 * MiB
        assert seek(path, 20 * MiB, os.SEEK_HOLE) == -1


def test_no_hole_is_told_of_where_a_mapping_may_have_written(path: Path) -> None:
    """Pages of a mapping stay with the kernel until it writes them back: a sparse copy must not leave them out."""
    script = f"""
import mmap, os
fd = os.open({str(path)!r}, os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 8 << 20)
reader = os.open({str(path)!r}, os.O_RDONLY)
memory = mmap.mmap(fd, 8 << 20)
os.close(fd)
memory[5 << 20] = 33
data = os.lseek(reader, 0, os.SEEK_DATA)
assert data <= 5 << 20 < os.lseek(reader, data, os.SEEK_HOLE)
"""
    subprocess.run(["python3", "-c", script], check=True, timeout=60)
    assert seek(path, 0, os.SEEK_DATA) == 5 * MiB  # nobody maps it any more


def test_sparse_files_stay_sparse_in_copies_and_archives(path: Path) -> None:
    with opened(path, os.O_WRONLY | os.O_CREAT) as fd:
        os.pwrite(fd, b"x" * 4096, 3 << 40)
    folder = path.with_name(path.name + ".d")
    folder.mkdir()
    copy = folder / "copy"
    subprocess.run(["cp", path, copy], check=True, timeout=30)
    assert (copy.stat().st_size, copy.stat().st_blocks) == ((3 << 40) + 4096, 8)
    subprocess.run(["tar", "-C", folder, "-Scf", folder / "a.tar", "copy"], check=True, timeout=30)
    assert (folder / "a.tar").stat().st_size < 100_000
