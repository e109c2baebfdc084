"""Segment files: appending to them, and where the last sync left them.

A position is reserved synchronously, so several writes may be under way at once, each in a place of its own; whatever
becomes of one, the records behind it can be found (a hole or a torn record is skipped by its length or by search).
"""

import posixpath
from collections.abc import Iterator
from typing import NamedTuple

from mendfs.data.index import Name
from mendfs.data.record import (
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    decode_segment,
    encode_segment,
    seed_of,
)
from mendfs.data.schema import Place
from mendfs.world.disk import Disk, File

SUFFIX = ".seg"


class Written(NamedTuple):
    """A record that is in the index but perhaps not on the disk."""

    place: Place
    name: Name
    length: int


class Segment:
    """One open segment file."""

    def __init__(self, header: SegmentHeader, file: File, position: int) -> None:
        self.number = header.number
        self.id = header.id
        self.file = file
        self.seed = seed_of(header.id)
        self.position = position
        """Where the next record begins."""
        self.is_dirty = False
        """Something was written since the last sync began."""
        self.is_named = True
        """Its name in the directory is durable."""
        self.is_failed = False
        """A sync failed: nothing is written to it, and writes under way do not count."""
        self.is_gone = False
        """Its file was deleted under us: still readable, until this process ends."""
        self._in_flight: dict[int, int] = {}
        self._unsynced: list[Written] = []

    def reserve(self, length: int) -> int:
        """The offset of a record of `length` bytes, which is in flight until `settle`."""
        offset = self.position
        self.position += length
        self._in_flight[offset] = length
        return offset

    def settle(self, offset: int, *, is_written: bool) -> None:
        """The write at `offset` is over, well or not."""
        length = self._in_flight.pop(offset)
        if not is_written and offset + length == self.position:
            # Nothing follows it: its place is used again, which also buries what a failed write left there.
            self.position = offset

    def written(self, offset: int, length: int, name: Name) -> None:
        """The record at `offset` is written and in the index."""
        self._unsynced.append(Written(Place(self.number, offset), name, length))
        self.is_dirty = True

    def take_unsynced(self) -> list[Written]:
        """A sync begins: what it covers. What is written from now on is the next one's."""
        taken, self._unsynced = self._unsynced, []
        self.is_dirty = False
        return taken

    @property
    def settled_end(self) -> int:
        """Everything before it has been written, or never will be."""
        return next(iter(self._in_flight), self.position)

    @property
    def is_busy(self) -> bool:
        """Whether a write is under way."""
        return bool(self._in_flight)

    def sync(self) -> None:
        """Blocks. A file without a name is no durable one: its loss is told at once, not after the next power cut."""
        self.file.datasync()
        if not self.file.is_linked():
            raise FileNotFoundError(2, "the segment file was deleted", f"segment {self.number}")


class Segments:
    """All segment files of a store, by number."""

    def __init__(self, disk: Disk, folder: str) -> None:
        self._disk = disk
        self.folder = folder
        self._open: dict[int, Segment] = {}

    def __iter__(self) -> Iterator[Segment]:
        return iter(self._open.values())

    def get(self, number: int) -> Segment | None:
        """An open segment."""
        return self._open.get(number)

    def add(self, segment: Segment) -> None:
        """A segment that was opened."""
        self._open[segment.number] = segment

    def path(self, number: int) -> str:
        """The file of a segment."""
        return posixpath.join(self.folder, f"{number:010}{SUFFIX}")

    def present(self) -> list[int]:
        """Numbers of the files that are there. Other names are nobody's business."""
        stems = [name.removesuffix(SUFFIX) for name in self._disk.names(self.folder) if name.endswith(SUFFIX)]
        return sorted(int(stem) for stem in stems if stem.isascii() and stem.isdigit())

    def open(self, number: int) -> tuple[File, SegmentHeader]:
        """Open a file and read its header. Blocks. Raises StoreDamaged, OSError."""
        path = self.path(number)
        file = self._disk.open(path)
        raw = bytearray(SEGMENT_HEADER_BYTES)
        length = file.read_into(raw, 0)
        try:
            return file, decode_segment(raw[:length], path)
        except BaseException:
            file.close()
            raise

    def open_damaged(self, number: int) -> File:
        """Open a file whose header is known from elsewhere."""
        return self._disk.open(self.path(number))

    def create(self, header: SegmentHeader) -> Segment:
        """Make a file. Blocks. Its name is not durable before `sync_names`."""
        path = self.path(header.number)
        # Somebody may have deleted the folder under us: what is stored from now on needs one again.
        self._disk.make_directories(self.folder)
        file = self._disk.open(path, create=True)
        try:
            file.write((encode_segment(header),), 0)
        except OSError:
            file.close()
            self._disk.unlink(path)
            raise
        segment = Segment(header, file, SEGMENT_HEADER_BYTES)
        segment.is_named = False
        segment.is_dirty = True
        return segment

    def sync_names(self) -> None:
        """Make the names of new files durable. Blocks."""
        self._disk.sync_directory(self.folder)

    def vanished(self) -> list[Segment]:
        """Those whose file was deleted since they were opened."""
        return [segment for segment in self if not segment.is_gone and not segment.file.is_linked()]

    def close(self) -> None:
        """Close all files."""
        for segment in self:
            segment.file.close()
