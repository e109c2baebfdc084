"""Opening a store: its folder, its index, its segments, put together."""

import contextlib
import posixpath
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import msgspec
import structlog

from mendfs.data import inventory
from mendfs.data.append import AppendLog
from mendfs.data.copying import Copier
from mendfs.data.fence_note import FenceNote
from mendfs.data.files import OpenFiles
from mendfs.data.index import Index
from mendfs.data.record import SEGMENT_HEADER_BYTES, align, head_length
from mendfs.data.recovery import Recovery
from mendfs.data.schema import Fence
from mendfs.data.segment import Segments
from mendfs.data.store import Store
from mendfs.data.syncing import Syncing
from mendfs.data.watch import Watch
from mendfs.errors import EngineDamaged, EngineFailed, StoreDamaged, StoreFailed
from mendfs.kv.engine import Engine
from mendfs.model import CommitSequence, MiB, Volume
from mendfs.world import World
from mendfs.world.disk import Disk

log = structlog.get_logger("data")


class StoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a store lies on its disk."""

    segment_bytes: int = 256 * MiB
    """A new file is begun above this. Bigger: fewer files. Smaller: less to copy when one is half empty."""
    capacity: int = 0
    """Bytes its segments may take on the disk; 0 for what the disk has."""
    copy_bytes_per_s: int = 50 * MiB
    """Upper bound for copying half-empty segments: a quarter of what a slow disk writes is left to those who wait."""
    open_files_max: int = 1024
    """Segment files kept open at a time, 256 GiB of blocks; others are opened when they are read. Fewer if the system
    gives fewer."""


async def open_store(
    world: World,
    folder: str,
    open_engine: Callable[[str], Awaitable[Engine]],
    *,
    volume: Volume,
    server_id: str,
    options: StoreOptions,
    is_index_damaged: bool = False,
) -> Store:
    """Open the store in `folder`, made if missing; whoever calls holds the folder's lock.

    An index that is damaged, or said to be, is made again from the segments. Raises StoreDamaged, UsageError,
    StoreFailed or EngineFailed, in a line that says what to do.
    """
    watch = Watch(world.disk, folder, options.capacity)
    opening = _Opening(world, folder, open_engine, volume, bytes.fromhex(server_id), options, watch)
    try:
        await watch.run(world.disk.make_directories, opening.segments_folder)
        await watch.run(watch.measure_room)
        if not is_index_damaged:
            try:
                return await opening.run()
            except EngineDamaged as error:
                # It opened, but what is in it cannot be read.
                log.error("the index is damaged, making it again from the segments", error=str(error))
        await watch.run(_empty, world.disk, opening.index_folder)
        return await opening.run()
    except OSError as error:
        raise StoreFailed(f"the store in {folder} does not open: {watch.disk_error('opening', error)}") from None


class _Opening(NamedTuple):
    """What an opening needs."""

    world: World
    folder: str
    open_engine: Callable[[str], Awaitable[Engine]]
    volume: Volume
    server: bytes
    options: StoreOptions
    watch: Watch

    @property
    def segments_folder(self) -> str:
        """Where the segment files lie."""
        return posixpath.join(self.folder, "segments")

    @property
    def index_folder(self) -> str:
        """Where the index's engine keeps what it keeps."""
        return posixpath.join(self.folder, "index")

    @property
    def longest_record_bytes(self) -> int:
        """What a block of the volume's block size takes."""
        of = self.volume
        return align(head_length(of.block_size, of.page_size, of.checksum) + of.block_size)

    @property
    def segment_bytes(self) -> int:
        """The longest a segment gets: as asked for, but one block of the volume must fit."""
        return max(self.options.segment_bytes, SEGMENT_HEADER_BYTES + self.longest_record_bytes)

    async def run(self) -> Store:
        """Open index and segments, and find out what is there."""
        disk = self.world.disk
        segments = Segments(disk, self.segments_folder, OpenFiles(disk, self.options.open_files_max))
        engine = await _open_engine(disk, self.watch, self.open_engine, self.index_folder)
        try:
            return await self._recover(segments, Index(engine, self.volume))
        except BaseException:
            segments.close()
            with contextlib.suppress(EngineFailed):  # what is being raised says more than how its closing went
                await engine.close()
            raise

    async def _recover(self, segments: Segments, index: Index) -> Store:
        watch, volume, rng = self.watch, self.volume, self.world.rng
        recovered = await Recovery(
            segments, index, watch, volume=volume, server=self.server, segment_bytes=self.segment_bytes
        ).run()
        held, generation = await inventory.totals(index.engine)
        note = FenceNote(self.world.disk, self.folder)
        fence = max(await index.fence(), Fence(await watch.run(note.read), CommitSequence(0)))
        await index.set_fence(fence)
        await watch.run(segments.measure)
        watch.longest_record_bytes = self.longest_record_bytes
        watch.blocks, watch.record_bytes, watch.occupied = held.blocks, held.record_bytes, segments.occupied
        appending = AppendLog(
            segments,
            index,
            watch,
            volume=volume,
            server=self.server,
            rng=rng,
            segment_bytes=self.segment_bytes,
            last_number=recovered.last_number,
        )
        appending.active = recovered.active
        syncing = Syncing(appending, index, watch, rng, checkpoint=recovered.checkpoint)
        copier = Copier(index, appending, syncing, watch, volume=volume, bytes_per_s=self.options.copy_bytes_per_s)
        highest = max(generation, fence.generation)
        store = Store(volume, index, watch, segments, appending, syncing, copier, note, highest)
        store.recovered_without_index = not recovered.report.index_was_whole
        return store


async def _open_engine(disk: Disk, watch: Watch, open_engine: Callable[[str], Awaitable[Engine]], path: str) -> Engine:
    """The index's engine. A damaged one is emptied, for the segments hold all that it knew: recovery makes it again."""
    try:
        return await open_engine(path)
    except StoreDamaged as error:
        log.error("the index is damaged, making it again from the segments", error=str(error))
        await watch.run(_empty, disk, path)
        return await open_engine(path)


def _empty(disk: Disk, path: str) -> None:
    try:
        names = disk.names(path)
    except FileNotFoundError:
        return
    except NotADirectoryError:
        disk.unlink(path)
        return
    for name in names:
        disk.unlink(posixpath.join(path, name))
    disk.sync_directory(path)
