"""What a meta server does unasked: leases, clocks, the log's sync, and freeing. Loops over small transactions.

Freeing works on synced truth only (design section 5): note the commit sequence, sync every data server that is up, sync
the log, and only then delete what died at or before the noted sequence. No power cut can bring back a file whose
blocks are gone, or leave only a newer version that was lost.
"""

import asyncio

import structlog

from mendfs.errors import Conflict, EngineUnreadable, Fenced, MendfsError
from mendfs.kv.engine import run
from mendfs.meta import freeing, truncate
from mendfs.meta.members import DISK_STUCK_S, TICK_S
from mendfs.meta.ranges import end as end_session
from mendfs.meta.sessions import Session, purge_answers
from mendfs.meta.state import DATA_CALL_S, State
from mendfs.model import BlockId, CommitSequence, Inode, Partition, ServerNumber, Slot
from mendfs.wire.messages import data as data_messages

log = structlog.get_logger("meta")

SYNC_EVERY_S = 1.0
"""Changes that nobody synced are durable after this, data servers first."""
FREE_EVERY_S = 1.0
"""Rounds are at most this frequent: each costs a sync of every data server."""
DEAD_A_ROUND = 500
PURGE_EVERY_S = 60.0


async def tick_forever(state: State) -> None:
    """Members' clocks and sessions' leases, and the log's sync if it hangs."""
    loop = asyncio.get_running_loop()
    # The first pause counts too: a disk that hangs before the first tick must cost nobody its lease.
    state.sessions.due(loop.time())
    while True:
        await asyncio.sleep(TICK_S)
        await state.act(state.members.tick(loop.time()))
        for session in state.sessions.due(loop.time()):
            log.warning("session lost: no renewal within its lease", session=session.id, client=session.client)
            try:
                await close_session(state, session)
            except EngineUnreadable as error:
                state.unreadable(error)
        _watch_sync(state, loop.time())


def _watch_sync(state: State, at_s: float) -> None:
    """Say so when the log's sync hangs: whoever has called fsync waits for it, and will wait on."""
    since_s = state.sync_since_s
    if since_s is None or at_s - since_s < DISK_STUCK_S:
        if state.troubles.pop("sync", None):
            log.warning("the disk answers again: the log was synced")
        return
    if "sync" not in state.troubles:
        log.error("the log's sync hangs", seconds=round(at_s - since_s, 1))
    state.troubles["sync"] = (
        f"the log's sync has been under way for {at_s - since_s:.0f} s: the disk under the meta server does not answer"
    )


async def watch_room_forever(state: State, folder: str) -> None:
    """How much room the meta server's disk has."""
    disk = state.world.disk
    while folder:
        try:
            state.room.measure(
                await disk.run(disk.free_bytes, folder),
                await disk.run(disk.total_bytes, folder),
            )
        except OSError as error:
            log.error("the room of the meta server's disk cannot be measured", reason=str(error))
        trouble = state.room.trouble(folder)
        if trouble is None:
            if state.troubles.pop("room", None):
                log.info("there is room on the meta server's disk again")
        else:
            if "room" not in state.troubles:
                log.error("no room", reason=trouble)
            state.troubles["room"] = trouble
        await asyncio.sleep(TICK_S)


async def close_session(state: State, session: Session) -> None:
    """End a session: no commit of it can come after, and what only it held open may be freed."""
    await run(state.engine, end_session, session.id, state.world.now_ns())
    state.sessions.remove(session.id)
    await run(state.engine, freeing.forget_opens, lambda _, holder: holder == session.id)
    state.work.set()


async def _sweep_opens(state: State) -> None:
    """Remove opens whose session is gone."""
    await run(state.engine, freeing.forget_opens, lambda _, session: state.sessions.get(session) is None)


async def sync_forever(state: State) -> None:
    """A dirty log is synced at least once a second, data servers first."""
    while True:
        await asyncio.sleep(SYNC_EVERY_S)
        if state.engine.last_sequence > state.engine.synced_sequence:
            await state.sync_data()
            await state.sync_log()


async def purge_forever(state: State) -> None:
    """Answers of sessions that ended long ago."""
    while True:
        await asyncio.sleep(PURGE_EVERY_S)
        try:
            while (await run(state.engine, purge_answers, state.world.now_ns()))[0]:
                await asyncio.sleep(0)
        except EngineUnreadable as error:
            state.unreadable(error)


async def free_forever(state: State) -> None:
    """Cuts, unlinked inodes, dropped references, and rounds of deletion, when there is something to do."""
    loop = asyncio.get_running_loop()
    state.work.set()
    while True:
        await state.work.wait()
        state.work.clear()
        if state.in_grace(loop.time()):
            await asyncio.sleep(TICK_S)
            state.work.set()
            continue
        try:
            again = await free_once(state)
        except EngineUnreadable as error:
            # What cannot be read is not freed, and nothing behind it: better garbage than a wrong deletion.
            state.unreadable(error)
            again = False
        except (Conflict, Fenced) as error:
            state.troubles["freeing"] = f"freeing stopped: {error}"
            log.error("freeing stopped", error=str(error))
            again = not isinstance(error, Fenced)
        await asyncio.sleep(FREE_EVERY_S)
        if again:
            state.work.set()


async def free_once(state: State) -> bool:
    """One pass over everything that waits. True if something is left for the next."""
    await _apply_cuts(state)
    await _sweep_opens(state)
    await _free_inodes(state)
    while (await run(state.engine, freeing.take_references))[0]:
        await asyncio.sleep(0)
    return await free_round(state)


async def _apply_cuts(state: State) -> None:
    while (inode := (await run(state.engine, truncate.next_cutting))[0]) is not None:
        applied, _ = await run(state.engine, truncate.current_cut, inode)
        slot: Slot | None = Slot(0)
        while slot is not None:
            slot, _ = await run(state.engine, truncate.apply_cuts, inode, slot, state.volume)
            await asyncio.sleep(0)
        await run(state.engine, truncate.finish_cuts, inode, applied or 0)


async def _free_inodes(state: State) -> None:
    """Free the unlinked inodes that nobody has open."""
    after = Inode(0)
    while found := (await run(state.engine, freeing.unlinked_inodes, after))[0]:
        for inode in found:
            if (await run(state.engine, freeing.is_open, inode))[0]:
                # Its last close, or its session's end, wakes us.
                continue
            while not (await run(state.engine, freeing.free_inode, inode))[0]:
                await asyncio.sleep(0)
            await asyncio.sleep(0)
        after = found[-1]


async def free_round(state: State) -> bool:
    """Delete what died before everything was synced. True if more waits, or a server that is up did not do its part."""
    noted = state.engine.last_sequence
    rounds, at_s = state.rounds, asyncio.get_running_loop().time()
    late = rounds.late_range(at_s)
    if late is None and not (await run(state.engine, freeing.dead_blocks, noted, 1, rounds.front))[0]:
        return rounds.is_waiting
    if not await state.sync_data():
        return True
    await state.sync_log()
    fresh, _ = await run(state.engine, freeing.dead_blocks, noted, DEAD_A_ROUND, rounds.front)
    await _delete(state, fresh, at_s)
    if fresh:
        rounds.took_fresh(fresh[-1])
    if late is not None:
        begin, end = late
        found, _ = await run(state.engine, freeing.dead_blocks, noted, DEAD_A_ROUND, begin)
        left = [block for block in found if block <= end]
        await _delete(state, left, at_s, is_again=True)
        rounds.took_late(left[-1] if len(left) == DEAD_A_ROUND else None)
    state.troubles.pop("freeing", None)
    return True


async def _delete(state: State, blocks: list[freeing.DeadBlock], at_s: float, *, is_again: bool = False) -> None:
    """Have these deleted, and forget those that every server has deleted, as far as each is asked now.

    With `is_again` only servers that have refused are asked: the others have deleted these.
    """
    rounds = state.rounds
    orders, _ = await run(state.engine, freeing.holders, blocks)
    waiting = {server for server in orders if not rounds.may_ask(server, at_s)}
    left = {name for server in waiting for name in orders[server]}
    synced = state.engine.synced_sequence
    asked = {
        server: names
        for server, names in orders.items()
        if server not in waiting and (rounds.has_refused(server) or not is_again)
    }
    results = await asyncio.gather(*(_delete_on(state, server, names, synced) for server, names in asked.items()))
    for (server, names), is_done in zip(asked.items(), results, strict=True):
        if is_done:
            rounds.obeyed(server)
        else:
            rounds.refused(server, at_s)
            left.update(names)
    if left:
        rounds.left_behind()
    deleted = [block for block in blocks if block[1:] not in left]
    step = freeing.BLOCKS_FORGOTTEN_A_STEP
    for start in range(0, len(deleted), step):
        await run(state.engine, freeing.forget, deleted[start : start + step], state.volume.id)
        await asyncio.sleep(0)
    log.debug("blocks freed", blocks=len(deleted), left=len(left))


async def _delete_on(
    state: State, server: ServerNumber, blocks: list[tuple[Partition, BlockId]], synced: CommitSequence
) -> bool:
    """Order one server to delete. A server that is down keeps garbage, which reconcile finds when it is back."""
    member = state.members.get(server)
    if member is None or member.down:
        return True
    peer = state.data_peers.get(server)
    if peer is None:
        return False
    order = data_messages.DeleteBlocks(generation=state.generation, sequence=synced, blocks=tuple(blocks))
    try:
        await peer.call(order, deadline_s=DATA_CALL_S)
    except Fenced:
        raise
    except MendfsError as error:
        log.warning("data server did not delete", server=server, blocks=len(blocks), error=str(error))
        return False
    return True


LOOPS = (tick_forever, sync_forever, free_forever, purge_forever)


async def run_loops(state: State, folder: str) -> None:
    """All loops until cancelled. One that fails ends the server, whatever the cause.

    A server that went on answering without leases, clocks or syncs would acknowledge what nobody makes durable.
    """
    try:
        async with asyncio.TaskGroup() as group:
            for loop in LOOPS:
                group.create_task(loop(state), name=loop.__name__)
            group.create_task(watch_room_forever(state, folder), name="watch_room_forever")
    except* Exception as failures:
        error = failures.exceptions[0]
        log.error("background work failed", exc_info=error)
        state.fail(error if isinstance(error, MendfsError) else MendfsError(f"background work failed: {error!r}"))
