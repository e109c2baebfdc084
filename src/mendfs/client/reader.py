"""Reading: a plan of pieces, all asked for at once, over which this client's unflushed writes lie (design section 6).

Planning is one plain call: it copies what is dirty, writes zeros into holes and lists what must be fetched. A block
that no replica gives may have been replaced meanwhile, so the extents are fetched again before a read fails.
"""

import asyncio
from collections.abc import Coroutine, Iterable, Iterator
from itertools import islice
from typing import Any

from mendfs.client.cache import PageCache, Run
from mendfs.client.fetcher import Fetcher
from mendfs.client.files import BlockName, File
from mendfs.client.gather import Want, by_block, page_runs, ref_of
from mendfs.client.shared import Shared
from mendfs.errors import AllReplicasFailed, MendfsError
from mendfs.extents import Piece, plan
from mendfs.model import Extent, KiB, MiB, Slot
from mendfs.transfer import BlockRef
from mendfs.wire.messages.meta import Extents, Found, GetAttributes, GetExtents

SLOTS_AT_ONCE = 1024
"""Slots of one step of a read: when blocks are tiny a read is many steps, so that what it needs stays bounded."""
EXTENTS_AHEAD = 64
"""Slots whose extents are asked for at least: 256 MiB of a file with default blocks."""
EXTENTS_AHEAD_FACTOR = 4
"""Extents are asked for when the reader is this many windows of read-ahead before them: time for a slow answer."""
FETCHES_MAX = 256
"""Blocks one read asks for at once: a slow link must not be waited for again and again while blocks are small ..."""
FETCHES_MIN = 32
FETCHING_BYTES = 128 * MiB
"""... and big ones are asked for as many at once as hold about this much."""
RETRY_MIN_S = 0.05
RETRY_MAX_S = 1.0
ATTEMPTS_ALL_UP = 6
"""Attempts, about 2 s, before a block that all its servers are there for and none has good is given up."""
READ_AHEAD_UNIT = MiB
READ_AHEAD_MIN = 512 * KiB
READ_AHEAD_FROM_BYTES = 128 * KiB
"""A first read of this much at the beginning of a file is a copy's."""
SEQUENTIAL_SLACK = MiB
"""Requests of the kernel's read-ahead overtake one another by about this much."""

_ZEROS = memoryview(bytes(256 * KiB))


class Stream:
    """One descriptor's reading: whether it is sequential, and how far has been read ahead."""

    def __init__(self) -> None:
        self.expected = 0
        self.sequential_bytes = 0
        self.ahead = 0


class Reader:
    """All reading of one client."""

    def __init__(self, shared: Shared, fetcher: Fetcher, cache: PageCache) -> None:
        self._shared = shared
        self._fetcher = fetcher
        self._cache = cache
        self._arriving: dict[BlockName, list[tuple[range, asyncio.Task[None]]]] = {}

    async def read_into(self, file: File, stream: Stream, target: memoryview, offset: int) -> int:
        """Fill `target` from `offset` on; returns the bytes read, fewer only at the end of the file."""
        if file.attributes is None:
            file.learn((await self._shared.session.query(GetAttributes(file.inode), Found)).attributes)
        end = min(offset + len(target), file.size)
        if offset >= end:
            return 0
        self._read_ahead(file, stream, offset, end)
        step = SLOTS_AT_ONCE * self._shared.volume.block_size
        position = offset
        while position < end:
            upto = min(end, position - position % self._shared.volume.block_size + step)
            await self._read(file, target[position - offset : upto - offset], position)
            position = upto
        return end - offset

    async def _read(self, file: File, target: memoryview, offset: int) -> None:
        now = asyncio.get_running_loop().time
        deadline_s = now() + self._shared.options.read_timeout_s
        pause_s = RETRY_MIN_S
        attempts = 0
        while True:
            attempts += 1
            await self.know_extents(file, offset, offset + len(target))
            wants = list(self._plan(file, target, offset))
            try:
                await self.fetch_all(wants)
                return
            except AllReplicasFailed:
                if now() >= deadline_s or (attempts >= ATTEMPTS_ALL_UP and self._all_up(wants)):
                    raise
            # The extents may have moved on, by a merge on another mount for one; that is all there is to wait for the
            # first time. And a server that is down may come back (row C14).
            file.forget_extents()
            if attempts > 1:
                await self._shared.servers.changes.wait(min(pause_s, max(0.0, deadline_s - now())))
                pause_s = min(2 * pause_s, RETRY_MAX_S)

    def _all_up(self, wants: list[Want]) -> bool:
        """Whether every server that may hold these has had its say: waiting brings nothing then."""
        partitions = {want.extent.partition for want in wants}
        return all(self._shared.servers.is_up(s) for partition in partitions for s in self._shared.row(partition))

    def _slots(self, begin: int, end: int) -> range:
        block_size = self._shared.volume.block_size
        return range(begin // block_size, -(-end // block_size))

    async def know_extents(self, file: File, begin: int, end: int) -> None:
        """The extents of [begin, end) are in `file.slots` when this returns, until the next await."""
        slots = self._slots(begin, end)
        while (missing := next((slot for slot in slots if slot not in file.slots), None)) is not None:
            # Shared by all reads that need it: one of them giving up must not end it.
            await asyncio.shield(self._ask_extents(file, Slot(missing), slots.stop - missing))

    def _ask_extents(self, file: File, first: Slot, count: int) -> "asyncio.Task[None]":
        """The question for the extents of `first` and what follows, if it is not under way already."""
        asked = file.asking_extents
        if asked is not None and first in asked[0] and not asked[1].done():
            return asked[1]
        count = min(max(EXTENTS_AHEAD, count), SLOTS_AT_ONCE)
        task = self._shared.tasks.spawn(self._learn_extents(file, first, count), is_awaited=True)
        file.asking_extents = range(first, first + count), task
        return task

    async def _learn_extents(self, file: File, first: Slot, count: int) -> None:
        answer = await self._shared.session.query(GetExtents(file.inode, first, count), Extents)
        file.learn_extents(answer, first)

    def _ask_extents_ahead(self, file: File, begin: int, end: int) -> None:
        """Ask for extents that a sequential reader comes to soon, so that it need not wait for them there."""
        slots = self._slots(begin, min(end, file.size))
        if len(slots) <= SLOTS_AT_ONCE and (slots[-1:] and slots[-1] not in file.slots):
            missing = next(slot for slot in slots if slot not in file.slots)
            self._ask_extents(file, Slot(missing), slots.stop - missing)

    def _plan(self, file: File, target: memoryview, offset: int) -> Iterator[Want]:
        """What must be fetched; dirty bytes and zeros are put in place. No await may come between the two."""
        block_size = self._shared.volume.block_size
        for slot in self._slots(offset, offset + len(target)):
            start = slot * block_size
            begin = max(offset, start) - start
            end = min(offset + len(target), start + block_size) - start
            part = target[start + begin - offset : start + end - offset]
            for lower, upper in self._copy_dirty(file, Slot(slot), part, begin, end):
                yield from self._plan_stored(file.slots[Slot(slot)], part[lower - begin : upper - begin], lower, upper)

    def _plan_stored(self, extents: tuple[Extent, ...], target: memoryview, begin: int, end: int) -> Iterator[Want]:
        for piece in plan(extents, begin, end):
            at = piece.offset_in_slot - begin
            view = target[at : at + piece.length]
            if piece.extent is None:
                _fill_with_zeros(view)
            else:
                yield Want(piece.extent, piece.offset_in_block, view)

    @staticmethod
    def _copy_dirty(file: File, slot: Slot, target: memoryview, begin: int, end: int) -> list[tuple[int, int]]:
        """Copy collecting, then frozen bytes; returns the ranges that neither has."""
        gaps = [(begin, end)]
        for generations in (file.collecting, file.frozen):
            generation = generations.get(slot)
            if generation is not None:
                gaps = [
                    gap
                    for lower, upper in gaps
                    for gap in generation.buffer.copy_into(target[lower - begin : upper - begin], lower, upper)
                ]
        return gaps

    # --- fetching -----------------------------------------------------------------------------------------------

    async def fetch_all(self, wants: Iterable[Want], *, keep: bool = True) -> None:
        """Fill every target with verified bytes. Raises AllReplicasFailed.

        Without `keep` nothing is cached: what a merge reads is not read again.
        """
        fetches = (
            self._fetch(group[0]) if keep and len(group) == 1 else self._fetch_group(group, keep=keep)
            for group in by_block(wants)
        )
        await _all(fetches, self._fetches_at_once())

    def _fetches_at_once(self) -> int:
        return max(FETCHES_MIN, min(FETCHES_MAX, FETCHING_BYTES // self._shared.volume.block_size))

    async def _fetch_group(self, wants: list[Want], *, keep: bool) -> None:
        """Many pieces of one block: what is not at hand comes in as few requests as makes sense."""
        page_size = self._shared.volume.page_size
        missing: list[Want] = []
        arriving: list[Want] = []
        for want in wants:
            name = (want.extent.partition, want.extent.block)
            if self._cache.copy(name, want.offset_in_block, want.target) == len(want.target):
                continue
            page = want.offset_in_block // page_size
            (missing if self._arriving_with(name, page) is None else arriving).append(want)
        fetches = [self._fetch(want) for want in arriving]
        spans = [(want.offset_in_block, want.end_in_block) for want in missing]
        rest = iter(missing)
        for pages, count in page_runs(spans, page_size):
            fetches.append(self._fetch_for(pages, list(islice(rest, count)), keep=keep))
        await _all(fetches, self._fetches_at_once())

    async def _fetch_for(self, pages: range, wants: list[Want], *, keep: bool) -> None:
        page_size = self._shared.volume.page_size
        run = await self._fetch_run(ref_of(wants[0].extent), pages.start, pages.stop)
        with memoryview(run.memory) as memory:
            for want in wants:
                begin = want.offset_in_block - pages.start * page_size
                want.target[:] = memory[begin : begin + len(want.target)]
        if keep:
            self._cache.add(run)
        else:
            self._shared.pool.give(run.memory)

    async def _fetch(self, want: Want) -> None:
        extent, target, at = want.extent, want.target, want.offset_in_block
        name = (extent.partition, extent.block)
        page_size = self._shared.volume.page_size
        while True:
            copied = self._cache.copy(name, at, target)
            at += copied
            target = target[copied:]
            if not target:
                return
            arriving = self._arriving_with(name, at // page_size)
            if arriving is None:
                break
            await asyncio.wait([arriving])
            if not self._cache.holds(name, at // page_size):
                break  # it failed, or was pushed out already: fetched here then
        await self._fetch_missing(extent, at, target)

    async def _fetch_missing(self, extent: Extent, at: int, target: memoryview) -> None:
        ref = ref_of(extent)
        page_size = self._shared.volume.page_size
        end = at + len(target)
        first_page, end_page = at // page_size, -(-end // page_size)
        if at % page_size == 0 and (end % page_size == 0 or end == extent.block_length):
            await self._fetcher.fetch(ref, first_page, end_page - first_page, target)
            return
        run = await self._fetch_run(ref, first_page, end_page)
        begin = at - first_page * page_size
        with memoryview(run.memory) as memory:
            target[:] = memory[begin : begin + len(target)]
        self._cache.add(run)

    async def _fetch_run(self, ref: BlockRef, first_page: int, end_page: int) -> Run:
        page_size = self._shared.volume.page_size
        length = min(end_page * page_size, ref.length) - first_page * page_size
        memory = self._shared.pool.take(length)
        await self._fetcher.fetch(ref, first_page, end_page - first_page, memoryview(memory)[:length])
        return Run((ref.partition, ref.block), first_page, memory, length)

    # --- reading ahead --------------------------------------------------------------------------------------------

    def _arriving_with(self, name: BlockName, page: int) -> "asyncio.Task[None] | None":
        for pages, task in self._arriving.get(name, ()):
            if page in pages:
                return task
        return None

    def _read_ahead(self, file: File, stream: Stream, offset: int, end: int) -> None:
        """When the reads of a descriptor follow one another, fetch what comes next."""
        follows = stream.expected > 0 and abs(offset - stream.expected) <= SEQUENTIAL_SLACK
        if not follows:
            stream.sequential_bytes = stream.ahead = stream.expected = 0
        stream.sequential_bytes += end - offset
        stream.expected = max(stream.expected, end)
        if not follows and (offset > 0 or end < READ_AHEAD_FROM_BYTES):
            return
        window = min(max(READ_AHEAD_MIN, 2 * stream.sequential_bytes), self._shared.options.read_ahead_bytes_max)
        stream.ahead = max(stream.ahead, end)
        upto = min(end + window, file.size)
        self._ask_extents_ahead(file, end, end + EXTENTS_AHEAD_FACTOR * window)
        # In whole units, so that the requests are few: less than one is left for the next read to ask for.
        while stream.ahead < upto and (upto - stream.ahead >= READ_AHEAD_UNIT or upto == file.size):
            until = min(stream.ahead - stream.ahead % READ_AHEAD_UNIT + READ_AHEAD_UNIT, upto)
            if not all(Slot(slot) in file.slots for slot in self._slots(stream.ahead, until)):
                return
            self._fetch_ahead(file, stream.ahead, until)
            stream.ahead = until

    def _fetch_ahead(self, file: File, begin: int, end: int) -> None:
        block_size = self._shared.volume.block_size
        page_size = self._shared.volume.page_size
        pieces: dict[BlockName, list[Piece]] = {}
        for slot in self._slots(begin, end):
            start = slot * block_size
            for piece in plan(file.slots[Slot(slot)], max(begin, start) - start, min(end, start + block_size) - start):
                if piece.extent is not None:
                    pieces.setdefault((piece.extent.partition, piece.extent.block), []).append(piece)
        for name, group in pieces.items():
            spans = sorted((piece.offset_in_block, piece.offset_in_block + piece.length) for piece in group)
            for pages, _ in page_runs(spans, page_size):
                if self._cache.holds(name, pages.start) or self._arriving_with(name, pages.start) is not None:
                    continue
                assert group[0].extent is not None, "holes were left out"
                task = self._shared.tasks.spawn(self._bring(ref_of(group[0].extent), pages))
                self._arriving.setdefault(name, []).append((pages, task))

    async def _bring(self, ref: BlockRef, pages: range) -> None:
        name = (ref.partition, ref.block)
        try:
            self._cache.add(await self._fetch_run(ref, pages.start, pages.stop))
        except MendfsError:
            pass  # The read that needs these pages will fetch them itself, and say what is wrong.
        finally:
            left = [(other, task) for other, task in self._arriving[name] if task is not asyncio.current_task()]
            if left:
                self._arriving[name] = left
            else:
                del self._arriving[name]


def _fill_with_zeros(view: memoryview) -> None:
    for at in range(0, len(view), len(_ZEROS)):
        part = view[at : at + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]


async def _all(fetches: Iterable[Coroutine[Any, Any, None]], at_once: int) -> None:
    """Run all of them, `at_once` at a time; the first error ends the others and is raised."""
    waiting = list(fetches)
    if len(waiting) == 1:
        await waiting[0]
        return
    queue = iter(waiting)

    async def work() -> None:
        for fetch in queue:
            await fetch

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(waiting))):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    finally:
        for fetch in waiting:
            fetch.close()
