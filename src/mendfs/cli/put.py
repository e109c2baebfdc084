"""`put`: files and trees of this machine into the volume, many at a time.

Modes, times, symbolic and hard links, holes and users' extended attributes are kept; the copies belong to the caller.
A file is written under a temporary name and renamed when it is whole. Everything is durable when the command returns.
"""

import asyncio
import errno
import functools
import os
import secrets
import stat
from collections.abc import Sequence

from mendfs.cli.command import At
from mendfs.cli.crew import Crew, Family
from mendfs.cli.file_actions import find_or_none, is_directory, released
from mendfs.cli.progress import Progress
from mendfs.cli.transfer import PIECE_BYTES, Copying, Counts, kept_mode
from mendfs.client.names import RENAME_NOREPLACE
from mendfs.client.open_file import OpenFile
from mendfs.client.paths import canonical_directory, resolve_place
from mendfs.errors import MendfsError, OperationError, UsageError
from mendfs.model import Inode
from mendfs.world import local_tree
from mendfs.world.local_disk import LocalDisk

TEMPORARY_PREFIX = b".mendfs-put-"
CLEAN_UP_S = 5.0
"""For removing a temporary name after something failed: a meta server that is away keeps nobody longer."""


class Spot:
    """Where something goes: a name in a directory of the volume, and its path for messages."""

    __slots__ = ("name", "parent", "path")

    def __init__(self, parent: Inode, name: bytes, path: str) -> None:
        self.parent = parent
        self.name = name
        self.path = path


async def put(at: At, sources: Sequence[str], target: str, *, recursive: bool, progress: Progress) -> Counts:
    """Copy `sources` to `target`, or into it if it is a directory. Returns what was done."""
    work = _Put(at, progress)
    inside = at.path(target)
    into = await find_or_none(at.volume, inside)
    if len(sources) > 1 and not is_directory(into):
        raise OperationError(errno.ENOTDIR, target)
    for source in sources:
        try:
            await work.begin(source, inside, recursive=recursive)
        except (MendfsError, OSError) as error:
            work.skip(error)
    if progress.is_shown:
        trees = [source for source in sources if os.path.isdir(source)]
        measuring = asyncio.ensure_future(work.expect(trees))
        try:
            await work.crew.run()
        finally:
            measuring.cancel()
    else:
        await work.crew.run()
    await at.volume.sync()
    return work.counts


class _Put(Copying):
    def __init__(self, at: At, progress: Progress) -> None:
        super().__init__(at)
        self.crew = Crew()
        self._progress = progress
        self._disk = LocalDisk()
        self._uid, self._gid = os.getuid(), os.getgid()
        self._buffers: list[memoryview] = []
        """For big files, used again: fresh memory costs a page fault for every 4 KiB."""
        self._linked: dict[tuple[int, int], asyncio.Future[Inode | None]] = {}
        """Local files with several names: the inode that the first of them became, None if that failed."""

    async def expect(self, trees: Sequence[str]) -> None:
        """How much there is to copy, found out while it is being copied."""
        for tree in trees:
            self._progress.expect(await self._disk.run(local_tree.bytes_below, tree))

    async def begin(self, source: str, target: str, *, recursive: bool) -> None:
        """Add the jobs for one source."""
        if not source:
            raise UsageError("an empty path names no local file")
        status = await self._disk.run(local_tree.status_of, source, follow=True)
        is_tree = stat.S_ISDIR(status.st_mode)
        if is_tree and not recursive:
            raise OperationError(errno.EISDIR, f"{source} (put -r copies it with all that is in it)")
        if not is_tree and not stat.S_ISREG(status.st_mode):
            raise UsageError(f'{source} is no regular file: "mendfs write PATH < {source}" stores what it says')
        name = os.path.basename(os.path.abspath(source))
        into = await find_or_none(self.at.volume, target)
        if is_directory(into) and not name:
            # "put -r / DIR": there is no name to put it under.
            await self._refuse_own_inside(source, target)
            assert into is not None, "it is a directory"
            self._fill(source, status, into.inode, target, None)
            return
        if is_directory(into):
            assert into is not None, "it is a directory"
            spot = Spot(into.inode, os.fsencode(name), f"{target.rstrip('/')}/{name}")
        else:
            place = await resolve_place(self.at.volume, target.rstrip("/") if is_tree else target)
            if target.endswith("/") and not is_tree:
                raise OperationError(errno.ENOTDIR, target)
            if place.found is not None and not is_tree and not stat.S_ISREG(place.found.mode):
                raise UsageError(f"{target} is there already and is no regular file: remove it, or choose another name")
            spot = Spot(place.parent.inode, place.name, target)
        if is_tree:
            await self._refuse_own_inside(source, spot.path)
            self.crew.add(functools.partial(self._directory, source, status, spot, None))
        else:
            self._progress.expect(status.st_size)
            self.crew.add(functools.partial(self._file, source, status, spot, follow=True))

    async def _refuse_own_inside(self, source: str, target: str) -> None:
        """A tree below a mount of this volume cannot go into itself: the copying would never end."""
        from mendfs.cli.volumes import own_path

        own = own_path(source, self.at.volume.parameters.id)
        if own is None:
            return
        parent = await canonical_directory(self.at.volume, os.path.dirname(target.rstrip("/")) or "/")
        whole = f"{parent.rstrip('/')}/{os.path.basename(target.rstrip('/'))}"
        if own == "/" or whole == own or whole.startswith(own + "/"):
            raise UsageError(f"{source} cannot be copied into itself, to {target}")

    # --- jobs --------------------------------------------------------------------------------------------------------

    async def _directory(self, local: str, status: os.stat_result, spot: Spot, above: Family | None) -> None:
        try:
            inode = await self._make_directory(spot)
        except OperationError as error:
            self.skip(OperationError(error.errno, spot.path), local)
            return
        self._fill(local, status, inode, spot.path, above)

    def _fill(self, local: str, status: os.stat_result, inode: Inode, path: str, above: Family | None) -> None:
        family = self.crew.family(functools.partial(self._finish_directory, local, status, inode, path), above)
        self.crew.add(functools.partial(self._children, local, inode, path, family), family)

    async def _make_directory(self, spot: Spot) -> Inode:
        """A directory that only its owner can enter while it is filled, or the one that is there."""
        try:
            made = await self.at.volume.make(spot.parent, spot.name, stat.S_IFDIR | 0o700, uid=self._uid, gid=self._gid)
        except OperationError as error:
            if error.errno != errno.EEXIST:
                raise
            found = await self.at.volume.lookup(spot.parent, spot.name)
            if not is_directory(found):
                raise
            return found.inode
        return made.inode

    async def _finish_directory(self, local: str, status: os.stat_result, inode: Inode, path: str) -> None:
        try:
            for name, value in (await self._disk.run(local_tree.directory_xattrs, local)).items():
                await self.at.volume.set_xattr(inode, os.fsencode(name), value)
            await self.at.volume.set_attributes(
                inode,
                mode=kept_mode(status.st_mode, uid=status.st_uid, gid=status.st_gid),
                atime_ns=status.st_atime_ns,
                mtime_ns=status.st_mtime_ns,
            )
        except (OperationError, OSError) as error:
            self.skip(error, path)
            return
        self.counts.directories += 1

    async def _children(self, local: str, inode: Inode, path: str, family: Family) -> None:
        try:
            entries = await self._disk.run(local_tree.scan, local)
        except OSError as error:
            self.skip(error)
            return
        for name, status in entries:
            below = os.path.join(local, name)
            spot = Spot(inode, os.fsencode(name), f"{path.rstrip('/')}/{name}")
            if status is None:
                self.leave_out(f"{below} vanished before it was copied")
            elif stat.S_ISDIR(status.st_mode):
                self.crew.add(functools.partial(self._directory, below, status, spot, family), family)
            elif stat.S_ISREG(status.st_mode):
                self.crew.add(functools.partial(self._file, below, status, spot, follow=False), family)
            elif stat.S_ISLNK(status.st_mode):
                self.crew.add(functools.partial(self._link, below, status, spot), family)
            else:
                self.skip_special(below, status.st_mode)

    async def _file(self, local: str, status: os.stat_result, spot: Spot, *, follow: bool) -> None:
        try:
            if status.st_nlink > 1 and not follow:
                await self._one_of_several(local, status, spot)
            else:
                await self._copy(local, spot, follow=follow)
        except FileNotFoundError:
            self.leave_out(f"{local} vanished before it was copied")
        except OperationError as error:
            self.skip(OperationError(error.errno, spot.path), local)
        except OSError as error:
            self.skip(error, "" if error.filename else local)

    async def _one_of_several(self, local: str, status: os.stat_result, spot: Spot) -> None:
        """A file with several names: the first that comes is copied, the others become names of the copy."""
        key = (status.st_dev, status.st_ino)
        copied = self._linked.get(key)
        if copied is not None:
            # Whoever makes the copy has a worker of its own, so waiting here cannot hold it up.
            inode = await asyncio.shield(copied)
            if inode is not None:
                await self._link_to(inode, spot)
                return
        done = self._linked[key] = asyncio.get_running_loop().create_future()
        inode = None
        try:
            inode = await self._copy(local, spot, follow=False)
        finally:
            done.set_result(inode)

    async def _link_to(self, inode: Inode, spot: Spot) -> None:
        volume = self.at.volume
        try:
            await volume.link(inode, spot.parent, spot.name)
        except OperationError as error:
            if error.errno != errno.EEXIST:
                raise
            temporary = _temporary_name()
            try:
                await volume.link(inode, spot.parent, temporary)
                await volume.rename(spot.parent, temporary, spot.parent, spot.name)
            finally:
                # Also if all went well: between two names of one file a rename does nothing (rename(2)).
                await self._drop(spot.parent, temporary)
        self.counts.links += 1

    async def _link(self, local: str, status: os.stat_result, spot: Spot) -> None:
        try:
            target = os.fsencode(await self._disk.run(os.readlink, local))
        except FileNotFoundError:
            self.leave_out(f"{local} vanished before it was copied")
            return
        except OSError as error:
            self.skip(error)
            return
        name = spot.name
        try:
            try:
                made = await self._make_link(spot.parent, name, target)
            except OperationError as error:
                if error.errno != errno.EEXIST:
                    raise
                name = _temporary_name()
                made = await self._make_link(spot.parent, name, target)
            await self.at.volume.set_attributes(made, atime_ns=status.st_atime_ns, mtime_ns=status.st_mtime_ns)
            if name != spot.name:
                await self.at.volume.rename(spot.parent, name, spot.parent, spot.name)
        except OperationError as error:
            if name != spot.name:
                await self._drop(spot.parent, name)
            self.skip(OperationError(error.errno, spot.path), local)
            return
        self.counts.links += 1

    async def _make_link(self, parent: Inode, name: bytes, target: bytes) -> Inode:
        mode = stat.S_IFLNK | 0o777
        return (await self.at.volume.make(parent, name, mode, uid=self._uid, gid=self._gid, target=target)).inode

    # --- one file ----------------------------------------------------------------------------------------------------

    async def _copy(self, local: str, spot: Spot, *, follow: bool) -> Inode:
        source, first, xattrs = await self._disk.run(local_tree.begin, local, follow=follow, length_max=PIECE_BYTES)
        volume = self.at.volume
        temporary = _temporary_name()
        try:
            mode = kept_mode(source.status.st_mode, uid=source.status.st_uid, gid=source.status.st_gid)
            made = await volume.make(
                spot.parent, temporary, stat.S_IFREG | 0o600, uid=self._uid, gid=self._gid, open=True
            )
            async with released(await volume.open_made(made, flags=os.O_WRONLY)) as file:
                size = await self._pour(source, first, file)
                await file.flush()
            for name, value in xattrs.items():
                await volume.set_xattr(made.inode, os.fsencode(name), value)
            await volume.set_attributes(
                made.inode,
                mode=mode,
                size=size,
                atime_ns=source.status.st_atime_ns,
                mtime_ns=source.status.st_mtime_ns,
            )
            await self._put_in_place(spot, temporary)
        except BaseException:
            await self._drop(spot.parent, temporary)
            raise
        finally:
            source.close()
        self.counts.files += 1
        return made.inode

    async def _pour(self, source: local_tree.Source, first: local_tree.Piece, file: OpenFile) -> int | None:
        """Copy the contents. Returns the size to set afterwards if the file ends with a hole."""
        if first.data:
            await file.write(first.data, 0)
            self._did(len(first.data))
        if first.is_all:
            return None
        buffer = self._buffers.pop() if self._buffers else memoryview(bytearray(PIECE_BYTES))
        position = end = len(first.data)
        while True:
            at = await self._disk.run(source.next_data, position)
            count = 0 if at is None else await self._disk.run(source.read_into, buffer, at)
            if at is None or count == 0:
                break
            await file.write(buffer[:count], at)
            self._did(at + count - position)
            position = end = at + count
        # Not after an error: a thread may still be reading into it.
        self._buffers.append(buffer)
        size = source.status.st_size
        return size if source.is_sparse and size > end else None

    def _did(self, count: int) -> None:
        self.counts.bytes += count
        self._progress.did(count)

    async def _put_in_place(self, spot: Spot, temporary: bytes) -> None:
        """Rename to the final name; over what is there, data first (design section 5)."""
        try:
            await self.at.volume.rename(spot.parent, temporary, spot.parent, spot.name, RENAME_NOREPLACE)
        except OperationError as error:
            if error.errno != errno.EEXIST:
                raise
            await self.at.volume.rename(spot.parent, temporary, spot.parent, spot.name)

    async def _drop(self, parent: Inode, temporary: bytes) -> None:
        """Remove a temporary name that may be there; if that cannot be done, say where it is."""
        try:
            async with asyncio.timeout(CLEAN_UP_S):
                await self.at.volume.unlink(parent, temporary)
        except (MendfsError, TimeoutError) as error:
            if isinstance(error, OperationError) and error.errno in (errno.ENOENT, errno.ESTALE):
                return
            self.at.trouble(f"{os.fsdecode(temporary)} may be left in the target's directory: remove it ({error})")


def _temporary_name() -> bytes:
    return TEMPORARY_PREFIX + secrets.token_hex(8).encode()
