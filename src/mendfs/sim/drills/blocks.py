"""Drills of data servers (design section 4), one replica at a time: no other copy hides what is wrong with it."""

import asyncio

from mendfs.blocks import block_digest
from mendfs.errors import BlockConflict, Fenced, MendfsError, NotAuthentic
from mendfs.model import BlockId, CommitSequence, Generation, Partition
from mendfs.sim.drills.yard import Made, RawSession, Yard
from mendfs.wire.messages import data as data_messages
from mendfs.wire.peer import Peer

RECORDS = 12


async def an_id_has_one_content(yard: Yard) -> None:
    """A block put again is stored; another content under its id is refused, and so is one without its root."""
    session, number = await yard.session(), yard.rng.randrange(yard.sim.shape.servers)
    first = await session.block(1, 0, yard.rng.randbytes(400))
    other = Made(yard, first.name[1], 1, 0, yard.rng.randbytes(400))
    stored = await yard.put(number, first)
    again = await yard.put(number, first, sync=True)
    if stored.incarnation != again.incarnation:
        yard.wrong("a block put again was stored under another incarnation")
    await yard.kill(yard.sim.data[number]) if yard.rng.random() < 0.5 else await yard.power(yard.sim.data[number])
    error = await yard.refused(yard.put(number, other), "another content under the id of a block that is held")
    if error is not None and not isinstance(error, BlockConflict):
        yard.wrong(f"another content under a held id was refused with {error!r}")
    if await yard.fetch(number, first) != first.data:
        yard.wrong("a block is not what was put first")
    torn = await session.block(1, 0, yard.rng.randbytes(500))
    torn.data = torn.data[:-1] + bytes((torn.data[-1] ^ 1,))
    await yard.refused(yard.put(number, torn), "data that has not the root that came with it")
    await session.end()


async def what_was_put_is_kept(yard: Yard) -> None:
    """kill -9 takes nothing that was answered, a power cut nothing that was synced; deleted is deleted."""
    session, machine = await yard.session(), yard.rng.choice(yard.sim.data)
    number = machine.number
    kept = [await _made(yard, session) for _ in range(RECORDS)]
    for made in kept:
        await yard.put(number, made)
    await yard.kill(machine)
    await _check(yard, number, kept, "after kill -9")
    late = [await _made(yard, session) for _ in range(RECORDS)]
    for made in late:
        await yard.put(number, made)
    peer = await yard.data(number)
    await yard.ask(peer, data_messages.SyncStore(), data_messages.Synced)
    await yard.power(machine)
    await _check(yard, number, kept + late, "synced, after a power cut")
    unasked = [await _made(yard, session) for _ in range(3)]
    for made in unasked:
        await yard.put(number, made)
    await asyncio.sleep(6)
    torn = [await _made(yard, session) for _ in range(3)]
    for made in torn:
        await yard.put(number, made)
    await yard.power(machine)
    await _check(yard, number, kept + late + unasked, "synced by the server itself, after a power cut")
    for made in torn:
        found = await yard.fetch(number, made)
        if found is not None and found != made.data:
            yard.wrong("a block that a power cut has torn is given out as whole")
    await _delete(yard, number, [made.name for made in kept])
    await (yard.power(machine) if yard.rng.random() < 0.5 else yard.kill(machine))
    await _check(yard, number, late + unasked, "after others were deleted")
    for made in kept:
        if await yard.fetch(number, made) is not None:
            yard.wrong("a block that was deleted is back after a power cut")
            break
    await _check_inventory(yard, number)
    await session.end()


async def _made(yard: Yard, session: RawSession) -> Made:
    length = yard.rng.choice([1, 100, 512, 1000, min(yard.sim.shape.block_size, 8192)])
    return await session.block(1, yard.rng.randrange(100), yard.rng.randbytes(min(length, yard.sim.shape.block_size)))


async def _check(yard: Yard, number: int, blocks: list[Made], when: str) -> None:
    lost = [made for made in blocks if await yard.fetch(number, made) != made.data]
    if lost:
        yard.wrong(f"server {number} has lost {len(lost)} of {len(blocks)} blocks, {when}")


async def _delete(yard: Yard, number: int, names: list[tuple[Partition, BlockId]]) -> None:
    """As the meta server would."""
    server = yard.sim.meta.server
    assert server is not None, "it runs"
    order = data_messages.DeleteBlocks(server.state.generation, yard.engine.synced_sequence, tuple(names))
    peer = await yard.data(number, "meta")
    await yard.ask(peer, order, data_messages.Deleted)
    await peer.close()


async def _check_inventory(yard: Yard, number: int) -> None:
    """Counts and sums are those of the blocks that are listed."""
    volume = (await yard.session()).opened.volume
    for _ in range(3):
        peer = await yard.data(number)
        partitions = tuple(Partition(each) for each in range(yard.sim.shape.partitions))
        sums = await yard.ask(peer, data_messages.GetInventory(partitions), data_messages.InventorySums)
        listed = await yard.ask(peer, data_messages.ListContents(limit=10_000), data_messages.Contents)
        again = await yard.ask(peer, data_messages.GetInventory(partitions), data_messages.InventorySums)
        await peer.close()
        if again == sums:
            break
    counts: dict[int, list[int]] = {}
    for held in listed.blocks:
        if held.ok:
            total = counts.setdefault(held.partition, [0, 0])
            total[0] += 1
            total[1] += block_digest(volume.id, held.partition, held.block, held.root)
    found: dict[int, list[int]] = {}
    for each in sums.sums:
        total = found.setdefault(each.partition, [0, 0])
        total[0] += each.count
        total[1] += int.from_bytes(each.digest, "big")
    mask = (1 << 128) - 1
    if {p: (c, d & mask) for p, (c, d) in counts.items()} != {p: (c, d & mask) for p, (c, d) in found.items()}:
        yard.wrong(f"the inventory of server {number} is not that of the blocks it lists")


async def deletions_are_fenced(yard: Yard) -> None:
    """An order from an older generation, or of an older state, is refused, after a power cut too."""
    session, machine = await yard.session(), yard.rng.choice(yard.sim.data)
    number, state = machine.number, yard.sim.meta.server
    assert state is not None, "it runs"
    made = await _made(yard, session)
    await yard.put(number, made, sync=True)
    gone = await _made(yard, session)
    await yard.put(number, gone, sync=True)
    generation = state.state.generation
    await _delete(yard, number, [gone.name])
    synced = yard.engine.synced_sequence
    older = {
        "an older generation": (generation - 1, synced + 1_000_000),
        "a state before the last one": (generation, 0),
        "nobody": (0, 0),
    }
    for when in ("at once", "after a power cut", "after kill -9"):
        if when == "after a power cut":
            await yard.power(machine)
        elif when == "after kill -9":
            await yard.kill(machine)
        peer = await yard.data(number, "meta")
        for what, (of, sequence) in older.items():
            order = data_messages.DeleteBlocks(Generation(of), CommitSequence(sequence), (made.name,))
            error = await yard.refused(yard.ask(peer, order, data_messages.Deleted), f"{when}: a deletion of {what}")
            if error is not None and not isinstance(error, Fenced):
                yard.wrong(f"{when}: a deletion of {what} was refused with {error!r}")
        await peer.close()
        if await yard.fetch(number, made) != made.data:
            yard.wrong(f"{when}: a deletion that was to be refused was obeyed")
            return
    stranger = await yard.data(number, "client")
    order = data_messages.DeleteBlocks(generation, CommitSequence(synced + 1), (made.name,))
    await yard.refused(yard.ask(stranger, order, data_messages.Deleted), "a client's order to delete")
    await session.end()


async def strangers_stay_out(yard: Yard) -> None:
    """Without the secret nobody is talked to."""
    for address in ("meta:1", f"data{yard.rng.randrange(yard.sim.shape.servers)}:1"):
        try:
            peer: Peer = await yard.connection(address, secret=b"guessed")
        except NotAuthentic:
            continue
        except MendfsError:
            continue
        yard.wrong(f"{address} took a connection with another secret")
        await peer.close()
