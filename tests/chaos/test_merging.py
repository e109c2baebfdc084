"""Merging while processes are killed: whatever was written is read back, whichever of them dies in the middle."""

import os
import random
import threading

import pytest

from tests.mount.calls import opened
from tests.real_cluster import RealCluster, needs_mounts, until

pytestmark = needs_mounts

SEED = int(os.environ.get("MENDFS_SEED", "4"))
MiB = 1 << 20
PIECE = 4096
VICTIMS = ("meta", "data-0", "data-1", "data-2", "data-3", "meta")


@pytest.mark.timeout(240)
def test_random_writes_among_merges_survive_kills_of_any_server(cluster: RealCluster) -> None:
    """Every server is killed once while a file is written to in small pieces; slots are merged all the time."""
    print(f"MENDFS_SEED={SEED}")
    rng = random.Random(SEED)
    cluster.up("--servers", "4", "--block-size", "256KiB")
    path = cluster.mnt / "file"
    data = bytearray(rng.randbytes(2 * MiB))
    path.write_bytes(data)
    for victim in VICTIMS:
        killer = threading.Thread(target=cluster.kill, args=(victim,))
        killing_at = rng.randrange(50, 300)
        with opened(path, os.O_RDWR) as fd:
            for count in range(400):
                if count == killing_at:
                    killer.start()
                at = rng.randrange(len(data) - PIECE)
                piece = rng.randbytes(rng.randrange(1, PIECE))
                data[at : at + len(piece)] = piece
                os.pwrite(fd, piece, at)
                if count % 20 == 0:
                    os.fsync(fd)
            os.fsync(fd)
        killer.join()
        assert path.read_bytes() == data
        cluster.wait_all_up()
    until(lambda: max(counts(cluster)) <= 64, within_s=60)
    cluster.down()
    cluster.up()
    assert path.read_bytes() == data


def counts(cluster: RealCluster) -> list[int]:
    """Extents of each slot."""
    return [len(slot["extents"]) for slot in cluster.json("where", "/file", "--quick")["slots"]]
