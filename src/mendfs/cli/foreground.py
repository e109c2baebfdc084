"""Running a cluster from a terminal: detached, or here with a live status until Ctrl-C."""

import asyncio
import contextlib
import os
import signal
import sys
import time

import msgspec

from mendfs.cluster.child import Failed, MountChild, Report, Role, SupervisorChild, Waiting
from mendfs.cluster.folder import ClusterFolder
from mendfs.cluster.launch import check_wishes
from mendfs.cluster.service import RunningCluster, launch
from mendfs.errors import MendfsError, UsageError
from mendfs.world import real_world
from mendfs.world.processes import LocalProcesses


async def start_detached(role: SupervisorChild) -> None:
    """Start a supervisor in a session of its own; returns when everything answers."""
    began_s = time.monotonic()
    folder = ClusterFolder(real_world().disk, role.dir)
    check_wishes(folder, role)
    folder.make()
    await _start_process("supervisor", role, folder.log_path("supervisor"))
    print(_ready_line(folder, time.monotonic() - began_s))


async def mount_detached(role: MountChild, dir: str) -> None:
    """Start the process of a mount; returns when it is mounted."""
    log_path = os.devnull
    if dir:
        name = role.mountpoint.strip("/").replace("/", "-") or "root"
        log_path = ClusterFolder(real_world().disk, dir).log_path(f"mount-{name}")
    await _start_process("mount", role, log_path)


async def _start_process(name: str, role: Role, log_path: str) -> None:
    arguments = [sys.executable, "-m", "mendfs.cluster.child", name]
    child = await LocalProcesses().start(arguments, log_path=log_path)
    child.send_options(msgspec.json.encode(role) + b"\n")
    try:
        while True:
            raw = await child.report()
            report: Report | None = msgspec.json.decode(raw, type=Report) if raw else None
            if not isinstance(report, Waiting):
                break
            print(f"mendfs: waiting: {report.text}", file=sys.stderr, flush=True)
    except asyncio.CancelledError:
        # Ctrl-C while it starts: it is not ours to leave half started.
        child.signal(signal.SIGTERM)
        raise
    if report is None:
        raise MendfsError(f"{name} ended with status {await child.exited()} before it was ready: see {log_path}")
    if isinstance(report, Failed):
        raise (UsageError if report.exit_code == UsageError.exit_code else MendfsError)(report.text)


def _ready_line(folder: ClusterFolder, took_s: float) -> str:
    record = folder.read()
    assert record is not None, "whatever is ready was written down"
    where = f", mounted at {record.mount}" if record.mount else ""
    return f"ready in {took_s:.1f} s: {record.volume.server_count} data servers, meta server on {record.meta}{where}"


async def run_here(role: SupervisorChild) -> None:
    """Run a cluster until SIGINT, SIGTERM or SIGHUP; then stop it in order."""
    began_s = time.monotonic()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stop.set)
    starting = asyncio.create_task(launch(role, _print_line))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()  # launch() stops what it has started
        await asyncio.wait({starting})
        return
    cluster = starting.result()
    _print_line(_ready_line(cluster.folder, time.monotonic() - began_s))
    try:
        await _watch(cluster, stop)
    finally:
        _print_line("stopping: flushing, then ending all processes")
        lines = await cluster.stop()
        for line in lines:
            print(f"mendfs: {line}", file=sys.stderr)
    if lines:
        raise MendfsError("not everything could be flushed, see above")
    _print_line("stopped")


async def _watch(cluster: RunningCluster, stop: asyncio.Event) -> None:
    if sys.stdout.isatty():
        from mendfs.cli.live import watch_live

        await watch_live(cluster, stop)
    else:
        await cluster.watch(stop)


def _print_line(text: str) -> None:
    # The terminal may be gone (SIGHUP): what follows, stopping in order, matters more than this line.
    with contextlib.suppress(OSError):
        print(text, flush=True)
