"""What a mount needs of a volume: `client.volume.Volume` has it, and so has the tests' volume in memory.

Nothing here knows of FUSE. Errors are MendfsErrors; their errno is what the application sees.
"""

from typing import Protocol

from mendfs import model
from mendfs.model import Attributes, Inode
from mendfs.wire.messages.meta import Listing, VolumeStat


class ServedFile(Protocol):
    """An open file: one for each open(2)."""

    @property
    def attributes(self) -> Attributes:
        """As they were at the open."""
        ...

    @property
    def keep_cache(self) -> bool:
        """Whether the kernel may keep the pages it has: nothing changed since this client last knew."""
        ...

    async def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer`; returns the bytes read, fewer only at the end of the file."""
        ...

    def try_write(self, data: memoryview, offset: int) -> bool:
        """Take the bytes if that needs no waiting; False: use `write`."""
        ...

    async def write(self, data: memoryview, offset: int) -> int:
        """Take the bytes; a file opened with O_APPEND ignores `offset`."""
        ...

    async def allocate(self, mode: int, offset: int, length: int) -> None:
        """As fallocate(2); EOPNOTSUPP for modes that it does not know."""
        ...

    async def seek(self, offset: int, whence: int) -> int:
        """As lseek(2) with SEEK_DATA (3) and SEEK_HOLE (4)."""
        ...

    async def flush(self) -> None:
        """At each close(2): stored and committed. Raises an error that is pending."""
        ...

    async def fsync(self, datasync: bool = False) -> None:
        """Durable."""
        ...

    async def release(self) -> None:
        """The last descriptor is gone."""
        ...


class ServedVolume(Protocol):
    """The volume behind a mount."""

    @property
    def parameters(self) -> model.Volume:
        """The volume's parameters."""
        ...

    async def close(self, timeout_s: float = 30) -> tuple[str, ...]:
        """Flush and end the session; returns a line for each inode that was not flushed."""
        ...

    async def lookup(self, parent: Inode, name: bytes) -> Attributes:
        """Raises ENOENT."""
        ...

    async def attributes(self, inode: Inode) -> Attributes:
        """With this client's unflushed writes."""
        ...

    def recent_attributes(self, inode: Inode, within_s: float) -> tuple[Attributes, float] | None:
        """Attributes that came with another answer no longer than `within_s` ago, and their age; None: ask."""
        ...

    async def set_attributes(
        self,
        inode: Inode,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        clear_set_id: bool = False,
    ) -> Attributes:
        """Change what is not None; `clear_set_id` takes the set-id bits from a regular file whose mode is not set."""
        ...

    async def make(
        self,
        parent: Inode,
        name: bytes,
        mode: int,
        *,
        uid: int,
        gid: int,
        rdev: int = 0,
        target: bytes = b"",
        open: bool = False,
    ) -> Attributes:
        """A new file, directory, symbolic link, fifo, socket or device. Raises EEXIST."""
        ...

    async def link(self, inode: Inode, parent: Inode, name: bytes) -> Attributes:
        """One more name."""
        ...

    async def unlink(self, parent: Inode, name: bytes) -> Attributes | None:
        """Remove a name."""
        ...

    async def rmdir(self, parent: Inode, name: bytes) -> None:
        """Remove an empty directory."""
        ...

    async def rename(
        self, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, flags: int = 0
    ) -> Attributes | None:
        """As renameat2."""
        ...

    async def readlink(self, inode: Inode) -> bytes:
        """What a symbolic link says."""
        ...

    async def list_directory(self, inode: Inode, after: bytes, limit: int, with_attributes: bool) -> Listing:
        """At most `limit` names after `after`, in order of their bytes."""
        ...

    async def get_xattr(self, inode: Inode, name: bytes) -> bytes:
        """Raises ENODATA."""
        ...

    async def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int) -> object:
        """`flags` as in setxattr(2)."""
        ...

    async def list_xattr(self, inode: Inode) -> tuple[bytes, ...]:
        """The names."""
        ...

    async def remove_xattr(self, inode: Inode, name: bytes) -> object:
        """Raises ENODATA."""
        ...

    async def stat_volume(self) -> VolumeStat:
        """Room and use."""
        ...

    async def open_file(self, inode: Inode, *, flags: int, clear_set_id: bool = False) -> ServedFile:
        """Revalidates; O_TRUNC truncates, and with `clear_set_id` takes the set-id bits."""
        ...

    async def open_made(self, attributes: Attributes, *, flags: int) -> ServedFile:
        """After `make(open=True)`."""
        ...

    async def sync_committed(self) -> None:
        """Names, and the data that is committed, durable. Writes that nobody has flushed are left to their timer."""
        ...

    async def sync(self) -> None:
        """Everything durable."""
        ...
