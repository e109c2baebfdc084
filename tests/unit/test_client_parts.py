"""Ids in order, and caches that stay within their bounds."""

import asyncio

import pytest

from mendfs.client.cache import RUN_BYTES, ChecksumCache, PageCache, Run
from mendfs.client.files import File
from mendfs.client.ids import IdSupply
from mendfs.client.tasks import Changes, Tasks
from mendfs.errors import CommitRefused, MendfsError, Unreachable
from mendfs.model import BlockId, Inode, Partition
from mendfs.wire.messages.session import IdsGranted
from mendfs.world.buffers import BufferPool


class Granter:
    def __init__(self, count: int = 4) -> None:
        self.count = count
        self.next = 100
        self.lowest: list[int] = []
        self.errors: list[Exception] = []

    async def ask(self, lowest: int) -> IdsGranted:
        self.lowest.append(lowest)
        await asyncio.sleep(0)
        if self.errors:
            raise self.errors.pop(0)
        first, self.next = self.next, self.next + 2 * self.count
        return IdsGranted(first, self.count)


async def test_ids_are_used_in_order_and_the_lowest_in_flight_is_known() -> None:
    tasks, granter = Tasks(), Granter()
    ids = IdSupply(granter.ask, tasks)
    assert ids.lowest_in_flight == 0
    taken = [await ids.take() for _ in range(6)]
    assert taken == [100, 101, 102, 103, 108, 109]
    assert ids.lowest_in_flight == 100
    for number in (101, 100, 102, 103):
        ids.settle(number)
    assert ids.lowest_in_flight == 108
    ids.settle(108)
    ids.settle(109)
    assert ids.lowest_in_flight == 110
    await tasks.close()


async def test_many_takers_share_one_request() -> None:
    tasks, granter = Tasks(), Granter(1000)
    ids = IdSupply(granter.ask, tasks)
    taken = await asyncio.gather(*[ids.take() for _ in range(500)])
    assert sorted(taken) == list(range(100, 600))
    assert len(granter.lowest) == 1
    await tasks.close()


async def test_a_refused_range_is_asked_for_again_and_other_errors_are_the_takers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mendfs.client.ids.REFUSED_PAUSE_S", 0.001)
    tasks, granter = Tasks(), Granter()
    ids = IdSupply(granter.ask, tasks)
    granter.errors = [CommitRefused("too many ranges"), Unreachable("gone")]
    with pytest.raises(Unreachable):
        await ids.take()
    assert await ids.take() == 100
    await tasks.close()


async def test_ids_of_a_lost_session_are_not_used() -> None:
    tasks, granter = Tasks(), Granter()
    ids = IdSupply(granter.ask, tasks)
    await ids.take()
    ids.forget_all()
    assert await ids.take() >= 108
    await tasks.close()


def run(block: int, first: int, data: bytes) -> Run:
    return Run((Partition(1), BlockId(block)), first, bytearray(data), len(data))


def test_pages_are_copied_across_runs_up_to_the_first_gap() -> None:
    cache = PageCache(1 << 20, 4, BufferPool())
    name = (Partition(1), BlockId(7))
    cache.add(run(7, 0, b"aaaabbbb"))
    cache.add(run(7, 2, b"ccccdd"))
    target = bytearray(20)
    assert cache.copy(name, 1, memoryview(target)) == 13
    assert target[:13] == b"aaabbbbccccdd"
    assert cache.copy(name, 20, memoryview(target)) == 0
    assert cache.holds(name, 3) and not cache.holds(name, 4)


def test_the_page_cache_stays_within_its_bound_and_forgets_the_longest_unused() -> None:
    cache = PageCache(3 * (RUN_BYTES + 8), 4, BufferPool())
    target = bytearray(8)
    for block in range(3):
        cache.add(run(block, 0, b"12345678"))
    assert cache.copy((Partition(1), BlockId(0)), 0, memoryview(target)) == 8
    cache.add(run(3, 0, b"12345678"))
    assert cache.used <= 3 * (RUN_BYTES + 8)
    assert cache.holds((Partition(1), BlockId(0)), 0)
    assert not cache.holds((Partition(1), BlockId(1)), 0)


def test_a_page_that_a_newer_run_holds_survives_the_older_one() -> None:
    cache = PageCache(2 * (RUN_BYTES + 8), 4, BufferPool())
    name = (Partition(1), BlockId(7))
    cache.add(run(7, 0, b"aaaabbbb"))
    cache.add(run(7, 1, b"bbbb"))
    cache.add(run(8, 0, b"xxxxyyyy"))
    assert not cache.holds(name, 0) and cache.holds(name, 1)


def test_checksums_stay_within_their_bound() -> None:
    cache = ChecksumCache(100)
    for block in range(20):
        cache.add((Partition(0), BlockId(block)), bytes(10))
    assert cache.get((Partition(0), BlockId(0))) is None
    assert cache.get((Partition(0), BlockId(19))) == bytes(10)


async def test_whoever_waits_for_a_change_is_woken_once() -> None:
    changes = Changes()
    waiting = asyncio.create_task(changes.wait(10))
    await asyncio.sleep(0)
    changes.notify()
    await waiting
    await changes.wait(0.001)
    assert not changes._waiters


def test_an_error_told_to_a_write_is_told_once_more_for_the_kernel_may_have_kept_it() -> None:
    """The second request of a long write(2) only shortens its count: the application would never hear of lost bytes."""
    file = File(Inode(5))
    lost = MendfsError("written data lost")
    for _ in range(3):
        file.errors.append(lost)
        for _ in range(2):
            with pytest.raises(MendfsError, match="lost"):
                file.tell_writer()
        file.tell_writer()
    file.errors.extend([lost, MendfsError("more of it")])
    with pytest.raises(MendfsError, match="lost"):
        file.tell_writer()
    with pytest.raises(MendfsError, match="lost"):
        file.take_error()
    file.take_error()
    file.tell_writer()
