"""The record format: docs/formats/record.md's example, round trips, and what is no record."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mendfs.blocks import RULES
from mendfs.data.record import (
    ALIGNMENT_BYTES,
    RECORD_HEADER_BYTES,
    SEGMENT_HEADER_BYTES,
    RecordHeader,
    SegmentHeader,
    decode_record,
    decode_segment,
    encode_record,
    encode_segment,
    make_header,
    seed_of,
)
from mendfs.errors import StoreDamaged
from mendfs.model import BLOCK_SIZE_MAX, BlockId, Inode, Partition, Slot

SEGMENT = SegmentHeader(7, bytes(range(16)), b"v" * 16, b"s" * 16, "xxh3", 16384)
SEED = seed_of(SEGMENT.id)
DOCUMENT = Path(__file__).parents[2] / "docs" / "formats" / "record.md"

U64 = st.integers(0, (1 << 64) - 1)
HEADERS = st.builds(
    lambda partition, block, inode, slot, length, page_size, kind: make_header(
        Partition(partition),
        BlockId(block),
        Inode(inode),
        Slot(slot),
        length,
        bytes(range(RULES[kind].root_bytes)),
        page_size,
        kind,
    ),
    st.integers(0, (1 << 32) - 1),
    U64,
    U64,
    U64,
    st.integers(1, BLOCK_SIZE_MAX),
    st.integers(1, BLOCK_SIZE_MAX),
    st.sampled_from(["xxh3", "blake3"]),
)
OFFSETS = st.integers(64, 1 << 24).map(lambda number: number * ALIGNMENT_BYTES)


def example() -> RecordHeader:
    return make_header(
        Partition(3), BlockId((1 << 44) + 9), Inode(5), Slot(2), 5, bytes.fromhex("00" * 15 + "ff"), 16384, "xxh3"
    )


def test_the_worked_examples_of_the_document_are_what_is_written() -> None:
    """The document came first; a format that changes under old stores would lose them."""
    text = DOCUMENT.read_text()
    blocks = [bytes.fromhex(re.sub(r"\s", "", found)) for found in re.findall(r"```hex\n(.*?)```", text, re.DOTALL)]
    assert blocks[0] == encode_segment(SEGMENT)[: len(blocks[0])]
    half = blocks[0].ljust(2048, b"\0")
    assert encode_segment(SEGMENT) == half + half
    assert blocks[1] == encode_record(example(), seed=SEED, offset=4096)


@given(HEADERS, OFFSETS, U64)
def test_a_record_header_is_read_back_as_it_was(header: RecordHeader, offset: int, seed: int) -> None:
    raw = encode_record(header, seed=seed, offset=offset)
    assert len(raw) == RECORD_HEADER_BYTES
    assert decode_record(b"xx" + raw + b"yy", seed=seed, offset=offset, at=2) == header
    assert header.total_bytes % ALIGNMENT_BYTES == 0
    assert header.total_bytes - header.head_bytes - header.length < ALIGNMENT_BYTES


@given(HEADERS, OFFSETS, st.integers(0, 8 * RECORD_HEADER_BYTES - 1))
def test_any_flipped_bit_makes_it_none(header: RecordHeader, offset: int, bit: int) -> None:
    raw = bytearray(encode_record(header, seed=SEED, offset=offset))
    raw[bit // 8] ^= 1 << bit % 8
    assert decode_record(raw, seed=SEED, offset=offset) is None


def test_a_copied_record_is_none() -> None:
    """User data may be a copy of a segment file: at another offset, or in another segment, it must not be believed."""
    raw = encode_record(example(), seed=SEED, offset=4096)
    assert decode_record(raw, seed=SEED, offset=4096 + 64) is None
    assert decode_record(raw, seed=seed_of(b"x" * 16), offset=4096) is None


@given(st.binary(max_size=200))
def test_garbage_is_none(raw: bytes) -> None:
    assert decode_record(raw, seed=SEED, offset=4096) is None
    assert decode_record(b"MFSR" + raw, seed=SEED, offset=4096) is None


def test_a_segment_header_is_read_back_as_it_was() -> None:
    raw = encode_segment(SEGMENT)
    assert len(raw) == SEGMENT_HEADER_BYTES
    assert decode_segment(raw, "x") == SEGMENT


@given(st.integers(0, 8 * 80 - 1))
def test_a_damaged_segment_header_says_so(bit: int) -> None:
    raw = bytearray(encode_segment(SEGMENT))
    raw[bit // 8] ^= 1 << bit % 8
    with pytest.raises(StoreDamaged, match=r"7\.seg"):
        decode_segment(raw, "7.seg")


def test_a_short_segment_header_says_so() -> None:
    with pytest.raises(StoreDamaged, match="inside its header"):
        decode_segment(encode_segment(SEGMENT)[:100], "7.seg")
