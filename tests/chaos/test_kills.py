"""kill -9 at random moments under load: nothing that was acknowledged is missing, and every store opens again.

MENDFS_KILLS=200 makes it as long as the project's promise; MENDFS_SEED=N repeats a run's order of work.
"""

import hashlib
import os
import random
import threading
from pathlib import Path

import pytest

from tests.real_cluster import RealCluster, needs_mounts

KILLS = int(os.environ.get("MENDFS_KILLS", "8"))
SEED = int(os.environ.get("MENDFS_SEED", "0")) or random.SystemRandom().randrange(1, 1 << 30)
WRITERS = 3
PAUSE_MAX_S = 0.4
"""Longer than a restart takes, so that kills meet servers that serve, that start and that recover."""
SERVING_SHARE = 0.8
"""Kills of a server that had begun to serve; the others hit one that is starting, which is then started more slowly."""

pytestmark = [needs_mounts, pytest.mark.timeout(120 + 20 * KILLS)]


class Writer(threading.Thread):
    """Writes, rewrites, appends, renames and removes files in a folder of its own, and notes what was acknowledged."""

    def __init__(self, folder: Path, rng: random.Random, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.rng = rng
        self.acknowledged: dict[str, bytes] = {}
        """Digest of each file that must be there, by name."""
        self.uncertain: set[str] = set()
        """Files in the middle of a change when the thread ended."""
        self.error: BaseException | None = None
        self._stop_asked = stop
        self._contents: dict[str, bytes] = {}

    def run(self) -> None:
        try:
            self.folder.mkdir()
            number = 0
            while not self._stop_asked.is_set():
                number += 1
                self._step(number)
        except BaseException as error:
            self.error = error

    def _step(self, number: int) -> None:
        action = self.rng.random()
        names = sorted(self._contents)
        if action < 0.5 or not names:
            self._store(f"file-{number}", self.rng.randbytes(self.rng.choice([100, 4096, 70_000, 900_000])))
        elif action < 0.7:
            name = self.rng.choice(names)
            self._store(name, self.rng.randbytes(5000))
        elif action < 0.85:
            self._append(self.rng.choice(names), self.rng.randbytes(3000))
        elif action < 0.95:
            self._rename(self.rng.choice(names), f"renamed-{number}")
        else:
            self._remove(self.rng.choice(names))

    def _note(self, name: str, content: bytes) -> None:
        self._contents[name] = content
        self.acknowledged[name] = hashlib.sha256(content).digest()
        self.uncertain.discard(name)

    def _write(self, name: str, content: bytes, flags: int) -> None:
        fd = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT | flags, 0o644)
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(fd, rest) :]
            os.fsync(fd)
        finally:
            os.close(fd)

    def _store(self, name: str, content: bytes) -> None:
        self.uncertain.add(name)
        self._write(name, content, os.O_TRUNC)
        self._note(name, content)

    def _append(self, name: str, more: bytes) -> None:
        self.uncertain.add(name)
        self._write(name, more, os.O_APPEND)
        self._note(name, self._contents[name] + more)

    def _rename(self, name: str, new_name: str) -> None:
        self.uncertain |= {name, new_name}
        os.rename(self.folder / name, self.folder / new_name)
        self._note(new_name, self._contents.pop(name))
        del self.acknowledged[name]
        self.uncertain.discard(name)

    def _remove(self, name: str) -> None:
        self.uncertain.add(name)
        os.unlink(self.folder / name)
        del self._contents[name], self.acknowledged[name]
        self.uncertain.discard(name)

    def check(self) -> None:
        """Everything acknowledged is there with its contents, and nothing else is."""
        assert self.error is None, self.error
        assert not self.uncertain
        assert sorted(os.listdir(self.folder)) == sorted(self.acknowledged)
        for name, digest in self.acknowledged.items():
            found = (self.folder / name).read_bytes()
            assert hashlib.sha256(found).digest() == digest, f"{name}: {len(found)} bytes, other contents"


def kill_under_load(cluster: RealCluster, choose: list[str]) -> None:
    rng = random.Random(SEED)
    print(f"MENDFS_SEED={SEED}")
    cluster.up("--block-size", "256KiB")
    stop = threading.Event()
    writers = [Writer(cluster.mnt / f"writer-{n}", random.Random(SEED + n), stop) for n in range(WRITERS)]
    for writer in writers:
        writer.start()
    try:
        pause = threading.Event()
        for _ in range(KILLS):
            pause.wait(rng.random() * PAUSE_MAX_S)
            name = rng.choice(choose)
            if rng.random() < SERVING_SHARE:
                cluster.wait_serving(name)
                pause.wait(rng.random() * PAUSE_MAX_S)
            cluster.kill(name)
    finally:
        stop.set()
        for writer in writers:
            writer.join(120)
    assert not any(writer.is_alive() for writer in writers), "a write hangs"
    cluster.wait_all_up(60)
    for writer in writers:
        writer.check()
        assert writer.acknowledged, "there was no load"
    # Once more, from the disks alone: caches dropped, all processes new.
    cluster.down()
    cluster.up()
    cluster.drop_caches()
    for writer in writers:
        writer.check()


@pytest.mark.seed("A5", "C7", "D1", "D3")
def test_killed_data_servers_lose_nothing_acknowledged(cluster: RealCluster) -> None:
    kill_under_load(cluster, [f"data-{number}" for number in range(4)])


@pytest.mark.seed("A11", "D1", "D3")
def test_a_killed_meta_server_loses_nothing_acknowledged(cluster: RealCluster) -> None:
    kill_under_load(cluster, ["meta"])
