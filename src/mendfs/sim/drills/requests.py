"""Drills of requests, ids and commits (design section 5): what is done once, and what must be refused."""

import msgspec

from mendfs.errors import AppendMoved, MendfsError
from mendfs.meta import schema
from mendfs.model import BlockId, Inode, Seen, ServerNumber, Slot
from mendfs.sim.drills.yard import Failed, RawSession, Yard
from mendfs.wire.messages import meta as messages
from mendfs.wire.messages import session as session_messages

ROOT = Inode(1)


async def requests_are_done_once(yard: Yard) -> None:
    """A repeated request gets its first answer, after a restart too; an old one is refused."""
    session, name = await yard.session(), yard.name()
    inode = Inode(await session.id("inode"))
    make = messages.Make(session.at(), ROOT, name, inode, 0o100644, 0, 0, session.now_ns())
    first = await session.ask(make, messages.Found)
    await _again(yard, session, make, first, "repeated at once")
    await session.ask(messages.SyncLog(), messages.LogSynced)
    await (yard.kill(yard.sim.meta) if yard.rng.random() < 0.5 else yard.power(yard.sim.meta))
    await session.resume()
    await _again(yard, session, make, first, "repeated after a restart")
    unlink = messages.Unlink(session.at(), ROOT, name, False, session.now_ns())
    removed = await session.ask(unlink, messages.Removed)
    await _again(yard, session, unlink, removed, "an unlink repeated")
    inode = await session.make(name)
    await yard.refused(session.ask(make, messages.Found), "a request two numbers old")
    await yard.refused(session.ask(unlink, messages.Removed), "a request one number old")
    found = await session.ask(messages.Lookup(ROOT, name), messages.LookedUp)
    if found.attributes is None or found.attributes.inode != inode:
        yard.wrong("an old request was done again: the name has gone")
    await session.unlink(name)
    await session.end()


async def _again(yard: Yard, session: RawSession, message: object, first: object, what: str) -> None:
    try:
        answer = await session.ask(message, object)  # type: ignore[arg-type] # any message is one
    except MendfsError as error:
        yard.wrong(f"a request {what} was refused: {error}")
        return
    if answer != first:
        yard.wrong(f"a request {what} has another answer: {answer} instead of {first}")


async def ids_are_granted_once(yard: Yard) -> None:
    """Ranges and session numbers survive a power cut right after their answer, and nobody uses another's."""
    numbers = set()
    for _ in range(3):
        session = await yard.session()
        numbers.add(session.opened.session)
        await yard.power(yard.sim.meta)
    if len(numbers) < 3:
        yard.wrong(f"3 clients were given session numbers {sorted(numbers)}")
    await session.resume()
    mine = Inode(await session.id("inode"))
    block = await session.id("block")
    await yard.power(yard.sim.meta)
    other = await yard.session()
    await session.resume()
    theirs = [await other.id("inode") for _ in range(2 * schema.RANGE_IDS if schema.RANGE_IDS < 64 else 2)]
    blocks = [await other.id("block") for _ in range(2)]
    if any(grant.start <= mine < grant.stop for grant in other.granted) or mine in theirs or block in blocks:
        yard.wrong("one id was granted to two sessions")
    generation = other.opened.generation
    if any(each >> 44 != generation for each in blocks):
        yard.wrong(f"block id {blocks[0]:#x} was granted in generation {generation}")
    for inode in (theirs[0], mine + (1 << 40)):
        at, name = session.at(), yard.name()
        make = messages.Make(at, ROOT, name, Inode(inode), 0o100644, 0, 0, session.now_ns())
        await yard.refused(session.ask(make, messages.Found), "a file under an inode number of another session")
    inode = await session.make(name := yard.name())
    made = await session.block(inode, 0, b"foreign" * 10)
    made.name = (made.name[0], BlockId(blocks[0]))
    row = session.row(made)
    for server in row:
        await yard.put(server, made)
    await yard.refused(
        session.ask(session.commit(inode, made, row), messages.Committed), "a commit of another session's block id"
    )
    await session.unlink(name)
    await session.end()
    await other.end()


async def commits_need_their_quorum(yard: Yard) -> None:
    """W servers of the row; the others are owed the block until they say that they have it."""
    shape, session = yard.sim.shape, await yard.session()
    inode = await session.make(name := yard.name())
    made = await session.block(inode, 0, yard.rng.randbytes(500))
    row = session.row(made)
    yard.rng.shuffle(row)
    for server in row[: shape.write_quorum]:
        await yard.put(server, made, sync=True)
    strangers = [number for number in range(shape.servers) if number not in row] + [77, 78]
    for servers in (row[: shape.write_quorum - 1], row[: shape.write_quorum - 1] + strangers, strangers):
        commit = session.commit(inode, made, servers)
        await yard.refused(session.ask(commit, messages.Committed), f"a commit acknowledged by {servers} of row {row}")
    await session.ask(session.commit(inode, made, row[: shape.write_quorum]), messages.Committed)
    rest = set(row[shape.write_quorum :])
    _check_owed(yard, made.name, rest, "after the commit")
    await session.ask(messages.AcknowledgeLate(session.at(), ServerNumber(row[0]), (made.name,)), session_messages.Done)
    _check_owed(yard, made.name, rest, "after somebody else's late acknowledgement")
    for server in sorted(rest):
        await yard.put(server, made)
        late = messages.AcknowledgeLate(session.at(), ServerNumber(server), (made.name,))
        await session.ask(late, session_messages.Done)
        rest.discard(server)
        _check_owed(yard, made.name, rest, f"after the late acknowledgement of {server}")
    await yard.refused(
        session.ask(session.commit(inode, made, row), messages.Committed), "a second commit of one block"
    )
    await session.unlink(name)
    await session.end()


def _check_owed(yard: Yard, name: tuple[int, int], wanted: set[int], when: str) -> None:
    owed = {int(server) for server, *rest in map(schema.owed_in, yard.keys(schema.Kind.OWED)) if tuple(rest) == name}
    if owed != wanted:
        yard.wrong(f"block {name[1]:#x} is owed to servers {sorted(owed)} instead of {sorted(wanted)} {when}")


async def commits_are_checked(yard: Yard) -> None:
    """Sizes grow by max, extents lie where they can, and an append finds its place in the transaction."""
    shape, session = yard.sim.shape, await yard.session()
    inode = await session.make(name := yard.name())
    old = await session.write(inode, 0, yard.rng.randbytes(400))
    await session.write(inode, 0, yard.rng.randbytes(100), 50)
    if (await session.attributes(inode)).size != 400:
        yard.wrong(f"a commit in the middle of a file of 400 bytes made it {(await session.attributes(inode)).size}")
    made = await session.block(inode, 0, yard.rng.randbytes(100))
    row = session.row(made)
    for server in row:
        await yard.put(server, made, sync=True)
    good = session.commit(inode, made, row)
    bad = {
        "two extents of which one lies over the other": (made.extent(0, 60), made.extent(40, 60)),
        "an extent longer than its block": (msgspec.structs.replace(made.extent(0), length=101),),
        "an extent past the end of its slot": (made.extent(shape.block_size - 50),),
        "an extent of a block that it does not bring": (old.extent(0),),
        "an extent with another root": (msgspec.structs.replace(made.extent(0), root=old.root),),
    }
    for what, extents in bad.items():
        change = (messages.SlotChange(made.slot, extents),)
        commit = msgspec.structs.replace(good, at=session.at(), slots=change)
        await yard.refused(session.ask(commit, messages.Committed), f"a commit with {what}")
    await _append(yard, session, inode, 400)
    await session.unlink(name)
    await session.end()


async def _append(yard: Yard, session: RawSession, inode: Inode, size: int) -> None:
    """Prepared for a size that the file has no more."""
    block_size = yard.sim.shape.block_size
    made = await session.block(inode, 0, yard.rng.randbytes(30))
    row = session.row(made)
    for server in row:
        await yard.put(server, made, sync=True)
    commit = session.commit(inode, made, row, 300, append_at=300, append_length=30)
    if size + 30 <= block_size:
        answer = await session.ask(commit, messages.Committed)
        extents = next(each.extents for each in answer.slots)
        where = [each.offset_in_slot for each in extents if each.block == made.name[1]]
        if where != [size] or answer.attributes.size != size + 30:
            yard.wrong(f"an append to {size} bytes went to {where}, and the size is {answer.attributes.size}")
    now = messages.SetAttributes(session.at(), inode, session.now_ns(), size=block_size - 10)
    await session.ask(now, messages.Found)
    made = await session.block(inode, 0, yard.rng.randbytes(30))
    for server in row:
        await yard.put(server, made, sync=True)
    commit = session.commit(inode, made, row, 300, append_at=300, append_length=30)
    error = await yard.refused(session.ask(commit, messages.Committed), "an append that leaves its slot")
    if error is not None and not isinstance(error, AppendMoved):
        yard.wrong(f"an append that leaves its slot was refused with {error!r}")


async def cuts_stay(yard: Yard) -> None:
    """What a truncation hid does not come back, and what was committed after it is not hidden, before and after the
    background has applied the cut.
    """
    shape, session = yard.sim.shape, await yard.session()
    inode = await session.make(name := yard.name())
    size = shape.block_size
    old = [await session.write(inode, slot, yard.rng.randbytes(size)) for slot in (0, 1)]

    async def resize(to: int) -> None:
        await session.ask(messages.SetAttributes(session.at(), inode, session.now_ns(), size=to), messages.Found)

    await resize(size + 100)
    await resize(10)
    await resize(2 * size)
    new = await session.block(inode, 0, yard.rng.randbytes(50))
    row = session.row(new)
    for server in row:
        await yard.put(server, new, sync=True)
    await session.ask(session.commit(inode, new, row, 100), messages.Committed)
    wanted = [(0, 10, old[0].name[1]), (100, 50, new.name[1])]
    for when in ("at once", "later"):
        shown = [(each.offset_in_slot, each.length, each.block) for each in await session.extents(inode)]
        if shown != wanted or await session.extents(inode, 1):
            yard.wrong(f"{when}: a file cut to 10 bytes and written at 100 shows {shown} instead of {wanted}")
            break
        if not await yard.until(lambda: not yard.keys(schema.Kind.CUTTING), 30, "the cuts are applied"):
            break
        raw = yard.engine.read(schema.slot_key(inode, Slot(0)))
        stored = () if raw is None else schema.SLOT.decode(raw)
        if [(each.offset_in_slot, each.length, each.block) for each in stored] not in (wanted, wanted):
            yard.wrong(f"with the cuts applied, {len(stored)} extents are stored instead of {len(wanted)}")
    await session.unlink(name)
    await session.end()


async def merges_bury_nothing(yard: Yard) -> None:
    """A merged block is laid only where the slot still shows what was seen."""
    session = await yard.session()
    inode = await session.make(name := yard.name())
    first = await session.write(inode, 0, yard.rng.randbytes(400))
    second = await session.write(inode, 0, yard.rng.randbytes(200), 0)
    before = await session.extents(inode)
    version = (await session.attributes(inode)).version

    async def merge(seen: BlockId) -> messages.Merged:
        made = await session.block(inode, 0, yard.rng.randbytes(400))
        row = session.row(made)
        for server in row:
            await yard.put(server, made, sync=True)
        return await session.ask(
            messages.MergeSlot(
                session.at(), inode, Slot(0), made.new(tuple(row)), (made.extent(0),), (Seen(0, 400, seen),)
            ),
            messages.Merged,
        )

    await yard.refused(merge(BlockId(second.name[1] + (1 << 40))), "a merge of what the slot never was")
    if await session.extents(inode) != before:
        yard.wrong("a merge that was refused has changed the slot")
    await merge(first.name[1])
    shown = [(each.offset_in_slot, each.length, each.block) for each in await session.extents(inode)]
    if shown[0] != (0, 200, second.name[1]) or shown[1][:2] != (200, 200) or shown[1][2] == first.name[1]:
        yard.wrong(f"a merge of a slot that has changed made it {shown}")
    if (await session.attributes(inode)).version != version:
        yard.wrong("a merge has changed the version")
    await session.unlink(name)
    await session.end()


async def the_log_is_synced(yard: Yard) -> None:
    """What SyncLog answered for survives; what nobody asked for is durable soon."""
    session = await yard.session()
    await session.make(first := yard.name())
    await session.ask(messages.SyncLog(), messages.LogSynced)
    await yard.power(yard.sim.meta)
    await session.resume()
    await session.make(second := yard.name())
    await session.make(third := yard.name())
    noted = yard.engine.last_sequence
    await session.ask(messages.SyncLog(), messages.LogSynced)
    if yard.engine.synced_sequence < noted:
        yard.wrong("SyncLog was answered before the log was durable")
    await session.unlink(third)
    noted = yard.engine.last_sequence
    await yard.until(lambda: yard.engine.synced_sequence >= noted, 6, "a change that nobody synced is durable")
    await yard.power(yard.sim.meta)
    await session.resume()
    for name, is_there in ((first, True), (second, True), (third, False)):
        found = await session.ask(messages.Lookup(ROOT, name), messages.LookedUp)
        if (found.attributes is not None) != is_there:
            yard.wrong(f"{name!r}, durable, is {'gone' if is_there else 'back'} after a power cut")
        if found.attributes is not None:
            await session.unlink(name)
    await session.end()


async def a_failed_log_sync_ends_it(yard: Yard) -> None:
    """If the log cannot be synced nobody is told that it was, and the meta server stops."""
    session, meta = await yard.session(), yard.sim.meta
    await session.make(yard.name())
    process = meta.process
    meta.disk.rules.sync_error_chance = 1.0
    try:
        await session.ask(messages.SyncLog(), messages.LogSynced)
    except (MendfsError, Failed):
        pass
    else:
        yard.wrong("the log's sync failed and was answered")
    await yard.until(lambda: process is not None and not process.is_alive, 20, "a meta server without its log ends")
    meta.disk.rules.sync_error_chance = 0.0
    # What a failed sync dropped is still in the page cache: the power cut makes memory and disk one again.
    await yard.power(meta)
    await session.resume()
    await session.end()
