"""Entering merged blocks: nothing a user sees changes, and no write, cut or other merge is undone by one."""

import errno

import msgspec
import pytest

from mendfs.errors import BadMessage, CommitRefused, OperationError
from mendfs.extents import clip
from mendfs.kv.engine import Transaction
from mendfs.merging import HOLE
from mendfs.meta import commit, freeing, merge, schema, truncate
from mendfs.model import Extent, Inode, Partition, Seen, ServerNumber, SessionId, Slot
from mendfs.wire.messages import meta as messages
from tests.unit.meta_tools import PARAMETERS, MetaVolume

replace = msgspec.structs.replace


async def crowded() -> tuple[MetaVolume, Inode]:
    """A file of 10 blocks of 4 bytes, in slot 0."""
    volume = await MetaVolume.make()
    inode = (await volume.create(b"f")).inode
    for offset in range(0, 40, 4):
        await volume.write(inode, offset, 4)
    return volume, inode


async def extents_of(volume: MetaVolume, inode: Inode) -> tuple[Extent, ...]:
    _, slots, _ = await volume.do(commit.read_extents, inode, Slot(0), 1, PARAMETERS)
    return slots[0].extents if slots else ()


async def merge_of(volume: MetaVolume, inode: Inode) -> messages.MergeSlot:
    """All of slot 0 as it is now."""
    seen = tuple(Seen(each.offset_in_slot, each.length, each.block) for each in await extents_of(volume, inode))
    length = sum(each.length for each in seen)
    new = volume.new_block(length)
    extent = Extent(0, length, new.partition, new.block, length, 0, new.root)
    return messages.MergeSlot(volume.at(), inode, Slot(0), new, (extent,), seen)


async def do(volume: MetaVolume, request: messages.MergeSlot, session: SessionId | None = None) -> messages.Merged:
    return await volume.do(merge.merge, request, session or volume.session, PARAMETERS)


async def dead(volume: MetaVolume) -> int:
    while await volume.do(freeing.take_references):
        pass
    return len(await volume.keys(schema.Kind.DEAD))


async def test_a_merge_changes_nothing_that_a_user_sees_and_frees_the_old_blocks() -> None:
    volume, inode = await crowded()
    before = await volume.lookup(b"f")
    request = await merge_of(volume, inode)
    merged = await do(volume, request)
    assert await volume.lookup(b"f") == before
    assert merged.version == before.version
    assert [(e.offset_in_slot, e.length, e.block) for e in await extents_of(volume, inode)] == [
        (0, 40, request.block.block)
    ]
    assert await dead(volume) == 10


async def test_what_was_written_meanwhile_lies_over_the_merged_block() -> None:
    volume, inode = await crowded()
    request = await merge_of(volume, inode)
    written = (await volume.write(inode, 10, 8)).slots[0].extents
    new = next(extent for extent in written if extent.offset_in_slot == 10)
    await do(volume, request)
    found = await extents_of(volume, inode)
    assert [(e.offset_in_slot, e.length, e.offset_in_block) for e in found] == [(0, 10, 0), (10, 8, 0), (18, 22, 18)]
    assert found[1] == new
    assert found[0].block == found[2].block == request.block.block


async def test_a_merge_that_comes_too_late_changes_nothing() -> None:
    volume, inode = await crowded()
    request, other = await merge_of(volume, inode), await merge_of(volume, inode)
    await do(volume, other)
    before = volume.engine.last_sequence
    with pytest.raises(OperationError) as caught:
        await do(volume, request)
    assert caught.value.errno == errno.ESTALE
    assert volume.engine.last_sequence == before
    late = await merge_of(volume, inode)
    await volume.write(inode, 0, 40)
    with pytest.raises(OperationError):
        await do(volume, late)


async def test_what_a_truncation_hid_is_not_brought_back_by_a_merge() -> None:
    volume, inode = await crowded()
    request = await merge_of(volume, inode)
    await volume.resize(inode, 10)
    await volume.resize(inode, 40)
    await do(volume, request)
    assert [(e.offset_in_slot, e.length) for e in await extents_of(volume, inode)] == [(0, 10)]
    while (found := await volume.do(truncate.next_cutting)) is not None:
        applied = await volume.do(truncate.current_cut, found)
        await volume.do(truncate.apply_cuts, found, Slot(0), PARAMETERS)
        await volume.do(truncate.finish_cuts, found, applied or 0)
    assert [(e.offset_in_slot, e.length) for e in await extents_of(volume, inode)] == [(0, 10)]
    assert (await volume.lookup(b"f")).stored == 10


async def test_a_merge_after_a_truncation_is_not_cut_by_it_again() -> None:
    """Its extents carry the newest cut number: the background must not clip what was laid at a newer size."""
    volume, inode = await crowded()
    await volume.resize(inode, 10)
    await volume.write(inode, 20, 4)
    await do(volume, await merge_of_runs(volume, inode))
    record, slots, _ = await volume.do(commit.read_extents, inode, Slot(0), 1, PARAMETERS)
    assert record.cuts
    assert clip(slots[0].extents, record.cuts, slot_start=0) == slots[0].extents
    assert [(e.offset_in_slot, e.length) for e in slots[0].extents] == [(0, 10), (20, 4)]


async def merge_of_runs(volume: MetaVolume, inode: Inode) -> messages.MergeSlot:
    """[0, 10) and [20, 24) of a slot as one block; the hole between stays one."""
    seen = tuple(Seen(each.offset_in_slot, each.length, each.block) for each in await extents_of(volume, inode))
    new = volume.new_block(14)
    name = (new.partition, new.block)
    extents = (Extent(0, 10, *name, 14, 0, new.root), Extent(20, 4, *name, 14, 10, new.root))
    return messages.MergeSlot(volume.at(), inode, Slot(0), new, extents, seen)


async def test_a_hole_filled_meanwhile_keeps_what_was_written_and_none_grows_past_the_end() -> None:
    volume = await MetaVolume.make()
    inode = (await volume.create(b"f")).inode
    for offset in (0, 10, 20, 30):
        await volume.write(inode, offset, 4)
    seen = []
    for each in await extents_of(volume, inode):
        seen += [Seen(each.offset_in_slot, 4, each.block), Seen(each.offset_in_slot + 4, 6, HOLE)]
    new = volume.new_block(40)
    extent = Extent(0, 40, new.partition, new.block, 40, 0, new.root)
    written = await volume.write(inode, 15, 2)
    (kept,) = [e for e in written.slots[0].extents if e.offset_in_slot == 15]
    await do(volume, messages.MergeSlot(volume.at(), inode, Slot(0), new, (extent,), tuple(seen)))
    found = await extents_of(volume, inode)
    assert [(e.offset_in_slot, e.length) for e in found] == [(0, 15), (15, 2), (17, 17)]
    assert found[1] == kept
    attributes = await volume.lookup(b"f")
    assert (attributes.size, attributes.stored) == (34, 34)


async def test_blocks_of_a_merge_are_checked_like_those_of_a_commit() -> None:
    volume, inode = await crowded()
    request = await merge_of(volume, inode)
    few = replace(request, block=replace(request.block, servers=(ServerNumber(0),)))
    with pytest.raises(CommitRefused):
        await do(volume, few)
    await volume.open_session(SessionId(2))
    with pytest.raises(CommitRefused):
        await do(volume, request, SessionId(2))
    extent = request.extents[0]
    for bad in (
        replace(request, extents=()),
        replace(request, seen=()),
        replace(request, seen=request.seen[::-1]),
        replace(request, extents=(replace(extent, length=41),)),
        replace(request, extents=(extent, extent)),
        replace(request, extents=(replace(extent, block=5),)),
        replace(request, block=replace(request.block, partition=Partition(99))),
    ):
        with pytest.raises(BadMessage):
            await do(volume, bad)
    await do(volume, request)


async def test_a_merge_of_a_file_that_is_being_freed_is_refused() -> None:
    volume, inode = await crowded()
    request = await merge_of(volume, inode)
    await volume.unlink(b"f")
    await volume.do(freeing.free_inode, inode)
    with pytest.raises(OperationError) as caught:
        await do(volume, request)
    assert caught.value.errno == errno.ESTALE

    async def gone(tx: Transaction) -> bool:
        return await tx.get(schema.slot_key(inode, Slot(0))) is None

    assert await volume.do(gone)
