"""Frames are read as they were written, as docs/formats/frame.md says, and nothing else is accepted."""

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from mendfs.errors import BadFrame, BadMessage
from mendfs.model import BlockId, Epoch, Partition
from mendfs.wire import frame
from mendfs.wire.frame import HEADER_BYTES, MESSAGE_BYTES_MAX, PAYLOAD_BYTES_MAX, Kind, decode_message, parse_header
from mendfs.wire.messages import Message
from mendfs.wire.messages.data import BlockPages, GetBlock, SyncStore
from mendfs.wire.messages.meta import StatusReport
from mendfs.wire.messages.session import Hello, Ping

DOCUMENT = Path(__file__).parents[2] / "docs" / "formats" / "frame.md"


def read(raw: bytes, *, is_stranger: bool = False) -> tuple[frame.Header, Message | None]:
    header = parse_header(raw, is_stranger=is_stranger)
    head = memoryview(raw)[: HEADER_BYTES + header.message_bytes]
    return header, decode_message(header, head, is_stranger=is_stranger)


def sealed(
    *,
    magic: bytes = b"MFS1",
    version: int = 1,
    kind: int = 1,
    flags: int = 0,
    request_id: int = 1,
    message: bytes = b"\x81\xa4type\xa4ping",
    message_bytes: int | None = None,
    payload_bytes: int = 0,
) -> bytes:
    """A frame with a right checksum, whatever is in it."""
    length = len(message) if message_bytes is None else message_bytes
    checked = struct.pack(">BBHIQII", version, kind, flags, length, request_id, payload_bytes, 0) + message
    return struct.pack(">4sI", magic, xxh3_64_intdigest(checked) & 0xFFFFFFFF) + checked


def test_the_example_in_the_document_is_what_the_code_writes_and_reads() -> None:
    found = re.search(r"```hex\n(.*?)```", DOCUMENT.read_text(), re.S)
    assert found is not None
    raw = b"".join(
        bytes.fromhex(match.group()) for match in re.finditer(r"^(?:[0-9a-f]{2} )*[0-9a-f]{2}(?= {2})", found[1], re.M)
    )
    assert raw == frame.encode(Kind.REQUEST, 7, SyncStore(), 0, 30_000)
    header, message = read(raw)
    assert message == SyncStore()
    assert (header.kind, header.request_id, header.payload_bytes, header.deadline_ms) == (1, 7, 0, 30_000)


@given(
    kind=st.sampled_from([Kind.REQUEST, Kind.ANSWER, Kind.FAILURE, Kind.PUSH]),
    request_id=st.integers(0, 2**64 - 1),
    payload_bytes=st.integers(0, PAYLOAD_BYTES_MAX),
    deadline_ms=st.integers(0, 2**32 - 1),
    block=st.integers(0, 2**64 - 1),
)
def test_a_frame_is_read_as_it_was_written(
    kind: Kind, request_id: int, payload_bytes: int, deadline_ms: int, block: int
) -> None:
    message = GetBlock(Partition(3), BlockId(block), 0, 4)
    header, back = read(frame.encode(kind, request_id, message, payload_bytes, deadline_ms))
    assert back == message
    assert (header.kind, header.request_id) == (kind, request_id)
    assert (header.payload_bytes, header.deadline_ms) == (payload_bytes, deadline_ms)


def test_a_cancel_is_a_header_only() -> None:
    raw = frame.encode(Kind.CANCEL, 9, None)
    assert len(raw) == HEADER_BYTES
    assert read(raw)[1] is None


@pytest.mark.parametrize(
    "raw",
    [
        sealed(magic=b"HTTP"),
        sealed(version=2),
        sealed(kind=0),
        sealed(kind=6),
        sealed(flags=1),
        sealed(message_bytes=MESSAGE_BYTES_MAX + 1),
        sealed(message_bytes=2**32 - 1),
        sealed(payload_bytes=PAYLOAD_BYTES_MAX + 1),
        sealed(payload_bytes=2**32 - 1),
        sealed(message=b""),
        sealed(kind=5),
        sealed(kind=5, message=b"", payload_bytes=1),
    ],
)
def test_a_header_out_of_range_is_refused_before_the_message_is_looked_at(raw: bytes) -> None:
    with pytest.raises(BadFrame):
        parse_header(raw)


@given(st.integers(0, HEADER_BYTES * 8 + 17 * 8 - 1))
def test_any_flipped_bit_is_noticed(bit: int) -> None:
    raw = bytearray(frame.encode(Kind.REQUEST, 7, SyncStore(), 0, 30_000))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(BadFrame):
        header = parse_header(raw)
        # A length within the limits: the rest of the message never comes, or is another frame's bytes.
        decode_message(header, memoryview(bytes(raw).ljust(HEADER_BYTES + header.message_bytes, b"\0")))


@pytest.mark.parametrize(
    "message",
    [
        b"\xc1",
        b"\x81\xa4type\xa4none",
        b"\x81\xa4type\xaasync_store\x00",
        b"\x82\xa4type\xa4ping\xa1x\x01",
        b"\x82\xa4type\xa4ping",
        b"\xdd\xff\xff\xff\xff",
        b"\x81\xa4type\xa4\xff\xff\xff\xff",
        b"\x82\xa4type\xadstatus_report\xa8document\x81\xa1x" + b"\x91" * 100_000,
        b"\x82\xa4type\xa5hello\xa8versions\xdd\x00\x10\x00\x00",
    ],
)
def test_a_message_that_makes_no_sense_is_told_apart_from_a_broken_stream(message: bytes) -> None:
    with pytest.raises(BadMessage):
        read(sealed(message=message))


def test_strangers_may_say_little() -> None:
    hello = Hello(versions=(1,), role="client", volume="", nonce=bytes(32))
    assert read(frame.encode(Kind.REQUEST, 1, hello), is_stranger=True)[1] == hello
    with pytest.raises(BadMessage):
        read(frame.encode(Kind.REQUEST, 1, Ping()), is_stranger=True)
    with pytest.raises(BadFrame):
        read(frame.encode(Kind.REQUEST, 1, hello, 1), is_stranger=True)
    with pytest.raises(BadFrame):
        read(sealed(message=bytes(frame.STRANGER_MESSAGE_BYTES_MAX + 1)), is_stranger=True)


def test_a_message_over_the_limit_is_not_even_written() -> None:
    frame.encode(Kind.ANSWER, 1, BlockPages(1, bytes(MESSAGE_BYTES_MAX - 100), Epoch(1)))
    with pytest.raises(BadMessage, match="StatusReport"):
        frame.encode(Kind.ANSWER, 1, StatusReport({"x": "y" * MESSAGE_BYTES_MAX}))
