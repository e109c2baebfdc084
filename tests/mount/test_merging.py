"""Small writes at random through the kernel: the file is merged while and after it is written, and stays right."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.mount.calls import opened
from tests.real_cluster import RealCluster, needs_mounts, until

pytestmark = needs_mounts

MiB = 1 << 20
PIECE = 4096
EXTENTS_MAX = 64


def counts(cluster: RealCluster, path: Path) -> list[int]:
    """Extents of each slot."""
    return [len(slot["extents"]) for slot in cluster.json("where", path, "--quick")["slots"]]


def rewrite(path: Path, data: bytearray, numbers: list[int], seed: int) -> None:
    """Write these pieces anew, with a look back and an fsync now and then."""
    rng = random.Random(seed)
    with opened(path, os.O_RDWR) as fd:
        for count, number in enumerate(numbers, start=1):
            at = number * PIECE
            data[at : at + PIECE] = rng.randbytes(PIECE)
            os.pwrite(fd, data[at : at + PIECE], at)
            if count % 100 == 0:
                os.fsync(fd)
            if count % 10 == 0:
                other = numbers[rng.randrange(count)] * PIECE
                assert os.pread(fd, PIECE, other) == data[other : other + PIECE]


def test_a_file_rewritten_in_4_kib_pieces_by_two_threads_ends_in_few_extents(cluster: RealCluster) -> None:
    """4 slots of 256 pieces each: without merging every slot would have some hundred extents."""
    cluster.up("--servers", "3", "--block-size", "1MiB")
    path = cluster.mnt / "file"
    rng = random.Random(3)
    data = bytearray(rng.randbytes(4 * MiB))
    path.write_bytes(data)
    stored = path.stat().st_blocks
    order = list(range(len(data) // PIECE))
    rng.shuffle(order)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda half: rewrite(path, data, order[half::2], half), range(2)))
    written = path.stat()
    until(lambda: max(counts(cluster, path)) <= EXTENTS_MAX, within_s=60)
    after = path.stat()
    assert (after.st_size, after.st_blocks) == (len(data), stored)
    assert (after.st_mtime_ns, after.st_ctime_ns) == (written.st_mtime_ns, written.st_ctime_ns)
    assert path.read_bytes() == data

    second = cluster.path / "second"
    second.mkdir()
    cluster.mendfs("mount", second)
    try:
        assert (second / "file").read_bytes() == data
        with opened(second / "file", os.O_RDWR) as fd:
            for at in range(0, MiB, 2 * PIECE):
                data[at : at + PIECE] = rng.randbytes(PIECE)
                os.pwrite(fd, data[at : at + PIECE], at)
    finally:
        cluster.mendfs("umount", second)
    # One mount has left the slot crowded and is gone; another one that reads the file mends it.
    assert counts(cluster, path)[0] > EXTENTS_MAX
    assert path.read_bytes() == data
    until(lambda: counts(cluster, path)[0] <= EXTENTS_MAX, within_s=60)
    assert path.read_bytes() == data
    until(lambda: held(cluster) == named(cluster, path), within_s=60)


def held(cluster: RealCluster) -> int:
    """Replicas on all servers."""
    return sum(len(cluster.json("contents", number)) for number in range(3))


def named(cluster: RealCluster, path: Path) -> int:
    """Replicas that the file needs."""
    slots = cluster.json("where", path, "--quick")["slots"]
    return 3 * len({extent["block"] for slot in slots for extent in slot["extents"]})
