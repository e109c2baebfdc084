"""Finding the records of a segment file without an index. Blocks: runs in one of the disk's threads.

A record whose header is valid is believed about its length, whatever its data: the next one follows it. After anything
else, a torn header, a punched or a never-written place, the next valid header is searched by its magic at the places
where one may begin; what is found must carry a checksum that is right for just this segment and offset.
"""

from typing import NamedTuple

import msgspec

from mendfs.blocks import page_checksums, root_of
from mendfs.data.record import (
    ALIGNMENT_BYTES,
    RECORD_HEADER_BYTES,
    RECORD_MAGIC,
    RecordHeader,
    align,
    decode_record,
)
from mendfs.model import MiB
from mendfs.world.disk import File

WINDOW_BYTES = 4 * MiB
"""Read at a time; grows for a record that is longer."""


class Found(NamedTuple):
    """A record with a valid header."""

    offset: int
    header: RecordHeader
    is_good: bool
    """Its data is whole and has its root."""


class Scan(msgspec.Struct):
    """What one segment holds from some place on."""

    records: list[Found]
    end: int
    """Where the last valid record ends, or where the scan began."""
    skipped_bytes: int
    """Between records: holes, punched or torn. Not what follows the last one."""


class _Window:
    """A moving view of a file."""

    def __init__(self, file: File, size: int) -> None:
        self.size = size
        self._file = file
        self._begin = 0
        self._buffer = bytearray(WINDOW_BYTES)
        self._length = 0

    def get(self, offset: int, length: int) -> memoryview:
        """`length` bytes from `offset`, fewer at the end of the file."""
        length = max(0, min(length, self.size - offset))
        if offset < self._begin or offset + length > self._begin + self._length:
            if length > len(self._buffer):
                self._buffer = bytearray(align(length))
            self._begin = offset
            self._length = self._file.read_into(self._buffer, offset)
        at = offset - self._begin
        return memoryview(self._buffer)[at : min(at + length, self._length)]

    def search(self, offset: int) -> int | None:
        """The next place at or after `offset` that holds the magic where a record may begin."""
        while self.get(offset, ALIGNMENT_BYTES):
            # Places are aligned and so are windows: no magic lies across the end of one. Searched without a copy, for
            # a torn block full of magics makes as many searches.
            at = self._buffer.find(RECORD_MAGIC, offset - self._begin, self._length)
            while at >= 0 and (self._begin + at) % ALIGNMENT_BYTES:
                at = self._buffer.find(RECORD_MAGIC, at + 1, self._length)
            if at >= 0:
                return self._begin + at
            offset = align(self._begin + self._length)
        return None


def scan(file: File, *, seed: int, begin: int) -> Scan:
    """Every record from `begin` on, which must be a place where one may begin, with headers and data checked."""
    window = _Window(file, file.size())
    found = Scan([], begin, 0)
    offset = begin
    while offset < window.size:
        header = decode_record(window.get(offset, RECORD_HEADER_BYTES), seed=seed, offset=offset)
        if header is None:
            after = window.search(offset + ALIGNMENT_BYTES)
            if after is None:
                break
            offset = after
            continue
        found.skipped_bytes += offset - found.end
        record = Found(offset, header, _is_good(window.get(offset, header.head_bytes + header.length), header))
        found.records.append(record)
        offset = found.end = offset + header.total_bytes
    return found


def _is_good(raw: memoryview, header: RecordHeader) -> bool:
    if len(raw) < header.head_bytes + header.length:
        return False
    stored = bytes(raw[RECORD_HEADER_BYTES : header.head_bytes])
    data = raw[header.head_bytes :]
    if page_checksums(data, header.page_size, header.kind) != stored:
        return False
    return root_of(stored, length=header.length, page_size=header.page_size, kind=header.kind) == header.root
