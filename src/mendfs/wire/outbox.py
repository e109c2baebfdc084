"""What a connection still has to send: batches small frames, passes big payloads on uncopied, knows when they are sent.

The transport's high-water mark is 0, so it says `pause_writing` as soon as the kernel did not take everything, and
`resume_writing` when it has: between the two, frames wait here, where a cancelled call can be taken back. Only once the
kernel has a payload may its memory change.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mendfs.model import KiB

COPIED_BYTES_MAX = 16 * KiB
"""Payloads up to this size are joined with their frame: one more small copy costs less than one more vector."""
BATCH_BYTES_MAX = 256 * KiB
"""Bytes handed to the transport in one go, if frames are small; what is behind can still be taken back."""

Buffer = bytes | bytearray | memoryview
Payload = Sequence[Buffer]
"""What is sent after a message: a scatter list that is not copied, so it must stay unchanged until it is sent."""


class Outgoing(NamedTuple):
    """One frame. `sent` is called once its payload's memory may change: it was sent, or never will be."""

    request_id: int
    """Of a call of ours, by which it can be taken back; else 0."""
    head: bytes
    payload: Payload
    size: int
    """Of head and payload."""
    answer_bytes: int = 0
    """As `size` if this is an answer, else 0."""
    sent: Callable[[], None] | None = None


class Outbox:
    """The sending half of a connection."""

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.WriteTransport) -> None:
        self._loop = loop
        self._transport = transport
        self._waiting: deque[Outgoing] = deque()
        self._is_paused = False
        self._is_flush_due = False
        self._is_closed = False
        self._unsent: list[Callable[[], None]] = []
        self._drained: asyncio.Future[None] | None = None
        self.answer_bytes = 0
        """Bytes of answers that wait: how far the other side is behind in reading what it asked for."""
        transport.set_write_buffer_limits(0)

    def __len__(self) -> int:
        """Frames that wait."""
        return len(self._waiting)

    async def drain(self) -> None:
        """Wait until the kernel has everything, or the connection has ended."""
        while (self._waiting or self._is_paused) and not self._is_closed:
            if self._drained is None:
                self._drained = self._loop.create_future()
            # Shared by all who wait: one that is cancelled must leave it to the others.
            await asyncio.shield(self._drained)

    def send(self, frame: Outgoing, *, at_once: bool) -> None:
        """Send a frame after those before it: now, or with others of the same turn of the event loop."""
        if self._is_closed:
            if frame.sent is not None:
                frame.sent()
            return
        if at_once and not self._is_paused and not self._waiting:
            self._write([frame])
            return
        self._waiting.append(frame)
        self.answer_bytes += frame.answer_bytes
        if not self._is_flush_due and not self._is_paused:
            self._is_flush_due = True
            self._loop.call_soon(self._flush_due)

    def take_back(self, request_id: int) -> bool:
        """Forget the frame of a call that was not begun to be sent; False if there is none."""
        for place, frame in enumerate(self._waiting):
            if frame.request_id == request_id:
                del self._waiting[place]
                return True
        return False

    def pause(self) -> None:
        """The transport has more than the kernel takes."""
        self._is_paused = True

    def resume(self) -> None:
        """The kernel has everything that was written."""
        self._is_paused = False
        unsent, self._unsent = self._unsent, []
        for sent in unsent:
            sent()
        self._flush()

    def close(self) -> None:
        """Nothing is sent any more."""
        self._is_closed = True
        unsent, self._unsent = self._unsent, []
        waiting, self._waiting = self._waiting, deque()
        self.answer_bytes = 0
        for sent in [*unsent, *(frame.sent for frame in waiting)]:
            if sent is not None:
                sent()
        self._tell_drained()

    def _tell_drained(self) -> None:
        if self._drained is not None:
            self._drained.set_result(None)
            self._drained = None

    def _flush_due(self) -> None:
        self._is_flush_due = False
        self._flush()

    def _flush(self) -> None:
        while self._waiting and not self._is_paused and not self._is_closed:
            batch = []
            size = 0
            while self._waiting and size < BATCH_BYTES_MAX:
                frame = self._waiting.popleft()
                batch.append(frame)
                size += frame.size
                self.answer_bytes -= frame.answer_bytes
            self._write(batch)
        if not self._waiting and not self._is_paused:
            self._tell_drained()

    def _write(self, batch: list[Outgoing]) -> None:
        pieces: list[Buffer] = []
        small: list[Buffer] = []
        for frame in batch:
            small.append(frame.head)
            if frame.size - len(frame.head) <= COPIED_BYTES_MAX:
                small += frame.payload
            else:
                pieces.append(b"".join(small))
                small = []
                pieces += frame.payload
        if small:
            pieces.append(small[0] if len(small) == 1 else b"".join(small))
        if len(pieces) == 1:
            self._transport.write(pieces[0])
        else:
            self._transport.writelines(pieces)
        for frame in batch:
            if frame.sent is not None:
                # pause() was called inside write() if anything is left.
                if self._is_paused:
                    self._unsent.append(frame.sent)
                else:
                    frame.sent()
