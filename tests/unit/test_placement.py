"""Placement: every claim of the three layouts as a property, and the ring of the founding report by example."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mendfs.errors import UsageError
from mendfs.model import Inode, ServerNumber, Slot
from mendfs.placement import Candidate, check_parameters, default_partitions, first_table, load, partition_of


def candidates(count: int, zones: int = 1) -> list[Candidate]:
    return [Candidate(ServerNumber(n), f"zone{n % zones}") for n in range(count)]


@given(st.integers(1, 32), st.integers(1, 5))
def test_a_ring_spreads_evenly_over_distinct_servers(servers: int, replicas: int) -> None:
    replicas = min(replicas, servers)
    partitions = default_partitions(servers)
    rows = first_table("ring", candidates(servers), replicas=replicas, partitions=partitions)
    assert partitions % servers == 0
    assert partitions >= 1024
    assert all(len({entry.server for entry in row}) == replicas for row in rows)
    assert set(load(rows).values()) == {partitions // servers * replicas}


@pytest.mark.seed("C3")
@pytest.mark.seed("C5")
@given(st.integers(1, 1 << 40), st.integers(3, 16))
def test_ring_the_next_blocks_go_round_robin_and_copies_to_the_next_servers(inode: int, servers: int) -> None:
    partitions = default_partitions(servers)
    rows = first_table("ring", candidates(servers), replicas=3, partitions=partitions)
    first = rows[partition_of(Inode(inode), Slot(0), partitions)][0].server
    for slot in range(2 * servers):
        row = rows[partition_of(Inode(inode), Slot(slot), partitions)]
        assert [entry.server for entry in row] == [(first + slot + k) % servers for k in range(3)]


@pytest.mark.seed("B1")
@pytest.mark.seed("B2")
def test_pairs_mirror_and_take_turns() -> None:
    rows = first_table("pairs", candidates(4), replicas=2, partitions=1024)
    assert {frozenset(entry.server for entry in row) for row in rows} == {frozenset({0, 1}), frozenset({2, 3})}
    firsts = Counter(row[0].server for row in rows)
    assert set(firsts.values()) == {256}


@given(st.integers(3, 12), st.integers(3, 6))
def test_spread_puts_no_two_replicas_in_one_zone_while_there_are_enough(servers: int, zones: int) -> None:
    servers = max(servers, zones)
    rows = first_table("spread", candidates(servers, zones), replicas=3, partitions=servers * 8)
    assert all(len({entry.server % zones for entry in row}) == 3 for row in rows)


def test_spread_with_too_few_zones_still_uses_distinct_servers() -> None:
    rows = first_table("spread", candidates(4, zones=2), replicas=3, partitions=64)
    assert all(len({entry.server for entry in row}) == 3 for row in rows)
    assert all(len({entry.server % 2 for entry in row}) == 2 for row in rows)


def test_spread_weighs_by_capacity() -> None:
    servers = [Candidate(ServerNumber(n), f"z{n}", 3.0 if n == 0 else 1.0) for n in range(6)]
    counts = load(first_table("spread", servers, replicas=1, partitions=6000))
    others = sum(count for number, count in counts.items() if number) / 5
    assert 2.5 < counts[ServerNumber(0)] / others < 3.5


def test_impossible_parameters_say_what_to_change() -> None:
    with pytest.raises(UsageError, match="3 replicas need at least 3 servers"):
        check_parameters(layout="ring", servers=2, replicas=3, partitions=1024)
    with pytest.raises(UsageError, match="--partitions 1026"):
        check_parameters(layout="ring", servers=3, replicas=3, partitions=1024)
    with pytest.raises(UsageError, match="even number"):
        check_parameters(layout="pairs", servers=3, replicas=2, partitions=1026)
