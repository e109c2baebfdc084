"""Drills of clients (design section 6): what they tell an application is true, at the worst moment for it."""

import asyncio
import contextlib
import os
import stat
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from mendfs.client.volume import OpenFile, Volume
from mendfs.errors import MendfsError
from mendfs.meta import schema
from mendfs.model import Inode, Slot
from mendfs.sim.drills.yard import Yard
from mendfs.sim.machines import ClientMachine
from mendfs.wire.messages import meta as messages

ROOT = Inode(1)
STALE = 0xAA
"""What memory holds that nobody has written to: a read must fill all that it answers for."""


class Hand:
    """One client's files, a call at a time."""

    def __init__(self, yard: Yard, machine: ClientMachine, volume: Volume) -> None:
        self.yard = yard
        self.machine = machine
        self.volume = volume

    async def do(self, work: Awaitable[Any]) -> Any:
        """In the client's process."""
        return await self.yard.on(self.machine, work)

    async def make(self, name: bytes) -> OpenFile:
        """A new file, open."""
        made = await self.do(self.volume.make(ROOT, name, stat.S_IFREG | 0o644, uid=0, gid=0, open=True))
        opened: OpenFile = await self.do(self.volume.open_made(made, flags=os.O_RDWR))
        return opened

    async def open(self, name: bytes, flags: int = os.O_RDWR) -> OpenFile:
        """An old one."""
        found = await self.do(self.volume.lookup(ROOT, name))
        opened: OpenFile = await self.do(self.volume.open_file(found.inode, flags=flags))
        return opened

    async def close(self, opened: OpenFile) -> None:
        """As close(2)."""

        async def work() -> None:
            try:
                await opened.flush()
            finally:
                await opened.release()

        await self.do(work())

    async def write(self, name: bytes, data: bytes, *, durable: bool = False, flags: int | None = None) -> None:
        """A whole file, closed."""
        opened = await (self.make(name) if flags is None else self.open(name, flags))
        await self.do(opened.write(data, 0))
        if durable:
            await self.do(opened.fsync())
        await self.close(opened)

    async def read(self, name: bytes) -> bytes:
        """A whole file."""
        opened = await self.open(name, os.O_RDONLY)
        try:
            buffer = bytearray([STALE]) * (opened.attributes.size + 10)
            count = await self.do(opened.read_into(memoryview(buffer), 0))
            return bytes(buffer[:count])
        finally:
            await self.do(opened.release())

    async def check(self, name: bytes, data: bytes, when: str) -> bool:
        """It holds `data`."""
        try:
            found = await self.read(name)
        except MendfsError as error:
            self.yard.wrong(f"{when}: a file cannot be read: {error}")
            return False
        if found != data:
            at = next((n for n, (a, b) in enumerate(zip(found, data, strict=False)) if a != b), -1)
            self.yard.wrong(f"{when}: {len(found)} bytes instead of {len(data)}, first other one at {at}")
        return found == data

    async def unlink(self, name: bytes) -> None:
        """Remove it."""
        await self.do(self.volume.unlink(ROOT, name))

    def over(self) -> None:
        """The client dies."""
        self.machine.kill(restart=False)


async def hand(yard: Yard) -> Hand:
    """A new client."""
    return Hand(yard, *await yard.client())


def _data(yard: Yard, blocks: float = 2.3) -> bytes:
    return yard.rng.randbytes(int(min(yard.sim.shape.block_size, 8192) * blocks))


async def synced_is_durable(yard: Yard) -> None:
    """Power goes everywhere as soon as an fsync was answered, or a log that names what was renamed or emptied."""
    one, other, session = await hand(yard), await hand(yard), await yard.session()
    kinds: dict[str, Callable[[Hand, bytes, bytes], Awaitable[None]]] = {
        "fsynced": _fsynced,
        "fsynced in two halves": _fsynced_in_halves,
        "renamed over": _renamed_over,
        "closed after O_TRUNC": _emptied,
    }
    for what, work in kinds.items():
        name, data = yard.name(), _data(yard)
        await other.write(name, _data(yard), durable=True)
        await work(one, name, data)
        if what in ("renamed over", "closed after O_TRUNC"):
            # The log is made durable by somebody else: what it names must be there.
            await session.ask(messages.SyncLog(), messages.LogSynced)
        await yard.power(*yard.sim.servers)
        await session.resume()
        await other.check(name, data, f"{what}, after a power cut everywhere")
        await other.unlink(name)
    one.over()
    other.over()
    await session.end()


async def _fsynced(one: Hand, name: bytes, data: bytes) -> None:
    opened = await one.open(name, os.O_RDWR)
    await one.do(one.volume.set_attributes(opened.inode, size=0))
    await one.do(opened.write(data, 0))
    await one.do(opened.fsync())


async def _fsynced_in_halves(one: Hand, name: bytes, data: bytes) -> None:
    """The first half is on its way, or committed, when the fsync begins."""
    opened = await one.open(name, os.O_RDWR)
    await one.do(one.volume.set_attributes(opened.inode, size=0))
    half = len(data) // 2
    await one.do(opened.write(data[:half], 0))
    await one.do(opened.flush())
    await one.do(opened.write(data[half:], half))
    await one.do(opened.fsync())


async def _renamed_over(one: Hand, name: bytes, data: bytes) -> None:
    beside = name + b".new"
    await one.write(beside, data)
    await one.do(one.volume.rename(ROOT, beside, ROOT, name))


async def _emptied(one: Hand, name: bytes, data: bytes) -> None:
    await one.write(name, data, flags=os.O_RDWR | os.O_TRUNC)


async def closed_is_seen(yard: Yard) -> None:
    """What one client has closed the next to open sees, whatever it has read of the file before."""
    one, other = await hand(yard), await hand(yard)
    name, data = yard.name(), bytearray(_data(yard))
    await one.write(name, bytes(data))
    for turn in range(5):
        reader, writer = (other, one) if turn % 2 else (one, other)
        if not await reader.check(name, bytes(data), "closed by another client"):
            break
        opened = await writer.open(name)
        where = yard.rng.randrange(len(data))
        piece = yard.rng.randbytes(300)
        if turn == 2:
            size = len(data) // 2
            await writer.do(writer.volume.set_attributes(opened.inode, size=size))
            del data[size:]
        elif turn == 3:
            where = len(data) + 700
        if len(data) < where + 300:
            data.extend(bytes(where + 300 - len(data)))
        data[where : where + 300] = piece
        await writer.do(opened.write(piece, where))
        await _check_own(yard, writer, opened, bytes(data))
        await writer.close(opened)
        shown = await reader.do(reader.volume.attributes(opened.inode))
        if shown.size != len(data):
            yard.wrong(f"a file of {len(data)} bytes, closed, has {shown.size} for another client")
    await other.check(name, bytes(data), "closed by another client")
    await one.check(name, bytes(data), "closed by another client")
    await one.unlink(name)
    one.over()
    other.over()


async def _check_own(yard: Yard, hand: Hand, opened: OpenFile, data: bytes) -> None:
    """Before anything is committed, while it is, and after."""
    for wait_s in (0.0, 0.001, 0.02, 1.3):
        await asyncio.sleep(wait_s)
        buffer = bytearray([STALE]) * (len(data) + 10)
        count = await hand.do(opened.read_into(memoryview(buffer), 0))
        if bytes(buffer[:count]) != data:
            yard.wrong(f"a client does not read what it has written {wait_s:g} s before")
            return


async def errors_are_told(yard: Yard) -> None:
    """What cannot be stored is told by the write, fsync or close that follows."""
    one = await hand(yard)
    for last in ("fsync", "close"):
        name = yard.name()
        opened = await one.make(name)
        await one.do(opened.write(b"x" * 100, 0))
        await one.do(opened.fsync())
        for machine in yard.sim.data:
            machine.disk.rules.total_bytes = machine.disk.bytes_used()
        await asyncio.sleep(3)  # measured by then
        told = False
        try:
            await one.do(opened.write(_data(yard), 0))
            await asyncio.sleep(yard.rng.choice([0.0, 3.0]))
            await (one.do(opened.fsync()) if last == "fsync" else one.do(opened.flush()))
        except MendfsError:
            told = True
        if not told:
            yard.wrong(f"{last} was answered although no server has room for what was written")
        for machine in yard.sim.data:
            machine.disk.rules.total_bytes = 1 << 40
        await asyncio.sleep(3)
        await yard.whole()
        with contextlib.suppress(MendfsError):  # told once more: that is allowed
            await one.close(opened)
        await one.unlink(name)
    one.over()


async def one_good_copy_is_enough(yard: Yard) -> None:
    """Each page is read from wherever it is good, and where it is good nowhere an error comes."""
    one, other = await hand(yard), await hand(yard)
    name, data = yard.name(), yard.rng.randbytes(min(yard.sim.shape.block_size, 4096))
    await one.write(name, data, durable=True)
    inode = (await one.do(one.volume.lookup(ROOT, name))).inode
    raw = yard.engine.read(schema.slot_key(Inode(inode), Slot(0)))
    assert raw is not None, "it was committed"
    places = _places(yard, data)
    if len(places) == yard.sim.shape.replicas and len(schema.SLOT.decode(raw)) == 1:
        for machine in yard.sim.data:
            machine.audit.is_excused = True
        for number, (disk, path, offset) in enumerate(places[:-1]):
            disk.flip(path, 8 * (offset + (number * 1500 + 10) % len(data)))
        await other.check(name, data, "one replica is good, the others are not")
        disk, path, offset = places[-1]
        disk.flip(path, 8 * (offset + 10))
        for each in places[1:-1]:
            each[0].flip(each[1], 8 * (each[2] + 10))
        third = await hand(yard)
        try:
            found = await third.read(name)
        except MendfsError:
            pass
        else:
            if found != data:
                yard.wrong("bytes that fail their checksum everywhere were read")
        third.over()
    await one.unlink(name)
    one.over()
    other.over()


def _places(yard: Yard, data: bytes) -> list[tuple[Any, str, int]]:
    """Disk, file and offset of each replica."""
    places = []
    for machine in yard.sim.data:
        for path, node in machine.disk.nodes.items():
            at = node.content.find(data) if "/segments/" in path else -1
            if at >= 0:
                places.append((machine.disk, path, at))
    return places


async def late_servers_are_owed_nothing(yard: Yard) -> None:
    """A server whose acknowledgement came after the commit has the block: the debt goes."""
    one = await hand(yard)
    slow = yard.rng.choice(yard.sim.data)
    name = yard.name()
    # A first write makes the connections, which are not to be what is waited for.
    await one.write(name + b".first", _data(yard, 6))
    for link in ((one.machine.name, slow.name), (slow.name, one.machine.name)):
        yard.sim.network.slow(*link, 1.6)
    await one.write(name, _data(yard, 6))
    for link in ((one.machine.name, slow.name), (slow.name, one.machine.name)):
        yard.sim.network.heal(*link)
    inode = (await one.do(one.volume.lookup(ROOT, name))).inode

    def owed() -> list[bytes]:
        begin, end = schema.slots_of(Inode(inode), Slot(0))
        named = {
            (extent.partition, extent.block)
            for _, raw in yard.engine.read_range(begin, end, 1000, False)
            for extent in schema.SLOT.decode(raw)
        }
        return [key for key in yard.keys(schema.Kind.OWED) if schema.owed_in(key)[1:] in named]

    await yard.until(lambda: not owed(), 30, "a server that was only late is owed nothing")
    await one.unlink(name)
    await one.unlink(name + b".first")
    one.over()


async def open_files_stay(yard: Yard) -> None:
    """A file that is open is there for who has it open, with one of two descriptors closed, with its session lost and
    another one begun, after a restart, whoever unlinks it.
    """
    one, other = await hand(yard), await hand(yard)
    for incident in ("one of two closed", "session lost", "meta server started again"):
        name, data = yard.name(), _data(yard)
        await one.write(name, data, durable=True)
        opened = await one.open(name)
        if incident == "one of two closed":
            await one.close(await one.open(name))
            await asyncio.sleep(5)
        elif incident == "session lost":
            for link in ((one.machine.name, "meta"), ("meta", one.machine.name)):
                yard.sim.network.cut(*link)
            await asyncio.sleep(15)
            for link in ((one.machine.name, "meta"), ("meta", one.machine.name)):
                yard.sim.network.heal(*link)
            await asyncio.sleep(10)
        else:
            await yard.kill(yard.sim.meta)
        await other.unlink(name)
        await asyncio.sleep(8)
        buffer = bytearray([STALE]) * len(data)
        try:
            await one.do(opened.read_into(memoryview(buffer), 0))
        except MendfsError as error:
            yard.wrong(f"{incident}: a file that is open and unlinked cannot be read: {error}")
            break
        if buffer != data:
            yard.wrong(f"{incident}: a file that is open and unlinked is another one")
        with contextlib.suppress(MendfsError):  # it may tell of the session that was lost
            await one.close(opened)
    one.over()
    other.over()


async def lost_answers_are_asked_again(yard: Yard) -> None:
    """A connection that ends with an answer on its way costs time, and no error."""
    one = await hand(yard)
    network = yard.sim.network
    for source in ("meta", "meta", yard.rng.choice(yard.sim.data).name):
        name, data = yard.name(), _data(yard)
        for told in (None, 0, 1):
            network.when_sending[source] = partial(network.reset, told=told)
            try:
                await one.write(name, data)
                await one.do(one.volume.rename(ROOT, name, ROOT, name + b"2"))
                await one.do(one.volume.rename(ROOT, name + b"2", ROOT, name))
                await one.check(name, data, "written while connections ended")
                await one.unlink(name)
            except MendfsError as error:
                yard.wrong(f"a connection to {source} ended, and the application was told: {error!r}")
                one.over()
                return
        network.when_sending.pop(source, None)
    one.over()
