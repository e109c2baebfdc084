"""Applying cuts in the background: many small, resumable transactions (design section 5, Commit).

A truncation itself only notes a cut; until a pass over the file's slots has removed what it hides, every reader clips
by it. A pass that is cut short starts over: clipping twice is clipping once.
"""

import msgspec

from mendfs.extents import clip
from mendfs.kv.engine import Transaction
from mendfs.meta import schema
from mendfs.meta.blocks import store_slot
from mendfs.meta.inodes import changed, write
from mendfs.model import Inode, Slot, Volume

SLOTS_A_STEP = 20
"""Slots clipped in one transaction: two keys each, and the inode's."""


async def next_cutting(tx: Transaction) -> Inode | None:
    """An inode that has cuts to apply."""
    found = await tx.range(*schema.all_of(schema.Kind.CUTTING), limit=1)
    return Inode(schema.number_in(found[0][0])) if found else None


async def _find(tx: Transaction, inode: Inode) -> schema.InodeRecord | None:
    raw = await tx.get(schema.inode_key(inode))
    return None if raw is None else schema.INODE.decode(raw)


async def apply_cuts(tx: Transaction, inode: Inode, first: Slot, volume: Volume) -> Slot | None:
    """Clip the next slots from `first` on. Returns where to go on, or None when the file is through."""
    record = await _find(tx, inode)
    if record is None or not record.cuts:
        return None
    lowest = Slot(min(cut.size for cut in record.cuts) // volume.block_size)
    found = await tx.range(*schema.slots_of(inode, Slot(max(first, lowest))), limit=SLOTS_A_STEP)
    lost = 0
    for part, (key, raw) in enumerate(found):
        stored = schema.SLOT.decode(raw)
        kept = clip(stored, record.cuts, slot_start=schema.slot_in(key) * volume.block_size)
        if kept == stored:
            continue
        lost -= store_slot(tx, key, stored, kept, part=part)
    if lost:
        # Not a change of contents: the version stays, so no cache is dropped for it.
        write(tx, changed(record, stored=max(0, record.attributes.stored - lost)))
    return Slot(schema.slot_in(found[-1][0]) + 1) if len(found) == SLOTS_A_STEP else None


async def current_cut(tx: Transaction, inode: Inode) -> int | None:
    """The cut number a pass over the slots will have applied when it began now; None if there is nothing to do."""
    record = await _find(tx, inode)
    return record.cut_number if record is not None and record.cuts else None


async def finish_cuts(tx: Transaction, inode: Inode, applied: int) -> None:
    """Forget the cuts up to number `applied`, which a whole pass has applied; newer ones wait for the next pass."""
    record = await _find(tx, inode)
    if record is None:
        tx.delete(schema.cutting_key(inode))
        return
    remaining = tuple(cut for cut in record.cuts if cut.number > applied)
    write(tx, msgspec.structs.replace(record, cuts=remaining))
    if not remaining:
        tx.delete(schema.cutting_key(inode))
