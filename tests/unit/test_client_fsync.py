"""What an fsync waits for: that all of the file is durable, and for nothing else."""

import asyncio
import os

import pytest

from mendfs.client.open_file import OpenFile
from mendfs.client.writer import SYNCED_MAX
from mendfs.model import Inode
from tests.unit.client_tools import Cluster, Proxy, cluster, write_file


async def is_durable(c: Cluster, file: OpenFile) -> bool:
    """Whether a power cut of every machine would leave all of the file: each block on W stores, and the log."""
    volume = c.clients[0]
    slots = await volume.where(file.inode, verify=False)
    blocks = {extent.extent.block for slot in slots for extent in slot.extents}
    assert blocks
    held = [{name[1] for name in store.blocks.keys() - store.unsynced} for store in c.stores]
    enough = all(sum(block in each for each in held) >= c.volume.write_quorum for block in blocks)
    return enough and c.engine.synced_sequence >= (await volume.attributes(file.inode)).version


async def test_an_fsync_of_little_data_waits_for_puts_and_a_commit_that_are_durable_already() -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"f", os.urandom(9000))
        await file.fsync()
        assert await is_durable(c, file)
        assert sum(store.syncs for store in c.stores) == 0


async def test_an_fsync_of_many_slots_syncs_the_stores_once_after_them() -> None:
    async with cluster(block_size=4096) as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"")
        for slot in range(2 * SYNCED_MAX):
            await file.write(os.urandom(100), slot * 4096)
        await file.fsync()
        assert await is_durable(c, file)
        assert 0 < sum(store.syncs for store in c.stores) <= len(c.stores)


async def test_an_fsync_covers_what_was_committed_before_it_unsynced() -> None:
    async with cluster(block_size=4096) as c:
        volume = await c.client()
        file = await write_file(volume, b"f", os.urandom(12_000))
        await file.flush()
        assert not await is_durable(c, file)
        await file.write(b"later", 20_000)
        await file.fsync()
        assert await is_durable(c, file)


async def test_an_fsync_of_what_is_durable_asks_nobody() -> None:
    async with cluster() as c:
        proxy = Proxy(c.meta.address)
        await proxy.start()
        volume = await c.client(proxy.address)
        file = await write_file(volume, b"f", b"x" * 100)
        await file.fsync()
        proxy.is_swallowing = True
        async with asyncio.timeout(0.5):
            await file.fsync()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await volume.lookup(Inode(1), b"f")  # as everything else has to wait now
        proxy.is_swallowing = False
        await volume.close(timeout_s=1)
        await proxy.close()


@pytest.mark.parametrize("size", [5, 500])
async def test_an_fsync_makes_a_new_size_durable(size: int) -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"x" * 100)
        await file.fsync()
        await volume.set_attributes(file.inode, size=size)
        assert not await is_durable(c, file)
        await file.fsync()
        assert await is_durable(c, file)


async def test_a_sync_of_the_volume_covers_names_and_data() -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"f", os.urandom(9000))
        await volume.rename(Inode(1), b"f", Inode(1), b"g")
        await volume.sync()
        assert await is_durable(c, file)


async def test_fsyncs_of_several_files_at_once_are_all_durable() -> None:
    async with cluster() as c:
        volume = await c.client()
        files = [await write_file(volume, f"f{number}".encode(), os.urandom(500)) for number in range(8)]
        for number in range(5):
            for file in files:
                await file.write(os.urandom(50), 300 * number)
            await asyncio.gather(*(file.fsync() for file in files))
            assert all([await is_durable(c, file) for file in files])


async def test_a_sync_of_names_covers_committed_data_and_leaves_the_rest_to_its_timer() -> None:
    """The log speaks of what is committed: it must not be durable before that. Of the rest it knows nothing."""
    async with cluster() as c:
        volume = await c.client(flush_after_s=60)
        committed = await write_file(volume, b"f", os.urandom(9000))
        await committed.flush()
        growing = await write_file(volume, b"g", b"x" * 100)
        puts = sum(store.puts for store in c.stores)
        await volume.sync_committed()
        assert await is_durable(c, committed)
        assert sum(store.puts for store in c.stores) == puts
        await growing.fsync()
        assert await is_durable(c, growing)
