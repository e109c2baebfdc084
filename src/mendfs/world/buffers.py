"""Big buffers used again. Fresh MiB-sized memory faults in page by page: measured, it halves the rate of a copy loop.

Not for use from several threads. A buffer given back must not be read or written by its former owner any more, and
what it holds is whatever was in it before.
"""

from mendfs.model import KiB, MiB

POOLED_BYTES_MIN = 64 * KiB
"""Below this, malloc serves from memory it already has, and a pool would cost more than it saves."""
POOLED_BYTES_MAX = 16 * MiB
"""The largest payload of a frame, so nothing bigger is ever asked for."""
KEPT_BYTES_MAX = 64 * MiB
"""Idle buffers kept for the next taker: sixteen blocks of the default size."""


class BufferPool:
    """Buffers in size classes of powers of two, kept up to a bound in bytes; beyond it they are simply let go."""

    def __init__(self, kept_bytes_max: int = KEPT_BYTES_MAX) -> None:
        self._kept: dict[int, list[bytearray]] = {}
        self._kept_bytes = 0
        self._kept_bytes_max = kept_bytes_max

    @property
    def kept_bytes(self) -> int:
        """Bytes of idle buffers."""
        return self._kept_bytes

    def take(self, length: int) -> bytearray:
        """A buffer of at least `length` bytes, with undefined contents."""
        assert 0 <= length <= POOLED_BYTES_MAX, "the caller checks lengths that come from outside"
        if length < POOLED_BYTES_MIN:
            return bytearray(length)
        size = 1 << (length - 1).bit_length()
        kept = self._kept.get(size)
        if not kept:
            return bytearray(size)
        self._kept_bytes -= size
        return kept.pop()

    def give(self, buffer: bytearray) -> None:
        """Take a buffer back; nobody may use it afterwards. One of another size than `take` makes is let go."""
        size = len(buffer)
        if size < POOLED_BYTES_MIN or size & (size - 1) or self._kept_bytes + size > self._kept_bytes_max:
            return
        self._kept_bytes += size
        self._kept.setdefault(size, []).append(buffer)
