"""The entry of every process that the supervisor starts: `python -m mendfs.cluster.child NAME`.

The options come as one line of JSON on standard input; until it arrives nothing is touched, and if it never does (the
supervisor was killed between starting this process and writing its pid down) the process ends. One line of JSON on
standard output says that it is ready, or why it cannot be. SIGTERM stops it in good order. Only what the role
needs is imported, for six of these start at once.
"""

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec

from mendfs.cluster.parameters import VolumeWishes
from mendfs.errors import MendfsError, StoreDamaged
from mendfs.model import Volume


class MetaChild(msgspec.Struct, frozen=True, kw_only=True, tag="meta"):
    """Run the meta server."""

    dir: str
    listen: str
    secret_path: str
    volume: Volume | None = None
    """What the folder must hold; None: whatever it does."""
    may_format: bool = False
    """Make that volume if there is none yet. Never once it was there: an emptied folder must not become a new one."""


class DataChild(msgspec.Struct, frozen=True, kw_only=True, tag="data"):
    """Run a data server."""

    dir: str
    listen: str
    meta: str
    secret_path: str
    zone: str
    number: int | None = None
    capacity: int = 0
    advertise: str = ""


class MountChild(msgspec.Struct, frozen=True, kw_only=True, tag="mount"):
    """Mount the volume."""

    mountpoint: str
    meta: str
    secret_path: str
    read_only: bool = False
    options: str = ""
    """As after `mount -o`: see `fuse.mount_options`."""
    allow_nonempty: bool = False
    """Mount over files that hide then: what was written to the bare folder while the mount was being restarted."""
    waits: bool = False
    """Say what it waits for, and wait for the data servers of a new volume as long as it takes: for whoever mounts by
    hand. A supervisor would rather start it again."""
    folder: str = ""
    """The cluster's folder, where a stop says how long to flush and is told what was not; empty: none."""


class SupervisorChild(msgspec.Struct, frozen=True, kw_only=True, tag="supervisor"):
    """Run a whole cluster: what `mendfs up` was told."""

    dir: str
    """Absolute."""
    wishes: VolumeWishes = VolumeWishes()
    mount: str = ""
    """Absolute, or empty: no mount."""
    mount_options: str = ""
    """As after `mount -o`."""
    base_port: int | None = None
    """None: the ports of the last time, or some free ones."""


Role = MetaChild | DataChild | MountChild | SupervisorChild


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """It answers."""

    address: str = ""
    volume: Volume | None = None


class Waiting(msgspec.Struct, frozen=True, tag="waiting"):
    """It is not ready yet, and one line says what it waits for. Another report follows."""

    text: str


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """It cannot run; one line says why."""

    text: str
    exit_code: int
    is_final: bool = False
    """Starting it again would not help: somebody has to do something first."""


Report = Ready | Waiting | Failed

FLUSH_TIMEOUT_S = 30.0
"""How long a mount that is stopped may flush unless said otherwise."""


class Reports:
    """The line to whoever started this process, kept apart from what is printed by mistake."""

    def __init__(self) -> None:
        self._fd = os.dup(1)
        os.dup2(2, 1)

    def say(self, report: Report) -> None:
        """Report; nobody may be there any more."""
        try:
            os.write(self._fd, msgspec.json.encode(report) + b"\n")
        except OSError:
            # The supervisor has died: the process goes on, and the next `up` or `down` stops it.
            return


def stop_asked() -> asyncio.Event:
    """Set when SIGTERM or SIGINT arrives."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


async def first_of(*waits: "Coroutine[Any, Any, object] | asyncio.Future[Any]") -> None:
    """Wait until one of these is over; its error is raised. Futures that were handed in stay as they are."""
    tasks = [wait if isinstance(wait, asyncio.Future) else asyncio.create_task(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            if task not in waits:
                task.cancel()
    for task in done:
        task.result()


async def run(role: Role, say: Callable[[Report], None]) -> None:
    """Run one role until it is asked to stop. One that is not ready by then is just given up."""
    stop = stop_asked()
    is_ready = False

    def say_ready(report: Report) -> None:
        nonlocal is_ready
        is_ready = is_ready or isinstance(report, Ready)
        say(report)

    work = asyncio.create_task(_role_function(role)(role, stop, say_ready))
    await asyncio.wait({work, asyncio.create_task(stop.wait())}, return_when=asyncio.FIRST_COMPLETED)
    if not is_ready and not work.done():
        work.cancel()
        await asyncio.wait({work})
    else:
        await work


def _role_function(role: Role) -> Callable[[Any, asyncio.Event, Callable[[Report], None]], Coroutine[Any, Any, None]]:
    from mendfs.cluster import roles

    match role:
        case MetaChild():
            return roles.run_meta
        case DataChild():
            return roles.run_data
        case MountChild():
            return roles.run_mount
        case SupervisorChild():
            from mendfs.cluster.service import run_supervisor

            return run_supervisor


def quicken() -> None:
    """Spare what a server never uses.

    structlog imports rich for tracebacks in colour if it is there: 100 ms and 8 MiB a process, for a log in a file.
    """
    sys.modules.setdefault("rich", None)  # type: ignore[arg-type] # None is how an import is told to fail


def main() -> None:
    """Run the role that standard input says."""
    reports = Reports()
    quicken()
    # Imported while the supervisor writes pids down.
    import uvloop

    from mendfs.cluster import logs
    from mendfs.world.processes import raise_file_limit

    raw = sys.stdin.buffer.readline()
    if not raw:
        return
    role = msgspec.json.decode(raw, type=Role)
    logs.configure()
    raise_file_limit()
    # What is imported by now stays for ever: collections need not look at it again.
    gc.freeze()
    try:
        uvloop.run(run(role, reports.say))
    except MendfsError as error:
        reports.say(Failed(str(error), error.exit_code, isinstance(error, StoreDamaged)))
        logs.say(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        text = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
        reports.say(Failed(text, MendfsError.exit_code))
        raise


if __name__ == "__main__":
    # Under its own name: as `__main__` this module is there twice, and a role reports with the other copy's classes.
    # So a child did not see that it was ready: asked to stop it gave up at once, and a mount did not flush.
    from mendfs.cluster.child import main as main_by_name

    main_by_name()
