"""Frames out of a stream of bytes, without copying payloads. Sans-I/O: an `asyncio.BufferedProtocol`, no transport.

Headers and messages arrive in a scratch buffer. A payload goes straight to the memory that `place_payload` names,
except for what came in the same read as its message, which is copied. Memory is reserved only for lengths within the
limits of `wire.frame`, and for a payload only after the checksum of its header and message was right.
"""

import asyncio

from mendfs.errors import BadFrame, BadMessage
from mendfs.model import KiB
from mendfs.wire.frame import (
    CANCEL,
    HEADER_BYTES,
    STRANGER_MESSAGE_BYTES_MAX,
    Header,
    check_sum,
    decode_message,
    parse_header,
)
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
        # Unparsed bytes are scratch[start:end].
        self._start = 0
        self._end = 0
        # The frame that is arriving, once more than the scratch buffer is needed for it.
        self._header: Header | None = None
        self._message: Message | BadMessage | None = None
        # A message bigger than the scratch buffer, or the payload's memory; None while discarding a payload.
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

    def may_parse_on(self) -> bool:
        """False: leave what arrived where it is until `parse` is called."""
        return True

    # What they use.

    def admit(self) -> None:
        """The other side is no stranger any more: use the real limits and a buffer of the real size."""
        self._is_stranger = False
        scratch = memoryview(bytearray(SCRATCH_BYTES))
        waiting = self._end - self._start
        scratch[:waiting] = self._scratch[self._start : self._end]
        self._scratch, self._start, self._end = scratch, 0, waiting

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
            waiting = self._end - self._start
            self._scratch[:waiting] = bytes(self._scratch[self._start : self._end])
            self._start, self._end = 0, waiting
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
                    self._big_message_arrived(self._header, self._target)
        except BadFrame as error:
            self.frame_refused(error)

    def parse(self) -> None:
        """Take frames out of the scratch buffer until it holds no whole one, or may_parse_on says no.

        Raises BadFrame. Attributes are read again in each turn: a frame may lead to `admit`.
        """
        while self._end - self._start >= HEADER_BYTES and self._header is None and self.may_parse_on():
            start = self._start
            header = parse_header(self._scratch, start, is_stranger=self._is_stranger)
            message_end = start + HEADER_BYTES + header.message_bytes
            if message_end > self._end:
                if HEADER_BYTES + header.message_bytes > len(self._scratch):
                    self._begin_big_message(header)
                elif message_end > len(self._scratch):
                    waiting = self._end - start
                    self._scratch[:waiting] = bytes(self._scratch[start : self._end])
                    self._start, self._end = 0, waiting
                return
            message = self._decode(header, self._scratch[start + HEADER_BYTES : message_end])
            self._start = message_end
            if header.payload_bytes:
                self._begin_payload(header, message)
            else:
                self.frame_received(header, message)

    # The rest is ours.

    def _decode(self, header: Header, raw: memoryview) -> Message | BadMessage | None:
        if not header.message_bytes and header.kind == CANCEL:
            check_sum(header, raw)
            return None
        try:
            return decode_message(header, raw, is_stranger=self._is_stranger)
        except BadMessage as error:
            return error

    def _begin_big_message(self, header: Header) -> None:
        """A message longer than the scratch buffer gets memory of its own; parse_header has checked the length."""
        self._header = header
        self._target = memoryview(bytearray(header.message_bytes))
        begun = self._scratch[self._start + HEADER_BYTES : self._end]
        self._filled = len(begun)
        self._target[: self._filled] = begun
        self._start = self._end = 0

    def _big_message_arrived(self, header: Header, raw: memoryview) -> None:
        self._header = None
        self._target = None
        message = self._decode(header, raw)
        if header.payload_bytes:
            self._begin_payload(header, message)
        else:
            self.frame_received(header, message)

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
