"""Pages of a block from any of its replicas, verified (design sections 1.3 and 6): for readers and for reconcile.

Nothing is believed: the page checksums must match the root that the metadata keeps, and each page its checksum. Pages
that verified from one replica are kept while the others are asked for the rest, so a block is lost only when the same
page is bad everywhere.
"""

import asyncio
import inspect
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar

import msgspec

from mendfs.blocks import bad_pages, check_root
from mendfs.errors import AllReplicasFailed, BlockCorrupt, MendfsError, ReplicaError
from mendfs.model import BlockId, ChecksumKind, Partition
from mendfs.wire.messages.data import BlockPages, GetBlock
from mendfs.wire.peer import POOL, Answer, Peer, Pending

Candidate = Callable[[], Awaitable[Peer] | Peer]
"""A replica: gives the connection to its server, at once if there is one, or raises a MendfsError that says why not."""


class BlockRef(msgspec.Struct, frozen=True):
    """A block and what its bytes must be."""

    partition: Partition
    block: BlockId
    length: int
    root: bytes


class PagesCorrupt(BlockCorrupt):
    """Some of the pages failed; the others, and the checksums, are good."""

    code: ClassVar[str] = "pages_corrupt"
    pages: tuple[int, ...] = ()
    checksums: bytes = b""


async def fetch_pages(
    peer: Peer,
    ref: BlockRef,
    *,
    first_page: int,
    page_count: int,
    into: memoryview,
    page_size: int,
    kind: ChecksumKind,
    checksums: bytes | None,
    deadline_s: float,
) -> bytes:
    """Fill `into` with exactly these pages from one server, verified; returns the page checksums of the block.

    `checksums` are those of the block if they are known already and were checked, else None. Raises BlockMissing,
    BlockCorrupt (PagesCorrupt if only some pages are bad) or Unreachable; `into` is then undefined but for good pages.
    """
    request = _request(ref, first_page, page_count, into, page_size, checksums)
    answer = await peer.call(request, deadline_s=deadline_s, into=into)
    return _verify(answer, ref, peer, request, into, page_size, kind, checksums)


def _request(
    ref: BlockRef, first_page: int, page_count: int, into: memoryview, page_size: int, checksums: bytes | None
) -> GetBlock:
    assert len(into) == min((first_page + page_count) * page_size, ref.length) - first_page * page_size > 0
    return GetBlock(ref.partition, ref.block, first_page, page_count, checksums is None)


def _verify(
    answer: Answer,
    ref: BlockRef,
    peer: Peer,
    request: GetBlock,
    into: memoryview,
    page_size: int,
    kind: ChecksumKind,
    checksums: bytes | None,
) -> bytes:
    """The checksums of the block, if the answer is what the request was for and its pages in `into` are good."""
    message, received = answer
    where = f"block {ref.block:#x} from {peer.remote_address}"
    if not isinstance(message, BlockPages) or message.length != ref.length:
        raise BlockCorrupt(f"{where}: the answer is of another block or of none")
    if received is None or len(received.view) != len(into):
        raise BlockCorrupt(f"{where}: not the pages that were asked for")
    if checksums is None:
        check_root(message.checksums, ref.root, length=ref.length, page_size=page_size, kind=kind)
        checksums = message.checksums
    failed = bad_pages(into, checksums, first_page=request.first_page, page_size=page_size, kind=kind)
    if failed:
        count = request.page_count
        error = PagesCorrupt(f"{where}: {len(failed)} of {count} pages failed, the first is page {failed[0]}")
        error.pages, error.checksums = tuple(failed), checksums
        raise error
    return checksums


class _Attempt:
    """One replica being asked: for the pages `first` to `end` (excluded), into memory of its own or the caller's."""

    __slots__ = ("buffer", "checksums", "end", "error", "first", "good", "index", "peer", "pending", "task", "view")

    def __init__(
        self, index: int, first: int, end: int, view: memoryview, buffer: bytearray | None, checksums: bytes | None
    ) -> None:
        self.index = index
        self.first = first
        self.end = end
        self.view = view
        self.buffer = buffer
        """Of the pool; None: `view` is the caller's memory."""
        self.checksums = checksums
        """As far as they were known when it began; None: it asks for them."""
        self.good: frozenset[int] = frozenset()
        self.error: MendfsError | None = None
        self.task: asyncio.Task[None] | None = None
        self.peer: Awaitable[Peer] | Peer | None = None
        """What the candidate gave, if it was asked before the task was made."""
        self.pending: Pending | None = None
        """The call, if it was begun before the task was made."""

    @property
    def asked(self) -> frozenset[int]:
        """The pages it is for."""
        return frozenset(range(self.first, self.end))


class _Fetch:
    """One fetch_any: which pages are good so far and where they lie, and which replicas may still be asked."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        ref: BlockRef,
        *,
        first_page: int,
        page_count: int,
        into: memoryview,
        page_size: int,
        kind: ChecksumKind,
        checksums: bytes | None,
        deadline_s: float,
    ) -> None:
        self.candidates = candidates
        self.ref = ref
        self.first_page = first_page
        self.into = into
        self.page_size = page_size
        self.kind = kind
        self.checksums = checksums
        self.deadline_s = deadline_s
        self.wanted = frozenset(range(first_page, first_page + page_count))
        self.in_place: frozenset[int] = frozenset()
        """Good pages that lie in `into` already."""
        self.beside: list[_Attempt] = []
        """Ended attempts whose good pages lie in buffers of their own."""
        # In the order of their beginning: they are looked at in it, and that of a set is another one in each run.
        self.running: dict[_Attempt, None] = {}
        self.left = deque(range(len(candidates)))
        self.without_checksums: list[int] = []
        """Replicas whose checksums were bad: with those of another one their pages may yet turn out good."""

    def missing(self) -> frozenset[int]:
        """Pages nobody has given yet."""
        return self.wanted.difference(self.in_place, *(attempt.good for attempt in self.beside))

    def adopt(self, first: _Attempt) -> None:
        """The attempt that was begun before there was anything to keep account of."""
        self.left.popleft()
        self.running[first] = None

    def begin(self) -> _Attempt:
        """The attempt to make next: one range that holds all missing pages."""
        missing = self.missing()
        first, end = min(missing), max(missing) + 1
        start, stop = first * self.page_size, min(end * self.page_size, self.ref.length)
        index = self.left.popleft()
        # The caller's memory takes one writer, and no good page in it may be written over.
        if self.in_place or any(attempt.buffer is None for attempt in self.running):
            buffer = POOL.take(stop - start)
            attempt = _Attempt(index, first, end, memoryview(buffer)[: stop - start], buffer, self.checksums)
        else:
            base = self.first_page * self.page_size
            attempt = _Attempt(index, first, end, self.into[start - base : stop - base], None, self.checksums)
        self.running[attempt] = None
        return attempt

    async def run(self, attempt: _Attempt) -> None:
        """Ask the replica; what came of it is written into the attempt."""
        try:
            peer = attempt.peer if attempt.peer is not None else self.candidates[attempt.index]()
            if not isinstance(peer, Peer):
                peer = await peer
            count = attempt.end - attempt.first
            request = _request(self.ref, attempt.first, count, attempt.view, self.page_size, attempt.checksums)
            if attempt.pending is not None:
                answer = await attempt.pending.result()
            else:
                answer = await peer.call(request, deadline_s=self.deadline_s, into=attempt.view)
            self.checksums = _verify(
                answer, self.ref, peer, request, attempt.view, self.page_size, self.kind, attempt.checksums
            )
            attempt.good = attempt.asked
        except MendfsError as error:
            attempt.error = error

    def end(self, attempt: _Attempt) -> None:
        """Take what an ended attempt gave."""
        self.running.pop(attempt, None)
        if isinstance(attempt.error, PagesCorrupt):
            self.checksums = attempt.error.checksums
            attempt.good = attempt.asked.difference(attempt.error.pages)
        if attempt.good and attempt.buffer is None:
            self.in_place |= attempt.good
        elif attempt.good:
            self.beside.append(attempt)
        elif type(attempt.error) is BlockCorrupt and attempt.checksums is None:
            self.without_checksums.append(attempt.index)
        if self.checksums is not None:
            self.left.extend(self.without_checksums)
            self.without_checksums.clear()

    def collect(self) -> None:
        """Copy what lies beside into place. Nothing may be running: it could write over what is copied."""
        base = self.first_page * self.page_size
        for attempt in self.beside:
            for page in attempt.good - self.in_place:
                start = page * self.page_size
                stop = min(start + self.page_size, self.ref.length)
                offset = attempt.first * self.page_size
                self.into[start - base : stop - base] = attempt.view[start - offset : stop - offset]
            self.in_place |= attempt.good

    def release(self) -> None:
        """Give the buffers back. Calls that ended, however they did, write nothing any more."""
        for attempt in self.running:
            if attempt.pending is not None:
                attempt.pending.cancel()
            if inspect.iscoroutine(attempt.peer):
                attempt.peer.close()
        for attempt in [*self.beside, *self.running]:
            if attempt.buffer is not None:
                POOL.give(attempt.buffer)


async def fetch_any(
    candidates: Sequence[Candidate],
    ref: BlockRef,
    *,
    first_page: int,
    page_count: int,
    into: memoryview,
    page_size: int,
    kind: ChecksumKind,
    checksums: bytes | None,
    deadline_s: float,
    hedge_after_s: float,
    report: Callable[[int, ReplicaError], None],
) -> bytes:
    """As fetch_pages, from whichever replicas have good pages, in the order of `candidates`.

    An error makes the next one be asked at once, and is reported with the candidate's index; so does an answer later
    than `hedge_after_s`, without a report: the first verified one wins, and the others are cancelled. Each attempt has
    `deadline_s`. Raises AllReplicasFailed when some page came good from nobody.
    """
    attempt: _Attempt | None = None
    if candidates:
        # Nearly every read ends here, in the caller's task: a task of its own, a group and a wait for either would
        # more than double what a call costs.
        attempt = _Attempt(0, first_page, first_page + page_count, into, None, checksums)
        try:
            peer = attempt.peer = candidates[0]()
            if isinstance(peer, Peer) and peer.may_start:
                request = _request(ref, first_page, page_count, into, page_size, checksums)
                pending = attempt.pending = peer.start(request, deadline_s=deadline_s, into=into)
                if len(candidates) == 1 or await pending.is_answered_within(hedge_after_s):
                    answer = await pending.result()
                    return _verify(answer, ref, peer, request, into, page_size, kind, checksums)
        except MendfsError as error:
            attempt.error = error
    fetch = _Fetch(
        candidates,
        ref,
        first_page=first_page,
        page_count=page_count,
        into=into,
        page_size=page_size,
        kind=kind,
        checksums=checksums,
        deadline_s=deadline_s,
    )
    return await _fetch_rest(fetch, attempt, hedge_after_s, report)


Report = Callable[[int, ReplicaError], None]


async def _fetch_rest(fetch: _Fetch, first: _Attempt | None, hedge_after_s: float, report: Report) -> bytes:
    """What is to be done when the first replica was late (its attempt goes on) or wrong (it has an error)."""
    errors: list[str] = []
    try:
        if first is not None:
            fetch.adopt(first)
            if first.error is not None:
                _take(fetch, first, errors, report)
                first = None
        if fetch.left or fetch.running:
            async with asyncio.TaskGroup() as group:
                await _race(fetch, group, first, hedge_after_s, errors, report)
        if fetch.missing():
            reasons = "; ".join(errors) or "there is none"
            raise AllReplicasFailed(f"block {fetch.ref.block:#x}: no replica returned good bytes ({reasons})")
        fetch.collect()
    finally:
        fetch.release()
    assert fetch.checksums is not None, "a page is good only by its checksum"
    return fetch.checksums


async def _race(
    fetch: _Fetch,
    group: asyncio.TaskGroup,
    late: _Attempt | None,
    hedge_after_s: float,
    errors: list[str],
    report: Report,
) -> None:
    """Ask replicas until nothing is missing or nobody is left; `late` is being asked already."""
    attempt = late
    # One that did not even begin to be asked is given its time; one that did has had it.
    may_add = late is None or late.pending is not None
    if attempt is not None:
        attempt.task = group.create_task(fetch.run(attempt))
    while fetch.missing() and (fetch.left or fetch.running):
        if fetch.left and may_add:
            attempt = fetch.begin()
            attempt.task = group.create_task(fetch.run(attempt))
        may_add = True
        tasks = [attempt.task for attempt in fetch.running if attempt.task is not None]
        timeout_s = hedge_after_s if fetch.left else None
        await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        for attempt in [attempt for attempt in fetch.running if attempt.task is not None and attempt.task.done()]:
            _take(fetch, attempt, errors, report)
    for attempt in fetch.running:
        if attempt.task is not None:
            attempt.task.cancel()


def _take(fetch: _Fetch, attempt: _Attempt, errors: list[str], report: Report) -> None:
    """An attempt has ended: take what it gave, say what it did not."""
    fetch.end(attempt)
    error = attempt.error
    if error is not None:
        errors.append(str(error))
        report(attempt.index, error if isinstance(error, ReplicaError) else ReplicaError(str(error)))
    if not attempt.good and attempt.buffer is not None:
        POOL.give(attempt.buffer)
