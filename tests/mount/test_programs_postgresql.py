"""PostgreSQL on the mount: pgbench, kill -9 of every one of its processes, recovery, and nothing acknowledged lost."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.mount.programs import PATH, Place, descendants, kill_tree
from tests.real_cluster import needs_mounts, until

pytestmark = [needs_mounts, pytest.mark.timeout(600)]

CLIENTS = 4
SECONDS, FEWER_SECONDS = 30, 10
DATABASE = "postgres"
"""The one that initdb makes."""
SUMS = (
    "SELECT sum(abalance) FROM pgbench_accounts",
    "SELECT sum(bbalance) FROM pgbench_branches",
    "SELECT sum(tbalance) FROM pgbench_tellers",
    "SELECT sum(delta) FROM pgbench_history",
)


def binaries() -> Path:
    """Debian keeps each version's programs in a folder of its own."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: float(path.parts[-3]))
    if not found or not (found[-1].parent / "pgbench").exists():
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    return found[-1].parent


class Server:
    """One PostgreSQL whose data are on the mount; its socket is not."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.bin = binaries()
        self.data = place.path / "data"
        self._process: subprocess.Popen[str] | None = None

    def run(self, program: str, *arguments: object, code: int = 0) -> str:
        return self.place.run(self.bin / program, *arguments, code=code, environment=self._environment())

    def begin(self, program: str, *arguments: object) -> subprocess.Popen[str]:
        return self.place.start(self.bin / program, *arguments, environment=self._environment())

    def _environment(self) -> dict[str, str]:
        return {"PGHOST": str(self.place.local), "PGDATABASE": DATABASE, "PGDATA": str(self.data)}

    def start(self) -> None:
        """Returns when it answers, recovered."""
        settings: tuple[str, ...] = (
            "listen_addresses=",
            f"unix_socket_directories={self.place.local}",
            "logging_collector=off",
        )
        # Small, so that it reads through the mount and not from its own memory.
        settings += ("shared_buffers=4MB", "fsync=on", "synchronous_commit=on", "full_page_writes=on")
        options = [part for setting in settings for part in ("-c", setting)]
        self._process = process = self.begin("postgres", "-D", self.data, *options)

        def answers() -> bool:
            if process.poll() is not None:
                pytest.fail(f"postgres ended: {process.stdout.read() if process.stdout else ''}")
            ready = [str(self.bin / "pg_isready"), "-q", "-h", str(self.place.local)]
            return subprocess.run(ready, env={"PATH": PATH}, timeout=30).returncode == 0

        until(answers, within_s=120)

    def kill(self) -> None:
        """kill -9 of the postmaster and of all its children at once."""
        assert self._process is not None
        assert len(descendants(self._process.pid)) > CLIENTS
        kill_tree(self._process)

    def stop(self) -> None:
        """As an administrator stops it."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGINT)
        out, _ = self._process.communicate(timeout=120)
        assert self._process.returncode == 0, out
        assert "PANIC" not in out and "invalid page" not in out, out

    def number(self, query: str) -> int:
        return int(self.run("psql", "-qAtX", "-c", query).strip() or 0)


def transactions(output: str) -> int:
    """How many pgbench was told to be committed."""
    found = re.search(r"number of transactions actually processed: (\d+)", output)
    assert found, output
    return int(found[1])


@pytest.mark.parametrize("place", ["postgres"], indirect=True)
def test_postgresql_recovers_every_acknowledged_transaction_after_a_kill(place: Place) -> None:
    server = Server(place)
    server.run("initdb", "-D", server.data, "--auth=trust", "--encoding=UTF8", "--data-checksums")
    server.start()
    server.run("pgbench", "--initialize", "--quiet", "--scale=2")
    out = server.run(
        "pgbench", f"--time={SECONDS if place.is_long else FEWER_SECONDS}", f"--client={CLIENTS}", "--no-vacuum"
    )
    print(out)
    committed = transactions(out)
    assert server.number("SELECT count(*) FROM pgbench_history") == committed > 0

    running = server.begin("pgbench", "--time=300", f"--client={CLIENTS}", "--no-vacuum")
    until(lambda: server.number("SELECT count(*) FROM pgbench_history") >= committed + 50, within_s=60)
    server.kill()
    out, _ = running.communicate(timeout=60)
    committed += transactions(out)

    server.start()
    # What each client had sent last may have been committed without its hearing of it.
    assert committed <= server.number("SELECT count(*) FROM pgbench_history") <= committed + CLIENTS
    assert len({server.number(query) for query in SUMS}) == 1
    server.run("pg_amcheck", "--install-missing", "--heapallindexed")
    server.stop()
    server.run("pg_checksums", "--check")
