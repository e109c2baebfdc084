"""A file rewritten in small pieces at random: how fast it reads before and after, and in how many extents it ends.

    ./dev bench random-rewrite [--mib 1024] [--piece 4096] [--fsync-every N] [--servers 4] [--dir FOLDER] [--json]

Writes the file in order, reads it cold, writes every piece once in random order, fsyncs, waits until no slot has more
than 64 extents, reads it cold again. Only the ratio of the two reads means something on a shared machine. "Cold" is
with new processes and dropped page caches, so it needs root. Every byte read is compared.
"""

import argparse
import json
import os
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path

from bench.compare import MIB, Cluster, drop_caches, timed

EXTENTS_MAX = 64
MERGED_WITHIN_S = 300.0


def filled(path: Path, mib: int) -> None:
    """Write in order, in pieces of 1 MiB."""
    with path.open("wb", buffering=0) as file:
        for number in range(mib):
            file.write(piece_of(number, MIB, 0))
        os.fsync(file.fileno())


def piece_of(number: int, length: int, generation: int) -> bytes:
    """The bytes of a piece: they cannot be compressed, nor taken for another piece's."""
    return random.Random((number << 8) + generation).randbytes(length)


def read(path: Path) -> tuple[float, list[bytes]]:
    """Seconds for reading all of it in pieces of 1 MiB, and what was read."""
    pieces = []
    began_s = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(MIB):
            pieces.append(piece)
    return time.perf_counter() - began_s, pieces


def rewrite(path: Path, size: int, piece: int, fsync_every: int) -> list[float]:
    """Every piece once, in random order. Returns how long each fsync took."""
    order = list(range(size // piece))
    random.Random(7).shuffle(order)
    took: list[float] = []
    fd = os.open(path, os.O_RDWR)
    try:
        for count, number in enumerate(order, start=1):
            os.pwrite(fd, piece_of(number, piece, 1), number * piece)
            if count == len(order) or (fsync_every and count % fsync_every == 0):
                took.append(timed(lambda: os.fsync(fd)))
    finally:
        os.close(fd)
    return took


def extents_per_slot(cluster: Cluster, path: Path) -> list[int]:
    """How many extents each slot has."""
    document = json.loads(cluster.mendfs("where", str(path), "--quick", "--json"))
    return [len(slot["extents"]) for slot in document["slots"]]


def wait_merged(cluster: Cluster, path: Path) -> tuple[float, list[int]]:
    """Until no slot is crowded; returns how long that took and the counts."""
    began_s = time.perf_counter()
    while True:
        counts = extents_per_slot(cluster, path)
        took_s = time.perf_counter() - began_s
        if max(counts) <= EXTENTS_MAX or took_s > MERGED_WITHIN_S:
            return took_s, counts
        threading.Event().wait(0.5)


def cool(cluster: Cluster) -> None:
    """New processes, nothing in memory."""
    cluster.down()
    cluster.up()
    drop_caches()


def measure(cluster: Cluster, mib: int, piece: int, fsync_every: int) -> dict[str, float]:
    """All of it once."""
    path = cluster.root / "file"
    found: dict[str, float] = {"fill MiB/s": mib / timed(lambda: filled(path, mib))}
    cool(cluster)
    before_s, read_before = read(path)
    assert b"".join(read_before) == b"".join(piece_of(n, MIB, 0) for n in range(mib)), "other bytes than were written"
    del read_before
    cpu_s = cluster.cpu_s()
    began_s = time.perf_counter()
    fsyncs = rewrite(path, mib * MIB, piece, fsync_every)
    found["rewrite s"] = time.perf_counter() - began_s
    found["fsyncs"] = len(fsyncs)
    found["median fsync ms"] = sorted(fsyncs)[len(fsyncs) // 2] * 1000
    found["extents at the end of writing, most in a slot"] = max(extents_per_slot(cluster, path))
    found["merged after s"], counts = wait_merged(cluster, path)
    found["CPU of rewriting and merging, s/GiB"] = (cluster.cpu_s() - cpu_s) / (mib / 1024)
    found["extents merged, most in a slot"] = max(counts)
    found["extents merged, mean"] = sum(counts) / len(counts)
    found["client MiB"] = cluster.rss_mib().get("mount", 0.0)
    found["meta MiB"] = cluster.rss_mib().get("meta", 0.0)
    cool(cluster)
    after_s, read_after = read(path)
    pieces = (piece_of(n, piece, 1) for n in range(mib * MIB // piece))
    assert b"".join(read_after) == b"".join(pieces), "other bytes than were written"
    found["read before MiB/s"] = mib / before_s
    found["read after MiB/s"] = mib / after_s
    found["ratio"] = before_s / after_s
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="size of the file")
    parser.add_argument("--piece", type=int, default=4096, help="bytes of a write")
    parser.add_argument("--fsync-every", type=int, default=0, help="writes between two fsyncs; 0: one at the end")
    parser.add_argument("--servers", type=int, default=4)
    parser.add_argument("--dir", default="/var/tmp", help="a folder on the disk to measure")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    base = Path(tempfile.mkdtemp(prefix="mendfs-bench-", dir=options.dir))
    cluster = Cluster(base, "--servers", str(options.servers))
    try:
        cluster.up()
        found = measure(cluster, options.mib, options.piece, options.fsync_every)
    finally:
        if (cluster.dir / "cluster.json").exists():
            cluster.down()
        shutil.rmtree(base)
    if options.json:
        print(json.dumps({"results": found, "options": vars(options)}))
    else:
        print("\n".join(f"{name:48}{value:10.2f}" for name, value in found.items()))


if __name__ == "__main__":
    main()
