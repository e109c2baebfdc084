"""Finding the records of a segment file without an index. Blocks: runs in one of the disk's threads.

A record whose header is valid is believed about its length, whatever its data: the next one follows it. After anything
else, a torn header, a punched or a never-written place, the next valid header is searched by its magic at the places
where one may begin; what is found must carry a checksum that is right for just this segment and offset.
"""

import errno
from collections.abc import Iterator
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
from mendfs.model import KiB, MiB
from mendfs.world.disk import File

WINDOW_BYTES = 4 * MiB
"""Read at a time; grows for a record that is longer."""
HEADERS_WINDOW_BYTES = 64 * KiB
"""Read at a time when only headers are wanted: most of what lies between them is skipped."""
SECTOR_BYTES = 4096
"""What is left out where the disk reports an error: it reads and fails in units of this."""


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
    unreadable_bytes: int = 0
    """What the disk could not read was taken for zeros."""


class _Window:
    """A moving view of a file."""

    def __init__(self, file: File, size: int, window_bytes: int = WINDOW_BYTES) -> None:
        self.size = size
        self.unreadable_bytes = 0
        self._file = file
        self._begin = 0
        self._buffer = bytearray(align(min(window_bytes, max(size, 1))))
        self._length = 0

    def get(self, offset: int, length: int) -> memoryview:
        """`length` bytes from `offset`, fewer at the end of the file."""
        length = max(0, min(length, self.size - offset))
        if offset < self._begin or offset + length > self._begin + self._length:
            if length > len(self._buffer):
                self._buffer = bytearray(align(length))
            self._begin = offset
            self._length = self._read(offset)
        at = offset - self._begin
        return memoryview(self._buffer)[at : min(at + length, self._length)]

    def _read(self, offset: int) -> int:
        try:
            return self._file.read_into(self._buffer, offset)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        # Around what the disk cannot read there is more that it can: one bad sector must not cost the whole store.
        view = memoryview(self._buffer)
        length = min(len(view), self.size - offset)
        for begin in range(0, length, SECTOR_BYTES):
            part = view[begin : min(begin + SECTOR_BYTES, length)]
            try:
                self._file.read_into(part, offset + begin)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                part[:] = bytes(len(part))
                self.unreadable_bytes += len(part)
        return length

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
    for offset, header in _headers(window, seed=seed, begin=begin):
        found.skipped_bytes += offset - found.end
        record = Found(offset, header, _is_good(window.get(offset, header.head_bytes + header.length), header))
        found.records.append(record)
        found.end = offset + header.total_bytes
    found.unreadable_bytes = window.unreadable_bytes
    return found


def scan_headers(file: File, *, seed: int, begin: int) -> list[tuple[int, RecordHeader]]:
    """Offset and header of every record from `begin` on whose header is valid; its data is not looked at."""
    return list(_headers(_Window(file, file.size(), HEADERS_WINDOW_BYTES), seed=seed, begin=begin))


def _headers(window: _Window, *, seed: int, begin: int) -> Iterator[tuple[int, RecordHeader]]:
    offset = begin
    while offset < window.size:
        header = decode_record(window.get(offset, RECORD_HEADER_BYTES), seed=seed, offset=offset)
        if header is not None:
            yield offset, header
            offset += header.total_bytes
            continue
        after = window.search(offset + ALIGNMENT_BYTES)
        if after is None:
            return
        offset = after


def _is_good(raw: memoryview, header: RecordHeader) -> bool:
    if len(raw) < header.head_bytes + header.length:
        return False
    stored = bytes(raw[RECORD_HEADER_BYTES : header.head_bytes])
    data = raw[header.head_bytes :]
    if page_checksums(data, header.page_size, header.kind) != stored:
        return False
    return root_of(stored, length=header.length, page_size=header.page_size, kind=header.kind) == header.root
