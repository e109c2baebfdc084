"""Frames out of a stream of bytes, without copying payloads. Sans-I/O: an `asyncio.BufferedProtocol`, no transport.

Headers and messages arrive in a scratch buffer. A payload goes straight to the memory that `place_payload` names,
except for what came in the same read as its message, which is copied. Memory is reserved only for lengths within the
limits of `wire.frame`, and for a payload only after the checksum of its header and message was right.
"""

import asyncio

from mendfs.errors import BadFrame, BadMessage
from mendfs.model import KiB
from mendfs.wire.frame import HEADER_BYTES, STRANGER_MESSAGE_BYTES_MAX, Header, decode_message, parse_header
from mendfs.wire.messages import Message

SCRATCH_BYTES = 256 * KiB
"""One read of a burst of small calls. More would only be copied more: what is read of a payload here is copied."""
STRANGER_SCRATCH_BYTES = 2 * (HEADER_BYTES + STRANGER_MESSAGE_BYTES_MAX)
"""Before the handshake: a thousand idle strangers cost 8 MiB."""


class FrameReader(asyncio.BufferedProtocol):
    """The receiving half of a connection. Subclasses say where payloads go and what frames mean."""

    def __init__(self) -> None:
        self._is_stranger = True
        self._scratch = memoryview(bytearray(STRANGER_SCRATCH_BYTES))
        self._is_held = False
        """While set, what arrived stays where it is until it is unset and `parse` is called."""
        # Unparsed bytes are scratch[start:end].
        self._start = 0
        self._end = 0
        # The frame that is arriving, once more than the scratch buffer is needed for it.
        self._header: Header | None = None
        self._message: Message | BadMessage | None = None
        # Header and message if bigger than the scratch buffer, or the payload's memory; None: discard the payload.
        self._target: memoryview | None = None
        self._filled = 0
        self._payload_left = 0

    # What subclasses give.

    def place_payload(self, header: Header, message: Message) -> memoryview | None:
        """Exactly `header.payload_bytes` of memory for the payload that follows; None to discard it."""
        raise NotImplementedError

    def frame_received(self, header: Header, message: Message | BadMessage | None) -> None:
        """A whole frame: its payload has landed. BadMessage: a sound frame with an unsound message. None: a cancel."""
        raise NotImplementedError

    def frame_refused(self, error: BadFrame) -> None:
        """The stream cannot be understood from here on; nothing more may be fed."""
        raise NotImplementedError

    # What they use.

    def admit(self) -> None:
        """The other side is no stranger any more: use the real limits and a buffer of the real size."""
        self._is_stranger = False
        scratch = memoryview(bytearray(SCRATCH_BYTES))
        waiting = self._end - self._start
        scratch[:waiting] = self._scratch[self._start : self._end]
        self._scratch, self._start, self._end = scratch, 0, waiting

    def let_go(self) -> None:
        """Nothing is fed any more: give the memory back now, for a connection is often part of a reference cycle."""
        self._scratch = memoryview(b"")
        self._start = self._end = 0

    def discard_payload(self, request_id: int) -> None:
        """If the payload that is arriving belongs to `request_id`, write no more of it anywhere."""
        if self._payload_left and self._header is not None and self._header.request_id == request_id:
            self._target = None

    # asyncio.BufferedProtocol

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes are to be put. The transport fills it before anything else of ours runs."""
        if self._header is not None:
            if self._target is not None:
                return self._target[self._filled :]
            return self._scratch[: self._payload_left]
        if self._start == self._end:
            self._start = self._end = 0
        elif self._end == len(self._scratch):
            # Less than a header is left, or parsing is held; then the transport is paused, but may be late to obey.
            begun = bytes(self._scratch[self._start : self._end])
            self._scratch[: len(begun)] = begun
            self._start, self._end = 0, len(begun)
        return self._scratch[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        """`nbytes` were put where get_buffer said."""
        try:
            if self._header is None:
                self._end += nbytes
                self.parse()
            elif self._payload_left:
                self._filled += nbytes
                self._payload_left -= nbytes
                if not self._payload_left:
                    self._finish()
            else:
                self._filled += nbytes
                assert self._target is not None
                if self._filled == len(self._target):
                    header, head = self._header, self._target
                    self._header = self._target = None
                    self._head_arrived(header, head)
        except BadFrame as error:
            self.frame_refused(error)

    def parse(self) -> None:
        """Take frames out of the scratch buffer until it holds no whole one, or parsing is held.

        Raises BadFrame. Attributes are read again in each turn, for a frame may lead to `admit`.
        """
        while self._end - self._start >= HEADER_BYTES and not self._is_held and self._header is None:
            start, scratch = self._start, self._scratch
            header = parse_header(scratch, start, is_stranger=self._is_stranger)
            head_end = start + HEADER_BYTES + header.message_bytes
            if head_end > self._end:
                if head_end > len(scratch):
                    self._make_room(header)
                return
            self._start = head_end
            self._head_arrived(header, scratch[start:head_end])

    # The rest is ours.

    def _head_arrived(self, header: Header, head: memoryview) -> None:
        """Header and message of a frame are there."""
        message: Message | BadMessage | None
        try:
            message = decode_message(header, head, is_stranger=self._is_stranger)
        except BadMessage as error:
            message = error
        if header.payload_bytes:
            self._begin_payload(header, message)
        else:
            self.frame_received(header, message)

    def _make_room(self, header: Header) -> None:
        """The head that begins at the start of what is unparsed does not fit behind it: move it, or use memory of its
        own if it is bigger than the scratch buffer. parse_header has checked the length.
        """
        begun = bytes(self._scratch[self._start : self._end])
        size = HEADER_BYTES + header.message_bytes
        if size <= len(self._scratch):
            self._scratch[: len(begun)] = begun
            self._start, self._end = 0, len(begun)
            return
        self._header, self._target, self._filled = header, memoryview(bytearray(size)), len(begun)
        self._target[: len(begun)] = begun
        self._start = self._end = 0

    def _begin_payload(self, header: Header, message: Message | BadMessage | None) -> None:
        target = None if message is None or isinstance(message, BadMessage) else self.place_payload(header, message)
        assert target is None or len(target) == header.payload_bytes
        here = min(self._end - self._start, header.payload_bytes)
        if target is not None:
            target[:here] = self._scratch[self._start : self._start + here]
        self._start += here
        self._header, self._message, self._target = header, message, target
        self._filled = here
        self._payload_left = header.payload_bytes - here
        if not self._payload_left:
            self._finish()

    def _finish(self) -> None:
        header, message = self._header, self._message
        assert header is not None
        self._header = self._message = self._target = None
        self.frame_received(header, message)
