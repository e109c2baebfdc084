"""The meta server's disk is full, read-only, hangs, or its folder is not what it was: real processes, a real disk."""

import contextlib
import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real_cluster import RealCluster, needs_mounts, until

pytestmark = needs_mounts

DISK_MIB = 48
MiB = 1 << 20


class SmallDisk:
    """A tmpfs that holds the meta server's folder."""

    def __init__(self, path: Path, mib: int = DISK_MIB) -> None:
        self.path = path
        path.mkdir(parents=True)
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=0700", "mendfs-test", str(path)], capture_output=True
        )
        if made.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.decode().strip()}")

    def remount(self, how: str) -> bool:
        """`ro` or `rw`. False while files in it are open for writing."""
        return subprocess.run(["mount", "-o", f"remount,{how}", str(self.path)], capture_output=True).returncode == 0

    def fill(self, leave: int = 0, *, more: bool = False) -> Path:
        """Somebody else's file takes all but `leave` bytes of what is left."""
        ballast = self.path / "somebody-elses-file"
        with open(ballast, "ab" if more else "xb", buffering=0) as file:
            while True:
                status = os.statvfs(self.path)
                wanted = status.f_bavail * status.f_frsize - leave
                if wanted <= 0:
                    return ballast
                try:
                    file.write(bytes(min(wanted, MiB)))
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    return ballast


@pytest.fixture
def disk(cluster: RealCluster, request: pytest.FixtureRequest) -> Iterator[SmallDisk]:
    made = SmallDisk(cluster.dir / "meta", getattr(request, "param", DISK_MIB))
    try:
        yield made
    finally:
        cluster.clean_up()
        subprocess.run(["umount", "-l", str(made.path)], capture_output=True)


def supervisor_log(cluster: RealCluster) -> str:
    return (cluster.dir / "logs" / "supervisor.log").read_text()


def error_of(work: object) -> int:
    """The errno that it fails with, or 0."""
    assert callable(work)
    try:
        work()
    except OSError as error:
        return error.errno or 0
    return 0


def make_and_remove(path: Path) -> None:
    path.touch(exist_ok=False)
    path.unlink()


def append(path: Path) -> None:
    """Write and close: what close() says counts."""
    with open(path, "ab", buffering=0) as file:
        file.write(b"more")
        os.fsync(file.fileno())


def stop_reason(cluster: RealCluster) -> str:
    """What `mendfs status` says on standard error; empty while the meta server answers."""
    code, _, said = cluster.command("status")
    return "" if code == 0 else str(said)


def test_a_full_disk_refuses_what_grows_and_lets_removals_through(cluster: RealCluster, disk: SmallDisk) -> None:
    """Applications see ENOSPC, never a server that dies of it; after something was removed, they go on."""
    cluster.up("--servers", 1, "--replicas", 1, "--block-size", "64KiB")
    pid = cluster.pid("meta")
    for name in ("kept", "gone", "gone too"):
        (cluster.mnt / name).write_bytes(b"before")
    ballast = disk.fill(leave=DISK_MIB * MiB // 16)  # an eighth is kept back
    until(lambda: error_of(lambda: make_and_remove(cluster.mnt / "new")) == errno.ENOSPC, within_s=60)
    assert error_of(lambda: os.setxattr(cluster.mnt / "kept", "user.a", b"x")) == errno.ENOSPC
    assert error_of(lambda: append(cluster.mnt / "kept")) == errno.ENOSPC
    (cluster.mnt / "kept").chmod(0o600)
    (cluster.mnt / "gone").unlink()
    status = cluster.json("status")
    assert status["health"] == "at-risk"
    assert any("nothing new is taken until there is room" in trouble for trouble in status["troubles"])
    disk.fill(leave=DISK_MIB * MiB // 64, more=True)
    until(lambda: error_of(lambda: (cluster.mnt / "kept").chmod(0o640)) == errno.ENOSPC, within_s=60)
    (cluster.mnt / "gone too").unlink()
    ballast.unlink()
    until(lambda: error_of(lambda: make_and_remove(cluster.mnt / "new")) == 0, within_s=60)
    assert (cluster.mnt / "kept").read_bytes() == b"before"
    assert os.listdir(cluster.mnt) == ["kept"]
    assert cluster.pid("meta") == pid, "it never stopped"


@pytest.mark.parametrize("disk", [16], indirect=True)
def test_metadata_that_fills_its_disk_leaves_room_to_remove_it(cluster: RealCluster, disk: SmallDisk) -> None:
    cluster.up("--servers", 1, "--replicas", 1)
    made: list[Path] = []

    def make_until_full() -> None:
        while True:
            path = cluster.mnt / str(len(made))
            path.touch()
            made.append(path)
            os.setxattr(path, "user.big", os.urandom(60_000))

    assert error_of(make_until_full) == errno.ENOSPC
    assert len(made) > 50
    for path in made:
        path.unlink()

    # Removed keys give their room back when the database compacts: more of them than fit at once come and go.
    def has_room() -> bool:
        return error_of(lambda: os.setxattr(cluster.mnt, "user.big", os.urandom(60_000))) == 0

    until(has_room, within_s=60)
    assert os.listdir(cluster.mnt) == []


def test_a_disk_that_somebody_else_fills_stops_the_server_until_there_is_room(
    cluster: RealCluster, disk: SmallDisk
) -> None:
    cluster.up("--servers", 1, "--replicas", 1)
    (cluster.mnt / "f").write_bytes(b"durable")
    os.sync()
    ballast = disk.fill()
    cluster.kill("meta")
    until(lambda: "No space left on device: make room on that disk" in stop_reason(cluster), within_s=60)
    assert "the meta server stopped: " in stop_reason(cluster)
    assert "meta could not be started" in supervisor_log(cluster)
    ballast.unlink()
    assert (cluster.mnt / "f").read_bytes() == b"durable", "who asked meanwhile was answered when it could be"
    (cluster.mnt / "g").write_bytes(b"goes on")
    assert stop_reason(cluster) == ""


def test_a_read_only_disk_is_waited_for(cluster: RealCluster, disk: SmallDisk) -> None:
    cluster.up("--servers", 1, "--replicas", 1)
    (cluster.mnt / "f").write_bytes(b"durable")
    os.sync()

    def remounted() -> bool:
        # Possible only while no process has the database open for writing.
        cluster.kill("meta")
        return disk.remount("ro")

    until(remounted, within_s=60)
    until(lambda: "Read-only file system" in stop_reason(cluster), within_s=60)
    assert disk.remount("rw")
    assert (cluster.mnt / "f").read_bytes() == b"durable"
    assert stop_reason(cluster) == ""


def test_a_damaged_database_is_not_started_again_and_not_touched(cluster: RealCluster) -> None:
    cluster.up("--servers", 1, "--replicas", 1)
    (cluster.mnt / "f").write_bytes(b"durable")
    os.sync()
    cluster.kill_everything()
    meta = cluster.dir / "meta"
    shutil.copytree(meta, cluster.path / "copy")
    log = max(meta.glob("*.log"))
    content = bytearray(log.read_bytes())
    content[len(content) // 2] ^= 1
    log.write_bytes(content)
    code, _, said = cluster.command("up", "--detach", "--mount", cluster.mnt)
    assert code == 1
    assert "had been synced: it is damaged, and was not touched" in said
    assert said.count("\n") == 1
    assert log.read_bytes() == content
    shutil.rmtree(meta)
    code, _, said = cluster.command("up", "--detach", "--mount", cluster.mnt)
    assert (code, "is gone" in said) == (1, True), "a lost folder is no reason to make a new volume"
    assert not meta.exists()
    shutil.copytree(cluster.path / "copy", meta)
    cluster.up()
    assert (cluster.mnt / "f").read_bytes() == b"durable"
    cluster.down()


def test_a_folder_of_another_volume_is_refused(cluster: RealCluster, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = RealCluster(tmp_path / "other")
    for each in (cluster, other):
        each.mendfs("up", "--detach", "--servers", 1, "--replicas", 1)
        each.down()
    shutil.rmtree(cluster.dir / "meta")
    shutil.copytree(other.dir / "meta", cluster.dir / "meta")
    code, _, said = cluster.command("up", "--detach")
    assert code == 1
    assert f"holds volume {other.record().volume.id}, not {cluster.record().volume.id}" in said


def test_a_damage_found_at_a_restart_ends_the_trying(cluster: RealCluster) -> None:
    cluster.up("--servers", 1, "--replicas", 1)
    (cluster.mnt / "f").write_bytes(b"durable")
    os.sync()
    current = cluster.dir / "meta" / "CURRENT"
    good = current.read_bytes()
    current.write_bytes(b"nonsense")
    cluster.kill("meta")
    until(lambda: "not tried again" in stop_reason(cluster), within_s=60)
    assert "CURRENT" in stop_reason(cluster)
    current.write_bytes(good)
    cluster.down()
    cluster.up()
    assert (cluster.mnt / "f").read_bytes() == b"durable"


def test_a_folder_deleted_under_the_server_ends_it_before_anything_more_is_acknowledged(cluster: RealCluster) -> None:
    """Files without a name can still be synced, and keep nothing."""
    cluster.up("--servers", 1, "--replicas", 1)
    (cluster.mnt / "f").write_bytes(b"before")
    os.sync()
    shutil.copytree(cluster.dir / "meta", cluster.path / "copy")
    shutil.rmtree(cluster.dir / "meta")
    with writing_durably(cluster.mnt / "g") as writer:
        until(lambda: "is gone" in stop_reason(cluster), within_s=60)
        assert "was deleted under the server" in supervisor_log(cluster)
        assert writer.poll() is None, "the fsync waits"
        shutil.move(cluster.path / "copy", cluster.dir / "meta")
        cluster.command("down", "--timeout", 1)
        assert writer.wait(60) != 0, "and is never told a lie"
    cluster.up()
    assert (cluster.mnt / "f").read_bytes() == b"before"


def test_without_descriptors_the_server_neither_spins_nor_dies(cluster: RealCluster) -> None:
    """Connections that cannot be accepted wait; a table that cannot be opened means a new life, and nothing is lost."""
    cluster.up("--servers", 1, "--replicas", 1)
    pid = cluster.pid("meta")
    allowed = len(os.listdir(f"/proc/{pid}/fd")) + 4
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (allowed, allowed))
    host, _, port = cluster.record().meta.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection((host, int(port)), timeout=5))
        until(lambda: len(os.listdir(f"/proc/{pid}/fd")) >= allowed - 1, within_s=60)
        before_s, began_s = cpu_seconds(pid), time.monotonic()
        for number in range(50):
            (cluster.mnt / f"f{number}").write_bytes(b"served")
        used = (cpu_seconds(pid) - before_s) / (time.monotonic() - began_s)
        assert used < 0.8, "it spins"
        # 16 MiB of metadata: the next log cannot be opened.
        for number in range(300):
            os.setxattr(cluster.mnt / f"f{number % 50}", f"user.{number // 50}", os.urandom(60_000))
    assert "Too many open files: allow the process more descriptors" in supervisor_log(cluster)
    assert cluster.pid("meta") != pid
    assert sum(len(os.listxattr(cluster.mnt / f"f{number}")) for number in range(50)) == 300
    cluster.down()


def test_a_hung_disk_is_waited_for_and_said(cluster: RealCluster) -> None:
    with own_disk(cluster) as frozen:
        cluster.up("--servers", 1, "--replicas", 1)
        (cluster.mnt / "f").write_bytes(b"before")
        frozen.freeze()
        with writing_durably(cluster.mnt / "g") as writer:
            # Either the loop stands in a write, or a sync in its thread: both are said.
            until(lambda: "does the disk below" in stop_reason(cluster) or sync_hangs(cluster), within_s=60)
            assert writer.poll() is None
            frozen.thaw()
            assert writer.wait(60) == 0
        assert (cluster.mnt / "g").read_bytes() == b"durable"
        until(lambda: cluster.json("status")["health"] == "whole", within_s=60)
        cluster.down()


def sync_hangs(cluster: RealCluster) -> bool:
    return "the log's sync hangs" in (cluster.dir / "logs" / "meta.log").read_text()


@contextlib.contextmanager
def writing_durably(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that writes a file and syncs it; ended with status 0 if that worked.

    A process of its own: whatever is forked here while a file of a hung mount is open would hang closing its copy.
    """
    script = "import os, sys\nwith open(sys.argv[1], 'wb') as f:\n f.write(b'durable'); f.flush(); os.fsync(f.fileno())"
    writer = subprocess.Popen([sys.executable, "-c", script, str(path)], stderr=subprocess.DEVNULL)
    try:
        yield writer
    finally:
        writer.kill()
        writer.wait(60)


class LoopDisk:
    """An ext4 on a loop device, for a tmpfs cannot be frozen."""

    def __init__(self, path: Path, image: Path) -> None:
        self.path = path
        self._is_frozen = False
        path.mkdir(parents=True)
        with open(image, "wb") as file:
            file.truncate(96 * MiB)
        for command in (["mkfs.ext4", "-q", str(image)], ["mount", "-o", "loop", str(image), str(path)]):
            try:
                subprocess.run(command, check=True, capture_output=True)
            except (OSError, subprocess.CalledProcessError) as error:
                pytest.skip(f"no file system of its own can be made here: {error}")

    def freeze(self) -> None:
        subprocess.run(["fsfreeze", "-f", str(self.path)], check=True)
        self._is_frozen = True

    def thaw(self) -> None:
        if self._is_frozen:
            subprocess.run(["fsfreeze", "-u", str(self.path)], check=True)
            self._is_frozen = False


@contextlib.contextmanager
def own_disk(cluster: RealCluster) -> Iterator[LoopDisk]:
    made = LoopDisk(cluster.dir / "meta", cluster.path / "image")
    try:
        yield made
    finally:
        made.thaw()
        cluster.clean_up()
        subprocess.run(["umount", "-l", str(made.path)], capture_output=True)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_folder_that_may_not_be_read_is_said(cluster: RealCluster) -> None:
    """As another user, for root may read everything."""
    cluster.mendfs("up", "--detach", "--servers", 1, "--replicas", 1)
    cluster.down()
    script = (
        "import asyncio, os, sys\n"
        "from mendfs.errors import MendfsError\n"
        "from mendfs.kv.rocks import RocksEngine\n"
        "os.setgid(65534); os.setuid(65534)\n"
        "try:\n    asyncio.run(RocksEngine.open(sys.argv[1]))\n"
        "except MendfsError as error:\n    print(type(error).__name__, error)\n"
    )
    for folder in (cluster.dir, *cluster.dir.parents[:3]):
        folder.chmod(0o755)
    for mode in (0o700, 0o755):
        (cluster.dir / "meta").chmod(mode)
        done = subprocess.run(
            [sys.executable, "-c", script, str(cluster.dir / "meta")],
            capture_output=True,
            text=True,
        )
        assert "EngineFailed" in done.stdout, done.stderr
        assert "Permission denied: give the folder" in done.stdout
