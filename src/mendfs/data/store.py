"""The store of one data server: blocks in segment files, found through an index (design section 4).

What `put` answered survives the death of the process; what a later `sync` under the same incarnation answered survives
a power cut. Nothing is acknowledged that is not stored: a write that failed leaves no index entry. One event loop owns
a store; what may wait for the disk goes to the disk's threads.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

import structlog

from mendfs.blocks import Buffer, page_checksums, root_of
from mendfs.data import inventory, reading
from mendfs.data.append import AppendLog
from mendfs.data.copying import Copier
from mendfs.data.fence_note import FenceNote
from mendfs.data.index import Index
from mendfs.data.record import RecordHeader, encode_record, make_header
from mendfs.data.schema import Entry, Fence, Name, Place
from mendfs.data.segment import Segment, Segments
from mendfs.data.syncing import Syncing, punch
from mendfs.data.watch import Watch
from mendfs.errors import (
    BlockConflict,
    BlockCorrupt,
    BlockMissing,
    EngineDamaged,
    EngineFailed,
    EngineFull,
    EngineUnreadable,
    Fenced,
    ReplicaError,
    StoreFailed,
    StoreFull,
)
from mendfs.model import BlockId, Generation, Incarnation, Partition, StoreHealth, Volume, generation_of
from mendfs.wire.messages.data import HeldBlock, InventorySum, PutBlock

log = structlog.get_logger("data")
Result = TypeVar("Result")

INLINE_BYTES_MAX = 128 << 10
"""Writes below this go straight to the page cache: that takes less time than the way to a thread and back (100 us)."""
SYNC_EVERY_S = 1.0
"""A dirty store is synced at least this often: what a power cut can take is bounded even if nobody asks."""
MOVES_MAX = 5
"""A block is moved once in a segment's life: more in one read is a mistake of ours, to be told and not followed."""
INDEX_SYNC_EVERY_S = 5.0
"""The index's log may lag behind its checkpoint by this much; a start scans what was written since."""


class _Putting:
    """A put under way. Nearly always nobody else waits for it, so the future for that is made when one does."""

    __slots__ = ("_over", "root")

    def __init__(self, root: bytes) -> None:
        self.root = root
        self._over: asyncio.Future[None] | None = None

    async def wait(self) -> None:
        """Until it is over, well or not."""
        if self._over is None:
            self._over = asyncio.get_running_loop().create_future()
        await asyncio.wait({self._over})

    def end(self) -> None:
        """It is."""
        if self._over is not None:
            self._over.set_result(None)


class Store:
    """An open store. Made by `opening.open_store`."""

    def __init__(
        self,
        volume: Volume,
        index: Index,
        watch: Watch,
        segments: Segments,
        appending: AppendLog,
        syncing: Syncing,
        copier: Copier,
        fence_note: FenceNote,
        highest_generation: Generation,
    ) -> None:
        self.volume = volume
        self.watch = watch
        self.highest_generation = highest_generation
        """Of all ids ever stored here and orders obeyed."""
        self.recovered_without_index = False
        """It was scanned whole: then torn records cannot be told from rotten ones, and deleted ones may be back."""
        self.failed: asyncio.Future[EngineFailed] = asyncio.get_running_loop().create_future()
        """Done when the index takes nothing more: blocks are still read, and what is there is found out by opening the
        store anew."""
        self._index = index
        self._segments = segments
        self._append = appending
        self._syncing = syncing
        self._putting: dict[Name, _Putting] = {}
        self._tasks: set[asyncio.Task[Incarnation]] = set()
        self.copier = copier
        self._fence_note = fence_note
        self._noted_generation = Generation(0)
        self._tending = asyncio.create_task(self._tend_forever(), name="store")
        self._copying = asyncio.create_task(self._copy_forever(), name="copying")

    @property
    def incarnation(self) -> Incarnation:
        """Drawn anew when the store is opened, and when a failed sync took acknowledged blocks with it."""
        return self._syncing.incarnation

    def health(self) -> StoreHealth:
        """The store's account of itself; touches no disk."""
        return self.watch.health()

    # Writing

    async def put(self, message: PutBlock, data: Buffer) -> Incarnation:
        """Store a block; returns the incarnation its acknowledgement counts under.

        Raises BlockCorrupt if the data has not the message's root, BlockConflict if another root is held under its id,
        StoreFull, StoreFailed. `data` must stay unchanged until this returns; after a cancellation for ever.
        """
        self._refuse_if_failed()
        self.watch.refuse_if_stuck()
        name = (message.partition, message.block)
        while (putting := self._putting.get(name)) is not None:
            if putting.root != message.root:
                raise _conflict(message)
            # It may fail, and then it is our turn: so look again.
            await putting.wait()
        self._putting[name] = _Putting(message.root)
        if len(data) < INLINE_BYTES_MAX and self.watch.is_lively:
            return await self._put_guarded(message, data)
        # A task of ours: whoever asked may go away, but the thread that writes does not, and what it wrote must be
        # entered or given up in order.
        task = asyncio.create_task(self._put_guarded(message, data))
        self._tasks.add(task)
        task.add_done_callback(self._put_ended)
        return await asyncio.shield(task)

    def _put_ended(self, task: "asyncio.Task[Incarnation]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever asked may be gone, and health says what is wrong with the disk

    async def _put_guarded(self, message: PutBlock, data: Buffer) -> Incarnation:
        try:
            return await self._put(message, data)
        except EngineFailed as error:
            raise self._index_failed(error) from None
        finally:
            self._putting.pop((message.partition, message.block)).end()

    async def _put(self, message: PutBlock, data: Buffer) -> Incarnation:
        name = (message.partition, message.block)
        old = await self._index.find(*name)
        if old is not None and old.is_good:
            if old.root != message.root:
                raise _conflict(message)
            return self.incarnation
        header = make_header(
            message.partition,
            message.block,
            message.inode,
            message.slot,
            len(data),
            message.root,
            self.volume.page_size,
            self.volume.checksum,
        )
        segment, offset = await self._append.reserve(header.total_bytes)
        is_written = False
        try:
            if len(data) < INLINE_BYTES_MAX and self.watch.is_lively:
                _write(segment, offset, header, data)
            else:
                await self.watch.run_writing(_write, segment, offset, header, data)
            is_written = True
        except OSError as error:
            # A part of it may be there: on a full disk of all places that room must not stay taken.
            await punch(self.watch, [(segment, offset, header.total_bytes)])
            raise self.watch.disk_error(f"cannot write block {message.block:#x}", error) from None
        finally:
            # In flight until it is in the index: a checkpoint must not pass a record that no journal names yet.
            if not is_written:
                segment.settle(offset, is_written=False)
        try:
            return await self._enter(segment, offset, header)
        finally:
            segment.settle(offset, is_written=True)

    async def _enter(self, segment: Segment, offset: int, header: RecordHeader) -> Incarnation:
        """A record was written: enter it into the index."""
        name = (header.partition, header.block)
        if segment.is_failed:
            raise StoreFailed(f"segment {segment.number} could not be synced; block {header.block:#x} was given up")
        entry = Entry(segment.number, offset, header.length, header.inode, header.slot, 0, header.root)
        # What it replaces is what the index says now: it may have been copied elsewhere while this one was written.
        old = await self._index.add(name, entry)
        segment.written(offset, header.total_bytes, name)
        self.watch.written()
        self.watch.count_in(header.total_bytes)
        self.watch.writes += 1
        self.highest_generation = max(self.highest_generation, generation_of(header.block))
        if old is not None and old.is_good:
            self.watch.count_out(self._index.record_bytes(old))
        if old is not None and (behind := self._segments.get(old.segment)) is not None:
            self._syncing.punch_after_sync(behind, old.offset, self._index.record_bytes(old))
        return self.incarnation

    async def sync(self) -> Incarnation:
        """Make everything put before durable; counts for blocks put under the incarnation it returns."""
        self.watch.refuse_if_stuck()
        return await self._guarded(self._syncing.sync())

    async def put_synced(self, message: PutBlock, data: Buffer) -> Incarnation:
        """Store a block and make it durable."""
        stored = await self.put(message, data)
        if await self.sync() != stored:
            raise StoreFailed(f"block {message.block:#x} was given up: a sync of the disk failed")
        return stored

    # Reading

    async def get(self, partition: Partition, block: BlockId, first_page: int, page_count: int) -> reading.Pages:
        """Pages of a block and all its page checksums, unverified. Raises BlockMissing, BlockCorrupt, StoreFailed."""
        name = (partition, block)
        self.watch.reads += 1
        for _ in range(MOVES_MAX):
            entry = await self._guarded(self._index.find(*name))
            segment = None if entry is None else self._segments.get(entry.segment)
            if entry is None or segment is None:
                raise BlockMissing(f"block {block:#x} of partition {partition} is not here")
            wanted = reading.Wanted(name, entry, first_page, page_count)
            try:
                return await reading.read_pages(segment, wanted, self.volume, self.watch)
            except BlockCorrupt as error:
                found, damage = entry, error
            if await self._still_there(name, found.place):
                self.watch.corrupt_found += 1
                log.error("block is damaged", partition=partition, block=block, segment=found.segment, why=str(damage))
                raise damage
            # Deleted, or copied elsewhere, while it was read: what was read was a hole.
        raise BlockMissing(f"block {block:#x} of partition {partition} is moved faster than it is read")

    async def have(self, names: Sequence[Name]) -> tuple[bytes | None, ...]:
        """The root of each block that is held. Raises StoreFailed."""
        if self._index.engine.failure:
            # It may still list blocks that a failed sync has taken: nobody may count on them.
            raise StoreFailed(self._index.engine.failure)
        entries = [await self._guarded(self._index.find(*name)) for name in names]
        return tuple(entry.root if entry is not None and entry.is_good else None for entry in entries)

    async def list_blocks(
        self, after: Name, limit: int, *, only: Partition | None = None, verify: bool = False
    ) -> list[HeldBlock]:
        """The blocks after a name, in order. With `verify` each is read: one that is bad is not held any more."""
        found = []
        for name, listed in await self._guarded(self._index.list_blocks(*after, limit, only=only)):
            entry, is_ok = listed, listed.is_good and self._segments.get(listed.segment) is not None
            if verify or not is_ok:
                # While others were read it may have been copied elsewhere, or deleted.
                now = await self._guarded(self._index.find(*name))
                if now is None:
                    continue
                entry, is_ok = now, now.is_good and self._segments.get(now.segment) is not None
            if is_ok and verify:
                is_ok = await self._verify(name, entry)
            found.append(HeldBlock(*name, entry.inode, entry.slot, entry.length, entry.root, is_ok))
        return found

    async def _verify(self, name: Name, entry: Entry) -> bool:
        """Whether a block is whole; one that is not does not count as held from then on."""
        for _ in range(MOVES_MAX):
            segment = self._segments.get(entry.segment)
            if segment is None:
                return False
            try:
                await self.watch.run(reading.verify, segment, name, entry, self.volume)
            except OSError as error:
                damage = self.watch.read_error(segment.number, error)
            except BlockCorrupt as error:
                damage = error
            else:
                return True
            now = await self._guarded(self._index.find(*name))
            if now is None:
                return True  # Deleted: what was read then was a hole, and the list is of a moment before.
            if now.place == entry.place:
                self.watch.corrupt_found += 1
                log.error("block is damaged", partition=name[0], block=name[1], segment=entry.segment, why=str(damage))
                for bad in await self._guarded(self._index.mark_bad([(name, entry.place)])):
                    self.watch.count_out(self._index.record_bytes(bad))
                return False
            entry = now
        return False

    async def _still_there(self, name: Name, place: Place) -> bool:
        """False if the block was deleted while it was read: what was read then was a hole."""
        entry = await self._guarded(self._index.find(*name))
        return entry is not None and entry.place == place

    async def inventory(self, partitions: Sequence[Partition]) -> tuple[InventorySum, ...]:
        """Count and sum of each id range that holds something."""
        return await self._guarded(inventory.sums(self._index.engine, partitions))

    # Deleting

    async def delete(self, order: Fence, names: Sequence[Name]) -> int:
        """Delete blocks; returns how many were held. Raises Fenced if a higher order was obeyed before."""
        self._refuse_if_failed()
        self.watch.refuse_if_stuck()
        fence = await self._guarded(self._index.fence())
        if order < fence:
            raise Fenced(
                f"an order of generation {order.generation}, sequence {order.sequence} came after one of "
                f"{fence.generation}, {fence.sequence}: this metadata is older; "
                "if it was restored on purpose, run `mendfs meta accept-rollback`"
            )
        for name in names:
            if (putting := self._putting.get(name)) is not None:
                await putting.wait()
        await self._note_generation(order.generation)
        if order > fence:
            await self._guarded(self._index.set_fence(order))
        self.highest_generation = max(self.highest_generation, order.generation)
        gone = await self._guarded(self._index.remove(names))
        # One sync for both: the log keeps its order, so a deletion that lasts has its fence before it. Only then is
        # anything done that cannot be undone.
        await self._guarded(self._index.engine.sync())
        spans = []
        for entry in gone:
            if entry.is_good:
                self.watch.count_out(self._index.record_bytes(entry))
            if (segment := self._segments.get(entry.segment)) is not None and not segment.is_gone:
                spans.append((segment, entry.offset, self._index.record_bytes(entry)))
        await punch(self.watch, spans)
        return len(gone)

    async def _note_generation(self, generation: Generation) -> None:
        """For the day the index is lost. Tried again with the next order if there is no room for it now."""
        if generation <= self._noted_generation:
            return
        try:
            await self.watch.run_writing(self._fence_note.write, generation)
        except OSError as error:
            # The index has the fence itself, and deleting is what makes room.
            log.warning("the generation of deletions could not be noted", error=str(error))
        else:
            self._noted_generation = generation

    # What is done unasked

    async def _tend_forever(self) -> None:
        ticks = 0
        while True:
            await asyncio.sleep(SYNC_EVERY_S)
            ticks += 1
            try:
                await self._tend(is_index_due=ticks % int(INDEX_SYNC_EVERY_S / SYNC_EVERY_S) == 0)
            except StoreFailed as error:
                # Those who wait for a sync were told; everybody else sees it in health.
                log.error("sync failed", error=str(error))
                if self.failed.done():
                    return
            except OSError as error:
                self.watch.disk_error("cannot look after the store", error)

    async def _copy_forever(self) -> None:
        try:
            await self.copier.run()
        except EngineFailed as error:
            self._index_failed(error)

    async def _tend(self, *, is_index_due: bool) -> None:
        await self.watch.run(self._measure)
        self.watch.occupied = self._segments.occupied
        self.watch.look_for_room()
        for segment in await self.watch.run(self._segments.vanished):
            await self._guarded(self._lose(segment))
        await self.sync()
        if is_index_due:
            await self._guarded(self._index.engine.sync())

    def _measure(self) -> None:
        self.watch.measure_room()
        self._segments.measure()

    async def _lose(self, segment: Segment) -> None:
        """A file was deleted under us: what it held is not held any more, but served as long as it is open."""
        segment.is_gone = True
        await self._syncing.give_up(segment, [], FileNotFoundError(2, "its file was deleted"))
        held = await self._index.in_segment(segment.number)
        marked = await self._index.mark_bad([(name, entry.place) for name, entry in held])
        for entry in marked:
            self.watch.count_out(self._index.record_bytes(entry))
        text = f"{self._segments.path(segment.number)} was deleted: its {len(held)} blocks must come from other servers"
        self.watch.relieve(f"sync {segment.number}")
        self.watch.trouble(f"gone {segment.number}", text)

    async def close(self) -> None:
        """Sync and close. What is being put is finished first."""
        for task in (self._tending, self._copying):
            task.cancel()
        await asyncio.gather(self._tending, self._copying, *self._tasks, return_exceptions=True)
        await self._append.close()
        try:
            if not self.failed.done():
                await self.sync()
        finally:
            await self._syncing.close()
            # Whoever opens the store next must not find one of our threads still writing to its files.
            await self.watch.idle()
            await self._close_index()
            await self.watch.run(self._segments.close)

    async def _close_index(self) -> None:
        try:
            await self._index.engine.close()
        except EngineFailed as error:
            log.error("the index could not be closed in order", error=str(error))

    async def _guarded(self, work: Awaitable[Result]) -> Result:
        """An index that cannot be written ends the store: what it says may not be what is on the disk."""
        try:
            return await work
        except EngineFailed as error:
            raise self._index_failed(error) from None

    def _refuse_if_failed(self) -> None:
        if self.failed.done():
            raise _index_error(self.failed.result())

    def _index_failed(self, error: EngineFailed) -> ReplicaError:
        """Note it, if it is for good; returns what whoever asked is told."""
        if isinstance(error, EngineUnreadable) and not isinstance(error, EngineDamaged):
            return _index_error(error)
        if not self.failed.done():
            self.failed.set_result(error)
        self.watch.trouble("index", f"{error}; nothing is written here until that is over")
        return _index_error(error)


def _index_error(error: EngineFailed) -> ReplicaError:
    # What a full disk means to a writer does not depend on which of our files needed the room.
    return StoreFull(str(error)) if isinstance(error, EngineFull) else StoreFailed(str(error))


def _conflict(message: PutBlock) -> BlockConflict:
    log.error("two contents under one id", partition=message.partition, block=message.block)
    return BlockConflict(f"block {message.block:#x} is held with another root: one id must never have two contents")


def _write(segment: Segment, offset: int, header: RecordHeader, data: Buffer) -> None:
    """Check and write one record. Raises BlockCorrupt before anything is written, OSError unless all of it was."""
    checksums = page_checksums(data, header.page_size, header.kind)
    root = root_of(checksums, length=len(data), page_size=header.page_size, kind=header.kind)
    if root != header.root:
        raise BlockCorrupt(f"block {header.block:#x}: the data that came does not have the root that came with it")
    head = encode_record(header, seed=segment.seed, offset=offset)
    segment.file.write((head + checksums, data), offset)
