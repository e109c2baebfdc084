"""The owner of a volume's background work: every task has it as its owner and ends with it."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import structlog

from mendfs.errors import MendfsError

log = structlog.get_logger("mendfs.client")


class Tasks:
    """Background tasks of one volume. An exception that escapes one is logged: it is a mistake of ours."""

    def __init__(self) -> None:
        self._running: dict[asyncio.Task[Any], None] = {}

    def spawn(self, work: Coroutine[Any, Any, Any], *, is_awaited: bool = False) -> asyncio.Task[Any]:
        """Run `work` until it ends or the volume is closed; with `is_awaited` its errors are for whoever waits."""
        task = asyncio.get_running_loop().create_task(work, name=getattr(work, "__qualname__", None))
        self._running[task] = None
        task.add_done_callback(self._forget if is_awaited else self._ended)
        return task

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self._running.pop(task, None)
        if not task.cancelled():
            task.exception()  # marks it as seen: whoever waits for the task gets it

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.pop(task, None)
        if task.cancelled() or (error := task.exception()) is None:
            return
        if isinstance(error, MendfsError):
            log.warning("background work gave up", work=task.get_name(), error=str(error))
        else:
            log.error("a background task failed", work=task.get_name(), exc_info=error)

    async def close(self) -> None:
        """Cancel what runs and wait for its end."""
        while self._running:
            running = list(self._running)
            for task in running:
                task.cancel()
            await asyncio.wait(running)


class Changes:
    """Something others wait for to change. `wait` returns at the next `notify`, or after the timeout."""

    def __init__(self) -> None:
        # In the order of their coming: a set of futures has the order of their addresses, another one in each run.
        self._waiters: dict[asyncio.Future[None], None] = {}

    def notify(self) -> None:
        """Wake everyone who waits now."""
        waiters, self._waiters = self._waiters, {}
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def future(self) -> "asyncio.Future[None]":
        """Done at the next `notify`. Hand it to `forget` when nobody waits for it any more."""
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        return waiter

    def forget(self, waiter: "asyncio.Future[None]") -> None:
        """Nobody waits for `waiter` any more."""
        self._waiters.pop(waiter, None)

    async def wait(self, timeout_s: float | None) -> None:
        """Until the next `notify`, or `timeout_s`."""
        waiter = self.future()
        try:
            await asyncio.wait([waiter], timeout=timeout_s)
        finally:
            self.forget(waiter)
