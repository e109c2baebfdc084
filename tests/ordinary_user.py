"""An ordinary user for tests: `nobody`, if the tests run as root, else whoever runs them.

As root the checkout and the interpreter may lie where nobody else may look (root's home): the user gets a copy of the
packages in a folder of their own, and an interpreter that they can start.
"""

import contextlib
import fcntl
import importlib.metadata
import os
import pwd
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from mendfs.fuse import device, fusermount
from tests.real_cluster import RealCluster

USER = "nobody"
SOURCES = Path(__file__).parents[1] / "src"
COMMAND_TIMEOUT_S = 90
DEVICE_LOCK = Path(tempfile.gettempdir()) / f".mendfs-tests-{os.getuid()}-device"


def _packages(name: str, found: set[str]) -> set[str]:
    """The names of all that a package needs, itself included."""
    if name in found:
        return found
    try:
        needs = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return found
    found.add(name)
    for need in needs:
        if "extra ==" not in need:
            _packages(re.split(r"[^A-Za-z0-9._-]", need, maxsplit=1)[0], found)
    return found


def copy_packages(target: Path) -> None:
    """mendfs and everything it imports; compiled modules too, for every command would compile them anew."""
    shutil.copytree(SOURCES / "mendfs", target / "mendfs")
    for package in _packages("mendfs", set()) - {"mendfs"}:
        for file in importlib.metadata.files(package) or []:
            source = Path(str(file.locate()))
            if ".." not in file.parts and source.is_file():
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target / file)


class OrdinaryUser:
    """Somebody with a home, who can run programs and `mendfs`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.is_switched = os.geteuid() == 0
        entry = pwd.getpwnam(USER) if self.is_switched else pwd.getpwuid(os.geteuid())
        self.uid, self.gid = entry.pw_uid, entry.pw_gid
        self.environment = {
            "PATH": f"{home}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(home),
            "PYTHONPATH": str(home / "packages"),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        home.chmod(0o755)
        (home / "bin").mkdir()
        (home / "packages").mkdir()
        copy_packages(home / "packages")
        self.python = self._find_python()
        program = home / "bin" / "mendfs"
        program.write_text(f'#!/bin/sh\nexec {self.python} -m mendfs.cli.main "$@"\n')
        program.chmod(0o755)
        if self.is_switched:
            os.chown(home, self.uid, self.gid)

    def _find_python(self) -> str:
        """An interpreter that this user can start and that fits the compiled packages."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        for candidate in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
            # By a shell: the user's own programs must be able to start it too.
            check = f"exec {candidate} -c 'import mendfs.cli.main, rocksdict, uvloop, xxhash, blake3'"
            with contextlib.suppress(OSError):
                if self.run(["sh", "-c", check]).returncode == 0:
                    return candidate
        pytest.skip(f"user {USER} can start no {version}: install it in /usr or /usr/local")

    def run(
        self, command: Iterable[object], *, groups: Iterable[int] = (), umask: int = 0o022, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a program as this user, in their home."""
        words = list(map(str, command))
        common = {"input": stdin, "capture_output": True, "timeout": COMMAND_TIMEOUT_S, "cwd": self.home}
        if not self.is_switched:
            return subprocess.run(words, env=self.environment, umask=umask, **common)  # type: ignore[call-overload, no-any-return]  # one dictionary for two calls
        return subprocess.run(  # type: ignore[call-overload, no-any-return]  # the same
            words,
            env=self.environment,
            umask=umask,
            user=self.uid,
            group=self.gid,
            extra_groups=list(groups),
            **common,
        )

    def check(self, *command: object) -> str:
        """Standard output of a program that must succeed."""
        done = self.run(command)
        assert done.returncode == 0, f"{command}: {done.stderr.decode()}"
        return done.stdout.decode()

    def folder(self, name: str) -> Path:
        """A folder of theirs."""
        path = self.home / name
        path.mkdir()
        if self.is_switched:
            os.chown(path, self.uid, self.gid)
        return path


class UsersCluster(RealCluster):
    """A cluster that an ordinary user runs."""

    def __init__(self, path: Path, user: OrdinaryUser) -> None:
        super().__init__(path)
        self.user = user
        if user.is_switched:
            os.chown(self.mnt, user.uid, user.gid)

    def command(self, *arguments: object, stdin: bytes = b"", env: dict[str, str] | None = None) -> list[Any]:
        """[exit code, standard output, standard error] of `mendfs ARGUMENTS`, run by the user."""
        done = self.user.run(["env", f"MENDFS_DIR={self.dir}", "mendfs", *arguments], stdin=stdin)
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        return [done.returncode, done.stdout.decode(), done.stderr.decode()]


@contextlib.contextmanager
def everybody_may_open_the_device() -> Iterator[None]:
    """/dev/fuse is everybody's, as most systems have it; where it is not, root makes it so for the tests.

    Several runs of the tests may be going on: the last one puts the mode back.
    """
    if os.geteuid() != 0:
        yield
        return
    with DEVICE_LOCK.open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        mode = stat.S_IMODE(os.stat(device.DEVICE).st_mode)
        if mode != 0o666:
            lock.truncate(0)
            lock.write(f"{mode:o}")
            lock.flush()
            os.chmod(device.DEVICE, 0o666)
        try:
            yield
        finally:
            _put_mode_back(lock)


def _put_mode_back(lock: TextIO) -> None:
    fcntl.flock(lock, fcntl.LOCK_UN)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # others are at it
    lock.seek(0)
    before = lock.read()
    if before:
        os.chmod(device.DEVICE, int(before, 8))
        lock.truncate(0)


@contextlib.contextmanager
def ordinary_user() -> Iterator[OrdinaryUser]:
    """The user; skips where they could not mount."""
    if not os.path.exists(device.DEVICE):
        pytest.skip(f"mounting needs {device.DEVICE}")
    if shutil.which(fusermount.PROGRAM) is None:
        pytest.skip("fusermount3 is missing: ./dev installs the package fuse3")
    home = Path(tempfile.mkdtemp(prefix="mendfs-user-", dir="/tmp"))
    with everybody_may_open_the_device():
        if os.geteuid() != 0 and not os.access(device.DEVICE, os.R_OK | os.W_OK):
            pytest.skip(f"{device.DEVICE} is root's alone here")
        try:
            yield OrdinaryUser(home)
        finally:
            for entry in device.mount_entries():
                if entry.mountpoint.startswith(f"{home}/"):
                    device.unmount(entry.mountpoint, detach=True)
            shutil.rmtree(home)
