"""A new volume in a folder, for a meta server on a machine of its own: what `mendfs format` does."""

import os

import msgspec

from mendfs.cluster.folder import SECRET_BYTES, ClusterFolder
from mendfs.cluster.parameters import VolumeWishes, new_volume
from mendfs.errors import UsageError
from mendfs.model import Volume
from mendfs.world import real_world


async def format_folder(path: str, wishes: VolumeWishes) -> Volume:
    """Make the volume and its secret. Raises UsageError if there is a volume already."""
    from mendfs.kv.rocks import RocksEngine
    from mendfs.meta.volume import format_volume

    world = real_world()
    folder = ClusterFolder(world.disk, path)
    # Over machines there are zones, as a rule one a machine: a ring would not look at them.
    wishes = msgspec.structs.replace(wishes, layout=wishes.layout or "spread")
    volume = new_volume(wishes, volume_id=world.rng.randbytes(16).hex(), now_ns=world.now_ns())
    if folder.holds_store():
        raise UsageError(f"there is a volume in {folder.path} already: choose another folder with --dir")
    folder.make()
    world.disk.make_directories(folder.inside("meta"))
    if not world.disk.exists(folder.secret_path):
        folder.write_secret(world.rng.randbytes(SECRET_BYTES))
    engine = await RocksEngine.open(folder.inside("meta"))
    try:
        await format_volume(engine, volume, world, uid=os.geteuid(), gid=os.getegid())
    finally:
        await engine.close()
    return volume
