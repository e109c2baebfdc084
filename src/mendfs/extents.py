"""Newer extents over older ones, clipping by cuts, the plan of a read. Pure functions on plain values.

A slot's extents are kept sorted by offset and disjoint: laying a new one over them cuts away what it hides, so the list
is the same whoever computes it and a read never has to know what is older. Offsets are relative to the slot unless
the name says otherwise.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import msgspec

from mendfs.model import BlockId, Cut, Extent, Partition

BlockName = tuple[Partition, BlockId]


class Piece(msgspec.Struct, frozen=True):
    """A part of a planned read: `length` bytes from `offset_in_slot`, out of `extent`, or zeros where it is None."""

    offset_in_slot: int
    length: int
    extent: Extent | None
    offset_in_block: int = 0


def part_of(extent: Extent, begin: int, end: int) -> Extent | None:
    """The part of `extent` inside [begin, end), or None if there is none."""
    first = max(extent.offset_in_slot, begin)
    last = min(extent.end_in_slot, end)
    if first >= last:
        return None
    if first == extent.offset_in_slot and last == extent.end_in_slot:
        return extent
    return msgspec.structs.replace(
        extent,
        offset_in_slot=first,
        length=last - first,
        offset_in_block=extent.offset_in_block + first - extent.offset_in_slot,
    )


def punch(extents: Sequence[Extent], begin: int, end: int) -> tuple[Extent, ...]:
    """`extents` without [begin, end): what reaches over an edge is shortened, what reaches over both is split."""
    if begin >= end:
        return tuple(extents)
    kept: list[Extent] = []
    for extent in extents:
        if extent.end_in_slot <= begin or extent.offset_in_slot >= end:
            kept.append(extent)
            continue
        for part in (part_of(extent, 0, begin), part_of(extent, end, extent.end_in_slot)):
            if part is not None:
                kept.append(part)
    return tuple(kept)


def overlay(older: Sequence[Extent], newer: Iterable[Extent]) -> tuple[Extent, ...]:
    """`newer`, one after the other, over `older`."""
    over = list(newer)
    if all(before.end_in_slot <= after.offset_in_slot for before, after in pairwise(over)):
        return tuple(_laid(older, over))
    result = list(older)
    for extent in over:
        result = _laid(result, [extent])
    return tuple(result)


def _laid(older: Sequence[Extent], newer: Sequence[Extent]) -> list[Extent]:
    """One pass over both, each sorted and disjoint: a random writer lays a hundred extents over a thousand at once."""
    result: list[Extent] = []
    number = 0
    for extent in older:
        begin, end = extent.offset_in_slot, extent.end_in_slot
        while number < len(newer) and newer[number].offset_in_slot < end:
            over = newer[number]
            if over.end_in_slot > begin:
                before = part_of(extent, begin, over.offset_in_slot)
                if before is not None:
                    result.append(before)
                begin = over.end_in_slot
                if begin > end:
                    break  # it reaches over this extent: what comes next is looked at before it is laid
            result.append(over)
            number += 1
        rest = extent if begin == extent.offset_in_slot else part_of(extent, begin, end)
        if rest is not None:
            result.append(rest)
    result.extend(newer[number:])
    return result


def hidden(extents: Sequence[Extent], ranges: Iterable[tuple[int, int]]) -> Iterator[Extent]:
    """Those of a slot's extents that bytes at these ranges (begin, end) of it would hide, wholly or in part.

    Both are sorted and disjoint, and there may be thousands of each.
    """
    at = 0
    for begin, end in ranges:
        while at < len(extents) and extents[at].end_in_slot <= begin:
            at += 1
        while at < len(extents) and extents[at].offset_in_slot < end:
            yield extents[at]
            if extents[at].end_in_slot > end:
                break  # it may reach into the next range too
            at += 1


def add_cut(cuts: Sequence[Cut], *, number: int, size: int) -> tuple[Cut, ...]:
    """The cuts after one more truncation to `size` bytes, the inode's cut number being `number` from now on.

    A cut to no less than a later one's size says nothing any more, so sizes only rise with the numbers.
    """
    assert not cuts or cuts[-1].number < number, "cut numbers only rise: an inode never gives one twice"
    return (*(cut for cut in cuts if cut.size < size), Cut(number, size))


def visible_end(cuts: Sequence[Cut], number: int) -> int | None:
    """Where in the file an extent committed under cut `number` ends to be visible; None: nowhere."""
    # Sizes rise with the numbers, so the first later cut is the lowest one.
    return next((cut.size for cut in cuts if cut.number > number), None)


def clip(extents: Sequence[Extent], cuts: Sequence[Cut], *, slot_start: int) -> tuple[Extent, ...]:
    """`extents` of the slot that begins at byte `slot_start` of the file, without what cuts made invisible."""
    if not cuts:
        return tuple(extents)
    kept = []
    for extent in extents:
        end = visible_end(cuts, extent.cut)
        part = extent if end is None else part_of(extent, 0, end - slot_start)
        if part is not None:
            kept.append(part)
    return tuple(kept)


def stored_bytes(extents: Iterable[Extent]) -> int:
    """Bytes that the extents cover."""
    return sum(extent.length for extent in extents)


def blocks_in(extents: Iterable[Extent]) -> set[BlockName]:
    """The blocks that the extents name."""
    return {(extent.partition, extent.block) for extent in extents}


def plan(extents: Sequence[Extent], begin: int, end: int) -> list[Piece]:
    """What a read of [begin, end) of a slot consists of, in order and without gaps: pieces of blocks, and zeros."""
    pieces: list[Piece] = []
    at = begin
    for extent in extents:
        part = part_of(extent, at, end)
        if part is None:
            continue
        if part.offset_in_slot > at:
            pieces.append(Piece(at, part.offset_in_slot - at, None))
        pieces.append(Piece(part.offset_in_slot, part.length, part, part.offset_in_block))
        at = part.end_in_slot
    if at < end:
        pieces.append(Piece(at, end - at, None))
    return pieces
