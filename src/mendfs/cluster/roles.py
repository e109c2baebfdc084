"""The three roles of a process: meta server, data server, mount. Each runs until it is asked to stop.

Imports are inside the functions: a data server needs no FUSE, and a mount no RocksDB.
"""

import asyncio
import os
import socket
from collections.abc import Callable

import msgspec

from mendfs.cluster import logs
from mendfs.cluster.child import (
    FLUSH_TIMEOUT_S,
    DataChild,
    MetaChild,
    MountChild,
    Ready,
    Report,
    Waiting,
    first_of,
)
from mendfs.cluster.folder import ClusterFolder, read_secret
from mendfs.errors import UsageError
from mendfs.world import World, real_world

Say = Callable[[Report], None]

OPEN_TIMEOUT_S = 60.0
"""A mount is started together with its cluster: on a busy machine the others may take their time."""


async def run_meta(role: MetaChild, stop: asyncio.Event, say: Say) -> None:
    """Run a meta server; its volume is made first if there is none and that is allowed."""
    from mendfs.kv.rocks import RocksEngine
    from mendfs.meta.room import write_buffer_bytes
    from mendfs.meta.server import MetaOptions, start_meta
    from mendfs.meta.volume import check_volume, format_volume

    world = real_world()
    secret = read_secret(world.disk, role.secret_path)
    if role.volume is None and not (world.disk.exists(role.dir) and world.disk.names(role.dir)):
        # Said before a store is made, or the next try would find an empty one.
        raise UsageError(f'there is no volume in {os.path.dirname(role.dir)}: make one with "mendfs format"')
    engine = await RocksEngine.open(
        role.dir,
        write_buffer_bytes=write_buffer_bytes(_disk_bytes(world, role.dir)),
        may_create=role.may_format,
    )
    if not await check_volume(engine, role.volume, may_format=role.may_format, where=role.dir):
        assert role.volume is not None, "else it would have been refused"
        await format_volume(engine, role.volume, world, uid=os.geteuid(), gid=os.getegid())
    server = await start_meta(world, engine, MetaOptions(listen=role.listen, dir=role.dir), secret)
    say(Ready(server.address, server.state.volume))
    try:
        await first_of(stop.wait(), server.state.failed)
    finally:
        await server.close()
    if server.state.failed.done():
        raise server.state.failed.result()


def _disk_bytes(world: World, folder: str) -> int:
    """Size of the disk that holds the folder, or will: that of the nearest folder there is."""
    while not world.disk.exists(folder) and folder != "/":
        folder = os.path.dirname(folder)
    return world.disk.total_bytes(folder)


async def run_data(role: DataChild, stop: asyncio.Event, say: Say) -> None:
    """Run a data server."""
    from mendfs.data.server import DataOptions, start_data
    from mendfs.kv.rocks import RocksEngine

    world = real_world()
    secret = read_secret(world.disk, role.secret_path)
    world.disk.make_directories(role.dir)
    options = DataOptions(
        dir=role.dir,
        listen=role.listen,
        meta=role.meta,
        zone=role.zone or socket.gethostname(),
        capacity=role.capacity,
        number=role.number,
        advertise=role.advertise,
    )
    server = await start_data(world, RocksEngine.open, options, secret)
    say(Ready(server.address))
    try:
        await first_of(stop.wait(), server.failed)
    finally:
        await server.close()
    if server.failed.done():
        raise server.failed.result()


async def run_mount(role: MountChild, stop: asyncio.Event, say: Say) -> None:
    """Mount a volume until it is unmounted or asked to stop; then flush, and note what could not be."""
    from mendfs.client.volume import Volume, VolumeOptions
    from mendfs.fuse.device import is_root
    from mendfs.fuse.mount_options import MountFlags, parse_mount_options
    from mendfs.fuse.server import MountOptions, serve_mount

    world = real_world()
    secret = read_secret(world.disk, role.secret_path)
    name = f"{socket.gethostname()}:{role.mountpoint} (process {os.getpid()})"
    flags = parse_mount_options(role.options, MountFlags(allow_nonempty=role.allow_nonempty), is_root=is_root())
    if role.read_only:
        flags = msgspec.structs.replace(flags, is_read_only=True)
    options = VolumeOptions(
        meta=role.meta,
        name=name,
        read_only=flags.is_read_only,
        open_timeout_s=OPEN_TIMEOUT_S,
        prepares=True,
        wait_until_ready=role.waits,
    )
    volume = await Volume.open(world, options, secret, (lambda text: say(Waiting(text))) if role.waits else None)
    try:
        mount = await serve_mount(volume, role.mountpoint, MountOptions(flags=flags))
    except BaseException:
        await volume.close()
        raise
    say(Ready(role.mountpoint))
    await first_of(stop.wait(), mount.wait())
    folder = ClusterFolder(world.disk, role.folder) if role.folder else None
    wish = folder.read_stop() if folder is not None else None
    unflushed = await mount.unmount(FLUSH_TIMEOUT_S if wish is None else wish.timeout_s)
    if folder is not None:
        folder.write_unflushed(unflushed)
    for line in unflushed:
        logs.say(line)
