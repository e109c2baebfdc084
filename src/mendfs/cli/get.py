"""`get`: files and trees of the volume to this machine, many at a time.

Modes, times, symbolic and hard links, holes and users' extended attributes are kept; the copies belong to the caller.
A file is written under a temporary name and renamed when it is whole. Everything is on the disk when the command
returns.
"""

import asyncio
import errno
import functools
import os
import stat
from collections.abc import Sequence

from mendfs.cli.command import At
from mendfs.cli.crew import Crew, Family
from mendfs.cli.file_actions import check_regular, children_of, open_inode, released
from mendfs.cli.progress import Progress
from mendfs.cli.transfer import PIECE_BYTES, Copying, Counts, kept_mode
from mendfs.client.open_file import OpenFile
from mendfs.client.paths import names_of, resolve
from mendfs.errors import AllReplicasFailed, MendfsError, OperationError, UsageError
from mendfs.model import Attributes, Inode
from mendfs.world import local_tree
from mendfs.world.local_disk import LocalDisk
from mendfs.world.streams import run_apart, write_stream

ZEROS = bytes(PIECE_BYTES)
"""A piece that is all zeros is not written: the file gets a hole."""


async def get(at: At, sources: Sequence[str], target: str, *, recursive: bool, progress: Progress) -> Counts:
    """Copy `sources` to the local `target`, or into it if it is a directory. Returns what was done."""
    work = _Get(at, progress)
    if not target:
        raise UsageError("an empty path names no local file")
    is_into = os.path.isdir(target)
    if len(sources) > 1 and not is_into:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), target)
    trees: list[str] = []
    for source in sources:
        try:
            if await work.begin(source, target, recursive=recursive, is_into=is_into):
                trees.append(source)
        except (MendfsError, OSError) as error:
            work.skip(error)
    measuring = asyncio.ensure_future(work.expect(trees)) if progress.is_shown and trees else None
    try:
        await work.crew.run()
    finally:
        if measuring is not None:
            measuring.cancel()
    await work.sync(target)
    return work.counts


class _Get(Copying):
    def __init__(self, at: At, progress: Progress) -> None:
        super().__init__(at)
        self.crew = Crew()
        self._progress = progress
        self._disk = LocalDisk()
        self._linked: dict[Inode, asyncio.Future[str | None]] = {}
        """Files with several names: where the first of them is now, None if that failed."""
        self._buffers: list[bytearray] = []
        self._lost_xattrs = False

    async def expect(self, trees: Sequence[str]) -> None:
        """How much there is to copy, found out while it is being copied."""
        from mendfs.cli.trees import usage_of

        for tree in trees:
            self._progress.expect((await usage_of(self.at, tree))[-1].size)

    async def sync(self, target: str) -> None:
        """Everything copied is on the disk afterwards."""
        if self.counts.files:
            holder = target if os.path.isdir(target) else os.path.dirname(os.path.abspath(target))
            await self._disk.run(local_tree.sync_file_system, holder)

    async def begin(self, source: str, target: str, *, recursive: bool, is_into: bool) -> bool:
        """Add the jobs for one source; returns whether it is a tree."""
        inside = self.at.path(source)
        found = await resolve(self.at.volume, inside)
        is_tree = stat.S_ISDIR(found.mode)
        if is_tree and not recursive:
            raise OperationError(errno.EISDIR, f"{source} (get -r copies it with all that is in it)")
        if not is_tree:
            check_regular(found, inside)
        names = names_of(inside)
        if is_into and names and names[-1] != b"..":
            local = os.path.join(target, os.fsdecode(names[-1]))
        elif is_into:
            local = target  # the root of the volume has no name: what is in it goes into the directory
        elif target.endswith("/") and not is_tree:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), target)
        else:
            local = target.rstrip("/") or "/"
        if is_tree:
            self._refuse_own_inside(inside, local)
            self.crew.add(functools.partial(self._directory, found, inside, local, None, is_top=True))
            return True
        self._progress.expect(found.size)
        if os.path.exists(local) and not stat.S_ISREG(os.stat(local).st_mode):
            self.crew.add(functools.partial(self._to_device, found, inside, local))
        else:
            # A link in the target's place stays, and what it names is replaced; as cp does.
            self.crew.add(functools.partial(self._file, found, inside, os.path.realpath(local)))
        return False

    def _refuse_own_inside(self, inside: str, local: str) -> None:
        """A tree cannot be copied into itself through a mount of this volume: the copying would never end."""
        from mendfs.cli.volumes import own_path

        own = own_path(local, self.at.volume.parameters.id)
        whole = "/" + os.path.normpath(inside).strip("/")
        if own is not None and (whole == "/" or own == whole or own.startswith(whole + "/")):
            raise UsageError(f"{inside} cannot be copied into itself, to {local}")

    # --- jobs --------------------------------------------------------------------------------------------------------

    async def _directory(
        self, attributes: Attributes, path: str, local: str, above: Family | None, *, is_top: bool = False
    ) -> None:
        try:
            if not (is_top and os.path.isdir(local)):
                await self._disk.run(local_tree.make_directory, local)
        except OSError as error:
            self.skip(error, path)
            return
        family = self.crew.family(functools.partial(self._finish_directory, attributes, path, local), above)
        self.crew.add(functools.partial(self._children, attributes.inode, path, local, family), family)

    async def _finish_directory(self, attributes: Attributes, path: str, local: str) -> None:
        try:
            xattrs = await self._xattrs(attributes.inode)
            kept = await self._disk.run(
                local_tree.finish_directory, local, _mode(attributes), _times(attributes), xattrs
            )
        except (OperationError, OSError) as error:
            self.skip(error, path)
            return
        self._check_xattrs(kept, local)
        self.counts.directories += 1

    async def _children(self, inode: Inode, path: str, local: str, family: Family) -> None:
        try:
            entries = await children_of(self.at.volume, inode)
        except OperationError as error:
            self.skip(OperationError(error.errno, path))
            return
        for name, attributes in entries:
            below, to = f"{path.rstrip('/')}/{os.fsdecode(name)}", os.path.join(local, os.fsdecode(name))
            if name in (b"", b".", b"..") or b"/" in name or b"\0" in name:
                # No meta server of ours says so. One that does must not make us write elsewhere.
                self.leave_out(f"{below} has a name that no file can have: not copied")
            elif stat.S_ISDIR(attributes.mode):
                self.crew.add(functools.partial(self._directory, attributes, below, to, family), family)
            elif stat.S_ISREG(attributes.mode):
                self.crew.add(functools.partial(self._file, attributes, below, to), family)
            elif stat.S_ISLNK(attributes.mode):
                self.crew.add(functools.partial(self._link, attributes, below, to), family)
            else:
                self.skip_special(below, attributes.mode)

    async def _link(self, attributes: Attributes, path: str, local: str) -> None:
        try:
            target = await self.at.volume.readlink(attributes.inode)
            await self._disk.run(local_tree.make_link, local, target, _times(attributes))
        except OperationError as error:
            self.skip(OperationError(error.errno, path))
            return
        except OSError as error:
            self.skip(error, path)
            return
        self.counts.links += 1

    async def _file(self, attributes: Attributes, path: str, local: str) -> None:
        try:
            if attributes.nlink > 1:
                await self._one_of_several(attributes, path, local)
            else:
                await self._copy(attributes, path, local)
        except AllReplicasFailed as error:
            self.skip(error, path)
        except OperationError as error:
            self.skip(OperationError(error.errno, path))
        except OSError as error:
            self.skip(error, path)

    async def _one_of_several(self, attributes: Attributes, path: str, local: str) -> None:
        """A file with several names: the first that comes is copied, the others become names of the copy."""
        copied = self._linked.get(attributes.inode)
        if copied is not None:
            # Whoever makes the copy has a worker of its own, so waiting here cannot hold it up.
            existing = await asyncio.shield(copied)
            if existing is not None:
                await self._disk.run(local_tree.make_hard_link, existing, local)
                self.counts.links += 1
                return
        done = self._linked[attributes.inode] = asyncio.get_running_loop().create_future()
        result = None
        try:
            await self._copy(attributes, path, local)
            result = local
        finally:
            done.set_result(result)

    # --- one file ----------------------------------------------------------------------------------------------------

    async def _xattrs(self, inode: Inode) -> dict[str, bytes]:
        names = [os.fsdecode(name) for name in await self.at.volume.list_xattr(inode)]
        wanted = [name for name in names if name.startswith(local_tree.XATTR_PREFIX)]
        return {name: await self.at.volume.get_xattr(inode, os.fsencode(name)) for name in wanted}

    def _check_xattrs(self, kept: bool, local: str) -> None:
        if not kept and not self._lost_xattrs:
            self._lost_xattrs = True
            self.at.trouble(f"{local}: extended attributes are not kept, the file system here has none")

    async def _copy(self, attributes: Attributes, path: str, local: str) -> None:
        target = local_tree.Target(local)
        try:
            async with released(await open_inode(self.at.volume, attributes.inode, path, os.O_RDONLY)) as file:
                xattrs = await self._xattrs(attributes.inode)
                size = await self._pour(file, target)
            kept = await self._disk.run(target.finish, size, _mode(attributes), _times(attributes), xattrs)
        except BaseException:
            target.abandon()
            raise
        self._check_xattrs(kept, local)
        self.counts.files += 1

    async def _pour(self, file: OpenFile, target: local_tree.Target) -> int:
        """Copy the contents; returns how long they are."""
        buffer = self._buffers.pop() if self._buffers else bytearray(PIECE_BYTES)
        position = 0
        while count := await file.read_into(memoryview(buffer), position):
            if count < PIECE_BYTES or buffer != ZEROS:
                await self._disk.run(target.write, memoryview(buffer)[:count], position)
            position += count
            self.counts.bytes += count
            self._progress.did(count)
        # Not after an error: a thread may still be writing from it.
        self._buffers.append(buffer)
        return position

    async def _to_device(self, attributes: Attributes, path: str, local: str) -> None:
        """To something that is no regular file (a device, a fifo), which stays what it is."""
        try:
            async with released(await open_inode(self.at.volume, attributes.inode, path, os.O_RDONLY)) as file:
                fd = await run_apart(local_tree.open_device, local)
                try:
                    buffer = memoryview(bytearray(PIECE_BYTES))
                    position = 0
                    while count := await file.read_into(buffer, position):
                        await write_stream(fd, buffer[:count])
                        position += count
                        self._progress.did(count)
                finally:
                    local_tree.close_device(fd)
        except (OperationError, OSError) as error:
            self.skip(error, path)
            return
        self.counts.bytes += position


def _mode(attributes: Attributes) -> int:
    return kept_mode(attributes.mode, uid=attributes.uid, gid=attributes.gid)


def _times(attributes: Attributes) -> local_tree.Times:
    return local_tree.Times(attributes.atime_ns, attributes.mtime_ns)
