"""The volume's own keys: its parameters, the generation, the placement table and its epoch, the servers."""

import stat

from mendfs.errors import StoreDamaged, UsageError
from mendfs.kv.engine import Engine, Transaction, run
from mendfs.meta import schema
from mendfs.meta.inodes import changed, new_record, write
from mendfs.model import (
    ROOT_INODE,
    CommitSequence,
    Epoch,
    Generation,
    Partition,
    Row,
    ServerNumber,
    Table,
    Volume,
)
from mendfs.world import World

ROWS_A_STEP = 80
"""Rows of the table written in one transaction."""
LIVES_KEPT = 1000
"""How each of so many lives began is remembered: a client that slept through more drops all it knew."""
GENERATION_MAX = (1 << 20) - 1


async def read_volume(engine: Engine) -> Volume | None:
    """The volume's parameters, or None: not formatted."""
    raw = await engine.begin().get(schema.VOLUME_KEY)
    return None if raw is None else schema.VOLUME.decode(raw)


async def check_volume(engine: Engine, expected: Volume | None, *, may_format: bool, where: str) -> bool:
    """Whether the engine holds the volume that is expected. False: it holds none, and may be given it.

    Raises UsageError for another volume's folder, StoreDamaged for one that has lost its own.
    """
    stored = await read_volume(engine)
    if stored is None:
        if may_format and expected is not None:
            return False
        raise StoreDamaged(
            f"the folder {where} holds no volume: put back a good copy of it, or make one elsewhere with "
            '"mendfs up --dir" or "mendfs format"'
        )
    if expected is not None and stored.id != expected.id:
        raise StoreDamaged(
            f"the folder {where} holds volume {stored.id}, not {expected.id} as this cluster: put its own folder back"
        )
    return True


async def format_volume(engine: Engine, volume: Volume, world: World, *, uid: int = 0, gid: int = 0) -> None:
    """Make an empty volume with a root directory, durably. Raises UsageError if there is one.

    The directory belongs to whoever makes the volume: an ordinary user's would be of no use to them otherwise.
    """

    async def operation(tx: Transaction) -> None:
        if await tx.get(schema.VOLUME_KEY) is not None:
            raise UsageError("there is a volume already; choose another folder")
        tx.put(schema.VOLUME_KEY, schema.VOLUME.encode(volume))
        root = new_record(
            ROOT_INODE,
            generation=0,
            mode=stat.S_IFDIR | 0o755,
            uid=uid,
            gid=gid,
            now_ns=world.now_ns(),
            version=CommitSequence(1),
        )
        write(tx, schema.InodeRecord(changed(root).attributes, parent=ROOT_INODE))

    await run(engine, operation)
    await engine.sync()


async def raise_generation(engine: Engine) -> Generation:
    """One more life of a meta server; synced before anything is done in it."""

    async def operation(tx: Transaction) -> Generation:
        raw = await tx.get(schema.GENERATION_KEY)
        generation = Generation(1 if raw is None else schema.NUMBER.decode(raw) + 1)
        if generation > GENERATION_MAX:
            raise UsageError(f"the meta server was started {generation} times: block ids have no room for more")
        tx.put(schema.GENERATION_KEY, schema.NUMBER.encode(generation))
        tx.put(schema.life_key(generation), schema.NUMBER.encode(tx.sequence() - 1))
        if generation > LIVES_KEPT:
            tx.delete(schema.life_key(Generation(generation - LIVES_KEPT)))
        return generation

    generation, _ = await run(engine, operation)
    await engine.sync()
    return generation


async def survived(tx: Transaction, generation: Generation) -> CommitSequence:
    """The last commit of that life of the meta server that is still there; 0 if nobody knows any more."""
    raw = await tx.get(schema.life_key(Generation(generation + 1)))
    return CommitSequence(0 if raw is None else schema.NUMBER.decode(raw))


async def _whole_range(engine: Engine, kind: schema.Kind) -> list[tuple[bytes, bytes]]:
    begin, end = schema.all_of(kind)
    found: list[tuple[bytes, bytes]] = []
    while True:
        page = await engine.begin().range(begin, end, limit=1000)
        found += page
        if len(page) < 1000:
            return found
        begin = page[-1][0] + b"\0"


async def read_table(engine: Engine) -> Table | None:
    """The placement table, or None: not made yet."""
    raw = await engine.begin().get(schema.EPOCH_KEY)
    if raw is None:
        return None
    rows = [schema.ROW.decode(row) for _, row in await _whole_range(engine, schema.Kind.ROW)]
    return Table(Epoch(schema.NUMBER.decode(raw)), tuple(rows))


async def write_first_table(engine: Engine, rows: tuple[Row, ...]) -> Table:
    """Store a new volume's table, durably. The epoch comes last: without it the rows do not count."""
    for start in range(0, len(rows), ROWS_A_STEP):

        async def write_rows(tx: Transaction, start: int = start) -> None:
            for partition, row in enumerate(rows[start : start + ROWS_A_STEP], start=start):
                tx.put(schema.row_key(Partition(partition)), schema.ROW.encode(row))

        await run(engine, write_rows)
    epoch = await raise_epoch(engine)
    await engine.sync()
    return Table(epoch, rows)


async def raise_epoch(engine: Engine) -> Epoch:
    """The next epoch."""

    async def operation(tx: Transaction) -> Epoch:
        raw = await tx.get(schema.EPOCH_KEY)
        epoch = Epoch(1 if raw is None else schema.NUMBER.decode(raw) + 1)
        tx.put(schema.EPOCH_KEY, schema.NUMBER.encode(epoch))
        return epoch

    epoch, _ = await run(engine, operation)
    return epoch


async def read_servers(engine: Engine) -> dict[ServerNumber, schema.ServerRecord]:
    """The data servers of the volume."""
    return {
        schema.server_in(key): schema.SERVER.decode(raw) for key, raw in await _whole_range(engine, schema.Kind.SERVER)
    }


async def write_server(engine: Engine, number: ServerNumber, record: schema.ServerRecord) -> None:
    """Note a data server, durably: its number is never given to another."""

    async def operation(tx: Transaction) -> None:
        tx.put(schema.server_key(number), schema.SERVER.encode(record))

    await run(engine, operation)
    await engine.sync()


async def count_inodes(engine: Engine, limit: int) -> int:
    """Inodes of the volume, up to `limit`."""
    begin, end = schema.all_of(schema.Kind.INODE)
    return len(await engine.begin().range(begin, end, limit=limit))
