"""Extents against a plain list of bytes: whatever is written and cut, a plan reads back what a file would hold."""

import itertools
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from mendfs.extents import add_cut, blocks_in, clip, hidden, overlay, part_of, plan, punch, stored_bytes
from mendfs.model import BlockId, Cut, Extent, Partition

SLOT = 64


@dataclass(frozen=True)
class Write:
    offset: int
    length: int


@dataclass(frozen=True)
class Truncate:
    size: int


def extent_of(block: int, offset: int, length: int, cut: int = 0, at: int = 0) -> Extent:
    return Extent(offset, length, Partition(0), BlockId(block), at + length, at, b"r", cut)


writes = st.builds(Write, st.integers(0, SLOT - 1), st.integers(1, SLOT)).map(
    lambda write: Write(write.offset, min(write.length, SLOT - write.offset))
)
truncations = st.builds(Truncate, st.integers(0, SLOT))


def bytes_of(extents: tuple[Extent, ...], size: int) -> list[int]:
    """Which block each byte comes from, 0 for a hole."""
    out: list[int] = []
    for piece in plan(extents, 0, size):
        out += [piece.extent.block if piece.extent else 0] * piece.length
    return out


@given(st.lists(writes | truncations, max_size=30))
def test_a_plan_reads_what_a_file_would_hold(steps: list[Write | Truncate]) -> None:
    """Cuts are applied only when read, as while the background has not come round yet."""
    model: list[int] = []
    extents: tuple[Extent, ...] = ()
    cuts: tuple[Cut, ...] = ()
    number = 0
    for block, step in enumerate(steps, start=1):
        match step:
            case Write(offset, length):
                model += [0] * (offset + length - len(model))
                model[offset : offset + length] = [block] * length
                extents = overlay(extents, [extent_of(block, offset, length, number)])
            case Truncate(size):
                if size < len(model):
                    number += 1
                    cuts = add_cut(cuts, number=number, size=size)
                model = (model + [0] * size)[:size]
    visible = clip(extents, cuts, slot_start=0)
    assert bytes_of(visible, len(model)) == model
    assert bytes_of(clip(visible, cuts, slot_start=0), len(model)) == model
    assert all(extent.end_in_slot <= len(model) for extent in visible)


@given(st.lists(writes, max_size=30))
def test_overlaid_extents_are_sorted_and_disjoint(steps: list[Write]) -> None:
    extents: tuple[Extent, ...] = ()
    for block, write in enumerate(steps, start=1):
        extents = overlay(extents, [extent_of(block, write.offset, write.length)])
    for left, right in itertools.pairwise(extents):
        assert left.end_in_slot <= right.offset_in_slot
    covered = {at for write in steps for at in range(write.offset, write.offset + write.length)}
    assert stored_bytes(extents) == len(covered)


@given(st.lists(writes, max_size=20), st.integers(0, SLOT), st.integers(0, SLOT))
def test_punching_leaves_everything_else(steps: list[Write], begin: int, end: int) -> None:
    extents: tuple[Extent, ...] = ()
    for block, write in enumerate(steps, start=1):
        extents = overlay(extents, [extent_of(block, write.offset, write.length)])
    before = bytes_of(extents, SLOT)
    after = bytes_of(punch(extents, begin, end), SLOT)
    assert after == [0 if begin <= at < end else block for at, block in enumerate(before)]


@given(st.lists(st.integers(0, SLOT), max_size=40))
def test_cuts_stay_few_and_rise(sizes: list[int]) -> None:
    cuts: tuple[Cut, ...] = ()
    for number, size in enumerate(sizes, start=1):
        cuts = add_cut(cuts, number=number, size=size)
    for left, right in itertools.pairwise(cuts):
        assert left.number < right.number
        assert left.size < right.size
    if sizes:
        assert cuts[-1] == Cut(len(sizes), sizes[-1])


def test_an_extent_in_the_middle_splits_the_older_one() -> None:
    old = extent_of(1, 0, 10)
    new = extent_of(2, 4, 2)
    left, middle, right = overlay([old], [new])
    assert (left.offset_in_slot, left.length, left.offset_in_block) == (0, 4, 0)
    assert middle is new
    assert (right.offset_in_slot, right.length, right.offset_in_block) == (6, 4, 6)
    assert blocks_in([left, middle, right]) == {(0, 1), (0, 2)}


def test_a_cut_before_the_slot_hides_all_of_it() -> None:
    assert clip([extent_of(1, 0, 10, cut=0)], [Cut(1, 5)], slot_start=64) == ()
    assert clip([extent_of(1, 0, 10, cut=1)], [Cut(1, 5)], slot_start=64) == (extent_of(1, 0, 10, cut=1),)


@given(st.lists(writes, max_size=12), st.lists(writes, max_size=12))
def test_what_new_bytes_would_hide_is_what_lies_there(steps: list[Write], new: list[Write]) -> None:
    extents: tuple[Extent, ...] = ()
    for block, write in enumerate(steps, start=1):
        extents = overlay(extents, [extent_of(block, write.offset, write.length)])
    laid = overlay((), [extent_of(1, write.offset, write.length) for write in new])
    ranges = [(extent.offset_in_slot, extent.end_in_slot) for extent in laid]
    touched = {extent for extent in extents for begin, end in ranges if part_of(extent, begin, end)}
    assert set(hidden(extents, ranges)) == touched
