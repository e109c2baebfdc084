"""Opening a store: what is in the segment files, and which of the index can be believed (design section 4).

The index is a cache. What lies before the checkpoint is on the disk and in the index; what was entered past it is only
believed when the record is there, whole, header *and data*. After kill -9 that is all of it: files and the index's log
are in the page cache. After a power cut it is what reached the disk. A store without its index is scanned whole.
"""

import asyncio
from collections.abc import Mapping, Sequence

import msgspec
import structlog

from mendfs.data import schema
from mendfs.data.files import SegmentFile
from mendfs.data.index import Index, Journalled
from mendfs.data.record import SEGMENT_HEADER_BYTES, SegmentHeader, align, decode_segment_copy, encode_segment, ids_in
from mendfs.data.scanning import Found, Scan, scan, scan_headers
from mendfs.data.schema import Entry, Fence, Name, Place
from mendfs.data.segment import Segment, Segments
from mendfs.data.watch import Watch
from mendfs.errors import StoreDamaged
from mendfs.model import CommitSequence, Generation, Volume, generation_of

log = structlog.get_logger("data")

START = Place(0, 0)


class Report(msgspec.Struct):
    """What was found; the log says it."""

    segments: int = 0
    scanned: int = 0
    records: int = 0
    added: int = 0
    dropped: int = 0
    bad: int = 0
    lost: int = 0
    """Blocks whose file is gone."""
    unreadable_bytes: int = 0
    skipped_bytes: int = 0
    cut_bytes: int = 0
    index_was_whole: bool = True


class Recovered(msgspec.Struct):
    """A store ready for use."""

    active: Segment | None
    last_number: int
    checkpoint: Place
    report: Report


class _Opened(msgspec.Struct):
    """A segment file found in the folder."""

    segment: Segment
    is_closed: bool
    is_known: bool
    """To the index."""


class Recovery:
    """One opening of one store."""

    def __init__(
        self, segments: Segments, index: Index, watch: Watch, *, volume: Volume, server: bytes, segment_bytes: int
    ) -> None:
        self._segments = segments
        self._index = index
        self._watch = watch
        self._volume = volume
        self._server = server
        self._segment_bytes = segment_bytes
        self._report = Report()
        self._verified: set[Place] = set()
        """Where this recovery has found a whole record."""

    async def run(self) -> Recovered:
        """Open everything. Raises StoreDamaged when the folder is another store's, OSError."""
        mark, expected = await self._index.mark(), schema.encode_mark(self._server, bytes.fromhex(self._volume.id))
        if mark is not None and mark != expected:
            raise StoreDamaged(f"the index beside {self._segments.folder} belongs to another server or volume")
        self._report.index_was_whole = mark is not None
        checkpoint = await self._index.checkpoint() if mark is not None else None
        begin = checkpoint or START
        await self._watch.run(self._segments.look_at_disk, begin.segment)
        opened = await self._open_files()
        scans = await self._scan_all(opened, begin)
        await self._enter(scans, begin, is_whole=mark is not None)
        active, last = await self._choose_active(opened)
        end = Place(active.number, active.position) if active else Place(last + 1, SEGMENT_HEADER_BYTES)
        await self._index.set_checkpoint(begin, end)
        if mark is None:
            await self._raise_fence(scans)
            await self._index.set_mark(self._server, bytes.fromhex(self._volume.id))
        log.info("store opened", **msgspec.structs.asdict(self._report))
        return Recovered(active, last, end, self._report)

    # Files

    async def _open_files(self) -> list[_Opened]:
        known = await self._index.segments()
        for number in await self._watch.run(self._segments.present):
            segment = await self._open_file(number, known)
            if segment is not None and self._claims(segment, known):
                self._segments.add(segment)
        for number in sorted(known.keys() - {segment.number for segment in self._segments}):
            await self._forget(number)
        opened = []
        for segment in sorted(self._segments, key=lambda each: each.number):
            is_known = segment.number in known
            if is_known and known[segment.number][0] != segment.id:
                # Another file than the one that the index speaks of, of the same number: what was there is gone, and
                # what is here was never looked at.
                log.error("segment file is not the one that the index knows", segment=segment.number)
                await self._forget(segment.number)
                is_known = False
            if not is_known:
                await self._index.set_segment(segment.number, segment.id)
            is_closed = is_known and known[segment.number][1]
            opened.append(_Opened(segment, is_closed, is_known and self._report.index_was_whole))
        self._report.segments = len(opened)
        return opened

    def _claims(self, segment: Segment, known: Mapping[int, tuple[bytes, bool]]) -> bool:
        """Whether this file is the segment that its header says, if two files say that they are."""
        path, right_path = segment.file.path, self._segments.path(segment.number)
        if path != right_path:
            log.error("segment file has another one's name", path=path, segment=segment.number)
        other = self._segments.get(segment.number)
        if other is None:
            return True
        expected = known[segment.number][0] if segment.number in known else None
        is_better = (segment.id == expected, path == right_path) > (other.id == expected, other.file.path == right_path)
        left = other if is_better else segment
        text = f"{left.file.path} says that it is segment {left.number}, as another file does: left alone; move it away"
        self._watch.trouble(f"twice {left.file.path}", text)
        if is_better:
            self._segments.drop(other)
        left.file.close()
        return is_better

    async def _open_file(self, number: int, known: Mapping[int, tuple[bytes, bool]]) -> Segment | None:
        try:
            file, header = await self._watch.run(self._segments.open, number)
        except StoreDamaged as error:
            return await self._open_damaged(number, known.get(number), error)
        if header.server != self._server or header.volume != bytes.fromhex(self._volume.id):
            file.close()
            raise StoreDamaged(
                f"{self._segments.path(number)} belongs to server {header.server.hex()} of volume "
                f"{header.volume.hex()}; this folder's is {self._server.hex()} of {self._volume.id}: move it away"
            )
        return await self._segment(header, file)

    async def _segment(self, header: SegmentHeader, file: SegmentFile) -> Segment:
        return Segment(header, file, max(SEGMENT_HEADER_BYTES, align(await self._watch.run(file.size))))

    async def _open_damaged(self, number: int, known: tuple[bytes, bool] | None, error: StoreDamaged) -> Segment | None:
        file, raw = await self._watch.run(self._segments.open_damaged, number)
        # The id is what counts: with it each record says for itself whether it is one. The index has it; without, the
        # header's copy or even its damaged bytes may, and then some record proves it.
        is_known = known is not None
        candidates = [known[0]] if known is not None else ids_in(raw)
        try:
            copy = decode_segment_copy(raw, file.path)
        except StoreDamaged:
            pass
        else:
            if copy == self._header(number, copy.id):
                is_known, candidates = True, [copy.id]
        for candidate in candidates:
            header = self._header(number, candidate)
            segment = await self._segment(header, file)
            if not is_known:
                found = await self._watch.run(scan_headers, file, seed=segment.seed, begin=SEGMENT_HEADER_BYTES)
                if not found:
                    continue
            # A power cut can also tear the header of a segment whose first sync never came: it must be right before
            # more is appended.
            log.error("segment header damaged, written again", segment=number, error=str(error))
            await self._watch.run(file.write, (encode_segment(header),), 0)
            await self._watch.run(file.datasync)
            file.is_pinned = False
            return segment
        file.close()
        # With a whole index: made just before a power cut, and nothing in it was ever synced. Without one, no record in
        # it can be told from garbage, for the random id is lost.
        log.error("segment left alone", segment=number, error=str(error))
        if not self._report.index_was_whole:
            self._watch.trouble(f"segment {number}", f"{error}; its records cannot be found again")
        return None

    def _header(self, number: int, segment_id: bytes) -> SegmentHeader:
        return SegmentHeader(
            number,
            segment_id,
            bytes.fromhex(self._volume.id),
            self._server,
            self._volume.checksum,
            self._volume.page_size,
        )

    async def _forget(self, number: int) -> None:
        """A file that the index knows is not there any more."""
        held = await self._index.in_segment(number)
        await self._index.remove([name for name, _ in held])
        await self._index.set_segment(number, None)
        if held:
            path = self._segments.path(number)
            self._report.lost += len(held)
            text = f"{path} is gone: its {len(held)} blocks must come from other servers"
            self._watch.trouble(f"gone {number}", text)

    # Records

    async def _scan_all(self, opened: Sequence[_Opened], begin: Place) -> list[tuple[Segment, Scan]]:
        scans = []
        for each in opened:
            segment = each.segment
            begin_here = SEGMENT_HEADER_BYTES
            if each.is_known:
                if each.is_closed or segment.number < begin.segment:
                    continue
                if segment.number == begin.segment:
                    begin_here = max(begin.offset, SEGMENT_HEADER_BYTES)
            found = await self._watch.run(scan, segment.file, seed=segment.seed, begin=begin_here)
            await self._cut(segment, found.end, is_known=each.is_known)
            # Before anything found is entered: what the index says of it must not outlive the record in a power cut.
            await self._watch.run(segment.sync)
            segment.synced()
            scans.append((segment, found))
        if scans:
            await self._watch.run(self._segments.sync_names)
        return scans

    async def _cut(self, segment: Segment, end: int, *, is_known: bool) -> None:
        """Cut what follows the last valid record, if the scan began at the last synced place: none of it was synced."""
        size = await self._watch.run(segment.file.size)
        if is_known and size > end:
            self._report.cut_bytes += size - end
            await self._watch.run(segment.file.truncate, end)
            size = end
        segment.position = max(end, align(size))

    async def _enter(self, scans: Sequence[tuple[Segment, Scan]], begin: Place, *, is_whole: bool) -> None:
        """Make the index say what was found past the checkpoint, no more and no less."""
        journal = await self._index.journal(begin) if is_whole else []
        believed: set[Journalled] = set()
        for segment, found in scans:
            self._report.scanned += 1
            self._report.records += len(found.records)
            self._report.skipped_bytes += found.skipped_bytes
            self._report.unreadable_bytes += found.unreadable_bytes
            if found.unreadable_bytes:
                text = f"{found.unreadable_bytes} bytes of segment {segment.number} cannot be read: replace the disk"
                self._watch.trouble(f"read {segment.number}", text)
            for record in found.records:
                name: Name = (record.header.partition, record.header.block)
                if record.is_good:
                    believed.add(Journalled(Place(segment.number, record.offset), name))
        self._verified = {record.place for record in believed}
        dropped = await self._index.drop([entry for entry in journal if entry not in believed])
        self._report.dropped = len(dropped)
        for segment, found in scans:
            for record in found.records:
                await self._enter_record(segment, record, is_whole=is_whole)
            await asyncio.sleep(0)

    async def _enter_record(self, segment: Segment, record: Found, *, is_whole: bool) -> None:
        header = record.header
        name: Name = (header.partition, header.block)
        if not record.is_good:
            self._report.bad += 1
            # Past a checkpoint it was torn, and nobody was told that it is durable. In a full scan it may have rotten:
            # then its good pages can still serve, though the block does not count as held.
            if is_whole:
                return
        old = await self._index.find(*name)
        place = Place(segment.number, record.offset)
        if old is not None and old.place != place and old.root != header.root:
            log.error("two contents under one id", partition=name[0], block=name[1], segment=segment.number)
            return
        if old is not None and (old.place == place or not record.is_good or self._is_as_good(old)):
            return
        flags = 0 if record.is_good else schema.FLAG_BAD
        entry = Entry(*place, header.length, header.inode, header.slot, flags, header.root)
        await self._index.add(name, entry, is_synced=True)
        self._report.added += 1

    def _is_as_good(self, old: Entry) -> bool:
        """Whether an entry was found right by this recovery. One that was not may be of an older index, and the record
        it speaks of copied to where the scan has just found it."""
        return old.is_good and old.place in self._verified

    async def _raise_fence(self, scans: Sequence[tuple[Segment, Scan]]) -> None:
        """The fence was lost with the index: orders of generations before those of the blocks are still refused."""
        seen = (generation_of(record.header.block) for _, found in scans for record in found.records)
        fence = Fence(max(seen, default=Generation(0)), CommitSequence(0))
        if fence > await self._index.fence():
            await self._index.set_fence(fence)

    async def _choose_active(self, opened: Sequence[_Opened]) -> tuple[Segment | None, int]:
        """The segment to go on with, if the last one has room, and the highest number that is taken."""
        last = max([*await self._watch.run(self._segments.present), *(await self._index.segments())], default=0)
        if opened and opened[-1].segment.number == last:
            segment = opened[-1].segment
            if not opened[-1].is_closed and segment.position < self._segment_bytes:
                return segment, last
        return None, last
