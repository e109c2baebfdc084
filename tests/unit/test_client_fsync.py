"""fsync in two rounds: what it says is durable is so, data before metadata, whichever way the blocks came."""

import asyncio
import os
import stat

import pytest

from mendfs.client.volume import OpenFile, Volume
from mendfs.client.writer import SYNCED_MAX
from mendfs.errors import StoreFull
from mendfs.model import Inode, Slot
from tests.unit.client_tools import Cluster, cluster, contents, until, write_file

QUORUM = 2


def durable_copies(c: Cluster) -> dict[tuple[int, int], int]:
    """Of each block: how many servers have it synced."""
    names = {name for store in c.stores for name in store.blocks}
    return {name: sum(name in store.blocks and name not in store.unsynced for store in c.stores) for name in names}


def assert_durable(c: Cluster, blocks: int) -> None:
    copies = durable_copies(c)
    assert len(copies) == blocks
    assert min(copies.values()) >= QUORUM
    assert c.engine.synced_sequence == c.engine.last_sequence


async def test_a_new_files_data_and_name_are_durable_without_a_round_of_syncs() -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"file", b"a" * 1000)
        await file.fsync()
        assert_durable(c, blocks=1)
        assert sum(store.syncs for store in c.stores) == 0
        assert not file._file.unsynced


async def test_blocks_that_were_put_before_are_synced_as_well() -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"file", b"a" * 1000)
        await file.flush()
        assert any(store.unsynced for store in c.stores)
        await file.write(b"b" * 1000, 70_000)
        await file.fsync()
        assert_durable(c, blocks=2)


async def test_a_server_that_cannot_store_does_not_keep_it_from_being_durable_on_the_others() -> None:
    async with cluster() as c:
        volume = await c.client()
        c.stores[0].put_error = StoreFull("no room")
        for number in range(4):  # each in another row
            file = await write_file(volume, b"file %d" % number, b"a" * 1000)
            await file.fsync()
        assert_durable(c, blocks=4)


@pytest.mark.parametrize("slots", [SYNCED_MAX, SYNCED_MAX + 1, 3 * SYNCED_MAX])
async def test_many_slots_are_durable_too(slots: int) -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"file", b"")
        for slot in range(slots):
            await file.write(b"x" * 100, slot * volume.parameters.block_size)
        await file.fsync()
        assert_durable(c, blocks=slots)


async def test_a_change_of_the_metadata_alone_is_durable_after_an_fsync() -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"file", b"a")
        await file.fsync()
        await volume.set_attributes(file.inode, mode=0o600)
        await volume.make(Inode(1), b"another", stat.S_IFREG | 0o644, uid=0, gid=0)
        await file.fsync()
        assert c.engine.synced_sequence == c.engine.last_sequence


async def test_a_close_after_a_truncation_to_nothing_leaves_durable_data() -> None:
    """Else a power cut could take the old contents and the new ones (design section 5)."""
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"file", b"old")
        await file.fsync()
        await file.release()
        again = await volume.open_file(file.inode, flags=os.O_WRONLY | os.O_TRUNC)
        await again.write(b"new", 0)
        await again.flush()
        new = {extent.block for extents in again._file.slots.values() for extent in extents}
        copies = {block: count for (_, block), count in durable_copies(c).items()}
        assert new and all(copies[block] >= QUORUM for block in new)


async def overwritten(volume: Volume, file: OpenFile, data: bytes, at: int) -> set[tuple[int, int]]:
    """The blocks that the slot of `at` names after a write there that nobody syncs."""
    await file.write(data, at)
    await file.flush()
    slot = Slot(at // volume.parameters.block_size)
    return {(extent.partition, extent.block) for extent in file._file.slots[slot]}


async def test_what_hides_durable_bytes_is_durable_before_it_is_committed() -> None:
    """Else another's fsync could make durable a commit that hides them while its own bytes may still be lost."""
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"file", b"old" * 100)
        await file.fsync()
        for name in await overwritten(volume, file, b"new", 50):
            assert durable_copies(c)[name] >= QUORUM


async def test_what_another_client_has_written_counts_as_durable() -> None:
    async with cluster() as c:
        file = await write_file(await c.client(), b"file", b"old" * 100)
        await file.flush()
        volume = await c.client()
        other = await volume.open_file(file.inode, flags=os.O_RDWR)
        before = {name for store in c.stores for name in store.blocks}
        for name in await overwritten(volume, other, b"new", 50) - before:
            assert durable_copies(c)[name] >= QUORUM


async def test_slots_that_nobody_has_looked_at_may_hold_something_durable() -> None:
    async with cluster() as c:
        size = c.volume.block_size
        file = await write_file(await c.client(), b"file", b"old" * 7 * size)
        await file.fsync()
        volume = await c.client()
        other = await volume.open_file(file.inode, flags=os.O_RDWR)
        at = 20 * size
        assert Slot(20) not in other._file.slots
        before = {name for store in c.stores for name in store.blocks}
        for name in await overwritten(volume, other, b"new", at) - before:
            assert durable_copies(c)[name] >= QUORUM


async def test_new_bytes_and_ones_over_bytes_that_nobody_synced_cost_no_sync() -> None:
    async with cluster() as c:
        volume = await c.client()
        size = volume.parameters.block_size
        file = await write_file(volume, b"file", b"a" * (2 * size + 100))
        await file.flush()
        for offset in (100, 2 * size + 50, 2 * size + 200, 3 * size):
            await file.write(b"b" * 100, offset)
            await file.flush()
        assert max(durable_copies(c).values()) == 0
        await file.fsync()
        # Behind all that was synced, in its slot and after it.
        for offset in (3 * size + 100, 4 * size):
            await file.write(b"c" * 100, offset)
            await file.flush()
        assert min(durable_copies(c).values()) == 0


async def test_what_hides_bytes_that_an_fsync_is_just_making_durable_is_durable_before_it_is_committed() -> None:
    async with cluster() as c:
        volume = await c.client()
        size = volume.parameters.block_size
        file = await write_file(volume, b"f", b"a" * size)
        await file.flush()
        hold_syncs, hold_puts = asyncio.Event(), asyncio.Event()
        for store in c.stores:
            store.hold_syncs = hold_syncs
        fsync = asyncio.create_task(file.fsync())
        await until(lambda: any(store.syncs for store in c.stores))
        for store in c.stores:
            store.hold_puts = hold_puts
        puts = sum(store.puts for store in c.stores)
        await file.write(b"b" * size, 0)
        await until(lambda: sum(store.puts for store in c.stores) > puts)
        hold_syncs.set()
        await fsync
        hold_puts.set()
        await file.flush()
        for store in c.stores:
            store.lose_unsynced()
        assert await contents(await c.client(), file.inode) == b"b" * size


async def test_a_close_that_meets_one_more_truncation_leaves_the_next_close_to_make_it_durable() -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"old")
        await file.fsync()
        await volume.set_attributes(file.inode, size=0)
        await file.write(b"a", 0)
        await volume._writer.drain(file._file)
        hold_syncs = asyncio.Event()
        for store in c.stores:
            store.hold_syncs = hold_syncs
        closing = asyncio.create_task(file.flush())
        await until(lambda: any(store.syncs for store in c.stores))
        await volume.set_attributes(file.inode, size=0)
        hold_syncs.set()
        await closing
        await file.write(b"b", 0)
        await file.flush()
        for store in c.stores:
            store.lose_unsynced()
        assert await contents(await c.client(), file.inode) == b"b"
