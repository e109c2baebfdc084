"""Layouts and numbers of servers, on real clusters: where replicas lie, who is read and written, what is refused."""

import itertools
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real_cluster import RealCluster, needs_mounts, until

pytestmark = needs_mounts

KiB = 1 << 10
BLOCKS = 64


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """Four servers in two mirrored pairs, with a file of 64 blocks."""
    cluster = RealCluster(tmp_path_factory.mktemp("pairs"))
    try:
        cluster.up("--layout", "pairs", "--servers", 4, "--block-size", "4KiB")
        (cluster.mnt / "file").write_bytes(random.Random(5).randbytes(BLOCKS * 4 * KiB))
        os.sync()
        yield cluster
    finally:
        cluster.clean_up()


def rows(cluster: RealCluster, path: str) -> list[list[int]]:
    """The servers of each slot's first block, replica 0 first."""
    slots = cluster.json("where", path, "--quick")["slots"]
    return [[replica["server"] for replica in slot["extents"][0]["replicas"]] for slot in slots]


def counters(cluster: RealCluster, name: str) -> list[int]:
    """`reads` or `writes` of every server; they come with heartbeats."""
    return [server[name] for server in cluster.json("servers")]


@pytest.mark.seed("B1")
def test_pairs_mirror_each_other(pairs: RealCluster) -> None:
    """Servers 0 and 1 hold the same, so do 2 and 3; together they are one store."""
    assert {frozenset(row) for row in rows(pairs, "/file")} == {frozenset((0, 1)), frozenset((2, 3))}
    held = [{(block["id"], block["length"]) for block in pairs.json("contents", server)} for server in range(4)]
    assert held[0] == held[1] != held[2] == held[3]
    assert len(held[0] | held[2]) == BLOCKS
    assert not held[0] & held[2]


@pytest.mark.seed("B2")
def test_pairs_take_turns_between_and_inside_them(pairs: RealCluster) -> None:
    """Slots go to one pair and the other in turn, and inside a pair each server is first in turn."""
    found = rows(pairs, "/file")
    assert all(set(one) != set(next_) for one, next_ in itertools.pairwise(found)), "between pairs by turns"
    for pair in ({0, 1}, {2, 3}):
        firsts = [row[0] for row in found if set(row) == pair]
        assert all(one != next_ for one, next_ in itertools.pairwise(firsts)), "inside a pair by turns"
    until(lambda: sum(counters(pairs, "writes")) == 2 * BLOCKS, within_s=60)
    assert counters(pairs, "writes") == [BLOCKS // 2] * 4
    assert [server["writes"] for server in pairs.json("status")["servers"]] == [BLOCKS // 2] * 4
    before = counters(pairs, "reads")
    for _ in range(3):
        pairs.mendfs("get", "/file", pairs.path / "got")
    until(lambda: sum(counters(pairs, "reads")) - sum(before) >= 3 * BLOCKS, within_s=60)
    reads = [after - was for after, was in zip(counters(pairs, "reads"), before, strict=True)]
    assert sum(reads[:2]) > BLOCKS and sum(reads[2:]) > BLOCKS
    assert min(reads) > sum(reads) / 10, f"every server reads its share: {reads}"


@pytest.mark.seed("B2", "B3")
def test_a_mirror_serves_while_its_other_half_is_away(pairs: RealCluster) -> None:
    expected = (pairs.mnt / "file").read_bytes()
    pairs.kill("data-2")
    pairs.mendfs("get", "/file", pairs.path / "got")
    assert (pairs.path / "got").read_bytes() == expected
    pairs.wait_all_up()


def test_a_later_up_takes_what_the_volume_has_and_refuses_anything_else(pairs: RealCluster) -> None:
    """Fixed parameters come from the folder (all of them: tests/unit/test_folder.py); nothing starts with others."""
    pairs.down()
    for option, value, has in (
        ("--servers", 3, "4"),
        ("--block-size", "8KiB", "4KiB"),
        ("--layout", "ring", "pairs"),
        ("--write-quorum", 1, "2"),
    ):
        code, out, said = pairs.command("up", "--detach", option, value)
        assert (code, out) == (2, ""), option
        assert f"{option} {value} was asked for" in said
        assert f"formatted with {option} {has}: leave the option out" in said
        assert pairs.record().children == (), "nothing was started"
    pairs.up("--layout", "pairs", "--servers", 4, "--block-size", "4096")
    assert len((pairs.mnt / "file").read_bytes()) == BLOCKS * 4 * KiB


WRONG = [
    ("--block-size", "7"),
    ("--block-size", "17MiB"),
    ("--block-size", "nonsense"),
    ("--page-size", "16KiB", "--block-size", "8"),
    ("--page-size", "3", "--block-size", "8"),
    ("--servers", "0"),
    ("--servers", "2", "--replicas", "3"),
    ("--layout", "pairs", "--servers", "3"),
    ("--layout", "star"),
    ("--partitions", "10", "--servers", "4"),
    ("--write-quorum", "4"),
    ("--base-port", "65534"),
]


@pytest.mark.parametrize("options", WRONG, ids=" ".join)
def test_what_is_impossible_is_refused_before_anything_is_made(cluster: RealCluster, options: tuple[str, ...]) -> None:
    code, out, said = cluster.command("up", "--detach", *options)
    assert (code, out) == (2, "")
    assert said.startswith("mendfs: ") and said.count("\n") == 1
    assert not cluster.dir.exists()


@pytest.mark.seed("C1")
def test_spread_puts_no_two_replicas_in_one_zone(cluster: RealCluster) -> None:
    """Six servers in three zones, as machines would be: each block once in each zone."""

    cluster.mendfs("format", "--dir", cluster.dir, "--servers", 6, "--block-size", "4KiB", "--layout", "spread")
    meta = f"127.0.0.1:{free_port()}"
    secret = cluster.dir / "secret"
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "mendfs.cli.main", *words, "--secret-file", str(secret)],
            stderr=subprocess.DEVNULL,
        )
        for words in (
            ["meta", "--dir", str(cluster.dir), "--listen", meta],
            *(
                [
                    "data",
                    "--dir",
                    str(cluster.path / f"d{n}"),
                    "--meta",
                    meta,
                    "--listen",
                    "127.0.0.1:0",
                    "--zone",
                    f"zone {n // 2}",
                    "--number",
                    str(n),
                ]
                for n in range(6)
            ),
        )
    ]
    named = ("--meta", meta, "--secret-file", secret)
    try:
        until(lambda: cluster.command("ls", *named, "/")[0] == 0, within_s=60)
        (cluster.path / "local").write_bytes(bytes(40 * 4 * KiB))
        cluster.mendfs("put", *named, cluster.path / "local", "/f")
        slots = cluster.json("where", *named, "/f", "--quick")["slots"]
        assert len(slots) == 40
        for slot in slots:
            zones = [replica["server"] // 2 for replica in slot["extents"][0]["replicas"]]
            assert sorted(zones) == [0, 1, 2]
        assert {r["server"] for slot in slots for r in slot["extents"][0]["replicas"]} == set(range(6))
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait(60)


def free_port() -> int:

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.seed("C1", "C11")
def test_thirty_two_servers_start_and_serve(cluster: RealCluster) -> None:
    """A10, C11: as many processes as there may be on a small machine; one that dies is gone round."""
    began_s = time.monotonic()
    cluster.up("--servers", 32, "--block-size", "64KiB")
    took_s = time.monotonic() - began_s
    data = random.Random(9).randbytes(96 * 64 * KiB)
    (cluster.mnt / "f").write_bytes(data)
    os.sync()
    found = rows(cluster, "/f")
    assert all(row == [(found[0][0] + slot + k) % 32 for k in range(3)] for slot, row in enumerate(found))
    assert {row[0] for row in found} == set(range(32))
    cluster.kill("data-7")
    cluster.mendfs("get", "/f", cluster.path / "got")
    assert (cluster.path / "got").read_bytes() == data
    resident = sum(resident_bytes(cluster.pid(f"data-{number}")) for number in range(32) if number != 7) // 31
    print(f"32 servers ready in {took_s:.1f} s, {resident >> 20} MiB resident each")
    assert resident < 128 << 20
    cluster.down()


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(pid)
