"""Entering a merged block: other extents for the same bytes, in one transaction (design section 6, Merging).

Nothing that a user sees changes: no byte, size or time, and not the version either, or every cache would be dropped for
nothing. What was written, cut or merged since the client looked stays as it is, for the block is laid only where the
slot still shows what the client saw there; when that is nowhere, the merge is refused.
"""

import errno

import msgspec

from mendfs.errors import BadMessage, OperationError
from mendfs.extents import clip
from mendfs.kv.engine import Transaction
from mendfs.merging import HOLE, substitute
from mendfs.meta import schema
from mendfs.meta.blocks import Tallies, add_block, store_slot
from mendfs.meta.commit import check_extent
from mendfs.meta.inodes import changed, find, write
from mendfs.meta.ranges import check_owned
from mendfs.model import Extent, Seen, SessionId, SlotExtents, Volume
from mendfs.wire.messages import meta as messages


def check(request: messages.MergeSlot, volume: Volume) -> None:
    """Raise BadMessage for a merge that contradicts itself."""
    block = request.block
    if not 0 < block.length <= volume.block_size or not 0 <= block.partition < volume.partitions:
        raise BadMessage(f"block {block.block:#x} has an impossible length or partition")
    for extent in request.extents:
        check_extent(extent, {(block.partition, block.block): block}, volume)
    if not _are_in_order(request.extents) or not _are_in_order(request.seen):
        raise BadMessage(f"slot {request.slot}: a merge's extents overlap or are not in order")


def _are_in_order(ranges: tuple[Extent, ...] | tuple[Seen, ...]) -> bool:
    end = 0
    for each in ranges:
        if each.length <= 0 or each.offset_in_slot < end:
            return False
        end = each.offset_in_slot + each.length
    return bool(ranges)


async def merge(tx: Transaction, request: messages.MergeSlot, session: SessionId, volume: Volume) -> messages.Merged:
    """Lay the block where the slot is as it was seen. Raises CommitRefused, BadMessage, ENOENT, ESTALE."""
    check(request, volume)
    record = await find(tx, request.inode)
    key = schema.slot_key(request.inode, request.slot)
    raw = await tx.get(key)
    stored = () if raw is None else schema.SLOT.decode(raw)
    start = request.slot * volume.block_size
    current = clip(stored, record.cuts, slot_start=start)
    # A small hole becomes zeros only inside the file: bytes past its end would count as stored.
    seen = [
        each
        for each in request.seen
        if each.block != HOLE or start + each.offset_in_slot + each.length <= record.attributes.size
    ]
    newer = [_with_cut(extent, record.cut_number) for extent in request.extents]
    result = substitute(current, seen, newer)
    if result == current:
        raise OperationError(
            errno.ESTALE, f"slot {request.slot} of inode {request.inode} has changed: nothing to merge"
        )
    tallies = Tallies(volume.id)
    await check_owned(tx, "block", request.block.block, session)
    await add_block(
        tx,
        request.block,
        inode=request.inode,
        slot=request.slot,
        write_quorum=volume.write_quorum,
        tallies=tallies,
    )
    await tallies.apply(tx)
    gained = store_slot(tx, key, stored, result, part=0)
    if gained:
        write(tx, changed(record, stored=max(0, record.attributes.stored + gained)))
    return messages.Merged(SlotExtents(request.slot, result), record.attributes.version, tx.sequence())


def _with_cut(extent: Extent, number: int) -> Extent:
    return msgspec.structs.replace(extent, cut=number)
