"""The real disk: files through positioned system calls, and four threads for what may wait.

Descriptors are close-on-exec. Every method raises OSError as the system does, naming the path; nothing is retried
except an interrupted or short write, which the system allows at any time.
"""

import asyncio
import ctypes
import errno
import fcntl
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from mendfs.world.disk import Buffer, File

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

THREADS = 4
"""Enough to keep an SSD busy beside a fdatasync that takes its time; each more costs memory and context switches."""

BUFFERS_PER_WRITE_MAX = 1024
"""IOV_MAX of Linux: what one pwritev takes."""

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
BYTES_PER_SECTOR = 512
"""The unit of st_blocks, whatever the file system's own block is."""

libc = ctypes.CDLL(None, use_errno=True)
libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _keep_owner(path: str, fd: int) -> None:
    """A new file belongs to whom the one at `path` belongs: root may replace a user's file, who must still read it."""
    if os.geteuid() == 0 and os.path.exists(path):
        status = os.stat(path)
        os.fchown(fd, status.st_uid, status.st_gid)


class LocalFile:
    """A `File` on this machine."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd

    def read_into(self, buffer: memoryview | bytearray, offset: int) -> int:
        """Fill `buffer` from `offset`; returns the bytes read, fewer only at the end of the file."""
        view = memoryview(buffer)
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def read_cached_into(self, buffer: memoryview | bytearray, offset: int) -> bool:
        """As read_into but never waits: False (and `buffer` undefined) unless all of it was in memory."""
        try:
            return os.preadv(self._fd, [buffer], offset, os.RWF_NOWAIT) == len(buffer)
        except OSError as error:
            # EAGAIN: not in the page cache. EOPNOTSUPP: a file system that cannot tell, so the caller takes a thread.
            if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
                return False
            raise

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all of `buffers`, one after the other, from `offset` on; raises OSError if not all could be."""
        rest = [memoryview(buffer).cast("B") for buffer in buffers if len(buffer)]
        while rest:
            written = os.pwritev(self._fd, rest[:BUFFERS_PER_WRITE_MAX], offset)
            if written == 0:
                raise OSError(errno.EIO, "the system wrote nothing", self._path)
            offset += written
            while rest and written >= len(rest[0]):
                written -= len(rest.pop(0))
            if written:
                rest[0] = rest[0][written:]

    def datasync(self) -> None:
        """fdatasync. After an OSError what was unsynced must be taken as lost: never call it again to be sure."""
        os.fdatasync(self._fd)

    def truncate(self, length: int) -> None:
        """Cut or extend to `length` bytes."""
        os.ftruncate(self._fd, length)

    def punch(self, offset: int, length: int) -> None:
        """Give the space back; the range reads as zeros."""
        flags = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
        while libc.fallocate(self._fd, flags, offset, length) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code), self._path)

    def forget_cached(self, offset: int, length: int) -> None:
        """Drop clean pages from the page cache, so that the next read comes from the disk."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_DONTNEED)

    def size(self) -> int:
        """The file's length."""
        return os.fstat(self._fd).st_size

    def allocated(self) -> int:
        """Bytes it occupies on the disk."""
        return os.fstat(self._fd).st_blocks * BYTES_PER_SECTOR

    def is_linked(self) -> bool:
        """Whether the file still has a name: False if somebody deleted it."""
        return os.fstat(self._fd).st_nlink > 0

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class LocalDisk:
    """This machine's files. One object a process: it owns the threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="disk")

    def open(self, path: str, *, create: bool = False, read_only: bool = False) -> File:
        """Open a file; with `create` it must not exist yet."""
        flags = os.O_RDONLY if read_only else os.O_RDWR
        if create:
            flags |= os.O_CREAT | os.O_EXCL
        return LocalFile(path, os.open(path, flags | os.O_CLOEXEC, 0o600))

    def exists(self, path: str) -> bool:
        """Whether there is anything at `path`, be it a dangling link."""
        return os.path.lexists(path)

    def names(self, path: str) -> list[str]:
        """The names in a directory, sorted."""
        return sorted(os.listdir(path))

    def make_directories(self, path: str) -> None:
        """`mkdir -p`, mode 0700; the names of new directories are made durable."""
        missing = []
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for name in reversed(missing):
            try:
                os.mkdir(name, 0o700)
            except FileExistsError:
                if not os.path.isdir(name):
                    raise
            self.sync_directory(os.path.dirname(name))

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable: a file's fdatasync says nothing about its name."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlink(self, path: str) -> None:
        """Remove a file."""
        os.unlink(path)

    def read_file(self, path: str) -> bytes:
        """A small file, whole."""
        with open(path, "rb") as file:
            return file.read()

    def replace_file(self, path: str, content: bytes, *, mode: int = 0o600) -> None:
        """Write beside, sync, rename over, sync the directory: after a power cut the old or the new one is there."""
        # The process id keeps two processes (a command and a server) from writing into each other's new file.
        beside = f"{path}.{os.getpid()}.new"
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, mode)
        try:
            try:
                os.fchmod(fd, mode)
                _keep_owner(path, fd)
                rest = memoryview(content)
                while rest:
                    rest = rest[os.write(fd, rest) :]
                os.fsync(fd)
            finally:
                os.close(fd)
            os.rename(beside, path)
        except OSError:
            # The half-written file is of no use to anybody; the error that matters is the one being raised.
            if os.path.lexists(beside):
                os.unlink(beside)
            raise
        self.sync_directory(os.path.dirname(path))

    def free_bytes(self, path: str) -> int:
        """Bytes that an ordinary user may still write below `path`."""
        status = os.statvfs(path)
        return status.f_bavail * status.f_frsize

    def total_bytes(self, path: str) -> int:
        """Bytes of the file system that holds `path`."""
        status = os.statvfs(path)
        return status.f_blocks * status.f_frsize

    def lock(self, path: str) -> File:
        """Take an exclusive lock on a file, made if missing, until it is closed. Raises BlockingIOError if held."""
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return LocalFile(path, fd)

    async def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Call `function` on one of a few threads.

        A cancelled caller does not stop the thread: buffers handed to `function` stay in use until it returns.
        """
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, functools.partial(function, *args, **kwargs))


def umask() -> int:
    """The mode bits that this process keeps off what it makes. The system only tells it by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
