"""The other side's requests on a connection that are being handled: their tasks, and how much they hold."""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import structlog

from mendfs.errors import BadFrame, BadMessage, MendfsError, from_code
from mendfs.model import MiB
from mendfs.wire.deadlines import NEVER, DeadlineTimer
from mendfs.wire.frame import PUSH, Header
from mendfs.wire.messages import Message
from mendfs.wire.messages.session import Failure
from mendfs.wire.outbox import Payload
from mendfs.wire.payload import Received

log = structlog.get_logger()

REQUESTS_MAX = 256
"""As many as a caller of ours has in flight at most: one more, and reading stops until one has ended."""
UNPROCESSED_BYTES_MAX = 64 * MiB
"""Messages and payloads being handled, above which reading stops: more blocks than a disk keeps busy with."""
FAILURE_TEXT_LENGTH_MAX = 2000


class Reply(NamedTuple):
    """A handler's answer with a payload."""

    message: Message
    payload: Payload = ()
    sent: Callable[[], None] | None = None
    """Called once the payload's memory may be used again: it has been sent, or never will be."""


Result = Reply | Message | None
"""None is right for a push only."""


class Request:
    """One of them."""

    __slots__ = ("deadline", "received", "size", "task")

    def __init__(self, deadline: float, size: int, received: Received | None) -> None:
        self.deadline = deadline
        self.size = size
        self.received = received
        self.task: asyncio.Task[None] | None = None


def failure_of(error: MendfsError) -> Failure:
    """The message that `errors.from_code` makes the error of again."""
    return Failure(error.code, str(error)[:FAILURE_TEXT_LENGTH_MAX], error.errno)


def error_of(failure: Failure) -> MendfsError:
    """The error that a failure stands for; never anything but a MendfsError, whatever the other side wrote into it."""
    try:
        return from_code(failure.code, failure.text, failure.errno)
    except ValueError:
        return BadMessage(f"a failure that makes no sense: {failure.code} {failure.text!r}")


class Requests:
    """All of them. `answer` is told the request id and the result of each that ended by itself, `ended` of each one."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        handle: Callable[[Message, Received | None], Awaitable[Result]],
        answer: Callable[[int, Reply | Message], None],
        ended: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._handle = handle
        self._answer = answer
        self._ended = ended
        self._requests: dict[int, Request] = {}
        self._last_push = 0
        self._bytes = 0
        self._timer = DeadlineTimer(loop, self._sweep)

    def __len__(self) -> int:
        """Requests being handled."""
        return len(self._requests)

    @property
    def has_room(self) -> bool:
        """Whether another one may begin."""
        return len(self._requests) <= REQUESTS_MAX and self._bytes <= UNPROCESSED_BYTES_MAX

    def begin(self, header: Header, message: Message, received: Received | None) -> None:
        """Start a task for a request or push. Raises BadFrame if one with its id is being handled."""
        key = header.request_id
        if header.kind == PUSH:
            # Pushes have no ids: number them downwards, out of the way of those that have.
            self._last_push -= 1
            key = self._last_push
        elif key in self._requests:
            raise BadFrame(f"request id {key} is in use")
        deadline = NEVER
        if header.deadline_ms:
            deadline = self._loop.time() + header.deadline_ms / 1000
            if deadline < self._timer.at:
                self._timer.include(deadline)
        size = header.message_bytes + header.payload_bytes
        request = self._requests[key] = Request(deadline, size, received)
        self._bytes += size
        request.task = self._loop.create_task(self._run(key, request, message))

    def cancel(self, request_id: int) -> None:
        """The caller waits no more."""
        request = self._requests.get(request_id)
        if request is not None:
            self._stop(request_id, request)

    def cancel_all(self) -> None:
        """The connection has ended."""
        self._timer.stop()
        for key, request in list(self._requests.items()):
            self._stop(key, request)

    async def wait(self) -> None:
        """Wait until every request has ended, but for the one that asks."""
        tasks = {request.task for request in self._requests.values() if request.task is not None}
        tasks = {task for task in tasks if task is not asyncio.current_task()}
        if tasks:
            await asyncio.wait(tasks)

    async def _run(self, key: int, request: Request, message: Message) -> None:
        result: Result
        is_clean = False
        try:
            result = await self._handle(message, request.received)
            is_clean = True
        except MendfsError as error:
            result = failure_of(error)
        except asyncio.CancelledError:
            self._end(key, request, is_clean=False)
            raise
        except Exception as error:
            # The one place where our own mistakes are caught: the others' requests and this connection go on.
            log.exception("a request failed in a way nobody thought of", message=type(message).__name__)
            result = Failure(
                MendfsError.code, f"{type(message).__name__}: {type(error).__name__}: {error}"[:200], errno.EIO
            )
        self._end(key, request, is_clean=is_clean)
        if key >= 0 and result is not None:
            self._answer(key, result)

    def _stop(self, key: int, request: Request) -> None:
        task = request.task
        if task is not None:
            task.cancel()
            # A task that is cancelled before its first step never runs any of _run.
            task.add_done_callback(lambda _: self._end(key, request, is_clean=False))

    def _end(self, key: int, request: Request, *, is_clean: bool) -> None:
        # The id may be in use again by the time a callback of _stop comes.
        if self._requests.get(key) is not request:
            return
        del self._requests[key]
        self._bytes -= request.size
        if request.received is not None:
            # A handler that was torn away from a thread cannot know whether the thread still reads the buffer.
            if is_clean:
                request.received.release()
            else:
                request.received.abandon()
        self._ended()

    def _sweep(self, now: float) -> float:
        earliest = NEVER
        for key, request in list(self._requests.items()):
            if request.deadline > now:
                earliest = min(earliest, request.deadline)
            else:
                request.deadline = NEVER
                self._stop(key, request)
        return earliest
