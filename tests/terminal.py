"""A program on a terminal of its own, for tests of what people see: keys go in, the screen's text comes out."""

import contextlib
import fcntl
import os
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b[()][0-9A-B]|\x1b[=>78]|\r")
"""Movements and colours: what is left is what stands on the screen, in the order in which it was written."""

BEGIN = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""A terminal turns Ctrl-C into a signal only for a session that it controls."""


class Terminal:
    """One program and its terminal."""

    def __init__(self, *arguments: object, env: dict[str, str], cwd: object) -> None:
        self._fd, other = os.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", BEGIN, sys.executable, *map(str, arguments)],
            stdin=other,
            stdout=other,
            stderr=other,
            env={**env, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
            cwd=str(cwd),
        )
        os.close(other)
        self._raw = b""
        self._seen = 0

    @property
    def text(self) -> str:
        """Everything shown so far."""
        return ESCAPES.sub(b"", self._raw).decode(errors="replace")

    def type(self, keys: str) -> None:
        """Press keys; `\\r` is Enter, `\\t` Tab, `\\x03` Ctrl-C, `\\x04` Ctrl-D."""
        os.write(self._fd, keys.encode())

    def expect(self, what: str, within_s: float = 60) -> str:
        """Wait until `what` is shown after everything expected before; returns what came up to its end."""
        deadline_s = time.monotonic() + within_s
        while (found := self.text.find(what, self._seen)) < 0:
            assert time.monotonic() < deadline_s and self._read(0.1), f"no {what!r} in:\n{self.text[self._seen :]}"
        begin = self._seen
        # A newline at the end may be where the next thing begins.
        self._seen = found + len(what.removesuffix("\n"))
        return self.text[begin : self._seen]

    def expect_all(self, *what: str, within_s: float = 60) -> None:
        """Wait until all of these are shown, in whatever order."""
        begin, end = self._seen, self._seen
        for each in what:
            self._seen = begin
            self.expect(each, within_s)
            end = max(end, self._seen)
        self._seen = end

    def shows(self, what: str, within_s: float) -> bool:
        """Whether `what` is shown after everything expected before, soon enough."""
        deadline_s = time.monotonic() + within_s
        while what not in self.text[self._seen :]:
            if time.monotonic() >= deadline_s or not self._read(0.05):
                return False
        return True

    def _read(self, timeout_s: float) -> bool:
        """Take what was written; False if the program is gone and nothing is left."""
        if not select.select([self._fd], [], [], timeout_s)[0]:
            return True
        try:
            piece = os.read(self._fd, 65536)
        except OSError:  # EIO: the other side is closed
            return False
        self._raw += piece
        return bool(piece)

    def wait(self, within_s: float = 60) -> int:
        """The exit code, once the program has ended."""
        deadline_s = time.monotonic() + within_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline_s, f"still running:\n{self.text[self._seen :]}"
            self._read(0.05)
        return self.process.returncode

    def close(self) -> None:
        """End it, whatever it does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._fd)


@contextlib.contextmanager
def terminal(*arguments: object, env: dict[str, str], cwd: object) -> Iterator[Terminal]:
    """Run a Python program (`-m mendfs.cli.main ...`) on a terminal, and end it in the end."""
    made = Terminal(*arguments, env=env, cwd=cwd)
    try:
        yield made
    finally:
        made.close()
