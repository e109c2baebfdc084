"""Incidents, told step by step on a simulated cluster."""

import asyncio
import stat

from mendfs.model import ROOT_INODE
from mendfs.sim.scenario import Simulation


def test_a_pause_of_the_meta_server_before_its_first_tick_costs_nobody_the_lease() -> None:
    """Its disk hung for 11 s right after the start: the mount lost its session, and the application its file."""
    with Simulation(seed=1) as sim:

        async def main() -> None:
            volume = await sim.open()
            made = await volume.make(ROOT_INODE, b"f", stat.S_IFREG | 0o644, uid=0, gid=0, open=True)
            opened = await volume.open_made(made, flags=2)
            server = sim.meta.server
            assert server is not None and sim.loop.time() < 1000.25, "before the first tick"
            session = server.state.sessions.all()[0].id
            sim.meta.pause()
            await asyncio.sleep(12)
            sim.meta.resume()
            await asyncio.sleep(12)
            assert [each.id for each in server.state.sessions.all()] == [session]
            await opened.write(b"x" * 100, 0)
            await opened.fsync()

        sim.run(main())
        assert not sim.problems
        assert not sim.loop.problems
