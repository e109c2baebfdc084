"""Runs seeds for whoever writes them to standard input, a line of JSON each, and answers with a line of JSON each.

A process of its own because the order of sets of strings must be the same in every run (PYTHONHASHSEED=0), which only a
new interpreter can be told; each seed in a forked child, so that nothing of one run is left for the next.
"""

import gc
import os
import sys

import msgspec

from mendfs.sim.faults import Fault
from mendfs.sim.planted import planted
from mendfs.sim.runs import Report, simulate


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One run to be made."""

    seed: int
    profile: str = "mixed"
    seconds: float = 600.0
    plan: tuple[Fault, ...] | None = None
    keep_trace: bool = False
    planted: str = ""


def perform(order: Order) -> Report:
    """One run."""
    plan = None if order.plan is None else list(order.plan)

    def go() -> Report:
        return simulate(
            order.seed, profile=order.profile, seconds=order.seconds, plan=plan, keep_trace=order.keep_trace
        )

    if not order.planted:
        return go()
    with planted(order.planted):
        return go()


def broken(order: Order, why: str) -> Report:
    """The report of a run that left none."""
    return Report(
        seed=order.seed,
        profile=order.profile,
        simulated_s=0.0,
        real_s=0.0,
        steps=0,
        acknowledged=0,
        refused=0,
        unknown=0,
        faults=0,
        digest="",
        failures=(why,),
        plan=(),
    )


def main() -> None:
    """Until standard input ends."""
    gc.disable()  # a run is short, and its garbage goes with its process
    for line in sys.stdin.buffer:
        order = msgspec.json.decode(line, type=Order)
        child = os.fork()
        if child == 0:
            try:
                answer = msgspec.json.encode(perform(order)) + b"\n"
                view = memoryview(answer)
                while view:
                    view = view[os.write(1, view) :]
            except BaseException as error:
                print(f"seed {order.seed}: {error!r}", file=sys.stderr)
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            report = broken(order, f"the run's process ended with status {status}")
            os.write(1, msgspec.json.encode(report) + b"\n")


if __name__ == "__main__":
    main()
