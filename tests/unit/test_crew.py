"""A crew walks trees of any shape: everything is done once, families finish after what they hold, errors end it."""

import asyncio
import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mendfs.cli.crew import Crew, Family

Tree = list["Tree"]
TREES: st.SearchStrategy[Tree] = st.recursive(st.just([]), lambda below: st.lists(below, max_size=5), max_leaves=60)


def count(tree: Tree) -> int:
    return 1 + sum(map(count, tree))


@settings(max_examples=60)
@given(TREES, st.integers(1, 20), st.integers(0, 3))
def test_a_family_finishes_once_after_everything_below_it(tree: Tree, workers: int, pauses: int) -> None:
    order: list[tuple[int, ...]] = []

    async def run() -> None:
        crew = Crew(workers)

        async def enter(node: Tree, path: tuple[int, ...], above: Family | None) -> None:
            for _ in range(pauses):
                await asyncio.sleep(0)

            async def leave() -> None:
                await asyncio.sleep(0)
                order.append(path)

            family = crew.family(leave, above)

            async def children() -> None:
                for number, child in enumerate(node):
                    crew.add(functools.partial(enter, child, (*path, number), family), family)

            crew.add(children, family)

        crew.add(functools.partial(enter, tree, (), None))
        await crew.run()

    asyncio.run(run())
    assert len(order) == len(set(order)) == count(tree)
    place = {path: at for at, path in enumerate(order)}
    assert all(place[path] < place[path[:-1]] for path in order if path)


async def test_the_first_error_ends_all_workers() -> None:
    crew = Crew(4)
    ended = []

    async def wait() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def fail() -> None:
        await asyncio.sleep(0)
        raise ValueError("this one")

    crew.add(fail)
    for _ in range(3):
        crew.add(wait)
    with pytest.raises(ValueError, match="this one"):
        await crew.run()
    assert len(ended) == 3


async def test_no_more_jobs_run_at_a_time_than_there_are_workers() -> None:
    crew = Crew(3)
    running = most = done = 0

    async def job() -> None:
        nonlocal running, most, done
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        done += 1
        if done < 20:
            crew.add(job)

    for _ in range(10):
        crew.add(job)
    await crew.run()
    assert most == 3 and done >= 20


async def test_a_crew_without_jobs_is_done_at_once() -> None:
    async with asyncio.timeout(5):
        await Crew().run()
