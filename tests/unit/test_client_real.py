"""A client on real servers: meta server, data servers with their stores on a disk, all in one process."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from mendfs.client.volume import Volume, VolumeOptions
from mendfs.data.server import DataOptions, DataServer, start_data
from mendfs.kv.engine import Engine
from mendfs.kv.memory import MemoryEngine
from mendfs.meta.server import MetaOptions, start_meta
from mendfs.meta.volume import format_volume
from mendfs.world import World, real_world
from tests.unit.client_tools import SECRET, contents, parameters, read_all, until, write_file


class RealCluster:
    """Four data servers below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.world: World = real_world()
        self.meta_address = ""
        self.servers: list[DataServer] = []

    async def open_engine(self, path: str) -> Engine:
        return await MemoryEngine.open(self.world.disk, path)

    async def start(self, number: int) -> DataServer:
        folder = self.folder / f"data-{number}"
        folder.mkdir(exist_ok=True)
        options = DataOptions(dir=str(folder), listen="127.0.0.1:0", meta=self.meta_address, zone="z", number=number)
        return await start_data(self.world, self.open_engine, options, SECRET)

    async def client(self) -> Volume:
        return await Volume.open(self.world, VolumeOptions(meta=self.meta_address), SECRET)


@asynccontextmanager
async def real_cluster(folder: Path) -> AsyncIterator[RealCluster]:
    c = RealCluster(folder)
    engine = await MemoryEngine.open()
    await format_volume(engine, parameters(block_size=1 << 20, page_size=16 << 10), c.world)
    meta = await start_meta(c.world, engine, MetaOptions(listen="127.0.0.1:0"), SECRET)
    c.meta_address = meta.address
    try:
        c.servers = [await c.start(number) for number in range(4)]
        yield c
    finally:
        for server in c.servers:
            await server.close()
        await meta.close()


async def test_files_survive_restarts_of_data_servers(tmp_path: Path) -> None:
    async with real_cluster(tmp_path) as c:
        volume = await c.client()
        data = os.urandom(5_500_001)
        file = await write_file(volume, b"f", data)
        await file.fsync()
        assert await read_all(file, 8 << 20) == data
        for number in range(4):
            await c.servers[number].close()
            await file.write(b"%d" % number, number)
            async with asyncio.timeout(20):
                await file.fsync()
                assert await read_all(file, 8 << 20) == b"0123"[: number + 1] + data[number + 1 :]
            c.servers[number] = await c.start(number)
            await until(lambda number=number: volume._shared.servers.is_up(number), within_s=20)  # type: ignore[misc]
        reader = await c.client()
        assert await contents(reader, file.inode, 8 << 20) == b"0123" + data[4:]
        slots = await reader.where(file.inode)
        assert all(replica.server in range(4) for slot in slots for each in slot.extents for replica in each.replicas)
        await volume.close()
        await reader.close()
