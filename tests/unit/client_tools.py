"""A cluster in one process for the client's tests: the real meta server, and data servers that can be made to fail."""

import asyncio
import os
import random
import stat
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from mendfs.blocks import page_checksums, root_of
from mendfs.client.volume import OpenFile, Volume, VolumeOptions
from mendfs.errors import BlockConflict, BlockMissing, MendfsError, Unreachable
from mendfs.kv.memory import MemoryEngine
from mendfs.meta.server import MetaOptions, MetaServer, start_meta
from mendfs.meta.volume import format_volume
from mendfs.model import Epoch, Generation, Incarnation, Inode, Partition, ServerNumber, StoreHealth
from mendfs.model import Volume as Parameters
from mendfs.wire.messages import data as messages
from mendfs.wire.messages.session import Done, Ping
from mendfs.wire.peer import Credentials, Peer, Received, Reply, Server, connect, serve
from mendfs.world import World
from mendfs.world.local_disk import LocalDisk
from mendfs.world.tcp import TcpNetwork

SECRET = b"s" * 32
HEALTH = StoreHealth(
    blocks=0,
    bytes_used=0,
    bytes_free=1 << 40,
    reads=0,
    writes=0,
    mended=0,
    corrupt_found=0,
    oldest_disk_operation_s=0.0,
)


def parameters(**changes: Any) -> Parameters:
    volume = Parameters(
        id="ab" * 16,
        block_size=64 << 10,
        page_size=4096,
        replicas=3,
        partitions=60,
        checksum="xxh3",
        layout="ring",
        write_quorum=2,
        read_quorum=1,
        server_count=4,
        created_ns=1,
    )
    return msgspec.structs.replace(volume, **changes)


async def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.005)


class FakeStore:
    """A data server with its blocks in memory, and knobs for everything that may go wrong with one."""

    def __init__(self, number: int, volume: Parameters, world: World) -> None:
        self.number = number
        self.volume = volume
        self.world = world
        self.blocks: dict[tuple[int, int], bytes] = {}
        self.unsynced: set[tuple[int, int]] = set()
        self.incarnation = Incarnation(1000 * number + 1)
        self.put_error: MendfsError | None = None
        self.delete_error: MendfsError | None = None
        self.hold_puts: asyncio.Event | None = None
        self.hold_gets: asyncio.Event | None = None
        self.hold_syncs: asyncio.Event | None = None
        self.puts = 0
        self.gets = 0
        self.syncs = 0
        self.deletes = 0
        self._server: Server | None = None
        self._address = "127.0.0.1:0"
        self._checksums: dict[int, bytes] = {}
        """Of blocks that were corrupted: a rotten record keeps the checksums it was stored with."""
        self._beats: asyncio.Task[None] | None = None
        self._meta: Peer | None = None

    async def start(self, meta: str) -> None:
        secret = Credentials(SECRET, self.volume.id)
        self._server = await serve(self.world.network, self._address, secret, role="data", handler=self.handle)
        self._address = self._server.address
        self._meta = await connect(self.world.network, meta, secret, role="data", handler=self.handle)
        await self._meta.call(
            messages.RegisterServer(
                id=f"store {self.number}",
                address=self._address,
                zone="z",
                incarnation=self.incarnation,
                pid=1,
                capacity=0,
                wanted_number=ServerNumber(self.number),
                highest_generation=Generation(0),
                health=HEALTH,
            ),
            deadline_s=5,
        )
        self._beats = asyncio.create_task(self._beat(self._meta))

    async def _beat(self, meta: Peer) -> None:
        while not meta.is_closed:
            try:
                await meta.call(messages.Heartbeat(self.incarnation, HEALTH), deadline_s=5)
            except Unreachable:
                return
            await asyncio.sleep(0.5)

    async def stop(self) -> None:
        """The process is gone; its disk is not."""
        if self._beats is not None:
            self._beats.cancel()
            await asyncio.gather(self._beats, return_exceptions=True)
            self._beats = None
        if self._meta is not None:
            await self._meta.close()
            self._meta = None
        if self._server is not None:
            await self._server.close()
            self._server = None

    def lose_unsynced(self) -> None:
        """The power was cut: what no sync covered is gone, and the store was opened again."""
        for name in self.unsynced:
            self.blocks.pop(name, None)
        self.unsynced.clear()
        self.incarnation = Incarnation(self.incarnation + 1)

    async def handle(self, peer: Peer, message: Any, received: Received | None) -> Any:
        match message:
            case messages.PutBlock():
                return await self._put(message, received)
            case messages.GetBlock():
                return await self._get(message)
            case messages.SyncStore():
                self.syncs += 1
                if self.hold_syncs is not None:
                    await self.hold_syncs.wait()
                self.unsynced.clear()
                return messages.Synced(self.incarnation)
            case messages.HaveBlocks():
                roots = tuple(self._root(self.blocks[name]) if name in self.blocks else None for name in message.blocks)
                return messages.BlocksHeld(roots, self.incarnation)
            case messages.DeleteBlocks():
                self.deletes += 1
                if self.delete_error is not None:
                    raise self.delete_error
                for name in message.blocks:
                    self.blocks.pop(name, None)
                return messages.Deleted(len(message.blocks))
            case Ping():
                return Done()
        raise AssertionError(message)

    def _root(self, data: bytes) -> bytes:
        rule = self.volume.page_size, self.volume.checksum
        return root_of(
            page_checksums(data, *rule),
            length=len(data),
            page_size=self.volume.page_size,
            kind=self.volume.checksum,
        )

    async def _put(self, message: messages.PutBlock, received: Received | None) -> messages.Stored:
        self.puts += 1
        if self.hold_puts is not None:
            await self.hold_puts.wait()
        if self.put_error is not None:
            raise self.put_error
        assert received is not None
        data = bytes(received.view)
        assert self._root(data) == message.root, "what arrived is not what was sent"
        name = (message.partition, message.block)
        if name in self.blocks and self.blocks[name] != data:
            raise BlockConflict("another root")
        self.blocks[name] = data
        if not message.sync:
            self.unsynced.add(name)
        return messages.Stored(self.incarnation, Epoch(1))

    async def _get(self, message: messages.GetBlock) -> Reply:
        self.gets += 1
        if self.hold_gets is not None:
            await self.hold_gets.wait()
        data = self.blocks.get((message.partition, message.block))
        if data is None:
            raise BlockMissing(f"block {message.block:#x} is not here")
        size = self.volume.page_size
        pages = data[message.first_page * size : (message.first_page + message.page_count) * size]
        checksums = self._checksums.get(message.block) or page_checksums(data, size, self.volume.checksum)
        return Reply(messages.BlockPages(len(data), checksums if message.with_checksums else b"", Epoch(1)), [pages])

    def corrupt(self, partition: Partition, block: int) -> None:
        """Flip a bit of the first page behind the server's back."""
        data = self.blocks[partition, block]
        self._checksums[block] = page_checksums(data, self.volume.page_size, self.volume.checksum)
        self.blocks[partition, block] = bytes([data[0] ^ 1]) + data[1:]


class Cluster:
    """One meta server, some data servers, and clients that are closed at the end."""

    def __init__(self, world: World, volume: Parameters) -> None:
        self.world = world
        self.volume = volume
        self.engine: MemoryEngine
        self.meta: MetaServer
        self.stores: list[FakeStore] = []
        self.clients: list[Volume] = []
        self.listen = "127.0.0.1:0"

    async def start(self) -> None:
        await format_volume(self.engine, self.volume, self.world)
        await self.start_meta()
        for number in range(self.volume.server_count):
            store = FakeStore(number, self.volume, self.world)
            await store.start(self.meta.address)
            self.stores.append(store)

    async def start_meta(self) -> None:
        self.meta = await start_meta(self.world, self.engine, MetaOptions(listen=self.listen), SECRET)
        self.listen = self.meta.address

    async def client(self, meta: str = "", **options: Any) -> Volume:
        wanted = VolumeOptions(meta=meta or self.meta.address, name="test", **options)
        volume = await Volume.open(self.world, wanted, SECRET)
        self.clients.append(volume)
        return volume

    async def close(self) -> None:
        for volume in self.clients:
            await volume.close(timeout_s=1)
        for store in self.stores:
            await store.stop()
        await self.meta.close()


@asynccontextmanager
async def cluster(*, engine: MemoryEngine | None = None, **changes: Any) -> AsyncIterator[Cluster]:
    made = Cluster(World(TcpNetwork(), LocalDisk(), random.Random(1), time.time_ns), parameters(**changes))
    made.engine = engine or await MemoryEngine.open()
    await made.start()
    try:
        yield made
    finally:
        await made.close()


class Proxy:
    """Stands between a client and a server, and loses what it is told to lose."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server
        self.is_swallowing = False
        """Requests pass, answers vanish."""
        self.is_refusing = False
        self.connections = 0
        self.address = ""

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_refusing:
            writer.close()
            return
        self.connections += 1
        host, _, port = self._target.rpartition(":")
        remote_reader, remote_writer = await asyncio.open_connection(host, int(port))
        self._writers |= {writer, remote_writer}
        async with asyncio.TaskGroup() as group:
            group.create_task(self._pass(reader, remote_writer, answers=False))
            group.create_task(self._pass(remote_reader, writer, answers=True))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        try:
            while data := await reader.read(1 << 16):
                if not (answers and self.is_swallowing):
                    writer.write(data)
                    await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()
            self._writers.discard(writer)

    def cut(self) -> None:
        """End every connection."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def close(self) -> None:
        self.cut()
        self._server.close()
        await self._server.wait_closed()
        await asyncio.sleep(0)


async def write_file(volume: Volume, name: bytes, data: bytes, parent: int = 1) -> OpenFile:
    """Make a file with these contents; it stays open, unflushed."""
    made = await volume.make(Inode(parent), name, stat.S_IFREG | 0o644, uid=0, gid=0, open=True)
    file = await volume.open_made(made, flags=os.O_RDWR)
    await file.write(data, 0)
    return file


async def read_all(file: OpenFile, length_max: int = 1 << 22) -> bytes:
    """Everything a descriptor reads."""
    buffer = bytearray(length_max)
    count = await file.read_into(memoryview(buffer), 0)
    return bytes(buffer[:count])


async def contents(volume: Volume, inode: Inode, length_max: int = 1 << 22) -> bytes:
    """What a new open of a file reads."""
    file = await volume.open_file(inode, flags=os.O_RDONLY)
    try:
        return await read_all(file, length_max)
    finally:
        await file.release()
