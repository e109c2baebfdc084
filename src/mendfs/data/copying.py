"""Giving back the space that punching cannot: a segment that takes more than twice what is needed of it is copied.

Records that are still needed go to the end of the store, are synced, and the index is switched to them in one batch;
that batch is synced before anything of the old file goes. A crash at any moment leaves the index pointing to one whole
copy. What was deleted or stored anew meanwhile is not switched, and its copy is punched out again. Bad records move
as they are (their good pages may be the last ones); what the disk cannot read stays where it is, and its file too.
"""

import asyncio
from collections.abc import Sequence

import msgspec
import structlog

from mendfs.data.append import AppendLog
from mendfs.data.index import BLOCKS_A_BATCH, Index, Move
from mendfs.data.reading import is_intact
from mendfs.data.record import RECORD_HEADER_BYTES, SEGMENT_HEADER_BYTES, encode_record, head_length, make_header
from mendfs.data.scanning import scan_headers
from mendfs.data.schema import FLAG_BAD, Entry, Name, Place
from mendfs.data.segment import Segment
from mendfs.data.syncing import Span, Syncing, punch
from mendfs.data.watch import Watch
from mendfs.errors import ReplicaError, StoreFailed
from mendfs.model import MiB, Volume

log = structlog.get_logger("data")

LOOK_EVERY_S = 1.0
WASTE_FACTOR = 2
"""A segment is copied when it takes more than this many times what is needed of it: each byte is copied once more at
most for every byte that was given back."""
ACTIVE_WASTE_BYTES_MIN = 4 * MiB
"""The segment written to is left for a new one only when there is this much to gain: else small stores would begin a
file a second."""
BATCH_BYTES_MAX = 8 * MiB
"""Copied between two syncs, unless one record is longer."""

Held = tuple[Name, Entry]


class Copier:
    """Copies the segments of one store, one at a time."""

    def __init__(
        self,
        index: Index,
        appending: AppendLog,
        syncing: Syncing,
        watch: Watch,
        *,
        volume: Volume,
        bytes_per_s: int,
    ) -> None:
        self.copied_segments = 0
        self._index = index
        self._append = appending
        self._syncing = syncing
        self._watch = watch
        self._volume = volume
        self._bytes_per_s = bytes_per_s
        self._one_at_a_time = asyncio.Lock()
        self._looked_at: dict[int, int] = {}
        """What was needed of a segment when it was found not worth copying, or could not be: not asked again before
        that changes."""

    async def run(self) -> None:
        """Until cancelled. Raises EngineFailed."""
        await self._index.count_usage()
        while True:
            if not await self.copy_one():
                await asyncio.sleep(LOOK_EVERY_S)

    async def copy_one(self) -> bool:
        """Copy the segment with the least to copy, if there is one; whether its file is gone now."""
        async with self._one_at_a_time:
            return await self._copy_one()

    async def _copy_one(self) -> bool:
        try:
            victim = self._choose()
            if victim is None:
                return False
            if victim.number >= self._append.last_number:
                # Never the highest number: a start after it was deleted would give it again.
                await self._append.begin_next()
            is_gone = await self._empty(victim)
        except OSError as error:
            self._watch.disk_error("cannot give space back", error)
            return False
        except ReplicaError as error:
            # Told to nobody else: what could not be copied now is where it was, and is tried again.
            log.warning("segment could not be copied", error=str(error))
            return False
        if not is_gone:
            self._looked_at[victim.number] = self._index.usage.of(victim.number)
        return is_gone

    # Which

    def _choose(self) -> Segment | None:
        assert self._index.usage.is_complete, "a segment whose records were not counted seems empty"
        wasted = [segment for segment in self._append.segments if self._is_wasted(segment)]
        return min(wasted, key=lambda segment: self._index.usage.of(segment.number), default=None)

    def _is_wasted(self, segment: Segment) -> bool:
        needed = self._index.usage.of(segment.number)
        if (
            segment.is_gone
            or segment.is_busy
            or not segment.is_measured
            or self._looked_at.get(segment.number) == needed
        ):
            return False
        if segment.is_failed:
            # The disk has failed there once, and health says so until what it holds lies elsewhere.
            return True
        if segment is self._append.active and segment.occupied - needed <= ACTIVE_WASTE_BYTES_MIN:
            return False
        return not segment.is_dirty and segment.occupied > WASTE_FACTOR * needed

    # Copying

    async def _empty(self, victim: Segment) -> bool:
        """Copy what is needed of it and delete its file. False: something could not be read, the file stays."""
        needed = self._index.usage.of(victim.number)
        unreadable: set[Name] = set()
        if needed:
            found = await self._watch.run(scan_headers, victim.file, seed=victim.seed, begin=SEGMENT_HEADER_BYTES)
            names = [(header.partition, header.block) for _, header in found]
            for start in range(0, len(names), BLOCKS_A_BATCH):
                held = await self._held(victim, names[start : start + BLOCKS_A_BATCH])
                await self._copy_held(victim, held, unreadable)
                await asyncio.sleep(0)
        if self._index.usage.of(victim.number):
            # Records whose headers are damaged are found by the index alone.
            await self._copy_held(victim, await self._index.in_segment(victim.number), unreadable)
        if self._index.usage.of(victim.number):
            return False
        return await self._retire(victim, copied_bytes=needed)

    async def _held(self, victim: Segment, names: Sequence[Name]) -> list[Held]:
        """Those that lie in this segment by the index."""
        entries = [(name, await self._index.find(*name)) for name in dict.fromkeys(names)]
        return [(name, entry) for name, entry in entries if entry is not None and entry.segment == victim.number]

    async def _copy_held(self, victim: Segment, held: Sequence[Held], unreadable: set[Name]) -> None:
        batch: list[Held] = []
        size = 0
        for name, entry in held:
            if name in unreadable:
                continue
            length = self._index.record_bytes(entry)
            if batch and (size + length > BATCH_BYTES_MAX or len(batch) == BLOCKS_A_BATCH):
                await self._copy_batch(victim, batch, unreadable)
                batch, size = [], 0
            batch.append((name, entry))
            size += length
        if batch:
            await self._copy_batch(victim, batch, unreadable)

    async def _copy_batch(self, victim: Segment, batch: Sequence[Held], unreadable: set[Name]) -> None:
        began_s = asyncio.get_running_loop().time()
        incarnation = self._syncing.incarnation
        copies: list[tuple[Move, Span]] = []
        for name, entry in batch:
            copy = await self._copy(victim, name, entry)
            if copy is None:
                unreadable.add(name)
            else:
                copies.append(copy)
        if not copies:
            return
        # Durable before the index is switched: the old record may be the only one that a power cut leaves.
        synced = await self._syncing.sync()
        if synced != incarnation or any(span[0].is_failed for _, span in copies):
            raise StoreFailed("a sync failed while records were copied; they stay where they were")
        moved = await self._index.move([move for move, _ in copies])
        for move, old in moved:
            self._count_change(move, old)
        # Durable before the old records go, and not before: until then a power cut brings the old index back.
        await self._index.engine.sync()
        names = {move.name for move, _ in moved}
        dead = [span for move, span in copies if move.name not in names]
        dead += [(victim, move.old.offset, self._index.record_bytes(old)) for move, old in moved]
        await punch(self._watch, dead)
        size = sum(span[2] for _, span in copies)
        await asyncio.sleep(max(0.0, began_s + size / self._bytes_per_s - asyncio.get_running_loop().time()))

    async def _copy(self, victim: Segment, name: Name, entry: Entry) -> tuple[Move, Span] | None:
        """Write a record once more, at the end of the store. None: the disk cannot read it."""
        try:
            raw, is_good = await self._watch.run(_read, victim, entry, self._volume)
        except OSError as error:
            self._watch.read_error(victim.number, error)
            return None
        length = self._index.record_bytes(entry)
        segment, offset = await self._append.reserve(length, is_copy=True)
        # After a cancellation too: the thread goes on, and nobody else may write to that place.
        is_written = True
        try:
            await self._watch.run_writing(_write, segment, offset, name, entry, raw, self._volume)
            segment.written(offset, length, name)
        except OSError as error:
            is_written = False
            raise self._watch.disk_error("cannot copy a record", error) from None
        finally:
            segment.settle(offset, is_written=is_written)
        if segment.is_failed:
            raise StoreFailed(f"segment {segment.number} could not be synced; its copies were given up")
        flags = entry.flags & ~FLAG_BAD if is_good else entry.flags | FLAG_BAD
        place = Place(segment.number, offset)
        moved = msgspec.structs.replace(entry, segment=place.segment, offset=place.offset, flags=flags)
        return Move(name, entry.place, moved), (segment, offset, length)

    def _count_change(self, move: Move, old: Entry) -> None:
        """Reading it has shown that it is bad, or is not."""
        if old.is_good and not move.entry.is_good:
            self._watch.count_out(self._index.record_bytes(old))
            self._watch.corrupt_found += 1
            log.error("block is damaged", partition=move.name[0], block=move.name[1], segment=old.segment)
        elif move.entry.is_good and not old.is_good:
            self._watch.count_in(self._index.record_bytes(old))

    async def _retire(self, victim: Segment, *, copied_bytes: int) -> bool:
        """Delete the file of a segment of which nothing is needed."""
        # Nobody shall take it for deleted under us; and no await since the usage was looked at, so nobody needs it.
        victim.is_gone = True
        # The index's deletions must be as durable as the file's: else a power cut leaves entries without a file.
        await self._index.engine.sync()
        try:
            await self._watch.run_writing(self._append.segments.delete, victim)
        except FileNotFoundError:
            log.warning("segment was deleted already", segment=victim.number)
        except OSError:
            victim.is_gone = False
            raise
        self._append.segments.drop(victim)
        # Whoever reads from it may end; then the disk has its space to free.
        await self._watch.run(victim.file.close)
        # Last: a file that the index does not know is searched at the next start, and what was deleted found again.
        await self._index.set_segment(victim.number, None)
        self._looked_at.pop(victim.number, None)
        self._watch.relieve(f"sync {victim.number}")
        self._watch.relieve(f"read {victim.number}")
        self.copied_segments += 1
        log.info("segment copied", segment=victim.number, bytes_copied=copied_bytes, bytes_freed=victim.occupied)
        return True


def _read(segment: Segment, entry: Entry, volume: Volume) -> tuple[bytearray, bool]:
    """Page checksums and data as they are, zeros where the file has ended, and whether they are right. Blocks."""
    checksums = head_length(entry.length, volume.page_size, volume.checksum) - RECORD_HEADER_BYTES
    raw = bytearray(checksums + entry.length)
    segment.file.read_into(raw, entry.offset + RECORD_HEADER_BYTES)
    return raw, is_intact(raw, entry, volume)


def _write(segment: Segment, offset: int, name: Name, entry: Entry, raw: bytearray, volume: Volume) -> None:
    """The record at its new place: its header is made anew, for it speaks of its place. Blocks."""
    header = make_header(*name, entry.inode, entry.slot, entry.length, entry.root, volume.page_size, volume.checksum)
    segment.file.write((encode_record(header, seed=segment.seed, offset=offset), raw), offset)
