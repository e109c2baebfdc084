"""An event loop on virtual time, and the processes that run on it.

Nothing waits: when nothing is ready the clock jumps to the next timer. The order of everything follows from the order
of calls, so one seed gives one run. Every callback belongs to the process whose context scheduled it: callbacks of a
killed process are never run again, not even its `finally` blocks, as after kill -9; those of a paused one wait.
"""

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

STEPS_PER_INSTANT_MAX = 1_000_000
"""Callbacks without the clock moving: more are a loop of ours that never waits, which real time would hide."""
START_S = 1000.0
"""Where the clock begins: not 0, which code might take for "never"."""


class Stuck(Exception):
    """The run cannot go on: nothing is left to wait for, or the clock does not move any more."""


class Process:
    """Something that can be killed, paused and resumed by itself. Dead ones stay dead: a restart makes another."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_alive = True
        self.is_paused = False
        self.parked: list[asyncio.Handle] = []
        """Callbacks that were due while it was paused, in order."""
        self.tasks: set[asyncio.Task[Any]] = set()
        """Kept even when it is dead: collecting a task would run its `finally` blocks."""
        self.context = contextvars.Context()
        self.context.run(PROCESS.set, self)

    def __repr__(self) -> str:
        return f"<process {self.name}>"


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)
"""The process that runs: None for the simulation itself."""

_Entry = tuple[Process | None, asyncio.Handle]
_Timer = tuple[float, int, Process | None, asyncio.TimerHandle]


class SimLoop(asyncio.AbstractEventLoop):
    """What asyncio needs, without a system below it."""

    def __init__(self) -> None:
        self._now_s = START_S
        self._ready: deque[_Entry] = deque()
        self._timers: list[_Timer] = []
        self._last_timer = 0
        self._steps_at_once = 0
        self._is_running = False
        self._is_closed = False
        self._is_stopping = False
        self._loose: set[asyncio.Task[Any]] = set()
        self._processes: dict[Process, None] = {}
        self.steps = 0
        """Callbacks run so far."""
        self.problems: list[dict[str, Any]] = []
        """Contexts of exceptions that nobody caught: each is a mistake of ours."""

    # --- time ----------------------------------------------

    def time(self) -> float:
        """Seconds of virtual time."""
        return self._now_s

    def now_ns(self) -> int:
        """The wall clock of the simulated world: 2026 and the virtual time."""
        return 1_767_225_600_000_000_000 + int(self._now_s * 1e9)

    # --- scheduling ----------------------------------------------

    def call_soon(  # type: ignore[override] # typeshed's signature has unpacked type variables that add nothing here
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """Run `callback` after what is ready now."""
        handle = asyncio.Handle(callback, args, self, context)
        if not self._is_closed:
            self._ready.append((PROCESS.get() if context is None else context.get(PROCESS), handle))
        return handle

    def call_soon_threadsafe(  # type: ignore[override] # as above
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """There are no threads here."""
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override] # as above
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Run `callback` in `delay` seconds."""
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override] # as above
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        """Run `callback` at `when`; those of one moment in the order in which they were asked for."""
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        if not self._is_closed:
            self._last_timer += 1
            process = PROCESS.get() if context is None else context.get(PROCESS)
            heapq.heappush(self._timers, (when, self._last_timer, process, handle))
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """asyncio tells; the heap finds out when it gets there."""

    def create_future(self) -> "asyncio.Future[Any]":
        """A future of this loop."""
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override] # typeshed's signature differs between versions of Python
        self,
        coro: Coroutine[Any, Any, Result],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> "asyncio.Task[Result]":
        """A task of the process in whose context it is made."""
        task: asyncio.Task[Result] = asyncio.Task(coro, loop=self, name=name, context=context)
        process = PROCESS.get() if context is None else context.get(PROCESS)
        if process is not None:
            self._processes[process] = None
        tasks = self._loose if process is None else process.tasks
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return task

    def start(self, process: Process, work: Coroutine[Any, Any, Result]) -> "asyncio.Task[Result]":
        """Run `work` in `process`. Its end may be waited for from outside; a dead process's never comes."""
        return self.create_task(work, context=process.context.copy())

    # --- processes ----------------------------------------------

    def kill(self, process: Process) -> None:
        """Nothing of it runs any more."""
        process.is_alive = False
        process.parked.clear()

    def pause(self, process: Process) -> None:
        """Nothing of it runs until it is resumed; what becomes due meanwhile runs then."""
        process.is_paused = True

    def resume(self, process: Process) -> None:
        """Go on, with what has become due first."""
        process.is_paused = False
        parked, process.parked = process.parked, []
        self._ready.extend((process, handle) for handle in parked)

    # --- running ----------------------------------------------

    def run_until_complete(self, future: Any) -> Any:
        """Run until `future` is done. Raises Stuck if it never will be."""
        wanted: asyncio.Future[Any] = asyncio.ensure_future(future, loop=self)
        wanted.add_done_callback(lambda _: self.stop())
        self.run_forever()
        if not wanted.done():
            raise Stuck("the run ended before what it was to wait for")
        return wanted.result()

    def run_forever(self) -> None:
        """Run until `stop`."""
        assert not self._is_running and not self._is_closed
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        asyncio._set_running_loop(self)
        self._is_running, self._is_stopping = True, False
        try:
            while not self._is_stopping:
                self._run_once()
        finally:
            self._is_running = False
            asyncio._set_running_loop(before)

    def _run_once(self) -> None:
        if not self._ready:
            self._advance()
        for _ in range(len(self._ready)):
            process, handle = self._ready.popleft()
            if handle.cancelled():
                continue
            if process is not None:
                if not process.is_alive:
                    continue
                if process.is_paused:
                    process.parked.append(handle)
                    continue
            self.steps += 1
            self._steps_at_once += 1
            handle._run()
        if self._steps_at_once > STEPS_PER_INSTANT_MAX:
            raise Stuck(f"{self._steps_at_once} callbacks at {self._now_s:.6f} s: something never waits")

    def _advance(self) -> None:
        timers = self._timers
        while timers and (timers[0][3].cancelled() or (timers[0][2] is not None and not timers[0][2].is_alive)):
            heapq.heappop(timers)
        if not timers:
            raise Stuck(f"nothing is left to wait for at {self._now_s:.6f} s")
        if timers[0][0] > self._now_s:
            self._now_s = timers[0][0]
            self._steps_at_once = 0
        while timers and timers[0][0] <= self._now_s:
            _, _, process, handle = heapq.heappop(timers)
            self._ready.append((process, handle))

    def stop(self) -> None:
        """End `run_forever` after what is ready now."""
        self._is_stopping = True

    def is_running(self) -> bool:
        """Whether it runs."""
        return self._is_running

    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._is_closed

    def close(self) -> None:
        """Nothing runs any more; what is left is ended where it stands, and its cleaning up changes nothing."""
        self._is_closed = True
        self._ready.clear()
        self._timers.clear()
        before = asyncio._get_running_loop()
        asyncio._set_running_loop(self)
        try:
            for tasks in [self._loose, *(process.tasks for process in self._processes)]:
                for task in list(tasks):
                    _end(task.get_coro())
        finally:
            asyncio._set_running_loop(before)

    def get_debug(self) -> bool:
        """Never: it would cost more than everything else."""
        return False

    def set_debug(self, enabled: bool) -> None:
        """Not offered."""

    # --- the rest ----------------------------------------------

    def run_in_executor(  # type: ignore[override] # as above
        self, executor: Any, func: Callable[..., Result], *args: Any
    ) -> "asyncio.Future[Result]":
        """There are no threads: here and now."""
        future: asyncio.Future[Result] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:
            future.set_exception(error)
        return future

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """Keep it: the run has failed."""
        if not self._is_closed:
            self.problems.append(context)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        """The same."""
        self.call_exception_handler(context)

    async def shutdown_asyncgens(self) -> None:
        """Nothing to do."""

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Nothing to do."""


def _end(work: Any) -> None:
    """Close a coroutine that will never go on, whatever it says to that."""
    try:
        work.close()
    except BaseException as error:
        # A `finally` that awaits, or that misses what died before it: nobody is there to be told.
        del error
