"""Changes of a file that must not meet others: truncations, holes, appends.

Each is made under the file's lock in a task of its own, to its end. Its caller may be interrupted, or told that the
time is up, while the request is still repeated in the background; the lock stays taken until it is known what became
of it. So nothing that was acknowledged later can be undone by it, and what it has done is learnt like any answer.
"""

import asyncio
import errno
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar, cast

from mendfs.client.files import File
from mendfs.client.session import Uncertain
from mendfs.client.shared import Shared
from mendfs.errors import MendfsError, OperationError

Result = TypeVar("Result")
Answer = TypeVar("Answer")


class Caller(Generic[Result]):
    """Whoever asked for a change, as long as somebody waits for it."""

    def __init__(self) -> None:
        self.told: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self.has_begun = False
        """The task that does the change runs, and gives the lock back itself."""

    @property
    def is_gone(self) -> bool:
        """Nobody waits any more: interrupted, or told of an error."""
        return self.told.done()

    @property
    def is_refused(self) -> bool:
        """Told of an error: what was not begun by now must not be made."""
        return self.told.done() and not self.told.cancelled()

    def check(self) -> None:
        """Raise EINTR if nobody waits any more: what was not begun is not made, and no error is told to nobody."""
        if self.is_gone:
            raise OperationError(errno.EINTR)

    def refuse(self, error: Exception) -> None:
        """Tell of an error, unless the caller has gone."""
        if not self.told.done():
            self.told.set_exception(error)

    async def certain(self, change: Awaitable[Answer]) -> Answer:
        """The answer to a change of `Session.change`, however long it takes; the caller is told when the time is up."""
        try:
            return await change
        except Uncertain as error:
            self.refuse(error)
            return cast(Answer, await error.fate)  # `Session.change` has checked what it is


async def exclusively(shared: Shared, file: File, work: Callable[[Caller[Result]], Awaitable[Result]]) -> Result:
    """The result of `work`, which is done under the file's lock.

    Raises DeadlineExceeded when a change before it is not over within `write_timeout_s`, and what `work` raises.
    """
    # Waited for here: whoever is interrupted meanwhile has begun nothing.
    await file.take_lock(shared.options.write_timeout_s)
    caller: Caller[Result] = Caller()
    task = shared.tasks.spawn(_run(file, work, caller))

    def ended(_: "asyncio.Task[None]") -> None:
        caller.told.cancel()
        if not caller.has_begun:
            file.lock.release()  # the volume is being closed, and whoever waits for the lock must not wait for ever

    task.add_done_callback(ended)
    return await caller.told


async def _run(file: File, work: Callable[[Caller[Result]], Awaitable[Result]], caller: Caller[Result]) -> None:
    """With the file's lock held, which it gives back."""
    caller.has_begun = True
    try:
        result = await work(caller)
    except Exception as error:
        if caller.is_gone and not isinstance(error, MendfsError):
            raise  # a mistake of ours, for the task's owner to log
        caller.refuse(error)
    else:
        if not caller.is_gone:
            caller.told.set_result(result)
    finally:
        file.lock.release()
