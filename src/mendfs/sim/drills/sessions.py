"""Drills of sessions, restarts and freeing (design section 5)."""

import asyncio

from mendfs.errors import MendfsError, SessionLost
from mendfs.meta import schema
from mendfs.model import BlockId, Inode, SessionId, Slot
from mendfs.sim.drills.yard import Yard
from mendfs.wire.messages import data as data_messages
from mendfs.wire.messages import meta as messages
from mendfs.wire.messages import session as session_messages

LEASE_S = 10.0
FREED_S = 30.0
"""Queues are worked off once a second."""
QUEUES = (
    schema.Kind.DROP,
    schema.Kind.DEAD,
    schema.Kind.UNLINKED,
    schema.Kind.CUTTING,
    schema.Kind.OPEN_UNLINKED,
)


async def leases_run_out(yard: Yard) -> None:
    """A silent session ends, with its ranges and opens; one that renews does not, nor for a pause of the server's."""
    silent, lively = await yard.session(), await yard.session()
    inode = await silent.make(name := yard.name())
    made = await silent.block(inode, 0, b"late" * 20)
    row = silent.row(made)
    for server in row:
        await yard.put(server, made)
    commit = silent.commit(inode, made, row)
    await silent.ask(messages.OpenInode(inode), messages.Opened)
    await lively.unlink(name)
    number = silent.opened.session
    silent.silence()
    await asyncio.sleep(LEASE_S - 3)
    if yard.engine.read(schema.inode_key(inode)) is None:
        yard.wrong("an unlinked file was freed though a living session has it open")
    await asyncio.sleep(6)
    await yard.refused(silent.ask(commit, messages.Committed), "a commit of a session that has been silent for 13 s")
    try:
        await silent.resume()
    except SessionLost:
        pass
    else:
        yard.wrong("a session came back after its lease")
    if yard.engine.read(schema.session_key(SessionId(number))) is not None:
        yard.wrong("a session that has ended is still known")
    pairs = yard.engine.read_range(*schema.all_of(schema.Kind.RANGE), 1 << 30, False)
    left = [key for key, owner in pairs if int.from_bytes(owner, "big") == number]
    if left:
        yard.wrong(f"a session that has ended still has {len(left)} ranges")
    await yard.until(lambda: yard.engine.read(schema.inode_key(inode)) is None, FREED_S, "its unlinked file is freed")
    yard.sim.meta.pause()
    await asyncio.sleep(LEASE_S + 5)
    yard.sim.meta.resume()
    await asyncio.sleep(3)
    try:
        await lively.attributes(Inode(1))
        await lively.ask(session_messages.Renew(BlockId(0)), session_messages.Renewed)
    except MendfsError as error:
        yard.wrong(f"a session was lost to the meta server's own pause: {error}")
    else:
        await lively.end()


async def reclaims_are_awaited(yard: Yard) -> None:
    """After a restart nothing is freed that a session from before has open, whoever unlinks it meanwhile."""
    holder = await yard.session()
    inode = await holder.make(name := yard.name())
    made = await holder.write(inode, 0, yard.rng.randbytes(300))
    await holder.ask(messages.OpenInode(inode), messages.Opened)
    holder.opens.add(inode)
    gone = await holder.make(second := yard.name())
    await holder.write(gone, 0, yard.rng.randbytes(300))
    await holder.ask(messages.OpenInode(gone), messages.Opened)
    holder.opens.add(gone)
    await holder.unlink(second)
    later = await holder.make(third := yard.name())
    await holder.ask(messages.OpenInode(later), messages.Opened)
    holder.opens.add(later)
    await holder.ask(messages.SyncLog(), messages.LogSynced)
    holder.silence()
    generation = holder.opened.generation
    yard.sim.meta.kill()
    await asyncio.sleep(0.05)
    await yard.whole()
    other = await yard.session()
    if other.opened.generation <= generation:
        yard.wrong(f"generation {other.opened.generation} came after {generation}")
    await other.unlink(name)
    await asyncio.sleep(4)
    for each in (inode, gone):
        if yard.engine.read(schema.inode_key(each)) is None:
            yard.wrong("a file was freed before the session that has it open had time to reclaim it")
    await holder.resume()
    await other.unlink(third)
    await asyncio.sleep(8)
    for each in (inode, gone, later):
        if yard.engine.read(schema.inode_key(each)) is None:
            yard.wrong("a file was freed though the session that has it open has reclaimed it")
    if await yard.fetch(holder.row(made)[0], made) != made.data:
        yard.wrong("a block of a file that is open was deleted after a restart")
    await holder.ask(session_messages.CloseInodes((inode, gone, later)), session_messages.Done)
    await yard.until(
        lambda: all(yard.engine.read(schema.inode_key(each)) is None for each in (inode, gone, later)),
        FREED_S,
        "unlinked files are freed after their last close",
    )
    await holder.end()
    await other.end()


async def generations_rise(yard: Yard) -> None:
    """Each life of the meta server has a higher one, also when power goes as soon as it has begun."""
    meta = yard.sim.meta
    for _ in range(3):
        server = meta.server
        assert server is not None, "it was started"
        before = server.state.generation
        lives = len(meta.processes)
        meta.cut_power()
        meta.start()
        began = await yard.until(
            lambda lives=lives: (
                len(meta.processes) > lives  # type: ignore[misc] # bound in this turn
                and meta.server is not None
                and meta.server.state.world.pid == len(meta.processes)
            ),
            60,
            "the meta server is there after a power cut",
        )
        if not began:
            return
        assert meta.server is not None, "it has begun"
        if meta.server.state.generation <= before:
            yard.wrong(f"generation {meta.server.state.generation} came after {before}")
    await yard.whole()


async def what_is_unlinked_is_freed(yard: Yard) -> None:
    """Not before its last close, and then wholly: keys, queues and replicas."""
    session = await yard.session()
    inode = await session.make(name := yard.name())
    made = [await session.write(inode, slot, yard.rng.randbytes(200)) for slot in range(2)]
    replaced = await session.make(second := yard.name())
    made.append(await session.write(replaced, 0, yard.rng.randbytes(200)))
    made.append(await session.write(replaced, 0, yard.rng.randbytes(300)))
    await session.ask(messages.OpenInode(inode), messages.Opened)
    await session.unlink(name)
    third = await session.make(third_name := yard.name())
    rename = messages.Rename(session.at(), Inode(1), third_name, Inode(1), second, 0, session.now_ns())
    await session.ask(rename, messages.Removed)
    await asyncio.sleep(6)
    for block in made[:2]:
        if await yard.fetch(session.row(block)[0], block) != block.data:
            yard.wrong("a block of an unlinked file that is open was deleted")
    await session.ask(session_messages.CloseInodes((inode,)), session_messages.Done)
    await session.unlink(second)
    await yard.until(
        lambda: (
            not any(yard.keys(kind) for kind in QUEUES)
            and all(yard.engine.read(schema.inode_key(each)) is None for each in (inode, replaced, third))
        ),
        FREED_S,
        "the queues of what is to be freed are empty",
    )
    for block in made:
        if yard.engine.read(schema.block_key(*block.name)) is not None:
            yard.wrong(f"block {block.name[1]:#x} of files that are gone is still known")
        for number in session.row(block):
            peer = await yard.data(number)
            held = await yard.ask(peer, data_messages.HaveBlocks((block.name,)), data_messages.BlocksHeld)
            await peer.close()
            if held.roots != (None,):
                yard.wrong(f"server {number} still holds block {block.name[1]:#x} of a file that was freed")
    await session.end()


async def a_silent_server_is_down(yard: Yard) -> None:
    """After 3 s writes wait for it no more, and what it misses is owed to it."""
    machine = yard.rng.choice(yard.sim.data)
    client, volume = await yard.client()
    machine.is_wanted = False
    machine.kill(restart=False)

    def is_down() -> bool:
        server = yard.sim.meta.server
        assert server is not None, "it runs"
        return any(member.state() == "down" for member in server.state.members)

    await yard.until(is_down, 8, f"{machine.name}, dead, counts as down")
    name, data = yard.name(), yard.rng.randbytes(yard.sim.shape.block_size * 3 + 100)
    began_s = yard.sim.loop.time()

    async def write() -> int:
        made = await volume.make(Inode(1), name, 0o100644, uid=0, gid=0, open=True)
        opened = await volume.open_made(made, flags=2)
        await opened.write(data, 0)
        await opened.flush()
        await opened.release()
        return made.inode

    inode = await yard.on(client, write())
    if yard.sim.loop.time() - began_s > 15:
        yard.wrong(f"a write took {yard.sim.loop.time() - began_s:.1f} s with one of the servers down")
    owed = {schema.owed_in(key)[1:] for key in yard.keys(schema.Kind.OWED) if schema.owed_in(key)[0] == machine.number}
    for key, raw in yard.engine.read_range(*schema.slots_of(Inode(inode), Slot(0)), 100, False):
        for extent in schema.SLOT.decode(raw):
            row = schema.ROW.decode(yard.engine.read(schema.row_key(extent.partition)) or b"")
            is_in_row = any(entry.server == machine.number for entry in row)
            if is_in_row and (extent.partition, extent.block) not in owed:
                yard.wrong(f"{machine.name} missed block {extent.block:#x} of {key!r} and is not owed it")
    machine.start()
    await yard.whole()
    await yard.on(client, volume.unlink(Inode(1), name))
    client.kill(restart=False)
