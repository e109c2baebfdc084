"""Commit: the ranges of a file that uploaded blocks now hold, entered in one transaction (design section 5).

Refused, with nothing changed, unless every new block lies in a range of the committing, living session and W servers
of its row acknowledged it. Sizes only grow here, by `max`; what a truncation hid stays hidden because the new extents
carry the inode's cut number and older ones a lower one.
"""

import errno
import stat

import msgspec

from mendfs.errors import AppendMoved, BadMessage, OperationError, TooBig
from mendfs.extents import BlockName, clip, overlay
from mendfs.kv.engine import Transaction
from mendfs.meta import schema
from mendfs.meta.blocks import Tallies, add_block, store_slot
from mendfs.meta.inodes import changed, find, visible, write
from mendfs.meta.ranges import check_owned
from mendfs.model import SIZE_MAX, Extent, Inode, SessionId, Slot, SlotExtents, Volume
from mendfs.wire.messages import meta as messages

EXTENTS_MAX = 7_000
"""Extents a slot may have: at up to 72 bytes each, stored once and answered once, they stay below the engine's limit of
1 MiB a transaction. Clients merge a slot long before."""
SLOTS_READ_MAX = 1024
"""Slots one query may ask for."""


def check_extent(extent: Extent, new: dict[BlockName, messages.NewBlock], volume: Volume) -> None:
    """Raise BadMessage unless an extent lies in its slot and in the block it names, which is one of `new`."""
    block = new.get((extent.partition, extent.block))
    if block is None:
        raise BadMessage(f"an extent names block {extent.block:#x}, which the commit does not bring")
    inside_slot = 0 <= extent.offset_in_slot and extent.end_in_slot <= volume.block_size
    inside_block = 0 <= extent.offset_in_block and extent.offset_in_block + extent.length <= block.length
    if extent.length <= 0 or not inside_slot or not inside_block:
        raise BadMessage(f"an extent of block {extent.block:#x} is out of its slot or block")
    if (extent.root, extent.block_length) != (block.root, block.length):
        raise BadMessage(f"an extent of block {extent.block:#x} contradicts the block's root or length")


def check(request: messages.Commit, volume: Volume) -> None:
    """Raise BadMessage for a commit that contradicts itself: each block in one slot, each extent inside both."""
    new = {(block.partition, block.block): block for block in request.blocks}
    if len(new) != len(request.blocks):
        raise BadMessage("a commit brings one block twice")
    for block in request.blocks:
        if not 0 < block.length <= volume.block_size or not 0 <= block.partition < volume.partitions:
            raise BadMessage(f"block {block.block:#x} has an impossible length or partition")
    owners: dict[BlockName, Slot] = {}
    for change in request.slots:
        end = 0
        for extent in sorted(change.extents, key=lambda each: each.offset_in_slot):
            check_extent(extent, new, volume)
            if extent.offset_in_slot < end:
                raise BadMessage(f"slot {change.slot}: two new extents overlap")
            end = extent.end_in_slot
            if owners.setdefault((extent.partition, extent.block), change.slot) != change.slot:
                raise BadMessage(f"block {extent.block:#x} is used in two slots")
    if len(owners) != len(new) or len({change.slot for change in request.slots}) != len(request.slots):
        raise BadMessage("a commit brings a block that no extent names, or changes a slot twice")
    if not 0 <= request.end <= SIZE_MAX:
        raise OperationError(errno.EFBIG)


def _moved_append(request: messages.Commit, size: int, block_size: int) -> messages.Commit:
    """An append, prepared for another size, as it is at `size`. Raises AppendMoved if it would leave its slot."""
    assert request.append_at is not None, "only appends move"
    if size == request.append_at:
        return request
    end = size + request.append_length
    if (
        len(request.slots) != 1
        or size // block_size != request.slots[0].slot
        or (end - 1) // block_size != size // block_size
    ):
        raise AppendMoved(size)
    by = size - request.append_at
    extents = tuple(
        msgspec.structs.replace(extent, offset_in_slot=extent.offset_in_slot + by)
        for extent in request.slots[0].extents
    )
    slots = (messages.SlotChange(request.slots[0].slot, extents),)
    return msgspec.structs.replace(request, slots=slots, end=end, append_at=size)


class _Slots:
    """The slots of one commit: what they become, which blocks they drop, how many more bytes they hold."""

    def __init__(self, record: schema.InodeRecord, volume: Volume) -> None:
        self._record = record
        self._volume = volume
        self.results: list[SlotExtents] = []
        self.gained = 0

    async def change(self, tx: Transaction, change: messages.SlotChange, part: int) -> None:
        """Lay the new extents over a slot; what it names no more goes to the freeing queue."""
        inode = self._record.attributes.inode
        raw = await tx.get(schema.slot_key(inode, change.slot))
        stored = () if raw is None else schema.SLOT.decode(raw)
        start = change.slot * self._volume.block_size
        older = clip(stored, self._record.cuts, slot_start=start)
        newer = [msgspec.structs.replace(extent, cut=self._record.cut_number) for extent in change.extents]
        result = overlay(older, newer)
        if len(result) > EXTENTS_MAX:
            raise TooBig(f"slot {change.slot} would be in more than {EXTENTS_MAX} pieces: it must be merged first")
        self.gained += store_slot(tx, schema.slot_key(inode, change.slot), stored, result, part=part)
        self.results.append(SlotExtents(change.slot, result))


async def commit(tx: Transaction, request: messages.Commit, session: SessionId, volume: Volume) -> messages.Committed:
    """Enter the blocks and change the slots. Raises CommitRefused, AppendMoved, BadMessage, ENOENT."""
    check(request, volume)
    record = await find(tx, request.inode)
    if not stat.S_ISREG(record.attributes.mode):
        raise OperationError(errno.EINVAL, f"inode {request.inode} is no file")
    if request.append_at is not None:
        request = _moved_append(request, record.attributes.size, volume.block_size)
    slot_of = {(extent.partition, extent.block): change.slot for change in request.slots for extent in change.extents}
    tallies = Tallies(volume.id)
    for new in request.blocks:
        await check_owned(tx, "block", new.block, session)
        await add_block(
            tx,
            new,
            inode=request.inode,
            slot=slot_of[new.partition, new.block],
            write_quorum=volume.write_quorum,
            tallies=tallies,
        )
    await tallies.apply(tx)
    slots = _Slots(record, volume)
    for part, change in enumerate(request.slots):
        await slots.change(tx, change, part)
    previous = record.attributes.version
    record = changed(
        record,
        size=max(record.attributes.size, request.end),
        stored=max(0, record.attributes.stored + slots.gained),
        mtime_ns=request.now_ns,
        ctime_ns=request.now_ns,
        version=tx.sequence(),
    )
    write(tx, record)
    return messages.Committed(visible(record), previous, tuple(slots.results), tx.sequence())


async def read_extents(
    tx: Transaction, inode: Inode, first: Slot, count: int, volume: Volume
) -> tuple[schema.InodeRecord, tuple[SlotExtents, ...], int]:
    """The inode, its stored slots from `first` on, and the slot before which the list is complete."""
    record = await find(tx, inode)
    end = first + count
    found = await tx.range(*schema.slots_of(inode, first, Slot(end)), limit=count)
    slots: list[SlotExtents] = []
    extents = 0
    for key, raw in found:
        slot = schema.slot_in(key)
        stored = schema.SLOT.decode(raw)
        extents += len(stored)
        if slots and extents > EXTENTS_MAX:
            # An answer must fit a message; the caller asks again from here.
            return record, tuple(slots), slot
        visible_now = clip(stored, record.cuts, slot_start=slot * volume.block_size)
        if visible_now:
            slots.append(SlotExtents(slot, visible_now))
    return record, tuple(slots), end
