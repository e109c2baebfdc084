"""The meta server over the real wire: sessions, answers given once, clocks, and the order in which blocks are freed."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mendfs.errors import CommitRefused, Fenced, NotReady, OperationError, SessionLost, Unreachable, UsageError
from mendfs.kv.engine import Engine
from mendfs.kv.memory import MemoryEngine
from mendfs.meta import background, registry
from mendfs.meta.server import MetaOptions, MetaServer, start_meta
from mendfs.meta.volume import format_volume
from mendfs.model import (
    ROOT_INODE,
    BlockId,
    Extent,
    Generation,
    Incarnation,
    Inode,
    Partition,
    ServerNumber,
    Slot,
    StoreHealth,
)
from mendfs.placement import partition_of
from mendfs.wire.messages import data as data_messages
from mendfs.wire.messages import meta as messages
from mendfs.wire.messages import session as session_messages
from mendfs.wire.peer import Credentials, Peer, Received, connect
from mendfs.world import World
from mendfs.world.local_disk import LocalDisk
from mendfs.world.tcp import TcpNetwork
from tests.unit.meta_tools import PARAMETERS

SECRET = b"s" * 32
HEALTH = StoreHealth(
    blocks=0,
    bytes_used=0,
    bytes_free=1000,
    reads=0,
    writes=0,
    mended=0,
    corrupt_found=0,
    oldest_disk_operation_s=0.0,
)


def new_world() -> World:
    return World(TcpNetwork(), LocalDisk(), random.Random(1), time.time_ns)


async def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)


class FakeDataServer:
    """Registers, beats, and notes what it is ordered."""

    def __init__(self, number: int, order: list[str]) -> None:
        self.number = number
        self.order = order
        self.refuses: Exception | None = None
        self.peer: Peer

    async def handle(self, peer: Peer, message: Any, received: Received | None) -> Any:
        match message:
            case data_messages.SyncStore():
                self.order.append(f"sync {self.number}")
                return data_messages.Synced(Incarnation(self.number))
            case data_messages.DeleteBlocks():
                if self.refuses is not None:
                    raise self.refuses
                self.order.append(f"delete {self.number}")
                return data_messages.Deleted(len(message.blocks))
        raise AssertionError(message)

    async def register(self, world: World, address: str, **fields: Any) -> data_messages.Registered:
        self.peer = await connect(world.network, address, Credentials(SECRET, ""), role="data", handler=self.handle)
        request = data_messages.RegisterServer(
            id=f"id{self.number}",
            address=f"127.0.0.1:{self.number + 1}",
            zone="z",
            incarnation=Incarnation(self.number),
            pid=1,
            capacity=0,
            wanted_number=ServerNumber(self.number),
            highest_generation=Generation(0),
            health=HEALTH,
        )
        answer, _ = await self.peer.call(msgspec.structs.replace(request, **fields), deadline_s=5)
        assert isinstance(answer, data_messages.Registered)
        return answer


class Client:
    """A session, and short words for requests."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.pushed: list[Any] = []
        self.number = 0
        self.opened: session_messages.SessionOpened
        self.inodes: list[int] = []
        self.blocks: list[int] = []

    @classmethod
    async def connect(cls, world: World, address: str) -> "Client":
        holder: list[Client] = []

        async def pushed(peer: Peer, message: Any, received: Received | None) -> None:
            holder[0].pushed.append(message)

        peer = await connect(world.network, address, Credentials(SECRET, ""), role="client", handler=pushed)
        holder.append(cls(peer))
        return holder[0]

    async def ask(self, message: Any) -> Any:
        return (await self.peer.call(message, deadline_s=10))[0]

    async def open(self) -> "Client":
        self.opened = await self.ask(session_messages.OpenSession("test"))
        for kind, into in (("inode", self.inodes), ("block", self.blocks)):
            granted = await self.ask(session_messages.GrantIds(kind))
            into += range(granted.first, granted.first + granted.count)
        return self

    def at(self) -> messages.RequestId:
        self.number += 1
        return messages.RequestId(0, self.number)

    async def create(self, name: bytes, **fields: Any) -> Any:
        inode = Inode(self.inodes.pop(0))
        return (
            await self.ask(messages.Make(self.at(), ROOT_INODE, name, inode, 0o100644, 0, 0, 5, **fields))
        ).attributes

    def commit_of(self, inode: Inode, length: int = 10) -> messages.Commit:
        partition = partition_of(inode, Slot(0), PARAMETERS.partitions)
        row = tuple(entry.server for entry in self.opened.table.rows[partition])
        block = BlockId(self.blocks.pop(0))
        new = messages.NewBlock(partition, block, length, b"root", row)
        extent = Extent(0, length, Partition(partition), block, length, 0, b"root")
        return messages.Commit(self.at(), inode, (new,), (messages.SlotChange(Slot(0), (extent,)),), length, 6)


class Cluster:
    """A meta server on a memory engine with fake data servers."""

    def __init__(self, world: World, server: MetaServer) -> None:
        self.world = world
        self.server = server
        self.order: list[str] = []
        self.data = [FakeDataServer(n, self.order) for n in range(4)]

    async def register_all(self) -> None:
        for server in self.data:
            await server.register(self.world, self.server.address)

    async def client(self) -> Client:
        return await (await Client.connect(self.world, self.server.address)).open()


@asynccontextmanager
async def running(engine: Engine | None = None) -> AsyncIterator[Cluster]:
    world = new_world()
    if engine is None:
        engine = await MemoryEngine.open(None, None)
        await format_volume(engine, PARAMETERS, world)
    server = await start_meta(world, engine, MetaOptions(listen="127.0.0.1:0"), SECRET)
    cluster = Cluster(world, server)
    try:
        yield cluster
    finally:
        for data in cluster.data:
            if hasattr(data, "peer"):
                await data.peer.close()
        await server.close()


async def test_a_volume_waits_until_all_its_data_servers_have_registered() -> None:
    async with running() as cluster:
        client = await Client.connect(cluster.world, cluster.server.address)
        with pytest.raises(NotReady, match="0 of 4"):
            await client.ask(session_messages.OpenSession("early"))
        await cluster.register_all()
        await client.open()
        assert len(client.opened.table.rows) == PARAMETERS.partitions
        assert [view.state for view in client.opened.servers] == ["up"] * 4
        with pytest.raises(UsageError, match="is none of them"):
            await FakeDataServer(9, []).register(cluster.world, cluster.server.address)


async def test_a_repeated_commit_is_answered_with_the_same_words() -> None:
    async with running() as cluster:
        await cluster.register_all()
        client = await cluster.client()
        inode = (await client.create(b"f")).inode
        request = client.commit_of(inode)
        first = await client.ask(request)
        assert await client.ask(request) == first
        with pytest.raises(CommitRefused):
            await client.ask(msgspec.structs.replace(request, at=client.at()))


async def test_blocks_are_deleted_only_after_data_and_log_were_synced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FREE_EVERY_S", 0.05)
    async with running() as cluster:
        await cluster.register_all()
        client = await cluster.client()
        await client.ask(client.commit_of((await client.create(b"f")).inode))
        await client.ask(messages.Unlink(client.at(), ROOT_INODE, b"f", False, 7))
        died = cluster.server.state.engine.last_sequence
        await until(lambda: sum(line.startswith("delete") for line in cluster.order) == 3)
        first_delete = next(i for i, line in enumerate(cluster.order) if line.startswith("delete"))
        assert {line for line in cluster.order[:first_delete] if line.startswith("sync")} >= {
            f"sync {n}" for n in range(4)
        }
        assert cluster.server.state.engine.synced_sequence >= died
        document = (await client.ask(messages.GetStatus())).document
        await until(lambda: not cluster.server.state.work.is_set())
        assert document["health"] == "whole"


async def test_an_open_file_is_freed_only_after_its_close(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FREE_EVERY_S", 0.05)
    async with running() as cluster:
        await cluster.register_all()
        client, other = await cluster.client(), await cluster.client()
        inode = (await client.create(b"f", open=True)).inode
        await client.ask(client.commit_of(inode))
        await other.ask(messages.Unlink(other.at(), ROOT_INODE, b"f", False, 7))
        assert len((await client.ask(messages.GetExtents(inode, Slot(0), 1))).slots) == 1
        with pytest.raises(OperationError):
            await other.ask(messages.OpenInode(inode))
        await client.ask(messages.OpenInode(inode))
        await client.ask(session_messages.CloseInodes((inode,)))
        await until(lambda: sum(line.startswith("delete") for line in cluster.order) == 3)
        with pytest.raises(OperationError):
            await client.ask(messages.GetExtents(inode, Slot(0), 1))


async def test_a_fenced_delete_stops_freeing_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FREE_EVERY_S", 0.05)
    async with running() as cluster:
        await cluster.register_all()
        for data in cluster.data:
            data.refuses = Fenced("generation 9 was obeyed before")
        client = await cluster.client()
        await client.ask(client.commit_of((await client.create(b"f")).inode))
        await client.ask(messages.Unlink(client.at(), ROOT_INODE, b"f", False, 7))
        await until(lambda: bool(cluster.server.state.troubles))
        document = (await client.ask(messages.GetStatus())).document
        assert document["health"] == "at-risk"
        assert "generation 9" in document["troubles"][0]


async def test_a_session_without_renewal_ends_and_its_commits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "LEASE_S", 0.3)
    async with running() as cluster:
        await cluster.register_all()
        client = await cluster.client()
        inode = (await client.create(b"f")).inode
        request = client.commit_of(inode)
        await until(lambda: not cluster.server.state.sessions.all())
        with pytest.raises(SessionLost):
            await client.ask(request)
        again = await Client.connect(cluster.world, cluster.server.address)
        with pytest.raises(SessionLost):
            await again.ask(session_messages.ResumeSession(client.opened.session, (), request.at.number))  # type: ignore[arg-type]


async def test_after_a_restart_a_session_resumes_and_repeats_what_was_in_flight(tmp_path: Path) -> None:
    disk = LocalDisk()
    engine = await MemoryEngine.open(disk, str(tmp_path / "log"))
    await format_volume(engine, PARAMETERS, new_world())
    async with running(engine) as cluster:
        await cluster.register_all()
        client = await cluster.client()
        inode = (await client.create(b"f", open=True)).inode
        request = client.commit_of(inode)
        done = await client.ask(request)
        await client.ask(messages.Unlink(messages.RequestId(1, 1), ROOT_INODE, b"f", False, 7))
    engine = await MemoryEngine.open(disk, str(tmp_path / "log"))
    async with running(engine) as cluster:
        state = cluster.server.state
        assert state.in_grace(asyncio.get_running_loop().time()), "nothing is freed before the session has reclaimed"
        assert state.generation == client.opened.generation + 1
        again = await Client.connect(cluster.world, cluster.server.address)
        resume = session_messages.ResumeSession(client.opened.session, (inode,), done.sequence)
        assert (await again.ask(resume)).session == client.opened.session
        assert not state.in_grace(asyncio.get_running_loop().time())
        assert await again.ask(request) == done
        assert len((await again.ask(messages.GetExtents(inode, Slot(0), 1))).slots) == 1


async def test_what_an_earlier_connection_delivers_late_does_not_count() -> None:
    async with running() as cluster:
        await cluster.register_all()
        client = await cluster.client()
        inode = (await client.create(b"f", open=True)).inode
        again = await Client.connect(cluster.world, cluster.server.address)
        resume = session_messages.ResumeSession(client.opened.session, (inode,), client.opened.sequence)
        await again.ask(resume)
        with pytest.raises(Unreachable):
            await client.ask(session_messages.CloseInodes((inode,)))
        assert cluster.server.state.sessions.of(inode) == (client.opened.session,)


async def test_a_lost_connection_makes_a_server_suspect_and_silence_makes_it_down() -> None:
    async with running() as cluster:
        await cluster.register_all()
        client = await cluster.client()
        epoch = cluster.server.state.epoch
        await cluster.data[2].peer.close()
        await until(lambda: any(push.servers[2].state == "suspect" for push in client.pushed))
        await until(lambda: any(push.servers[2].state == "down" for push in client.pushed))
        assert cluster.server.state.epoch > epoch
        await cluster.data[2].register(cluster.world, cluster.server.address)
        await until(lambda: client.pushed[-1].servers[2].state == "up")


async def test_a_meta_server_without_a_volume_says_what_to_do() -> None:
    with pytest.raises(UsageError, match="mendfs format"):
        await start_meta(new_world(), await MemoryEngine.open(None, None), MetaOptions(listen="127.0.0.1:0"), SECRET)


async def test_background_work_that_fails_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answering on without leases and syncs would acknowledge what nobody makes durable."""

    async def breaks(state: Any) -> None:
        raise KeyError("a mistake of ours")

    monkeypatch.setattr(background, "LOOPS", (breaks, background.sync_forever))
    async with running() as cluster:
        error = await asyncio.wait_for(asyncio.shield(cluster.server.state.failed), 5)
        assert "a mistake of ours" in str(error)
