"""Mounts for tests. The event loop has a thread of its own: a test may then use the mount with ordinary calls.

Not with mmap, though: a page fault keeps the GIL, which the thread that would answer it needs. Such tests run scripts.
"""

import asyncio
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvloop

from mendfs.fuse import device
from mendfs.fuse.server import Mount, MountOptions, serve_mount
from tests.mount.fake_volume import FakeVolume
from tests.mount.programs import PACKAGES, Place
from tests.real_cluster import RealCluster, can_mount

Result = TypeVar("Result")
WAIT_S = 30.0


class LoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="mount", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Do it in the loop and wait for it here."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(WAIT_S)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_S)
        self.loop.close()


class Tree:
    """An empty directory of a mounted volume."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def script(
        self, body: str, *, user: int | None = None, groups: Iterable[int] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a Python script with `root` naming the mount, perhaps as another user of these groups."""
        # Changed in the script, since another user may not be allowed to start this interpreter.
        become = "" if user is None else f"os.setgroups({list(groups)}); os.setgid({user}); os.setuid({user})"
        return subprocess.run(
            [sys.executable, "-c", f"import os, sys, errno\n{become}\nroot = {str(self.path)!r}\n{body}"],
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            cwd="/",
        )

    def check(self, body: str, *, user: int | None = None, groups: Iterable[int] = ()) -> str:
        """The same for a script that must succeed; returns what it printed."""
        result = self.script(body, user=user, groups=groups)
        assert result.returncode == 0, result.stderr
        return result.stdout


class Mounted(Tree):
    """A fake volume, mounted."""

    def __init__(self, path: Path, volume: FakeVolume, thread: LoopThread, mount: Mount) -> None:
        super().__init__(path)
        self.volume = volume
        self.thread = thread
        self.mount = mount


Mounting = Callable[..., Mounted]


@pytest.fixture
def mounting() -> Iterator[Mounting]:
    """Mount fake volumes with other options than the defaults."""
    if not can_mount():
        pytest.skip("mounting needs /dev/fuse, and root or fusermount3")
    thread = LoopThread()
    mounted: list[Mounted] = []

    def begin(options: MountOptions | None = None, volume: FakeVolume | None = None) -> Mounted:
        path = Path(tempfile.mkdtemp(prefix="mendfs-test-"))
        path.chmod(0o755)
        volume = volume or FakeVolume()
        mount = thread.run(serve_mount(volume, str(path), options))
        mounted.append(Mounted(path, volume, thread, mount))
        return mounted[-1]

    yield begin
    for each in mounted:
        each.volume.is_open_gate.set()
        thread.run(each.mount.unmount(5.0))
        assert device.find_mount(str(each.path)) is None
        each.path.rmdir()
    thread.close()


@pytest.fixture
def fake(mounting: Mounting) -> Mounted:
    """A fake volume mounted with the default options."""
    return mounting()


@pytest.fixture(scope="session")
def real() -> Iterator[RealCluster]:
    """A cluster that many tests use, each in a directory of its own."""
    # Not below pytest's own folder: other users must reach the mount, and every start of pytest shuts them out there.
    path = Path(tempfile.mkdtemp(prefix="mendfs-test-"))
    path.chmod(0o755)
    cluster = RealCluster(path)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.clean_up()
        shutil.rmtree(path)


@pytest.fixture(params=["memory", "cluster"])
def tree(request: pytest.FixtureRequest) -> Tree:
    """An empty directory on a fake volume and on a real one."""
    if request.param == "memory":
        return Tree(request.getfixturevalue("fake").path)
    path = request.getfixturevalue("real").mnt / request.node.originalname
    path.mkdir()
    return Tree(path)


@pytest.fixture(scope="module")
def program_cluster() -> Iterator[RealCluster]:
    """A cluster of three data servers for the programs of one module."""
    # Not in pytest's folder, where ordinary users reach nothing: every start of pytest takes their rights away again.
    path = Path(tempfile.mkdtemp(prefix="mendfs-programs-"))
    path.chmod(0o755)
    cluster = RealCluster(path)
    try:
        cluster.up("--servers", 3, "--replicas", 2)
        yield cluster
        cluster.wait_all_up(60)
    finally:
        cluster.clean_up()
        assert not any(entry.mountpoint.startswith(str(path)) for entry in device.mount_entries())
        shutil.rmtree(path)


@pytest.fixture
def place(request: pytest.FixtureRequest, program_cluster: RealCluster) -> Iterator[Place]:
    """A directory on the mount for one test, of root or of the user that `indirect` parameters name."""
    user: str = getattr(request, "param", "root")
    if user != "root" and os.geteuid() != 0:
        pytest.skip("needs root: it is another user's")
    # Short: the path of a Unix socket in it may have 107 bytes.
    name = f"place-{len(os.listdir(program_cluster.mnt))}"
    made = Place(program_cluster, program_cluster.mnt / name, program_cluster.path / name, user)
    try:
        pwd.getpwnam(user)
    except KeyError:
        pytest.skip(f"there is no user {user}: apt-get install {PACKAGES.get(user, user)}")
    for folder in (made.path, made.local):
        folder.mkdir()
        os.chown(folder, *made.owner)
    try:
        yield made
    finally:
        made.end()
