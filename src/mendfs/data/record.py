"""The format of segment files: docs/formats/record.md as code. Pure: bytes to values and back.

A segment begins with a header of 4096 bytes; records follow, each aligned to 64 bytes:
`header | page checksums | data`. A record's header has its own checksum, seeded with the segment's random id and the
record's offset: user data that looks like a record is none, not even a copy of a record of another segment or place.
"""

import struct

import msgspec
from xxhash import xxh3_64_intdigest

from mendfs.blocks import RULES, Buffer, checksums_length
from mendfs.errors import StoreDamaged
from mendfs.model import BLOCK_SIZE_MAX, BlockId, ChecksumKind, Inode, Partition, Slot

SEGMENT_MAGIC = b"MFSSEGMT"
RECORD_MAGIC = b"MFSR"
FORMAT_VERSION = 1
SEGMENT_HEADER_BYTES = 4096
"""One page, so that records begin page-aligned and the header is written and read whole."""
ALIGNMENT_BYTES = 64
"""Records begin at multiples of this: after a bad header the next one is searched at these places only."""
SEGMENT_COPY_AT = 2048
"""The header is there twice: without the id in it none of the records could be told from garbage."""
ID_BYTES = 16
_ID_AT = 24
_SEED_MASK = (1 << 64) - 1

_SEGMENT = struct.Struct(">8sHBxIQ16s16s16s")
_RECORD = struct.Struct(">4sHBxIIQQQII32s")
_CHECKSUM = struct.Struct(">Q")
RECORD_HEADER_BYTES = _RECORD.size + _CHECKSUM.size
assert RECORD_HEADER_BYTES == 88

_KIND_CODES: dict[ChecksumKind, int] = {"xxh3": 1, "blake3": 2}
_KINDS: dict[int, ChecksumKind] = {code: kind for kind, code in _KIND_CODES.items()}


class SegmentHeader(msgspec.Struct, frozen=True):
    """What a segment file says of itself."""

    number: int
    id: bytes
    """16 random bytes, drawn when the file is made."""
    volume: bytes
    server: bytes
    kind: ChecksumKind
    page_size: int


class RecordHeader(msgspec.Struct, frozen=True, gc=False):
    """What a record says of the block it holds. Page size and checksum kind are the volume's, repeated for rescue."""

    partition: Partition
    block: BlockId
    inode: Inode
    slot: Slot
    length: int
    root: bytes
    page_size: int
    kind: ChecksumKind
    head_bytes: int
    """Bytes before the data: header and page checksums."""
    total_bytes: int
    """Bytes from this record to the next one."""


def align(position: int) -> int:
    """The first place at or after `position` where a record may begin."""
    return -(-position // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def head_length(length: int, page_size: int, kind: ChecksumKind) -> int:
    """Bytes that header and page checksums of a block of `length` bytes take."""
    return RECORD_HEADER_BYTES + checksums_length(length, page_size, kind)


def make_header(
    partition: Partition,
    block: BlockId,
    inode: Inode,
    slot: Slot,
    length: int,
    root: bytes,
    page_size: int,
    kind: ChecksumKind,
) -> RecordHeader:
    """The header of a block's record, with the lengths that follow from the block's."""
    head = head_length(length, page_size, kind)
    return RecordHeader(partition, block, inode, slot, length, root, page_size, kind, head, align(head + length))


def seed_of(segment_id: bytes) -> int:
    """What the seeds of a segment's record headers are counted from."""
    return xxh3_64_intdigest(segment_id)


def encode_segment(header: SegmentHeader) -> bytes:
    """The first 4096 bytes of a segment file."""
    raw = _SEGMENT.pack(
        SEGMENT_MAGIC,
        FORMAT_VERSION,
        _KIND_CODES[header.kind],
        header.page_size,
        header.number,
        header.id,
        header.volume,
        header.server,
    )
    half = (raw + _CHECKSUM.pack(xxh3_64_intdigest(raw))).ljust(SEGMENT_COPY_AT, b"\0")
    return half + half


def decode_segment(raw: Buffer, path: str) -> SegmentHeader:
    """The header of the segment file `path`. Raises StoreDamaged if the bytes are none."""
    if len(raw) < SEGMENT_HEADER_BYTES:
        raise StoreDamaged(f"segment {path} ends inside its header")
    magic, version, code, page_size, number, segment_id, volume, server = _SEGMENT.unpack_from(raw)
    if magic != SEGMENT_MAGIC:
        raise StoreDamaged(f"segment {path} does not begin with a segment header")
    if version != FORMAT_VERSION:
        raise StoreDamaged(f"segment {path} has format version {version}; this program reads {FORMAT_VERSION}")
    checked = bytes(raw[: _SEGMENT.size])
    if _CHECKSUM.unpack_from(raw, _SEGMENT.size)[0] != xxh3_64_intdigest(checked) or code not in _KINDS:
        raise StoreDamaged(f"the header of segment {path} fails its checksum")
    return SegmentHeader(number, segment_id, volume, server, _KINDS[code], page_size)


def decode_segment_copy(raw: Buffer, path: str) -> SegmentHeader:
    """The second copy of a damaged segment header. Raises StoreDamaged if it is damaged too, or there is none."""
    return decode_segment(bytes(raw[SEGMENT_COPY_AT:]).ljust(SEGMENT_HEADER_BYTES, b"\0"), path)


def ids_in(raw: Buffer) -> list[bytes]:
    """What stands where the id of a segment and its copy stand, in a header that fails its checksum twice."""
    places = (_ID_AT, SEGMENT_COPY_AT + _ID_AT)
    found = [bytes(raw[at : at + ID_BYTES]) for at in places]
    return [each for each in dict.fromkeys(found) if any(each)]


def encode_record(header: RecordHeader, *, seed: int, offset: int) -> bytes:
    """A record's header, for the record at `offset` of a segment with that seed."""
    raw = _RECORD.pack(
        RECORD_MAGIC,
        FORMAT_VERSION,
        _KIND_CODES[header.kind],
        header.partition,
        header.page_size,
        header.block,
        header.inode,
        header.slot,
        header.length,
        header.total_bytes,
        header.root,
    )
    return raw + _CHECKSUM.pack(xxh3_64_intdigest(raw, (seed + offset) & _SEED_MASK))


def decode_record(raw: Buffer, *, seed: int, offset: int, at: int = 0) -> RecordHeader | None:
    """The record header at `raw[at:]`, read from `offset` of a segment with that seed; None if it is no valid one."""
    if len(raw) < at + RECORD_HEADER_BYTES or raw[at : at + 4] != RECORD_MAGIC:
        return None
    checked = bytes(raw[at : at + _RECORD.size])
    if _CHECKSUM.unpack_from(raw, at + _RECORD.size)[0] != xxh3_64_intdigest(checked, (seed + offset) & _SEED_MASK):
        return None
    _, version, code, partition, page_size, block, inode, slot, length, total, root = _RECORD.unpack(checked)
    kind = _KINDS.get(code)
    if version != FORMAT_VERSION or kind is None:
        return None
    # Behind a good checksum only a program of ours can have written nonsense; it must not become a huge allocation.
    if not (0 < length <= BLOCK_SIZE_MAX and 0 < page_size <= BLOCK_SIZE_MAX):
        return None
    header = make_header(partition, block, inode, slot, length, root[: RULES[kind].root_bytes], page_size, kind)
    return header if header.total_bytes == total else None
