"""Opening a store: its folder, its index, its segments, put together."""

import posixpath
from collections.abc import Awaitable, Callable

import msgspec
import structlog

from mendfs.data import inventory
from mendfs.data.append import AppendLog
from mendfs.data.index import Index
from mendfs.data.record import SEGMENT_HEADER_BYTES, align, head_length
from mendfs.data.recovery import Recovery
from mendfs.data.segment import Segments
from mendfs.data.store import Store
from mendfs.data.syncing import Syncing
from mendfs.data.watch import Watch
from mendfs.errors import StoreDamaged, StoreFailed
from mendfs.kv.engine import Engine
from mendfs.model import MiB, Volume
from mendfs.world import World
from mendfs.world.disk import Disk

log = structlog.get_logger("data")


class StoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a store lies on its disk."""

    segment_bytes: int = 256 * MiB
    """A new file is begun above this. Bigger: fewer files. Smaller: less to copy when one is half empty."""
    capacity: int = 0
    """Bytes of records it may hold; 0 for what the disk has."""


async def open_store(
    world: World,
    folder: str,
    open_engine: Callable[[str], Awaitable[Engine]],
    *,
    volume: Volume,
    server_id: str,
    options: StoreOptions,
) -> Store:
    """Open the store in `folder`, made if missing; whoever calls holds the folder's lock.

    Raises StoreDamaged, UsageError or StoreFailed, in a line that says what to do.
    """
    disk = world.disk
    watch = Watch(disk, folder, options.capacity)
    segments = Segments(disk, posixpath.join(folder, "segments"))
    server = bytes.fromhex(server_id)
    longest = align(head_length(volume.block_size, volume.page_size, volume.checksum) + volume.block_size)
    segment_bytes = max(options.segment_bytes, SEGMENT_HEADER_BYTES + longest)
    try:
        await watch.run(disk.make_directories, segments.folder)
        await watch.run(watch.measure_room)
        index = Index(await _open_engine(disk, watch, open_engine, posixpath.join(folder, "index")), volume)
        try:
            recovered = await Recovery(
                segments, index, watch, volume=volume, server=server, segment_bytes=segment_bytes
            ).run()
            held, generation = await inventory.totals(index.engine)
            fence = await index.fence()
        except BaseException:
            segments.close()
            await index.engine.close()
            raise
    except OSError as error:
        raise StoreFailed(f"the store in {folder} does not open: {watch.disk_error('opening', error)}") from None
    watch.blocks, watch.record_bytes = held.blocks, held.record_bytes
    appending = AppendLog(
        segments,
        index,
        watch,
        volume=volume,
        server=server,
        rng=world.rng,
        segment_bytes=segment_bytes,
        last_number=recovered.last_number,
    )
    appending.active = recovered.active
    syncing = Syncing(appending, index, watch, world.rng, checkpoint=recovered.checkpoint)
    highest = max(generation, fence.generation)
    store = Store(volume, index, watch, segments, appending, syncing, highest)
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
    except NotADirectoryError:
        disk.unlink(path)
        return
    for name in names:
        disk.unlink(posixpath.join(path, name))
    disk.sync_directory(path)
