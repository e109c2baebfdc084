"""From what `mendfs up` was told to a supervisor that can start: every check that can be made before a process starts.

What an earlier supervisor left behind (processes, a dead mount) is cleared away first.
"""

import asyncio
import os
import random

from mendfs.cluster.child import FLUSH_TIMEOUT_S, DataChild, MetaChild, MountChild, SupervisorChild
from mendfs.cluster.folder import SECRET_BYTES, ClusterFolder, ClusterRecord, read_secret
from mendfs.cluster.leftovers import clean_dead_mount, stop_processes
from mendfs.cluster.parameters import check_same, new_volume
from mendfs.cluster.supervisor import Kept, Notice, Supervisor
from mendfs.errors import UsageError
from mendfs.fuse.device import check_mountpoint
from mendfs.model import ServerNumber, Volume
from mendfs.world import World
from mendfs.world.network import Network
from mendfs.world.processes import Processes

HOST = "127.0.0.1"
PORTS_FROM, PORTS_TO = 20000, 32000
"""Ports nobody has reserved, below those that the system gives to outgoing connections (from 32768 on), one of which
could else have ours when a server is started again."""
PORT_TRIES = 100
PORT_MAX = 65535


async def prepare(
    world: World, processes: Processes, folder: ClusterFolder, options: SupervisorChild, notice: Notice
) -> Supervisor:
    """Check and clear everything, and write down what will run. The caller holds the folder's lock."""
    record = folder.read()
    stored = None if record is not None else await _stored_volume(folder)
    was_formatted = stored is not None if record is None else record.is_formatted
    volume = _volume(world, folder, record.volume if record is not None else stored, options)
    if record is not None:
        await _clear(world, processes, folder, record, notice)
    if options.mount:
        nonempty = "nonempty" in options.mount_options.split(",")
        await world.disk.run(check_mountpoint, options.mount, allow_nonempty=nonempty)
    base_port = await _base_port(world, record, options, count=1 + volume.server_count)
    _secure(world, folder, is_new=record is None and not folder.holds_store())
    record = ClusterRecord(
        volume=volume,
        base_port=base_port,
        meta=_address(base_port),
        mount=options.mount,
        supervisor=processes.identity(os.getpid()),
        is_formatted=was_formatted,
    )
    folder.write(record)
    folder.forget("stop.json", "unflushed.json", "stopped.json", "troubles.json")
    return Supervisor(world, processes, folder, record, _roles(folder, record, options), notice)


def check_wishes(folder: ClusterFolder, options: SupervisorChild) -> None:
    """What can be refused before a folder is made for it. Raises UsageError."""
    record = folder.read()
    volume = None
    if record is not None:
        volume = record.volume
        check_same(options.wishes, volume, where=folder.path)
    elif not folder.holds_store():
        volume = new_volume(options.wishes, volume_id="", now_ns=0)
    if volume is not None and options.base_port is not None:
        check_ports(options.base_port, 1 + volume.server_count)


def check_ports(base_port: int, count: int) -> None:
    """Raise UsageError if there are not so many ports from there on."""
    if base_port + count - 1 > PORT_MAX:
        raise UsageError(
            f"--base-port {base_port} is too high: {count} ports are needed, and the last there is is {PORT_MAX}; "
            f"choose {PORT_MAX + 1 - count} or lower"
        )


def _volume(world: World, folder: ClusterFolder, known: Volume | None, options: SupervisorChild) -> Volume:
    if known is None:
        volume_id = world.rng.randbytes(16).hex()
        return new_volume(options.wishes, volume_id=volume_id, now_ns=world.now_ns())
    check_same(options.wishes, known, where=folder.path)
    return known


async def _stored_volume(folder: ClusterFolder) -> Volume | None:
    """The volume of a meta server's store whose cluster.json was lost; the store itself knows best."""
    if not folder.holds_store():
        return None
    from mendfs.kv.rocks import RocksEngine
    from mendfs.meta.volume import read_volume

    engine = await RocksEngine.open(folder.inside("meta"))
    try:
        return await read_volume(engine)
    finally:
        await engine.close()


async def _clear(
    world: World, processes: Processes, folder: ClusterFolder, record: ClusterRecord, notice: Notice
) -> None:
    """Stop what a supervisor that was killed left running, and take its dead mount away."""
    running = [child for child in record.children if processes.identity(child.process.pid) == child.process]
    if running:
        notice(f"stopping what an earlier supervisor left behind: {', '.join(child.name for child in running)}")
        for line in await stop_processes(processes, folder, running, timeout_s=FLUSH_TIMEOUT_S):
            notice(line)
    if record.mount:
        await clean_dead_mount(world.disk, record.mount)


async def _base_port(world: World, record: ClusterRecord | None, options: SupervisorChild, *, count: int) -> int:
    """Explicit, or that of the last time: then they must be free. Else some range that is."""
    chosen = options.base_port if options.base_port is not None else record.base_port if record is not None else None
    if chosen is not None:
        check_ports(chosen, count)
        busy = await _busy_port(world.network, chosen, count)
        if busy is not None:
            raise UsageError(
                f"port {busy} is in use by another program: stop it, or choose {count} free ports with --base-port"
            )
        return chosen
    for _ in range(PORT_TRIES):
        candidate = _candidate(world.rng, count)
        if await _busy_port(world.network, candidate, count) is None:
            return candidate
    raise UsageError(f"found no {count} free ports in a row between {PORTS_FROM} and {PORTS_TO}: use --base-port")


def _candidate(rng: random.Random, count: int) -> int:
    # At random, for two clusters may be looking at the same time.
    return rng.randrange(PORTS_FROM, max(PORTS_FROM + 1, PORTS_TO - count))


async def _busy_port(network: Network, base_port: int, count: int) -> int | None:
    """The first of these ports that cannot be listened on."""
    for port in range(base_port, base_port + count):
        try:
            listener = await network.listen(_address(port), asyncio.Protocol)
        except UsageError:
            return port
        await listener.close()
    return None


def _secure(world: World, folder: ClusterFolder, *, is_new: bool) -> None:
    """A new cluster gets a secret; an old one must have kept its own."""
    if is_new and not world.disk.exists(folder.secret_path):
        folder.write_secret(world.rng.randbytes(SECRET_BYTES))
    read_secret(world.disk, folder.secret_path)


def _address(port: int) -> str:
    return f"{HOST}:{port}"


def _roles(folder: ClusterFolder, record: ClusterRecord, options: SupervisorChild) -> list[Kept]:
    """The meta server, the data servers and, if asked for, the mount; the heaviest to start comes first."""
    secret_path = folder.secret_path
    meta = MetaChild(
        dir=folder.inside("meta"),
        listen=record.meta,
        secret_path=secret_path,
        volume=record.volume,
        may_format=not record.is_formatted,
    )
    kept = [Kept("meta", meta, record.meta)]
    if record.mount:
        mount = MountChild(
            mountpoint=record.mount,
            meta=record.meta,
            secret_path=secret_path,
            options=options.mount_options,
            folder=folder.path,
        )
        kept.append(Kept("mount", mount, ""))
    for number in range(record.volume.server_count):
        address = _address(record.base_port + 1 + number)
        data = DataChild(
            dir=folder.inside(f"data-{number}"),
            listen=address,
            meta=record.meta,
            secret_path=secret_path,
            zone="",
            number=ServerNumber(number),
        )
        kept.append(Kept(f"data-{number}", data, address))
    return kept
