"""A deletion that a crash cuts short brings records back: as garbage with the right bytes, never as anything else."""

import errno
import os

import pytest

from mendfs.data.schema import Fence
from mendfs.data.store import Store
from mendfs.errors import BlockConflict
from mendfs.model import CommitSequence, Generation
from mendfs.wire.messages.data import PutBlock
from tests.unit.data_tools import abandon, block, content, open_on, opened, read
from tests.unit.memory_disk import MemoryDisk

LENGTH = 3000


def order(sequence: int) -> Fence:
    return Fence(Generation(1), CommitSequence(sequence))


def without_punching(operation: str, path: str) -> None:
    if operation == "punch":
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)


async def put_and_delete(store: Store, number: int, *, sequence: int) -> PutBlock:
    """The record stays on the disk: as when the process dies between the index's sync and the hole."""
    message = block(number, content(number, LENGTH))
    await store.put(message, content(number, LENGTH))
    assert await store.delete(order(sequence), [(message.partition, message.block)]) == 1
    return message


@pytest.mark.parametrize("is_index_lost", [False, True])
@pytest.mark.parametrize("is_put_again_before", [False, True])
async def test_a_block_that_is_back_is_the_right_one_and_can_be_put_and_deleted_again(
    is_index_lost: bool, is_put_again_before: bool
) -> None:
    disk = MemoryDisk()
    disk.fault = without_punching
    store = await open_on(disk)
    message = await put_and_delete(store, 1, sequence=1)
    if is_put_again_before:
        await store.put(message, content(1, LENGTH))
    await abandon(store)
    disk.kill()
    disk.fault = lambda operation, path: None
    if is_index_lost:
        del disk.nodes["/data/index"]
    async with opened(disk, seed=2) as store:
        # Found past the checkpoint, or by the full scan: one record of it counts, however many there are.
        assert await read(store, message) == content(1, LENGTH)
        assert store.health().blocks == 1
        assert await store.put(message, content(1, LENGTH)) == store.incarnation
        assert store.health().blocks == 1
        other = block(1, content(2, LENGTH))
        with pytest.raises(BlockConflict):
            await store.put(other, content(2, LENGTH))
        assert await store.delete(order(2), [(message.partition, message.block)]) == 1
        assert store.health().blocks == 0
        await store.sync()
    async with opened(disk, seed=3) as store:
        assert store.health().blocks == 0


async def test_a_deleted_block_before_the_checkpoint_stays_away_as_long_as_the_index_is_whole() -> None:
    disk = MemoryDisk()
    disk.fault = without_punching
    store = await open_on(disk)
    message = block(1, content(1, LENGTH))
    await store.put(message, content(1, LENGTH))
    await store.sync()
    await store.delete(order(1), [(message.partition, message.block)])
    await abandon(store)
    disk.kill()
    async with opened(disk, seed=2) as store:
        assert store.health().blocks == 0
