"""Stopping what runs or was left behind: processes in order, mounts whose process has died.

Works from what is written down, not from being the parent: so `down` and the next `up` can do it for a supervisor that
was killed.
"""

import asyncio
import signal
from collections.abc import Sequence

from mendfs.cluster.folder import ChildRecord, ClusterFolder, StopWish
from mendfs.fuse import device
from mendfs.world.disk import Disk
from mendfs.world.processes import Processes

SERVER_TIMEOUT_S = 20.0
"""How long a server may take to sync and close its store."""
MOUNT_GRACE_S = 3.0
"""A mount gives up flushing at its timeout and says what was not flushed: it gets a moment to do so."""
KILLED_WITHIN_S = 10.0
"""How long the kernel may take to end a process after SIGKILL: it may wait for a disk."""


def _turn(name: str) -> int:
    return {"mount": 0, "meta": 1}.get(name, 2)


async def stop_processes(
    processes: Processes, folder: ClusterFolder, children: Sequence[ChildRecord], *, timeout_s: float
) -> tuple[str, ...]:
    """Stop these in order: mount, meta server, data servers. Returns a line for each thing that was not flushed."""
    lines: list[str] = []
    try:
        folder.forget("unflushed.json")
        folder.write_stop(StopWish(timeout_s))
    except OSError as error:
        # A full disk must not keep anything running: the mount uses its own timeout then.
        lines.append(f"cannot write to {folder.path} ({error.strerror})")
    for turn in range(3):
        group = [child for child in children if _turn(child.name) == turn]
        limit_s = timeout_s + MOUNT_GRACE_S if turn == 0 else SERVER_TIMEOUT_S
        lines += [
            line
            for found in await asyncio.gather(*(_stop(processes, child, limit_s) for child in group))
            for line in found
        ]
    lines += folder.read_unflushed()
    folder.forget("stop.json", "unflushed.json")
    return tuple(lines)


async def _stop(processes: Processes, child: ChildRecord, limit_s: float) -> list[str]:
    processes.signal(child.process, signal.SIGTERM)
    if await processes.wait_ended(child.process, limit_s):
        return []
    processes.signal(child.process, signal.SIGKILL)
    if not await processes.wait_ended(child.process, KILLED_WITHIN_S):
        return [f"{child.name} (process {child.process.pid}) cannot be killed: the kernel waits for a device"]
    return [f"{child.name} (process {child.process.pid}) did not stop within {limit_s:.0f} s and was killed"]


async def clean_dead_mount(disk: Disk, path: str) -> None:
    """Take away a mount of ours whose process has died, so that its path can be used again."""
    await disk.run(_clean_dead_mount, path)


def _clean_dead_mount(path: str) -> None:
    # Several may lie over one another, if supervisors were killed again and again.
    while (entry := device.find_mount(path)) is not None:
        if entry.file_system != device.FILE_SYSTEM or not device.is_dead(path):
            return
        device.unmount(path, detach=True)
