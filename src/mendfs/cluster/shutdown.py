"""What `mendfs down` does: ask the supervisor, or do its work if it is gone; and delete a cluster's folder."""

import os
import shutil
import signal

import msgspec

from mendfs.cluster.folder import ClusterFolder, ClusterRecord, StopWish
from mendfs.cluster.leftovers import MOUNT_GRACE_S, SERVER_TIMEOUT_S, clean_dead_mount, stop_processes
from mendfs.errors import MendfsError, UsageError
from mendfs.world import World, real_world
from mendfs.world.processes import LocalProcesses, Processes

OWN_FILES = ("cluster.json", "secret", "lock", "stop.json", "unflushed.json", "stopped.json", "troubles.json")


async def shut_down(path: str, *, timeout_s: float) -> tuple[bool, tuple[str, ...]]:
    """Stop everything; returns whether anything ran, and a line for each thing that did not go well."""
    world, processes = real_world(), LocalProcesses()
    folder = ClusterFolder(world.disk, path)
    record = _known(folder)
    was_running = await _ask_supervisor(processes, folder, record, timeout_s)
    lines = folder.read_stopped() if was_running else ()
    # A supervisor that was killed, before or while it stopped the others, leaves them to us.
    return await _stop_rest(world, processes, folder, was_running, lines, timeout_s)


def _known(folder: ClusterFolder) -> ClusterRecord:
    record = folder.read()
    if record is None:
        raise UsageError(f"there is no cluster in {folder.path}: name its folder with --dir")
    return record


async def _ask_supervisor(processes: Processes, folder: ClusterFolder, record: ClusterRecord, timeout_s: float) -> bool:
    supervisor = record.supervisor
    if supervisor is None or processes.identity(supervisor.pid) != supervisor:
        return False
    folder.write_stop(StopWish(timeout_s))
    processes.signal(supervisor, signal.SIGTERM)
    limit_s = timeout_s + MOUNT_GRACE_S + 4 * SERVER_TIMEOUT_S
    if not await processes.wait_ended(supervisor, limit_s):
        processes.signal(supervisor, signal.SIGKILL)
        await processes.wait_ended(supervisor, SERVER_TIMEOUT_S)
    return True


async def _stop_rest(
    world: World,
    processes: Processes,
    folder: ClusterFolder,
    was_running: bool,
    lines: tuple[str, ...],
    timeout_s: float,
) -> tuple[bool, tuple[str, ...]]:
    record = _known(folder)
    running = [child for child in record.children if processes.identity(child.process.pid) == child.process]
    if running:
        lines += await stop_processes(processes, folder, running, timeout_s=timeout_s)
    if record.mount:
        await clean_dead_mount(world.disk, record.mount)
    if record.children or record.supervisor is not None:
        folder.write(msgspec.structs.replace(record, supervisor=None, children=(), mount=""))
    folder.forget("stop.json", "unflushed.json", "stopped.json", "troubles.json")
    return was_running or bool(running), lines


def wipe(path: str) -> None:
    """Delete a stopped cluster's folder: what is ours, and the folder itself if nothing else is in it."""
    folder = ClusterFolder(real_world().disk, path)
    record = _known(folder)
    lock = folder.lock()
    try:
        names = ["meta", "logs", *(f"data-{number}" for number in range(record.volume.server_count))]
        for name in names:
            shutil.rmtree(folder.inside(name), ignore_errors=False, onerror=_gone_already)
        for name in OWN_FILES:
            folder.forget(name)
    except OSError as error:
        raise MendfsError(f"cannot delete {error.filename} ({error.strerror})") from error
    finally:
        lock.close()
    if not os.listdir(folder.path):
        os.rmdir(folder.path)


def _gone_already(function: object, path: str, failure: object) -> None:
    if os.path.lexists(path):
        raise MendfsError(f"cannot delete {path}: delete it by hand")
