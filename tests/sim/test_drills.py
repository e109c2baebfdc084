"""The drills pass on a cluster that nothing disturbs, and what they and the planted bugs have found stays mended."""

import errno
import random

import pytest

from mendfs.client.volume import Volume
from mendfs.sim.drills.blocks import RECORDS
from mendfs.sim.drills.run import run_drills
from mendfs.sim.drills.yard import Yard
from mendfs.sim.planted import PLANTED, planted
from mendfs.sim.scenario import Simulation
from mendfs.wire.messages.data import BlocksHeld, HaveBlocks, Synced, SyncStore


@pytest.mark.parametrize("seed", [1, 2])
def test_every_drill_passes_on_a_calm_cluster(seed: int) -> None:
    """Among them what they once found: a file freed that another session unlinked before its holder had reclaimed it
    (reclaims_are_awaited), and one lost that was closed after O_TRUNC by a client that had not known it
    (synced_is_durable).
    """
    wrong: list[str] = []
    with Simulation(seed) as sim:

        async def work() -> None:
            volume: Volume = await sim.open("first")
            assert volume.parameters.replicas == 3
            await run_drills(sim, wrong.append, random.Random(seed))

        sim.run(work())
        assert not wrong + sim.problems


def test_what_a_failed_sync_at_a_start_has_dropped_is_not_believed_by_the_next_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed with blocks unsynced: the first start cannot sync them, and the second finds them in the page cache."""
    wrong: list[str] = []
    with Simulation(3) as sim:

        async def work() -> None:
            await sim.open("first")
            yard = Yard(sim, wrong.append, random.Random(3))
            await yard.whole()
            session, machine = await yard.session(), sim.data[0]
            blocks = [await session.block(1, number, b"%d" % number * 100) for number in range(RECORDS)]
            for block in blocks:
                await yard.put(0, block)
            lives, check = len(machine.processes), machine.disk.check

            def fail_to_sync(operation: str, path: str) -> None:
                if operation == "sync" and "/segments/" in path:
                    raise OSError(errno.EIO, "the disk fails", path)
                check(operation, path)

            monkeypatch.setattr(machine.disk, "check", fail_to_sync)
            machine.kill()
            assert await yard.until(lambda: len(machine.processes) > lives + 1, 30, "it has been started twice")
            monkeypatch.undo()
            await yard.whole()
            peer = await yard.data(0)
            await yard.ask(peer, SyncStore(), Synced)
            held = await yard.ask(peer, HaveBlocks(tuple(block.name for block in blocks)), BlocksHeld)
            await yard.power(machine)
            for block, root in zip(blocks, held.roots, strict=True):
                if root is not None:
                    assert await yard.fetch(0, block) == block.data, "it was synced, and answered as held"

        sim.run(work())
    assert not wrong


@pytest.mark.parametrize("bug", list(PLANTED))
def test_a_bug_can_be_planted(bug: str) -> None:
    """What it edits is still there."""
    with planted(bug):
        pass


def _found(bug: str) -> list[str]:
    wrong: list[str] = []
    with Simulation(5) as sim, planted(bug):

        async def work() -> None:
            await sim.open("first")
            await run_drills(sim, wrong.append, random.Random(5))

        sim.run(work())
    return wrong


@pytest.mark.parametrize("bug", ["fence-not-checked", "owed-not-written", "generation-not-synced"])
def test_a_drill_finds_what_it_is_for(bug: str) -> None:
    assert _found(bug)
