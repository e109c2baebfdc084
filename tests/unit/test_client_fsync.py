"""fsync in two rounds: what it says is durable is so, data before metadata, whichever way the blocks came."""

import os
import stat

import pytest

from mendfs.client.writer import SYNCED_MAX
from mendfs.errors import StoreFull
from mendfs.model import Inode
from tests.unit.client_tools import Cluster, cluster, write_file

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
