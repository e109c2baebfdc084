"""A block comes back right or not at all, from whichever replicas have good pages."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mendfs.blocks import page_checksums, root_of
from mendfs.errors import (
    AllReplicasFailed,
    BlockCorrupt,
    BlockMissing,
    DeadlineExceeded,
    MendfsError,
    ReplicaError,
    Unreachable,
)
from mendfs.model import BlockId, Epoch, Partition
from mendfs.transfer import BlockRef, Candidate, PagesCorrupt, fetch_any, fetch_pages
from mendfs.wire.messages import Message
from mendfs.wire.messages.data import BlockPages, GetBlock
from mendfs.wire.messages.session import Done
from mendfs.wire.peer import POOL, Peer, Received, Reply
from tests.unit.wire_tools import Result, connected, serving

PAGE = 16
DATA = bytes(range(256)) * 3 + b"the end"
PAGES = -(-len(DATA) // PAGE)
CHECKSUMS = page_checksums(DATA, PAGE, "xxh3")
REF = BlockRef(Partition(1), BlockId(77), len(DATA), root_of(CHECKSUMS, length=len(DATA), page_size=PAGE, kind="xxh3"))


class Replica:
    """A data server with one block, which may be rotten, slow, refusing or lying."""

    def __init__(
        self,
        *,
        bad_pages: Sequence[int] = (),
        checksums: bytes = CHECKSUMS,
        error: MendfsError | None = None,
        lie: Callable[[Reply], Result] = lambda reply: reply,
    ) -> None:
        self.data = bytearray(DATA)
        for page in bad_pages:
            self.data[page * PAGE] ^= 1
        self.checksums = checksums
        self.error = error
        self.lie = lie
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.asked: list[GetBlock] = []
        self.cancelled = 0

    async def handle(self, peer: Peer, message: Message, received: Received | None) -> Result:
        assert isinstance(message, GetBlock)
        self.asked.append(message)
        try:
            await self.may_answer.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error is not None:
            raise self.error
        end = (message.first_page + message.page_count) * PAGE
        checksums = self.checksums if message.with_checksums else b""
        piece = bytes(self.data[message.first_page * PAGE : end])
        return self.lie(Reply(BlockPages(len(DATA), checksums, Epoch(1)), [piece]))


@asynccontextmanager
async def served(*replicas: Replica, first: int = 1) -> AsyncIterator[list[Candidate]]:
    """Candidates that connect to these replicas."""
    async with asyncio.timeout(20):
        stack = []
        candidates: list[Candidate] = []
        try:
            for number, replica in enumerate(replicas, start=first):
                server = serving("127.0.0.1:0", replica.handle)
                peer = connected((await server.__aenter__()).address)
                stack.append(server.__aexit__)
                candidates.append(giving(await peer.__aenter__(), number))
                stack.append(peer.__aexit__)
            yield candidates
        finally:
            for leave in reversed(stack):
                await leave(None, None, None)


def giving(peer: Peer, number: int) -> Candidate:
    """Every other one is connected already, those between must be waited for."""

    async def give() -> Peer:
        await asyncio.sleep(0)
        return peer

    return (lambda: peer) if number % 2 else give


async def peer_of(candidate: Candidate) -> Peer:
    peer = candidate()
    return peer if isinstance(peer, Peer) else await peer


async def refuse() -> Peer:
    raise Unreachable("server 7 does not answer")


class Fetched:
    """What one fetch_any did."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, ReplicaError]] = []
        self.into = bytearray(len(DATA))
        self.first = 0
        self.count = PAGES

    async def run(
        self,
        candidates: Sequence[Candidate],
        *,
        first: int = 0,
        count: int = PAGES,
        checksums: bytes | None = None,
        hedge_after_s: float = 5.0,
        deadline_s: float = 5.0,
    ) -> bytes:
        start, end = first * PAGE, min((first + count) * PAGE, len(DATA))
        self.into = bytearray(end - start)
        found = await fetch_any(
            candidates,
            REF,
            first_page=first,
            page_count=count,
            into=memoryview(self.into),
            page_size=PAGE,
            kind="xxh3",
            checksums=checksums,
            deadline_s=deadline_s,
            hedge_after_s=hedge_after_s,
            report=lambda index, error: self.reports.append((index, error)),
        )
        assert self.into == DATA[start:end]
        assert found == CHECKSUMS
        return found

    @property
    def reported(self) -> list[int]:
        return [index for index, _ in self.reports]


async def fetch_one(replica: Replica, checksums: bytes | None = None) -> bytes:
    async with served(replica) as (candidate,):
        into = bytearray(len(DATA))
        return await fetch_pages(
            await peer_of(candidate),
            REF,
            first_page=0,
            page_count=PAGES,
            into=memoryview(into),
            page_size=PAGE,
            kind="xxh3",
            checksums=checksums,
            deadline_s=5,
        )


async def test_pages_of_one_server_are_verified_against_the_root() -> None:
    good = Replica()
    assert await fetch_one(good) == CHECKSUMS
    assert await fetch_one(good, CHECKSUMS) == CHECKSUMS
    assert [request.with_checksums for request in good.asked] == [True, False]


@pytest.mark.parametrize(
    ("replica", "error"),
    [
        (lambda: Replica(error=BlockMissing("not here")), BlockMissing),
        (lambda: Replica(bad_pages=[3, 9]), PagesCorrupt),
        (lambda: Replica(checksums=CHECKSUMS[:-1]), BlockCorrupt),
        (lambda: Replica(checksums=bytes(len(CHECKSUMS))), BlockCorrupt),
        (lambda: Replica(lie=lambda reply: reply.message), BlockCorrupt),
        (lambda: Replica(lie=lambda reply: Done()), BlockCorrupt),
        (lambda: Replica(lie=lambda reply: reply._replace(payload=[DATA[:-1]])), BlockCorrupt),
        (lambda: Replica(lie=lambda reply: reply._replace(payload=[DATA, b"x"])), MendfsError),
        (lambda: Replica(lie=lambda reply: reply._replace(message=BlockPages(9, CHECKSUMS, Epoch(1)))), BlockCorrupt),
    ],
)
async def test_whatever_one_server_does_wrong_is_an_error_and_the_next_one_serves(
    replica: Callable[[], Replica], error: type[MendfsError]
) -> None:
    with pytest.raises(error):
        await fetch_one(replica())
    fetched = Fetched()
    async with served(replica(), Replica()) as candidates:
        await fetched.run(candidates)
    assert fetched.reported == [0]


@pytest.mark.seed("A12")
@pytest.mark.seed("C10.3")
async def test_two_wrong_replicas_of_three_do_not_outvote_the_right_one() -> None:
    everywhere = range(PAGES)
    fetched = Fetched()
    replicas = Replica(bad_pages=everywhere), Replica(bad_pages=everywhere), Replica()
    async with served(*replicas) as candidates:
        await fetched.run(candidates)
        assert fetched.reported == [0, 1]
        # A replica without one good page has nothing more to give.
        with pytest.raises(AllReplicasFailed):
            await fetched.run(candidates[:2])
    assert [len(replica.asked) for replica in replicas] == [2, 2, 1]


@pytest.mark.seed("C8.2")
async def test_only_bad_pages_are_asked_of_the_next_replica() -> None:
    second = Replica()
    fetched = Fetched()
    async with served(Replica(bad_pages=[5, 7]), second) as candidates:
        await fetched.run(candidates)
    (request,) = second.asked
    assert (request.first_page, request.page_count, request.with_checksums) == (5, 3, False)
    assert isinstance(fetched.reports[0][1], BlockCorrupt)
    assert "page 5" in str(fetched.reports[0][1])


async def test_checksums_from_one_and_pages_from_another() -> None:
    """The first has good pages but rotten checksums, the second good checksums and one bad page."""
    fetched = Fetched()
    first, second = Replica(checksums=bytes(len(CHECKSUMS))), Replica(bad_pages=[0])
    async with served(first, second) as candidates:
        await fetched.run(candidates)
    assert fetched.reported == [0, 1]


async def test_a_page_bad_everywhere_is_an_error_that_says_what_each_replica_did() -> None:
    fetched = Fetched()
    async with served(Replica(bad_pages=[1, 2]), Replica(bad_pages=[2]), Replica(error=BlockMissing("gone"))) as three:
        with pytest.raises(AllReplicasFailed, match=r"block 0x4d: .*page 1.*page 2.*gone.*server 7"):
            await fetched.run([*three, refuse])
        assert fetched.reported == [0, 1, 2, 3]
        await fetched.run(three, first=3, count=5)
    with pytest.raises(AllReplicasFailed, match="there is none"):
        await fetched.run([])


@pytest.mark.parametrize("first", [0, 1])
async def test_a_late_answer_is_hedged_and_the_loser_cancelled(first: int) -> None:
    slow, quick = Replica(), Replica()
    slow.may_answer.clear()
    fetched = Fetched()
    async with served(slow, quick, first=first) as candidates:
        await fetched.run(candidates, hedge_after_s=0.01)
        assert fetched.reports == []
        async with asyncio.timeout(5):
            while not slow.cancelled:
                await asyncio.sleep(0.001)
        # What the slow one would still send must not land in memory that belongs to the reader again.
        slow.may_answer.set()
        fetched.into[:] = bytes(len(DATA))
        await (await peer_of(candidates[0])).call(GetBlock(Partition(0), BlockId(0), 0, 1), deadline_s=5)
        assert fetched.into == bytes(len(DATA))


@pytest.mark.parametrize("first", [0, 1])
async def test_a_hedge_that_was_no_better_leaves_the_first_its_time(first: int) -> None:
    slow, broken = Replica(bad_pages=[8]), Replica(bad_pages=[3, 4])
    slow.may_answer.clear()
    fetched = Fetched()
    async with served(slow, broken, first=first) as candidates:
        running = asyncio.create_task(fetched.run(candidates, hedge_after_s=0.01))
        async with asyncio.timeout(5):
            while not fetched.reports:
                await asyncio.sleep(0.001)
        slow.may_answer.set()
        await running
    assert fetched.reported == [1, 0]


async def test_an_error_makes_the_next_one_be_asked_at_once() -> None:
    fetched = Fetched()
    async with served(Replica()) as candidates:
        await fetched.run([refuse, *candidates], hedge_after_s=3600)
    assert fetched.reported == [0]


async def test_a_reader_that_is_cancelled_while_it_waits_alone_gets_nothing_more_written() -> None:
    slow = Replica()
    slow.may_answer.clear()
    fetched = Fetched()
    async with served(slow, Replica()) as candidates:
        running = asyncio.create_task(fetched.run(candidates))
        async with asyncio.timeout(5):
            while not slow.asked:
                await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        async with asyncio.timeout(5):
            while not slow.cancelled:
                await asyncio.sleep(0.001)
    assert fetched.into == bytes(len(DATA))


async def test_silence_ends_at_the_deadline() -> None:
    silent = Replica()
    silent.may_answer.clear()
    fetched = Fetched()
    async with served(silent) as candidates:
        with pytest.raises(AllReplicasFailed):
            await fetched.run(candidates, deadline_s=0.02)
    assert isinstance(fetched.reports[0][1], DeadlineExceeded)


@pytest.mark.parametrize("first", [0, 1])
async def test_buffers_of_the_pool_come_back_also_when_the_reader_is_cancelled(first: int) -> None:
    slow = [Replica() for _ in range(3)]
    for replica in slow:
        replica.may_answer.clear()
    fetched = Fetched()
    async with served(*slow, first=first) as candidates:
        before = POOL.kept_bytes
        running = asyncio.create_task(fetched.run(candidates, hedge_after_s=0))
        async with asyncio.timeout(5):
            while not all(replica.asked for replica in slow):
                await asyncio.sleep(0.001)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert POOL.kept_bytes >= before


@settings(max_examples=60)
@given(
    rot=st.lists(st.sets(st.integers(0, PAGES - 1), max_size=6), min_size=1, max_size=4),
    rotten_checksums=st.sets(st.integers(0, 3)),
    first=st.integers(0, PAGES - 1),
    count=st.integers(1, PAGES),
    hedge_after_s=st.sampled_from([0.0, 5.0]),
    first_server=st.integers(0, 1),
)
def test_a_range_is_read_exactly_if_every_page_is_good_somewhere(
    rot: list[set[int]], rotten_checksums: set[int], first: int, count: int, hedge_after_s: float, first_server: int
) -> None:
    count = min(count, PAGES - first)
    wanted = set(range(first, first + count))
    lost = {page for page in wanted if all(page in pages for pages in rot)}
    readable = not lost and not rotten_checksums >= set(range(len(rot)))

    async def check() -> None:
        replicas = [
            Replica(bad_pages=sorted(pages), checksums=b"x" * len(CHECKSUMS) if i in rotten_checksums else CHECKSUMS)
            for i, pages in enumerate(rot)
        ]
        async with served(*replicas, first=first_server) as candidates:
            try:
                await Fetched().run(candidates, first=first, count=count, hedge_after_s=hedge_after_s)
                assert readable
            except AllReplicasFailed:
                assert not readable

    asyncio.run(check())
