"""What `mendfs simulate` does: seeds in parallel, a summary, and for a failure what is needed to see it again."""

import os
import random
import statistics

import msgspec

from mendfs.errors import UsageError
from mendfs.sim.faults import PROFILES, Fault
from mendfs.sim.planted import PLANTED
from mendfs.sim.pool import Pool
from mendfs.sim.runs import Report
from mendfs.sim.worker import Order

FAILURES_SHOWN = 5


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
    async with Pool(wishes.jobs or os.cpu_count() or 1) as pool:
        if wishes.faults is not None:
            order = await _chosen(pool, order, wishes.faults)
        orders = [msgspec.structs.replace(order, seed=first + number) for number in range(wishes.seeds)]
        async for report in pool.run(orders):
            reports.append(report)
            for line in report.trace:
                print(line)
            if report.failures:
                failed += 1
                await _tell(pool, msgspec.structs.replace(order, seed=report.seed), report, wishes)
    _summarize(reports, first, wishes, failed)
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


def _summarize(reports: list[Report], first: int, wishes: Wishes, failed: int) -> None:
    simulated_s = sum(report.simulated_s for report in reports)
    real_s = sum(report.real_s for report in reports)
    operations = statistics.median(report.acknowledged for report in reports)
    faults = statistics.median(report.faults for report in reports)
    print(
        f"{len(reports)} seeds from {first}, profile {wishes.profile}: {simulated_s / 60:.0f} simulated minutes, "
        f"medians of a seed: {operations:.0f} acknowledged operations (least {min(r.acknowledged for r in reports)}), "
        f"{faults:.0f} faults (least {min(r.faults for r in reports)}); "
        f"{simulated_s / max(real_s, 1e-9):.0f} times real time on each process; {failed} failed"
    )
