"""What `mendfs simulate` does: seeds in parallel, a summary, and for a failure what is needed to see it again."""

import os
import random
import statistics
import sys
import time
from collections.abc import Sequence

import msgspec

from mendfs.errors import UsageError
from mendfs.sim.faults import PROFILES, Fault
from mendfs.sim.planted import PLANTED
from mendfs.sim.pool import Pool
from mendfs.sim.runs import Report
from mendfs.sim.worker import Order

FAILURES_SHOWN = 5
SEEDS_NAMED = 10


class Wishes(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for."""

    seeds: int = 20
    first: int | None = None
    """The first seed; None: a fresh one."""
    minutes: float = 10.0
    profile: str = "mixed"
    trace: bool = False
    jobs: int = 0
    faults: tuple[int, ...] | None = None
    """Only these of the plan that the seed draws, by number."""
    planted: str = ""
    shrink: bool = True

    def check(self) -> None:
        """Raise UsageError."""
        if self.profile not in PROFILES:
            raise UsageError(f"there is no profile {self.profile!r}: {', '.join(PROFILES)}")
        if self.planted and self.planted not in PLANTED:
            raise UsageError(f"there is no planted bug {self.planted!r}: {', '.join(PLANTED)}")
        if self.seeds < 1 or not 1.0 <= self.minutes <= 1440.0:
            raise UsageError("--seeds must be at least 1 and --minutes 1 to 1440")
        if self.faults is not None and (self.seeds != 1 or self.first is None):
            raise UsageError("--faults goes with --seed: the numbers are those of that seed's plan")


async def run_command(wishes: Wishes) -> int:
    """Run, print, and return how many seeds failed."""
    wishes.check()
    first = random.SystemRandom().randrange(1 << 31) if wishes.first is None else wishes.first
    order = Order(
        seed=first,
        profile=wishes.profile,
        seconds=60.0 * wishes.minutes,
        keep_trace=wishes.trace,
        planted=wishes.planted,
    )
    failed = 0
    reports: list[Report] = []
    progress = _Progress(wishes.seeds)
    async with Pool(wishes.jobs or os.cpu_count() or 1) as pool:
        if wishes.faults is not None:
            order = await _chosen(pool, order, wishes.faults)
        orders = [msgspec.structs.replace(order, seed=first + number) for number in range(wishes.seeds)]
        progress.show(0, 0)
        async for report in pool.run(orders):
            reports.append(report)
            progress.hide()
            for line in report.trace:
                print(line)
            if report.failures:
                failed += 1
                await _tell(pool, msgspec.structs.replace(order, seed=report.seed), report, wishes)
            progress.show(len(reports), failed)
    progress.hide()
    for line in summary(reports, profile=wishes.profile, real_s=progress.real_s):
        print(line)
    return failed


async def _chosen(pool: Pool, order: Order, numbers: tuple[int, ...]) -> Order:
    """The order with only these faults of the plan that its seed draws. Raises UsageError."""
    drawn = (await pool.one(msgspec.structs.replace(order, keep_trace=False, planted=""))).plan
    if any(not 0 <= number < len(drawn) for number in numbers):
        raise UsageError(f"the plan of seed {order.seed} has faults 0 to {len(drawn) - 1}")
    return msgspec.structs.replace(order, plan=tuple(drawn[number] for number in numbers))


async def _tell(pool: Pool, order: Order, report: Report, wishes: Wishes) -> None:
    print(f"seed {report.seed} FAILED: {len(report.failures)} times")
    for failure in report.failures[:FAILURES_SHOWN]:
        print(f"  {failure}")
    replay = f"mendfs simulate --seed {report.seed} --profile {order.profile} --minutes {wishes.minutes:g}"
    if wishes.planted:
        replay += f" --planted {wishes.planted}"
    if wishes.shrink and wishes.faults is None and len(report.plan) > 1:
        drawn = list(report.plan)
        plan = await pool.shrink(msgspec.structs.replace(order, keep_trace=False), drawn)
        numbers = ",".join(str(drawn.index(fault)) for fault in plan)
        print(f"  it still fails with {len(plan)} of its {len(drawn)} faults:")
        _show(plan)
        replay += f" --faults {numbers}"
    print(f"  again: {replay} --trace")


def _show(plan: list[Fault]) -> None:
    for fault in plan:
        print(f"    {fault}")


class _Progress:
    """One line on a terminal that is overwritten; nothing where nobody looks."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._begun_s = time.perf_counter()
        self._is_shown = total > 1 and sys.stderr.isatty()

    @property
    def real_s(self) -> float:
        """Since it was begun."""
        return time.perf_counter() - self._begun_s

    def show(self, done: int, failed: int) -> None:
        """How far it is."""
        if not self._is_shown:
            return
        left = f", about {_duration(self.real_s / done * (self._total - done))} left" if done else ""
        print(f"\r\x1b[K{done} of {self._total} seeds, {failed} failed{left} ", end="", file=sys.stderr, flush=True)

    def hide(self) -> None:
        """Make room for other lines."""
        if self._is_shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def summary(reports: Sequence[Report], *, profile: str, real_s: float) -> list[str]:
    """What a person wants to know of `reports`, in lines. `real_s`: what all of them took by the clock."""
    reports = sorted(reports, key=lambda report: report.seed)
    failed = [report.seed for report in reports if report.failures]
    named = f"seeds {reports[0].seed} to {reports[-1].seed}" if len(reports) > 1 else f"seed {reports[0].seed}"
    ended = f"{len(failed)} of {len(reports)} FAILED: {_some(failed)}" if failed else f"{len(reports)} passed, 0 failed"
    simulated_s = [report.simulated_s for report in reports]
    speeds = [report.simulated_s / max(report.real_s, 1e-9) for report in reports]
    rows: list[tuple[str, Sequence[float], str]] = [
        ("simulated minutes", [seconds / 60 for seconds in simulated_s], ",.1f"),
        ("operations acknowledged", [report.acknowledged for report in reports], ",.0f"),
        ("faults", [report.faults for report in reports], ",.0f"),
        ("times real time", speeds, ",.0f"),
    ]
    lines = [f"{named}, profile {profile}: {ended}"]
    lines.append(f"  {'of a seed':<24}{'median':>10}{'least':>10}{'most':>10}")
    for name, values, form in rows:
        shown = "".join(f"{each:>10{form}}" for each in (statistics.median(values), min(values), max(values)))
        lines.append(f"  {name:<24}{shown}")
    lines.append(f"  in all {_duration(sum(simulated_s))} were simulated in {_duration(real_s)}")
    return lines


def _some(seeds: list[int]) -> str:
    shown = ", ".join(map(str, seeds[:SEEDS_NAMED]))
    return shown if len(seeds) <= SEEDS_NAMED else f"{shown}, ..."


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
