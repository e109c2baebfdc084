"""`rm`: files, and with -r whole trees, many names at a time.

A tree that was removed half way, by Ctrl-C or because something failed, is removed the rest of the way by the same
command: what is already gone is no error then. Directories go when all that was in them is gone.
"""

import errno
import functools
import os
import stat
from collections.abc import Sequence

from mendfs.cli.command import At
from mendfs.cli.crew import Crew, Family
from mendfs.cli.file_actions import each, is_directory
from mendfs.client.paths import LIST_LIMIT, names_of, resolve_parent
from mendfs.errors import OperationError, UsageError
from mendfs.model import ROOT_INODE, Inode

GONE = (errno.ENOENT, errno.ESTALE)
ATTEMPTS_MAX = 5
"""Times a directory is emptied again because others put something into it meanwhile."""


async def remove(at: At, paths: Sequence[str], *, recursive: bool, force: bool, whole_volume: bool) -> None:
    """Remove files, with `recursive` directories too; with `force` a name that is not there is no error."""

    async def remove_one(path: str) -> None:
        inside = at.path(path)
        if not names_of(inside):
            await _remove_everything(at, recursive=recursive, whole_volume=whole_volume)
            return
        try:
            parent, name = await resolve_parent(at.volume, inside)
            found = await at.volume.lookup(parent.inode, name)
        except OperationError as error:
            if force and error.errno in (*GONE, errno.ENOTDIR):
                return
            raise OperationError(error.errno, inside) from None
        if not is_directory(found):
            if inside.endswith("/"):
                raise OperationError(errno.ENOTDIR, inside)
            await _unlink(at, parent.inode, name, inside)
        elif not recursive:
            raise OperationError(errno.EISDIR, f"{path} (rm -r removes it with all that is in it)")
        else:
            crew = Crew()
            _Tree(at, crew).add(parent.inode, name, found.inode, inside.rstrip("/"), None)
            await crew.run()

    await each(at, paths, remove_one)


async def _remove_everything(at: At, *, recursive: bool, whole_volume: bool) -> None:
    if not recursive or not whole_volume:
        raise UsageError('"rm -r /" would remove everything in the volume: add --whole-volume if that is meant')
    crew = Crew()
    tree = _Tree(at, crew)

    async def keep_root() -> None:
        return

    family = crew.family(keep_root)
    crew.add(lambda: tree.empty(ROOT_INODE, "", family), family)
    await crew.run()


async def _unlink(at: At, parent: Inode, name: bytes, path: str) -> None:
    try:
        await at.volume.unlink(parent, name)
    except OperationError as error:
        if error.errno not in GONE:
            at.skip(OperationError(error.errno, path))


class _Tree:
    """Trees being removed by a crew."""

    def __init__(self, at: At, crew: Crew) -> None:
        self._at = at
        self._crew = crew

    def add(self, parent: Inode, name: bytes, inode: Inode, path: str, above: Family | None, attempt: int = 1) -> None:
        """Empty a directory and remove it."""

        async def remove_directory() -> None:
            try:
                await self._at.volume.rmdir(parent, name)
            except OperationError as error:
                if error.errno in GONE:
                    return
                if error.errno == errno.ENOTEMPTY and attempt < ATTEMPTS_MAX and not self._at.exit_code:
                    self.add(parent, name, inode, path, above, attempt + 1)
                    return
                self._at.skip(OperationError(error.errno, path))

        family = self._crew.family(remove_directory, above)
        self._crew.add(lambda: self.empty(inode, path, family), family)

    async def empty(self, inode: Inode, path: str, family: Family) -> None:
        """Add what removes everything in a directory, a page of names at a time."""
        after = b""
        while True:
            try:
                listing = await self._at.volume.list_directory(inode, after, LIST_LIMIT, with_attributes=False)
            except OperationError as error:
                if error.errno not in (*GONE, errno.ENOTDIR):
                    raise
                return  # somebody else has removed it
            for entry in listing.entries:
                below = f"{path}/{os.fsdecode(entry.name)}"
                if stat.S_ISDIR(entry.kind):
                    self.add(inode, entry.name, entry.inode, below, family)
                else:
                    self._crew.add(functools.partial(_unlink, self._at, inode, entry.name, below), family)
            if listing.complete or not listing.entries:
                return
            after = listing.entries[-1].name
