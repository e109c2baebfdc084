"""Segment files and their descriptors: few of many files are open, and none is closed while somebody uses it.

A store of 64 TiB has a quarter of a million segments, and a process may have a few thousand descriptors. A file
that is closed here is opened again by whoever needs it next. Two things forbid closing one: a call under way (its
descriptor's number could become another file's), and unsynced writes (an error of theirs is told to the descriptor
that made them). Calls come from the event loop and from the disk's threads. Only the threads close anything, and not
with the lock held, for which the loop may wait: with the last descriptor of a deleted file goes the file, and freeing
256 MiB in many pieces takes a disk its time.
"""

import errno
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mendfs.world.disk import Buffer, Disk, File

_NO_DESCRIPTORS = {errno.EMFILE, errno.ENFILE}
OPEN_MIN = 8
"""Files kept open even when descriptors are short: the active segment, one being copied, those being read."""


class OpenFiles:
    """The descriptors of one store's segment files: `most` of them, the longest unused closed first."""

    def __init__(self, disk: Disk, most: int) -> None:
        self.disk = disk
        self.lock = threading.Lock()
        self.unused = threading.Condition(self.lock)
        """Notified when a file that is being closed has lost its last user."""
        self._most = max(OPEN_MIN, most)
        self._open: OrderedDict[SegmentFile, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def open(self, path: str, *, create: bool = False) -> "SegmentFile":
        """Open a file; with `create` it must not exist yet. Blocks."""
        file = SegmentFile(self, path)
        file.descriptor = self.acquire(path, create=create)
        with self.lock:
            self.used(file)
        self.shrink()
        return file

    def acquire(self, path: str, *, create: bool = False) -> File:
        """A descriptor. If there are none left, those that nobody uses are given up. Blocks.

        Called without the lock: the event loop takes that for what is in the page cache, and must not wait for a disk.
        """
        try:
            return self.disk.open(path, create=create)
        except OSError as error:
            if error.errno not in _NO_DESCRIPTORS:
                raise
            if not self.shrink(OPEN_MIN):
                raise
        return self.disk.open(path, create=create)

    def used(self, file: "SegmentFile") -> None:
        """It is the last one to be closed now; called with the lock held."""
        self._open[file] = None
        self._open.move_to_end(file)

    def forget(self, file: "SegmentFile") -> None:
        """It is being closed; called with the lock held."""
        self._open.pop(file, None)

    def shrink(self, most: int | None = None) -> bool:
        """Close unused files until `most` are left, or as many as may be; whether any was closed. Blocks."""
        most = self._most if most is None else most
        if len(self._open) <= most:
            return False
        with self.lock:
            idle = [file for file in self._open if file.is_idle][: max(0, len(self._open) - most)]
            descriptors = [file.let_go() for file in idle]
        for descriptor in descriptors:
            if descriptor is not None:
                descriptor.close()
        return bool(idle)


class SegmentFile:
    """A `File` that is opened when it is needed."""

    def __init__(self, files: OpenFiles, path: str) -> None:
        self.path = path
        self.descriptor: File | None = None
        self.is_pinned = False
        """It has writes that no sync covers: it stays open."""
        self._files = files
        self._users = 0
        self._is_closed = False

    @property
    def is_open(self) -> bool:
        """Whether using it costs no opening."""
        return self.descriptor is not None

    @property
    def is_idle(self) -> bool:
        """Whether it may be closed for a while."""
        return not self._users and not self.is_pinned

    def let_go(self) -> File | None:
        """Its descriptor, to be closed without the lock; called with the lock held and nobody using it."""
        descriptor, self.descriptor = self.descriptor, None
        self._files.forget(self)
        return descriptor

    @contextmanager
    def _use(self) -> Iterator[File]:
        with self._files.lock:
            if self._is_closed:
                raise OSError(errno.EBADF, "the segment file was closed", self.path)
            self._users += 1
            if self.descriptor is not None:
                self._files.used(self)
        try:
            descriptor = self.descriptor
            yield descriptor if descriptor is not None else self._open()
        finally:
            with self._files.lock:
                self._users -= 1
                if self._is_closed and not self._users:
                    self._files.unused.notify_all()

    def _open(self) -> File:
        """Open it anew; it is in use, so nobody closes it."""
        opened = self._files.acquire(self.path)
        with self._files.lock:
            if self.descriptor is None:
                self.descriptor = opened
            self._files.used(self)
            descriptor = self.descriptor
        if descriptor is not opened:
            opened.close()  # another thread was quicker
        self._files.shrink()
        return descriptor

    def read_into(self, buffer: memoryview | bytearray, offset: int) -> int:
        """See `world.disk.File`."""
        self._files.shrink()
        with self._use() as file:
            return file.read_into(buffer, offset)

    def read_cached_into(self, buffer: memoryview | bytearray, offset: int) -> bool:
        """See `world.disk.File`. What is not open would have to be opened first, which waits."""
        if self.descriptor is None:
            return False
        with self._use() as file:
            return file.read_cached_into(buffer, offset)

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """See `world.disk.File`."""
        self.is_pinned = True
        with self._use() as file:
            file.write(buffers, offset)

    def datasync(self) -> None:
        """See `world.disk.File`."""
        self._files.shrink()  # those of syncs before could not be closed earlier
        with self._use() as file:
            file.datasync()

    def truncate(self, length: int) -> None:
        """See `world.disk.File`."""
        with self._use() as file:
            file.truncate(length)

    def punch(self, offset: int, length: int) -> None:
        """See `world.disk.File`."""
        with self._use() as file:
            file.punch(offset, length)

    def forget_cached(self, offset: int, length: int) -> None:
        """See `world.disk.File`."""
        with self._use() as file:
            file.forget_cached(offset, length)

    def size(self) -> int:
        """See `world.disk.File`."""
        with self._use() as file:
            return file.size()

    def allocated(self) -> int:
        """See `world.disk.File`."""
        with self._use() as file:
            return file.allocated()

    def is_linked(self) -> bool:
        """See `world.disk.File`."""
        with self._use() as file:
            return file.is_linked()

    def close(self) -> None:
        """Close it for good, when nobody uses it any more. Blocks."""
        with self._files.lock:
            self._is_closed = True
            while self._users:
                self._files.unused.wait()
            descriptor = self.let_go()
        if descriptor is not None:
            descriptor.close()
