"""An event loop on virtual time, and the processes that run on it.

Nothing waits: when nothing is ready the clock jumps to the next timer. The order of everything follows from the order
of calls, so one seed gives one run. Every callback belongs to the process whose context scheduled it: callbacks of a
killed process are never run again, not even its `finally` blocks, as after kill -9; those of a paused one wait.
"""

import asyncio
import contextvars
import heapq
import sys
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec

Result = TypeVar("Result")

STEPS_PER_INSTANT_MAX = 1_000_000
"""Callbacks without the clock moving: more are a loop of ours that never waits, which real time would hide."""
START_S = 1000.0
"""Where the clock begins: not 0, which code might take for "never"."""
TASKS_FORGOTTEN_FROM = 64
"""Tasks of a process beyond which those that are done are looked for: few enough to cost no memory."""


class Stuck(Exception):
    """The run cannot go on: nothing is left to wait for, or the clock does not move any more."""


class Handle(msgspec.Struct, eq=False):
    """A callback that is to run. In place of asyncio's own, which takes three times as long to make and to run."""

    callback: Callable[..., object] | None
    """None: cancelled."""
    args: tuple[Any, ...]
    context: contextvars.Context
    process: "Process | None"
    """Whose it is."""

    def cancel(self) -> None:
        """Never run it. The loop finds out when it gets there."""
        self.callback = None
        self.args = ()

    def cancelled(self) -> bool:
        """Whether it was cancelled."""
        return self.callback is None


class Tasks:
    """Tasks that must not be collected before they are done: that would run their `finally` blocks."""

    def __init__(self) -> None:
        self._tasks: list[asyncio.Task[Any]] = []
        self._most = TASKS_FORGOTTEN_FROM

    def add(self, task: asyncio.Task[Any]) -> None:
        """Keep it until it is done."""
        self._tasks.append(task)
        if len(self._tasks) > self._most:
            # Now and then, and not by a callback of each task's end: that was one of six callbacks of a whole run.
            self.forget_done()
            self._most = max(TASKS_FORGOTTEN_FROM, 2 * len(self._tasks))

    def forget_done(self) -> None:
        """Keep only those that still run. One that failed without anybody having looked is reported by that."""
        self._tasks = [task for task in self._tasks if not task.done()]

    def end_all(self) -> None:
        """Close what still runs."""
        for task in self._tasks:
            _end(task.get_coro())


class Process:
    """Something that can be killed, paused and resumed by itself. Dead ones stay dead: a restart makes another."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_alive = True
        self.is_paused = False
        self.parked: list[Handle] = []
        """Callbacks that were due while it was paused, in order."""
        self.tasks = Tasks()
        """Kept even when it is dead."""
        self.context = contextvars.Context()
        self.context.run(PROCESS.set, self)

    def __repr__(self) -> str:
        return f"<process {self.name}>"


PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)
"""The process that runs: None for the simulation itself."""

_Timer = tuple[float, int, Handle]


class _Stopped(Exception):
    """Ends `run_forever` from within a callback of its own, so that no step has to ask whether it is the last one."""


class SimTask(asyncio.Task[Result]):
    """A task whose place in a set follows from when it was made, not from its address, which is another in each run."""

    def __new__(cls, coro: Coroutine[Any, Any, Result], *, loop: "SimLoop", **_: Any) -> "SimTask[Result]":
        """Numbered before anybody asks for its hash, which its making does."""
        task = super().__new__(cls)
        loop.things_made += 1
        task._number = loop.things_made
        return task

    _number: int

    def __hash__(self) -> int:
        return self._number


class SimFuture(asyncio.Future[Result]):
    """A future, with the same."""

    def __new__(cls, *, loop: "SimLoop") -> "SimFuture[Result]":
        """See `SimTask`."""
        future = super().__new__(cls)
        loop.things_made += 1
        future._number = loop.things_made
        return future

    _number: int

    def __hash__(self) -> int:
        return self._number


class SimLoop(asyncio.AbstractEventLoop):
    """What asyncio needs, without a system below it."""

    def __init__(self) -> None:
        self._now_s = START_S
        self._ready: deque[Handle] = deque()
        self._timers: list[_Timer] = []
        self._last_timer = 0
        self._is_running = False
        self._is_closed = False
        self._loose = Tasks()
        self._processes: dict[Process, None] = {}
        self.steps = 0
        """Callbacks run so far."""
        self.things_made = 0
        """Tasks and futures so far."""
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
    ) -> Handle:
        """Run `callback` after what is ready now."""
        if context is None:
            context = contextvars.copy_context()
        handle = Handle(callback, args, context, context.get(PROCESS))
        if not self._is_closed:
            self._ready.append(handle)
        return handle

    def call_soon_threadsafe(  # type: ignore[override] # as above
        self, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        """There are no threads here."""
        return self.call_soon(callback, *args, context=context)

    def call_later(  # type: ignore[override] # as above
        self, delay: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        """Run `callback` in `delay` seconds."""
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    def call_at(  # type: ignore[override] # as above
        self, when: float, callback: Callable[..., object], *args: Any, context: contextvars.Context | None = None
    ) -> Handle:
        """Run `callback` at `when`; those of one moment in the order in which they were asked for."""
        if context is None:
            context = contextvars.copy_context()
        handle = Handle(callback, args, context, context.get(PROCESS))
        if not self._is_closed:
            self._last_timer += 1
            heapq.heappush(self._timers, (when, self._last_timer, handle))
        return handle

    def create_future(self) -> "asyncio.Future[Any]":
        """A future of this loop."""
        return SimFuture(loop=self)

    def create_task(  # type: ignore[override] # typeshed's signature differs between versions of Python
        self,
        coro: Coroutine[Any, Any, Result],
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> "asyncio.Task[Result]":
        """A task of the process in whose context it is made."""
        task = SimTask(coro, loop=self, name=name, context=context)
        process = PROCESS.get() if context is None else context.get(PROCESS)
        if process is None:
            self._loose.add(task)
        else:
            self._processes[process] = None
            process.tasks.add(task)
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
        self._ready.extend(parked)

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
        self._is_running = True
        try:
            self._run()
        except _Stopped:
            pass
        finally:
            self._is_running = False
            asyncio._set_running_loop(before)

    def _run(self) -> None:
        """Everything that happens in a run happens in here: written out, where another loop would call itself."""
        ready = self._ready
        steps_at_once = 0
        while True:
            if not ready and self._advance():
                steps_at_once = 0
            while ready:
                handle = ready.popleft()
                callback = handle.callback
                if callback is None:
                    continue
                process = handle.process
                if process is not None:
                    if not process.is_alive:
                        continue
                    if process.is_paused:
                        process.parked.append(handle)
                        continue
                self.steps += 1
                steps_at_once += 1
                if steps_at_once > STEPS_PER_INSTANT_MAX:
                    raise Stuck(f"{steps_at_once} callbacks at {self._now_s:.6f} s: something never waits")
                try:
                    handle.context.run(callback, *handle.args)
                except (_Stopped, SystemExit, KeyboardInterrupt):
                    raise
                except BaseException as error:
                    self.call_exception_handler({"message": f"Exception in callback {callback!r}", "exception": error})

    def _advance(self) -> bool:
        """Go to the next timer, and make ready what is due then. Whether the clock has moved."""
        timers = self._timers
        while timers:
            handle = timers[0][2]
            if handle.callback is not None and (handle.process is None or handle.process.is_alive):
                break
            heapq.heappop(timers)
        else:
            raise Stuck(f"nothing is left to wait for at {self._now_s:.6f} s")
        has_moved = timers[0][0] > self._now_s
        if has_moved:
            self._now_s = timers[0][0]
        while timers and timers[0][0] <= self._now_s:
            self._ready.append(heapq.heappop(timers)[2])
        return has_moved

    def stop(self) -> None:
        """End `run_forever` after what is ready now."""
        self.call_soon(_stop, context=contextvars.Context())

    def is_running(self) -> bool:
        """Whether it runs."""
        return self._is_running

    def is_closed(self) -> bool:
        """Whether it was closed."""
        return self._is_closed

    def close(self) -> None:
        """Nothing runs any more; what is left is ended where it stands, and its cleaning up changes nothing."""
        everything = [self._loose, *(process.tasks for process in self._processes)]
        for tasks in everything:
            tasks.forget_done()
        self._is_closed = True
        self._ready.clear()
        self._timers.clear()
        before, told = asyncio._get_running_loop(), sys.unraisablehook
        asyncio._set_running_loop(self)
        # What is ended in the middle may protest, and what it waited for too: nobody is there to be told.
        sys.unraisablehook = lambda _: None
        try:
            for tasks in everything:
                tasks.end_all()
        finally:
            sys.unraisablehook = told
            asyncio._set_running_loop(before)

    get_debug = staticmethod(bool)
    """Never: it would cost more than everything else. `bool()` is False, and each future asks: a function of Python's
    own costs it less than one of ours."""

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


def _stop() -> None:
    raise _Stopped


def _end(work: Any) -> None:
    """Close a coroutine that will never go on, whatever it says to that."""
    try:
        work.close()
    except BaseException as error:
        # A `finally` that awaits, or that misses what died before it: nobody is there to be told.
        del error
