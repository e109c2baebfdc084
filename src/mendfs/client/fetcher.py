"""Verified pages of a block from whichever replica is best: replica choice, failover, hedging, read quorum, reports."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Sequence
from functools import partial

import structlog

from mendfs.blocks import page_count
from mendfs.client.cache import ChecksumCache
from mendfs.client.shared import Shared
from mendfs.errors import MendfsError, ReplicaError, Unreachable
from mendfs.model import BlockId, Entry, ServerNumber
from mendfs.transfer import BlockRef, fetch_any, fetch_pages
from mendfs.wire.messages.session import ReportReplica
from mendfs.wire.peer import Peer

log = structlog.get_logger("mendfs.client")

HEDGE_MIN_S = 0.02
"""Another replica is never asked earlier: below it, a second request costs more than it saves."""
HEDGE_FACTOR = 4.0
"""Times the running mean: only the slowest few per cent of requests are sent twice."""
HEDGE_UNKNOWN_S = 0.1
"""Before a server has answered anything: it may be far away, and then every first read would be sent thrice."""
HEDGE_MAX_S = 1.0
BAD_FOR_S = 30.0
"""How long a replica counts as bad after it failed: mending takes seconds."""
BAD_MAX = 10_000


class Fetcher:
    """Reads of blocks by one client."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._checksums = ChecksumCache()
        self._bad: OrderedDict[tuple[ServerNumber, BlockId], float] = OrderedDict()
        """Replicas that were missing or wrong, and when: asked last, and told of once, until they may be mended."""

    async def fetch(self, ref: BlockRef, first_page: int, count: int, into: memoryview) -> None:
        """Fill `into` with `count` pages from `first_page` on, verified. Raises AllReplicasFailed."""
        order = self._order(ref)
        others = self._shared.volume.read_quorum - 1
        if others <= 0:
            await self._fetch_any(order, ref, first_page, count, into)
            return
        # The first good copy is what is returned; the others are read so that a bad one is found (row A4).
        compared = [self._compare(number, ref, first_page, count, len(into)) for number in order[1 : 1 + others]]
        await asyncio.gather(self._fetch_any(order, ref, first_page, count, into), *compared)

    def _order(self, ref: BlockRef) -> list[ServerNumber]:
        """The servers to ask, in this order: members that answer, at random; moving ones; suspects; known bad ones."""
        rows = self._shared.session.table.rows
        entries = list(rows[ref.partition])
        self._shared.world.rng.shuffle(entries)
        servers = self._shared.servers

        def rank(entry: Entry) -> int:
            if (entry.server, ref.block) in self._bad:
                return 3
            if not servers.is_up(entry.server):
                return 2
            return 0 if entry.state == "member" else 1

        self._forget_old()
        ranked = sorted(entries, key=rank)
        return [entry.server for entry in ranked]

    async def _fetch_any(
        self, order: Sequence[ServerNumber], ref: BlockRef, first_page: int, count: int, into: memoryview
    ) -> None:
        name = (ref.partition, ref.block)
        candidates = [partial(self._connection, number) for number in order]
        failed = False

        def report(index: int, error: ReplicaError) -> None:
            nonlocal failed
            failed = True
            self._report(order[index], ref.block, error)

        began_s = asyncio.get_running_loop().time()
        first = self._shared.servers.find(order[0])
        expected_s = first.expected_s(len(into)) if first is not None else 0.0
        checksums = await fetch_any(
            candidates,
            ref,
            first_page=first_page,
            page_count=count,
            into=into,
            page_size=self._shared.volume.page_size,
            kind=self._shared.volume.checksum,
            checksums=self._checksums.get(name),
            deadline_s=self._shared.options.get_timeout_s,
            hedge_after_s=hedge_after_s(expected_s),
            report=report,
        )
        self._checksums.add(name, checksums)
        if first is not None and not failed:
            first.took(asyncio.get_running_loop().time() - began_s, len(into))

    async def _compare(self, number: ServerNumber, ref: BlockRef, first_page: int, count: int, length: int) -> None:
        """Read one more replica, only to find out whether it is good."""
        memory = self._shared.pool.take(length)
        try:
            await self._fetch_from(number, ref, first_page, count, memoryview(memory)[:length])
        except MendfsError as error:
            self._report(number, ref.block, error)
        finally:
            self._shared.pool.give(memory)

    async def _fetch_from(
        self, number: ServerNumber, ref: BlockRef, first_page: int, count: int, into: memoryview
    ) -> None:
        await fetch_pages(
            await self._peer(number),
            ref,
            first_page=first_page,
            page_count=count,
            into=into,
            page_size=self._shared.volume.page_size,
            kind=self._shared.volume.checksum,
            checksums=None,
            deadline_s=self._shared.options.get_timeout_s,
        )

    async def verify(self, number: ServerNumber, ref: BlockRef) -> None:
        """Read the whole replica on one server. Raises what is wrong with it."""
        memory = self._shared.pool.take(ref.length)
        pages = page_count(ref.length, self._shared.volume.page_size)
        try:
            await self._fetch_from(number, ref, 0, pages, memoryview(memory)[: ref.length])
        finally:
            self._shared.pool.give(memory)

    def _connection(self, number: ServerNumber) -> Peer | Awaitable[Peer]:
        """The server's connection, at once if there is one: then fetch_any needs no task."""
        server = self._shared.servers.get(number)
        return server.connected or server.peer()

    def _forget_old(self) -> None:
        oldest_s = asyncio.get_running_loop().time() - BAD_FOR_S
        while self._bad and (len(self._bad) > BAD_MAX or next(iter(self._bad.values())) < oldest_s):
            self._bad.popitem(last=False)

    async def _peer(self, number: ServerNumber) -> Peer:
        return await self._shared.servers.get(number).peer()

    def _report(self, number: ServerNumber, block: BlockId, error: MendfsError) -> None:
        server = self._shared.servers.find(number)
        if isinstance(error, Unreachable):
            # The meta server sees that by itself; what it needs to hear of are replicas that are not right.
            if server is not None:
                server.failed(error)
            return
        if (number, block) in self._bad:
            return
        self._bad[number, block] = asyncio.get_running_loop().time()
        log.warning("replica not usable, reading another", server=number, block=block, reason=str(error))
        self._shared.session.push(ReportReplica(number, block, f"{error.code}: {error}"))


def hedge_after_s(expected_s: float) -> float:
    """How long to wait for a server whose answers take `expected_s` (0: nobody knows) before another one is asked."""
    if expected_s == 0:
        return HEDGE_UNKNOWN_S
    return min(max(HEDGE_MIN_S, HEDGE_FACTOR * expected_s), HEDGE_MAX_S)
