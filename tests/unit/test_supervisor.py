"""The supervisor over processes that a test lets end as it likes."""

import asyncio
import errno
import signal
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from mendfs.cluster.backoff import DELAY_MAX_S, READY_DELAY_MAX_S, STEADY_S, Backoff
from mendfs.cluster.child import DataChild, Failed, MetaChild, Ready, Report
from mendfs.cluster.folder import ClusterFolder, ClusterRecord
from mendfs.cluster.parameters import VolumeWishes, new_volume
from mendfs.cluster.supervisor import Kept, Supervisor
from mendfs.errors import MendfsError, UsageError
from mendfs.world import real_world
from mendfs.world.local_disk import LocalDisk
from mendfs.world.processes import ProcessIdentity


class FakeChild:
    """A process without a process."""

    def __init__(self, name: str, pid: int, report: Report | None, ended: list[str]) -> None:
        self.name = name
        self.identity = ProcessIdentity(pid, "fake")
        self.options: bytes | None = None
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._report = report
        self._ended = ended

    def send_options(self, document: bytes) -> None:
        self.options = document

    async def report(self) -> bytes:
        if self._report is None:
            await self.status
            return b""
        return msgspec.json.encode(self._report) + b"\n"

    async def exited(self) -> int:
        return await asyncio.shield(self.status)

    def signal(self, number: signal.Signals) -> None:
        if not self.status.done():
            self.status.set_result(-number)
            self._ended.append(self.name)


class FakeProcesses:
    """Fulfils `world.processes.Processes`."""

    def __init__(self) -> None:
        self.started: list[FakeChild] = []
        self.ended: list[str] = []
        self.reports: dict[str, Report | None] = {}
        self.deaf: set[str] = set()

    async def start(self, arguments: Sequence[str], *, log_path: str) -> FakeChild:
        name = arguments[3]
        child = FakeChild(name, 100 + len(self.started), self.reports.get(name, Ready()), self.ended)
        self.started.append(child)
        return child

    def _find(self, process: ProcessIdentity) -> FakeChild:
        return next(child for child in self.started if child.identity == process)

    def identity(self, pid: int) -> ProcessIdentity | None:
        return next((c.identity for c in self.started if c.identity.pid == pid and not c.status.done()), None)

    def signal(self, process: ProcessIdentity, number: signal.Signals) -> bool:
        child = self._find(process)
        if child.name not in self.deaf or number == signal.SIGKILL:
            child.signal(number)
        return True

    async def wait_ended(self, process: ProcessIdentity, timeout_s: float) -> bool:
        return self._find(process).status.done()


def make(processes: FakeProcesses, path: Path, notices: list[str]) -> Supervisor:
    folder = ClusterFolder(LocalDisk(), str(path))
    folder.make()
    volume = new_volume(VolumeWishes(), volume_id="0" * 32, now_ns=1)
    record = ClusterRecord(volume=volume, base_port=7000, meta="127.0.0.1:7000")
    roles = [Kept("meta", MetaChild(dir="/m", listen="127.0.0.1:7000", secret_path="/s"), "127.0.0.1:7000")]
    for number in range(2):
        role = DataChild(dir="/d", listen=f"127.0.0.1:{7001 + number}", meta="", secret_path="/s", zone="")
        roles.append(Kept(f"data-{number}", role, role.listen))
    return Supervisor(real_world(), processes, folder, record, roles, notices.append)


async def until(condition: object) -> None:
    """Let everything else run until `condition()` holds."""
    assert callable(condition)
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0)


def test_pids_are_written_down_before_any_child_gets_its_options(tmp_path: Path) -> None:
    """Else a supervisor killed in between would leave a process that nobody finds and that holds a port."""

    async def main() -> None:
        processes = FakeProcesses()
        supervisor = make(processes, tmp_path, [])
        known: list[int] = []

        def send(document: bytes) -> None:
            record = ClusterFolder(LocalDisk(), str(tmp_path)).read()
            assert record is not None
            known.append(len(record.children))

        start = processes.start

        async def start_and_watch(arguments: Sequence[str], *, log_path: str) -> FakeChild:
            child = await start(arguments, log_path=log_path)
            child.send_options = send  # type: ignore[method-assign] # to see the moment
            return child

        processes.start = start_and_watch  # type: ignore[method-assign] # to see the moment
        await supervisor.start()
        assert known == [3, 3, 3]

    asyncio.run(main())


def test_a_child_that_ends_is_started_again_and_its_new_pid_written_down(tmp_path: Path) -> None:
    async def main() -> None:
        processes, notices = FakeProcesses(), list[str]()
        supervisor = make(processes, tmp_path, notices)
        await supervisor.start()
        running = asyncio.create_task(supervisor.run())
        await until(lambda: running.done() or len(asyncio.all_tasks()) > 3)
        processes.started[1].signal(signal.SIGKILL)
        await until(lambda: len(processes.started) == 4 and any("is up again" in line for line in notices))
        assert processes.started[3].name == "data-0"
        record = ClusterFolder(LocalDisk(), str(tmp_path)).read()
        assert record is not None
        assert {child.process.pid for child in record.children} == {100, 102, 103}
        assert notices[0].startswith("data-0 (process 101) ended with SIGKILL")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_all_are_stopped_in_order_the_meta_server_before_the_data_servers(tmp_path: Path) -> None:
    """The meta server syncs the data servers before its log: they must still be there."""

    async def main() -> None:
        processes = FakeProcesses()
        supervisor = make(processes, tmp_path, [])
        await supervisor.start()
        assert await supervisor.stop() == ()
        assert processes.ended[0] == "meta"
        assert sorted(processes.ended) == ["data-0", "data-1", "meta"]
        record = ClusterFolder(LocalDisk(), str(tmp_path)).read()
        assert record is not None and record.children == ()

    asyncio.run(main())


def test_a_child_that_does_not_stop_is_killed_and_named(tmp_path: Path) -> None:
    async def main() -> None:
        processes = FakeProcesses()
        processes.deaf.add("data-1")
        supervisor = make(processes, tmp_path, [])
        await supervisor.start()
        (line,) = await supervisor.stop(timeout_s=1)
        assert line.startswith("data-1 (process 102) did not stop within")
        assert processes.started[2].status.result() == -signal.SIGKILL

    asyncio.run(main())


@pytest.mark.parametrize(("exit_code", "kind"), [(2, UsageError), (1, MendfsError)])
def test_the_reason_why_a_child_cannot_start_is_told_and_nothing_stays(
    tmp_path: Path, exit_code: int, kind: type[MendfsError]
) -> None:
    async def main() -> None:
        processes = FakeProcesses()
        processes.reports["data-1"] = Failed("port 7002 is in use", exit_code)
        supervisor = make(processes, tmp_path, [])
        with pytest.raises(kind, match="port 7002 is in use"):
            await supervisor.start()
        assert all(child.status.done() for child in processes.started)

    asyncio.run(main())


def test_a_process_that_keeps_ending_is_started_less_and_less_often() -> None:
    backoff = Backoff()
    delays = [backoff.delay_s(0.1, was_ready=False) for _ in range(12)]
    assert delays[0] == 0
    assert delays == sorted(delays)
    assert delays[-1] == DELAY_MAX_S
    assert backoff.delay_s(0.1, was_ready=True) == READY_DELAY_MAX_S
    assert backoff.delay_s(STEADY_S, was_ready=True) == 0


def test_a_full_disk_keeps_nothing_from_being_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        processes = FakeProcesses()
        supervisor = make(processes, tmp_path, [])
        await supervisor.start()

        def refuse(*args: object, **kwargs: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(LocalDisk, "replace_file", refuse)
        lines = await supervisor.stop()
        assert all(child.status.done() for child in processes.started)
        assert any("No space left" in line for line in lines)

    asyncio.run(main())


async def ended_and_started(processes: FakeProcesses, child: FakeChild, count: int) -> None:
    """End a child, and wait until the supervisor has started so many in all."""
    child.status.set_result(1)
    await until(lambda: len(processes.started) >= count)


def test_a_meta_server_that_cannot_start_for_a_passing_reason_is_said_once_and_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        processes, notices = FakeProcesses(), list[str]()
        supervisor = make(processes, tmp_path, notices)
        await supervisor.start()
        running = asyncio.create_task(supervisor.run())
        folder = ClusterFolder(LocalDisk(), str(tmp_path))
        processes.reports["meta"] = Failed("No space left on device: make room", 1)
        await ended_and_started(processes, processes.started[0], 4)
        await until(lambda: folder.read_troubles())
        assert folder.read_troubles() == {"meta": "No space left on device: make room; tried again until it starts"}
        await until(lambda: len(processes.started) >= 6)
        assert sum("could not be started" in notice for notice in notices) == 1
        processes.reports["meta"] = Ready()
        await until(lambda: any("meta is up again" in notice for notice in notices))
        assert folder.read_troubles() == {}
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())


def test_a_damaged_meta_server_is_not_started_again_and_a_restart_never_formats(tmp_path: Path) -> None:
    async def main() -> None:
        processes, notices = FakeProcesses(), list[str]()
        supervisor = make(processes, tmp_path, notices)
        meta = supervisor.kept[0]
        assert isinstance(meta.role, MetaChild)
        meta.role = msgspec.structs.replace(meta.role, may_format=True)
        await supervisor.start()
        assert not meta.role.may_format, "from now on an empty folder is a lost one"
        record = ClusterFolder(LocalDisk(), str(tmp_path)).read()
        assert record is not None and record.is_formatted
        running = asyncio.create_task(supervisor.run())
        processes.reports["meta"] = Failed("it is damaged", 1, is_final=True)
        await ended_and_started(processes, processes.started[0], 4)
        await until(lambda: meta.trouble)
        assert meta.trouble.startswith("it is damaged; not tried again")
        # A data server that ends is started again; the meta server is left alone.
        await ended_and_started(processes, processes.started[1], 5)
        assert [child.name for child in processes.started[3:]] == ["meta", "data-0"]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(main())
