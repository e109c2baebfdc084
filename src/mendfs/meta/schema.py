"""Every key and value in the metadata: the data model on one page (docs/formats/keys.md shows examples).

A key is one kind byte followed by big-endian numbers of fixed width and at most one byte string at its end, so keys
sort as the tuples they stand for: a directory is one contiguous range, so are a partition's blocks, a file's slots,
a server's debts. Values are MessagePack arrays (fields by position: new ones are appended with a default).
"""

import struct
from enum import Enum
from typing import Any, Generic, TypeVar

import msgspec

from mendfs.model import (
    Attributes,
    BlockId,
    CommitSequence,
    Cut,
    Extent,
    Generation,
    Inode,
    Partition,
    Row,
    ServerNumber,
    SessionId,
    Slot,
    Volume,
)

Value = TypeVar("Value")

RANGE_BITS = 10
"""Ids are granted in aligned ranges of 1,024, so the range of an id is a shift and its owner one get."""
RANGE_IDS = 1 << RANGE_BITS


class Kind(bytes, Enum):
    """The first byte of a key. Letters, so that a dump can be read."""

    VOLUME = b"V"
    GENERATION = b"G"
    LIFE = b"L"
    EPOCH = b"E"
    COUNTER = b"C"
    SERVER = b"S"
    ROW = b"R"
    INODE = b"i"
    NAME = b"d"
    XATTR = b"x"
    SLOT = b"e"
    BLOCK = b"b"
    TALLY = b"t"
    OWED = b"o"
    SESSION = b"s"
    ENDED = b"z"
    RANGE = b"r"
    ANSWER = b"a"
    OPEN_UNLINKED = b"p"
    UNLINKED = b"u"
    CUTTING = b"k"
    DROP = b"f"
    DEAD = b"q"


class Codec(Generic[Value]):
    """Encodes and decodes the values of one kind of key."""

    def __init__(self, kind: Any) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Value] = msgspec.msgpack.Decoder(kind)

    def encode(self, value: Value) -> bytes:
        """The stored form."""
        return self._encoder.encode(value)

    def decode(self, raw: bytes) -> Value:
        """From the stored form. Raises msgspec.DecodeError if the metadata is damaged."""
        return self._decoder.decode(raw)


class InodeRecord(msgspec.Struct, frozen=True, array_like=True):
    """An inode. `parent` is a directory's `..`; `target` what a symbolic link says."""

    attributes: Attributes
    parent: Inode = Inode(0)
    target: bytes = b""
    cut_number: int = 0
    """Given to the extents committed from now on; raised by every truncation."""
    cuts: tuple[Cut, ...] = ()
    """Truncations that the background has not applied to all stored slots yet."""


class NameRecord(msgspec.Struct, frozen=True, array_like=True):
    """A name in a directory; `kind` is the S_IFMT part of the inode's mode."""

    inode: Inode
    kind: int


class BlockRecord(msgspec.Struct, frozen=True, array_like=True):
    """A block the metadata knows: what reconcile compares stores with."""

    inode: Inode
    slot: Slot
    length: int
    root: bytes
    references: int
    """Stored slots that name the block."""
    born: CommitSequence
    died: CommitSequence = CommitSequence(0)
    """0 while it lives."""


class Tally(msgspec.Struct, frozen=True, array_like=True):
    """How many block keys a partition has, and the sum of their hashes: proof that a list of them is whole."""

    count: int = 0
    digest: bytes = bytes(16)


class ServerRecord(msgspec.Struct, frozen=True, array_like=True):
    """A data server of the volume."""

    id: str
    address: str
    zone: str
    capacity: int = 0
    draining: bool = False


class SessionRecord(msgspec.Struct, frozen=True, array_like=True):
    """A living session. Ranges by their index (id >> RANGE_BITS)."""

    client: str
    opened_ns: int
    block_ranges: tuple[int, ...] = ()
    inode_ranges: tuple[int, ...] = ()
    lowest_block: BlockId = BlockId(0)


class AnswerRecord(msgspec.Struct, frozen=True, array_like=True):
    """The last request in a request slot, and its answer as it was sent."""

    number: int
    answer: bytes


class DropRecord(msgspec.Struct, frozen=True, array_like=True):
    """Blocks that one slot named and names no more: a reference less for each."""

    blocks: tuple[tuple[Partition, BlockId], ...]


VOLUME: Codec[Volume] = Codec(Volume)
INODE: Codec[InodeRecord] = Codec(InodeRecord)
NAME: Codec[NameRecord] = Codec(NameRecord)
SLOT: Codec[tuple[Extent, ...]] = Codec(tuple[Extent, ...])
BLOCK: Codec[BlockRecord] = Codec(BlockRecord)
TALLY: Codec[Tally] = Codec(Tally)
SERVER: Codec[ServerRecord] = Codec(ServerRecord)
ROW: Codec[Row] = Codec(Row)
SESSION: Codec[SessionRecord] = Codec(SessionRecord)
ANSWER: Codec[AnswerRecord] = Codec(AnswerRecord)
DROP: Codec[DropRecord] = Codec(DropRecord)
NUMBER: Codec[int] = Codec(int)

_ONE = struct.Struct(">cQ")
_TWO = struct.Struct(">cQQ")
_PARTITION = struct.Struct(">cI")
_BLOCK = struct.Struct(">cIQ")
_OWED = struct.Struct(">cIIQ")
_ANSWER = struct.Struct(">cQH")
_DEAD = struct.Struct(">cQIQ")
_DROP = struct.Struct(">cQH")

VOLUME_KEY = bytes(Kind.VOLUME)
GENERATION_KEY = bytes(Kind.GENERATION)
EPOCH_KEY = bytes(Kind.EPOCH)


def life_key(generation: Generation) -> bytes:
    """Commit sequence that was there when this life of the meta server began."""
    return _ONE.pack(Kind.LIFE, generation)


def counter_key(kind: str) -> bytes:
    """Next id of this kind (`block`, `inode`, `session`)."""
    return Kind.COUNTER + kind.encode()


def server_key(number: ServerNumber) -> bytes:
    """-> ServerRecord."""
    return _PARTITION.pack(Kind.SERVER, number)


def row_key(partition: Partition) -> bytes:
    """-> Row."""
    return _PARTITION.pack(Kind.ROW, partition)


def inode_key(inode: Inode) -> bytes:
    """-> InodeRecord."""
    return _ONE.pack(Kind.INODE, inode)


def name_key(parent: Inode, name: bytes) -> bytes:
    """-> NameRecord."""
    return _ONE.pack(Kind.NAME, parent) + name


def xattr_key(inode: Inode, name: bytes) -> bytes:
    """-> the raw value."""
    return _ONE.pack(Kind.XATTR, inode) + name


def slot_key(inode: Inode, slot: Slot) -> bytes:
    """-> tuple of Extent."""
    return _TWO.pack(Kind.SLOT, inode, slot)


def block_key(partition: Partition, block: BlockId) -> bytes:
    """-> BlockRecord."""
    return _BLOCK.pack(Kind.BLOCK, partition, block)


def tally_key(partition: Partition) -> bytes:
    """-> Tally."""
    return _PARTITION.pack(Kind.TALLY, partition)


def owed_key(server: ServerNumber, partition: Partition, block: BlockId) -> bytes:
    """-> empty: the server lacks a replica it should hold."""
    return _OWED.pack(Kind.OWED, server, partition, block)


def session_key(session: SessionId) -> bytes:
    """-> SessionRecord, while the session lives."""
    return _ONE.pack(Kind.SESSION, session)


def ended_key(session: SessionId) -> bytes:
    """-> when it ended, in ns: its answers are kept for an hour."""
    return _ONE.pack(Kind.ENDED, session)


def range_key(kind: str, range_index: int) -> bytes:
    """-> the session that was granted the range."""
    return Kind.RANGE + kind[:1].encode() + range_index.to_bytes(8, "big")


def answer_key(session: SessionId, request_slot: int) -> bytes:
    """-> AnswerRecord."""
    return _ANSWER.pack(Kind.ANSWER, session, request_slot)


def open_unlinked_key(inode: Inode, session: SessionId) -> bytes:
    """-> empty: the session has the unlinked inode open."""
    return _TWO.pack(Kind.OPEN_UNLINKED, inode, session)


def open_unlinked_in(key: bytes) -> tuple[Inode, SessionId]:
    """What an OPEN_UNLINKED key says."""
    _, inode, session = _TWO.unpack(key)
    return Inode(inode), SessionId(session)


def unlinked_key(inode: Inode) -> bytes:
    """-> empty: no name is left; freed when nobody has it open."""
    return _ONE.pack(Kind.UNLINKED, inode)


def cutting_key(inode: Inode) -> bytes:
    """-> empty: the inode has cuts to be applied to its slots."""
    return _ONE.pack(Kind.CUTTING, inode)


def drop_key(sequence: CommitSequence, part: int) -> bytes:
    """-> DropRecord: the first half of the freeing queue."""
    return _DROP.pack(Kind.DROP, sequence, part)


def dead_key(died: CommitSequence, partition: Partition, block: BlockId) -> bytes:
    """-> empty: the second half of the freeing queue, in the order of death."""
    return _DEAD.pack(Kind.DEAD, died, partition, block)


def after(prefix: bytes) -> bytes:
    """The first key after all that begin with `prefix`, whose last byte is not 255 or is followed by shorter ones."""
    trimmed = prefix.rstrip(b"\xff")
    return trimmed[:-1] + bytes((trimmed[-1] + 1,))


def all_of(kind: Kind) -> tuple[bytes, bytes]:
    """The range of all keys of a kind."""
    return bytes(kind), after(bytes(kind))


def names_of(parent: Inode) -> tuple[bytes, bytes]:
    """The range of a directory's names."""
    prefix = _ONE.pack(Kind.NAME, parent)
    return prefix, after(prefix)


def name_in(key: bytes) -> bytes:
    """The name at the end of a NAME or XATTR key."""
    return key[_ONE.size :]


def xattrs_of(inode: Inode) -> tuple[bytes, bytes]:
    """The range of an inode's extended attributes."""
    prefix = _ONE.pack(Kind.XATTR, inode)
    return prefix, after(prefix)


def slots_of(inode: Inode, first: Slot, end: Slot | None = None) -> tuple[bytes, bytes]:
    """The range of an inode's stored slots from `first` on, before `end`."""
    last = after(_ONE.pack(Kind.SLOT, inode)) if end is None else slot_key(inode, end)
    return slot_key(inode, first), last


def slot_in(key: bytes) -> Slot:
    """The slot of a SLOT key."""
    return Slot(_TWO.unpack(key)[2])


def opens_of(inode: Inode) -> tuple[bytes, bytes]:
    """The range of an unlinked inode's opens."""
    prefix = _ONE.pack(Kind.OPEN_UNLINKED, inode)
    return prefix, after(prefix)


def owed_in(key: bytes) -> tuple[ServerNumber, Partition, BlockId]:
    """What an OWED key says."""
    _, server, partition, block = _OWED.unpack(key)
    return ServerNumber(server), Partition(partition), BlockId(block)


def dead_in(key: bytes) -> tuple[CommitSequence, Partition, BlockId]:
    """What a DEAD key says."""
    _, died, partition, block = _DEAD.unpack(key)
    return CommitSequence(died), Partition(partition), BlockId(block)


def number_in(key: bytes) -> int:
    """The first number of a key whose kind is followed by eight bytes."""
    return int.from_bytes(key[1:9], "big")


def server_in(key: bytes) -> ServerNumber:
    """The number in a SERVER key."""
    return ServerNumber(int.from_bytes(key[1:5], "big"))
