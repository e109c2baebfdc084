"""Segment files: appending to them, and where the last sync left them.

A position is reserved synchronously, so several writes may be under way at once, each in a place of its own; whatever
becomes of one, the records behind it can be found (a hole or a torn record is skipped by its length or by search).
"""

import errno
import posixpath
from collections.abc import Iterator
from typing import NamedTuple

from mendfs.data.files import OpenFiles, SegmentFile
from mendfs.data.record import (
    SEGMENT_HEADER_BYTES,
    SegmentHeader,
    decode_segment,
    encode_segment,
    seed_of,
)
from mendfs.data.schema import Name, Place
from mendfs.errors import StoreDamaged
from mendfs.world.disk import Disk

SUFFIX = ".seg"
NAME_DIGITS = 10


class Written(NamedTuple):
    """A record that is in the index but perhaps not on the disk."""

    place: Place
    name: Name
    length: int


class Segment:
    """One segment file."""

    def __init__(self, header: SegmentHeader, file: SegmentFile, position: int) -> None:
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
        """Its file was deleted: under us (still readable while it is open), or by us after it was copied."""
        self.is_measured = False
        """Since it was last asked what it occupies, nothing was written to it or punched out of it."""
        self.occupied = 0
        """Bytes of the disk it took when it was measured."""
        self._in_flight: dict[int, int] = {}
        self._unsynced: list[Written] = []

    def reserve(self, length: int) -> int:
        """The offset of a record of `length` bytes, which is in flight until `settle`."""
        offset = self.position
        self.position += length
        self.is_measured = False
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

    def synced(self) -> None:
        """A sync went well: without writes since it began, its file need not stay open."""
        if not self.is_dirty and not self.is_busy:
            self.file.is_pinned = False

    def punch(self, offset: int, length: int) -> None:
        """Give space back. Blocks."""
        self.is_measured = False
        self.file.punch(offset, length)

    def measure(self) -> None:
        """Ask what it occupies. Blocks."""
        # Before the question: what is written meanwhile makes the answer old.
        self.is_measured = True
        try:
            self.occupied = self.file.allocated()
        except OSError:
            self.is_measured = False
            raise

    def sync(self) -> None:
        """Blocks. A file without a name is no durable one: its loss is told at once, not after the next power cut."""
        self.file.datasync()
        if not self.file.is_linked():
            raise FileNotFoundError(2, "the segment file was deleted", f"segment {self.number}")


class Segments:
    """All segment files of a store, by number."""

    def __init__(self, disk: Disk, folder: str, files: OpenFiles) -> None:
        self._disk = disk
        self._files = files
        self.folder = folder
        self._segments: dict[int, Segment] = {}

    def __iter__(self) -> Iterator[Segment]:
        return iter(list(self._segments.values()))

    def get(self, number: int) -> Segment | None:
        """A segment whose file is there."""
        return self._segments.get(number)

    def add(self, segment: Segment) -> None:
        """A segment that was opened."""
        self._segments[segment.number] = segment

    def path(self, number: int) -> str:
        """The file that a segment is made in."""
        return posixpath.join(self.folder, f"{number:010}{SUFFIX}")

    def present(self) -> list[int]:
        """Numbers of the files that are there, by their names. Other names are nobody's business."""
        stems = [name.removesuffix(SUFFIX) for name in self._disk.names(self.folder) if name.endswith(SUFFIX)]
        numbers = {int(stem) for stem in stems if stem.isascii() and stem.isdigit() and len(stem) == NAME_DIGITS}
        return sorted(number for number in numbers if 0 < number < 1 << 32)

    def look_at_disk(self, first: int) -> None:
        """Write what is dirty of the files numbered `first` or higher, and forget what memory has of them. Blocks.

        After a sync that failed the system keeps the pages, calls them clean, and shows them to every later process,
        but no later sync writes them: a start that believed them would acknowledge what the next power cut takes.
        """
        for number in self.present():
            if number >= first:
                file = self._files.open(self.path(number))
                try:
                    file.datasync()
                    file.forget_cached(0, 0)
                finally:
                    file.close()

    def open(self, number: int) -> tuple[SegmentFile, SegmentHeader]:
        """Open the file named after `number` and read its header. Blocks. Raises StoreDamaged, OSError."""
        path = self.path(number)
        file = self._files.open(path)
        raw = bytearray(SEGMENT_HEADER_BYTES)
        try:
            return file, decode_segment(raw[: _read_header(file, raw, path)], path)
        except BaseException:
            file.close()
            raise

    def open_damaged(self, number: int) -> tuple[SegmentFile, bytes]:
        """Open a file whose header is known from elsewhere, or must be guessed. Blocks."""
        file = self._files.open(self.path(number))
        raw = bytearray(SEGMENT_HEADER_BYTES)
        try:
            _read_header(file, raw, file.path)
        except StoreDamaged:
            raw = bytearray(SEGMENT_HEADER_BYTES)
        return file, bytes(raw)

    def create(self, header: SegmentHeader) -> Segment:
        """Make a file. Blocks. Its name is not durable before `sync_names`."""
        path = self.path(header.number)
        # Somebody may have deleted the folder under us: what is stored from now on needs one again.
        self._disk.make_directories(self.folder)
        file = self._files.open(path, create=True)
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
        """Those whose file was deleted under us. Blocks; one listing, however many there are."""
        # In this order: a file made after the listing must not be missed in it.
        segments = [segment for segment in self if not segment.is_gone]
        try:
            names = set(self._disk.names(self.folder))
        except FileNotFoundError:
            names = set()
        return [segment for segment in segments if posixpath.basename(segment.file.path) not in names]

    def measure(self) -> None:
        """Ask what those occupy that were changed since the last time. Blocks."""
        for segment in self:
            if not segment.is_measured and not segment.is_gone:
                segment.measure()

    @property
    def occupied(self) -> int:
        """Bytes of the disk that all of them took when they were measured."""
        return sum(segment.occupied for segment in self._segments.values() if not segment.is_gone)

    def delete(self, segment: Segment) -> None:
        """Delete the file of a segment that nobody needs any more, durably. Blocks."""
        self._disk.unlink(segment.file.path)
        self._disk.sync_directory(self.folder)

    def drop(self, segment: Segment) -> None:
        """It is no segment of this store any more. Its file is to be closed, in a thread: what is deleted goes then."""
        del self._segments[segment.number]

    def close(self) -> None:
        """Close all files. Blocks."""
        for segment in self:
            segment.file.close()


def _read_header(file: SegmentFile, into: bytearray, path: str) -> int:
    """Bytes read. A header that the disk cannot read is as damaged as one that fails its checksum."""
    try:
        return file.read_into(into, 0)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise StoreDamaged(f"the header of segment {path} cannot be read: {error.strerror}") from None
