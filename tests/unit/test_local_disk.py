"""The real disk does what `world.disk` promises, errors included."""

import asyncio
import errno
import os
import threading
from pathlib import Path

import pytest

from mendfs.world.disk import Disk, File
from mendfs.world.local_disk import BUFFERS_PER_WRITE_MAX, LocalDisk


@pytest.fixture
def disk() -> Disk:
    return LocalDisk()


@pytest.fixture
def file(disk: Disk, tmp_path: Path) -> File:
    return disk.open(str(tmp_path / "file"), create=True)


def read(file: File, offset: int, length: int) -> bytes:
    buffer = bytearray(length)
    return bytes(buffer[: file.read_into(buffer, offset)])


def test_a_scatter_list_is_written_whole_and_read_back_up_to_the_end(file: File) -> None:
    file.write([b"abc", b"", bytearray(b"def"), memoryview(b"ghi")], 5)
    assert read(file, 0, 100) == bytes(5) + b"abcdefghi"
    assert read(file, 12, 2) == b"hi"
    assert read(file, 14, 1) == b""
    assert file.size() == 14
    file.close()
    file.close()


def test_more_buffers_than_one_system_call_takes_are_written(file: File) -> None:
    pieces = [b"%07d" % number for number in range(3 * BUFFERS_PER_WRITE_MAX + 1)]
    file.write(pieces, 0)
    assert read(file, 0, 1 << 20) == b"".join(pieces)


def test_a_write_that_the_system_cuts_short_goes_on(file: File, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal or a nearly full disk may cut a write anywhere, also between and inside buffers."""
    whole = os.pwritev

    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return whole(fd, [buffers[0][:2]], offset)

    monkeypatch.setattr(os, "pwritev", short)
    file.write([b"abc", b"d", b"efghi"], 0)
    assert read(file, 0, 100) == b"abcdefghi"


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    full = LocalDisk().open("/dev/full")
    with pytest.raises(OSError) as caught:
        full.write([b"x"], 0)
    assert caught.value.errno == errno.ENOSPC
    full.close()


def test_cached_reads_never_give_less_than_was_asked_for(file: File) -> None:
    file.write([b"abcdef"], 0)
    file.datasync()
    buffer = bytearray(4)
    # A file system without RWF_NOWAIT may always answer False; it must not answer True wrongly.
    if file.read_cached_into(buffer, 1):
        assert buffer == b"bcde"
    assert not file.read_cached_into(bytearray(4), 4)
    file.forget_cached(0, 6)
    assert read(file, 0, 6) == b"abcdef"


def test_punched_ranges_read_as_zeros_and_give_their_space_back(file: File) -> None:
    file.write([b"x" * (1 << 20)], 0)
    file.datasync()
    before = file.allocated()
    file.punch(0, 1 << 19)
    assert file.size() == 1 << 20
    assert file.allocated() <= before - (1 << 19)
    assert read(file, 0, 1 << 20) == bytes(1 << 19) + b"x" * (1 << 19)


def test_truncate_cuts_and_extends(file: File) -> None:
    file.write([b"abcdef"], 0)
    file.truncate(3)
    file.truncate(5)
    assert read(file, 0, 10) == b"abc\0\0"


def test_a_deleted_file_is_noticed(disk: Disk, file: File, tmp_path: Path) -> None:
    assert file.is_linked()
    disk.unlink(str(tmp_path / "file"))
    assert not file.is_linked()


def test_a_file_is_created_once_and_opened_only_if_there(disk: Disk, tmp_path: Path) -> None:
    path = str(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        disk.open(path)
    disk.open(path, create=True).close()
    with pytest.raises(FileExistsError):
        disk.open(path, create=True)
    reader = disk.open(path, read_only=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        reader.write([b"x"], 0)
    reader.close()


def test_descriptors_are_not_inherited(disk: Disk, tmp_path: Path) -> None:
    file = disk.open(str(tmp_path / "a"), create=True)
    lock = disk.lock(str(tmp_path / "lock"))
    named = {fd: Path("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")}
    ours = [int(fd) for fd, link in named.items() if link.is_symlink() and link.readlink().parent == tmp_path]
    assert len(ours) == 2
    assert not any(os.get_inheritable(fd) for fd in ours)
    file.close()
    lock.close()


def test_directories_are_made_private_and_names_are_sorted(disk: Disk, tmp_path: Path) -> None:
    path = str(tmp_path / "a" / "b" / "c")
    disk.make_directories(path)
    disk.make_directories(path)
    assert os.stat(path).st_mode & 0o777 == 0o700
    for name in ("z", "a", "m"):
        disk.replace_file(f"{path}/{name}", b"")
    assert disk.names(path) == ["a", "m", "z"]
    assert disk.exists(path)
    assert not disk.exists(f"{path}/q")
    with pytest.raises(FileExistsError):
        disk.make_directories(f"{path}/a")


def test_a_replaced_file_is_the_old_or_the_new_one(disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "file")
    disk.replace_file(path, b"old", mode=0o640)
    assert os.stat(path).st_mode & 0o777 == 0o640

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        with pytest.raises(OSError, match="broken"):
            disk.replace_file(path, b"new")
    assert disk.read_file(path) == b"old"
    assert disk.names(str(tmp_path)) == ["file"]
    disk.replace_file(path, b"new")
    assert disk.read_file(path) == b"new"


def test_a_lock_excludes_until_it_is_closed(disk: Disk, tmp_path: Path) -> None:
    path = str(tmp_path / "lock")
    first = disk.lock(path)
    with pytest.raises(BlockingIOError):
        disk.lock(path)
    first.close()
    disk.lock(path).close()


def test_space_is_counted_in_bytes(disk: Disk, tmp_path: Path) -> None:
    assert 0 <= disk.free_bytes(str(tmp_path)) < disk.total_bytes(str(tmp_path))


async def test_what_may_wait_runs_beside_the_loop() -> None:
    disk = LocalDisk()
    loop_thread = threading.get_ident()
    released = threading.Event()

    def wait(*, answer: int) -> tuple[int, bool]:
        assert released.wait(10)
        return answer, threading.get_ident() != loop_thread

    waiting = asyncio.create_task(disk.run(wait, answer=7))
    # The loop still runs although the function blocks.
    await disk.run(released.set)
    assert await waiting == (7, True)
    with pytest.raises(FileNotFoundError):
        await disk.run(disk.open, "/nonexistent/file")
