"""Page checksums and the root of a block (design sections 1.3 and 2). Pure functions on bytes.

A block is cut into pages of the volume's page size (the last may be shorter). Its page checksums are concatenated, and
its root is the checksum over them, its length and the page size: so a root names one content, length and paging.
`xxh3` gives pages 8 bytes (XXH3-64) and roots 16 (XXH3-128); `blake3` gives 32 bytes to both.
"""

import struct
from collections.abc import Callable, Iterator

import msgspec
from blake3 import blake3
from xxhash import xxh3_64_digest, xxh3_128_digest, xxh3_128_intdigest

from mendfs.errors import BlockCorrupt
from mendfs.model import BlockId, ChecksumKind, Partition

Buffer = bytes | bytearray | memoryview

_TRAILER = struct.Struct(">QQ")


def _blake3_digest(data: Buffer) -> bytes:
    return blake3(data).digest()


class ChecksumRule(msgspec.Struct, frozen=True):
    """How one kind of checksum is computed; `page_bytes` and `root_bytes` are the lengths of its digests."""

    page: Callable[[Buffer], bytes]
    root: Callable[[Buffer], bytes]
    page_bytes: int
    root_bytes: int


RULES: dict[ChecksumKind, ChecksumRule] = {
    "xxh3": ChecksumRule(xxh3_64_digest, xxh3_128_digest, 8, 16),
    "blake3": ChecksumRule(_blake3_digest, _blake3_digest, 32, 32),
}


def page_count(length: int, page_size: int) -> int:
    """Pages of a block of `length` bytes."""
    return -(-length // page_size)


def checksums_length(length: int, page_size: int, kind: ChecksumKind) -> int:
    """Bytes that the page checksums of a block of `length` bytes take."""
    return page_count(length, page_size) * RULES[kind].page_bytes


def _pages(data: Buffer, page_size: int) -> Iterator[memoryview]:
    view = memoryview(data)
    for start in range(0, len(view), page_size):
        yield view[start : start + page_size]


def page_checksums(data: Buffer, page_size: int, kind: ChecksumKind) -> bytes:
    """The checksums of the pages of `data`, one after the other."""
    digest = RULES[kind].page
    if len(data) <= page_size:
        return digest(data) if data else b""
    return b"".join([digest(page) for page in _pages(data, page_size)])


def root_of(checksums: Buffer, *, length: int, page_size: int, kind: ChecksumKind) -> bytes:
    """The root of a block of `length` bytes whose page checksums are `checksums`."""
    return RULES[kind].root(b"".join((checksums, _TRAILER.pack(length, page_size))))


def bad_pages(data: Buffer, checksums: Buffer, *, first_page: int, page_size: int, kind: ChecksumKind) -> list[int]:
    """Numbers of the pages of `data` that fail; `data` starts at page `first_page` of its block.

    `checksums` are those of the whole block and must have been checked with `check_root` before.
    """
    rule = RULES[kind]
    expected = bytes(checksums)
    failed = []
    for page, content in enumerate(_pages(data, page_size), start=first_page):
        at = page * rule.page_bytes
        if rule.page(content) != expected[at : at + rule.page_bytes]:
            failed.append(page)
    return failed


def check_root(checksums: Buffer, root: bytes, *, length: int, page_size: int, kind: ChecksumKind) -> None:
    """Raise BlockCorrupt unless `checksums` are the page checksums that `root` stands for."""
    if len(checksums) != checksums_length(length, page_size, kind):
        raise BlockCorrupt(f"{len(checksums)} bytes of page checksums for a block of {length} bytes")
    if root_of(checksums, length=length, page_size=page_size, kind=kind) != root:
        raise BlockCorrupt("the page checksums do not match the block's root")


def block_digest(volume: str, partition: Partition, block: BlockId, root: bytes) -> int:
    """128 bits that stand for a block in a sum that does not depend on order: inventories and tallies are made of it.

    Keyed by the volume, so that sums of two volumes never meet.
    """
    return xxh3_128_intdigest(b"%s/%d/%d/%s" % (volume.encode(), partition, block, root))
