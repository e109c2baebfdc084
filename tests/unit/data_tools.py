"""What tests of the data server share: a volume, blocks, and stores on a disk in memory."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from mendfs.blocks import page_checksums, root_of
from mendfs.data.opening import StoreOptions, open_store
from mendfs.data.store import Store
from mendfs.kv.engine import Engine
from mendfs.kv.memory import MemoryEngine
from mendfs.model import BlockId, ChecksumKind, Inode, KiB, Partition, Slot, Volume
from mendfs.wire.messages.data import PutBlock
from mendfs.world import World
from mendfs.world.disk import Disk
from mendfs.world.tcp import TcpNetwork

SERVER = "cd" * 16
FOLDER = "/data"
FIRST_BLOCK = 1 << 44


def volume(*, block_size: int = 256 * KiB, page_size: int = 4 * KiB, checksum: ChecksumKind = "xxh3") -> Volume:
    return Volume(
        id="ab" * 16,
        block_size=block_size,
        page_size=page_size,
        replicas=3,
        partitions=16,
        checksum=checksum,
        layout="ring",
        write_quorum=2,
        read_quorum=1,
        server_count=4,
        created_ns=0,
    )


def block(number: int, data: bytes, of: Volume | None = None, *, sync: bool = False) -> PutBlock:
    """The put of block `number`."""
    of = of or volume()
    checksums = page_checksums(data, of.page_size, of.checksum)
    return PutBlock(
        partition=Partition(number % of.partitions),
        block=BlockId(FIRST_BLOCK + number),
        inode=Inode(7),
        slot=Slot(number),
        root=root_of(checksums, length=len(data), page_size=of.page_size, kind=of.checksum),
        sync=sync,
    )


def content(number: int, length: int) -> bytes:
    """Bytes that differ for every block."""
    return random.Random(number).randbytes(length)


def world_of(disk: Disk, seed: int = 1) -> World:
    return World(TcpNetwork(), disk, random.Random(seed), lambda: 0)


async def open_on(
    disk: Disk,
    *,
    of: Volume | None = None,
    seed: int = 1,
    segment_bytes: int = 0,
    capacity: int = 0,
    open_files_max: int = 1024,
    folder: str = FOLDER,
) -> Store:
    async def open_engine(path: str) -> Engine:
        return await MemoryEngine.open(disk, path)

    return await open_store(
        world_of(disk, seed),
        FOLDER,
        open_engine,
        volume=of or volume(),
        server_id=SERVER,
        options=StoreOptions(segment_bytes=segment_bytes, capacity=capacity, open_files_max=open_files_max),
    )


@asynccontextmanager
async def opened(disk: Disk, **options: int) -> AsyncIterator[Store]:
    store = await open_on(disk, **options)  # type: ignore[arg-type]  # numbers only
    try:
        yield store
    finally:
        await store.close()


async def abandon(store: Store) -> None:
    """What kill -9 leaves: nothing runs any more, nothing was closed."""
    for task in (store._tending, store._copying):
        task.cancel()
    await asyncio.gather(store._tending, store._copying, return_exceptions=True)


async def read(store: Store, message: PutBlock) -> bytes:
    pages = await store.get(message.partition, message.block, 0, 1 << 20)
    found = bytes(pages.view)
    if pages.release is not None:
        pages.release()
    return found


async def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.01)
