"""Every key and value of a store's index: the data model on one page.

Keys are a kind byte and big-endian numbers of fixed width, so that they sort as their numbers do. The index is a cache
of what the segment files say, except for the fence, which only it holds.
"""

import struct
from typing import NamedTuple

import msgspec

from mendfs.model import BlockId, CommitSequence, Generation, Inode, Partition, Slot

FORMAT_VERSION = 1

KIND_BLOCK = b"B"
"""partition, id -> `Entry`."""
KIND_CHECKPOINT = b"C"
"""-> `Place`: everything before it is on the disk and in the index."""
KIND_FENCE = b"F"
"""-> `Fence`."""
KIND_INVENTORY = b"I"
"""partition, id range -> `Sum`."""
KIND_JOURNAL = b"J"
"""segment, offset -> partition, id: index entries made past the checkpoint, which a start does not believe."""
KIND_MARK = b"M"
"""-> format version, server id, volume id. Written last when an index is built: without it the index is not whole."""
KIND_SEGMENT = b"S"
"""segment -> its random id and whether it is closed."""

ID_RANGE_BITS = 16
"""An inventory sum covers 65,536 ids: 10^9 ids in order make 15,000 ranges a partition at most."""

FLAG_BAD = 1
"""The data fails its checksums, or its file is gone: the block does not count as held, but good pages are served."""

_BLOCK_KEY = struct.Struct(">cIQ")
_INVENTORY_KEY = struct.Struct(">cIQ")
_JOURNAL_KEY = struct.Struct(">cII")
_SEGMENT_KEY = struct.Struct(">cI")
_ENTRY = struct.Struct(">IIIQQB")
_SUM = struct.Struct(">QQ16s")
_NAME = struct.Struct(">IQ")
_PLACE = struct.Struct(">II")
_FENCE = struct.Struct(">QQ")
_SEGMENT = struct.Struct(">16sB")
_MARK = struct.Struct(">H16s16s")

CHECKPOINT_KEY = KIND_CHECKPOINT
FENCE_KEY = KIND_FENCE
MARK_KEY = KIND_MARK


Name = tuple[Partition, BlockId]
"""What a block is known by."""


class Place(NamedTuple):
    """A position in the store: segment number, and offset in that file."""

    segment: int
    offset: int


class Entry(msgspec.Struct, frozen=True, gc=False):
    """Where a block lies, and what is asked for often enough not to read its header."""

    segment: int
    offset: int
    length: int
    inode: Inode
    slot: Slot
    flags: int
    root: bytes

    @property
    def place(self) -> Place:
        """Where its record begins."""
        return Place(self.segment, self.offset)

    @property
    def is_good(self) -> bool:
        """False once its data was found bad or gone."""
        return not self.flags & FLAG_BAD


class Fence(NamedTuple):
    """The highest (generation, commit sequence) whose order to delete was obeyed."""

    generation: Generation
    sequence: CommitSequence


class Sum(NamedTuple):
    """Blocks of one partition and id range: how many, the bytes of their records, the sum of their digests."""

    blocks: int = 0
    record_bytes: int = 0
    digest: int = 0


def block_key(partition: Partition, block: BlockId) -> bytes:
    """Of an `Entry`."""
    return _BLOCK_KEY.pack(KIND_BLOCK, partition, block)


def block_of(key: bytes) -> tuple[Partition, BlockId]:
    """What a block key names."""
    _, partition, block = _BLOCK_KEY.unpack(key)
    return partition, block


def encode_entry(entry: Entry) -> bytes:
    """The value of a block key."""
    return _ENTRY.pack(entry.segment, entry.offset, entry.length, entry.inode, entry.slot, entry.flags) + entry.root


def decode_entry(raw: bytes) -> Entry:
    """The value of a block key."""
    segment, offset, length, inode, slot, flags = _ENTRY.unpack_from(raw)
    return Entry(segment, offset, length, inode, slot, flags, raw[_ENTRY.size :])


def id_range_of(block: BlockId) -> int:
    """The inventory's id range that `block` lies in."""
    return block >> ID_RANGE_BITS


def inventory_key(partition: Partition, id_range: int) -> bytes:
    """Of a `Sum`."""
    return _INVENTORY_KEY.pack(KIND_INVENTORY, partition, id_range)


def inventory_of(key: bytes) -> tuple[Partition, int]:
    """Partition and id range of an inventory key."""
    _, partition, id_range = _INVENTORY_KEY.unpack(key)
    return partition, id_range


def inventory_range(partition: Partition) -> tuple[bytes, bytes]:
    """All inventory keys of a partition."""
    return inventory_key(partition, 0), inventory_key(partition, (1 << 64) - 1)


def encode_sum(total: Sum) -> bytes:
    """The value of an inventory key."""
    return _SUM.pack(total.blocks, total.record_bytes, total.digest.to_bytes(16, "big"))


def decode_sum(raw: bytes) -> Sum:
    """The value of an inventory key."""
    blocks, record_bytes, digest = _SUM.unpack(raw)
    return Sum(blocks, record_bytes, int.from_bytes(digest, "big"))


def journal_key(place: Place) -> bytes:
    """Of the block whose record was written at `place`."""
    return _JOURNAL_KEY.pack(KIND_JOURNAL, place.segment, place.offset)


def journal_place(key: bytes) -> Place:
    """Where the record of a journal key lies."""
    _, segment, offset = _JOURNAL_KEY.unpack(key)
    return Place(segment, offset)


def encode_name(partition: Partition, block: BlockId) -> bytes:
    """The value of a journal key."""
    return _NAME.pack(partition, block)


def decode_name(raw: bytes) -> tuple[Partition, BlockId]:
    """The value of a journal key."""
    partition, block = _NAME.unpack(raw)
    return partition, block


def segment_key(number: int) -> bytes:
    """Of what the index knows of a segment."""
    return _SEGMENT_KEY.pack(KIND_SEGMENT, number)


def segment_number(key: bytes) -> int:
    """The number in a segment key."""
    return int(_SEGMENT_KEY.unpack(key)[1])


def encode_segment(segment_id: bytes, *, is_closed: bool) -> bytes:
    """The value of a segment key; `is_closed`: nothing may be appended to it, nor found in it by a scan."""
    return _SEGMENT.pack(segment_id, is_closed)


def decode_segment(raw: bytes) -> tuple[bytes, bool]:
    """Random id, and whether it is closed."""
    segment_id, is_closed = _SEGMENT.unpack(raw)
    return segment_id, bool(is_closed)


def encode_place(place: Place) -> bytes:
    """The checkpoint's value."""
    return _PLACE.pack(*place)


def decode_place(raw: bytes) -> Place:
    """The checkpoint's value."""
    return Place(*_PLACE.unpack(raw))


def encode_fence(fence: Fence) -> bytes:
    """The fence's value."""
    return _FENCE.pack(*fence)


def decode_fence(raw: bytes) -> Fence:
    """The fence's value."""
    generation, sequence = _FENCE.unpack(raw)
    return Fence(Generation(generation), CommitSequence(sequence))


def encode_mark(server: bytes, volume: bytes) -> bytes:
    """The value of the mark: the index is whole, and belongs to this server's store of this volume."""
    return _MARK.pack(FORMAT_VERSION, server, volume)


def after(kind: bytes) -> bytes:
    """The end of all keys of a kind."""
    return bytes([kind[0] + 1])
