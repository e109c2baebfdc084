"""A cluster of real processes for tests, driven as a user drives it: through the command line.

Ports are chosen by `mendfs up` itself, at random among free ones, so tests may run beside one another.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mendfs.cluster.folder import ClusterFolder, ClusterRecord
from mendfs.fuse import device, fusermount
from mendfs.world.local_disk import LocalDisk
from mendfs.world.processes import LocalProcesses, ProcessIdentity
from tests.warm import warm

COMMAND_TIMEOUT_S = 120
PROCESSES = LocalProcesses()


def can_mount() -> bool:
    """By mount(2) or through fusermount3."""
    if os.geteuid() == 0:
        return os.path.exists(device.DEVICE)
    return shutil.which(fusermount.PROGRAM) is not None and os.access(device.DEVICE, os.R_OK | os.W_OK)


needs_mounts = pytest.mark.skipif(not can_mount(), reason="mounting needs /dev/fuse, and root or fusermount3")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: several users, or what only root may change")


def until(condition: Callable[[], object], within_s: float) -> None:
    """Wait until something holds that happens in another process."""
    deadline_s = time.monotonic() + within_s
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline_s, f"not so within {within_s} s"
        pause.wait(0.02)


class RealCluster:
    """One cluster in a folder of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.dir = path / "cluster"
        self.mnt = path / "mnt"
        self.mnt.mkdir()

    def command(self, *arguments: object, stdin: bytes = b"", env: dict[str, str] | None = None) -> list[Any]:
        """[exit code, standard output, standard error] of `mendfs ARGUMENTS`."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("MENDFS_")}
        environment |= {"MENDFS_DIR": str(self.dir)} if env is None else env
        code, out, err = warm().run(
            [*map(str, arguments)], stdin=stdin, env=environment, cwd=self.path, timeout_s=COMMAND_TIMEOUT_S
        )
        assert b"Traceback" not in err, err.decode()
        return [code, out.decode(), err.decode()]

    def mendfs(self, *arguments: object, stdin: bytes = b"") -> str:
        """Standard output of a command that must succeed."""
        code, out, err = self.command(*arguments, stdin=stdin)
        assert code == 0, f"mendfs {' '.join(map(str, arguments))}: {err}{self.logs()}"
        return str(out)

    def json(self, *arguments: object) -> Any:
        """The document that a command prints."""
        return json.loads(self.mendfs(*arguments, "--json"))

    def up(self, *arguments: object) -> None:
        """Start it in the background, mounted."""
        self.mendfs("up", "--detach", "--mount", self.mnt, *arguments)

    def down(self) -> None:
        """Stop it."""
        self.mendfs("down")

    def record(self) -> ClusterRecord:
        """What `up` wrote down."""
        record = ClusterFolder(LocalDisk(), str(self.dir)).read()
        assert record is not None
        return record

    def pid(self, name: str) -> int:
        """The process of `meta`, `data-N`, `mount` or `supervisor`."""
        record = self.record()
        if name == "supervisor":
            assert record.supervisor is not None
            return record.supervisor.pid
        return next(child.process.pid for child in record.children if child.name == name)

    def process(self, name: str) -> ProcessIdentity | None:
        """The process of a child, once it runs; None while it is being started again."""
        process = next(child.process for child in self.record().children if child.name == name)
        return process if PROCESSES.identity(process.pid) == process else None

    def kill(self, name: str) -> None:
        """kill -9 of a child, as soon as it runs; returns when it is gone, not when it was started again."""
        until(lambda: self.process(name), within_s=60)
        process = self.process(name)
        if process is not None:
            PROCESSES.signal(process, signal.SIGKILL)
            until(lambda: PROCESSES.identity(process.pid) != process, within_s=60)

    def wait_serving(self, name: str) -> None:
        """Until the child accepts connections."""
        host, _, port = next(child.address for child in self.record().children if child.name == name).rpartition(":")

        def accepts() -> bool:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
                return True
            return False

        until(accepts, within_s=60)

    def kill_supervisor(self) -> None:
        """kill -9 of the process that watches the others."""
        process = self.record().supervisor
        assert process is not None
        PROCESSES.signal(process, signal.SIGKILL)
        until(lambda: PROCESSES.identity(process.pid) != process, within_s=60)

    def kill_everything(self) -> None:
        """kill -9 of every process at once, the supervisor first so that it starts nothing again."""
        record = self.record()
        assert record.supervisor is not None
        running = [record.supervisor, *(child.process for child in record.children)]
        for process in running:
            PROCESSES.signal(process, signal.SIGKILL)
        until(lambda: all(PROCESSES.identity(process.pid) != process for process in running), within_s=60)

    def server_states(self) -> list[str]:
        """`up`, `down` ... of every data server, in order."""
        return [server["state"] for server in self.json("status")["servers"]]

    def wait_all_up(self, within_s: float = 60) -> None:
        """Until every data server and the mount answer again."""
        until(lambda: set(self.server_states()) == {"up"}, within_s)
        if self.record().mount:
            until(self.is_mounted, within_s)

    def is_mounted(self) -> bool:
        """Whether the mount answers."""
        with contextlib.suppress(OSError):
            return os.path.ismount(self.mnt)
        return False

    def drop_caches(self) -> None:
        """What is read next comes from the servers' disks."""
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3\n")

    def logs(self) -> str:
        """The ends of all logs, for a test that failed."""
        parts = []
        for log in sorted((self.dir / "logs").glob("*.log")):
            parts.append(f"\n--- {log.name}\n{log.read_text(errors='replace')[-2000:]}")
        return "".join(parts)

    def clean_up(self) -> None:
        """Leave nothing behind, whatever state the test left it in.

        By signals alone: a process forked while a mount hangs would hang too, closing the descriptors it inherits.
        """
        if (self.dir / "cluster.json").exists() and self.record().supervisor is not None:
            self.kill_everything()
        for entry in device.mount_entries():
            if entry.mountpoint.startswith(str(self.path)):
                device.unmount(entry.mountpoint, detach=True)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[RealCluster]:
    """A cluster that is not started yet."""
    made = RealCluster(tmp_path)
    try:
        yield made
    finally:
        made.clean_up()
