"""Any block size, through the kernel, with 1 to 8 servers: a random mixture of writes against a plain file.

What is compared at the end was read by another client, cold, from the servers.
"""

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real_cluster import RealCluster, needs_mounts, until

pytestmark = needs_mounts

KiB = 1 << 10
MiB = 1 << 20
ACTIONS = ("write", "write", "write", "append", "truncate", "grow", "hole")


class Workload:
    """The same random operations on a file of the volume and on a local one."""

    def __init__(self, path: Path, local: Path, block_size: int, size_max: int, seed: int) -> None:
        self.paths = (path, local)
        self.rng = random.Random(seed)
        self.block_size = block_size
        self.size_max = size_max
        for each in self.paths:
            each.touch()
        self.fds = [os.open(each, os.O_RDWR) for each in self.paths]

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)

    def _length(self) -> int:
        # Within a block, across one border, over several: whole and with ragged ends.
        most = min(self.size_max // 4, self.block_size * self.rng.choice((1, 1, 3)))
        return self.rng.randint(1, most)

    def step(self) -> str:
        action = self.rng.choice(ACTIONS)
        size = os.fstat(self.fds[1]).st_size
        at = self.rng.randint(0, max(0, min(size, self.size_max) - 1))
        data = self.rng.randbytes(self._length())
        match action:
            case "append":
                at = size if size < self.size_max else 0
            case "hole":
                at = min(size + self.rng.randint(0, 2 * self.block_size), self.size_max)
        for fd in self.fds:
            if action == "truncate":
                os.ftruncate(fd, at)
            elif action == "grow":
                os.ftruncate(fd, max(size, at + len(data)))
            else:
                assert os.pwrite(fd, data, at) == len(data)
        return f"{action} at {at}, {len(data)} bytes"

    def run(self, steps: int) -> None:
        done = []
        for number in range(steps):
            done.append(self.step())
            if number % 16 == 5:
                os.fsync(self.fds[0])
            if number % 8 == 7:
                mine, local = (os.pread(fd, self.size_max * 2, 0) for fd in self.fds)
                assert mine == local, f"differs at {first_difference(mine, local)} after {done}"


def first_difference(one: bytes, other: bytes) -> int:
    pairs = zip(one, other, strict=False)
    return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


CASES = [
    pytest.param(("--block-size", "8", "--servers", "3"), 8, 700, 60, id="8 bytes on 3"),
    pytest.param(("--block-size", "64", "--servers", "1", "--checksum", "blake3"), 64, 8 * KiB, 60, id="64 bytes on 1"),
    pytest.param(
        ("--block-size", "3000", "--page-size", "100", "--servers", "2"), 3000, 64 * KiB, 60, id="3000 bytes on 2"
    ),
    pytest.param(("--block-size", "4KiB", "--servers", "5"), 4 * KiB, 128 * KiB, 60, id="4 KiB on 5"),
    pytest.param(
        ("--block-size", "64KiB", "--servers", "8", "--layout", "spread"), 64 * KiB, MiB, 60, id="64 KiB on 8"
    ),
    pytest.param(
        ("--block-size", "1MiB", "--servers", "2", "--page-size", "1MiB"), MiB, 6 * MiB, 40, id="1 MiB, page 1 MiB"
    ),
    pytest.param(
        ("--block-size", "16MiB", "--servers", "2", "--checksum", "blake3"), 16 * MiB, 36 * MiB, 16, id="16 MiB"
    ),
]


@pytest.mark.seed("C2")
@pytest.mark.parametrize(("options", "block_size", "size_max", "steps"), CASES)
def test_a_file_is_what_a_plain_file_would_be(
    cluster: RealCluster, options: tuple[str, ...], block_size: int, size_max: int, steps: int
) -> None:
    cluster.up(*options)
    local = cluster.path / "local"
    work = Workload(cluster.mnt / "f", local, block_size, size_max, seed=block_size)
    try:
        work.run(steps)
    finally:
        work.close()
    cluster.mendfs("get", "/f", cluster.path / "got")
    expected = local.read_bytes()
    got = (cluster.path / "got").read_bytes()
    assert got == expected, f"differs at {first_difference(got, expected)}"
    slots = cluster.json("where", "/f")["slots"]
    for slot in slots:
        for extent in slot["extents"]:
            assert extent["offset"] + extent["length"] <= block_size
            assert {replica["state"] for replica in extent["replicas"]} == {"ok"}
    cluster.down()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """A cluster with blocks of 8 bytes that several tests use."""
    cluster = RealCluster(tmp_path_factory.mktemp("tiny"))
    try:
        cluster.up("--block-size", 8, "--servers", 4)
        yield cluster
    finally:
        cluster.clean_up()


@pytest.mark.seed("C2", "C3", "C4", "C5")
def test_a_text_in_blocks_of_eight_bytes_lies_round_the_ring(tiny: RealCluster) -> None:
    """Block 0 where a hash says, the next ones round robin, each with two more copies on the next two servers."""
    text = b"hi how are you i am good"
    (tiny.mnt / "text").write_bytes(text)
    document = tiny.json("where", "/text")
    assert (document["size"], document["block_size"]) == (24, 8)
    slots = document["slots"]
    assert [slot["slot"] for slot in slots] == [0, 1, 2]
    first = slots[0]["extents"][0]["replicas"][0]["server"]
    blocks = set()
    for number, slot in enumerate(slots):
        (extent,) = slot["extents"]
        assert (extent["offset"], extent["length"]) == (0, 8)
        servers = [(replica["server"], replica["replica"], replica["state"]) for replica in extent["replicas"]]
        assert servers == [((first + number + k) % 4, k, "ok") for k in range(3)]
        blocks.add(extent["block"])
    assert len(blocks) == 3, "C4: blocks of one file on one server are kept apart by their ids"
    shown = tiny.mendfs("where", "/text")
    assert "24 bytes, blocks of 8" in shown
    # A7, C4: what each server lists is what `where` says.
    for server in range(4):
        held = [block for block in tiny.json("contents", server) if block["inode"] == document["inode"]]
        expected = {
            (slot["slot"], replica["replica"])
            for slot in slots
            for replica in slot["extents"][0]["replicas"]
            if replica["server"] == server
        }
        assert {(block["slot"], block["replica"]) for block in held} == expected
        assert all(block["length"] == 8 and block["ok"] for block in held)
    assert (tiny.mnt / "text").read_bytes() == text


@pytest.mark.seed("C2")
def test_a_thousand_tiny_blocks_and_their_rotation(tiny: RealCluster) -> None:
    """A file of 1,251 blocks: written in one piece, overwritten across borders, cut, and listed completely."""
    data = random.Random(3).randbytes(10_003)
    path = tiny.mnt / "many"
    path.write_bytes(data)
    with open(path, "r+b") as file:
        file.seek(4_001)
        file.write(b"x" * 13)
        file.truncate(9_005)
    expected = (data[:4_001] + b"x" * 13 + data[4_014:])[:9_005]
    tiny.mendfs("get", "/many", tiny.path / "got")
    assert (tiny.path / "got").read_bytes() == expected
    slots = tiny.json("where", "/many", "--quick")["slots"]
    assert len(slots) == -(-9_005 // 8)
    firsts = [slot["extents"][0]["replicas"][0]["server"] for slot in slots]
    assert all((after - before) % 4 == 1 for before, after in itertools.pairwise(firsts))
    inode = os.stat(path).st_ino

    def listed() -> int:
        """Blocks of the file on all servers: three of each, once what was cut off is freed."""
        return sum(block["inode"] == inode for server in range(4) for block in tiny.json("contents", server))

    until(lambda: listed() == 3 * sum(len({e["block"] for e in slot["extents"]}) for slot in slots), within_s=60)
