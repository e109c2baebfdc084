"""A whole cluster as one coroutine: what `mendfs up` runs, in the foreground or as a process of its own."""

import asyncio
import contextlib
from collections.abc import Callable
from datetime import UTC, datetime

from mendfs.cluster.child import FLUSH_TIMEOUT_S, Ready, Report, SupervisorChild
from mendfs.cluster.folder import ClusterFolder, read_secret
from mendfs.cluster.launch import check_wishes, prepare
from mendfs.cluster.logs import say
from mendfs.cluster.query import ask, connect_as_tool
from mendfs.cluster.supervisor import Notice, Supervisor
from mendfs.errors import MendfsError
from mendfs.wire.messages.meta import GetStatus, StatusReport
from mendfs.world import World, real_world
from mendfs.world.disk import File
from mendfs.world.processes import LocalProcesses

REGISTERED_TIMEOUT_S = 30.0
"""How long data servers that answer may take to register with a meta server that answers."""
REGISTERED_POLL_S = 0.01


class RunningCluster:
    """A started cluster. `launch` makes it; `watch` keeps it; `stop` ends it."""

    def __init__(self, folder: ClusterFolder, supervisor: Supervisor, lock: File) -> None:
        self.folder = folder
        self.supervisor = supervisor
        self._lock = lock

    async def watch(self, stop: asyncio.Event) -> None:
        """Start again what ends, until `stop` is set."""
        watching = asyncio.create_task(self.supervisor.run())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (watching, stopping):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching

    async def stop(self) -> tuple[str, ...]:
        """Stop all in order. Returns a line for each thing that did not go well."""
        wish = self.folder.read_stop()
        try:
            return await self.supervisor.stop(timeout_s=FLUSH_TIMEOUT_S if wish is None else wish.timeout_s)
        finally:
            self._lock.close()


async def launch(options: SupervisorChild, notice: Notice) -> RunningCluster:
    """Start a cluster; returns when everything answers. Raises MendfsError, with nothing left running."""
    world = real_world()
    folder = ClusterFolder(world.disk, options.dir)
    check_wishes(folder, options)
    folder.make()
    lock = folder.lock()
    try:
        supervisor = await prepare(world, LocalProcesses(), folder, options, notice)
        await supervisor.start()
        try:
            await _all_registered(world, folder)
        except BaseException:
            await supervisor.stop(timeout_s=0)
            raise
    except BaseException:
        lock.close()
        raise
    return RunningCluster(folder, supervisor, lock)


async def _all_registered(world: World, folder: ClusterFolder) -> None:
    """Wait until the meta server counts every data server as up."""
    record = folder.read()
    assert record is not None, "prepare() wrote it"
    up: set[int] = set()
    secret = read_secret(world.disk, folder.secret_path)
    peer = await connect_as_tool(world, record.meta, secret, record.volume.id)
    try:
        async with asyncio.timeout(REGISTERED_TIMEOUT_S):
            while True:
                report = await ask(peer, GetStatus(), StatusReport)
                up = {server["number"] for server in report.document["servers"] if server["state"] == "up"}
                if len(up) >= record.volume.server_count:
                    return
                await asyncio.sleep(REGISTERED_POLL_S)
    except TimeoutError as error:
        missing = sorted(set(range(record.volume.server_count)) - up)
        raise MendfsError(
            f"data servers {missing} did not register with the meta server within {REGISTERED_TIMEOUT_S:.0f} s: "
            f"see {folder.inside('logs')}"
        ) from error
    finally:
        await peer.close()


async def run_supervisor(options: SupervisorChild, stop: asyncio.Event, say: Callable[[Report], None]) -> None:
    """Run a cluster without a terminal until it is asked to stop."""
    cluster = await launch(options, log_line)
    record = cluster.folder.read()
    assert record is not None, "launch() wrote it"
    say(Ready(record.meta, record.volume))
    await cluster.watch(stop)
    for line in await cluster.stop():
        log_line(line)


def log_line(text: str) -> None:
    """One line of the supervisor's log."""
    say(f"{datetime.now(UTC).isoformat(timespec='milliseconds')} {text}")
