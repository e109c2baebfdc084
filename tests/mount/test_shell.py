"""`mendfs shell` on a real cluster: at a terminal, as people use it, and from a pipe."""

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real_cluster import RealCluster, needs_mounts
from tests.terminal import Terminal, terminal

pytestmark = [needs_mounts, pytest.mark.timeout(300)]

SHELL = ("-m", "mendfs.cli.main", "shell")


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """Three servers, for all tests of this module."""
    cluster = RealCluster(tmp_path_factory.mktemp("shell"))
    try:
        cluster.mendfs("up", "--detach", "--servers", 3)
        yield cluster
    finally:
        cluster.clean_up()


@pytest.fixture(scope="module", autouse=True)
def unanswered(three: RealCluster) -> Iterator["subprocess.Popen[str]"]:
    """A shell for an address where nobody is; it waits for seconds, in which the other tests run."""
    where = ("--meta", "127.0.0.1:9", "--secret-file", str(three.dir / "secret"))
    with subprocess.Popen(
        [sys.executable, *SHELL, *where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if not name.startswith("MENDFS_")},
        text=True,
    ) as process:
        assert process.stdin is not None
        process.stdin.write("ls\n")
        process.stdin.close()
        process.stdin = None
        yield process
        process.kill()


@pytest.fixture
def screen(three: RealCluster, tmp_path: Path) -> Iterator[Terminal]:
    """A shell at its first prompt, with a history of its own, begun in an empty local directory."""
    local = tmp_path / "local"
    local.mkdir()
    three.wait_all_up()
    environment = {**os.environ, "MENDFS_DIR": str(three.dir), "XDG_STATE_HOME": str(tmp_path / "state")}
    with terminal(*SHELL, env=environment, cwd=local) as made:
        made.expect("mendfs:/>")
        yield made
        assert "Traceback" not in made.text and "internal error" not in made.text


def run(screen: Terminal, line: str, *expected: str) -> None:
    """Give a command and wait for what it says, and for the next prompt."""
    screen.type(f"{line}\r")
    screen.expect(f"> {line}")
    for words in expected:
        screen.expect(words)
    next_prompt(screen)


def next_prompt(screen: Terminal, folder: str = "") -> None:
    """The prompt at the beginning of a line: one that is drawn again, with what was typed, is not."""
    screen.expect(f"\nmendfs:{folder}")
    screen.expect(">")


def leave(screen: Terminal, keys: str = "exit\r") -> None:
    screen.type(keys)
    assert screen.wait() == 0


@pytest.mark.seed("B4")
def test_the_commands_of_the_old_client_work_at_the_prompt(screen: Terminal, tmp_path: Path) -> None:
    (tmp_path / "local" / "a local file").write_text("local")
    run(screen, "mkdir /dir")
    run(screen, "create /dir/file")
    run(screen, "write /dir/file 'hi how are you'")
    run(screen, "read /dir/file", "hi how are you")
    run(screen, "mv /dir/file /dir/renamed")
    run(screen, "cd /dir")
    run(screen, "ls", "\nrenamed\n")
    run(screen, "pwd", "\n/dir\n")
    run(screen, "status", "health whole", "server")
    run(screen, "where renamed", "inode")
    run(screen, "put 'a local file' .")
    run(screen, "get 'a local file' again")
    run(screen, "rm 'a local file' renamed")
    run(screen, "rm renamed", "/dir/renamed: No such file or directory")
    run(screen, "cd ..")
    run(screen, "rm -r dir")
    run(screen, "tree", "0 directories, 0 files")
    run(screen, "help mv", "Usage: mv")
    run(screen, "cat 'a", "quotation")
    run(screen, "frobnicate", '"help" lists them')
    assert (tmp_path / "local" / "again").read_text() == "local"
    leave(screen, "\x04")


@pytest.mark.seed("B4")
def test_tab_completes_names_in_the_volume_and_arrows_bring_lines_back(screen: Terminal, tmp_path: Path) -> None:
    run(screen, "mkdir -p '/a directory/inside'")
    run(screen, "create /alone")
    screen.type("cd /a\\ d\t")
    screen.expect("irectory/")
    screen.type("\r")
    next_prompt(screen, "/a directory")
    screen.type("ls ins\t")
    screen.expect("ide/")
    screen.type("\x03")  # Ctrl-C: this line is not wanted
    next_prompt(screen, "/a directory")
    run(screen, "pwd", "\n/a directory\n")
    for _ in range(10):
        screen.type("\x1b[A")  # up; pressed before the history is read it does nothing
        if screen.shows("pwd", within_s=2):
            break
    screen.type("\r")
    screen.expect("\n/a directory\n")
    next_prompt(screen)
    run(screen, "rm -r '/a directory' /alone")
    leave(screen)
    history = tmp_path / "state" / "mendfs" / "history"
    assert "+pwd\n" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


@pytest.mark.seed("B3", "B4")
def test_the_shell_says_which_server_is_lost_and_back_and_goes_on(three: RealCluster, screen: Terminal) -> None:
    run(screen, "write /kept 'still here'")
    three.kill("data-1")
    screen.expect("Connection lost to server 1 at ")
    screen.type("cat /kept\r")
    screen.expect("\nstill here\n")
    screen.expect("Server 1 at ")
    screen.expect(" is back\n")
    three.kill("meta")
    screen.expect("Connection lost to the meta server at ")
    screen.type("cat /kept\r")  # waits, and is answered
    screen.expect("The meta server at ")
    screen.expect("\nstill here\n")
    next_prompt(screen)
    run(screen, "write /kept 'and more' --append")
    run(screen, "cat /kept", "\nstill hereand more\n")
    run(screen, "rm /kept")
    leave(screen, "quit\r")


def test_ctrl_c_ends_the_command_that_waits_and_not_the_shell(three: RealCluster, screen: Terminal) -> None:
    stopped = [three.pid("data-0"), three.pid("data-2")]
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        screen.type("write /waits 'W = 2 of 3 are not there'\r")
        screen.expect_all("Connection lost to server 0 at ", "Connection lost to server 2 at ", within_s=60)
        screen.type("\x03")
        next_prompt(screen)
        run(screen, "pwd", "\n/\n")
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    screen.expect(" is back\n", within_s=60)
    screen.expect(" is back\n", within_s=60)
    run(screen, "write /waits 'now it is written'")
    run(screen, "cat /waits", "\nnow it is written\n")
    run(screen, "rm /waits")
    leave(screen)


def test_a_history_that_cannot_be_kept_is_said_and_the_shell_works(three: RealCluster, tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a directory should be")
    environment = {**os.environ, "MENDFS_DIR": str(three.dir), "XDG_STATE_HOME": str(tmp_path / "state")}
    with terminal(*SHELL, env=environment, cwd=tmp_path) as screen:
        screen.expect("(history is not kept: ")
        screen.expect("mendfs:/>")
        run(screen, "pwd", "\n/\n")
        leave(screen)
        assert "Traceback" not in screen.text


@pytest.mark.seed("B4")
def test_lines_from_a_pipe_are_commands_and_a_failure_names_its_line(three: RealCluster) -> None:
    script = b"""# what a script does
mkdir /piped
cd /piped
write "with space" 'some text'
cat 'with space'
rm none
ls
"""
    code, out, err = three.command("shell", stdin=script)
    assert (code, out) == (1, "some textwith space\n")
    assert err == "mendfs: line 6: /piped/none: No such file or directory\n"
    assert three.mendfs("shell", stdin=b"rm -r /piped") == ""  # no newline at the end

    for script, words in (
        (b"cd /none\nmkdir /wrong", "line 1: stopped here"),
        (b"mkdir /right\nexit\nmkdir /wrong", ""),
        (b"write /wrong", "line 1: write what?"),
        (b"ls --wrong", "line 1: No such option"),
        (b"ls \xff\x1b[31m", "line 1: /\\xff\\x1b[31m: No such file"),
    ):
        code, out, err = three.command("shell", stdin=script)
        assert words in err and out == "" and code == (1 if words else 0), (script, err)
    code, _, _ = three.command("shell", "-e", stdin=b"rm /none\nmkdir /wrong")
    assert code == 1
    assert three.mendfs("ls", "/").split() == ["right"]


def test_closed_streams_are_an_error_at_most(three: RealCluster) -> None:
    """libuv ends a process whose event loop got descriptor 0, 1 or 2 (found by ">&-")."""
    environment = {**os.environ, "MENDFS_DIR": str(three.dir)}
    program = f"{shlex.join([sys.executable, *SHELL])}"
    script = f"echo pwd | {program} >&-; echo $?; {program} <&-; echo $?; echo pwd | {program} 2>&-; echo $?"
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "1\n0\n/\n0\n"
    assert done.stderr == "mendfs: line 1: standard output: Bad file descriptor\n"


@pytest.mark.seed("B6")
def test_an_address_that_does_not_answer_is_named(three: RealCluster, unanswered: "subprocess.Popen[str]") -> None:
    out, err = unanswered.communicate(timeout=60)
    assert unanswered.returncode == 1 and out == "" and err.count("\n") == 1
    assert "127.0.0.1:9 does not answer" in err and "--meta" in err
    code, out, err = three.command(
        "shell", "--meta", three.record().meta, "--secret-file", three.dir / "secret", stdin=b"pwd", env={}
    )
    assert (code, out, err) == (0, "/\n", "")
