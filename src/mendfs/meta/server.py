"""The meta server: requests to operations. The only module of `meta`, with `background`, that awaits the network.

A query is one transaction; a change is one transaction that also stores its answer (`sessions.answered_once`). Between
two awaits of the network nothing else runs, and transactions on the embedded engine await nothing: so a request is
done whole or, when its connection ends first, not at all.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import msgspec
import structlog

from mendfs.errors import BadMessage, EngineFailed, EngineUnreadable, OperationError, UsageError
from mendfs.kv.engine import Engine, Transaction, run
from mendfs.meta import attributes, background, merge, namespace, ranges, status, volume
from mendfs.meta import blocks as block_operations
from mendfs.meta import commit as commits
from mendfs.meta.inodes import read_attributes, visible
from mendfs.meta.punch import punch_range
from mendfs.meta.registry import Registry
from mendfs.meta.room import Kind
from mendfs.meta.sessions import LEASE_S, Answer, Session, answered_once
from mendfs.meta.state import State
from mendfs.model import Attributes, Slot
from mendfs.wire.messages import Message
from mendfs.wire.messages import meta as messages
from mendfs.wire.messages import session as session_messages
from mendfs.wire.peer import Credentials, Peer, Received, Server, serve
from mendfs.world import World

log = structlog.get_logger("meta")

STAT_FILES_MAX = 100_000
"""Files are counted up to here for statfs: a rough number is enough and must not cost seconds."""

ROOM_NEEDED: dict[type, Kind] = {
    messages.Make: "grow",
    messages.Link: "grow",
    messages.SetXattr: "grow",
    messages.Commit: "grow",
    messages.Rename: "keep",
    messages.SetAttributes: "keep",
    messages.Punch: "keep",
    messages.MergeSlot: "keep",
    messages.RemoveXattr: "remove",
    messages.Unlink: "remove",
    messages.AcknowledgeLate: "remove",
}
"""What each change does to the size of the metadata."""

Result = TypeVar("Result")
Handler = Callable[[Peer, Any], Awaitable[Message]]


class MetaOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a meta server runs."""

    listen: str
    """HOST:PORT, or the path of a Unix socket."""
    dir: str = ""
    """The folder of the engine, whose disk's room is watched; empty: an engine without one."""


class MetaServer:
    """One meta server over one engine."""

    def __init__(self, state: State) -> None:
        self.state = state
        self.registry = Registry(state)
        self._server: Server | None = None
        self._loops: asyncio.Task[None] | None = None
        self._handlers: dict[type, Handler] = {
            **self.registry.handlers(),
            messages.Lookup: self._lookup,
            messages.Walk: self._walk,
            messages.GetAttributes: self._get_attributes,
            messages.OpenInode: self._open_inode,
            messages.GetExtents: self._get_extents,
            messages.ListDirectory: self._list_directory,
            messages.ReadLink: self._read_link,
            messages.GetXattr: self._get_xattr,
            messages.ListXattr: self._list_xattr,
            messages.StatVolume: self._stat_volume,
            messages.Make: self._make,
            messages.Link: self._link,
            messages.Unlink: self._unlink,
            messages.Rename: self._rename,
            messages.SetAttributes: self._set_attributes,
            messages.SetXattr: self._set_xattr,
            messages.RemoveXattr: self._remove_xattr,
            messages.Commit: self._commit,
            messages.Punch: self._punch,
            messages.MergeSlot: self._merge,
            messages.AcknowledgeLate: self._acknowledge_late,
            messages.SyncLog: self._sync_log,
            messages.GetStatus: self._get_status,
            messages.LocateBlocks: self._locate_blocks,
        }

    @property
    def address(self) -> str:
        """Where it listens."""
        assert self._server is not None, "started before it is asked"
        return self._server.address

    async def start(self, options: MetaOptions, secret: bytes) -> None:
        """Listen and begin the background work."""
        self._server = await serve(
            self.state.world.network,
            options.listen,
            Credentials(secret, self.state.volume.id),
            role="meta",
            handler=self.handle,
            on_closed=self.registry.peer_closed,
        )
        self._loops = asyncio.create_task(background.run_loops(self.state, options.dir), name="meta loops")

    async def close(self) -> None:
        """Stop: no more requests, everything answered is synced, data servers first."""
        has_failed = self.state.failed.done()
        if self._server is not None:
            if not has_failed:
                await self.state.sync_data()
            await self._server.close()
        if self._loops is not None:
            self._loops.cancel()
            await asyncio.gather(self._loops, return_exceptions=True)
        try:
            await self.state.engine.close()
        except EngineFailed as error:
            if not has_failed:
                raise
            # Why it failed was said; that it does not close either follows from that.
            log.error("the database does not close", reason=str(error))

    async def handle(self, peer: Peer, message: Message, received: Received | None) -> Message:
        """Answer one request."""
        if received is not None:
            received.release()
        handler = self._handlers.get(type(message))
        if handler is None:
            raise BadMessage(f"a meta server does not answer {type(message).__name__}")
        stopped = self.state.stopped()
        if stopped is not None:
            raise stopped
        try:
            return await handler(peer, message)
        except EngineUnreadable as error:
            self.state.unreadable(error)
            raise
        except EngineFailed as error:
            self.state.fail(error)
            raise self.state.stopped() or error from None

    # Queries

    async def _read(self, operation: Callable[..., Awaitable[Result]], *args: Any) -> Result:
        return (await run(self.state.engine, operation, *args))[0]

    def _found(self, found: Attributes) -> messages.Found:
        return messages.Found(found, self.state.engine.last_sequence)

    async def _lookup(self, peer: Peer, request: messages.Lookup) -> messages.LookedUp:
        found, directory = await self._read(namespace.look_up, request.parent, request.name)
        return messages.LookedUp(found, directory, self.state.engine.last_sequence)

    async def _walk(self, peer: Peer, request: messages.Walk) -> messages.Walked:
        found = await self._read(namespace.walk, request.inode, request.names)
        return messages.Walked(found, self.state.engine.last_sequence)

    async def _get_attributes(self, peer: Peer, request: messages.GetAttributes) -> messages.Found:
        return self._found(await self._read(read_attributes, request.inode))

    async def _open_inode(self, peer: Peer, request: messages.OpenInode) -> messages.Opened:
        session = self.registry.session_of(peer)
        record, slots, complete = await self._read(
            commits.read_extents, request.inode, Slot(0), messages.OPEN_SLOTS_MAX, self.state.volume
        )
        if record.attributes.nlink == 0 and request.inode not in session.opens:
            raise OperationError(errno.ENOENT, f"inode {request.inode} has no name any more")
        self.state.sessions.opened(session, (request.inode,))
        return messages.Opened(visible(record), slots, complete, self.state.engine.last_sequence)

    async def _get_extents(self, peer: Peer, request: messages.GetExtents) -> messages.Extents:
        if not 0 < request.count <= commits.SLOTS_READ_MAX:
            raise BadMessage(f"extents of {request.count} slots asked for; up to {commits.SLOTS_READ_MAX} at once")
        record, slots, complete = await self._read(
            commits.read_extents, request.inode, request.first, request.count, self.state.volume
        )
        found = record.attributes
        return messages.Extents(slots, complete, found.size, found.version, self.state.engine.last_sequence)

    async def _list_directory(self, peer: Peer, request: messages.ListDirectory) -> messages.Listing:
        return await self._read(namespace.list_directory, request)

    async def _read_link(self, peer: Peer, request: messages.ReadLink) -> messages.LinkTarget:
        return messages.LinkTarget(await self._read(attributes.read_link, request.inode))

    async def _get_xattr(self, peer: Peer, request: messages.GetXattr) -> messages.XattrValue:
        return messages.XattrValue(await self._read(attributes.get_xattr, request.inode, request.name))

    async def _list_xattr(self, peer: Peer, request: messages.ListXattr) -> messages.XattrNames:
        return messages.XattrNames(await self._read(attributes.list_xattr, request.inode))

    async def _stat_volume(self, peer: Peer, request: messages.StatVolume) -> messages.VolumeStat:
        return status.volume_stat(self.state, await volume.count_inodes(self.state.engine, STAT_FILES_MAX))

    async def _get_status(self, peer: Peer, request: messages.GetStatus) -> messages.StatusReport:
        return messages.StatusReport(await status.status_document(self.state))

    async def _locate_blocks(self, peer: Peer, request: messages.LocateBlocks) -> messages.BlocksLocated:
        return messages.BlocksLocated(await self._read(status.locate, request.blocks))

    # Changes

    async def _change(
        self, session: Session, request: Any, operation: Callable[[Transaction], Awaitable[Answer]]
    ) -> Answer:
        async def change(tx: Transaction) -> Answer:
            # In here: a repeated request that was done is answered, however full the disk is by now.
            self.state.room.check(ROOM_NEEDED[type(request)])
            return await operation(tx)

        answer, _ = await run(self.state.engine, answered_once, session.id, request.at, change)
        return answer

    async def _found_change(
        self, peer: Peer, request: Any, operation: Callable[..., Awaitable[Attributes]], *args: Any
    ) -> Answer:
        async def change(tx: Transaction) -> Answer:
            return messages.Found(await operation(tx, request, *args), tx.sequence())

        return await self._change(self.registry.session_of(peer), request, change)

    async def _make(self, peer: Peer, request: messages.Make) -> Answer:
        session = self.registry.session_of(peer)

        async def change(tx: Transaction) -> Answer:
            await ranges.check_owned(tx, "inode", request.inode, session.id)
            made = await namespace.make(tx, request, self.state.generation)
            return messages.Found(made, tx.sequence(), (await read_attributes(tx, request.parent),))

        answer = await self._change(session, request, change)
        if request.open:
            self.state.sessions.opened(session, (request.inode,))
        return answer

    async def _link(self, peer: Peer, request: messages.Link) -> Answer:
        async def change(tx: Transaction) -> Answer:
            linked = await namespace.link(tx, request)
            return messages.Found(linked, tx.sequence(), (await read_attributes(tx, request.parent),))

        return await self._change(self.registry.session_of(peer), request, change)

    async def _removal(
        self, peer: Peer, request: messages.Unlink | messages.Rename, operation: Callable[..., Awaitable[Any]]
    ) -> Answer:
        names = [(request.parent, request.name)]
        if isinstance(request, messages.Rename):
            names.append((request.new_parent, request.new_name))

        async def change(tx: Transaction) -> Answer:
            removed = await operation(tx, request, self.state.sessions)
            return messages.Removed(removed, tx.sequence(), await namespace.named(tx, *names))

        answer = await self._change(self.registry.session_of(peer), request, change)
        self.state.work.set()
        return answer

    async def _unlink(self, peer: Peer, request: messages.Unlink) -> Answer:
        return await self._removal(peer, request, namespace.unlink)

    async def _rename(self, peer: Peer, request: messages.Rename) -> Answer:
        return await self._removal(peer, request, namespace.rename)

    async def _set_attributes(self, peer: Peer, request: messages.SetAttributes) -> Answer:
        try:
            return await self._found_change(peer, request, attributes.set_attributes)
        finally:
            if request.size is not None:
                self.state.work.set()

    async def _set_xattr(self, peer: Peer, request: messages.SetXattr) -> Answer:
        return await self._found_change(peer, request, attributes.set_xattr)

    async def _remove_xattr(self, peer: Peer, request: messages.RemoveXattr) -> Answer:
        return await self._found_change(peer, request, attributes.remove_xattr)

    async def _commit(self, peer: Peer, request: messages.Commit) -> Answer:
        session = self.registry.session_of(peer)

        async def change(tx: Transaction) -> Answer:
            return await commits.commit(tx, request, session.id, self.state.volume)

        answer = await self._change(session, request, change)
        self.state.work.set()
        if request.sync:
            # Also when the request was repeated, for its first answer may have been lost with the sync under way.
            await self.state.sync_log()
        return answer

    async def _punch(self, peer: Peer, request: messages.Punch) -> Answer:
        async def change(tx: Transaction) -> Answer:
            return await punch_range(tx, request, self.state.volume)

        answer = await self._change(self.registry.session_of(peer), request, change)
        self.state.work.set()
        return answer

    async def _merge(self, peer: Peer, request: messages.MergeSlot) -> Answer:
        session = self.registry.session_of(peer)

        async def change(tx: Transaction) -> Answer:
            return await merge.merge(tx, request, session.id, self.state.volume)

        answer = await self._change(session, request, change)
        self.state.work.set()
        return answer

    async def _acknowledge_late(self, peer: Peer, request: messages.AcknowledgeLate) -> Answer:
        async def change(tx: Transaction) -> Answer:
            await block_operations.acknowledge_late(tx, request.server, request.blocks)
            return session_messages.Done()

        return await self._change(self.registry.session_of(peer), request, change)

    async def _sync_log(self, peer: Peer, request: messages.SyncLog) -> messages.LogSynced:
        await self.state.sync_log()
        return messages.LogSynced(self.state.engine.synced_sequence)


async def start_meta(world: World, engine: Engine, options: MetaOptions, secret: bytes) -> MetaServer:
    """Open the volume in `engine` and serve it. Raises UsageError if the engine holds no volume."""
    parameters = await volume.read_volume(engine)
    if parameters is None:
        raise UsageError("the meta server's folder holds no volume; make one with `mendfs up` or `mendfs format`")
    generation = await volume.raise_generation(engine)
    state = State(world, engine, parameters, generation)
    await state.load(asyncio.get_running_loop().time(), LEASE_S)
    server = MetaServer(state)
    await server.start(options, secret)
    log.info("meta server up", address=server.address, volume=parameters.id, generation=generation)
    return server
