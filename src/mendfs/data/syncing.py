"""Making records durable, and what follows when that fails (design section 4).

One fdatasync a dirty segment for all who wait. After a failed one the kernel has dropped the pages and a second try
would succeed without having written anything: so every record since the last good sync leaves the index, the segment is
closed, and the store goes on in a new one under a new incarnation, so that no acknowledgement of a lost put counts.
"""

import asyncio
import random

import structlog

from mendfs.data.append import AppendLog
from mendfs.data.index import Index, Journalled
from mendfs.data.schema import Place
from mendfs.data.segment import Segment, Written
from mendfs.data.watch import Watch
from mendfs.errors import EngineFailed, StoreFailed
from mendfs.kv.group import GroupCommit
from mendfs.model import Incarnation

log = structlog.get_logger("data")

Span = tuple[Segment, int, int]
"""A record's segment, offset and length."""


class Syncing:
    """The syncs of one store."""

    def __init__(
        self, appending: AppendLog, index: Index, watch: Watch, rng: random.Random, *, checkpoint: Place
    ) -> None:
        self.incarnation = draw_incarnation(rng)
        self._append = appending
        self._index = index
        self._watch = watch
        self._rng = rng
        self._checkpoint = checkpoint
        self._group = GroupCommit(self._sync_all)
        self._is_syncing = False
        self._dead: list[Span] = []

    @property
    def is_dirty(self) -> bool:
        """Whether anything would be lost in a power cut."""
        return self._is_syncing or any(segment.is_dirty for segment in self._append.segments)

    async def sync(self) -> Incarnation:
        """Make everything put before durable. Raises StoreFailed."""
        if not self.is_dirty:
            return self.incarnation
        return await self._group.wait()

    async def close(self) -> None:
        """Wait for a sync under way."""
        await self._group.idle()

    def punch_after_sync(self, segment: Segment, offset: int, length: int) -> None:
        """A record that a newer one replaces: its space goes only when the newer one is durable."""
        self._dead.append((segment, offset, length))

    async def _sync_all(self) -> Incarnation:
        self._is_syncing = True
        try:
            return await self._sync_dirty()
        finally:
            self._is_syncing = False

    async def _sync_dirty(self) -> Incarnation:
        # Noted before anything is synced: a write that ends meanwhile is the next sync's.
        end, incarnation = self._append.end, self.incarnation
        dead, self._dead = self._dead, []
        dirty = [(segment, segment.take_unsynced()) for segment in self._append.segments if segment.is_dirty]
        names = await self._sync_names([segment for segment, _ in dirty if not segment.is_named])
        results = await asyncio.gather(*(self._sync_one(segment, names) for segment, _ in dirty))
        failed = [
            (segment, taken, error) for (segment, taken), error in zip(dirty, results, strict=True) if error is not None
        ]
        if failed:
            for segment, taken, error in failed:
                await self.give_up(segment, taken, error)
            raise StoreFailed(f"the disk could not be synced: {failed[0][2].strerror or failed[0][2]}")
        if end > self._checkpoint:
            await self._move_checkpoint(end)
        await punch(self._watch, dead)
        return incarnation

    async def _move_checkpoint(self, end: Place) -> None:
        try:
            await self._index.set_checkpoint(self._checkpoint, end)
        except EngineFailed as error:
            # What was put is durable all the same: from the old checkpoint on a start finds it without the index.
            log.warning("the checkpoint stays where it was", error=str(error))
        else:
            self._checkpoint = end

    async def _sync_names(self, segments: list[Segment]) -> OSError | None:
        # Before the data: records that are durable in a file without a durable name are lost with it.
        if not segments:
            return None
        try:
            await self._watch.run(self._append.segments.sync_names)
        except OSError as error:
            return error
        for segment in segments:
            segment.is_named = True
        return None

    async def _sync_one(self, segment: Segment, names: OSError | None) -> OSError | None:
        if not segment.is_named and names is not None:
            return names
        try:
            await self._watch.run_writing(segment.sync)
        except OSError as error:
            return error
        segment.synced()
        return None

    async def give_up(self, segment: Segment, taken: list[Written], error: OSError) -> None:
        """A segment could not be synced: whatever was not durable in it is not held any more."""
        # First, and without an await: puts under way must see it before they enter the index.
        segment.is_failed = True
        self._append.leave(segment)
        self.incarnation = draw_incarnation(self._rng)
        lost = taken + segment.take_unsynced()
        text = f"segment {segment.number} could not be synced: {error.strerror or error}; unsynced blocks were given up"
        self._watch.trouble(f"sync {segment.number}", text)
        try:
            await self._index.set_segment(segment.number, segment.id, is_closed=True)
            dropped = await self._index.drop([Journalled(record.place, record.name) for record in lost])
            for entry in dropped:
                if entry.is_good:
                    self._watch.count_out(self._index.record_bytes(entry))
            # What is left of its journal are records that an earlier sync did cover: a start shall believe those.
            await self._index.forget_journal(Place(segment.number, 0), Place(segment.number + 1, 0))
        finally:
            # Their pages may still be in memory, where a later start would believe them: without an index, or with
            # one that could not be written either, for the same disk is under both.
            log.error("sync failed", segment=segment.number, error=str(error), blocks_given_up=len(lost))
            await punch(self._watch, [(segment, record.place.offset, record.length) for record in lost])


async def punch(watch: Watch, spans: list[Span]) -> None:
    """Give space back. What cannot be punched only takes room: that is said, and nothing else depends on it."""
    if not spans:
        return
    try:
        await watch.run(_punch_all, spans)
    except OSError as error:
        log.warning("space could not be given back", error=str(error))


def _punch_all(spans: list[Span]) -> None:
    spans.sort(key=lambda span: (span[0].number, span[1]))
    merged: list[Span] = []
    for segment, offset, length in spans:
        # Neighbours together: a file system frees whole pages only, and each by itself ends inside one.
        if merged and merged[-1][0] is segment and merged[-1][1] + merged[-1][2] == offset:
            offset, length = merged[-1][1], merged[-1][2] + length
            merged.pop()
        merged.append((segment, offset, length))
    for segment, offset, length in merged:
        if not segment.is_gone:
            segment.punch(offset, length)


def draw_incarnation(rng: random.Random) -> Incarnation:
    """64 random bits, never 0."""
    return Incarnation(rng.getrandbits(63) + 1)
