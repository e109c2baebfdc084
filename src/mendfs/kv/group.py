"""Group commit: callers who arrive while one sync runs share the next one.

A caller is only covered by a sync that began after its call: one already under way may have passed the caller's bytes.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from mendfs.errors import MendfsError

Result = TypeVar("Result")


class GroupCommit(Generic[Result]):
    """Runs `work` for whoever waits, one run at a time. An error of `work` goes to everyone whom that run covered."""

    def __init__(self, work: Callable[[], Awaitable[Result]]) -> None:
        self._work = work
        # One future a caller: a shared one would be cancelled for all when one of them is.
        self._waiting: list[asyncio.Future[Result]] = []
        self._runner: asyncio.Task[None] | None = None

    async def wait(self) -> Result:
        """The result of the first run that begins after this call."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        if self._runner is None:
            self._runner = asyncio.create_task(self._run())
        return await future

    async def idle(self) -> None:
        """Return when no run is under way."""
        while self._runner is not None:
            await asyncio.wait({self._runner})

    async def _run(self) -> None:
        covered: list[asyncio.Future[Result]] = []
        try:
            while self._waiting:
                covered, self._waiting = self._waiting, []
                try:
                    result = await self._work()
                except MendfsError as error:
                    _fail(covered, error)
                else:
                    for future in covered:
                        if not future.done():
                            future.set_result(result)
        finally:
            self._runner = None
            # Only a mistake of ours or the end of the loop gets here with somebody still waiting: let nobody hang.
            _fail([*covered, *self._waiting], MendfsError("the sync was given up"))
            self._waiting = []


def _fail(futures: list[asyncio.Future[Result]], error: MendfsError) -> None:
    for future in futures:
        if not future.done():
            future.set_exception(type(error)(str(error)))
