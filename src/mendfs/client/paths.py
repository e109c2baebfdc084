"""Absolute POSIX paths over a volume, for the command line: names, `.` and `..`, symbolic links, listings."""

import errno
import os
import stat
from collections.abc import AsyncIterator
from typing import NamedTuple

from mendfs.client.volume import Volume
from mendfs.errors import OperationError, UsageError
from mendfs.model import NAME_BYTES_MAX, PATH_BYTES_MAX, ROOT_INODE, Attributes, Inode
from mendfs.wire.messages.meta import WALK_NAMES_MAX, DirectoryEntry

LINKS_MAX = 40
"""Symbolic links followed in one path, as in Linux."""
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


class Place(NamedTuple):
    """A name in a directory, and what it stands for if it is there."""

    parent: Attributes
    name: bytes
    found: Attributes | None


class _Walk:
    """Where a path has led so far: the directories from the root on, for `..`, and the names they were found under.

    Names are asked for together, up to the next `..`; only a symbolic link on the way costs another call.
    """

    def __init__(self, volume: Volume, path: str) -> None:
        self._volume = volume
        self._path = path
        self._links = 0
        self._known: dict[tuple[Inode, bytes], Attributes | None] = {}
        self.at: list[Attributes] = []
        self.names: list[bytes] = []

    async def begin(self) -> list[bytes]:
        """Stand at the root; returns the names to go."""
        names = names_of(self._path)
        self.at = [await self._ask(ROOT_INODE, names)]
        return names

    async def _ask(self, directory: Inode, names: list[bytes]) -> Attributes:
        """Learn what the next names stand for; returns the directory itself."""
        asked: list[bytes] = []
        for name in names[:WALK_NAMES_MAX]:
            if name == b".." or len(name) > NAME_BYTES_MAX:
                break
            asked.append(name)
        found = await self._volume.walk(directory, tuple(asked))
        for above, name, here in zip(found, asked, found[1:], strict=False):
            self._known[above.inode, name] = here
        if len(found) <= len(asked) and stat.S_ISDIR(found[-1].mode):
            self._known[found[-1].inode, asked[len(found) - 1]] = None
        return found[0]

    async def _look_up(self, directory: Inode, name: bytes, rest: list[bytes]) -> Attributes:
        if (directory, name) not in self._known:
            await self._ask(directory, [name, *rest])
        found = self._known[directory, name]
        if found is None:
            raise OperationError(errno.ENOENT)
        return found

    async def step(self, name: bytes, rest: list[bytes], *, follow: bool) -> list[bytes]:
        """Go to `name`, after which `rest` is to come; returns the names that come before it because `name` was a
        symbolic link.
        """
        here = self.at[-1]
        if not stat.S_ISDIR(here.mode):
            raise OperationError(errno.ENOTDIR, self._path)
        if len(name) > NAME_BYTES_MAX:
            raise OperationError(errno.ENAMETOOLONG, self._path)
        if name == b"..":
            self.at = self.at[:-1] or self.at
            self.names = self.names[:-1]
            return []
        try:
            found = await self._look_up(here.inode, name, rest)
        except OperationError as error:
            raise OperationError(error.errno, self._path) from error
        if not stat.S_ISLNK(found.mode) or not follow:
            self.at.append(found)
            self.names.append(name)
            return []
        self._links += 1
        if self._links > LINKS_MAX:
            raise OperationError(errno.ELOOP, self._path)
        target = await self._volume.readlink(found.inode)
        if target.startswith(b"/"):
            self.at, self.names = self.at[:1], []
        return [part for part in target.split(b"/") if part not in (b"", b".")]


async def _walk(volume: Volume, path: str, *, follow: bool) -> _Walk:
    walk = _Walk(volume, path)
    names = await walk.begin()
    while names:
        name = names.pop(0)
        # A link with a slash behind it is followed even at the end, as the kernel does.
        names = await walk.step(name, names, follow=follow or bool(names) or path.endswith("/")) + names
    if path.endswith("/") and not stat.S_ISDIR(walk.at[-1].mode):
        raise OperationError(errno.ENOTDIR, path)
    return walk


async def resolve(volume: Volume, path: str, follow: bool = True) -> Attributes:
    """The inode at `path`; with `follow` False a symbolic link at its end is itself the answer."""
    return (await _walk(volume, path, follow=follow)).at[-1]


async def canonical_directory(volume: Volume, path: str) -> str:
    """The path of the directory that `path` leads to, without links, dots and double slashes."""
    walk = await _walk(volume, path, follow=True)
    if not stat.S_ISDIR(walk.at[-1].mode):
        raise OperationError(errno.ENOTDIR, path)
    return "/" + os.fsdecode(b"/".join(walk.names))


async def resolve_place(volume: Volume, path: str) -> Place:
    """Where `path` leads, links at its end followed; the last name need not be there.

    Raises UsageError for the root: it has no name.
    """
    walk = _Walk(volume, path)
    names = await walk.begin()
    while names:
        name = names.pop(0)
        try:
            names = await walk.step(name, names, follow=True) + names
        except OperationError as error:
            if error.errno != errno.ENOENT or names:
                raise
            return Place(walk.at[-1], name, None)
    if not walk.names:
        raise UsageError(f"{path!r} is the root of the volume: it cannot be replaced")
    found = walk.at[-1]
    if path.endswith("/") and not stat.S_ISDIR(found.mode):
        raise OperationError(errno.ENOTDIR, path)
    return Place(walk.at[-2], walk.names[-1], found)


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
