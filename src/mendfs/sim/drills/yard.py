"""What drills work with: raw connections and sessions, blocks made by hand, machines to break, and how they judge."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from mendfs.blocks import page_checksums, root_of
from mendfs.client.volume import Volume
from mendfs.errors import DeadlineExceeded, MendfsError, SessionLost, Unreachable
from mendfs.kv.memory import MemoryEngine
from mendfs.meta import schema
from mendfs.model import BlockId, Extent, Inode, Partition, ServerNumber, Slot
from mendfs.placement import partition_of
from mendfs.sim.loop import Process
from mendfs.sim.machines import META_ADDRESS, ClientMachine, Machine
from mendfs.sim.scenario import Simulation
from mendfs.wire.messages import Message
from mendfs.wire.messages import data as data_messages
from mendfs.wire.messages import meta as messages
from mendfs.wire.messages import session as session_messages
from mendfs.wire.peer import Credentials, Peer, connect

Answer = TypeVar("Answer")

CALL_S = 20.0
"""A call of a drill, in a cluster that nothing else disturbs, is answered long before."""
RENEW_S = 2.0
READY_S = 60.0
"""After a restart or a power cut everything is there again by then."""


class Failed(Exception):
    """A drill cannot go on: what it needs did not come. Told as a violation."""


class Yard:
    """One run's cluster, calm, and all of it in the drills' hands."""

    def __init__(self, sim: Simulation, violation: Callable[[str], None], rng: random.Random) -> None:
        self.sim = sim
        self.rng = rng
        self.violation = violation
        self.process = Process("drill")
        self.drill = ""
        self._names = 0

    def wrong(self, text: str) -> None:
        """A rule was broken."""
        self.violation(f"drill {self.drill}: {text}")

    def name(self) -> bytes:
        """One that nothing has."""
        self._names += 1
        return b"drill-%s-%d" % (self.drill.encode(), self._names)

    @property
    def engine(self) -> MemoryEngine:
        """The metadata, as it is."""
        server = self.sim.meta.server
        assert server is not None and isinstance(server.state.engine, MemoryEngine), "machines are given one"
        return server.state.engine

    def keys(self, kind: schema.Kind) -> list[bytes]:
        """All keys of a kind."""
        return [key for key, _ in self.engine.read_range(*schema.all_of(kind), 1 << 30, False)]

    # --- machines ------------------------------------------------------------------------------------------------

    async def until(self, condition: Callable[[], bool], within_s: float, what: str) -> bool:
        """Wait; False, and a violation, if it does not come about."""
        end_s = self.sim.loop.time() + within_s
        while not condition():
            if self.sim.loop.time() >= end_s:
                self.wrong(f"{what} not within {within_s:g} s")
                return False
            await asyncio.sleep(0.1)
        return True

    def is_whole(self) -> bool:
        """Every machine runs, and the meta server knows all data servers."""
        server = self.sim.meta.server
        if server is None or not all(machine.is_running for machine in self.sim.servers):
            return False
        if server.state.world.pid != len(self.sim.meta.processes) or server.state.failed.done():
            return False
        lives = {machine.number: len(machine.processes) for machine in self.sim.data}
        # By the process that registered: nobody is told at once that one has lost power.
        return server.state.table is not None and all(
            member.state() == "up" and member.pid == lives[member.number] for member in server.state.members
        )

    async def whole(self) -> None:
        """Wait until nothing is missing. Raises Failed."""
        if not await self.until(self.is_whole, READY_S, "the cluster is whole again"):
            raise Failed("the cluster does not become whole")

    async def kill(self, machine: Machine) -> None:
        """kill -9, and wait until it is back."""
        machine.kill()
        await asyncio.sleep(0.05)
        await self.whole()

    async def power(self, *machines: Machine, wait: bool = True) -> None:
        """Cut the power of these, and give it back."""
        for machine in machines:
            machine.cut_power()
        await asyncio.sleep(0.5)
        for machine in machines:
            machine.start()
        if wait:
            await self.whole()

    # --- clients -------------------------------------------------------------------------------------------------

    async def client(self) -> tuple[ClientMachine, Volume]:
        """A client of its own."""
        self._names += 1
        name = f"drill{self._names}"
        volume = await self.sim.open(name, dirty_bytes_max=1 << 20, cache_bytes_max=1 << 20)
        machine = next(each for each in self.sim.clients if each.name == name)
        return machine, volume

    async def on(self, machine: ClientMachine, work: Awaitable[Answer]) -> Answer:
        """Run `work` in the client's process."""
        process = machine.process
        assert process is not None and process.is_alive, "drills end their clients themselves"

        async def inside() -> Any:
            # What it raises is the drill's to judge, not the loop's to complain of.
            try:
                return True, await work
            except MendfsError as error:
                return False, error

        is_ok, result = await self.sim.loop.start(process, inside())
        if not is_ok:
            raise result
        answer: Answer = result
        return answer

    # --- the wire ------------------------------------------------------------------------------------------------

    async def connection(self, address: str = META_ADDRESS, role: str = "client", secret: bytes = b"") -> Peer:
        """A raw connection."""

        async def handle(peer: Peer, message: Message, received: Any) -> Message:
            return session_messages.Done()

        network = self.sim.network.at("drill", self.process)
        credentials = Credentials(secret or self.sim.secret, "")
        return await connect(network, address, credentials, role=role, handler=handle, deadline_s=5.0)

    async def data(self, number: int, role: str = "client") -> Peer:
        """A raw connection to a data server."""
        return await self.connection(f"data{number}:1", role)

    async def ask(self, peer: Peer, message: Message, answer: type[Answer], payload: bytes = b"") -> Answer:
        """One call. Raises what it was answered with."""
        found, _ = await peer.call(message, [memoryview(payload)] if payload else (), deadline_s=CALL_S)
        if not isinstance(found, answer):
            raise Failed(f"{type(message).__name__} was answered with {type(found).__name__}")
        return found

    async def refused(self, work: Awaitable[object], what: str) -> MendfsError | None:
        """It must be refused; for a violation None."""
        try:
            found = await work
        except (Unreachable, DeadlineExceeded) as error:
            raise Failed(f"{what}: {error}") from None
        except MendfsError as error:
            return error
        self.wrong(f"{what} was not refused but answered with {type(found).__name__}")
        return None

    async def session(self) -> "RawSession":
        """A new session."""
        session = RawSession(self)
        await session.open()
        return session

    async def put(self, number: int, block: "Made", *, sync: bool = False) -> data_messages.Stored:
        """Store a block on one server."""
        peer = await self.data(number)
        try:
            message = data_messages.PutBlock(*block.name, block.inode, block.slot, block.root, sync=sync)
            return await self.ask(peer, message, data_messages.Stored, block.data)
        finally:
            await peer.close()

    async def fetch(self, number: int, block: "Made") -> bytes | None:
        """A block from one server, whole; None if it is not there."""
        peer = await self.data(number)
        try:
            pages = -(-len(block.data) // self.sim.shape.page_size)
            try:
                _, received = await peer.call(data_messages.GetBlock(*block.name, 0, pages), deadline_s=CALL_S)
            except (Unreachable, DeadlineExceeded):
                raise
            except MendfsError:
                return None
            if received is None:
                return b""
            content = bytes(received.view)
            received.release()
            return content
        finally:
            await peer.close()


class Made:
    """A block made by hand."""

    def __init__(self, yard: Yard, block: int, inode: int, slot: int, data: bytes) -> None:
        shape = yard.sim.shape
        self.inode, self.slot, self.data = Inode(inode), Slot(slot), data
        checksums = page_checksums(data, shape.page_size, shape.checksum)  # type: ignore[arg-type] # a shape's word
        self.root = root_of(checksums, length=len(data), page_size=shape.page_size, kind=shape.checksum)  # type: ignore[arg-type] # as above
        partition: Partition = partition_of(self.inode, self.slot, shape.partitions)
        self.name = (partition, BlockId(block))

    def new(self, servers: tuple[int, ...]) -> messages.NewBlock:
        """As a commit brings it."""
        numbers = tuple(ServerNumber(number) for number in servers)
        return messages.NewBlock(*self.name, len(self.data), self.root, numbers)

    def extent(self, offset_in_slot: int, length: int | None = None, offset_in_block: int = 0) -> Extent:
        """An extent that shows it."""
        whole = len(self.data) if length is None else length
        return Extent(offset_in_slot, whole, *self.name, len(self.data), offset_in_block, self.root)


class RawSession:
    """A session whose every request is written by hand. Renewed until `silence`."""

    def __init__(self, yard: Yard) -> None:
        self._yard = yard
        self.peer: Peer
        self.opened: session_messages.SessionOpened
        self.opens: set[Inode] = set()
        self._number = 0
        self._ids: dict[str, list[int]] = {"block": [], "inode": []}
        self._renewing: asyncio.Task[None] | None = None
        self.granted: list[range] = []
        """Every range of inode ids."""

    async def open(self) -> None:
        """Begin."""
        self.peer = await self._yard.connection()
        await self._take(session_messages.OpenSession("drill"))

    async def resume(self) -> None:
        """Go on, on a new connection. Raises SessionLost."""
        await self.peer.close()
        end_s = self._yard.sim.loop.time() + READY_S
        while True:
            try:
                self.peer = await self._yard.connection()
                opened = self.opened
                await self._take(
                    session_messages.ResumeSession(
                        opened.session, tuple(self.opens), opened.sequence, opened.generation
                    )
                )
                return
            except SessionLost:
                raise
            except MendfsError:
                if self._yard.sim.loop.time() > end_s:
                    raise
                await asyncio.sleep(0.1)

    async def _take(self, message: Message) -> None:
        self.opened = await self._yard.ask(self.peer, message, session_messages.SessionOpened)
        self.silence()
        self._renewing = asyncio.get_running_loop().create_task(self._renew(self.peer))

    async def _renew(self, peer: Peer) -> None:
        while not peer.is_closed:
            try:
                await peer.call(session_messages.Renew(BlockId(0)), deadline_s=CALL_S)
            except MendfsError:
                return  # the drill sees it by itself
            await asyncio.sleep(RENEW_S)

    def silence(self) -> None:
        """Renew no more."""
        if self._renewing is not None:
            self._renewing.cancel()

    async def end(self) -> None:
        """Over."""
        self.silence()
        try:
            await self.ask(session_messages.EndSession(), session_messages.Done)
        finally:
            await self.peer.close()

    def at(self) -> messages.RequestId:
        """For the next change, each in its turn."""
        self._number += 1
        return messages.RequestId(0, self._number)

    async def ask(self, message: Message, answer: type[Answer]) -> Answer:
        """One request."""
        return await self._yard.ask(self.peer, message, answer)

    async def id(self, kind: str) -> int:
        """The next id."""
        ids = self._ids[kind]
        if not ids:
            granted = await self.ask(session_messages.GrantIds(kind), session_messages.IdsGranted)
            ids += range(granted.first, granted.first + granted.count)
            if kind == "inode":
                self.granted.append(range(granted.first, granted.first + granted.count))
        return ids.pop(0)

    def now_ns(self) -> int:
        """For changes."""
        return self._yard.sim.loop.now_ns()

    async def make(self, name: bytes, mode: int = 0o100644, parent: int = 1) -> Inode:
        """A file."""
        inode = Inode(await self.id("inode"))
        message = messages.Make(self.at(), Inode(parent), name, inode, mode, 0, 0, self.now_ns())
        await self.ask(message, messages.Found)
        return inode

    async def unlink(self, name: bytes, parent: int = 1) -> None:
        """Remove a file's name."""
        await self.ask(messages.Unlink(self.at(), Inode(parent), name, False, self.now_ns()), messages.Removed)

    async def attributes(self, inode: Inode) -> Any:
        """As they are."""
        return (await self.ask(messages.GetAttributes(inode), messages.Found)).attributes

    async def extents(self, inode: Inode, slot: int = 0) -> tuple[Extent, ...]:
        """Of one slot."""
        answer = await self.ask(messages.GetExtents(inode, Slot(slot), 1), messages.Extents)
        return next((each.extents for each in answer.slots if each.slot == slot), ())

    def row(self, block: Made) -> list[int]:
        """The servers of a block's row."""
        return [int(entry.server) for entry in self.opened.table.rows[block.name[0]]]

    async def block(self, inode: int, slot: int, data: bytes) -> Made:
        """A block with an id of ours."""
        return Made(self._yard, await self.id("block"), inode, slot, data)

    def commit(
        self, inode: int, made: Made, servers: list[int], offset_in_slot: int = 0, **others: Any
    ) -> messages.Commit:
        """A commit that lays the block into its slot."""
        end = made.slot * self._yard.sim.shape.block_size + offset_in_slot + len(made.data)
        fields: dict[str, Any] = {"end": end, **others}
        change = messages.SlotChange(made.slot, (made.extent(offset_in_slot),))
        return messages.Commit(
            self.at(), Inode(inode), (made.new(tuple(servers)),), (change,), now_ns=self.now_ns(), **fields
        )

    async def write(self, inode: int, slot: int, data: bytes, offset_in_slot: int = 0) -> Made:
        """Store on the whole row, durably, and commit."""
        made = await self.block(inode, slot, data)
        row = self.row(made)
        for number in row:
            await self._yard.put(number, made, sync=True)
        await self.ask(self.commit(inode, made, row, offset_in_slot), messages.Committed)
        return made
