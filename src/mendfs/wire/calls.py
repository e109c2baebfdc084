"""Our own requests on a connection whose answers have not come: where answers go, and when we stop waiting."""

import asyncio
from collections import deque
from collections.abc import Callable

from mendfs.errors import BadMessage, DeadlineExceeded, MendfsError
from mendfs.wire.deadlines import NEVER, DeadlineTimer
from mendfs.wire.messages import Message
from mendfs.wire.payload import Received
from mendfs.world.buffers import BufferPool

CALLS_MAX = 256
"""Calls in flight on one connection; further callers wait for a place. The other side stops reading beyond it."""

Answer = tuple[Message, Received | None]


class Call:
    """One of them."""

    __slots__ = ("deadline", "future", "into", "received")

    def __init__(self, future: "asyncio.Future[Answer]", deadline: float, into: memoryview | None) -> None:
        self.future = future
        self.deadline = deadline
        self.into = into
        self.received: Received | None = None
        """The answer's payload, from the moment it begins to arrive."""


class Calls:
    """All of them. `give_up` is told of calls whose deadline has passed, after they were failed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, pool: BufferPool, give_up: Callable[[int], None]) -> None:
        self._loop = loop
        self._pool = pool
        self._give_up = give_up
        self._calls: dict[int, Call] = {}
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._last_id = 0
        self._timer = DeadlineTimer(loop, self._sweep)
        self.remote = ""
        """Who does not answer, for messages."""

    def __len__(self) -> int:
        """Calls in flight."""
        return len(self._calls)

    @property
    def is_full(self) -> bool:
        """Whether a further caller has to wait."""
        return len(self._calls) >= CALLS_MAX

    async def wait_for_place(self, deadline: float) -> None:
        """Wait while there are too many. Raises DeadlineExceeded."""
        while self.is_full:
            place = self._loop.create_future()
            self._waiting.append(place)
            has_place = False
            try:
                async with asyncio.timeout_at(deadline):
                    await place
                has_place = True
            except TimeoutError as error:
                raise DeadlineExceeded(f"{self.remote} did not answer {CALLS_MAX} earlier calls in time") from error
            finally:
                if place in self._waiting:
                    self._waiting.remove(place)
                elif not has_place:
                    # Woken and cancelled at the same moment: the place is somebody else's now.
                    self._wake_next()

    def begin(self, deadline: float, into: memoryview | None) -> tuple[int, Call]:
        """A new call and its request id."""
        self._last_id = request_id = self._last_id + 1
        call = self._calls[request_id] = Call(self._loop.create_future(), deadline, into)
        if deadline < self._timer.at:
            self._timer.include(deadline)
        return request_id, call

    def place_payload(self, request_id: int, length: int) -> memoryview | None:
        """Memory for the payload of an answer; None if nobody waits for it, or it is longer than was asked for."""
        call = self._calls.get(request_id)
        if call is None:
            return None
        if call.into is None:
            call.received = Received.take(length, self._pool)
        elif length <= len(call.into):
            call.received = Received(call.into[:length])
        else:
            self.fail(request_id, BadMessage(f"a payload of {length} bytes where {len(call.into)} were asked for"))
            return None
        return call.received.view

    def answer(self, request_id: int, message: Message) -> None:
        """The answer is here, with its payload. One that nobody waits for is dropped."""
        call = self._calls.pop(request_id, None)
        if call is not None:
            if not call.future.done():
                call.future.set_result((message, call.received))
            if self._waiting:
                self._wake_next()

    def fail(self, request_id: int, error: MendfsError) -> None:
        """There will be no answer."""
        call = self._calls.pop(request_id, None)
        if call is not None:
            if not call.future.done():
                call.future.set_exception(error)
            self._wake_next()

    def forget(self, request_id: int) -> bool:
        """The caller was cancelled. False if the call had ended already."""
        known = self._calls.pop(request_id, None) is not None
        self._wake_next()
        return known

    def fail_all(self, error: Callable[[], MendfsError]) -> None:
        """The connection has ended."""
        self._timer.stop()
        for request_id in list(self._calls):
            self.fail(request_id, error())
        while self._waiting:
            self._wake_next()

    def _wake_next(self) -> None:
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return

    def _sweep(self, now: float) -> float:
        earliest = NEVER
        for request_id, call in list(self._calls.items()):
            if call.deadline > now:
                earliest = min(earliest, call.deadline)
            else:
                self.fail(request_id, DeadlineExceeded(f"{self.remote} did not answer in time"))
                self._give_up(request_id)
        return earliest
