"""A data server's RocksDB index, damaged on the real disk: the store opens all the same, from its segments."""

import os
from pathlib import Path

import pytest

from mendfs.data.opening import StoreOptions, open_store
from mendfs.data.store import Store
from mendfs.kv.rocks import RocksEngine
from mendfs.world.local_disk import LocalDisk
from tests.unit.data_tools import SERVER, abandon, block, content, read, volume, world_of

BLOCKS = 20


async def opened(folder: Path) -> Store:
    return await open_store(
        world_of(LocalDisk()),
        str(folder),
        RocksEngine.open,
        volume=volume(),
        server_id=SERVER,
        options=StoreOptions(),
    )


@pytest.mark.parametrize("kind", ["*.sst", "MANIFEST-*", "CURRENT"])
async def test_a_damaged_index_is_made_again_from_the_segments(tmp_path: Path, kind: str) -> None:
    store = await opened(tmp_path)
    puts = [block(number, content(number, 3000)) for number in range(BLOCKS)]
    for number, put in enumerate(puts):
        await store.put(put, memoryview(content(number, 3000)))
    await store.sync()
    await abandon(store)
    engine = store._index.engine
    assert isinstance(engine, RocksEngine)
    await engine.release()
    store._segments.close()
    damaged = max((tmp_path / "index").glob(kind), key=lambda path: path.stat().st_size)
    os.truncate(damaged, os.path.getsize(damaged) // 2)
    store = await opened(tmp_path)
    assert store.recovered_without_index
    for number, put in enumerate(puts):
        assert await read(store, put) == content(number, 3000)
    await store.close()
