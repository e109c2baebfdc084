"""Inode and block ids out of the ranges that the meta server grants (design section 5, Numbers).

Ids are used strictly in order and the lowest one in flight is known: what is unreferenced below it is garbage that
reconcile may delete. So an id counts as in flight from `take` until `settle`, which is called when the commit that
names it was answered, or when nothing will ever name it and no put of it is under way.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import Awaitable, Callable

from mendfs.client.tasks import Tasks
from mendfs.errors import CommitRefused
from mendfs.wire.messages.session import IdsGranted

FETCH_BELOW = 256
"""Ids left when the next range is asked for: at 1,000 files a second, a quarter of a second ahead."""
REFUSED_PAUSE_S = 0.2


class IdSupply:
    """The ids of one kind. `ask(lowest_in_flight)` is one GrantIds request."""

    def __init__(self, ask: Callable[[int], Awaitable[IdsGranted]], tasks: Tasks) -> None:
        self._ask = ask
        self._tasks = tasks
        self._ranges: deque[range] = deque()
        self._left = 0
        self._next_after_last = 0
        self._in_flight: set[int] = set()
        self._order: list[int] = []
        self._asking: asyncio.Task[None] | None = None
        self._life = 0

    @property
    def lowest_in_flight(self) -> int:
        """The lowest id that may still come to be referred to."""
        while self._order and self._order[0] not in self._in_flight:
            heapq.heappop(self._order)
        if self._order:
            return self._order[0]
        return self._ranges[0].start if self._ranges else self._next_after_last

    async def take(self) -> int:
        """The next id."""
        while not self._ranges:
            await asyncio.shield(self._fetch())  # shared with other takers: one of them giving up must not end it
        number = self._use()
        if self._left < FETCH_BELOW:
            self._fetch()
        return number

    def fetch_ahead(self) -> None:
        """Ask for the first range before anybody needs it."""
        if not self._ranges:
            self._fetch()

    def _use(self) -> int:
        first = self._ranges[0]
        number = first.start
        if len(first) == 1:
            self._ranges.popleft()
        else:
            self._ranges[0] = first[1:]
        self._left -= 1
        self._next_after_last = number + 1
        self._in_flight.add(number)
        heapq.heappush(self._order, number)
        return number

    def settle(self, number: int) -> None:
        """`number` is referred to now, or never will be."""
        self._in_flight.discard(number)

    def forget_all(self) -> None:
        """The session is over: its ranges went with it."""
        self._ranges.clear()
        self._left = 0
        self._in_flight.clear()
        self._order.clear()
        self._life += 1

    def _fetch(self) -> "asyncio.Task[None]":
        if self._asking is None or self._asking.done():
            self._asking = self._tasks.spawn(self._fetch_range(), is_awaited=True)
        return self._asking

    async def _fetch_range(self) -> None:
        """Ask until a range comes. Errors are for those who wait for an id; the next taker asks again."""
        while True:
            life = self._life
            try:
                granted = await self._ask(self.lowest_in_flight)
                if life == self._life:
                    break
            except CommitRefused:
                # Too many ranges held: an old id is still in flight. They are given back as it settles.
                await asyncio.sleep(REFUSED_PAUSE_S)
        self._ranges.append(range(granted.first, granted.first + granted.count))
        self._left += granted.count
