"""Frames: a header of 32 bytes, a message, a payload (docs/formats/frame.md). Sans-I/O: bytes in, values out.

Lengths are checked before anybody reserves memory for them. Whatever the bytes, only BadFrame or BadMessage is raised.
The checksum covers header and message; a payload is a block's bytes, and those have checksums end to end.
"""

import struct
from enum import IntEnum

import msgspec
from xxhash import xxh3_64_intdigest

from mendfs.errors import BadFrame, BadMessage
from mendfs.model import MiB
from mendfs.wire.messages import Message
from mendfs.wire.messages.session import Done, Failure, Hello, Proof, Welcome

MAGIC = b"MFS1"
VERSION = 1
HEADER_BYTES = 32
MESSAGE_BYTES_MAX = 2 * MiB
"""A transaction holds 1 MiB at most; the largest answer, a table of 65,536 rows, stays below this."""
PAYLOAD_BYTES_MAX = 16 * MiB
"""The largest block a volume can be formatted with."""
STRANGER_MESSAGE_BYTES_MAX = 4096
"""What a side that has not yet proved that it knows the secret may send in one message; it may send no payload."""
DEADLINE_MS_MAX = (1 << 32) - 1

Buffer = bytes | bytearray | memoryview


class Kind(IntEnum):
    """What a frame is."""

    REQUEST = 1
    ANSWER = 2
    FAILURE = 3
    """An answer whose message is a `Failure`."""
    PUSH = 4
    """Expects no answer."""
    CANCEL = 5
    """The caller waits no more for the request with this id. No message, no payload."""


# Plain numbers for comparisons in the hot path: reading a member of an enum costs a lookup in its class.
REQUEST, ANSWER, FAILURE, PUSH, CANCEL = (int(kind) for kind in Kind)

_HEADER = struct.Struct(">4sIBBHIQII")
_CHECKED = struct.Struct(">BBHIQII")
"""What follows magic and checksum. One piece with the message, so that the checksum needs no copy of either."""
_SEAL = struct.Struct(">4sI")
CHECKED_FROM = _SEAL.size
assert _HEADER.size == HEADER_BYTES == CHECKED_FROM + _CHECKED.size

_unpack = _HEADER.unpack_from
_encode_message = msgspec.msgpack.Encoder().encode
_any: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)
_decode_any = _any.decode
# Strangers get a decoder of their own: what they send must not even reach the types of the others.
_strangers: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Hello | Welcome | Proof | Done | Failure)
_decode_stranger = _strangers.decode


class Header(msgspec.Struct, frozen=True, gc=False):
    """A header whose lengths are within the limits. Its checksum is only checked together with the message."""

    checksum: int
    kind: int
    message_bytes: int
    request_id: int
    payload_bytes: int
    deadline_ms: int
    """How long the caller still waits; 0: it did not say."""


def encode(kind: int, request_id: int, message: Message | None, payload_bytes: int = 0, deadline_ms: int = 0) -> bytes:
    """Header and message of a frame; `payload_bytes` bytes of payload are to follow. None: no message (a cancel)."""
    raw = b"" if message is None else _encode_message(message)
    if len(raw) > MESSAGE_BYTES_MAX:
        raise BadMessage(f"{type(message).__name__} takes {len(raw)} bytes; a message has at most {MESSAGE_BYTES_MAX}")
    assert payload_bytes <= PAYLOAD_BYTES_MAX, "nobody makes a block bigger than the largest block size"
    checked = _CHECKED.pack(VERSION, kind, 0, len(raw), request_id, payload_bytes, deadline_ms) + raw
    return _SEAL.pack(MAGIC, xxh3_64_intdigest(checked) & 0xFFFFFFFF) + checked


def parse_header(data: Buffer, start: int = 0, *, is_stranger: bool = False) -> Header:
    """The header in the 32 bytes of `data` from `start` on. Raises BadFrame; then nothing after it can be trusted."""
    magic, checksum, version, kind, flags, message_bytes, request_id, payload_bytes, deadline_ms = _unpack(data, start)
    if magic != MAGIC or version != VERSION:
        raise BadFrame(f"expected a mendfs v{VERSION} frame, got {magic!r} v{version}")
    if not REQUEST <= kind <= CANCEL or flags:
        raise BadFrame(f"kind {kind} with flags {flags:#x} is not known to version {VERSION}")
    if message_bytes > MESSAGE_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
        raise BadFrame(f"a frame of {message_bytes} + {payload_bytes} bytes exceeds the limits")
    if is_stranger and (message_bytes > STRANGER_MESSAGE_BYTES_MAX or payload_bytes):
        raise BadFrame(f"a frame of {message_bytes} + {payload_bytes} bytes before the handshake")
    if (kind == CANCEL) == bool(message_bytes) or (kind == CANCEL and payload_bytes):
        raise BadFrame("a cancel carries nothing, any other frame a message")
    return Header(checksum, kind, message_bytes, request_id, payload_bytes, deadline_ms)


def decode_message(header: Header, head: memoryview, *, is_stranger: bool = False) -> Message | None:
    """The message of a frame whose header and message are `head`; None of a cancel.

    Raises BadFrame if the checksum fails; BadMessage if it is right, but not the message: then the stream can go on.
    """
    if xxh3_64_intdigest(head[CHECKED_FROM:]) & 0xFFFFFFFF != header.checksum:
        raise BadFrame("a frame failed its checksum")
    if header.kind == CANCEL:
        return None
    try:
        return (_decode_stranger if is_stranger else _decode_any)(head[HEADER_BYTES:])
    # ValueError: malformed MessagePack, a message that is none of ours, a text that is not UTF-8; RecursionError:
    # nested deeper than anything we send.
    except (ValueError, RecursionError) as error:
        raise BadMessage(f"a message of {header.message_bytes} bytes cannot be decoded: {error}") from error
