"""A payload that arrived, and whose memory it lies in."""

from mendfs.world.buffers import BufferPool


class Received:
    """A payload that arrived. `view` is valid until `release`, which gives its buffer back to the pool."""

    __slots__ = ("_buffer", "_pool", "view")

    def __init__(self, view: memoryview, buffer: bytearray | None = None, pool: BufferPool | None = None) -> None:
        self.view = view
        self._buffer = buffer
        self._pool = pool

    @classmethod
    def take(cls, length: int, pool: BufferPool) -> "Received":
        """Memory of the pool for a payload of `length` bytes."""
        buffer = pool.take(length)
        return cls(memoryview(buffer)[:length], buffer, pool)

    def release(self) -> None:
        """Give the buffer back; nothing happens if the payload landed in its reader's own memory, or when repeated.

        No thread may use the bytes any more, and slices of `view` must be gone: they would show the next payload.
        """
        buffer, self._buffer = self._buffer, None
        if buffer is not None and self._pool is not None:
            self.view.release()
            self._pool.give(buffer)

    def abandon(self) -> None:
        """Leave the buffer to the garbage collector: a thread of a cancelled handler may still use it."""
        self._buffer = None
