"""The disk as stores see it: files with explicit syncs, and a few threads for what may wait.

`world.local_disk` is the real one.

Methods of `File` and `Disk` block; `Disk.run` is how an event loop calls those that may take long. They raise OSError
as the system does: the caller turns it into an error that says what it means.
"""

from collections.abc import Callable, Sequence
from typing import ParamSpec, Protocol, TypeVar

Buffer = bytes | bytearray | memoryview
Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class File(Protocol):
    """An open file. Offsets and lengths in bytes."""

    def read_into(self, buffer: memoryview | bytearray, offset: int) -> int:
        """Fill `buffer` from `offset`; returns the bytes read, fewer only at the end of the file."""
        ...

    def read_cached_into(self, buffer: memoryview | bytearray, offset: int) -> bool:
        """As read_into but never waits: False (and `buffer` undefined) unless all of it was in memory."""
        ...

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all of `buffers`, one after the other, from `offset` on; raises OSError if not all could be."""
        ...

    def datasync(self) -> None:
        """fdatasync. After an OSError what was unsynced must be taken as lost: never call it again to be sure."""
        ...

    def truncate(self, length: int) -> None:
        """Cut or extend to `length` bytes."""
        ...

    def punch(self, offset: int, length: int) -> None:
        """Give the space back; the range reads as zeros."""
        ...

    def forget_cached(self, offset: int, length: int) -> None:
        """Drop clean pages from the page cache, so that the next read comes from the disk. Length 0: to the end."""
        ...

    def size(self) -> int:
        """The file's length."""
        ...

    def allocated(self) -> int:
        """Bytes it occupies on the disk."""
        ...

    def is_linked(self) -> bool:
        """Whether the file still has a name: False if somebody deleted it."""
        ...

    def close(self) -> None:
        """Close the descriptor."""
        ...


class Disk(Protocol):
    """A machine's files. Paths are absolute."""

    def open(self, path: str, *, create: bool = False, read_only: bool = False) -> File:
        """Open a file; with `create` it must not exist yet."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is anything at `path`."""
        ...

    def names(self, path: str) -> list[str]:
        """The names in a directory, sorted."""
        ...

    def make_directories(self, path: str) -> None:
        """`mkdir -p`, mode 0700."""
        ...

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable: a file's fdatasync says nothing about its name."""
        ...

    def unlink(self, path: str) -> None:
        """Remove a file."""
        ...

    def read_file(self, path: str) -> bytes:
        """A small file, whole."""
        ...

    def replace_file(self, path: str, content: bytes, *, mode: int = 0o600) -> None:
        """Write beside, sync, rename over, sync the directory: after a power cut the old or the new one is there."""
        ...

    def free_bytes(self, path: str) -> int:
        """Bytes that may still be written below `path`."""
        ...

    def total_bytes(self, path: str) -> int:
        """Bytes of the file system that holds `path`."""
        ...

    def lock(self, path: str) -> File:
        """Take an exclusive lock on a file, made if missing, until it is closed. Raises BlockingIOError if held."""
        ...

    async def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Call `function` on one of a few threads. In simulation: here and now."""
        ...
