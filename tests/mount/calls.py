"""What several tests of mounts do with files."""

import contextlib
import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def fails(code: int) -> Iterator[None]:
    """The block fails with this errno."""
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == code, f"{errno.errorcode[caught.value.errno or 0]}, not {errno.errorcode[code]}"


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    """A descriptor for the block."""
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


def compare_random_writes(mounted: Path, local: Path) -> None:
    """The same random calls on a file of a mount and on a local one: every answer is the same."""
    rng = random.Random(2)
    paths = (mounted, local)
    fds = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
    for _ in range(150):
        offset, length = rng.randrange(3 << 20), rng.choice((1, 100, 4096, 70_000, 1 << 20, 3 << 20))
        match rng.choice(("write", "write", "truncate", "read", "append")):
            case "write":
                data = rng.randbytes(length)
                assert {os.pwrite(fd, data, offset) for fd in fds} == {length}
            case "append":
                data = rng.randbytes(1000)
                ends = {os.lseek(fd, 0, os.SEEK_END) for fd in fds}
                assert len(ends) == 1
                assert {os.write(fd, data) for fd in fds} == {1000}
            case "truncate":
                for fd in fds:
                    os.ftruncate(fd, offset)
            case "read":
                assert os.pread(fds[0], length, offset) == os.pread(fds[1], length, offset)
        assert os.fstat(fds[0]).st_size == os.fstat(fds[1]).st_size
    for fd in fds:
        os.close(fd)
    assert paths[0].read_bytes() == paths[1].read_bytes()
