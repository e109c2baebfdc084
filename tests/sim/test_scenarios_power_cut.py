"""A power cut of everything at once, told step by step: what nobody has synced may be lost, but not what was there."""

import asyncio
import os
import stat

import pytest

from mendfs.client.volume import OpenFile, Volume
from mendfs.model import ROOT_INODE, Inode, KiB
from mendfs.sim.scenario import Simulation

SEEDS = range(8)
"""What a disk keeps of unsynced writes is drawn: some seeds of any eight lose a block everywhere."""
OLD, NEW = b"o" * 20 * KiB, b"n" * 20 * KiB


async def make(volume: Volume, name: bytes, data: bytes) -> OpenFile:
    made = await volume.make(ROOT_INODE, name, stat.S_IFREG | 0o644, uid=0, gid=0, open=True)
    file = await volume.open_made(made, flags=os.O_RDWR)
    await file.write(data, 0)
    return file


async def sync_names_only(volume: Volume) -> None:
    """Another client's fsync, which needs nothing of the data servers."""
    await volume.make(ROOT_INODE, b"another", stat.S_IFDIR | 0o755, uid=0, gid=0)
    await volume.sync_committed()


async def lose_power(sim: Simulation) -> None:
    """Of all machines at once, and start the servers again."""
    for machine in [*sim.servers, *sim.clients]:
        machine.cut_power()
    await asyncio.sleep(1)
    for machine in sim.servers:
        machine.start()


async def read(volume: Volume, inode: Inode) -> bytes:
    file = await volume.open_file(inode, flags=os.O_RDONLY)
    buffer = bytearray(64 * KiB)
    return bytes(buffer[: await file.read_into(memoryview(buffer), 0)])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("whole", [False, True])
def test_a_file_that_was_synced_and_overwritten_unsynced_is_readable_after_a_power_cut(seed: int, whole: bool) -> None:
    """Another's fsync makes the commit durable that hides the old bytes, before the new ones are."""
    with Simulation(seed=seed) as sim:

        async def main() -> None:
            volume, other = await sim.open("one"), await sim.open("other")
            file = await make(volume, b"f", OLD)
            await file.fsync()
            begin, end = (0, len(NEW)) if whole else (3000, 9000)
            await file.write(NEW[begin:end], begin)
            await file.flush()
            await sync_names_only(other)
            await lose_power(sim)
            found = await read(await sim.open("third"), file.inode)
            assert len(found) == len(OLD)
            assert found[:begin] + found[end:] == OLD[:begin] + OLD[end:]
            assert set(found[begin:end]) <= set(b"on")
            await asyncio.sleep(10)  # a server that is still opening its store is not cut off by the run's end

        sim.run(main())
        assert not sim.problems
