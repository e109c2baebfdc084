"""The public async API of a volume: everything a file system can do, inode by inode. Knows nothing of FUSE.

`Volume.open` connects and opens a session; what happens then (reconnects, restarts, moves, servers that die) is the
parts' business, and an application sees an error only when the policy in `VolumeOptions` says so.
"""

import asyncio
import errno
import os
from collections.abc import Callable
from contextlib import ExitStack

import structlog

from mendfs import model
from mendfs.client.append import Appender
from mendfs.client.cache import PageCache
from mendfs.client.commits import Committer
from mendfs.client.durability import Durability
from mendfs.client.fetcher import Fetcher
from mendfs.client.files import File, Files
from mendfs.client.ids import IdSupply
from mendfs.client.merge import Merger
from mendfs.client.names import Names
from mendfs.client.open_file import OpenFile
from mendfs.client.opens import Opens
from mendfs.client.options import VolumeOptions
from mendfs.client.reader import Reader
from mendfs.client.servers import Servers
from mendfs.client.session import Session
from mendfs.client.shared import Budget, Shared
from mendfs.client.space import Space
from mendfs.client.tasks import Tasks
from mendfs.client.uploader import Uploader
from mendfs.client.watch import Reach, watch
from mendfs.client.where import Where, WhereSlot
from mendfs.client.writer import Writer
from mendfs.errors import ChangesLost, MendfsError, OperationError
from mendfs.model import Attributes, BlockId, CommitSequence, Inode, ServerView, Table
from mendfs.wire.messages import meta as messages
from mendfs.wire.messages.meta import Listing, VolumeStat
from mendfs.wire.messages.session import GrantIds, IdsGranted, SessionOpened
from mendfs.wire.peer import Credentials
from mendfs.world import World
from mendfs.world.buffers import BufferPool

__all__ = ["OpenFile", "Volume", "VolumeOptions"]

LOG_SYNC_TIMEOUT_S = 5.0
"""Closing does not wait longer for a meta server that is gone: nothing is lost, it syncs its log every second."""

log = structlog.get_logger("mendfs.client")


class Volume:
    """One open volume: `await Volume.open(...)`, and `await close()` when done."""

    def __init__(self, world: World, options: VolumeOptions, secret: bytes) -> None:
        options.check()
        self._options = options
        self._tasks = Tasks()
        session = Session(world, options, secret, self, self._tasks)

        async def grant(kind: str, lowest: int) -> IdsGranted:
            return await session.query(GrantIds(kind, lowest), IdsGranted)

        self._shared = shared = Shared(
            world=world,
            options=options,
            session=session,
            servers=Servers(world, Credentials(secret, ""), self._tasks),
            tasks=self._tasks,
            files=Files(),
            blocks=IdSupply(lambda lowest: grant("block", lowest), self._tasks),
            inodes=IdSupply(lambda lowest: grant("inode", lowest), self._tasks),
            pool=BufferPool(),
            dirty=Budget(options.dirty_bytes_max),
        )
        self._opens = Opens(session, shared.files, self._tasks)
        self._fetcher = Fetcher(shared)
        self._durability = Durability(shared, self._fetcher)
        self._uploader = Uploader(shared)
        self._committer = Committer(shared, self._uploader, self._durability)
        self._writer = Writer(shared, self._uploader, self._committer)
        self._appender = Appender(shared, self._writer, self._uploader, self._durability)
        self._names = Names(shared, self._writer, self._durability, self._opens)
        self._merger: Merger | None = None
        self._is_lost = False
        self._is_closed = False

    @classmethod
    async def open(
        cls, world: World, options: VolumeOptions, secret: bytes, waiting: Callable[[str], None] | None = None
    ) -> "Volume":
        """Open a session. Raises Unreachable, NotAuthentic or NotReady after trying for `open_timeout_s`.

        `waiting` is told what it waits for, each time that is something else.
        """
        volume = cls(world, options, secret)
        try:
            await volume._shared.session.open(waiting)
        except BaseException:
            await volume._tasks.close()
            raise
        parameters = volume.parameters
        cache = PageCache(options.cache_bytes_max, parameters.page_size, volume._shared.pool)
        volume._reader = Reader(volume._shared, volume._fetcher, cache)
        volume._space = Space(volume._shared, volume._writer, volume._reader)
        if not options.read_only:
            volume._begin_merging()
        if options.prepares:
            volume._shared.servers.connect_ahead()
            if not options.read_only:
                volume._shared.blocks.fetch_ahead()
                volume._shared.inodes.fetch_ahead()
        volume._tasks.spawn(volume._writer.run_timer())
        volume._tasks.spawn(volume._durability.run_timer())
        return volume

    _reader: Reader
    _space: Space

    def _begin_merging(self) -> None:
        self._merger = merger = Merger(self._shared, self._reader, self._uploader)
        self._shared.files.watch = merger
        self._writer.holds = merger.holds
        self._committer.make_room = merger.merge_now
        merger.on_ended = self._writer.freeze_waiting
        self._tasks.spawn(merger.run())

    @property
    def parameters(self) -> model.Volume:
        """The volume's parameters."""
        return self._shared.volume

    @property
    def servers(self) -> tuple[ServerView, ...]:
        """The data servers as the meta server last described them."""
        return self._shared.servers.views()

    async def close(self, timeout_s: float = 30.0) -> tuple[str, ...]:
        """Flush and end the session. Returns one line for each file that could not be flushed in time."""
        if self._is_closed:
            return ()
        self._is_closed = True
        if self._merger is not None:
            self._merger.stop()
        try:
            async with asyncio.timeout(timeout_s):
                await self._writer.flush_everything()
                await self._durability.sync_everything_committed()
            async with asyncio.timeout(min(timeout_s, LOG_SYNC_TIMEOUT_S)):
                await self._durability.sync_log()
        except TimeoutError:
            log.error("closing took too long", timeout_s=timeout_s)
        except MendfsError as error:
            log.error("closing could not make everything durable", reason=str(error))
        lines = [f"inode {file.inode}: not flushed" for file in self._writer.dirty_files()]
        lines += [f"inode {file.inode}: {error}" for file in self._shared.files for error in file.errors]
        await self._shared.session.end()
        await self._tasks.close()
        await self._shared.servers.close()
        return tuple(lines)

    # --- names and attributes -----------------------------------------------------------------------------------

    async def lookup(self, parent: Inode, name: bytes) -> Attributes:
        """The inode that a name stands for, or ENOENT."""
        return await self._names.lookup(parent, name)

    async def walk(self, inode: Inode, names: tuple[bytes, ...]) -> tuple[Attributes, ...]:
        """The directory `inode`, then what each name in the one before stands for: one call for a whole path."""
        return await self._names.walk(inode, names)

    async def attributes(self, inode: Inode) -> Attributes:
        """Fresh attributes; size and times include this client's unflushed writes."""
        return await self._names.attributes(inode)

    def recent_attributes(self, inode: Inode, within_s: float) -> tuple[Attributes, float] | None:
        """Attributes that an answer brought no longer than `within_s` ago, and their age: no call is made for them."""
        return self._names.recent_attributes(inode, within_s)

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
        """Change what is not None; a size truncates or extends. `clear_set_id`: a file whose mode is not set loses its
        set-id bits.
        """
        self._check_writable()
        return await self._names.set_attributes(
            inode,
            mode=mode,
            uid=uid,
            gid=gid,
            size=size,
            atime_ns=atime_ns,
            mtime_ns=mtime_ns,
            clear_set_id=clear_set_id,
        )

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
        """Make what `mode` says: file, directory, symbolic link to `target`, fifo, socket, device. With `open`, call
        `open_made` next.
        """
        self._check_writable()
        return await self._names.make(parent, name, mode, uid=uid, gid=gid, rdev=rdev, target=target, open=open)

    async def link(self, inode: Inode, parent: Inode, name: bytes) -> Attributes:
        """One more name for an inode."""
        self._check_writable()
        return await self._names.link(inode, parent, name)

    async def unlink(self, parent: Inode, name: bytes) -> Attributes | None:
        """Remove a name; returns the inode as it is now."""
        self._check_writable()
        return await self._names.unlink(parent, name, directory=False)

    async def rmdir(self, parent: Inode, name: bytes) -> None:
        """Remove an empty directory."""
        self._check_writable()
        await self._names.unlink(parent, name, directory=True)

    async def rename(
        self, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, flags: int = 0
    ) -> Attributes | None:
        """As renameat2; returns the inode that was replaced."""
        self._check_writable()
        return await self._names.rename(parent, name, new_parent, new_name, flags)

    async def readlink(self, inode: Inode) -> bytes:
        """What a symbolic link says."""
        return (await self._shared.session.query(messages.ReadLink(inode), messages.LinkTarget)).target

    async def list_directory(self, inode: Inode, after: bytes, limit: int, with_attributes: bool) -> Listing:
        """The names after `after`, in order of their bytes."""
        return await self._names.list_directory(inode, after, limit, with_attributes)

    async def get_xattr(self, inode: Inode, name: bytes) -> bytes:
        """An extended attribute, or ENODATA."""
        return (await self._shared.session.query(messages.GetXattr(inode, name), messages.XattrValue)).value

    async def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int = 0) -> None:
        """Set an extended attribute; flags XATTR_CREATE or XATTR_REPLACE."""
        self._check_writable()
        await self._names.set_xattr(inode, name, value, flags)

    async def list_xattr(self, inode: Inode) -> tuple[bytes, ...]:
        """The names of the extended attributes."""
        return (await self._shared.session.query(messages.ListXattr(inode), messages.XattrNames)).names

    async def remove_xattr(self, inode: Inode, name: bytes) -> None:
        """Remove an extended attribute, or ENODATA."""
        self._check_writable()
        await self._names.remove_xattr(inode, name)

    async def stat_volume(self) -> VolumeStat:
        """Bytes and files: what statfs shows."""
        return await self._shared.session.query(messages.StatVolume(), VolumeStat)

    # --- contents -------------------------------------------------------------------------------------------------

    async def open_file(self, inode: Inode, *, flags: int, clear_set_id: bool = False) -> OpenFile:
        """Open a file with os.O_* flags. What every open(2) before its close(2) has written is seen.

        With `clear_set_id`, O_TRUNC takes the set-id bits in the same change.
        """
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC):
            self._check_writable()
        truncating: asyncio.Task[Attributes] | None = None
        if flags & os.O_TRUNC:
            # Asked for together with the open: the meta server does one after the other.
            truncating = self._tasks.spawn(
                self.set_attributes(inode, size=0, clear_set_id=clear_set_id), is_awaited=True
            )
        try:
            file, keep_cache = await self._opens.open(inode)
        except MendfsError:
            if truncating is not None:
                await asyncio.wait([truncating])
            raise
        except asyncio.CancelledError:
            if truncating is not None:
                truncating.cancel()  # what was not sent must not be made; what was goes on
            raise
        try:
            if truncating is not None:
                # The kernel asks for the size next.
                self._names.recent.note_any(await truncating)
        except BaseException:
            self._opens.closed(file)
            raise
        if truncating is None and file.attributes is not None:
            self._names.recent.note_any(file.attributes)  # asked for next, by fstat and by a read up to the end
        return self._open_file(file, flags, keep_cache)

    async def open_made(self, attributes: Attributes, *, flags: int) -> OpenFile:
        """Open a file just made with `make(open=True)`: no call to the meta server."""
        file = self._shared.files.get(attributes.inode)
        file.learn_made(attributes)
        self._names.recent.note_any(attributes)
        self._opens.opened(file)
        return self._open_file(file, flags, True)

    def _open_file(self, file: File, flags: int, keep_cache: bool) -> OpenFile:
        return OpenFile(
            file,
            flags=flags,
            keep_cache=keep_cache,
            reader=self._reader,
            writer=self._writer,
            appender=self._appender,
            durability=self._durability,
            opens=self._opens,
            space=self._space,
        )

    async def sync_committed(self) -> None:
        """Every change of names is durable afterwards, and the data of every commit, which the log speaks of.

        For fsync of a directory. It says nothing of files, so what is not flushed is not flushed now: programs that
        sync a directory after each file would else wait for what all others are just writing.
        """
        await self._durability.sync_all()

    async def sync(self) -> None:
        """Everything written so far is durable afterwards, as after syncfs(2)."""
        with ExitStack() as stack:
            for file in self._shared.files:
                if file.is_dirty or file.unsynced:
                    stack.enter_context(file.durability_awaited())
            await self._writer.flush_everything()
            await self._durability.sync_all()

    async def where(self, inode: Inode, *, verify: bool = True) -> tuple[WhereSlot, ...]:
        """Slots, extents, replicas and their states; with `verify`, every replica is read and checked."""
        return await Where(self._shared, self._fetcher).of(inode, verify=verify)

    async def watch(self, tell: Callable[[Reach], None]) -> None:
        """Tell which servers can be reached, and whenever that changes, until cancelled. Keeps a connection to each."""
        await watch(self._shared, tell)

    def _check_writable(self) -> None:
        if self._options.read_only:
            raise OperationError(errno.EROFS, "the volume is mounted read-only")

    # --- what the session asks and tells ----------------------------------------------------------------------------

    def open_inodes(self) -> tuple[Inode, ...]:
        """See SessionOwner."""
        return self._opens.inodes

    def lowest_block_in_flight(self) -> BlockId:
        """See SessionOwner."""
        return BlockId(self._shared.blocks.lowest_in_flight)

    def take_closed(self) -> tuple[Inode, ...]:
        """See SessionOwner."""
        return self._opens.take_closed()

    def told(self, inodes: tuple[Inode, ...]) -> None:
        """See SessionOwner."""
        self._opens.told(inodes)

    def closed_again(self, inodes: tuple[Inode, ...]) -> None:
        """See SessionOwner."""
        self._opens.closed_again(inodes)

    def session_lost(self) -> None:
        """See SessionOwner."""
        self._is_lost = True
        self._writer.session_lost()
        self._shared.blocks.forget_all()
        self._shared.inodes.forget_all()

    def session_begun(self, opened: SessionOpened) -> None:
        """See SessionOwner."""
        self._shared.servers.update(opened.servers)
        if self._is_lost:
            self._is_lost = False
            self._tasks.spawn(self._opens.open_again())

    def went_back(self, survived: CommitSequence) -> None:
        """See SessionOwner."""
        self._names.recent.clear()
        self._durability.lost(ChangesLost("the meta server stopped, and changes that were not synced are lost"))
        for file in self._shared.files:
            if file.version <= survived:
                continue  # as it was then, it still is
            # What is unsynced stays so: blocks of commits that survived may be among it, and the others nobody names.
            file.forget_all()
            if file.opens:
                file.errors.append(
                    ChangesLost("the meta server stopped, and changes of this file that were not synced are lost")
                )
            self._shared.files.went_back.add(file.inode)

    def table_changed(self, table: Table, servers: tuple[ServerView, ...]) -> None:
        """See SessionOwner."""
        self._shared.servers.update(servers)
