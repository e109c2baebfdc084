"""mendfs beside a plain local directory, in one run: machines are shared and noisy, so only ratios mean something.

    ./dev bench [--mib 512] [--files 2000] [--rounds 3] [--dir FOLDER] [--json]

Each round does everything on both, in turn; medians are printed. "Cold" is with new processes and dropped page caches,
so it needs root. CPU is that of all processes of the cluster, per GiB of user data. All data read is compared.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

MIB = 1 << 20
SMALL = 4096
RANDOM_READS = 1000
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
INSTALLED = {"site-packages", "dist-packages"}
METRICS = {
    "write + fsync": "MiB/s",
    "read, cold": "MiB/s",
    "create 4 KiB files": "files/s",
    "random 4 KiB reads, cold": "reads/s",
    "cp -a of the Python tree": "s",
    "CPU of a write": "s/GiB",
    "CPU of a cold read": "s/GiB",
}


class Cluster:
    """A mendfs cluster with the defaults, mounted."""

    def __init__(self, base: Path, *options: str) -> None:
        self._options = options
        self.dir = base / "cluster"
        self.root = base / "mnt"
        self.root.mkdir()

    def mendfs(self, *arguments: str) -> str:
        """Run a command; it must succeed."""
        command = [sys.executable, "-m", "mendfs.cli.main", *arguments, "--dir", str(self.dir)]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def up(self) -> None:
        """Start and mount it."""
        self.mendfs("up", "--detach", "--mount", str(self.root), *self._options)

    def down(self) -> None:
        """Stop it."""
        self.mendfs("down")

    def processes(self) -> dict[str, int]:
        """Pids by name."""
        record = json.loads((self.dir / "cluster.json").read_text())
        found = {child["name"]: child["process"]["pid"] for child in record["children"]}
        return {"supervisor": record["supervisor"]["pid"], **found}

    def cpu_s(self) -> float:
        """CPU seconds that all its processes have used."""
        total = 0.0
        for pid in self.processes().values():
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) * TICK_S
        return total

    def rss_mib(self) -> dict[str, float]:
        """Resident memory of each process."""
        return {
            name: int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE / MIB
            for name, pid in self.processes().items()
        }


def drop_caches() -> None:
    """What is read next comes from the disk."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    began_s = time.perf_counter()
    work()
    return time.perf_counter() - began_s


def write(path: Path, data: bytes) -> None:
    """In pieces of 1 MiB, then fsync."""
    view = memoryview(data)
    with path.open("wb", buffering=0) as file:
        for at in range(0, len(view), MIB):
            file.write(view[at : at + MIB])
        os.fsync(file.fileno())


def read(path: Path, digest: bytes) -> float:
    """Seconds for reading all of it in pieces of 1 MiB; what was read is compared afterwards, off the clock."""
    pieces = []
    began_s = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(MIB):
            pieces.append(piece)
    took_s = time.perf_counter() - began_s
    found = hashlib.sha256()
    for piece in pieces:
        found.update(piece)
    assert found.digest() == digest, f"{path}: other bytes than were written"
    return took_s


def create(folder: Path, count: int) -> None:
    """Small files, one after the other."""
    folder.mkdir()
    content = os.urandom(SMALL)
    for number in range(count):
        (folder / f"{number:06d}").write_bytes(content)


def read_randomly(path: Path, data: bytes, count: int) -> None:
    """4 KiB at a time, aligned, at random."""
    rng = random.Random(7)
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    for _ in range(count):
        at = rng.randrange(len(data) // SMALL) * SMALL
        assert os.pread(fd, SMALL, at) == data[at : at + SMALL], f"{path}: other bytes at {at}"
    os.close(fd)


def one_round(root: Path, cluster: Cluster | None, data: bytes, files: int, number: int) -> dict[str, float]:
    """Everything once on one file system; `cluster` is None for the local directory."""
    folder = root / f"round-{number}"
    folder.mkdir()
    gib = len(data) / (1 << 30)
    digest = hashlib.sha256(data).digest()
    found: dict[str, float] = {}

    def cool() -> None:
        if cluster is not None:
            cluster.down()
            cluster.up()
        drop_caches()

    def cpu_s() -> float:
        return cluster.cpu_s() if cluster is not None else 0.0

    before_s = cpu_s()
    found["write + fsync"] = len(data) / MIB / timed(lambda: write(folder / "big", data))
    found["CPU of a write"] = (cpu_s() - before_s) / gib
    found["create 4 KiB files"] = files / timed(lambda: create(folder / "small", files))
    (folder / "tree").mkdir()
    parts = python_tree()
    found["cp -a of the Python tree"] = timed(lambda: subprocess.run(["cp", "-a", *parts, folder / "tree"], check=True))
    cool()
    before_s = cpu_s()
    found["read, cold"] = len(data) / MIB / read(folder / "big", digest)
    found["CPU of a cold read"] = (cpu_s() - before_s) / gib
    cool()
    took_s = timed(lambda: read_randomly(folder / "big", data, RANDOM_READS))
    found["random 4 KiB reads, cold"] = RANDOM_READS / took_s
    return found


def python_tree() -> list[Path]:
    """The standard library of this Python, without what was installed beside it: about the same on every machine."""
    return sorted(path for path in Path(sysconfig.get_path("stdlib")).iterdir() if path.name not in INSTALLED)


def report(results: dict[str, list[dict[str, float]]], rss: dict[str, float]) -> str:
    """The table."""
    lines = [f"{'':26}{'mendfs':>10}{'local':>10}{'ratio':>8}"]
    for metric, unit in METRICS.items():
        ours, theirs = (statistics.median(each[metric] for each in results[name]) for name in ("mendfs", "local"))
        ratio = f"{ours / theirs:8.2f}" if theirs else f"{'-':>8}"
        lines.append(f"{metric:26}{ours:10.1f}{theirs:10.1f}{ratio}  {unit}")
    lines.append("RSS in MiB: " + ", ".join(f"{name} {mib:.0f}" for name, mib in rss.items()))
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="size of the big file")
    parser.add_argument("--files", type=int, default=2000, help="small files")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", default="/var/tmp", help="a folder on the disk to measure")
    parser.add_argument("--json", action="store_true", help="one JSON document with every sample")
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="mendfs-bench-", dir=options.dir))
    cluster = Cluster(base)
    local = base / "local"
    local.mkdir()
    results: dict[str, list[dict[str, float]]] = {"mendfs": [], "local": []}
    data = os.urandom(options.mib * MIB)
    try:
        ready_s = timed(cluster.up)
        for number in range(options.rounds):
            results["local"].append(one_round(local, None, data, options.files, number))
            results["mendfs"].append(one_round(cluster.root, cluster, data, options.files, number))
        rss = cluster.rss_mib()
    finally:
        if (cluster.dir / "cluster.json").exists():
            cluster.down()
        shutil.rmtree(base)
    if options.json:
        print(json.dumps({"results": results, "rss_mib": rss, "ready_s": ready_s, "options": vars(options)}))
    else:
        print(report(results, rss) + f"\nready in {ready_s:.1f} s (first start)")


if __name__ == "__main__":
    main()
