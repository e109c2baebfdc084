"""Absolute POSIX paths over a volume, for the command line: resolve with symbolic links, read and write in streams."""

import errno
import os
import stat
from collections.abc import AsyncIterator, Iterable

from mendfs.client.open_file import OpenFile
from mendfs.client.volume import Volume
from mendfs.errors import OperationError, UsageError
from mendfs.model import NAME_BYTES_MAX, PATH_BYTES_MAX, ROOT_INODE, Attributes, Inode, MiB
from mendfs.wire.messages.meta import DirectoryEntry

LINKS_MAX = 40
"""Symbolic links followed in one path, as in Linux."""
CHUNK_BYTES = MiB
LIST_LIMIT = 500
"""Names asked for at once."""


def names_of(path: str) -> list[bytes]:
    """The names of an absolute path. Raises UsageError for a relative one."""
    if not path.startswith("/"):
        raise UsageError(f"{path!r} is not absolute: paths inside the volume begin with /")
    encoded = os.fsencode(path)
    if len(encoded) > PATH_BYTES_MAX:
        raise OperationError(errno.ENAMETOOLONG, path)
    return [name for name in encoded.split(b"/") if name not in (b"", b".")]


class _Walk:
    """Where a path has led so far: the directories from the root on, for `..`."""

    def __init__(self, volume: Volume, path: str, root: Attributes) -> None:
        self._volume = volume
        self._path = path
        self._links = 0
        self.at = [root]

    async def step(self, name: bytes, *, follow: bool) -> list[bytes]:
        """Go to `name`; returns the names that come next because it was a symbolic link."""
        here = self.at[-1]
        if not stat.S_ISDIR(here.mode):
            raise OperationError(errno.ENOTDIR, self._path)
        if len(name) > NAME_BYTES_MAX:
            raise OperationError(errno.ENAMETOOLONG, self._path)
        if name == b"..":
            self.at = self.at[:-1] or self.at
            return []
        try:
            found = await self._volume.lookup(here.inode, name)
        except OperationError as error:
            raise OperationError(error.errno, self._path) from error
        if not stat.S_ISLNK(found.mode) or not follow:
            self.at.append(found)
            return []
        self._links += 1
        if self._links > LINKS_MAX:
            raise OperationError(errno.ELOOP, self._path)
        target = await self._volume.readlink(found.inode)
        if target.startswith(b"/"):
            self.at = self.at[:1]
        return [part for part in target.split(b"/") if part not in (b"", b".")]


async def resolve(volume: Volume, path: str, follow: bool = True) -> Attributes:
    """The inode at `path`; with `follow` False a symbolic link at its end is itself the answer."""
    walk = _Walk(volume, path, await volume.attributes(ROOT_INODE))
    names = names_of(path)
    while names:
        name = names.pop(0)
        # A link with a slash behind it is followed even at the end, as the kernel does.
        names = await walk.step(name, follow=follow or bool(names) or path.endswith("/")) + names
    if path.endswith("/") and not stat.S_ISDIR(walk.at[-1].mode):
        raise OperationError(errno.ENOTDIR, path)
    return walk.at[-1]


async def resolve_parent(volume: Volume, path: str) -> tuple[Attributes, bytes]:
    """The directory that holds the last name of `path`, and that name. Raises UsageError for the root itself."""
    names = names_of(path)
    if not names or names[-1] == b"..":
        raise UsageError(f"{path!r} does not end with a name")
    parent = await resolve(volume, "/" + os.fsdecode(b"/".join(names[:-1])))
    if not stat.S_ISDIR(parent.mode):
        raise OperationError(errno.ENOTDIR, path)
    return parent, names[-1]


async def list_directory(volume: Volume, inode: Inode) -> AsyncIterator[DirectoryEntry]:
    """Every entry of a directory, with attributes, in order of the names' bytes."""
    after = b""
    while True:
        listing = await volume.list_directory(inode, after, LIST_LIMIT, with_attributes=True)
        for entry in listing.entries:
            yield entry
        if listing.complete or not listing.entries:
            return
        after = listing.entries[-1].name


async def read_file(volume: Volume, path: str) -> AsyncIterator[bytes]:
    """The contents of a file, a MiB at a time. Raises EISDIR, EINVAL for what holds none."""
    found = await resolve(volume, path)
    _check_regular(found, path)
    file = await volume.open_file(found.inode, flags=os.O_RDONLY)
    try:
        buffer = bytearray(CHUNK_BYTES)
        offset = 0
        while count := await file.read_into(memoryview(buffer), offset):
            yield bytes(memoryview(buffer)[:count])
            offset += count
    finally:
        await file.release()


def _check_regular(attributes: Attributes, path: str) -> None:
    if stat.S_ISDIR(attributes.mode):
        raise OperationError(errno.EISDIR, path)
    if not stat.S_ISREG(attributes.mode):
        raise OperationError(errno.EINVAL, f"{path} is no regular file")


async def open_for_writing(volume: Volume, path: str, *, mode: int, uid: int, gid: int, exclusive: bool) -> OpenFile:
    """The file at `path`, empty: made, or truncated. With `exclusive`, EEXIST if there is one."""
    parent, name = await resolve_parent(volume, path)
    try:
        made = await volume.make(parent.inode, name, stat.S_IFREG | mode, uid=uid, gid=gid, open=True)
    except OperationError as error:
        if error.errno != errno.EEXIST or exclusive:
            raise OperationError(error.errno, path) from error
    else:
        return await volume.open_made(made, flags=os.O_WRONLY)
    found = await resolve(volume, path)
    _check_regular(found, path)
    return await volume.open_file(found.inode, flags=os.O_WRONLY | os.O_TRUNC)


async def write_file(
    volume: Volume,
    path: str,
    pieces: AsyncIterator[bytes] | Iterable[bytes],
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    exclusive: bool = False,
) -> int:
    """Make or replace a file's contents from `pieces`; returns its size. It is on W servers and committed then."""
    file = await open_for_writing(volume, path, mode=mode, uid=uid, gid=gid, exclusive=exclusive)
    offset = 0
    try:
        if isinstance(pieces, AsyncIterator):
            async for piece in pieces:
                offset += await file.write(piece, offset)
        else:
            for piece in pieces:
                offset += await file.write(piece, offset)
        await file.flush()
    finally:
        await file.release()
    return offset
