"""Written bytes of one slot that no commit holds yet: sorted, disjoint pieces.

A sequential writer extends the last piece in place. A piece that begins with much at once gets a pooled buffer of a
whole block (fresh ones fault in page by page, which halves the throughput); a small one grows as it is written to.
Frozen, a buffer changes no more and becomes one block: its pieces one after the other.
"""

from bisect import bisect_right
from collections.abc import Iterator

from mendfs.model import KiB, Slot
from mendfs.world.buffers import BufferPool

POOLED_FROM_BYTES = 128 * KiB
"""A piece that begins with this much is a sequential writer's. Small files never take a pooled buffer."""
POOLED_ABOVE_BYTES = 256 * KiB
"""A growing piece moves to a pooled buffer above this."""
PIECES_MAX = 1024
"""Pieces at which a buffer is uploaded though it is not full: a commit's message carries an extent for each."""
OVERHEAD_BYTES = 512
"""What a buffer costs besides its bytes: blocks may be as small as 8 bytes."""


class Piece:
    """Bytes [begin, end) of the slot; `head` is where they begin in `memory`."""

    __slots__ = ("begin", "end", "head", "memory", "view")

    def __init__(self, begin: int, memory: bytearray, view: memoryview | None) -> None:
        self.begin = begin
        self.end = begin
        self.head = 0
        self.memory = memory
        self.view = view
        """The whole of a pooled buffer; None for a growing one, which an export would keep from growing."""

    def bytes(self, begin: int, end: int) -> memoryview:
        """A view of [begin, end). Release it before a growing piece is written to again."""
        at = self.head + begin - self.begin
        whole = self.view if self.view is not None else memoryview(self.memory)
        return whole[at : at + end - begin]

    def put(self, data: memoryview, offset: int) -> None:
        """Write `data` at `offset`, which is at most the piece's end."""
        at = self.head + offset - self.begin
        if self.view is not None:
            self.view[at : at + len(data)] = data
        else:
            inside = min(len(self.memory) - at, len(data))
            if inside > 0:
                # Through a view: assigning a memoryview to a bytearray's slice would copy it first.
                with memoryview(self.memory) as whole:
                    whole[at : at + inside] = data[:inside]
            if inside < len(data):
                self.memory += data[inside:]
        self.end = max(self.end, offset + len(data))


class SlotBuffer:
    """The pieces of one slot. `cost` is what they count for in the volume's limit of dirty bytes."""

    def __init__(self, slot: Slot, block_size: int, pool: BufferPool) -> None:
        self.slot = slot
        self.cost = OVERHEAD_BYTES
        self.covered = 0
        self._block_size = block_size
        self._pool = pool
        self._pieces: list[Piece] = []

    @property
    def is_full(self) -> bool:
        """Whether every byte of the slot was written."""
        return self.covered == self._block_size

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held."""
        return not self._pieces

    @property
    def is_crowded(self) -> bool:
        """Whether it should be uploaded for its number of pieces."""
        return len(self._pieces) >= PIECES_MAX

    @property
    def end(self) -> int:
        """The first byte of the slot after the last piece."""
        return self._pieces[-1].end if self._pieces else 0

    def pieces(self) -> Iterator[tuple[int, memoryview]]:
        """(offset in the slot, bytes) of each piece, in order."""
        for piece in self._pieces:
            yield piece.begin, piece.bytes(piece.begin, piece.end)

    def ranges(self) -> list[tuple[int, int]]:
        """(begin, end) in the slot of each piece, in order."""
        return [(piece.begin, piece.end) for piece in self._pieces]

    def write(self, data: memoryview, offset: int) -> None:
        """Lay `data` over what is there. The caller keeps it inside the slot."""
        end = offset + len(data)
        at = bisect_right(self._pieces, offset, key=lambda piece: piece.begin) - 1
        piece = self._pieces[at] if at >= 0 else None
        if piece is None or piece.end < offset:
            at += 1
            piece = self._new_piece(offset, len(data))
            self._pieces.insert(at, piece)
        before, capacity = piece.end, len(piece.memory)
        if piece.view is None and end - piece.begin > POOLED_ABOVE_BYTES and len(piece.memory) <= POOLED_ABOVE_BYTES:
            self._move_to_pool(piece)
        piece.put(data, offset)
        self.cost += len(piece.memory) - capacity
        if piece.end > before:
            self.covered += piece.end - before
            self._make_way(at + 1, piece.end)

    def _new_piece(self, begin: int, length: int) -> Piece:
        if length >= POOLED_FROM_BYTES:
            memory = self._pool.take(self._block_size)
            piece = Piece(begin, memory, memoryview(memory))
        else:
            piece = Piece(begin, bytearray(), None)
        self.cost += OVERHEAD_BYTES + len(piece.memory)
        return piece

    def _move_to_pool(self, piece: Piece) -> None:
        memory = self._pool.take(self._block_size)
        view = memoryview(memory)
        view[: piece.end - piece.begin] = piece.bytes(piece.begin, piece.end)
        piece.memory, piece.view, piece.head = memory, view, 0

    def _make_way(self, at: int, end: int) -> None:
        """The pieces from number `at` on give way up to `end`, which the one before has grown to."""
        while at < len(self._pieces) and self._pieces[at].begin < end:
            later = self._pieces[at]
            if later.end <= end:
                self.covered -= later.end - later.begin
                del self._pieces[at]
                self._drop(later, reuse=True)
            else:
                self.covered -= end - later.begin
                later.head += end - later.begin
                later.begin = end

    def _drop(self, piece: Piece, *, reuse: bool) -> None:
        self.cost -= OVERHEAD_BYTES + len(piece.memory)
        if piece.view is not None:
            piece.view.release()
            if reuse:
                self._pool.give(piece.memory)

    def copy_into(self, target: memoryview, begin: int, end: int) -> list[tuple[int, int]]:
        """Copy what is held of [begin, end) to its place in `target`; returns the ranges that are not held."""
        gaps: list[tuple[int, int]] = []
        at = begin
        first = max(0, bisect_right(self._pieces, begin, key=lambda piece: piece.begin) - 1)
        for piece in self._pieces[first:] if first else self._pieces:
            if piece.begin >= end:
                break
            lower, upper = max(piece.begin, at), min(piece.end, end)
            if lower >= upper:
                continue
            if lower > at:
                gaps.append((at, lower))
            with piece.bytes(lower, upper) as held:
                target[lower - begin : upper - begin] = held
            at = upper
        if at < end:
            gaps.append((at, end))
        return gaps

    def clip(self, end: int) -> None:
        """Forget everything at and past `end`."""
        while self._pieces and self._pieces[-1].begin >= end:
            last = self._pieces.pop()
            self.covered -= last.end - last.begin
            self._drop(last, reuse=True)
        if self._pieces and self._pieces[-1].end > end:
            self.covered -= self._pieces[-1].end - end
            self._pieces[-1].end = end

    def release(self, *, reuse: bool) -> None:
        """Give the memory back, unless it may still be on its way to a server: then the collector has it."""
        for piece in self._pieces:
            if piece.view is not None and reuse:
                piece.view.release()
                self._pool.give(piece.memory)
        self._pieces.clear()
        self.covered = 0
