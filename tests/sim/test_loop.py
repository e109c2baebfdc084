"""Virtual time, and processes that are killed and paused."""

import asyncio
import gc
import time
from collections.abc import Coroutine
from typing import Any

import pytest

from mendfs.sim.loop import START_S, TASKS_FORGOTTEN_FROM, Process, SimLoop, Stuck


def run(work: Coroutine[Any, Any, Any], loop: SimLoop) -> Any:
    return loop.run_until_complete(loop.create_task(work))


@pytest.fixture
def loop() -> SimLoop:
    return SimLoop()  # type: ignore[abstract] # what nobody calls is not there


def test_an_hour_passes_in_no_time(loop: SimLoop) -> None:
    begun_s = time.monotonic()

    async def wait() -> float:
        await asyncio.sleep(3600)
        return asyncio.get_running_loop().time()

    assert run(wait(), loop) == START_S + 3600
    assert time.monotonic() - begun_s < 5


def test_timers_of_one_moment_fire_in_the_order_of_their_making(loop: SimLoop) -> None:
    order: list[int] = []

    async def main() -> None:
        for number in range(10):
            asyncio.get_running_loop().call_later(1, order.append, number)
        await asyncio.sleep(2)

    run(main(), loop)
    assert order == list(range(10))


def test_nothing_of_a_killed_process_runs_again_not_even_its_cleaning_up(loop: SimLoop) -> None:
    process = Process("victim")
    happened: list[str] = []

    async def victim() -> None:
        try:
            happened.append("began")
            await asyncio.sleep(1)
            happened.append("went on")
        finally:
            happened.append("cleaned up")

    async def main() -> None:
        loop.start(process, victim())
        await asyncio.sleep(0.5)
        loop.kill(process)
        await asyncio.sleep(10)

    run(main(), loop)
    assert happened == ["began"]


def test_what_a_process_starts_dies_with_it(loop: SimLoop) -> None:
    process = Process("parent")
    beats = 0

    async def beat() -> None:
        nonlocal beats
        while True:
            beats += 1
            await asyncio.sleep(1)

    async def parent() -> None:
        asyncio.get_running_loop().create_task(beat())
        await asyncio.sleep(100)

    async def main() -> int:
        loop.start(process, parent())
        await asyncio.sleep(3.5)
        loop.kill(process)
        before = beats
        await asyncio.sleep(10)
        return before

    assert run(main(), loop) == beats == 4


def test_a_paused_process_does_late_what_was_due(loop: SimLoop) -> None:
    process = Process("sleeper")
    at_s: list[float] = []

    async def sleeper() -> None:
        await asyncio.sleep(1)
        at_s.append(asyncio.get_running_loop().time() - START_S)

    async def main() -> None:
        loop.start(process, sleeper())
        await asyncio.sleep(0.5)
        loop.pause(process)
        await asyncio.sleep(5)
        loop.resume(process)
        await asyncio.sleep(1)

    run(main(), loop)
    assert at_s == [5.5]


def test_waiting_for_what_never_comes_is_said(loop: SimLoop) -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stuck, match="nothing is left to wait for"):
        run(main(), loop)


def test_asyncio_s_own_tools_work_on_it(loop: SimLoop) -> None:
    async def main() -> list[int]:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.sleep(2)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(asyncio.sleep(1, number)) for number in range(3)]
        return [task.result() for task in tasks]

    assert run(main(), loop) == [0, 1, 2]
    assert loop.time() == START_S + 2


def test_a_task_that_is_lost_while_it_waits_is_not_collected_and_a_failed_one_is_reported(loop: SimLoop) -> None:
    """However many others have come and gone meanwhile."""
    process = Process("busy")
    cleaned_up: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cleaned_up.append("cleaned up")

    async def fails() -> None:
        raise ValueError("nobody looks at it")

    async def nothing() -> None:
        pass

    async def main() -> None:
        loop.start(process, waits())
        loop.start(process, fails())
        for _ in range(10 * TASKS_FORGOTTEN_FROM):
            loop.start(process, nothing())
        await asyncio.sleep(1)
        gc.collect()

    run(main(), loop)
    assert not cleaned_up
    loop.close()
    assert [str(problem["exception"]) for problem in loop.problems] == ["nobody looks at it"]


def test_a_cancelled_timer_does_not_move_the_clock(loop: SimLoop) -> None:
    async def main() -> None:
        timer = asyncio.get_running_loop().call_later(5, pytest.fail, "it was cancelled")
        timer.cancel()
        assert timer.cancelled()
        await asyncio.sleep(1)

    run(main(), loop)
    assert loop.time() == START_S + 1


def test_a_loop_that_never_waits_is_found(loop: SimLoop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mendfs.sim.loop.STEPS_PER_INSTANT_MAX", 1000)

    async def main() -> None:
        while True:
            await asyncio.sleep(0)

    with pytest.raises(Stuck, match="something never waits"):
        run(main(), loop)
