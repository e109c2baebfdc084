"""The drills of a run, one after the other."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterable

from mendfs.errors import MendfsError
from mendfs.sim.drills import blocks, contents, engines, merging, requests, sessions
from mendfs.sim.drills.yard import Failed, Yard
from mendfs.sim.scenario import Simulation

DRILLS: tuple[Callable[[Yard], Awaitable[None]], ...] = (
    engines.transactions_are_serial,
    requests.requests_are_done_once,
    requests.ids_are_granted_once,
    requests.commits_need_their_quorum,
    requests.commits_are_checked,
    requests.cuts_stay,
    requests.merges_bury_nothing,
    requests.the_log_is_synced,
    sessions.leases_run_out,
    sessions.reclaims_are_awaited,
    sessions.generations_rise,
    sessions.what_is_unlinked_is_freed,
    sessions.a_silent_server_is_down,
    blocks.an_id_has_one_content,
    blocks.what_was_put_is_kept,
    blocks.deletions_are_fenced,
    blocks.strangers_stay_out,
    contents.synced_is_durable,
    contents.closed_is_seen,
    contents.errors_are_told,
    contents.late_servers_are_owed_nothing,
    merging.crowded_slots_are_merged,
    contents.open_files_stay,
    contents.lost_answers_are_asked_again,
    requests.a_failed_log_sync_ends_it,
    # Last, for nothing can be expected of the disks afterwards.
    contents.one_good_copy_is_enough,
)


DRILLS_A_RUN = 5
"""A run takes a fifth of them, drawn from its seed: all would be a third of its time, and seeds are many."""
DRILL_S_MAX = 300.0
"""The longest takes a minute: what a call of its waits for will never come."""


def draw_drills(rng: random.Random) -> list[Callable[[Yard], Awaitable[None]]]:
    """Some, in their order."""
    return [DRILLS[number] for number in sorted(rng.sample(range(len(DRILLS)), DRILLS_A_RUN))]


async def run_drills(
    sim: Simulation,
    violation: Callable[[str], None],
    rng: random.Random,
    drills: Iterable[Callable[[Yard], Awaitable[None]]] = DRILLS,
) -> None:
    """One after the other; what is wrong is told to `violation`."""
    yard = Yard(sim, violation, rng)

    async def work() -> None:
        await yard.whole()
        for drill in drills:
            yard.drill = drill.__name__
            sim.trace.say(f"drill: {yard.drill}")
            try:
                async with asyncio.timeout(DRILL_S_MAX):
                    await drill(yard)
                    await yard.whole()
            except (MendfsError, Failed, TimeoutError) as error:
                yard.wrong(f"it could not go on: {error!r}")
                return

    await sim.loop.start(yard.process, work())
