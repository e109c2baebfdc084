"""A drill of merging (design section 6): crowded slots become few extents, and nobody sees more of it than that."""

import asyncio

from mendfs.meta import schema
from mendfs.model import Inode, Slot
from mendfs.sim.drills.contents import Hand, hand
from mendfs.sim.drills.yard import Yard
from mendfs.wire.messages import meta as messages

MERGE_S = 40.0
"""A slot that is written to now and then is merged within 30 s."""


async def crowded_slots_are_merged(yard: Yard) -> None:
    """A slot of many small writes becomes few extents, and no byte of it changes, while it is written to, and when
    power goes everywhere as soon as the log names the merged block.
    """
    one, other, session = await hand(yard), await hand(yard), await yard.session()
    block_size = yard.sim.shape.block_size
    if block_size >= 4096:
        name, data = yard.name(), bytearray(block_size)
        offsets = list(range(0, block_size - 20, block_size // 80))
        yard.rng.shuffle(offsets)
        inode = await _crowd(yard, one, name, data, offsets)
        if await _until_merged(yard, (one, other), name, data, offsets, inode):
            await session.ask(messages.SyncLog(), messages.LogSynced)
        await yard.power(*yard.sim.servers)
        third = await hand(yard)
        await third.check(name, bytes(data[: max(offsets) + 20]), "merged, after a power cut everywhere")
        await third.unlink(name)
        await session.resume()
        third.over()
    await session.end()
    one.over()
    other.over()


async def _crowd(yard: Yard, one: Hand, name: bytes, data: bytearray, offsets: list[int]) -> Inode:
    """Each write is an extent."""
    opened = await one.make(name)
    for at in offsets:
        data[at : at + 20] = piece = yard.rng.randbytes(20)
        await one.do(opened.write(piece, at))
        await one.do(opened.flush())
    await one.do(opened.fsync())
    await one.close(opened)
    return opened.inode


async def _until_merged(
    yard: Yard, hands: tuple[Hand, Hand], name: bytes, data: bytearray, offsets: list[int], inode: Inode
) -> bool:
    """Wait for it, writing a little now and then."""
    loop = yard.sim.loop
    end_s, next_s = loop.time() + MERGE_S, loop.time()
    while loop.time() < end_s:
        raw = yard.engine.read(schema.slot_key(inode, Slot(0)))
        if raw is None or len(schema.SLOT.decode(raw)) < len(offsets) // 2:
            return True
        if loop.time() >= next_s:
            next_s = loop.time() + (0.7 if end_s - loop.time() > MERGE_S - 3 else 5.9)
            writer, at = yard.rng.choice(hands), yard.rng.choice(offsets)
            data[at : at + 5] = piece = yard.rng.randbytes(5)
            written = await writer.open(name)
            await writer.do(written.write(piece, at))
            await writer.do(written.fsync())
            await writer.close(written)
        await asyncio.sleep(0.02)
    yard.wrong(f"a slot of {len(offsets)} extents was not merged within {MERGE_S:g} s")
    return False
