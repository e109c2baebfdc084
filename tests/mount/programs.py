"""Programs that people really run, for tests: with a deadline, perhaps as an ordinary user, and gone afterwards.

A program that is missing skips its test and says which Debian package has it; `./dev test` installs them all.
MENDFS_SHORT=1 gives the longest of them less to do, and so does a slow machine unless MENDFS_LONG=1 is set.
"""

import contextlib
import hashlib
import os
import pwd
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.real_cluster import RealCluster, until

SLOW_CREATE_S = 0.008
"""Where making a small file takes longer than this, two to four times the usual, programs get less to do: a virtual
environment with pip is 1,500 files, and a test that takes minutes is no test of every day."""
TIMEOUT_S = 300
"""A program that takes longer hangs: each takes seconds, on a loaded machine some tens of them."""
PYTHON = "/usr/bin/python3"
"""The system's: an ordinary user may not be allowed to start the one that runs the tests."""
ORDINARY = "nobody"
NOTHING: Mapping[str, str] = {}
PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
PACKAGES = {
    "gcc": "gcc libc6-dev",
    "postgres": "postgresql",
    "pgbench": "postgresql",
    "inotifywait": "inotify-tools",
}
"""Debian packages whose name is not the program's or the user's."""

as_both_users = pytest.mark.parametrize("place", ["root", ORDINARY], indirect=True)
as_ordinary_user = pytest.mark.parametrize("place", [ORDINARY], indirect=True)


def need(*programs: str) -> None:
    """Skip the test when one of these is not installed."""
    for program in programs:
        if shutil.which(program, path=PATH) is None:
            pytest.skip(f"{program} is not installed: apt-get install {PACKAGES.get(program, program)}")


def descendants(pid: int) -> list[int]:
    """The process and all it has started that still run, however they have grouped themselves."""
    parents: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                fields = Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()
                parents.setdefault(int(fields[1]), []).append(int(entry))
    found = [pid]
    for each in found:
        found.extend(parents.get(each, []))
    return found


def kill_tree(process: subprocess.Popen[str]) -> None:
    """kill -9 of a process and of everything it has started, before any of them can react."""
    if process.poll() is not None:
        return
    # Stopped first, so that nothing is started while we look for what was.
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGSTOP)
    pids = descendants(process.pid)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait(TIMEOUT_S)
    until(lambda: not any(_runs(pid) for pid in pids), within_s=60)


def _runs(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Place:
    """A directory of its own for one test: on the mount, and one beside it for what the test keeps to itself."""

    def __init__(self, cluster: RealCluster, path: Path, local: Path, user: str) -> None:
        self.cluster = cluster
        self.path = path
        self.local = local
        self.user = user
        is_root = os.geteuid() == 0
        who = pwd.getpwnam(user) if is_root else pwd.getpwuid(os.geteuid())
        self.owner = who.pw_uid, who.pw_gid
        # Only root may say who a program is; an ordinary user's tests are all their own.
        self._become: dict[str, Any] = {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []} if is_root else {}
        self._processes: list[subprocess.Popen[str]] = []

    @cached_property
    def is_long(self) -> bool:
        """Whether programs have all to do that they are to have: unless MENDFS_SHORT is set, or the machine is slow."""
        if os.environ.get("MENDFS_SHORT") or os.environ.get("MENDFS_LONG"):
            return not os.environ.get("MENDFS_SHORT")
        begun_s = time.perf_counter()
        for number in range(20):
            file = self.path / f"speed-{number}"
            file.write_bytes(b"x" * 4096)
            file.unlink()
        took_s = (time.perf_counter() - begun_s) / 20
        print(f"a small file takes {1000 * took_s:.1f} ms here")
        return took_s < SLOW_CREATE_S

    def start(
        self, *command: object, cwd: Path | None = None, environment: Mapping[str, str] = NOTHING
    ) -> subprocess.Popen[str]:
        """Start a program; it is killed at the end of the test at the latest."""
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            cwd=cwd or self.path,
            env={"PATH": PATH, "HOME": str(self.local), "LC_ALL": "C.UTF-8", "TMPDIR": "/tmp", **environment},
            start_new_session=True,
            **self._become,
        )
        self._processes.append(process)
        return process

    def run(
        self, *command: object, cwd: Path | None = None, code: int = 0, environment: Mapping[str, str] = NOTHING
    ) -> str:
        """What a program that must end with `code` has printed, errors included."""
        process = self.start(*command, cwd=cwd, environment=environment)
        try:
            out, _ = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            pytest.fail(f"{command}: not done in {TIMEOUT_S} s{self.cluster.logs()}")
        assert process.returncode == code, (
            f"{command}: exit code {process.returncode}: {out[-3000:]}{self.cluster.logs()}"
        )
        return out

    def shell(self, script: str, *, cwd: Path | None = None) -> str:
        """The same for a script of the shell; the first command that fails ends it."""
        return self.run("bash", "-euo", "pipefail", "-c", script, cwd=cwd)

    def python(self, script: str, *arguments: object, cwd: Path | None = None) -> str:
        """The same for a Python script, in a process of its own: a page fault on the mount must not stop this one."""
        return self.run(PYTHON, "-c", script, *arguments, cwd=cwd)

    @contextlib.contextmanager
    def second_mount(self) -> Iterator[Path]:
        """This place through a mount made just now: nothing it shows comes from the first one's memory."""
        mnt = self.local / "second"
        mnt.mkdir()
        self.cluster.mendfs("mount", mnt)
        try:
            yield mnt / self.path.relative_to(self.cluster.mnt)
        finally:
            self.cluster.mendfs("umount", mnt)
            mnt.rmdir()

    def give(self) -> None:
        """What the test has put there belongs to the user."""
        for path in self.path.rglob("*"):
            os.lchown(path, *self.owner)

    def end(self) -> None:
        """Nothing that was started here is left."""
        for process in self._processes:
            kill_tree(process)
            if process.stdout is not None:
                process.stdout.close()


def digests(root: Path) -> dict[str, tuple[object, ...]]:
    """Everything that a copy must keep of each thing below `root`: kind, mode, owner, time, contents, hard links."""
    found: dict[str, tuple[object, ...]] = {}
    first_names: dict[int, str] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        name = str(path.relative_to(root))
        content = ""
        if stat.S_ISLNK(status.st_mode):
            content = os.readlink(path)
        elif stat.S_ISREG(status.st_mode):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        same_as = first_names.setdefault(status.st_ino, name)
        found[name] = (status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, content, same_as)
    return found


def system_library() -> Path:
    """The system's Python modules: some hundred real files that nobody changes meanwhile."""
    found = sorted(path for path in Path("/usr/lib").glob("python3.[0-9]*") if (path / "asyncio").is_dir())
    if not found:
        pytest.skip("the system's Python library is not installed: apt-get install python3")
    return found[-1]


def lines(text: str) -> list[str]:
    """Those that say something."""
    return [line for line in text.splitlines() if line.strip()]
