"""`mendfs simulate`: what it prints, and its exit codes."""

import pytest

from mendfs.cli.main import run
from mendfs.sim.command import summary
from mendfs.sim.runs import Report
from mendfs.sim.worker import Order, broken


def report(seed: int, *, real_s: float, acknowledged: int, failures: tuple[str, ...] = ()) -> Report:
    return Report(
        seed=seed,
        profile="mixed",
        simulated_s=660.0,
        real_s=real_s,
        steps=1,
        acknowledged=acknowledged,
        refused=0,
        unknown=0,
        faults=40,
        digest="",
        failures=failures,
        plan=(),
    )


def test_the_summary_has_medians_extremes_and_the_time_it_took() -> None:
    reports = [
        report(9, real_s=6.6, acknowledged=6900),
        report(7, real_s=11.0, acknowledged=5000),
        report(8, real_s=10.0, acknowledged=6000),
    ]
    assert summary(reports, profile="mixed", real_s=14.25) == [
        "seeds 7 to 9, profile mixed: 3 passed, 0 failed",
        "  of a seed                   median     least      most",
        "  simulated minutes             11.0      11.0      11.0",
        "  operations acknowledged      6,000     5,000     6,900",
        "  faults                          40        40        40",
        "  times real time                 66        60       100",
        "  in all 33 min were simulated in 14.2 s",
    ]


def test_the_summary_names_the_seeds_that_failed() -> None:
    reports = [report(seed, real_s=10.0, acknowledged=1, failures=("a",) * (seed % 2)) for seed in range(30)]
    assert summary(reports, profile="disks", real_s=300.0)[0] == (
        "seeds 0 to 29, profile disks: 15 of 30 FAILED: 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, ..."
    )
    assert summary([broken(Order(seed=3), "died")], profile="mixed", real_s=0.0)[0] == (
        "seed 3, profile mixed: 1 of 1 FAILED: 3"
    )


def test_it_ends_with_0_when_all_passed_and_with_1_when_a_promise_was_broken(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["simulate", "--seed", "1", "--minutes", "1", "--jobs", "1", "--profile", "calm"]) == 0
    assert "seed 1, profile calm: 1 passed, 0 failed" in capsys.readouterr().out
    planted = ["--planted", "commit-before-quorum", "--profile", "calm", "--no-shrink"]
    assert run(["simulate", "--seed", "1", "--seeds", "2", "--minutes", "1", "--jobs", "2", *planted]) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said
    assert "again: mendfs simulate --seed" in said
