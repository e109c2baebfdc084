"""What the small file commands do, on an open volume: listings, making, reading, writing, renaming.

What was written is durable when the command returns. Of several paths each is tried; what fails is said.
"""

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from mendfs.cli.command import At
from mendfs.cli.file_text import Entry
from mendfs.client.open_file import OpenFile
from mendfs.client.paths import Place, list_directory, resolve, resolve_parent, resolve_place
from mendfs.client.volume import Volume
from mendfs.errors import MendfsError, OperationError, UsageError
from mendfs.model import Attributes, Inode, MiB
from mendfs.world.local_disk import umask
from mendfs.world.streams import read_stream

PIECE_BYTES = 4 * MiB
"""A default block: enough to keep all replicas busy while the next piece is read."""


async def each(at: At, paths: Sequence[str], action: Callable[[str], Awaitable[object]]) -> None:
    """Do it with each of the paths; what goes wrong with one is said, and the next one follows."""
    for path in paths:
        try:
            await action(path)
        except (MendfsError, OSError) as error:
            at.skip(error)


async def find_or_none(volume: Volume, path: str) -> Attributes | None:
    """What is at a path, links followed, or None if there is nothing."""
    try:
        return await resolve(volume, path)
    except OperationError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


def is_directory(attributes: Attributes | None) -> bool:
    """Whether there is something, and it is a directory."""
    return attributes is not None and stat.S_ISDIR(attributes.mode)


async def children_of(volume: Volume, inode: Inode) -> list[Entry]:
    """All entries of a directory."""
    entries: list[Entry] = []
    async for entry in list_directory(volume, inode):
        assert entry.attributes is not None, "they were asked for"
        entries.append((entry.name, entry.attributes))
    return entries


async def list_path(at: At, path: str, *, follow: bool) -> list[Entry]:
    """A directory's entries, or the file itself. A link is listed itself unless `follow`."""
    inside = at.path(path)
    found = await resolve(at.volume, inside, follow=follow)
    if is_directory(found):
        return await children_of(at.volume, found.inode)
    return [(os.fsencode(path), found)]


async def link_targets(volume: Volume, entries: Sequence[Entry]) -> dict[Inode, bytes]:
    """What the symbolic links among `entries` say; one that vanished meanwhile is left out."""
    targets: dict[Inode, bytes] = {}
    for _, attributes in entries:
        if stat.S_ISLNK(attributes.mode):
            try:
                targets[attributes.inode] = await volume.readlink(attributes.inode)
            except OperationError as error:
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
    return targets


async def stat_path(at: At, path: str) -> Entry:
    """A file's attributes; a symbolic link's own."""
    inside = at.path(path)
    return os.fsencode(inside), await resolve(at.volume, inside, follow=False)


# --- making -----------------------------------------------------------------------------------------------------------


async def make_at(
    volume: Volume, path: str, mode: int, *, target: bytes = b"", open: bool = False, masked: bool = True
) -> Attributes:
    """Make what `mode` says at `path`, owned by the caller. Errors name the path."""
    parent, name = await resolve_parent(volume, path)
    try:
        return await volume.make(
            parent.inode,
            name,
            mode & ~umask() if masked else mode,
            uid=os.getuid(),
            gid=os.getgid(),
            target=target,
            open=open,
        )
    except OperationError as error:
        raise OperationError(error.errno, path) from None


async def make_directories(at: At, paths: Sequence[str], *, parents: bool) -> None:
    """`mkdir`, with `parents` as `mkdir -p`."""

    async def make(path: str) -> None:
        inside = at.path(path)
        if parents:
            await _make_with_parents(at.volume, inside)
        else:
            await make_at(at.volume, inside, stat.S_IFDIR | 0o777)

    await each(at, paths, make)


async def _make_with_parents(volume: Volume, path: str) -> None:
    whole = ""
    for name in filter(None, path.split("/")):
        whole += f"/{name}"
        found = await find_or_none(volume, whole)
        if found is None:
            try:
                await make_at(volume, whole, stat.S_IFDIR | 0o777)
            except OperationError as error:
                # Somebody else has just made it: that is as good.
                if error.errno != errno.EEXIST or not is_directory(await find_or_none(volume, whole)):
                    raise
        elif not is_directory(found):
            raise OperationError(errno.ENOTDIR, whole)


async def create_files(at: At, paths: Sequence[str], *, size: int, mode: int | None) -> None:
    """New files of zeros, `size` bytes long; one that exists is an error. A mode is taken as it is."""

    async def create(path: str) -> None:
        inside = at.path(path)
        if inside.endswith("/"):
            raise OperationError(errno.EISDIR, inside)
        permissions = 0o666 if mode is None else mode
        made = await make_at(at.volume, inside, stat.S_IFREG | permissions, masked=mode is None)
        if size:
            try:
                await at.volume.set_attributes(made.inode, size=size)
            except OperationError as error:
                parent, name = await resolve_parent(at.volume, inside)
                await at.volume.unlink(parent.inode, name)
                raise OperationError(error.errno, f"{inside}, {size} bytes") from None

    await each(at, paths, create)


# --- contents ---------------------------------------------------------------------------------------------------------


def check_regular(attributes: Attributes, path: str) -> None:
    """Raise unless it is a regular file."""
    if is_directory(attributes):
        raise OperationError(errno.EISDIR, path)
    if not stat.S_ISREG(attributes.mode):
        raise UsageError(f"{path} is no regular file: it has no contents")


@asynccontextmanager
async def released(file: OpenFile) -> AsyncIterator[OpenFile]:
    """Release the file in the end. After Ctrl-C without waiting: servers that are away may be what it waited for."""
    try:
        yield file
    except asyncio.CancelledError:
        file.abandon()
        raise
    except BaseException:
        await file.release()
        raise
    await file.release()


async def open_for_reading(volume: Volume, path: str) -> OpenFile:
    """Open a regular file. Errors name the path."""
    found = await resolve(volume, path)
    check_regular(found, path)
    return await open_inode(volume, found.inode, path, os.O_RDONLY)


async def open_inode(volume: Volume, inode: Inode, path: str, flags: int) -> OpenFile:
    """Open an inode. Errors name the path."""
    try:
        return await volume.open_file(inode, flags=flags)
    except OperationError as error:
        raise OperationError(error.errno, path) from None


async def _open_for_writing(volume: Volume, path: str, flags: int) -> OpenFile:
    place: Place = await resolve_place(volume, path)
    if place.found is not None:
        check_regular(place.found, path)
        return await open_inode(volume, place.found.inode, path, flags)
    if path.endswith("/"):
        raise OperationError(errno.EISDIR, path)
    try:
        made = await volume.make(
            place.parent.inode,
            place.name,
            stat.S_IFREG | (0o666 & ~umask()),
            uid=os.getuid(),
            gid=os.getgid(),
            open=True,
        )
    except OperationError as error:
        raise OperationError(error.errno, path) from None
    return await volume.open_made(made, flags=flags)


async def write_file(at: At, path: str, text: str | None, *, offset: int | None, append: bool) -> None:
    """Write all of `text`, or of standard input."""
    source = at.input
    if text is None and source is None:
        raise UsageError("write what? In the shell the text follows the path: write PATH TEXT")
    truncates = offset is None and not append
    flags = os.O_WRONLY | (os.O_TRUNC if truncates else 0) | (os.O_APPEND if append else 0)
    try:
        async with released(await _open_for_writing(at.volume, at.path(path), flags)) as file:
            position = offset or 0
            if text is not None:
                await file.write(os.fsencode(text), position)
            elif source is not None:
                while piece := await read_stream(source, PIECE_BYTES):
                    position += await file.write(piece, position)
            await file.fsync()
    except OperationError as error:
        raise OperationError(error.errno, path) from None


async def copy_out(at: At, paths: Sequence[str], *, offset: int = 0, length: int | None = None) -> None:
    """Write files, or `length` bytes from `offset` on of each, to standard output."""

    async def copy(path: str) -> None:
        async with released(await open_for_reading(at.volume, at.path(path))) as file:
            await _copy_range(at, file, offset, length)

    await each(at, paths, copy)


async def _copy_range(at: At, file: OpenFile, offset: int, length: int | None) -> None:
    left = file.attributes.size if length is None else length
    buffer = memoryview(bytearray(min(max(left, 1), PIECE_BYTES)))
    # Without a length up to the end of the file, which may be further off by now.
    while length is None or left > 0:
        piece = buffer if length is None else buffer[:left]
        count = await file.read_into(piece, offset)
        if not count:
            return
        await at.write_raw(piece[:count])
        offset += count
        left -= count


# --- names ------------------------------------------------------------------------------------------------------------


async def move(at: At, sources: Sequence[str], target: str) -> None:
    """Rename; into `target` if that is a directory, as it must be for several sources."""
    inside = at.path(target)
    into = await find_or_none(at.volume, inside)
    if not is_directory(into) and len(sources) > 1:
        raise OperationError(errno.ENOTDIR, target)

    async def rename(source: str) -> None:
        old_parent, old_name = await resolve_parent(at.volume, at.path(source))
        if into is not None and is_directory(into):
            new_parent, new_name = into, old_name
        else:
            new_parent, new_name = await resolve_parent(at.volume, inside)
        try:
            if inside.endswith("/") and not is_directory(into):
                # As mv: "mv file name/" asks for a directory that is not there; a directory may be renamed so.
                moved = await at.volume.lookup(old_parent.inode, old_name)
                if not is_directory(moved):
                    raise OperationError(errno.ENOTDIR)
            await at.volume.rename(old_parent.inode, old_name, new_parent.inode, new_name)
        except OperationError as error:
            if error.errno == errno.EINVAL:
                raise UsageError(f"{source} cannot be moved into itself, to {target}") from None
            raise OperationError(error.errno, f"{source} to {target}") from None

    await each(at, sources, rename)
