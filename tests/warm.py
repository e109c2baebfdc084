"""The command line without its start: a process that has imported everything runs each command in a fork of itself.

Most of what a short command costs is importing modules, and tests run hundreds. A fork has descriptors, environment,
working directory and network of its own, and ends with the exit code of `main()`. Tests of starting itself, of
terminals, signals, closed streams and other users start `mendfs` as everybody does.

`python -m tests.warm PATH` listens on a Unix socket there until its standard input ends.
"""

import contextlib
import ctypes
import importlib
import io
import json
import os
import pkgutil
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).parent.parent
REQUEST_BYTES_MAX = 1 << 17
"""An environment and a command line; a packet of the socket."""
CLONE_NEWNET = 0x40000000


class Warm:
    """The process, as the tests see it."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mendfs-warm-")
        self._path = os.path.join(self._folder.name, "socket")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.warm", self._path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(10)
        self._folder.cleanup()

    def run(
        self,
        arguments: list[str],
        *,
        stdin: bytes,
        env: Mapping[str, str],
        cwd: Path,
        timeout_s: float,
        network: str = "",
    ) -> tuple[int, bytes, bytes]:
        """(exit code, standard output, standard error) of `mendfs ARGUMENTS`, in the network of that file if any.

        As with `subprocess.run`, output ends when nobody has it open any more. Raises TimeoutError.
        """
        request = {"arguments": arguments, "env": dict(env), "cwd": str(cwd), "network": network}
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection,
            _written(stdin) as read_end,
        ):
            out, err = _Output(), _Output()
            ends = [read_end, out.write_end, err.write_end]
            try:
                connection.settimeout(timeout_s)
                connection.connect(self._path)
                socket.send_fds(connection, [json.dumps(request).encode()], ends)
            finally:
                for end in ends:
                    os.close(end)
            code = int(connection.recv(100))
            return code, out.all(timeout_s), err.all(timeout_s)


@contextlib.contextmanager
def _written(content: bytes) -> Iterator[int]:
    """The end of a pipe from which this can be read; the reader closes it."""
    read_end, write_end = os.pipe()

    def write() -> None:
        with contextlib.suppress(BrokenPipeError), os.fdopen(write_end, "wb") as file:
            file.write(content)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    yield read_end
    thread.join()


class _Output:
    """What is written into a pipe."""

    def __init__(self) -> None:
        read_end, self.write_end = os.pipe()
        self._file = os.fdopen(read_end, "rb")
        self._content = b""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with self._file:
            self._content = self._file.read()

    def all(self, timeout_s: float) -> bytes:
        """Once nobody can write more."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise TimeoutError("somebody keeps the output of a command that has ended")
        return self._content


@cache
def warm() -> Warm:
    """The one of this run of the tests."""
    return Warm()


def close() -> None:
    """At the end of the tests."""
    if warm.cache_info().currsize:
        warm().close()
        warm.cache_clear()


# --- the process ------------------------------------------------------------------------------------------------


def _import_everything() -> None:
    import mendfs
    from mendfs.cli.main import run

    for module in pkgutil.walk_packages(mendfs.__path__, "mendfs."):
        if not module.name.startswith("mendfs.sim"):
            importlib.import_module(module.name)
    with contextlib.redirect_stdout(io.StringIO()):
        assert run(["--version"]) == 0  # what is imported to understand a command line


def serve(path: str) -> None:
    """Until standard input ends. One thread that waits here: a fork is then a copy of all there is."""
    _import_everything()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who handle a connection
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(path)
        listener.listen(64)
        os.write(1, b"ready\n")
        while True:
            if 0 in select.select([0, listener.fileno()], [], [])[0]:
                return
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _handle(connection)
            connection.close()


def _handle(connection: socket.socket) -> NoReturn:
    """One command: run it in a fork, answer with its exit code as subprocess has it."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    raw, fds, _, _ = socket.recv_fds(connection, REQUEST_BYTES_MAX, 3)
    pid = os.fork()
    if pid == 0:
        connection.close()
        _become(json.loads(raw), fds)
        _main()
    for fd in fds:
        os.close(fd)
    # Who no longer waits has given up: the command must not live on.
    process = os.pidfd_open(pid)
    if process not in select.select([process, connection.fileno()], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(str(code).encode())
    os._exit(0)


def _become(request: dict[str, object], fds: list[int]) -> None:
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
        os.close(fd)
    os.chdir(str(request["cwd"]))
    os.environ.clear()
    assert isinstance(request["env"], dict)
    os.environ.update(request["env"])
    if request["network"]:
        with open(str(request["network"]), "rb") as space:
            assert ctypes.CDLL(None, use_errno=True).setns(space.fileno(), CLONE_NEWNET) == 0
    assert isinstance(request["arguments"], list)
    sys.argv = ["mendfs", *request["arguments"]]


def _main() -> NoReturn:
    from mendfs.cli.main import main

    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        threading._shutdown()  # type: ignore[attr-defined]  # threads that are not daemons are waited for, as at an end
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    serve(sys.argv[1])
