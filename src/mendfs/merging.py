"""Which extents of a slot are worth rewriting as one block, and putting that block in their place. Pure functions.

A merge changes no byte of a file: blocks are immutable, so wherever a slot still names the block that the merge has
read at that place, the merged block may stand instead, whatever was written elsewhere meanwhile. Nothing has to be
locked, nothing is refused but a merge of which nothing is left, and a write is never buried.
"""

from collections.abc import Iterable, Iterator, Sequence

import msgspec

from mendfs.extents import Piece, blocks_in, overlay, part_of, stored_bytes
from mendfs.model import BlockId, Extent, KiB, Partition, Seen

EXTENTS_MAX = 64
"""Extents of a slot that are left alone: at 64 KiB each a sequential read is still one of few big requests."""
WASTE_BYTES_MIN = 64 * KiB
"""Dead bytes in blocks that a slot keeps alive, below which a merge costs more than it gives back."""
KEPT_PARTS = 16
"""An extent of a 16th of the block size or more stays, if its block is half alive by such extents: a log that grows by
small appends rewrites its tail, not all of the slot. So at most 16 + 17 extents are left where there are no holes."""
HOLE_BYTES_MIN = 4 * KiB
"""Smaller holes between merged extents become zeros, as in any file system with blocks of 4 KiB: it bounds the number
of extents by the block size, however the file is written."""
HOLE = BlockId(0)


def wasted_bytes(extents: Iterable[Extent]) -> int:
    """Bytes that the blocks named by a slot hold and no extent shows: only a merge gives them back."""
    live, kept = 0, 0
    blocks = set()
    for extent in extents:
        live += extent.length
        if (extent.partition, extent.block) not in blocks:
            blocks.add((extent.partition, extent.block))
            kept += extent.block_length
    # Ranges of a block shown twice do not exist: a block's bytes each belong to one place of the slot.
    return max(0, kept - live)


def is_crowded(extents: Sequence[Extent], block_size: int) -> bool:
    """Whether a slot has too many extents, or less than half of its blocks' bytes are alive."""
    if len(extents) > EXTENTS_MAX:
        return True
    if len(extents) == 1 and extents[0].length == extents[0].block_length:
        return False
    wasted = wasted_bytes(extents)
    return wasted > stored_bytes(extents) and wasted >= min(WASTE_BYTES_MIN, block_size)


def plan_merge(extents: Sequence[Extent], block_size: int) -> tuple[Piece, ...]:
    """What one new block shall hold: pieces of older ones in the slot's order, zeros for small holes between them.

    Empty when the slot is not crowded, or when its holes are what makes its extents so many.
    """
    if not is_crowded(extents, block_size):
        return ()
    kept = _kept(extents, block_size)
    pieces: list[Piece] = []
    runs = 0
    end: int | None = None
    for extent in extents:
        if extent.offset_in_slot in kept:
            end = None
            continue
        begin = extent.offset_in_slot
        if end is not None and 0 < begin - end < HOLE_BYTES_MIN:
            pieces.append(Piece(end, begin - end, None))
            end = begin
        runs += end != begin
        pieces.append(Piece(begin, extent.length, extent, extent.offset_in_block))
        end = extent.end_in_slot
    return tuple(pieces) if _is_worth_it(extents, kept, runs) else ()


def _kept(extents: Sequence[Extent], block_size: int) -> set[int]:
    """Where the extents begin that stay as they are."""
    big = [extent for extent in extents if extent.length * KEPT_PARTS >= block_size]
    live: dict[tuple[Partition, BlockId], int] = {}
    for extent in big:
        name = (extent.partition, extent.block)
        live[name] = live.get(name, 0) + extent.length
    return {extent.offset_in_slot for extent in big if 2 * live[extent.partition, extent.block] >= extent.block_length}


def _is_worth_it(extents: Sequence[Extent], kept: set[int], runs: int) -> bool:
    left = len(kept) + runs
    if left <= EXTENTS_MAX or 2 * left <= len(extents):
        return True
    return len(blocks_in(extents)) > max(EXTENTS_MAX, 2 * (1 + len(kept)))


def seen_by(pieces: Iterable[Piece]) -> tuple[Seen, ...]:
    """What the planner of a merge saw where: carried by its commit."""
    return tuple(
        Seen(piece.offset_in_slot, piece.length, HOLE if piece.extent is None else piece.extent.block)
        for piece in pieces
    )


def extents_of_merged(pieces: Iterable[Piece], partition: Partition, block: BlockId, root: bytes) -> tuple[Extent, ...]:
    """The extents of the new block, which holds the pieces one after the other; touching ones are one extent."""
    runs: list[tuple[int, int, int]] = []
    at = 0
    for piece in pieces:
        if runs and runs[-1][0] + runs[-1][1] == piece.offset_in_slot:
            begin, length, first = runs.pop()
            runs.append((begin, length + piece.length, first))
        else:
            runs.append((piece.offset_in_slot, piece.length, at))
        at += piece.length
    return tuple(Extent(begin, length, partition, block, at, first, root) for begin, length, first in runs)


def substitute(current: Sequence[Extent], seen: Sequence[Seen], newer: Sequence[Extent]) -> tuple[Extent, ...]:
    """`newer` in every place where `current` names the block that was seen there; all else stays.

    All three are sorted and disjoint.
    """
    parts: list[Extent] = []
    number = 0
    for begin, end in _joined(_unchanged(current, seen)):
        while number < len(newer) and newer[number].end_in_slot <= begin:
            number += 1
        at = number
        while at < len(newer) and newer[at].offset_in_slot < end:
            part = part_of(newer[at], begin, end)
            if part is not None:
                parts.append(part)
            at += 1
    return overlay(current, parts)


def _unchanged(current: Sequence[Extent], seen: Sequence[Seen]) -> Iterator[tuple[int, int]]:
    """The ranges in which the slot is as it was seen.

    Comparing blocks is enough: a block is committed once, for one slot, so it shows the same byte in a place for ever.
    """
    number = 0
    for begin, end, block in _cover(current, max((each.offset_in_slot + each.length for each in seen), default=0)):
        while number < len(seen) and seen[number].offset_in_slot + seen[number].length <= begin:
            number += 1
        at = number
        while at < len(seen) and seen[at].offset_in_slot < end:
            if seen[at].block == block:
                yield max(begin, seen[at].offset_in_slot), min(end, seen[at].offset_in_slot + seen[at].length)
            at += 1


def _cover(extents: Sequence[Extent], end: int) -> Iterator[tuple[int, int, BlockId]]:
    """The slot up to `end` without gaps: (begin, end, block), HOLE where there is none."""
    at = 0
    for extent in extents:
        if extent.offset_in_slot > at:
            yield at, extent.offset_in_slot, HOLE
        yield extent.offset_in_slot, extent.end_in_slot, extent.block
        at = extent.end_in_slot
    if at < end:
        yield at, end, HOLE


def _joined(ranges: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Touching ranges as one."""
    last: tuple[int, int] | None = None
    for begin, end in ranges:
        if last is not None and last[1] == begin:
            last = last[0], end
            continue
        if last is not None:
            yield last
        last = begin, end
    if last is not None:
        yield last


class Burden(msgspec.Struct):
    """What a crowded slot has cost its writer since it was merged: a merge is due when it would have cost as much.

    So merging during steady writing at most doubles the work, whatever the pattern (the rule of the rented skis).
    """

    visits: int = 0
    """Extents carried by commits of the slot, summed up: each is decoded, laid, encoded, stored and answered."""

    def is_merge_due(self, extents: Sequence[Extent]) -> bool:
        """Whether to merge although the slot is still being written to."""
        if len(extents) >= CROWD_MAX:
            return True
        return self.visits * VISIT_BYTES >= stored_bytes(extents) + MERGE_BYTES_FIXED


VISIT_BYTES = 128
"""Bytes that a merge reads, checks and stores three times with the CPU that one extent costs in a commit: 1.2 us in the
meta server and the client together, against 9.4 ms for a MiB, measured in one process with stores in memory."""
MERGE_BYTES_FIXED = 256 * KiB
"""What the round trips and syncs of a merge cost, in the same currency."""
CROWD_MAX = 2048
"""Extents at which a slot is merged whatever it costs: far below what a transaction can hold."""
