"""The log on a full disk, which must not take anything else with it."""

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import structlog
from mendfs.cluster import logs
from mendfs.cluster.service import log_line

logs.configure()
log = structlog.get_logger("test")
for number in range(1000):
    log.error("something happened", number=number, text="x" * 100)
    log_line("said by the supervisor")
try:
    raise ValueError("kept")
except ValueError as error:
    log.error("with its traceback", exc_info=error)
print("went on")
"""


def run(log: Path) -> subprocess.CompletedProcess[str]:
    with open(log, "w") as file:
        return subprocess.run([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=file, text=True)


def test_a_full_disk_drops_lines_and_nothing_else() -> None:
    """Before, the OSError of a log call ended the request, or the loop, that wanted to say something."""
    done = run(Path("/dev/full"))
    assert (done.returncode, done.stdout) == (0, "went on\n")


def test_lines_arrive_whole_and_in_order(tmp_path: Path) -> None:
    done = run(tmp_path / "log")
    assert (done.returncode, done.stdout) == (0, "went on\n")
    lines = (tmp_path / "log").read_text().splitlines()
    assert [f"number={number} " in lines[2 * number] for number in range(1000)] == [True] * 1000
    assert lines[1].endswith("said by the supervisor")
    assert lines[-1] == "ValueError: kept"
