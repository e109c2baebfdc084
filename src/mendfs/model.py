"""The values everything else speaks in: ids, extents, attributes, the volume, the placement table.

Frozen values without behaviour beyond themselves (design section 2). Structs that are stored or sent in great numbers
are `array_like`: fields are encoded by position, so new fields are only ever appended, with a default.
"""

import stat
from typing import Literal, NewType

import msgspec

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30

BlockId = NewType("BlockId", int)
"""64 bits: the top 20 are the generation the id was granted in, the rest a counter of the volume."""

Inode = NewType("Inode", int)
Partition = NewType("Partition", int)
Slot = NewType("Slot", int)
Epoch = NewType("Epoch", int)
Generation = NewType("Generation", int)
"""Number of meta server lives of a volume, raised and synced at each start."""
CommitSequence = NewType("CommitSequence", int)
ServerNumber = NewType("ServerNumber", int)
"""A data server's number in the volume: 0-based, never given twice."""
SessionId = NewType("SessionId", int)
Incarnation = NewType("Incarnation", int)
"""64 random bits, drawn each time a data store is opened."""

ROOT_INODE = Inode(1)
GENERATION_BITS = 20
COUNTER_BITS = 64 - GENERATION_BITS

BLOCK_SIZE_MIN = 8
BLOCK_SIZE_MAX = 16 * MiB
"""The largest block a volume can be formatted with; every receive buffer is bounded by it."""
SERVERS_MAX = 1 << 16
REPLICAS_MAX = 16
PARTITIONS_MAX = 1 << 16
NAME_BYTES_MAX = 255
PATH_BYTES_MAX = 4096
SIZE_MAX = (1 << 63) - 1
"""The largest file size in bytes: what off_t can say."""

ChecksumKind = Literal["xxh3", "blake3"]
Layout = Literal["ring", "pairs", "spread"]
EntryState = Literal["member", "joining", "leaving"]
ServerState = Literal["up", "suspect", "down", "draining", "joining"]


class Extent(msgspec.Struct, frozen=True, array_like=True):
    """A piece of a slot that a piece of one block holds. Lengths and offsets in bytes."""

    offset_in_slot: int
    length: int
    partition: Partition
    block: BlockId
    block_length: int
    offset_in_block: int
    root: bytes
    cut: int = 0
    """The inode's cut number when this extent was committed; see `Cut`."""

    @property
    def end_in_slot(self) -> int:
        """The first byte of the slot after this extent."""
        return self.offset_in_slot + self.length


class Seen(msgspec.Struct, frozen=True, array_like=True):
    """What a merge found in a range of a slot: the block that was shown there, 0 for a hole."""

    offset_in_slot: int
    length: int
    block: BlockId


class Cut(msgspec.Struct, frozen=True, array_like=True):
    """A truncation: extents with a lower cut number hold nothing at or past `size` bytes of the file."""

    number: int
    size: int


class Attributes(msgspec.Struct, frozen=True, array_like=True):
    """What `stat` shows of an inode. Times in nanoseconds since 1970, sizes in bytes."""

    inode: Inode
    generation: int
    mode: int
    """Type and permission bits, as in `st_mode`."""
    uid: int
    gid: int
    nlink: int
    size: int
    stored: int
    """Bytes of the file that extents cover: what `st_blocks` is made of."""
    rdev: int
    atime_ns: int
    mtime_ns: int
    ctime_ns: int
    version: CommitSequence
    """The commit sequence that last changed contents or attributes; an answer with an older one is stale."""


class SlotExtents(msgspec.Struct, frozen=True, array_like=True):
    """The extents of one slot, sorted by offset and disjoint, already clipped by the inode's cuts."""

    slot: Slot
    extents: tuple[Extent, ...]


class Volume(msgspec.Struct, frozen=True, kw_only=True):
    """The parameters of a volume, fixed at format unless the design says otherwise."""

    id: str
    """32 hexadecimal digits."""
    block_size: int
    page_size: int
    replicas: int
    partitions: int
    checksum: ChecksumKind
    layout: Layout
    write_quorum: int
    read_quorum: int
    server_count: int
    """Data servers the first table is made for."""
    created_ns: int
    format_version: int = 1


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """One server of a row."""

    server: ServerNumber
    state: EntryState = "member"


Row = tuple[Entry, ...]


class Table(msgspec.Struct, frozen=True, array_like=True):
    """Placement: partition -> row. Replica k of a block is the copy on the k-th server of its partition's row."""

    epoch: Epoch
    rows: tuple[Row, ...]


class ServerView(msgspec.Struct, frozen=True, kw_only=True):
    """What clients are told of a data server so that they can reach it and know when to go round it."""

    number: ServerNumber
    id: str
    address: str
    zone: str
    state: ServerState
    incarnation: Incarnation


class StoreHealth(msgspec.Struct, frozen=True, kw_only=True):
    """A data server's own account of itself, carried by every heartbeat. Bytes, counts since the process started."""

    blocks: int
    bytes_used: int
    bytes_free: int
    reads: int
    writes: int
    mended: int
    corrupt_found: int
    oldest_disk_operation_s: float
    """Age of the oldest unfinished disk operation: above 3 s the server counts as down."""
    troubles: tuple[str, ...] = ()
    """One line each: what is wrong with the store and what to do."""


def generation_of(block: BlockId) -> Generation:
    """The generation in which `block`'s id was granted."""
    return Generation(block >> COUNTER_BITS)


def without_set_id(mode: int) -> int:
    """`mode` after a change of owner, a truncation or a write by an ordinary user: without set-id bits."""
    mode &= ~stat.S_ISUID
    # Without group execution the bit is not set-group-id but mandatory locking: Linux leaves it.
    return mode & ~stat.S_ISGID if mode & stat.S_IXGRP else mode
