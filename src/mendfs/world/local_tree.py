"""Files and directories of this machine as sources and targets of copies.

Everything blocks, so it is called on `Disk.run`'s threads, and raises OSError as the system does, naming the path. A
copy is written beside its place under a name of its own and renamed, so no file ever stands half written in its place.
"""

import contextlib
import ctypes
import errno
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from typing import NamedTuple

from mendfs.world.disk import Buffer
from mendfs.world.local_disk import BYTES_PER_SECTOR, LocalFile, libc

TEMPORARY_PREFIX = ".mendfs-get-"
XATTR_PREFIX = "user."
"""The attributes that users set. Others (capabilities, access lists) mean something only where they were set."""
NO_XATTRS = (errno.ENOTSUP, errno.ENOSYS)


class Times(NamedTuple):
    """What utimensat sets, in nanoseconds since 1970."""

    atime_ns: int
    mtime_ns: int


def status_of(path: str, *, follow: bool) -> os.stat_result:
    """stat or lstat."""
    return os.stat(path, follow_symlinks=follow)


def scan(path: str) -> list[tuple[str, os.stat_result | None]]:
    """The names in a directory with what they stand for, sorted; None for one that vanished meanwhile."""
    entries: list[tuple[str, os.stat_result | None]] = []
    with os.scandir(path) as found:
        for entry in found:
            try:
                entries.append((entry.name, entry.stat(follow_symlinks=False)))
            except FileNotFoundError:
                entries.append((entry.name, None))
    return sorted(entries, key=lambda each: os.fsencode(each[0]))


def bytes_below(path: str) -> int:
    """The sum of the sizes of the regular files in a tree; what cannot be read counts nothing."""
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            try:
                status = os.lstat(os.path.join(folder, name))
            except OSError:
                continue  # an estimate for a progress bar: the copy itself says what it could not read
            if stat.S_ISREG(status.st_mode):
                total += status.st_size
    return total


class Source:
    """A regular file to copy from; anything else is refused with OSError."""

    def __init__(self, path: str, *, follow: bool) -> None:
        # Non-blocking: what was a file when it was listed may be a fifo by now, and opening that waits for a writer.
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW)
        self._fd = os.open(path, flags)
        self.path = path
        self.status = os.fstat(self._fd)
        if not stat.S_ISREG(self.status.st_mode):
            self.close()
            raise OSError(errno.EINVAL, "no longer a regular file", path)

    @property
    def is_sparse(self) -> bool:
        """Whether it has holes, as far as one can see."""
        return self.status.st_blocks * BYTES_PER_SECTOR < self.status.st_size

    def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` on; returns the bytes read, fewer only at the end of the file."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._fd, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def next_data(self, offset: int) -> int | None:
        """The first byte from `offset` on that is not in a hole; None if only a hole is left."""
        if not self.is_sparse:
            return offset
        try:
            return os.lseek(self._fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return None
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return offset  # a file system that does not tell: everything is data
            raise

    def xattrs(self) -> dict[str, bytes]:
        """The users' extended attributes."""
        try:
            names = [name for name in os.listxattr(self._fd) if name.startswith(XATTR_PREFIX)]
            return {name: os.getxattr(self._fd, name) for name in names}
        except OSError as error:
            if error.errno in NO_XATTRS:
                return {}
            raise

    def close(self) -> None:
        """Close the descriptor; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Piece(NamedTuple):
    """The beginning of a file; `is_all` if there is nothing behind it."""

    data: memoryview
    is_all: bool


def begin(path: str, *, follow: bool, length_max: int) -> tuple[Source, Piece, dict[str, bytes]]:
    """Open a file, read its beginning and its extended attributes: for most files one trip to a thread is all."""
    source = Source(path, follow=follow)
    try:
        xattrs = source.xattrs()
        if source.is_sparse:
            return source, Piece(memoryview(b""), False), xattrs
        # One byte more than it seems to have: whether that is the end is then known without another read.
        buffer = memoryview(bytearray(min(source.status.st_size + 1, length_max)))
        count = source.read_into(buffer, 0)
        return source, Piece(buffer[:count], count < len(buffer)), xattrs
    except BaseException:
        source.close()
        raise


class Target:
    """A file being written beside `path`. `finish` puts it there; until then `abandon` leaves nothing behind.

    Its methods may run on any thread; `abandon` waits for one that is at work.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._beside = beside(path)
        self._lock = threading.Lock()
        self._file: LocalFile | None = None
        self._fd = -1
        self._is_over = False

    def _open(self) -> LocalFile:
        if self._is_over:
            # A command that was interrupted is not waited for by its threads.
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED), self.path)
        if self._file is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._beside, flags, 0o600)
            self._file = LocalFile(self._beside, self._fd)
        return self._file

    def write(self, data: Buffer, offset: int) -> None:
        """Write all of `data` at `offset`."""
        with self._lock, self._named():
            self._open().write([data], offset)

    def finish(self, size: int, mode: int, times: Times, xattrs: dict[str, bytes]) -> bool:
        """Give it its size, attributes and name. Returns False if this file system keeps no extended attributes."""
        with self._lock, self._named():
            file = self._open()
            if file.size() != size:
                file.truncate(size)
            kept = _set_xattrs(self._fd, xattrs)
            os.fchmod(self._fd, mode)
            os.utime(self._fd, ns=(times.atime_ns, times.mtime_ns))
            file.close()
            os.replace(self._beside, self.path)
            self._is_over = True
        return kept

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors name the file that was to be, not the one beside it; those of a descriptor name none."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.path) from None

    def abandon(self) -> None:
        """Close and remove it, whatever state it is in; after `finish` there is nothing to remove."""
        with self._lock:
            self._is_over = True
            if self._file is None:
                return
            self._file.close()
            if os.path.lexists(self._beside):
                os.unlink(self._beside)


def beside(path: str) -> str:
    """A name in the same directory that nobody else uses."""
    return os.path.join(os.path.dirname(path), TEMPORARY_PREFIX + secrets.token_hex(8))


def _set_xattrs(target: int | str, xattrs: dict[str, bytes]) -> bool:
    try:
        for name, value in xattrs.items():
            os.setxattr(target, name, value)
    except OSError as error:
        if error.errno in NO_XATTRS:
            return False
        raise
    return True


def directory_xattrs(path: str) -> dict[str, bytes]:
    """The users' extended attributes of a directory."""
    try:
        names = [name for name in os.listxattr(path, follow_symlinks=False) if name.startswith(XATTR_PREFIX)]
        return {name: os.getxattr(path, name, follow_symlinks=False) for name in names}
    except OSError as error:
        if error.errno in NO_XATTRS:
            return {}
        raise


def make_directory(path: str) -> bool:
    """A directory only its owner can enter, for the time it is filled. Returns False if there was one already."""
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        if stat.S_ISDIR(os.lstat(path).st_mode):
            return False
        raise
    return True


def finish_directory(path: str, mode: int, times: Times, xattrs: dict[str, bytes]) -> bool:
    """A directory's attributes, once it is filled. Returns False if extended ones cannot be kept."""
    kept = _set_xattrs(path, xattrs)
    os.chmod(path, mode)
    os.utime(path, ns=(times.atime_ns, times.mtime_ns))
    return kept


def make_link(path: str, target: bytes, times: Times) -> None:
    """A symbolic link; what was there under its name is replaced, unless it is a directory."""
    new = beside(path)
    os.symlink(target, os.fsencode(new))
    _put_in_place(new, path, times)


def make_hard_link(existing: str, path: str) -> None:
    """One more name for a file; what was there under it is replaced, unless it is a directory."""
    new = beside(path)
    os.link(existing, new, follow_symlinks=False)
    _put_in_place(new, path, None)


def _put_in_place(new: str, path: str, times: Times | None) -> None:
    try:
        if times is not None:
            os.utime(new, ns=(times.atime_ns, times.mtime_ns), follow_symlinks=False)
        os.replace(new, path)
    finally:
        # Also when `path` was another name of the same file: renaming does nothing then (rename(2)).
        if os.path.lexists(new):
            os.unlink(new)


def open_device(path: str) -> int:
    """A descriptor for writing to something that is no regular file and stays as it is: a device, a fifo."""
    return os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)


def close_device(fd: int) -> None:
    """Close it. Raises OSError."""
    os.close(fd)


def sync_file_system(path: str) -> None:
    """syncfs of what holds `path`: everything written is on the disk, or OSError says that it is not."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.syncfs(fd) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)
    finally:
        os.close(fd)
