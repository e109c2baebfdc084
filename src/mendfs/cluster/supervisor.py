"""Starts the processes of a cluster on this machine, watches them, starts again those that end, stops all in order.

The supervisor may be killed at any moment. Its children live on then, and people go on working: a file system must
not end because the process that watches it did. The pid of each child is written down before the child gets its
options, without which it does nothing, so the next `up` or `down` finds all of them and stops them in order.

Order of stopping: the mount (it flushes to everybody), the meta server (it syncs the data servers, then its log), the
data servers.
"""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable

import msgspec

from mendfs.cluster.answering import Answering
from mendfs.cluster.backoff import Backoff
from mendfs.cluster.child import FLUSH_TIMEOUT_S, Failed, MetaChild, MountChild, Ready, Report, Role
from mendfs.cluster.folder import ChildRecord, ClusterFolder, ClusterRecord
from mendfs.cluster.leftovers import clean_dead_mount, stop_processes
from mendfs.errors import MendfsError, StoreDamaged, UsageError
from mendfs.world import World
from mendfs.world.processes import Child, Processes

READY_TIMEOUT_S = 90.0
"""A store of tens of millions of blocks is recovered in this time; a process that says nothing for longer hangs."""

Notice = Callable[[str], None]


class Kept:
    """One process that is kept running."""

    def __init__(self, name: str, role: Role, address: str) -> None:
        self.name = name
        self.role = role
        self.address = address
        self.child: Child | None = None
        self.is_up = False
        self.since_s = 0.0
        self.backoff = Backoff()
        self.trouble = ""
        """Why it is not running, once that was said."""


class Supervisor:
    """See the module. `start`, then `run` until it is cancelled, then `stop`."""

    def __init__(
        self,
        world: World,
        processes: Processes,
        folder: ClusterFolder,
        record: ClusterRecord,
        kept: list[Kept],
        notice: Notice,
    ) -> None:
        self._world = world
        self._processes = processes
        self._folder = folder
        self.notice = notice
        self._record = record
        self.kept = kept

    async def start(self) -> None:
        """Start all at once; returns when everything is ready. Raises the first one's reason why it cannot be."""
        try:
            for kept in self.kept:
                await self._spawn(kept)
            self._write_down()
            for kept in self.kept:
                self._send_options(kept)
            async with asyncio.TaskGroup() as group:
                for kept in self.kept:
                    group.create_task(self._ready(kept))
        except BaseExceptionGroup as errors:
            await self.stop(timeout_s=0)
            raise _cause(errors) from None
        except BaseException:
            await self.stop(timeout_s=0)
            raise
        for kept in self.kept:
            if isinstance(kept.role, MetaChild):
                # From now on an empty folder is a lost one.
                kept.role = msgspec.structs.replace(kept.role, may_format=False)
        if not self._record.is_formatted:
            self._record = msgspec.structs.replace(self._record, is_formatted=True)
            self._folder.write(self._record)

    async def run(self) -> None:
        """Start again whatever ends, until this is cancelled."""
        async with asyncio.TaskGroup() as group:
            for kept in self.kept:
                group.create_task(self._keep(kept))
                if isinstance(kept.role, MetaChild):
                    group.create_task(self._watch(kept, kept.role))

    async def _watch(self, kept: Kept, role: MetaChild) -> None:
        """Say so when it hangs. It is not killed for that: nothing could be stored by its successor either."""

        def tell(trouble: str) -> None:
            if kept.is_up:
                self._trouble(kept, trouble, "hangs")

        await Answering(self._world, address=role.listen, secret_path=role.secret_path, store=role.dir, tell=tell).run()

    async def stop(self, *, timeout_s: float = FLUSH_TIMEOUT_S) -> tuple[str, ...]:
        """Stop all in order; past the timeout they are killed. Returns a line for each thing that was not flushed."""
        lines = await stop_processes(self._processes, self._folder, self._record.children, timeout_s=timeout_s)
        if self._record.mount:
            await clean_dead_mount(self._world.disk, self._record.mount)
        self._record = msgspec.structs.replace(self._record, supervisor=None, children=(), mount="")
        try:
            self._folder.write_stopped(lines)
            self._folder.write(self._record)
        except OSError as error:
            # What is written down is out of date now, which `up` and `down` notice: those processes do not run.
            lines += (f"cannot write down in {self._folder.path} that all is stopped ({error.strerror})",)
        return lines

    async def _spawn(self, kept: Kept) -> None:
        arguments = [sys.executable, "-m", "mendfs.cluster.child", kept.name, self._folder.path]
        kept.since_s = asyncio.get_running_loop().time()
        kept.child = await self._processes.start(arguments, log_path=self._folder.log_path(kept.name))

    def _send_options(self, kept: Kept) -> None:
        assert kept.child is not None, "it was spawned"
        kept.child.send_options(msgspec.json.encode(kept.role) + b"\n")

    def _write_down(self) -> None:
        children = tuple(
            ChildRecord(kept.name, kept.child.identity, kept.address) for kept in self.kept if kept.child is not None
        )
        self._record = msgspec.structs.replace(self._record, children=children)
        self._folder.write(self._record)

    async def _ready(self, kept: Kept) -> Ready:
        """Wait for a child's report. Raises MendfsError with its reason."""
        assert kept.child is not None, "it was spawned"
        log = self._folder.inside("logs", f"{kept.name}.log")
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                raw = await kept.child.report()
                status = None if raw else await kept.child.exited()
        except TimeoutError as error:
            raise MendfsError(f"{kept.name} was not ready after {READY_TIMEOUT_S:.0f} s: see {log}") from error
        if status is not None:
            raise MendfsError(f"{kept.name} ended with {_ending(status)} before it was ready: see {log}")
        report: Report = msgspec.json.decode(raw, type=Report)
        if isinstance(report, Failed):
            raise _failure(report)
        assert isinstance(report, Ready), "a child of ours is not asked to say what it waits for"
        kept.is_up = True
        return report

    async def _keep(self, kept: Kept) -> None:
        loop = asyncio.get_running_loop()
        while True:
            assert kept.child is not None, "start() spawned it"
            status = await kept.child.exited()
            was_ready, kept.is_up = kept.is_up, False
            if status == 0 and isinstance(kept.role, MountChild):
                self._forget_mount(kept)
                return
            if was_ready:
                await self._tell_end(kept, status)
            # One that says why it stops will mostly do so again: it is given more and more time, until it stays up.
            is_missed = was_ready and not kept.trouble
            await asyncio.sleep(kept.backoff.delay_s(loop.time() - kept.since_s, was_ready=is_missed))
            try:
                await self._start_again(kept)
            except (MendfsError, OSError) as error:
                # OSError: no room to write the new pid down, no memory for a process. Both may pass.
                # It has ended or is about to; one that hangs before it is ready is of no use to anybody.
                kept.child.signal(signal.SIGKILL)
                is_final = isinstance(error, StoreDamaged) and isinstance(kept.role, MetaChild)
                after = f'not tried again: mend that, then "mendfs down" and "mendfs up" ({self._folder.path})'
                self._trouble(kept, f"{error}; {after if is_final else 'tried again until it starts'}")
                if is_final:
                    return
                continue
            self._trouble(kept, "")
            self.notice(f"{kept.name} is up again (process {kept.child.identity.pid})")

    async def _tell_end(self, kept: Kept, status: int) -> None:
        """Say how a process that was up has ended, in its own last words if it had any."""
        assert kept.child is not None, "it ended"
        raw = await kept.child.report()
        report: Report = msgspec.json.decode(raw, type=Report) if raw else Ready()
        if isinstance(report, Failed):
            self._trouble(kept, report.text, "stopped")
        else:
            ended = f"(process {kept.child.identity.pid}) ended with {_ending(status)}"
            self.notice(f"{kept.name} {ended}: starting it again")

    def _trouble(self, kept: Kept, text: str, what: str = "could not be started") -> None:
        """Say why a process is not running, once, and write it down for `status`; an empty text: it is."""
        if text == kept.trouble:
            return
        was, kept.trouble = kept.trouble, text
        if text:
            self.notice(f"{kept.name} {what}: {text}")
        elif kept.is_up and was.startswith("it runs"):
            self.notice(f"{kept.name} answers again")
        try:
            self._folder.write_troubles({each.name: each.trouble for each in self.kept if each.trouble})
        except OSError as error:
            self.notice(f"cannot write down in {self._folder.path} why {kept.name} is not running ({error.strerror})")

    def _forget_mount(self, kept: Kept) -> None:
        """Somebody has unmounted it on purpose: it ended in order. The next `up` may mount it again."""
        self.notice(f"{self._record.mount} was unmounted: the servers go on")
        self.kept.remove(kept)
        self._record = msgspec.structs.replace(self._record, mount="")
        self._write_down()

    async def _start_again(self, kept: Kept) -> None:
        if isinstance(kept.role, MountChild):
            await clean_dead_mount(self._world.disk, self._record.mount)
            kept.role = msgspec.structs.replace(kept.role, allow_nonempty=True)
        await self._spawn(kept)
        self._write_down()
        self._send_options(kept)
        await self._ready(kept)


def _failure(report: Failed) -> MendfsError:
    if report.is_final:
        return StoreDamaged(report.text)
    return UsageError(report.text) if report.exit_code == UsageError.exit_code else MendfsError(report.text)


def _cause(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    """The reason to tell: the first one that a child gave, for others often only follow from it."""
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            return _cause(error)
        if isinstance(error, MendfsError):
            return error
    return errors.exceptions[0]


def _ending(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    with contextlib.suppress(ValueError):
        return signal.Signals(-status).name
    return f"signal {-status}"
