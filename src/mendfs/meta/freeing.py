"""The freeing queue: from names that went to blocks that may be deleted (design section 5).

An unlinked inode that nobody has open gives its slots to the first half of the queue (DROP), a slot at a time; the
first half takes references from blocks, and those without any die into the second half (DEAD). A round of
`meta.background` then deletes what died before a sequence that is synced everywhere. Everything here is one small,
resumable transaction; a step that is done twice finds nothing left to do.
"""

from collections.abc import Callable

import msgspec

from mendfs.kv.engine import Transaction
from mendfs.meta import schema
from mendfs.meta.blocks import Tallies, drop_reference, find_row, forget_block, store_slot
from mendfs.model import BlockId, CommitSequence, Inode, Partition, ServerNumber, SessionId, Slot

INODES_A_STEP = 100
SLOTS_A_STEP = 30
BLOCKS_DROPPED_A_STEP = 40
"""References taken in one transaction: two keys each."""
BLOCKS_FORGOTTEN_A_STEP = 10
"""Dead blocks whose keys go in one transaction: block, dead, tally and up to R owed keys each."""
XATTRS_A_STEP = 90
OPENS_LOOKED_AT = 10_000
OPENS_FORGOTTEN_A_STEP = 90

DeadBlock = tuple[CommitSequence, Partition, BlockId]


async def unlinked_inodes(tx: Transaction, after: Inode) -> list[Inode]:
    """Unlinked inodes with a number above `after`."""
    begin = schema.unlinked_key(Inode(after + 1))
    found = await tx.range(begin, schema.all_of(schema.Kind.UNLINKED)[1], limit=INODES_A_STEP)
    return [Inode(schema.number_in(key)) for key, _ in found]


async def is_open(tx: Transaction, inode: Inode) -> bool:
    """Whether a session has the unlinked inode open."""
    return bool(await tx.range(*schema.opens_of(inode), limit=1))


async def free_inode(tx: Transaction, inode: Inode) -> bool:
    """One step of freeing an unlinked inode. True when it is gone, or must stay because it is open or has a name."""
    raw = await tx.get(schema.inode_key(inode))
    if raw is None:
        tx.delete(schema.unlinked_key(inode))
        return True
    if schema.INODE.decode(raw).attributes.nlink > 0 or await is_open(tx, inode):
        return True
    slots = await tx.range(*schema.slots_of(inode, Slot(0)), limit=SLOTS_A_STEP)
    for part, (key, stored) in enumerate(slots):
        store_slot(tx, key, schema.SLOT.decode(stored), (), part=part)
    if slots:
        return False
    xattrs = await tx.range(*schema.xattrs_of(inode), limit=XATTRS_A_STEP)
    for key, _ in xattrs:
        tx.delete(key)
    if len(xattrs) == XATTRS_A_STEP:
        return False
    for key in (schema.inode_key(inode), schema.unlinked_key(inode), schema.cutting_key(inode)):
        tx.delete(key)
    return True


async def take_references(tx: Transaction) -> bool:
    """Work off the oldest drop, or the first part of it. True when there was one."""
    found = await tx.range(*schema.all_of(schema.Kind.DROP), limit=1)
    if not found:
        return False
    key, raw = found[0]
    drop = schema.DROP.decode(raw)
    for partition, block in drop.blocks[:BLOCKS_DROPPED_A_STEP]:
        await drop_reference(tx, partition, block)
    rest = drop.blocks[BLOCKS_DROPPED_A_STEP:]
    if rest:
        tx.put(key, schema.DROP.encode(msgspec.structs.replace(drop, blocks=rest)))
    else:
        tx.delete(key)
    return True


async def dead_blocks(
    tx: Transaction, before: CommitSequence, limit: int, after: DeadBlock | None = None
) -> list[DeadBlock]:
    """Blocks that died at or before commit `before`, oldest first; with `after`, those that follow it."""
    begin = schema.all_of(schema.Kind.DEAD)[0] if after is None else schema.dead_key(*after) + b"\0"
    end = schema.dead_key(CommitSequence(before + 1), Partition(0), BlockId(0))
    return [schema.dead_in(key) for key, _ in await tx.range(begin, end, limit=limit)]


async def holders(tx: Transaction, dead: list[DeadBlock]) -> dict[ServerNumber, list[tuple[Partition, BlockId]]]:
    """The blocks by the servers of their rows."""
    orders: dict[ServerNumber, list[tuple[Partition, BlockId]]] = {}
    for _, partition, block in dead:
        for entry in await find_row(tx, partition):
            orders.setdefault(entry.server, []).append((partition, block))
    return orders


async def forget(tx: Transaction, dead: list[DeadBlock], volume: str) -> None:
    """Remove the keys of up to BLOCKS_FORGOTTEN_A_STEP deleted blocks."""
    assert len(dead) <= BLOCKS_FORGOTTEN_A_STEP, "a transaction has at most 100 keys"
    tallies = Tallies(volume)
    for _, partition, block in dead:
        raw = await tx.get(schema.block_key(partition, block))
        if raw is not None:
            await forget_block(tx, partition, block, schema.BLOCK.decode(raw), tallies)
    await tallies.apply(tx)


async def opened_unlinked(tx: Transaction, session: SessionId, inodes: tuple[Inode, ...]) -> tuple[Inode, ...]:
    """Those of `inodes` that the session has open though they lost their last name."""
    return tuple([inode for inode in inodes if await tx.get(schema.open_unlinked_key(inode, session)) is not None])


async def reclaim_unlinked(tx: Transaction, session: SessionId, inodes: tuple[Inode, ...]) -> None:
    """The session has these open: those that have lost their last name stay. Before it is known to have reclaimed.

    Whoever unlinked them since the server's start could not know who had them open.
    """
    for inode in inodes:
        if await tx.get(schema.unlinked_key(inode)) is not None:
            tx.put(schema.open_unlinked_key(inode, session), b"")


async def close_unlinked(tx: Transaction, session: SessionId, inodes: tuple[Inode, ...]) -> None:
    """The session has these open no more."""
    for inode in inodes:
        tx.delete(schema.open_unlinked_key(inode, session))


async def forget_opens(tx: Transaction, is_stale: Callable[[Inode, SessionId], bool]) -> bool:
    """Remove the stale opens of unlinked inodes, as many as a transaction takes. True if more wait."""
    found = await tx.range(*schema.all_of(schema.Kind.OPEN_UNLINKED), limit=OPENS_LOOKED_AT)
    stale = [key for key, _ in found if is_stale(*schema.open_unlinked_in(key))]
    for key in stale[:OPENS_FORGOTTEN_A_STEP]:
        tx.delete(key)
    return len(stale) > OPENS_FORGOTTEN_A_STEP
