"""Many jobs at a time over a tree of unknown size, with bounded memory.

A crew has a few workers and a stack of jobs: the newest job is done first, so a tree is walked depth first and what
waits is one directory's worth a level, not the whole tree. A `Family` is what belongs to one directory: its `finish`
runs once every job added for it, and every family below it, is over.
"""

import asyncio
from collections.abc import Awaitable, Callable

Job = Callable[[], Awaitable[None]]

WORKERS = 16
"""Half of a session's request slots: enough to hide the round trips, and other work of the session goes on."""


class Family:
    """Jobs that have something in common; `finish` when all are over. Made by `Crew.family`."""

    def __init__(self, finish: Job, above: "Family | None") -> None:
        self.finish = finish
        self.above = above
        self.open = 0


class Crew:
    """Workers and their stack of jobs. The first error that a job raises ends them all."""

    def __init__(self, workers: int = WORKERS) -> None:
        self._workers = workers
        self._jobs: list[tuple[Job, Family | None]] = []
        self._working = 0
        self._more = asyncio.Event()

    def add(self, job: Job, family: Family | None = None) -> None:
        """One more job."""
        if family is not None:
            family.open += 1
        self._jobs.append((job, family))
        self._more.set()

    def family(self, finish: Job, above: Family | None = None) -> Family:
        """A family without jobs yet: add one before the current job ends, or it never finishes."""
        if above is not None:
            above.open += 1
        return Family(finish, above)

    async def run(self) -> None:
        """Until there is nothing left to do. Raises what a job raised, the first of them if several did."""
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._workers):
                    group.create_task(self._work())
        except BaseExceptionGroup as errors:
            raise _first(errors) from errors

    async def _work(self) -> None:
        while True:
            while not self._jobs:
                if not self._working:
                    self._more.set()  # whoever else waits: it is over
                    return
                self._more.clear()
                await self._more.wait()
            job, family = self._jobs.pop()
            self._working += 1
            try:
                await job()
                await self._leave(family)
            finally:
                self._working -= 1
                if not self._working:
                    self._more.set()

    async def _leave(self, family: Family | None) -> None:
        while family is not None:
            family.open -= 1
            if family.open:
                return
            await family.finish()
            family = family.above


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
