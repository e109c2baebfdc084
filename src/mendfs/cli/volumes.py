"""A volume for one command: opened, used, flushed and closed; and paths as people name them."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from mendfs.cli.options import Located, why_silent
from mendfs.client.volume import Volume, VolumeOptions
from mendfs.cluster.folder import read_secret
from mendfs.errors import MendfsError, Unreachable, UsageError
from mendfs.fuse import device
from mendfs.fuse.constants import VOLUME_ID
from mendfs.world import real_world

INTERRUPTED_CLOSE_S = 3.0


@asynccontextmanager
async def open_volume(located: Located, *, read_only: bool = False, prepares: bool = False) -> AsyncIterator[Volume]:
    """Open the volume; what was written is durable when the block ends without an error."""
    world = real_world()
    name = f"{socket.gethostname()}: a command (process {os.getpid()})"
    options = VolumeOptions(meta=located.meta, name=name, read_only=read_only, prepares=prepares)
    try:
        volume = await Volume.open(world, options, read_secret(world.disk, located.secret_path))
    except Unreachable as error:
        raise why_silent(located, error) from error
    try:
        yield volume
    except asyncio.CancelledError:
        # Ctrl-C: whoever gave up does not want to wait long for servers that are away.
        await volume.close(timeout_s=INTERRUPTED_CLOSE_S)
        raise
    except BaseException:
        await volume.close()
        raise
    unflushed = await volume.close()
    if unflushed:
        raise MendfsError(f"not everything was stored: {'; '.join(unflushed)}")


def below_mount(path: str, volume: str) -> str | None:
    """The path inside the volume of what lies at or below a mount of it; None for what is below no mount of ours.

    Raises UsageError for a mount of another volume.
    """
    whole = device.absolute(path)
    mountpoints = [entry.mountpoint for entry in device.mount_entries() if entry.file_system == device.FILE_SYSTEM]
    for mountpoint in sorted(mountpoints, key=len, reverse=True):
        if whole == mountpoint or whole.startswith(mountpoint.rstrip("/") + "/"):
            if _volume_at(mountpoint) not in (volume, ""):
                raise UsageError(f"{path} is below a mount of another volume: name its cluster with --dir or --meta")
            return "/" + whole[len(mountpoint) :].strip("/")
    return None


def own_path(local: str, volume: str) -> str | None:
    """The path inside the volume of a local path below a mount of it; None for any other local path."""
    try:
        return below_mount(local, volume)
    except UsageError:
        return None  # another volume's: as good as any other file system


def _volume_at(mountpoint: str) -> str:
    try:
        return os.getxattr(mountpoint, VOLUME_ID).decode()
    except OSError:
        return ""  # its process is gone, so nobody can tell: the path is taken by its words, as before it died


def path_in_volume(path: str, volume: str) -> str:
    """The path inside the volume with this id that is meant: one below a mount of it is taken from there on."""
    if not path:
        raise UsageError("an empty path names nothing: paths in the volume begin with /")
    below = below_mount(path, volume)
    if below is not None:
        # The slash at the end says that it must be a directory.
        return below + "/" if path.endswith("/") and below != "/" else below
    if not path.startswith("/"):
        raise UsageError(f"{path} is not below a mount: name a path in the volume, from / on")
    return path
