"""What the file commands do, on an open volume. Paths are as people name them (`cli.volumes.path_in_volume`).

What was written is made durable when the command's volume is closed.
"""

import errno
import os
import stat
import sys
from collections.abc import Callable, Sequence
from typing import BinaryIO, NamedTuple

from mendfs.cli.file_text import Entry
from mendfs.cli.volumes import path_in_volume
from mendfs.client.open_file import OpenFile
from mendfs.client.paths import list_directory, resolve, resolve_parent
from mendfs.client.volume import Volume
from mendfs.errors import OperationError, UsageError
from mendfs.model import Attributes, Inode, MiB
from mendfs.world.local_disk import LocalDisk

PIECE_BYTES = 4 * MiB
"""A default block: enough to keep all replicas busy while the next piece is read."""
PROGRESS_FROM_BYTES = 64 * MiB
"""Shorter transfers are over before anybody wonders."""


class Place(NamedTuple):
    """A name in a directory, which may not be there."""

    path: str
    parent: Inode
    name: bytes


async def _find_or_none(volume: Volume, path: str) -> Attributes | None:
    try:
        return await resolve(volume, path)
    except OperationError as error:
        if error.errno == errno.ENOENT:
            return None
        raise


async def _place(volume: Volume, path: str) -> Place:
    inside = path_in_volume(path)
    parent, name = await resolve_parent(volume, inside)
    return Place(inside, parent.inode, name)


def _is_directory(attributes: Attributes | None) -> bool:
    return attributes is not None and stat.S_ISDIR(attributes.mode)


async def _children(volume: Volume, inode: Inode) -> list[Entry]:
    entries: list[Entry] = []
    async for entry in list_directory(volume, inode):
        assert entry.attributes is not None, "they were asked for"
        entries.append((entry.name, entry.attributes))
    return entries


async def list_path(volume: Volume, path: str) -> list[Entry]:
    """A directory's entries, or the file itself."""
    inside = path_in_volume(path)
    found = await resolve(volume, inside)
    if _is_directory(found):
        return await _children(volume, found.inode)
    return [(os.fsencode(inside.rstrip("/").rpartition("/")[2]), found)]


async def stat_path(volume: Volume, path: str) -> Entry:
    """A file's attributes; a symbolic link's own."""
    inside = path_in_volume(path)
    return os.fsencode(inside), await resolve(volume, inside, follow=False)


async def make_directories(volume: Volume, paths: Sequence[str], *, parents: bool) -> None:
    """`mkdir`, with `parents` as `mkdir -p`."""
    for path in paths:
        if parents:
            await _make_with_parents(volume, path)
        else:
            await _make_directory(volume, await _place(volume, path))


async def _make_directory(volume: Volume, place: Place) -> None:
    try:
        await volume.make(place.parent, place.name, stat.S_IFDIR | 0o755, uid=os.getuid(), gid=os.getgid())
    except OperationError as error:
        raise OperationError(error.errno, place.path) from None


async def _make_with_parents(volume: Volume, path: str) -> None:
    whole = ""
    for name in filter(None, path_in_volume(path).split("/")):
        whole += f"/{name}"
        found = await _find_or_none(volume, whole)
        if found is None:
            await _make_directory(volume, await _place(volume, whole))
        elif not _is_directory(found):
            raise OperationError(errno.ENOTDIR, whole)


async def _open_for_writing(volume: Volume, path: str, *, truncate: bool, append: bool = False) -> OpenFile:
    flags = os.O_WRONLY | (os.O_TRUNC if truncate else 0) | (os.O_APPEND if append else 0)
    inside = path_in_volume(path)
    found = await _find_or_none(volume, inside)
    if found is not None:
        _check_regular(found, path)
        return await volume.open_file(found.inode, flags=flags)
    place = await _place(volume, path)
    made = await volume.make(
        place.parent, place.name, stat.S_IFREG | 0o644, uid=os.getuid(), gid=os.getgid(), open=True
    )
    return await volume.open_made(made, flags=flags)


async def _open_for_reading(volume: Volume, path: str) -> OpenFile:
    found = await resolve(volume, path_in_volume(path))
    _check_regular(found, path)
    return await volume.open_file(found.inode, flags=os.O_RDONLY)


def _check_regular(attributes: Attributes, path: str) -> None:
    if _is_directory(attributes):
        raise OperationError(errno.EISDIR, path)
    if not stat.S_ISREG(attributes.mode):
        raise UsageError(f"{path} is no regular file: it has no contents")


async def create_files(volume: Volume, paths: Sequence[str]) -> None:
    """Empty files; one that exists is an error."""
    for path in paths:
        place = await _place(volume, path)
        try:
            await volume.make(place.parent, place.name, stat.S_IFREG | 0o644, uid=os.getuid(), gid=os.getgid())
        except OperationError as error:
            raise OperationError(error.errno, place.path) from None


async def write_file(volume: Volume, path: str, source: BinaryIO, *, offset: int | None, append: bool) -> None:
    """Write all of `source`."""
    file = await _open_for_writing(volume, path, truncate=offset is None and not append, append=append)
    try:
        at = offset or 0
        while piece := source.read(PIECE_BYTES):
            at += await file.write(memoryview(piece), at)
        await file.fsync()
    finally:
        await file.release()


class _Progress:
    """How far a long transfer has come, on a terminal."""

    def __init__(self, what: str, total: int) -> None:
        self._what = what
        self._total = total
        self._is_shown = total >= PROGRESS_FROM_BYTES and sys.stderr.isatty()

    def at(self, done: int) -> None:
        if self._is_shown:
            end = "\n" if done >= self._total else ""
            print(f"\r{self._what}: {done * 100 // self._total} %", end=end, file=sys.stderr, flush=True)


async def _read_all(file: OpenFile, take: Callable[[memoryview], object], progress: _Progress | None = None) -> None:
    buffer = memoryview(bytearray(PIECE_BYTES))
    offset = 0
    while count := await file.read_into(buffer, offset):
        take(buffer[:count])
        offset += count
        if progress is not None:
            progress.at(offset)


async def copy_out(volume: Volume, paths: Sequence[str], target: BinaryIO) -> None:
    """Write files to a stream."""
    for path in paths:
        file = await _open_for_reading(volume, path)
        try:
            await _read_all(file, target.write)
        finally:
            await file.release()
    target.flush()


async def put_file(volume: Volume, local: str, path: str) -> None:
    """Copy a local file into the volume; into a directory under its own name."""
    disk = LocalDisk()
    source = disk.open(os.path.abspath(local), read_only=True)
    try:
        target = await _inside_if_directory(volume, path, os.path.basename(os.path.abspath(local)))
        file = await _open_for_writing(volume, target, truncate=True)
        try:
            progress = _Progress(local, source.size())
            buffer = memoryview(bytearray(PIECE_BYTES))
            at = 0
            while count := await disk.run(source.read_into, buffer, at):
                at += await file.write(buffer[:count], at)
                progress.at(at)
            await file.fsync()
        finally:
            await file.release()
    finally:
        source.close()


async def get_file(volume: Volume, path: str, local: str) -> None:
    """Copy a file of the volume to a local one; into a directory under its own name."""
    file = await _open_for_reading(volume, path)
    try:
        target = os.path.abspath(local)
        if os.path.isdir(target):
            target = os.path.join(target, path.rstrip("/").rpartition("/")[2])
        disk = LocalDisk()
        out = disk.open(target, create=not disk.exists(target))
        try:
            out.truncate(0)
            at = 0

            def write(piece: memoryview) -> None:
                nonlocal at
                out.write([piece], at)
                at += len(piece)

            await _read_all(file, write, _Progress(path, file.attributes.size))
            out.datasync()
        finally:
            out.close()
    finally:
        await file.release()


async def _inside_if_directory(volume: Volume, path: str, name: str) -> str:
    inside = path_in_volume(path)
    found = await _find_or_none(volume, inside)
    return f"{inside.rstrip('/')}/{name}" if _is_directory(found) else inside


async def move(volume: Volume, source: str, target: str) -> None:
    """Rename; into `target` if that is a directory."""
    old = await _place(volume, source)
    new = await _place_of_target(volume, target, os.fsdecode(old.name))
    try:
        await volume.rename(old.parent, old.name, new.parent, new.name)
    except OperationError as error:
        raise OperationError(error.errno, f"{source} to {target}") from None


async def _place_of_target(volume: Volume, target: str, name: str) -> Place:
    found = await _find_or_none(volume, path_in_volume(target))
    if found is not None and _is_directory(found):
        return Place(f"{target.rstrip('/')}/{name}", found.inode, os.fsencode(name))
    return await _place(volume, target)


async def remove(volume: Volume, paths: Sequence[str], *, recursive: bool) -> None:
    """Remove files, with `recursive` directories too."""
    for path in paths:
        place = await _place(volume, path)
        found = await resolve(volume, place.path, follow=False)
        if _is_directory(found) and not recursive:
            raise OperationError(errno.EISDIR, f"{path} (use -r)")
        await _remove_tree(volume, place, found)


async def _remove_tree(volume: Volume, place: Place, found: Attributes) -> None:
    # A stack of our own: a tree may be deeper than Python lets functions call themselves.
    waiting: list[tuple[Place, Attributes, bool]] = [(place, found, False)]
    while waiting:
        at, attributes, is_empty = waiting.pop()
        if not _is_directory(attributes):
            await volume.unlink(at.parent, at.name)
        elif is_empty:
            await volume.rmdir(at.parent, at.name)
        else:
            waiting.append((at, attributes, True))
            for name, child in await _children(volume, attributes.inode):
                waiting.append((Place(f"{at.path}/{os.fsdecode(name)}", attributes.inode, name), child, False))
