"""Merging: what is chosen, and that putting the block in place never changes a byte, whatever happened meanwhile."""

from dataclasses import dataclass
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from mendfs.extents import overlay, plan, punch, stored_bytes
from mendfs.merging import (
    EXTENTS_MAX,
    HOLE_BYTES_MIN,
    Burden,
    extents_of_merged,
    is_crowded,
    plan_merge,
    seen_by,
    substitute,
    wasted_bytes,
)
from mendfs.model import BlockId, Extent, MiB, Partition, Seen

SLOT = 1 << 16
UNIT = 512
MERGED = BlockId(1 << 40)


@dataclass(frozen=True)
class Write:
    """One block, laid in one piece or in several with gaps between."""

    pieces: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Cut:
    size: int


def pieces_from(offsets: list[tuple[int, int]]) -> Write:
    """Disjoint, sorted."""
    result: list[tuple[int, int]] = []
    end = 0
    for offset, length in sorted(offsets):
        length = min(length, SLOT - offset)
        if offset >= end and length > 0:
            result.append((offset, length))
            end = offset + length
    return Write(tuple(result))


places = st.integers(0, SLOT // UNIT - 1).map(lambda unit: unit * UNIT)
lengths = st.one_of(st.integers(1, 3 * UNIT), st.integers(1, SLOT))
writes = st.lists(st.tuples(places, lengths), min_size=1, max_size=40).map(pieces_from)
combs = st.builds(
    lambda first, every, length: pieces_from([(at, length) for at in range(first, SLOT, every * UNIT)]),
    places,
    st.integers(1, 4),
    st.integers(1, UNIT),
)
"""Written at regular distances: what makes many extents at once."""
steps = st.lists(st.one_of(writes, combs, st.builds(Cut, places)), max_size=12)


def applied(extents: tuple[Extent, ...], step: Write | Cut, block: int) -> tuple[Extent, ...]:
    if isinstance(step, Cut):
        return punch(extents, step.size, SLOT)
    length = sum(each for _, each in step.pieces)
    newer, at = [], 0
    for offset, each in step.pieces:
        newer.append(Extent(offset, each, Partition(0), BlockId(block), length, at, b"r"))
        at += each
    return overlay(extents, newer)


Byte = tuple[int, int]


def shown(extents: tuple[Extent, ...], merged: list[Byte]) -> list[Byte]:
    """What each byte of the slot is, the merged block's looked up in what it was filled with."""
    result: list[Byte] = []
    for piece in plan(extents, 0, SLOT):
        for at in range(piece.offset_in_block, piece.offset_in_block + piece.length):
            if piece.extent is None:
                result.append((0, 0))
            elif piece.extent.block == MERGED:
                result.append(merged[at])
            else:
                result.append((piece.extent.block, at))
    return result


def merged_of(extents: tuple[Extent, ...], block_size: int) -> tuple[list[Byte], tuple[Extent, ...], tuple[Seen, ...]]:
    """The bytes of the merged block, its extents, and what was seen."""
    pieces = plan_merge(extents, block_size)
    data: list[Byte] = []
    for piece in pieces:
        span = range(piece.offset_in_block, piece.offset_in_block + piece.length)
        data += [(0, 0) if piece.extent is None else (piece.extent.block, at) for at in span]
    return data, extents_of_merged(pieces, Partition(0), MERGED, b"m"), seen_by(pieces)


def run(sequence: list[Write | Cut], extents: tuple[Extent, ...] = (), first: int = 1) -> tuple[Extent, ...]:
    for block, step in enumerate(sequence, start=first):
        extents = applied(extents, step, block)
    return extents


@given(steps, steps)
def test_a_merge_changes_no_byte_whatever_was_written_or_cut_meanwhile(
    before: list[Write | Cut], meanwhile: list[Write | Cut]
) -> None:
    seen = run(before)
    data, newer, what = merged_of(seen, SLOT)
    current = run(meanwhile, seen, first=1000)
    result = substitute(current, what, newer)
    assert shown(result, data) == shown(current, data)
    assert all(a.end_in_slot <= b.offset_in_slot for a, b in pairwise(result))


@given(steps)
def test_a_merge_of_an_unchanged_slot_leaves_it_uncrowded_or_holes_are_why(sequence: list[Write | Cut]) -> None:
    extents = run(sequence)
    data, newer, what = merged_of(extents, SLOT)
    if not newer:
        return
    assert is_crowded(extents, SLOT)
    result = substitute(extents, what, newer)
    assert len(data) == newer[0].block_length <= SLOT
    assert wasted_bytes(result) <= stored_bytes(result)
    assert not plan_merge(result, SLOT), "a merge is not followed by another one"
    holes = sum(piece.extent is None for piece in plan(result, 0, SLOT))
    assert len(result) <= EXTENTS_MAX or holes > EXTENTS_MAX // 2


def pieces_of_blocks(offsets: range, length: int) -> tuple[Extent, ...]:
    """Each a block of its own."""
    return run([Write(((offset, length),)) for offset in offsets])


def test_a_slot_of_up_to_64_extents_is_left_alone() -> None:
    assert plan_merge(pieces_of_blocks(range(0, 64 * UNIT, UNIT), UNIT), SLOT) == ()
    assert len(plan_merge(pieces_of_blocks(range(0, 65 * UNIT, UNIT), UNIT), SLOT)) == 65


def test_a_slot_with_less_than_half_of_its_bytes_alive_is_merged() -> None:
    block = MiB
    whole: tuple[Extent, ...] = (Extent(0, block, Partition(0), BlockId(1), block, 0, b"r"),)
    assert plan_merge(punch(whole, block // 2, block), block) == ()
    cut = punch(whole, block // 2 - 1, block)
    (piece,) = plan_merge(cut, block)
    assert (piece.offset_in_slot, piece.length) == (0, block // 2 - 1)


def test_a_few_dead_bytes_are_not_worth_a_merge() -> None:
    small = (Extent(0, 100, Partition(0), BlockId(1), 60_000, 0, b"r"),)
    assert plan_merge(small, MiB) == ()


def test_small_appends_rewrite_the_tail_and_not_the_slot() -> None:
    begin = 3 * MiB
    big = Extent(0, begin, Partition(0), BlockId(1), begin, 0, b"r")
    tail = [Extent(begin + 100 * n, 100, Partition(0), BlockId(2 + n), 100, 0, b"r") for n in range(200)]
    pieces = plan_merge((big, *tail), 4 * MiB)
    assert sum(piece.length for piece in pieces) == 200 * 100


def test_small_holes_become_zeros_and_larger_ones_stay() -> None:
    small = pieces_of_blocks(range(0, 200 * 16, 16), 8)
    pieces = plan_merge(small, MiB)
    assert len(extents_of_merged(pieces, Partition(0), MERGED, b"m")) == 1
    large = pieces_of_blocks(range(0, 100 * 2 * HOLE_BYTES_MIN, 2 * HOLE_BYTES_MIN), HOLE_BYTES_MIN)
    pieces = plan_merge(large, MiB)
    assert all(piece.extent is not None for piece in pieces)
    assert len(extents_of_merged(pieces, Partition(0), MERGED, b"m")) == 100
    _, newer, what = merged_of(large, MiB)
    result = substitute(large, what, newer)
    assert not plan_merge(result, MiB), "holes alone are no reason"


def test_steady_writing_merges_about_as_often_as_it_pays() -> None:
    """One extent more with each commit of a 4 MiB slot: some hundred commits lie between two merges."""
    burden, commits = Burden(), 0
    extents: tuple[Extent, ...] = (Extent(0, 4 * MiB, Partition(0), BlockId(1), 4 * MiB, 0, b"r"),)
    while len(extents) <= EXTENTS_MAX or not burden.is_merge_due(extents):
        commits += 1
        offset = (commits * 37 % 1024) * 4096
        extents = overlay(extents, [Extent(offset, 4096, Partition(0), BlockId(1 + commits), 4096, 0, b"r")])
        burden.visits += len(extents)
    assert 64 < commits < 512
