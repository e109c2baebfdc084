"""The data server over the real wire, with a meta server that only admits it."""

import asyncio
import errno
import random
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import pytest

from mendfs.blocks import page_checksums
from mendfs.data.server import DataOptions, DataServer, start_data
from mendfs.errors import (
    BadMessage,
    BlockConflict,
    BlockMissing,
    EngineDamaged,
    EngineFailed,
    EngineFull,
    EngineUnreadable,
    Fenced,
    MendfsError,
    NotAuthentic,
    StoreFailed,
    StoreFull,
    UsageError,
)
from mendfs.kv.rocks import RocksEngine
from mendfs.model import BlockId, CommitSequence, Epoch, Generation, MiB, Partition, ServerNumber, Volume
from mendfs.wire.messages import Message
from mendfs.wire.messages import data as messages
from mendfs.wire.messages.session import Done, Ping
from mendfs.wire.peer import Credentials, Peer, Received, Reply, Server, connect, serve
from mendfs.world import World
from mendfs.world.local_disk import LocalDisk
from mendfs.world.tcp import TcpNetwork
from tests.unit.data_tools import block, content, until, volume

SECRET = b"s" * 32
Answer = TypeVar("Answer")


class FakeMeta:
    """Admits whoever comes as number 2, and remembers what it was told."""

    def __init__(self, of: Volume) -> None:
        self.volume = of
        self.epoch = Epoch(7)
        self.number = ServerNumber(2)
        self.registrations: list[messages.RegisterServer] = []
        self.beats: list[messages.Heartbeat] = []
        self.peer: Peer | None = None
        self.server: Server

    async def listen(self, address: str = "127.0.0.1:0") -> None:
        self.server = await serve(
            TcpNetwork(), address, Credentials(SECRET, self.volume.id), role="meta", handler=self.handle
        )

    async def handle(self, peer: Peer, message: Message, received: Received | None) -> Reply | Message:
        if isinstance(message, messages.RegisterServer):
            self.registrations.append(message)
            self.peer = peer
            return messages.Registered(self.number, self.volume, self.epoch, Generation(1))
        assert isinstance(message, messages.Heartbeat)
        self.beats.append(message)
        return messages.HeartbeatSeen(self.epoch, Generation(1))


def world() -> World:
    return World(TcpNetwork(), LocalDisk(), random.SystemRandom(), lambda: 0)


def options(folder: Path, meta: str, **changes: Any) -> DataOptions:
    plain = DataOptions(dir=str(folder), listen="127.0.0.1:0", meta=meta, zone="z")
    return msgspec.structs.replace(plain, **changes)


@asynccontextmanager
async def running(folder: Path, meta: FakeMeta, **changes: Any) -> AsyncIterator[DataServer]:
    server = await start_data(world(), RocksEngine.open, options(folder, meta.server.address, **changes), SECRET)
    try:
        async with asyncio.timeout(10):
            await server.registered.wait()
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def meta_server(of: Volume | None = None) -> AsyncIterator[FakeMeta]:
    meta = FakeMeta(of or volume())
    await meta.listen()
    try:
        yield meta
    finally:
        await meta.server.close()


@asynccontextmanager
async def client_of(server: DataServer, role: str = "client") -> AsyncIterator[Peer]:
    async def refuse(peer: Peer, message: Message, received: Received | None) -> Message:
        raise BadMessage("a client answers nothing")

    peer = await connect(TcpNetwork(), server.address, Credentials(SECRET, volume().id), role=role, handler=refuse)
    try:
        yield peer
    finally:
        await peer.close()


async def ask(peer: Peer, message: Message, kind: type[Answer], payload: bytes = b"") -> Answer:
    answer, received = await peer.call(message, (payload,) if payload else (), deadline_s=10)
    assert received is None and isinstance(answer, kind), answer
    return answer


async def get(peer: Peer, put: messages.PutBlock, first_page: int = 0, page_count: int = 1 << 20) -> tuple[Any, bytes]:
    answer, received = await peer.call(
        messages.GetBlock(put.partition, put.block, first_page, page_count), deadline_s=10
    )
    assert received is not None
    found = bytes(received.view)
    received.release()
    return answer, found


async def test_a_block_travels_there_and_back(tmp_path: Path) -> None:
    async with meta_server() as meta, running(tmp_path / "d", meta) as server, client_of(server) as peer:
        store = server.store
        assert store is not None
        for number, length in enumerate([1, 4096, 70_000, 256 * 1024]):
            data = content(number, length)
            put = block(number, data)
            stored = await ask(peer, put, messages.Stored, data)
            assert stored == messages.Stored(store.incarnation, Epoch(7))
            pages, found = await get(peer, put)
            assert found == data
            assert pages == messages.BlockPages(length, page_checksums(data, 4096, "xxh3"), Epoch(7))
        pages, found = await get(peer, put, first_page=1, page_count=2)
        assert found == data[4096 : 3 * 4096]
        synced = await ask(peer, messages.SyncStore(), messages.Synced)
        assert synced.incarnation == store.incarnation
        again = block(9, b"now")
        await ask(peer, msgspec.structs.replace(again, sync=True), messages.Stored, b"now")
        names = tuple((put.partition, put.block) for put in (again, block(10, b"never")))
        held = await ask(peer, messages.HaveBlocks(names), messages.BlocksHeld)
        assert held.roots == (again.root, None)
        sums = await ask(peer, messages.GetInventory((put.partition, again.partition)), messages.InventorySums)
        assert [each.count for each in sums.sums] == [1, 1]
        assert await ask(peer, Ping(), Done) == Done()


async def test_errors_arrive_as_what_they_are(tmp_path: Path) -> None:
    async with meta_server() as meta, running(tmp_path / "d", meta) as server, client_of(server) as peer:
        put = block(1, b"one")
        await ask(peer, put, messages.Stored, b"one")
        with pytest.raises(BlockConflict):
            await ask(peer, block(1, b"two"), messages.Stored, b"two")
        with pytest.raises(BlockMissing):
            await get(peer, block(5, b""))
        for bad in (
            msgspec.structs.replace(put, partition=Partition(16)),
            msgspec.structs.replace(put, root=b"short"),
            msgspec.structs.replace(put, block=BlockId(0)),
        ):
            with pytest.raises(BadMessage):
                await ask(peer, bad, messages.Stored, b"one")
        with pytest.raises(BadMessage):
            await ask(peer, block(2, b""), messages.Stored)
        with pytest.raises(BadMessage):
            await get(peer, put, first_page=-1)
        with pytest.raises(BadMessage, match="does not answer"):
            await ask(peer, messages.Synced(server.store.incarnation), Done)  # type: ignore[union-attr]  # registered


async def test_contents_are_listed_in_pages_and_verified(tmp_path: Path) -> None:
    async with meta_server() as meta, running(tmp_path / "d", meta) as server, client_of(server) as peer:
        for number in range(5):
            await ask(peer, block(number, b"data%d" % number), messages.Stored, b"data%d" % number)
        await ask(peer, messages.SyncStore(), messages.Synced)
        segment = next((tmp_path / "d" / "segments").iterdir())
        raw = bytearray(segment.read_bytes())
        raw[raw.index(b"data3")] ^= 1
        segment.write_bytes(raw)
        first = await ask(peer, messages.ListContents(limit=3, verify=True), messages.Contents)
        assert not first.complete
        last = first.blocks[-1]
        rest = await ask(
            peer,
            messages.ListContents(after_partition=last.partition, after_block=last.block, limit=3, verify=True),
            messages.Contents,
        )
        assert rest.complete
        assert [each.ok for each in first.blocks + rest.blocks] == [True, True, True, False, True]
        report = await ask(peer, messages.GetHealth(), messages.HealthReport)
        assert report.health.corrupt_found == 1
        assert report.health.blocks == 4


async def test_the_meta_server_calls_back_over_the_same_connection(tmp_path: Path) -> None:
    async with meta_server() as meta, running(tmp_path / "d", meta) as server, client_of(server) as client:
        put = block(1, b"one")
        await ask(client, put, messages.Stored, b"one")
        assert meta.peer is not None
        await ask(meta.peer, messages.SyncStore(), messages.Synced)
        order = messages.DeleteBlocks(Generation(2), CommitSequence(5), ((put.partition, put.block),))
        with pytest.raises(NotAuthentic):
            await ask(client, order, messages.Deleted)
        assert await ask(meta.peer, order, messages.Deleted) == messages.Deleted(1)
        with pytest.raises(Fenced):
            await ask(meta.peer, msgspec.structs.replace(order, sequence=CommitSequence(4)), messages.Deleted)
        with pytest.raises(BlockMissing):
            await get(client, put)


async def test_heartbeats_tell_of_the_store_and_bring_the_epoch(tmp_path: Path) -> None:
    async with meta_server() as meta, running(tmp_path / "d", meta) as server, client_of(server) as peer:
        await ask(peer, block(1, b"one"), messages.Stored, b"one")
        meta.epoch = Epoch(8)
        await until(lambda: bool(meta.beats) and meta.beats[-1].health.blocks == 1)
        assert server.store is not None
        assert meta.beats[-1].incarnation == server.store.incarnation
        stored = await ask(peer, block(2, b"two"), messages.Stored, b"two")
        assert stored.epoch == 8


async def test_a_restarted_server_serves_before_it_reaches_the_meta_server(tmp_path: Path) -> None:
    put = block(1, b"one")
    async with meta_server() as meta, running(tmp_path / "d", meta, number=2) as server, client_of(server) as peer:
        await ask(peer, put, messages.Stored, b"one")
        assert meta.registrations[0].wanted_number == 2
        address = meta.server.address
    server = await start_data(world(), RocksEngine.open, options(tmp_path / "d", address), SECRET)
    assert server.number == 2
    async with client_of(server) as peer:
        assert (await get(peer, put))[1] == b"one"
        again = FakeMeta(volume())
        await again.listen(address)
        async with asyncio.timeout(10):
            await server.registered.wait()
        assert again.registrations[0].id == meta.registrations[0].id
        assert again.registrations[0].highest_generation == 1
        assert again.registrations[0].incarnation != meta.registrations[0].incarnation
        await again.server.close()
    await server.close()


async def test_a_server_comes_back_to_a_meta_server_that_was_restarted(tmp_path: Path) -> None:
    async with meta_server() as meta, running(tmp_path / "d", meta) as server:
        address = meta.server.address
        await meta.server.close()
        await until(lambda: not server.registered.is_set())
        again = FakeMeta(volume())
        await again.listen(address)
        async with asyncio.timeout(10):
            await server.registered.wait()
        assert len(again.registrations) == 1
        await again.server.close()


async def test_two_servers_on_one_folder_are_a_clear_error(tmp_path: Path) -> None:
    async with meta_server() as meta, running(tmp_path / "d", meta):
        with pytest.raises(UsageError, match="in use by another data server"):
            await start_data(world(), RocksEngine.open, options(tmp_path / "d", meta.server.address), SECRET)
    async with meta_server() as meta, running(tmp_path / "d", meta):
        pass


async def test_a_folder_of_another_volume_or_number_is_a_clear_error(tmp_path: Path) -> None:
    async with meta_server() as meta, running(tmp_path / "d", meta):
        pass
    async with meta_server() as meta:
        meta.number = ServerNumber(3)
        server = await start_data(world(), RocksEngine.open, options(tmp_path / "d", meta.server.address), SECRET)
        async with asyncio.timeout(10):
            error = await server.failed
        assert "is server 2's" in str(error)
        await server.close()
    with pytest.raises(MendfsError, match="server 2's, not 1's"):
        await start_data(world(), RocksEngine.open, options(tmp_path / "d", "127.0.0.1:1", number=1), SECRET)
    async with meta_server(msgspec.structs.replace(volume(), id="ef" * 16)) as meta:
        # Not a reason to end: the right meta server may take that address back.
        server = await start_data(world(), RocksEngine.open, options(tmp_path / "d", meta.server.address), SECRET)
        await asyncio.sleep(0.3)
        assert not meta.registrations and not server.registered.is_set()
        await server.close()


@pytest.mark.seed("C13")
async def test_a_folder_deleted_under_the_running_server_is_noticed_and_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    async with meta_server() as meta:
        async with running(folder, meta) as server, client_of(server) as peer:
            before, after = block(1, b"before"), block(2, b"after")
            await ask(peer, before, messages.Stored, b"before")
            await ask(peer, messages.SyncStore(), messages.Synced)
            shutil.rmtree(folder)
            await until(lambda: (folder / "server.json").exists())
            store = server.store
            assert store is not None
            await until(lambda: any("from other servers" in line for line in store.health().troubles))
            names = tuple((put.partition, put.block) for put in (before, after))
            assert (await ask(peer, messages.HaveBlocks(names), messages.BlocksHeld)).roots == (None, None)
            assert (await get(peer, before))[1] == b"before", "the open file still serves"
            await ask(peer, after, messages.Stored, b"after")
            await ask(peer, messages.SyncStore(), messages.Synced)
        async with running(folder, meta) as server, client_of(server) as peer:
            held = await ask(peer, messages.HaveBlocks(names), messages.BlocksHeld)
            assert held.roots == (None, after.root)
            assert server.number == 2
            assert meta.registrations[0].id == meta.registrations[-1].id


async def test_a_port_in_use_is_a_clear_error_and_leaves_the_folder_free(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UsageError, match=address):
            await start_data(world(), RocksEngine.open, options(tmp_path / "d", "x:1", listen=address), SECRET)
    async with meta_server() as meta, running(tmp_path / "d", meta):
        pass


async def test_many_blocks_at_once_over_one_connection(tmp_path: Path) -> None:
    of = volume()
    async with meta_server(of) as meta, running(tmp_path / "d", meta, segment_bytes=4 * MiB) as server:
        async with client_of(server) as peer:
            data = [content(number, 250_000) for number in range(40)]
            await asyncio.gather(*(ask(peer, block(n, d, of), messages.Stored, d) for n, d in enumerate(data)))
            found = await asyncio.gather(*(get(peer, block(n, d, of)) for n, d in enumerate(data)))
            assert [each for _, each in found] == data
        assert server.store is not None and server.store.health().blocks == 40


@pytest.mark.parametrize(
    ("method", "error", "is_made_again"),
    [
        ("write", EngineFull("the database cannot be written: no space left"), False),
        ("write", EngineFailed("the database cannot be written: Input/output error"), False),
        ("read", EngineDamaged("the database cannot be read: Corruption: block checksum mismatch"), True),
    ],
)
async def test_a_store_whose_index_fails_is_opened_anew_in_the_same_process(
    tmp_path: Path, method: str, error: EngineFailed, is_made_again: bool
) -> None:
    async with meta_server() as meta, running(tmp_path / "d", meta) as server, client_of(server) as peer:
        first = block(1, content(1, 9000))
        await ask(peer, first, messages.Stored, content(1, 9000))
        old = server.store
        assert old is not None

        def fail(*args: object) -> None:
            raise error

        setattr(old._index.engine, method, fail)  # a failing disk is what is tested
        with pytest.raises(MendfsError):
            await ask(peer, block(2, b"x"), messages.Stored, b"x")
        await until(lambda: server.store not in (None, old), within_s=10)
        assert server.store is not None
        assert server.store.recovered_without_index == is_made_again
        assert server.store.incarnation != old.incarnation
        _, found = await get(peer, first)
        assert found == content(1, 9000)
        await ask(peer, block(2, b"x"), messages.Stored, b"x")
        assert not server.failed.done() and not server.store.health().troubles


async def test_an_index_that_cannot_be_read_for_a_moment_costs_one_request(tmp_path: Path) -> None:
    async with meta_server() as meta, running(tmp_path / "d", meta) as server, client_of(server) as peer:
        first = block(1, content(1, 9000))
        await ask(peer, first, messages.Stored, content(1, 9000))
        store = server.store
        assert store is not None
        engine = store._index.engine
        assert isinstance(engine, RocksEngine)
        real = engine.read

        def fail(key: bytes) -> bytes | None:
            raise EngineUnreadable("the database cannot be read: Too many open files")

        engine.read = fail  # type: ignore[method-assign]  # no descriptors left is what is tested
        with pytest.raises(StoreFailed, match="Too many open files"):
            await get(peer, first)
        engine.read = real  # type: ignore[method-assign]  # there are some again
        assert (await get(peer, first))[1] == content(1, 9000)
        assert server.store is store and not store.failed.done()


async def test_while_a_store_is_being_opened_its_server_says_so_at_once(tmp_path: Path) -> None:
    async with meta_server() as meta, running(tmp_path / "d", meta) as server, client_of(server) as peer:
        store, server.store = server.store, None
        server._has_store.clear()
        began_s = asyncio.get_running_loop().time()
        with pytest.raises(StoreFailed, match="still being opened"):
            await ask(peer, block(1, b"x"), messages.Stored, b"x")
        assert asyncio.get_running_loop().time() - began_s < 3
        server.store = store
        server._has_store.set()


async def test_on_a_full_disk_the_spare_room_is_given_up_and_made_again_when_there_is_room(tmp_path: Path) -> None:
    """Without it a store could not even note which blocks are deleted to make room."""
    async with meta_server() as meta, running(tmp_path / "d", meta) as server, client_of(server) as peer:
        first = block(1, content(1, 9000))
        await ask(peer, first, messages.Stored, content(1, 9000))
        spare = tmp_path / "d" / "spare"
        await until(spare.exists, within_s=5)
        old, folder = server.store, server._folder
        assert old is not None
        is_full = True
        real_probe, real_keep = folder.try_writing, folder.keep_spare

        def probe(length: int) -> None:
            if is_full and spare.exists():
                raise OSError(errno.ENOSPC, "No space left on device")
            real_probe(length)

        def keep() -> None:
            if not is_full:
                real_keep()

        def fail(*args: object) -> None:
            raise EngineFull("the database cannot be written: no space left")

        folder.try_writing, folder.keep_spare = probe, keep  # type: ignore[method-assign]  # a full disk
        old._index.engine.write = fail  # type: ignore[attr-defined]  # the same
        with pytest.raises(StoreFull):
            await ask(peer, block(2, b"x"), messages.Stored, b"x")
        await until(lambda: server.store not in (None, old), within_s=10)
        assert not spare.exists()
        assert (await get(peer, first))[1] == content(1, 9000)
        is_full = False
        await until(spare.exists, within_s=5)
