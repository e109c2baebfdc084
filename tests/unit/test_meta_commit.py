"""Commit, cuts, ranges, requests answered once, and the way to freeing: the rules that each close an interleaving."""

import errno

import msgspec
import pytest

from mendfs.blocks import block_digest
from mendfs.errors import AppendMoved, BadMessage, CommitRefused, OperationError, SessionLost, TooBig
from mendfs.kv.engine import Transaction
from mendfs.meta import commit, freeing, ranges, schema, truncate
from mendfs.meta.sessions import Answer, answered_once
from mendfs.model import Extent, Inode, MiB, Partition, ServerNumber, SessionId, Slot
from mendfs.wire import frame
from mendfs.wire.messages import meta as messages
from mendfs.wire.messages import session as session_messages
from tests.unit.meta_tools import BLOCK_SIZE, PARAMETERS, MetaVolume


async def new_file() -> tuple[MetaVolume, Inode]:
    volume = await MetaVolume.make()
    return volume, (await volume.create(b"f")).inode


async def drain(volume: MetaVolume) -> None:
    """All the background's steps but the deletion itself."""
    while (inode := await volume.do(truncate.next_cutting)) is not None:
        applied = await volume.do(truncate.current_cut, inode)
        slot: Slot | None = Slot(0)
        while slot is not None:
            slot = await volume.do(truncate.apply_cuts, inode, slot, PARAMETERS)
        await volume.do(truncate.finish_cuts, inode, applied or 0)
    for inode in await volume.do(freeing.unlinked_inodes, Inode(0)):
        while not await volume.do(freeing.free_inode, inode):
            pass
    while await volume.do(freeing.take_references):
        pass


async def test_a_commit_sets_size_version_and_what_is_read() -> None:
    volume, inode = await new_file()
    done = await volume.write(inode, 10, 20)
    assert (done.attributes.size, done.attributes.stored) == (30, 20)
    assert done.attributes.version == done.sequence > done.previous_version
    _, slots, complete = await volume.do(commit.read_extents, inode, Slot(0), 4, PARAMETERS)
    assert complete == 4
    assert slots == done.slots
    assert (await volume.write(inode, 0, 5)).attributes.size == 30, "sizes only grow in a commit"


async def test_a_commit_needs_w_servers_of_the_row() -> None:
    volume, inode = await new_file()
    for servers in ((0,), (0, 3), ()):
        numbers = tuple(ServerNumber(n) for n in servers)
        with pytest.raises(CommitRefused):
            await volume.commit(volume.commit_of(inode, 0, 5, numbers))
    assert not await volume.keys(schema.Kind.BLOCK)
    assert (await volume.lookup(b"f")).size == 0


async def test_a_server_of_the_row_that_did_not_acknowledge_is_owed_the_block() -> None:
    volume, inode = await new_file()
    request = volume.commit_of(inode, 0, 5, (ServerNumber(0), ServerNumber(2)))
    await volume.commit(request)
    ((key, _),) = await volume.keys(schema.Kind.OWED)
    assert schema.owed_in(key) == (1, 0, request.blocks[0].block)


async def test_ids_of_another_or_an_ended_session_are_refused() -> None:
    volume, inode = await new_file()
    await volume.open_session(SessionId(2))
    await volume.granted("block", SessionId(2))
    with pytest.raises(CommitRefused):
        await volume.commit(volume.commit_of(inode, 0, 5), SessionId(2))
    request = volume.commit_of(inode, 0, 5)
    await volume.do(ranges.end, volume.session, 99)
    with pytest.raises(CommitRefused):
        await volume.commit(request)
    with pytest.raises(SessionLost):
        await volume.granted("block")


async def test_ranges_below_the_lowest_in_flight_are_given_back() -> None:
    volume = await MetaVolume.make()
    held = await volume.granted("block")
    request = session_messages.GrantIds("block", lowest_in_flight=held[-1] + 1)
    await volume.do(ranges.grant, volume.session, request, 1)
    with pytest.raises(CommitRefused):
        await volume.do(ranges.check_owned, "block", held[0], volume.session)


async def test_a_block_is_committed_once() -> None:
    volume, inode = await new_file()
    request = volume.commit_of(inode, 0, 5)
    await volume.commit(request)
    with pytest.raises(CommitRefused):
        await volume.commit(request)


async def test_a_repeated_request_is_answered_not_done_again() -> None:
    volume, inode = await new_file()
    request = volume.commit_of(inode, 0, 5)
    runs = 0

    async def change(tx: Transaction) -> Answer:
        nonlocal runs
        runs += 1
        return await commit.commit(tx, request, volume.session, PARAMETERS)

    first = await volume.do(answered_once, volume.session, messages.RequestId(3, 7), change)
    again = await volume.do(answered_once, volume.session, messages.RequestId(3, 7), change)
    assert (runs, again) == (1, first)
    with pytest.raises(BadMessage):
        await volume.do(answered_once, volume.session, messages.RequestId(3, 6), change)
    await volume.do(ranges.end, volume.session, 99)
    assert await volume.do(answered_once, volume.session, messages.RequestId(3, 7), change) == first
    with pytest.raises(SessionLost):
        await volume.do(answered_once, volume.session, messages.RequestId(3, 8), change)


async def test_an_append_gets_its_offset_in_the_transaction() -> None:
    volume, inode = await new_file()
    await volume.write(inode, 0, 10)
    stale = volume.commit_of(inode, 4, 6, append_at=4, append_length=6)
    done = await volume.commit(stale)
    assert done.attributes.size == 16
    assert done.slots[0].extents[-1].offset_in_slot == 10


async def test_an_append_that_would_leave_its_slot_is_refused_with_the_new_size() -> None:
    volume, inode = await new_file()
    await volume.write(inode, 0, BLOCK_SIZE - 2)
    with pytest.raises(AppendMoved) as caught:
        await volume.commit(volume.commit_of(inode, 4, 6, append_at=4, append_length=6))
    assert caught.value.size == BLOCK_SIZE - 2


async def test_what_a_truncation_hid_never_comes_back() -> None:
    volume, inode = await new_file()
    await volume.write(inode, 0, 40)
    assert (await volume.resize(inode, 10)).stored == 10
    await volume.resize(inode, 30)
    _, slots, _ = await volume.do(commit.read_extents, inode, Slot(0), 1, PARAMETERS)
    assert [(e.offset_in_slot, e.length) for e in slots[0].extents] == [(0, 10)]
    await volume.write(inode, 20, 5)
    await drain(volume)
    record, slots, _ = await volume.do(commit.read_extents, inode, Slot(0), 1, PARAMETERS)
    assert [(e.offset_in_slot, e.length) for e in slots[0].extents] == [(0, 10), (20, 5)]
    assert (record.cuts, record.attributes.size, record.attributes.stored) == ((), 30, 15)
    assert not await volume.keys(schema.Kind.CUTTING)


async def test_a_cut_during_the_pass_waits_for_the_next() -> None:
    volume, inode = await new_file()
    await volume.write(inode, 0, 40)
    await volume.resize(inode, 30)
    applied = await volume.do(truncate.current_cut, inode)
    assert applied is not None
    await volume.do(truncate.apply_cuts, inode, Slot(0), PARAMETERS)
    await volume.resize(inode, 5)
    await volume.do(truncate.finish_cuts, inode, applied)
    _, slots, _ = await volume.do(commit.read_extents, inode, Slot(0), 1, PARAMETERS)
    assert slots[0].extents[0].length == 5
    assert await volume.keys(schema.Kind.CUTTING)


async def test_overwritten_blocks_die_and_unlinked_files_free_theirs() -> None:
    volume, inode = await new_file()
    await volume.write(inode, 0, 20)
    await volume.write(inode, 0, 20)
    await drain(volume)
    assert len(await volume.keys(schema.Kind.DEAD)) == 1
    await volume.unlink(b"f")
    await drain(volume)
    last = volume.engine.last_sequence
    dead = await volume.do(freeing.dead_blocks, last, 10)
    assert len(dead) == 2
    assert not await volume.keys(schema.Kind.INODE) or all(
        schema.number_in(key) == 1 for key, _ in await volume.keys(schema.Kind.INODE)
    )
    orders = await volume.do(freeing.holders, dead)
    assert set(orders) == {0, 1, 2}
    await volume.do(freeing.forget, dead, PARAMETERS.id)
    assert not await volume.keys(schema.Kind.BLOCK)
    assert not await volume.keys(schema.Kind.DEAD)


async def test_only_what_died_before_the_noted_sequence_is_handed_out() -> None:
    volume, inode = await new_file()
    await volume.write(inode, 0, 20)
    noted = volume.engine.last_sequence
    await volume.write(inode, 0, 20)
    await drain(volume)
    assert await volume.do(freeing.dead_blocks, noted, 10) == []


async def test_a_partly_overwritten_block_lives() -> None:
    volume, inode = await new_file()
    await volume.write(inode, 0, 20)
    await volume.write(inode, 5, 5)
    await drain(volume)
    assert not await volume.keys(schema.Kind.DEAD)


async def test_an_open_unlinked_file_stays_until_its_last_close() -> None:
    volume, inode = await new_file()
    await volume.write(inode, 0, 20)
    await volume.unlink(b"f")

    async def opened(tx: Transaction) -> None:
        tx.put(schema.open_unlinked_key(inode, volume.session), b"")

    await volume.do(opened)
    await drain(volume)
    assert await volume.do(freeing.opened_unlinked, volume.session, (inode,)) == (inode,)
    assert len((await volume.do(commit.read_extents, inode, Slot(0), 1, PARAMETERS))[1]) == 1
    await volume.do(freeing.close_unlinked, volume.session, (inode,))
    await drain(volume)
    with pytest.raises(OperationError) as caught:
        await volume.do(commit.read_extents, inode, Slot(0), 1, PARAMETERS)
    assert caught.value.errno == errno.ENOENT


async def test_tallies_prove_a_list_of_blocks_whole() -> None:
    volume, inode = await new_file()
    for offset in (0, 30, 0, 70):
        await volume.write(inode, offset, 10)
    await drain(volume)
    blocks = await volume.keys(schema.Kind.BLOCK)
    total = 0
    for key, raw in blocks:
        number = int.from_bytes(key[5:], "big")
        total += block_digest(PARAMETERS.id, Partition(0), number, schema.BLOCK.decode(raw).root)  # type: ignore[arg-type]
    ((_, raw_tally),) = await volume.keys(schema.Kind.TALLY)
    tally = schema.TALLY.decode(raw_tally)
    assert tally.count == len(blocks)
    assert int.from_bytes(tally.digest, "big") == total % (1 << 128)


async def test_commits_that_contradict_themselves_are_refused() -> None:
    volume, inode = await new_file()
    good = volume.commit_of(inode, 0, 10)
    extent = good.slots[0].extents[0]

    def with_extents(*extents: object) -> messages.Commit:
        return msgspec.structs.replace(good, slots=(messages.SlotChange(Slot(0), tuple(extents)),))  # type: ignore[arg-type]

    replace = msgspec.structs.replace
    for bad in (
        with_extents(replace(extent, offset_in_slot=60)),
        with_extents(replace(extent, length=0)),
        with_extents(replace(extent, length=11)),
        with_extents(replace(extent, root=b"other")),
        with_extents(replace(extent, block=1)),
        with_extents(extent, replace(extent, offset_in_slot=5)),
        with_extents(),
        replace(good, blocks=(*good.blocks, volume.new_block(5))),
        replace(good, blocks=(replace(good.blocks[0], partition=99),)),
    ):
        with pytest.raises(BadMessage):
            await volume.commit(bad)
    await volume.commit(good)


async def test_a_slot_in_too_many_pieces_is_refused_before_it_breaks_a_transaction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(commit, "EXTENTS_MAX", 3)
    volume, inode = await new_file()
    for offset in (0, 2, 4):
        await volume.write(inode, offset, 1)
    with pytest.raises(TooBig):
        await volume.write(inode, 6, 1)
    await volume.write(inode, 4, 1)


async def test_a_slot_of_as_many_extents_as_may_be_fits_a_transaction_with_its_answer() -> None:
    """The largest numbers and the longest root: stored, answered, and the answer stored too."""
    parameters = msgspec.structs.replace(PARAMETERS, block_size=16 * MiB, checksum="blake3")
    volume, inode = await new_file()
    half = commit.EXTENTS_MAX // 2

    async def write(number: int, offsets: range) -> messages.Committed:
        length = len(offsets)
        new = msgspec.structs.replace(volume.new_block(length), root=bytes(32))
        extents = tuple(Extent(at, 1, new.partition, new.block, length, n, new.root) for n, at in enumerate(offsets))
        at = messages.RequestId(1, number)
        request = messages.Commit(at, inode, (new,), (messages.SlotChange(Slot(0), extents),), 16 * MiB, 50)

        async def change(tx: Transaction) -> Answer:
            return await commit.commit(tx, request, volume.session, parameters)

        answer = await volume.do(answered_once, volume.session, at, change)
        assert isinstance(answer, messages.Committed)
        return answer

    first = 16 * MiB - 4 * commit.EXTENTS_MAX
    await write(1, range(first, first + 4 * half, 4))
    done = await write(2, range(first + 2, first + 2 + 4 * half, 4))
    assert len(done.slots[0].extents) == commit.EXTENTS_MAX
    assert len(frame.encode(frame.ANSWER, 1, done)) < frame.MESSAGE_BYTES_MAX
    with pytest.raises(TooBig):
        await write(3, range(1))
