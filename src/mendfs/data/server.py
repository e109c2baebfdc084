"""The data server: requests to the store. The only module of `data` that answers the network.

A server that was registered once serves reads and writes from its start, whether the meta server answers or not; a new
one has no store before it knows the volume's parameters, and requests wait for it.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import structlog

from mendfs.blocks import RULES
from mendfs.data.folder import Folder
from mendfs.data.opening import StoreOptions, open_store
from mendfs.data.registration import Registration
from mendfs.data.schema import Fence
from mendfs.data.store import Store
from mendfs.data.syncing import draw_incarnation
from mendfs.errors import (
    BadMessage,
    EngineDamaged,
    EngineFailed,
    EngineFull,
    MendfsError,
    NotAuthentic,
    StoreFailed,
    StoreFull,
)
from mendfs.kv.engine import Engine
from mendfs.model import Generation, Incarnation, MiB, ServerNumber, StoreHealth
from mendfs.wire.messages import Message
from mendfs.wire.messages import data as messages
from mendfs.wire.messages.session import Done, Ping
from mendfs.wire.peer import Credentials, Peer, Received, Reply, Server, serve
from mendfs.world import World
from mendfs.world.tcp import format_address, is_wildcard, parse_address

log = structlog.get_logger("data")

EngineOpener = Callable[[str], Awaitable[Engine]]
Handler = Callable[[Peer, Any], Awaitable[Message]]

STORE_WAIT_S = 1.0
"""How long a request waits for a store that is being opened: one that is whole takes less."""
LIST_MAX = 10_000
"""Blocks in one answer: 100 bytes each stay below what a message may have."""
VERIFY_MAX = 100
"""Blocks read for one answer: at 4 MiB each about a second, within anybody's deadline."""
NAMES_MAX = 20_000
"""Blocks in one question or order."""
INVENTORY_PARTITIONS_MAX = 1024
FOLDER_CHECK_EVERY_S = 1.0
PROBE_EVERY_S = 1.0
PROBE_BYTES = 1 * MiB
"""What an index needs at least when it is opened: new logs and a new manifest."""


class DataOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a data server runs."""

    dir: str
    """Absolute path of its folder."""
    listen: str
    """HOST:PORT, or the path of a Unix socket."""
    meta: str
    """Where the meta server listens."""
    zone: str
    """Replicas are kept apart by it: usually the machine's name."""
    capacity: int = 0
    """Bytes of records it may hold; 0 for what the disk has."""
    number: ServerNumber | int | None = None
    """The server number it would like to have on a new volume."""
    advertise: str = ""
    """The address that others reach it under, if not the one it listens on."""
    segment_bytes: int = 256 * MiB


class DataServer:
    """One data server over one folder."""

    def __init__(
        self, world: World, open_engine: EngineOpener, options: DataOptions, secret: bytes, folder: Folder
    ) -> None:
        self.failed: asyncio.Future[MendfsError] = asyncio.get_running_loop().create_future()
        """Done when the server cannot go on; its process must end, saying why."""
        self.store: Store | None = None
        self._world = world
        self._open_engine = open_engine
        self._options = options
        self._secret = secret
        self._folder = folder
        self._server: Server | None = None
        self._has_store = asyncio.Event()
        # What registers a server that has no store yet; the store brings its own, told with the first heartbeat.
        self._first_incarnation = draw_incarnation(world.rng)
        self._registration = Registration(
            world.network,
            options.meta,
            self.handle,
            credentials=self._credentials,
            introduce=self._introduce,
            admitted=self._admitted,
            beat=self._beat,
        )
        self._registering: asyncio.Task[None] | None = None
        self._guarding: asyncio.Task[None] | None = None
        self._reviving: asyncio.Task[None] | None = None
        self._lacks_room = False
        """The store waits for room on its disk to be opened anew."""
        self._handlers: dict[type, Handler] = {
            Ping: self._ping,
            messages.SyncStore: self._sync,
            messages.HaveBlocks: self._have,
            messages.DeleteBlocks: self._delete,
            messages.ListContents: self._list,
            messages.GetInventory: self._inventory,
            messages.GetHealth: self._health_report,
        }

    @property
    def address(self) -> str:
        """Where it listens."""
        assert self._server is not None, "started before it is asked"
        return self._server.address

    @property
    def number(self) -> ServerNumber | None:
        """Its number in the volume; None before the first registration."""
        return self._folder.identity.number

    @property
    def registered(self) -> asyncio.Event:
        """Set while the meta server knows it."""
        return self._registration.registered

    async def start(self) -> None:
        """Open the store if the volume is known, listen, and begin to register."""
        if self._folder.identity.volume is not None:
            try:
                await self._open_store()
            except (EngineFull, StoreFull):
                if not await self._world.disk.run(self._folder.give_up_spare):
                    raise
                log.warning("the disk is full: the folder's spare room is used, so that the store can be opened")
                await self._open_store()
        self._server = await serve(
            self._world.network, self._options.listen, self._credentials(), role="data", handler=self.handle
        )
        self._registering = asyncio.create_task(self._registration.run(), name="registration")
        self._registering.add_done_callback(self._registration_over)
        self._guarding = asyncio.create_task(self._guard_folder(), name="folder")
        log.info("data server up", address=self.address, dir=self._options.dir, number=self.number)

    async def close(self) -> None:
        """Stop: no more requests, everything put is durable."""
        for task in (self._registering, self._guarding, self._reviving):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if self._server is not None:
            await self._server.close()
        try:
            if self.store is not None:
                await self.store.close()
        finally:
            self._folder.close()

    # Standing with the meta server

    def _credentials(self) -> Credentials:
        volume = self._folder.identity.volume
        return Credentials(self._secret, "" if volume is None else volume.id)

    def _advertised(self, peer: Peer) -> str:
        """Where others reach this server. Listening everywhere, it names the address that the meta server sees."""
        if self._options.advertise or not is_wildcard(self.address) or not peer.local_host:
            return self._options.advertise or self.address
        where = parse_address(self.address)
        assert where is not None, "a wildcard is no Unix socket"
        return format_address(peer.local_host, where[1])

    def _introduce(self, peer: Peer) -> messages.RegisterServer:
        mine = self._folder.identity
        wanted = mine.number if mine.number is not None else self._options.number
        return messages.RegisterServer(
            id=mine.id,
            address=self._advertised(peer),
            zone=self._options.zone,
            incarnation=self._incarnation,
            pid=self._world.pid,
            capacity=self._options.capacity,
            wanted_number=None if wanted is None else ServerNumber(wanted),
            highest_generation=Generation(0) if self.store is None else self.store.highest_generation,
            health=self._health(),
        )

    async def _admitted(self, answer: messages.Registered) -> None:
        """The meta server said who we are."""
        self._folder.check(answer.number, answer.volume, self._options.meta)
        await self._world.disk.run(self._folder.write, answer.number, answer.volume)
        # One that is being opened anew is not to be opened twice: each would append to the same files.
        if self.store is None and (self._reviving is None or self._reviving.done()):
            await self._open_store()

    def _beat(self) -> messages.Heartbeat:
        return messages.Heartbeat(self._incarnation, self._health())

    @property
    def _incarnation(self) -> Incarnation:
        return self._first_incarnation if self.store is None else self.store.incarnation

    def _health(self) -> StoreHealth:
        if self.store is not None:
            return self.store.health()
        return StoreHealth(
            blocks=0,
            bytes_used=0,
            bytes_free=0,
            reads=0,
            writes=0,
            mended=0,
            corrupt_found=0,
            oldest_disk_operation_s=0.0,
        )

    def _registration_over(self, task: "asyncio.Task[None]") -> None:
        if task.cancelled():
            return
        error = task.exception()
        assert error is not None, "it runs until it is cancelled"
        if not isinstance(error, MendfsError):
            log.error("registration ended", exc_info=error)
            error = MendfsError(f"registration ended: {error}")
        self._fail(error)

    def _fail(self, error: MendfsError) -> None:
        log.error("data server cannot go on", error=str(error))
        if not self.failed.done():
            self.failed.set_result(error)

    async def _guard_folder(self) -> None:
        """Without its server.json a server that is started again would be a stranger to the volume."""
        while True:
            await asyncio.sleep(FOLDER_CHECK_EVERY_S)
            try:
                if await self._world.disk.run(self._folder.restore):
                    log.error("the folder was deleted under the server, made again", dir=self._options.dir)
                if self.store is not None and not self.store.failed.done():
                    await self._world.disk.run(self._folder.keep_spare)
            except OSError as error:
                log.error("cannot look after the folder", dir=self._options.dir, error=str(error))

    async def _open_store(self, *, is_index_damaged: bool = False) -> None:
        mine, options = self._folder.identity, self._options
        assert mine.volume is not None and self.store is None, "nobody else has it open"
        self.store = await open_store(
            self._world,
            options.dir,
            self._open_engine,
            volume=mine.volume,
            server_id=mine.id,
            options=StoreOptions(segment_bytes=options.segment_bytes, capacity=options.capacity),
            is_index_damaged=is_index_damaged,
        )
        self.store.failed.add_done_callback(self._store_failed)
        self._has_store.set()

    def _store_failed(self, failed: "asyncio.Future[EngineFailed]") -> None:
        if not failed.cancelled():
            self._reviving = asyncio.create_task(self._revive(failed.result()), name="revival")

    async def _revive(self, error: EngineFailed) -> None:
        """Open a store anew whose index takes nothing more. Until its disk can be written, blocks are read from it."""
        log.error("the store's index has failed", error=str(error))
        is_damaged = isinstance(error, EngineDamaged)
        try:
            await self._wait_writable()
            store, self.store = self.store, None
            assert store is not None, "the one whose index has failed"
            self._has_store.clear()
            try:
                await store.close()
            except MendfsError as closing:
                log.error("the store could not be closed in order", error=str(closing))
            while not await self._is_opened_anew(is_index_damaged=is_damaged):
                await asyncio.sleep(PROBE_EVERY_S)
                await self._wait_writable()
        except MendfsError as again:
            self._fail(again)
        else:
            log.info("the store was opened anew", blocks=self._health().blocks)

    async def _is_opened_anew(self, *, is_index_damaged: bool) -> bool:
        """Open the store; False if there was too little room for that."""
        try:
            await self._open_store(is_index_damaged=is_index_damaged)
        except (EngineFull, StoreFull) as error:
            log.error("the store cannot be opened anew yet", error=str(error))
            self._lacks_room = True
            return False
        return True

    async def _wait_writable(self) -> None:
        """Until a little can be written into the folder, durably: what the index needs to begin with."""
        disk = self._world.disk
        while True:
            try:
                await disk.run(self._folder.try_writing, PROBE_BYTES)
                self._lacks_room = False
                return
            except OSError as error:
                self._lacks_room = error.errno in (errno.ENOSPC, errno.EDQUOT)
                log.info("the folder cannot be written yet", dir=self._options.dir, error=error.strerror)
            try:
                if await disk.run(self._folder.give_up_spare):
                    log.warning("the folder's spare room is used, so that deletions can be noted")
                    return
            except OSError as error:
                log.info("there is no spare room to give up", dir=self._options.dir, error=error.strerror)
            await asyncio.sleep(PROBE_EVERY_S)

    async def _ready_store(self) -> Store:
        """The store; a new server's requests wait for it, up to their deadline."""
        while self.store is None:
            # Said before the asker's own patience ends: it goes on to another replica all the sooner.
            try:
                async with asyncio.timeout(STORE_WAIT_S):
                    await self._has_store.wait()
            except TimeoutError:
                if self._lacks_room:
                    # Writers are to be told of a full disk, as they are before and after.
                    raise StoreFull("the disk of this data server is too full for its store to be opened") from None
                raise StoreFailed("the store of this data server is still being opened: see its log") from None
        return self.store

    # Requests

    async def handle(self, peer: Peer, message: Message, received: Received | None) -> Reply | Message:
        """Answer one request."""
        if type(message) is messages.GetBlock:
            return await self._get(message)
        if type(message) is messages.PutBlock:
            return await self._put(message, received)
        handler = self._handlers.get(type(message))
        if handler is None:
            raise BadMessage(f"a data server does not answer {type(message).__name__}")
        return await handler(peer, message)

    async def _put(self, message: messages.PutBlock, received: Received | None) -> messages.Stored:
        store = await self._ready_store()
        length = 0 if received is None else len(received.view)
        volume = store.volume
        if received is None or not 0 < length <= volume.block_size:
            raise BadMessage(f"a block of {length} bytes; this volume's have 1 to {volume.block_size}")
        if not 0 <= message.partition < volume.partitions or not 0 < message.block < 1 << 64:
            raise BadMessage(f"there is no block {message.block:#x} of partition {message.partition}")
        if len(message.root) != RULES[volume.checksum].root_bytes or min(message.inode, message.slot) < 0:
            raise BadMessage("a root, inode or slot that this volume cannot have")
        put = store.put_synced if message.sync else store.put
        return messages.Stored(await put(message, received.view), self._registration.epoch)

    async def _get(self, message: messages.GetBlock) -> Reply:
        store = await self._ready_store()
        if message.first_page < 0 or message.page_count <= 0:
            raise BadMessage(f"{message.page_count} pages from page {message.first_page} on were asked for")
        pages = await store.get(message.partition, message.block, message.first_page, message.page_count)
        checksums = pages.checksums if message.with_checksums else b""
        answer = messages.BlockPages(pages.length, checksums, self._registration.epoch)
        return Reply(answer, (pages.view,), pages.release)

    async def _ping(self, peer: Peer, message: Ping) -> Done:
        return Done()

    async def _sync(self, peer: Peer, message: messages.SyncStore) -> messages.Synced:
        return messages.Synced(await (await self._ready_store()).sync())

    async def _have(self, peer: Peer, message: messages.HaveBlocks) -> messages.BlocksHeld:
        store = await self._ready_store()
        _check_count(len(message.blocks), NAMES_MAX)
        # Noted first: an incarnation that began while we looked would vouch for what a failed sync has taken.
        incarnation = store.incarnation
        return messages.BlocksHeld(await store.have(message.blocks), incarnation)

    async def _delete(self, peer: Peer, message: messages.DeleteBlocks) -> messages.Deleted:
        if peer.remote_role != "meta":
            raise NotAuthentic(f"a {peer.remote_role} cannot order a data server to delete")
        _check_count(len(message.blocks), NAMES_MAX)
        store = await self._ready_store()
        return messages.Deleted(await store.delete(Fence(message.generation, message.sequence), message.blocks))

    async def _list(self, peer: Peer, message: messages.ListContents) -> messages.Contents:
        store = await self._ready_store()
        limit = min(message.limit, VERIFY_MAX if message.verify else LIST_MAX)
        if limit <= 0:
            raise BadMessage(f"{message.limit} blocks were asked for")
        after = (message.after_partition, message.after_block)
        found = await store.list_blocks(after, limit, only=message.partition, verify=message.verify)
        return messages.Contents(tuple(found), complete=len(found) < limit)

    async def _inventory(self, peer: Peer, message: messages.GetInventory) -> messages.InventorySums:
        store = await self._ready_store()
        _check_count(len(message.partitions), INVENTORY_PARTITIONS_MAX)
        incarnation = store.incarnation
        return messages.InventorySums(await store.inventory(message.partitions), incarnation)

    async def _health_report(self, peer: Peer, message: messages.GetHealth) -> messages.HealthReport:
        return messages.HealthReport(self._incarnation, self._health(), self._world.pid)


def _check_count(count: int, most: int) -> None:
    if count > most:
        raise BadMessage(f"{count} at once; {most} are allowed")


async def start_data(world: World, engine_opener: EngineOpener, options: DataOptions, secret: bytes) -> DataServer:
    """Open the folder and serve it. Returns when it listens; it registers with the meta server in the background.

    Raises UsageError, StoreDamaged or StoreFailed, in a line that says what to do.
    """
    folder = await world.disk.run(Folder.open, world.disk, options.dir, world.rng)
    server = DataServer(world, engine_opener, options, secret, folder)
    try:
        if options.number is not None and folder.identity.number not in (None, options.number):
            raise MendfsError(f"the folder {options.dir} is server {folder.identity.number}'s, not {options.number}'s")
        await server.start()
    except BaseException:
        await server.close()
        raise
    return server
