"""Pages of a block from any of its replicas, verified (design sections 1.3 and 6): for readers and for reconcile.

Nothing is believed: the page checksums must match the root that the metadata keeps, and each page its checksum. Pages
that verified from one replica are kept while the others are asked for the rest, so a block is lost only when the same
page is bad everywhere.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import ClassVar

import msgspec

from mendfs.blocks import bad_pages, check_root
from mendfs.errors import AllReplicasFailed, BlockCorrupt, MendfsError, ReplicaError
from mendfs.model import BlockId, ChecksumKind, Partition
from mendfs.wire.messages.data import BlockPages, GetBlock
from mendfs.wire.peer import POOL, Peer

Candidate = Callable[[], Awaitable[Peer]]
"""A replica: gives a connection to its server, or raises a MendfsError that says why not."""


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
    assert len(into) == min((first_page + page_count) * page_size, ref.length) - first_page * page_size > 0
    request = GetBlock(ref.partition, ref.block, first_page, page_count, checksums is None)
    answer, received = await peer.call(request, deadline_s=deadline_s, into=into)
    where = f"block {ref.block:#x} from {peer.remote_address}"
    if not isinstance(answer, BlockPages) or answer.length != ref.length:
        raise BlockCorrupt(f"{where}: the answer is of another block or of none")
    if received is None or len(received.view) != len(into):
        raise BlockCorrupt(f"{where}: not the pages that were asked for")
    if checksums is None:
        check_root(answer.checksums, ref.root, length=ref.length, page_size=page_size, kind=kind)
        checksums = answer.checksums
    failed = bad_pages(into, checksums, first_page=first_page, page_size=page_size, kind=kind)
    if failed:
        error = PagesCorrupt(f"{where}: {len(failed)} of {page_count} pages failed, the first is page {failed[0]}")
        error.pages, error.checksums = tuple(failed), checksums
        raise error
    return checksums


class _Attempt:
    """One replica being asked: for the pages `first` to `end` (excluded), into memory of its own or the caller's."""

    __slots__ = ("buffer", "checksums", "end", "error", "first", "good", "index", "task", "view")

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
        self.running: set[_Attempt] = set()
        self.left = deque(range(len(candidates)))
        self.without_checksums: list[int] = []
        """Replicas whose checksums were bad: with those of another one their pages may yet turn out good."""

    def missing(self) -> frozenset[int]:
        """Pages nobody has given yet."""
        return self.wanted.difference(self.in_place, *(attempt.good for attempt in self.beside))

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
        self.running.add(attempt)
        return attempt

    async def run(self, attempt: _Attempt) -> None:
        """Ask the replica; what came of it is written into the attempt."""
        asked = frozenset(range(attempt.first, attempt.end))
        try:
            self.checksums = await fetch_pages(
                await self.candidates[attempt.index](),
                self.ref,
                first_page=attempt.first,
                page_count=attempt.end - attempt.first,
                into=attempt.view,
                page_size=self.page_size,
                kind=self.kind,
                checksums=attempt.checksums,
                deadline_s=self.deadline_s,
            )
            attempt.good = asked
        except PagesCorrupt as error:
            self.checksums = error.checksums
            attempt.error, attempt.good = error, asked.difference(error.pages)
        except MendfsError as error:
            attempt.error = error

    def end(self, attempt: _Attempt) -> None:
        """Take what an ended attempt gave."""
        self.running.discard(attempt)
        if attempt.good and attempt.buffer is None:
            self.in_place |= attempt.good
        elif attempt.good:
            self.beside.append(attempt)
        elif isinstance(attempt.error, BlockCorrupt) and attempt.checksums is None:
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
    try:
        async with asyncio.TaskGroup() as group:
            errors = await _race(fetch, group, hedge_after_s, report)
        if fetch.missing():
            reasons = "; ".join(errors) or "there is none"
            raise AllReplicasFailed(f"block {ref.block:#x}: no replica returned good bytes ({reasons})")
        fetch.collect()
    finally:
        fetch.release()
    assert fetch.checksums is not None, "a page is good only by its checksum"
    return fetch.checksums


async def _race(
    fetch: _Fetch, group: asyncio.TaskGroup, hedge_after_s: float, report: Callable[[int, ReplicaError], None]
) -> list[str]:
    """Ask replicas until nothing is missing or nobody is left; returns what went wrong on the way."""
    errors = []
    while fetch.missing() and (fetch.left or fetch.running):
        if fetch.left:
            attempt = fetch.begin()
            attempt.task = group.create_task(fetch.run(attempt))
        ended = await _first_ended(fetch.running, hedge_after_s if fetch.left else None)
        for attempt in ended:
            fetch.end(attempt)
            if attempt.error is not None:
                error = attempt.error
                errors.append(str(error))
                report(attempt.index, error if isinstance(error, ReplicaError) else ReplicaError(str(error)))
            if not attempt.good and attempt.buffer is not None:
                POOL.give(attempt.buffer)
    for attempt in fetch.running:
        if attempt.task is not None:
            attempt.task.cancel()
    return errors


async def _first_ended(running: set[_Attempt], timeout_s: float | None) -> list[_Attempt]:
    """Those that have ended once one has, or none after `timeout_s`."""
    tasks = [attempt.task for attempt in running if attempt.task is not None]
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    return [attempt for attempt in running if attempt.task is not None and attempt.task.done()]
