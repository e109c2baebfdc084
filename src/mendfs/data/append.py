"""Where the next record goes: the active segment, and the making of the next one."""

import asyncio
import random

import structlog

from mendfs.data.index import Index
from mendfs.data.record import ID_BYTES, SEGMENT_HEADER_BYTES, SegmentHeader
from mendfs.data.schema import Place
from mendfs.data.segment import Segment, Segments
from mendfs.data.watch import Watch
from mendfs.errors import ReplicaError, StoreFailed
from mendfs.model import Volume

log = structlog.get_logger("data")

RETRY_AFTER_S = 0.5
"""After a segment could not be made: writers are told so at once, without asking a failing disk each time."""


class AppendLog:
    """The end of the store. One segment is written to at a time."""

    def __init__(
        self,
        segments: Segments,
        index: Index,
        watch: Watch,
        *,
        volume: Volume,
        server: bytes,
        rng: random.Random,
        segment_bytes: int,
        last_number: int,
    ) -> None:
        self.segments = segments
        self.active: Segment | None = None
        self._index = index
        self._watch = watch
        self._volume = volume
        self._server = server
        self._rng = rng
        self._segment_bytes = segment_bytes
        self.last_number = last_number
        """The highest number that a segment has, or had."""
        self._rolling: asyncio.Task[ReplicaError | None] | None = None
        self._failed_at_s: float | None = None
        self._failure = ""

    @property
    def end(self) -> Place:
        """Everything before it has been written, or never will be; nothing of that is in flight."""
        for segment in self.segments:
            if segment.is_busy and not segment.is_failed:
                return Place(segment.number, segment.settled_end)
        if self.active is not None:
            return Place(self.active.number, self.active.position)
        return Place(self.last_number + 1, SEGMENT_HEADER_BYTES)

    async def reserve(self, length: int, *, is_copy: bool = False) -> tuple[Segment, int]:
        """A place for a record of `length` bytes. Raises StoreFull, StoreFailed.

        A copy, which is made to free more than it takes, may use the room that is kept from writers.
        """
        assert SEGMENT_HEADER_BYTES + length <= self._segment_bytes, "a segment holds the longest block of its volume"
        self._watch.reserve(length, is_copy=is_copy)
        while True:
            active = self.active
            if active is not None and active.position + length <= self._segment_bytes:
                # No await since the check: the place is nobody else's.
                return active, active.reserve(length)
            await self._roll()

    async def _roll(self) -> None:
        """Make the next segment; callers meanwhile share it."""
        if self._failed_at_s is not None:
            if asyncio.get_running_loop().time() < self._failed_at_s + RETRY_AFTER_S:
                raise StoreFailed(self._failure)
            self._failed_at_s = None
        if self._rolling is None:
            self._rolling = asyncio.create_task(self._make_next())
        error = await asyncio.shield(
            self._rolling
        )  # Shared by all who wait: one that is cancelled leaves it to others.
        if error is not None:
            raise type(error)(str(error))

    async def _make_next(self) -> ReplicaError | None:
        # Raised only when this is over: until then `end` must not lie behind what will be written to this one.
        number = self.last_number + 1
        header = SegmentHeader(
            number,
            self._rng.getrandbits(8 * ID_BYTES).to_bytes(ID_BYTES, "big"),
            bytes.fromhex(self._volume.id),
            self._server,
            self._volume.checksum,
            self._volume.page_size,
        )
        try:
            segment = await self._watch.run_writing(self.segments.create, header)
            await self._index.set_segment(number, header.id)
        except OSError as error:
            failure = self._watch.disk_error("cannot make a new segment", error)
            self._failed_at_s, self._failure = asyncio.get_running_loop().time(), str(failure)
            return failure
        finally:
            self.last_number = number
            self._rolling = None
        self.segments.add(segment)
        self.active = segment
        log.info("segment made", segment=number)
        return None

    async def begin_next(self) -> None:
        """Go on in a new segment. Raises StoreFull, StoreFailed."""
        self.active = None
        await self._roll()

    def leave(self, segment: Segment) -> None:
        """Write no more to this segment."""
        if self.active is segment:
            self.active = None

    async def close(self) -> None:
        """Wait for a segment being made."""
        if self._rolling is not None:
            await asyncio.wait({self._rolling})
