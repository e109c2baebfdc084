"""The tests' own way to run commands: they are what they would be if each had been started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.warm import warm


@pytest.mark.parametrize("arguments", [["--version"], ["ls", "--wrong"], ["status", "--dir", "nowhere"]])
def test_a_command_ends_and_says_as_if_it_had_been_started(tmp_path: Path, arguments: list[str]) -> None:
    environment = {"PATH": os.environ["PATH"]}
    started = subprocess.run(
        [sys.executable, "-m", "mendfs.cli.main", *arguments], capture_output=True, env=environment, cwd=tmp_path
    )
    ran = warm().run(arguments, stdin=b"", env=environment, cwd=tmp_path, timeout_s=60)
    assert ran == (started.returncode, started.stdout, started.stderr)


def test_a_command_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("0" * 64)
    (tmp_path / "secret").chmod(0o600)
    nobody = ["ls", "/", "--meta", "127.0.0.1:9", "--secret-file", "secret"]
    with pytest.raises(TimeoutError):
        warm().run(nobody, stdin=b"", env={}, cwd=tmp_path, timeout_s=0.5)
