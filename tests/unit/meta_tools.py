"""A volume on the in-memory engine, and short words for what the tests of `meta` do with it."""

import stat
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from mendfs.kv.engine import Transaction, run
from mendfs.kv.memory import MemoryEngine
from mendfs.meta import attributes, commit, namespace, ranges, schema, volume
from mendfs.meta.sessions import Sessions
from mendfs.model import (
    ROOT_INODE,
    Attributes,
    BlockId,
    Entry,
    Extent,
    Generation,
    Inode,
    Partition,
    ServerNumber,
    SessionId,
    Slot,
    Volume,
)
from mendfs.wire.messages import meta as messages
from mendfs.wire.messages import session as session_messages

Result = TypeVar("Result")
BLOCK_SIZE = 64
ROW = (ServerNumber(0), ServerNumber(1), ServerNumber(2))

PARAMETERS = Volume(
    id="0" * 32,
    block_size=BLOCK_SIZE,
    page_size=16,
    replicas=3,
    partitions=4,
    checksum="xxh3",
    layout="ring",
    write_quorum=2,
    read_quorum=1,
    server_count=4,
    created_ns=1,
)


class FakeWorld:
    """Only the clock of a World."""

    def now_ns(self) -> int:
        return 1


class MetaVolume:
    """A formatted volume with one session; every call is one transaction."""

    def __init__(self, engine: MemoryEngine) -> None:
        self.engine = engine
        self.session = SessionId(1)
        self.sessions = Sessions()
        self._inodes: list[int] = []
        self._blocks: list[int] = []

    @classmethod
    async def make(cls) -> "MetaVolume":
        self = cls(await MemoryEngine.open(None, None))
        await volume.format_volume(self.engine, PARAMETERS, FakeWorld())  # type: ignore[arg-type]  # only now_ns is used
        rows = tuple(tuple(Entry(ServerNumber((p + k) % 4)) for k in range(3)) for p in range(4))
        await volume.write_first_table(self.engine, rows)
        await self.open_session(self.session)
        self._inodes = await self.granted("inode")
        self._blocks = await self.granted("block")
        return self

    async def do(self, operation: Callable[..., Awaitable[Result]], *args: Any) -> Result:
        return (await run(self.engine, operation, *args))[0]

    async def open_session(self, session: SessionId) -> None:
        async def operation(tx: Transaction) -> None:
            tx.put(schema.session_key(session), schema.SESSION.encode(schema.SessionRecord("test", 1)))

        await self.do(operation)

    async def granted(self, kind: str, session: SessionId | None = None) -> list[int]:
        request = session_messages.GrantIds(kind)
        found = await self.do(ranges.grant, session or self.session, request, Generation(1))
        return list(range(found.first, found.first + found.count))

    def at(self) -> messages.RequestId:
        return messages.RequestId(0, 1)

    async def create(self, name: bytes, parent: Inode = ROOT_INODE, mode: int = stat.S_IFREG | 0o644) -> Attributes:
        inode = Inode(self._inodes.pop(0))
        request = messages.Make(self.at(), parent, name, inode, mode, 7, 8, 10)
        return await self.do(namespace.make, request, 1)

    async def mkdir(self, name: bytes, parent: Inode = ROOT_INODE) -> Inode:
        return (await self.create(name, parent, stat.S_IFDIR | 0o755)).inode

    async def lookup(self, name: bytes, parent: Inode = ROOT_INODE) -> Attributes:
        return await self.do(namespace.lookup, parent, name)

    async def unlink(self, name: bytes, parent: Inode = ROOT_INODE, *, directory: bool = False) -> Attributes:
        return await self.do(namespace.unlink, messages.Unlink(self.at(), parent, name, directory, 20), self.sessions)

    async def rename(
        self, name: bytes, new: bytes, parent: Inode = ROOT_INODE, to: Inode = ROOT_INODE, flags: int = 0
    ) -> Attributes | None:
        request = messages.Rename(self.at(), parent, name, to, new, flags, 30)
        return await self.do(namespace.rename, request, self.sessions)

    async def resize(self, inode: Inode, size: int) -> Attributes:
        request = messages.SetAttributes(self.at(), inode, 40, size=size)
        return await self.do(attributes.set_attributes, request)

    def new_block(self, length: int, servers: tuple[ServerNumber, ...] = ROW) -> messages.NewBlock:
        number = BlockId(self._blocks.pop(0))
        return messages.NewBlock(Partition(0), number, length, b"root%d" % number, servers)

    def commit_of(
        self, inode: Inode, offset: int, length: int, servers: tuple[ServerNumber, ...] = ROW, **fields: Any
    ) -> messages.Commit:
        new = self.new_block(length, servers)
        slot = Slot(offset // BLOCK_SIZE)
        extent = Extent(offset % BLOCK_SIZE, length, new.partition, new.block, length, 0, new.root)
        change = messages.SlotChange(slot, (extent,))
        return messages.Commit(self.at(), inode, (new,), (change,), offset + length, 50, **fields)

    async def commit(self, request: messages.Commit, session: SessionId | None = None) -> messages.Committed:
        return await self.do(commit.commit, request, session or self.session, PARAMETERS)

    async def write(self, inode: Inode, offset: int, length: int) -> messages.Committed:
        return await self.commit(self.commit_of(inode, offset, length))

    async def keys(self, kind: schema.Kind) -> list[tuple[bytes, bytes]]:
        return await self.engine.begin().range(*schema.all_of(kind), limit=10_000)
