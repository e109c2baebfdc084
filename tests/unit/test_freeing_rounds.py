"""Freeing goes on although a data server does not delete; what it holds is forgotten when it has."""

import asyncio

import pytest

from mendfs.client.volume import Volume
from mendfs.errors import StoreFailed
from mendfs.meta import background, rounds, schema
from mendfs.meta.rounds import RETRY_MAX_S, RETRY_MIN_S, Rounds
from mendfs.model import BlockId, CommitSequence, Inode, Partition, ServerNumber
from tests.unit.client_tools import Cluster, cluster, until, write_file

S0, S1 = ServerNumber(0), ServerNumber(1)


def dead(number: int) -> tuple[CommitSequence, Partition, BlockId]:
    return CommitSequence(number), Partition(0), BlockId(number)


async def waiting(c: Cluster) -> int:
    """Dead blocks that are not forgotten."""
    return len(await c.engine.begin().range(*schema.all_of(schema.Kind.DEAD), limit=10_000))


async def come_and_go(volume: Volume, count: int) -> None:
    """Files of one block each, removed again."""
    for number in range(count):
        file = await write_file(volume, b"%d" % number, b"x" * 100)
        await file.flush()
        await volume.unlink(Inode(1), b"%d" % number)
        await file.release()


async def until_waiting(c: Cluster, count: int) -> None:
    async with asyncio.timeout(10):
        while await waiting(c) != count:
            await asyncio.sleep(0.005)


async def test_a_server_that_does_not_delete_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FREE_EVERY_S", 0.02)
    monkeypatch.setattr(background, "DEAD_A_ROUND", 2)
    monkeypatch.setattr(rounds, "RETRY_MIN_S", 1000.0)
    async with cluster(partitions=4) as c:
        volume = await c.client()
        c.stores[0].delete_error = StoreFailed("the index takes nothing")
        for turn in range(1, 4):
            await come_and_go(volume, 8)
            # The hash spreads inodes over the partitions: how many store 0 holds is counted, not assumed.
            await until(lambda: not any(store.blocks for store in c.stores[1:]))
            await until_waiting(c, len(c.stores[0].blocks))
            assert c.stores[0].blocks, f"turn {turn}"
        assert c.stores[0].deletes == 1, "it is asked again later, not each round"
        assert c.meta.state.rounds.is_waiting


async def test_what_was_left_behind_is_freed_when_the_server_deletes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "FREE_EVERY_S", 0.02)
    monkeypatch.setattr(background, "DEAD_A_ROUND", 2)
    monkeypatch.setattr(rounds, "RETRY_MIN_S", 0.05)
    monkeypatch.setattr(rounds, "RETRY_MAX_S", 0.1)
    async with cluster(partitions=4) as c:
        volume = await c.client()
        c.stores[0].delete_error = c.stores[1].delete_error = StoreFailed("the index takes nothing")
        await come_and_go(volume, 12)
        await until(lambda: not any(store.blocks for store in c.stores[2:]))
        await until(lambda: min(c.stores[0].deletes, c.stores[1].deletes) > 1)
        c.stores[1].delete_error = None
        # What both hold as well: the one that still refuses must not keep the other from giving its room back.
        await until(lambda: not c.stores[1].blocks)
        await until_waiting(c, len(c.stores[0].blocks))
        c.stores[0].delete_error = None
        await until_waiting(c, 0)
        assert not any(store.blocks for store in c.stores)
        await until(lambda: not c.meta.state.rounds.is_waiting)


def test_a_server_is_asked_later_each_time_and_at_once_after_it_obeyed() -> None:
    made = Rounds()
    at_s = pause_s = 0.0
    for _ in range(10):
        made.refused(S0, at_s)
        pause_s = min(max(RETRY_MIN_S, 2 * pause_s), RETRY_MAX_S)
        assert not made.may_ask(S0, at_s + pause_s - 0.1)
        at_s += pause_s
        assert made.may_ask(S0, at_s)
    assert pause_s == RETRY_MAX_S
    made.obeyed(S0)
    made.refused(S0, at_s)
    assert made.may_ask(S0, at_s + RETRY_MIN_S)


def test_a_pass_over_what_was_left_behind_begins_when_a_server_may_be_asked_again() -> None:
    made = Rounds()
    assert made.late_range(0.0) is None
    made.refused(S0, 0.0)
    made.refused(S1, 1.0)
    made.left_behind()
    made.took_fresh(dead(9))
    assert made.is_waiting
    assert made.late_range(RETRY_MIN_S - 0.1) is None
    assert made.late_range(RETRY_MIN_S) == (None, dead(9))
    made.took_late(dead(4))
    made.refused(S0, RETRY_MIN_S)
    # It goes on to the end although nobody is to be asked just now: others' blocks may lie there.
    assert made.late_range(RETRY_MIN_S) == (dead(4), dead(9))
    made.took_late(None)
    assert not made.is_waiting


def test_blocks_left_behind_while_a_pass_goes_on_wait_for_the_next_one() -> None:
    made = Rounds()
    made.left_behind()
    made.took_fresh(dead(9))
    assert made.late_range(0.0) == (None, dead(9)), "nobody refuses any more"
    made.refused(S0, 0.0)
    made.left_behind()
    made.took_late(None)
    assert made.is_waiting
    assert made.late_range(0.0) is None
    assert made.late_range(RETRY_MIN_S) == (None, dead(9))


def test_a_server_that_was_in_no_row_of_a_pass_is_still_asked_for_what_is_left_behind_later() -> None:
    """Its rows have changed since it refused: what is left behind because it has to wait is not deleted there."""
    r = Rounds()
    r.refused(S0, 0.0)
    r.left_behind()
    r.took_fresh(dead(1))
    assert r.late_range(RETRY_MIN_S) is not None
    r.took_late(None)
    assert not r.is_waiting
    assert r.has_refused(S0)
