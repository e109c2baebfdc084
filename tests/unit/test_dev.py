"""`./dev`: quick when everything is installed, whatever the caller's environment is like."""

import os
import re
import resource
import subprocess
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
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = dev("setup", **ODD)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    # What it uses, not how long it takes: it waits for nothing but the processor, which others may be using.
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 1


def test_the_readme_names_what_is_installed_for_tests() -> None:
    listed = re.search(r"test_packages=\((.*?)\)", (ROOT / "dev").read_text(), re.DOTALL)
    assert listed is not None
    packages = {pair.partition(":")[0] for pair in listed[1].split()}
    said = re.search(r"For `./dev test` that is(.*?):", (ROOT / "README.md").read_text(), re.DOTALL)
    assert said is not None
    assert set(re.split(r",\s+|\s+and\s+", said[1].strip())) == packages


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
