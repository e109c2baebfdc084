"""Latency with many data servers beside few (row D7), in one run: only the ratio means something on a shared machine.

    python bench/many_servers.py [--many 32] [--few 4] [--rounds 200] [--json]

Two clusters run at once and do every operation in turn, so both meet the same noise; medians of each are compared.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.compare import Cluster

SIZE = 64 << 10
OPERATIONS = ("mkdir", "create, write 64 KiB, close", "write 4 KiB, fsync", "read 64 KiB, cold", "stat", "unlink")


class Subject:
    """One cluster, and what is measured of it."""

    def __init__(self, base: Path, servers: int) -> None:
        base.mkdir()
        self.servers = servers
        self.cluster = Cluster(base, "--servers", str(servers), "--block-size", "64KiB")
        began_s = time.perf_counter()
        self.cluster.up()
        self.ready_s = time.perf_counter() - began_s
        self.seconds: dict[str, list[float]] = {name: [] for name in OPERATIONS}
        self._data = os.urandom(SIZE)

    def round(self, number: int) -> None:
        """Every operation once."""
        root = self.cluster.root
        path = root / f"d{number}" / "f"
        self._time("mkdir", lambda: path.parent.mkdir())
        self._time("create, write 64 KiB, close", lambda: self._write(path))
        self._time("write 4 KiB, fsync", lambda: self._sync(path))
        # Written data is not kept by the mount: once the kernel's pages are gone, a read comes from a server.
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        self._time("read 64 KiB, cold", lambda: os.pread(descriptor, SIZE, 0))
        os.close(descriptor)
        self._time("stat", lambda: path.stat())
        self._time("unlink", lambda: path.unlink())

    def _time(self, name: str, work: Callable[[], object]) -> None:
        began_s = time.perf_counter()
        work()
        self.seconds[name].append(time.perf_counter() - began_s)

    def _write(self, path: Path) -> None:
        with open(path, "xb", buffering=0) as file:
            file.write(self._data)

    def _sync(self, path: Path) -> None:
        with open(path, "r+b", buffering=0) as file:
            file.write(self._data[:4096])
            os.fsync(file.fileno())

    def median_ms(self, name: str) -> float:
        """The median of one operation."""
        return 1000 * statistics.median(self.seconds[name])

    def reads(self) -> int:
        """What the data servers were asked to read: it shows that reads were cold."""
        return sum(server["reads"] for server in json.loads(self.cluster.mendfs("servers", "--json")))

    def memory_mib(self) -> float:
        """Resident memory of one data server."""
        record = json.loads((self.cluster.dir / "cluster.json").read_text())
        pids = [child["process"]["pid"] for child in record["children"] if child["name"].startswith("data")]
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids]
        return statistics.mean(pages) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--many", type=int, default=32)
    parser.add_argument("--few", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mendfs-bench-") as base:
        subjects = []
        try:
            for servers in (arguments.few, arguments.many):
                subjects.append(Subject(Path(base) / str(servers), servers))
            for number in range(arguments.rounds):
                # By turns first and second, or one would always find the caches warm.
                for subject in subjects if number % 2 else subjects[::-1]:
                    subject.round(number)
            report(*subjects, as_json=arguments.json)
        finally:
            for subject in subjects:
                subject.cluster.down()


def report(few: Subject, many: Subject, *, as_json: bool) -> None:
    """Print medians and ratios."""
    ratios = {name: many.median_ms(name) / few.median_ms(name) for name in OPERATIONS}
    if as_json:
        print(json.dumps({"few": few.servers, "many": many.servers, "ratios": ratios}))
        return
    for subject in (few, many):
        print(
            f"{subject.servers} servers: ready in {subject.ready_s:.1f} s, {subject.memory_mib():.0f} MiB each, "
            f"{subject.reads()} blocks read"
        )
    print(f"{'':30}{few.servers:>8} {many.servers:>11} servers   ratio")
    for name, ratio in ratios.items():
        print(f"{name:30}{few.median_ms(name):8.2f} {many.median_ms(name):8.2f} ms {ratio:13.2f}")


if __name__ == "__main__":
    main()
