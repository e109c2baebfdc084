"""Reading records: pages for a reader, who verifies them, and whole blocks for ourselves.

What is in the page cache is read at once, in the event loop: a thread would take longer to wake up than the copy takes.
"""

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from mendfs.blocks import bad_pages, check_root, page_count
from mendfs.data.record import RECORD_HEADER_BYTES, decode_record, head_length
from mendfs.data.schema import Entry, Name
from mendfs.data.segment import Segment
from mendfs.data.watch import Watch
from mendfs.errors import BlockCorrupt
from mendfs.model import KiB, Volume
from mendfs.wire.peer import POOL

ONE_READ_BYTES_MAX = 64 * KiB
"""Up to here a record's head and data are read together; above, data goes into a buffer of the pool of its own."""


class Wanted(NamedTuple):
    """Pages of a block."""

    name: Name
    entry: Entry
    first_page: int
    page_count: int


class Pages(msgspec.Struct, frozen=True):
    """Pages as they are on the disk. `release` gives their memory back, if it is to be used again."""

    length: int
    """Of the whole block."""
    checksums: bytes
    """All page checksums of the block."""
    view: memoryview
    release: Callable[[], None] | None


async def read_pages(segment: Segment, wanted: Wanted, volume: Volume, watch: Watch) -> Pages:
    """Read head and pages; the header is checked, the pages are not. Raises BlockCorrupt."""
    entry = wanted.entry
    head = head_length(entry.length, volume.page_size, volume.checksum)
    first = wanted.first_page * volume.page_size
    count = min(wanted.page_count, page_count(entry.length, volume.page_size) - wanted.first_page)
    length = max(0, min(count * volume.page_size, entry.length - first))
    if first == 0 and head + length <= ONE_READ_BYTES_MAX:
        whole = memoryview(bytearray(head + length))
        await _fill(segment, whole, entry.offset, watch)
        checksums = _check_head(segment, wanted.name, entry, whole[:head])
        return Pages(entry.length, checksums, whole[head:], None)
    raw = bytearray(head)
    await _fill(segment, raw, entry.offset, watch)
    checksums = _check_head(segment, wanted.name, entry, raw)
    buffer = POOL.take(length)
    view = memoryview(buffer)[:length]
    # On an error or a cancellation the buffer is left to the collector: a thread may still be filling it.
    await _fill(segment, view, entry.offset + head + first, watch)

    def release() -> None:
        view.release()
        POOL.give(buffer)

    return Pages(entry.length, checksums, view, release)


async def _fill(segment: Segment, buffer: memoryview | bytearray, offset: int, watch: Watch) -> None:
    try:
        if segment.file.read_cached_into(buffer, offset):
            return
        watch.refuse_if_stuck()
        done = await watch.run(segment.file.read_into, buffer, offset)
    except OSError as error:
        raise watch.read_error(segment.number, error) from None
    if done < len(buffer):
        raise BlockCorrupt(f"segment {segment.number} ends inside the record at {offset}")


def _check_head(segment: Segment, name: Name, entry: Entry, head: memoryview | bytearray) -> bytes:
    """The page checksums, if the header in front of them is the one that the index speaks of."""
    header = decode_record(head, seed=segment.seed, offset=entry.offset)
    if header is None:
        raise BlockCorrupt(f"the record header at {entry.offset} of segment {segment.number} is damaged")
    if (header.partition, header.block) != name or header.root != entry.root or header.length != entry.length:
        raise BlockCorrupt(f"another block's record lies at {entry.offset} of segment {segment.number}")
    return bytes(head[RECORD_HEADER_BYTES:])


def verify(segment: Segment, name: Name, entry: Entry, volume: Volume) -> None:
    """Read a whole record and check everything. Blocks. Raises BlockCorrupt, saying what is wrong, OSError."""
    head = head_length(entry.length, volume.page_size, volume.checksum)
    raw = memoryview(bytearray(head + entry.length))
    done = segment.file.read_into(raw, entry.offset)
    if done < len(raw):
        raise BlockCorrupt(f"segment {segment.number} ends inside the record at {entry.offset}")
    _check_head(segment, name, entry, raw[:head])
    _check_data(raw[RECORD_HEADER_BYTES:], entry, volume)


def is_intact(raw: bytearray, entry: Entry, volume: Volume) -> bool:
    """Whether a record's page checksums and data, as they were read, are right."""
    try:
        _check_data(memoryview(raw), entry, volume)
    except BlockCorrupt:
        return False
    return True


def _check_data(raw: memoryview, entry: Entry, volume: Volume) -> None:
    """Check page checksums and data against the root. Raises BlockCorrupt."""
    at = head_length(entry.length, volume.page_size, volume.checksum) - RECORD_HEADER_BYTES
    checksums = bytes(raw[:at])
    check_root(checksums, entry.root, length=entry.length, page_size=volume.page_size, kind=volume.checksum)
    bad = bad_pages(raw[at:], checksums, first_page=0, page_size=volume.page_size, kind=volume.checksum)
    if bad:
        raise BlockCorrupt(f"{len(bad)} of {page_count(entry.length, volume.page_size)} pages fail their checksum")
