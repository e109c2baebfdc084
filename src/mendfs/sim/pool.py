"""Runs many seeds on several processes, and shortens the fault plan of one that fails."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Iterable

import msgspec

from mendfs.sim.faults import Fault
from mendfs.sim.runs import Report
from mendfs.sim.worker import Order, broken

LINE_BYTES_MAX = 1 << 28
"""A report with its trace."""
SHRINK_RUNS_MAX = 60
"""Runs spent on making a plan shorter: a few minutes."""


class Pool:
    """Worker processes. `async with Pool(2) as pool: async for report in pool.run(orders): ...`."""

    def __init__(self, jobs: int) -> None:
        self._jobs = jobs
        self._workers: list[asyncio.subprocess.Process] = []
        self._idle: asyncio.Queue[asyncio.subprocess.Process] = asyncio.Queue()

    async def __aenter__(self) -> "Pool":
        environment = {**os.environ, "PYTHONHASHSEED": "0"}
        for _ in range(self._jobs):
            worker = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "mendfs.sim.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=LINE_BYTES_MAX,
                env=environment,
            )
            self._workers.append(worker)
            self._idle.put_nowait(worker)
        return self

    async def __aexit__(self, *_: object) -> None:
        for worker in self._workers:
            if worker.returncode is None:
                worker.kill()
            await worker.wait()

    async def one(self, order: Order) -> Report:
        """One run."""
        worker = await self._idle.get()
        try:
            assert worker.stdin is not None and worker.stdout is not None, "both are pipes"
            worker.stdin.write(msgspec.json.encode(order) + b"\n")
            await worker.stdin.drain()
            line = await worker.stdout.readline()
        finally:
            self._idle.put_nowait(worker)
        return msgspec.json.decode(line, type=Report) if line else broken(order, "the worker process has died")

    async def run(self, orders: Iterable[Order]) -> AsyncIterator[Report]:
        """Many, as they are ready."""
        waiting = {asyncio.ensure_future(self.one(order)) for order in orders}
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    yield each.result()
        finally:
            for each in waiting:
                each.cancel()

    async def shrink(self, order: Order, plan: list[Fault]) -> list[Fault]:
        """A shorter plan with which the seed still fails: delta debugging (Zeller, Hildebrandt 2002), bounded."""
        runs = 0
        parts = 2
        while len(plan) > 1 and runs < SHRINK_RUNS_MAX:
            size = -(-len(plan) // parts)
            candidates = [plan[:begin] + plan[begin + size :] for begin in range(0, len(plan), size)]
            orders = [msgspec.structs.replace(order, plan=tuple(candidate)) for candidate in candidates]
            runs += len(orders)
            reports = await asyncio.gather(*(self.one(each) for each in orders))
            failing = [candidate for candidate, report in zip(candidates, reports, strict=True) if report.failures]
            if failing:
                plan = min(failing, key=len)
                parts = max(2, parts - 1)
            elif parts >= len(plan):
                break
            else:
                parts = min(len(plan), 2 * parts)
        return plan
