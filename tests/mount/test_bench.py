"""`mendfs bench`, and what it must show of clusters with many servers."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real_cluster import RealCluster

KINDS = {"latency", "throughput", "files"}
RATIO_MAX = 1.5
TRIES = 10


def test_everything_is_measured_and_nothing_left_behind(real: RealCluster) -> None:
    before = real.mendfs("ls", "/")
    found = json.loads(real.mendfs("bench", "--count", 5, "--size", "3MiB", "--json"))
    assert set(found) == KINDS
    for each in found["latency"]:
        assert each["count"] == 5 and 0 < each["median_ms"] <= each["p90_ms"] <= each["max_ms"]
    assert all(each["bytes"] == 3 << 20 and each["bytes_per_second"] > 0 for each in found["throughput"])
    assert all(each["count"] == 5 and each["files_per_second"] > 0 for each in found["files"])
    table = real.mendfs("bench", "files", "--count", 20)
    assert "small files" in table and "create, write 4KiB, close" in table and "latency" not in table
    assert real.mendfs("ls", "/") == before
    assert not [path for path in real.mnt.iterdir() if path.name.startswith(".mendfs-bench")]


def test_wrong_usage_is_said_in_one_line(real: RealCluster) -> None:
    for arguments, text in ((("speed",), "use latency, throughput, files"), (("files", "--count", 0), "at least 1")):
        code, _, said = real.command("bench", *arguments)
        assert code == 2 and text in said and said.count("\n") == 1


@pytest.fixture
def two_sizes(tmp_path: Path) -> Iterator[dict[int, RealCluster]]:
    """Clusters of 4 and of 32 servers, both running."""
    made: dict[int, RealCluster] = {}
    try:
        for servers in (4, 32):
            folder = tmp_path / str(servers)
            folder.mkdir()
            made[servers] = RealCluster(folder)
            made[servers].mendfs("up", "--detach", "--servers", servers)
        yield made
    finally:
        for cluster in made.values():
            cluster.clean_up()


@pytest.mark.seed("D7")
def test_operations_take_no_longer_with_many_servers(two_sizes: dict[int, RealCluster]) -> None:
    """Measured in turn, for the machine does other things too: the best of each counts."""
    best: dict[int, dict[str, float]] = {4: {}, 32: {}}
    ratio = float("inf")
    for _ in range(TRIES):
        for servers, cluster in two_sizes.items():
            for each in json.loads(cluster.mendfs("bench", "latency", "--count", 40, "--json"))["latency"]:
                known = best[servers].get(each["operation"], float("inf"))
                best[servers][each["operation"]] = min(known, each["median_ms"])
        ratio = statistics.geometric_mean(best[32][name] / best[4][name] for name in best[4])
        if ratio <= RATIO_MAX:
            break
    assert ratio <= RATIO_MAX, best
