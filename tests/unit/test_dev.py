"""`./dev`: quick when everything is installed, whatever the caller's environment is like."""

import os
import subprocess
import time
from pathlib import Path

import pytest

import mendfs

ROOT = Path(__file__).parents[2]
ODD = {"HOME": "/nonexistent", "PIP_USER": "1", "PYTHONPATH": "/nonexistent", "PIP_REQUIRE_VIRTUALENV": "1"}

pytestmark = pytest.mark.skipif(not (ROOT / ".venv" / ".installed").exists(), reason="./dev setup was not run")


def dev(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "dev"), *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )


def test_a_second_setup_takes_well_under_a_second_in_an_odd_environment() -> None:
    dev("setup", **ODD)
    began_s = time.monotonic()
    done = dev("setup", **ODD)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert time.monotonic() - began_s < 1


def test_run_is_mendfs_and_keeps_its_exit_code() -> None:
    assert dev("run", "--version", **ODD).stdout == f"mendfs {mendfs.__version__}\n"
    assert dev("run", "nothing").returncode == 2


def test_an_unknown_verb_shows_what_there_is() -> None:
    done = dev("fly")
    assert done.returncode == 2
    assert "./dev up" in done.stderr


def test_everything_that_is_installed_is_pinned_and_no_host_is_named() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    packages = [line for line in lines if not line.startswith("#")]
    assert packages and all(line.count("==") == 1 and "/" not in line and "@" not in line for line in packages)
