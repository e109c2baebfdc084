"""What a connection still has to send: batches small frames, passes big payloads on uncopied, knows when they are sent.

The transport's high-water mark is 0, so it says `pause_writing` as soon as the kernel did not take everything, and
`resume_writing` when it has: between the two, frames wait here, where a cancelled call can be taken back. Only once the
kernel has a payload may its memory change.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from mendfs.model import KiB

COPIED_BYTES_MAX = 16 * KiB
"""Payloads up to this size are joined with their frame: one more small copy costs less than one more vector."""
BATCH_BYTES_MAX = 256 * KiB
"""Bytes handed to the transport in one go, if frames are small; what is behind can still be taken back."""

Buffer = bytes | bytearray | memoryview
Payload = Sequence[Buffer]
"""What is sent after a message: a scatter list that is not copied, so it must stay unchanged until it is sent."""


class Outgoing:
    """One frame that waits, or whose payload was not yet taken by the kernel."""

    __slots__ = ("head", "is_answer", "payload", "payload_bytes", "request_id", "sent")

    def __init__(
        self,
        head: bytes,
        payload: Payload,
        payload_bytes: int,
        request_id: int,
        is_answer: bool,
        sent: Callable[[], None] | None,
    ) -> None:
        self.head = head
        self.payload = payload
        self.payload_bytes = payload_bytes
        self.request_id = request_id
        """Of a call of ours, by which it can be taken back; else 0."""
        self.is_answer = is_answer
        self.sent = sent
        """Called once the payload's memory may change: it was sent, or never will be."""

    @property
    def size(self) -> int:
        """Bytes of the whole frame."""
        return len(self.head) + self.payload_bytes


class Outbox:
    """The sending half of a connection. `flushed` is called when frames that waited have been handed on."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, transport: asyncio.WriteTransport, flushed: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._flushed = flushed
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

    def send(
        self,
        head: bytes,
        payload: Payload = (),
        payload_bytes: int = 0,
        *,
        at_once: bool,
        request_id: int = 0,
        is_answer: bool = False,
        sent: Callable[[], None] | None = None,
    ) -> None:
        """Send a frame after those before it: now, or with others of the same turn of the event loop."""
        if at_once and not self._is_paused and not self._waiting and not self._is_closed:
            if not payload_bytes and sent is None:
                self._transport.write(head)
            else:
                self._write([Outgoing(head, payload, payload_bytes, request_id, is_answer, sent)])
            return
        if self._is_closed:
            if sent is not None:
                sent()
            return
        outgoing = Outgoing(head, payload, payload_bytes, request_id, is_answer, sent)
        self._waiting.append(outgoing)
        if is_answer:
            self.answer_bytes += outgoing.size
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
                if frame.is_answer:
                    self.answer_bytes -= frame.size
            self._write(batch)
        if not self._waiting and not self._is_paused:
            self._tell_drained()
        self._flushed()

    def _write(self, batch: list[Outgoing]) -> None:
        pieces: list[Buffer] = []
        small: list[Buffer] = []
        for frame in batch:
            small.append(frame.head)
            if frame.payload_bytes <= COPIED_BYTES_MAX:
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
