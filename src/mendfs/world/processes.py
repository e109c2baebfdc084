"""Processes of this machine: start, watch, signal, wait, without ever meeting somebody else's process by its number.

A pid alone names nothing for long: numbers are given again. A `ProcessIdentity` adds the boot and the start time, and
signals go through a pidfd that is opened before the identity is checked, so what was checked is what is hit.
"""

import asyncio
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

LINE_BYTES_MAX = 64 * 1024
"""A report of a child is one line of JSON; more than this is a mistake of ours."""


class ProcessIdentity(msgspec.Struct, frozen=True):
    """One process among all that ever ran on this machine."""

    pid: int
    started: str
    """Boot id and start time in clock ticks since that boot."""


class Child(Protocol):
    """A process that we started."""

    @property
    def identity(self) -> ProcessIdentity:
        """Which one it is."""
        ...

    def send_options(self, document: bytes) -> None:
        """Write one line to its standard input, which then ends."""
        ...

    async def report(self) -> bytes:
        """The next line of its standard output; empty when there will be none."""
        ...

    async def exited(self) -> int:
        """Wait for its end: the exit status, or minus the signal that ended it."""
        ...

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if it has ended."""
        ...


class Processes(Protocol):
    """The machine's processes."""

    async def start(self, arguments: Sequence[str], *, log_path: str) -> Child:
        """Start a process in a session of its own, its standard error appended to a file."""
        ...

    def identity(self, pid: int) -> ProcessIdentity | None:
        """Who has this pid now; None if nobody, or only a zombie."""
        ...

    def signal(self, process: ProcessIdentity, number: signal.Signals) -> bool:
        """Send a signal to exactly this process. False if it has ended."""
        ...

    async def wait_ended(self, process: ProcessIdentity, timeout_s: float) -> bool:
        """Wait until a process, ours or not, has ended. False if it still runs after `timeout_s`."""
        ...


class LocalChild:
    """A `Child` on this machine."""

    def __init__(self, process: subprocess.Popen[bytes], identity: ProcessIdentity, reports: asyncio.StreamReader):
        self._process = process
        self._identity = identity
        self._reports = reports

    @property
    def identity(self) -> ProcessIdentity:
        """Which one it is."""
        return self._identity

    def send_options(self, document: bytes) -> None:
        """Write one line to its standard input, which then ends."""
        assert self._process.stdin is not None, "it was started with a pipe"
        try:
            # A few hundred bytes: the pipe takes them without waiting.
            with self._process.stdin as pipe:
                pipe.write(document)
        except BrokenPipeError:
            pass  # it has ended already, which exited() tells

    async def report(self) -> bytes:
        """The next line of its standard output; empty when there will be none."""
        try:
            return await self._reports.readline()
        except ValueError:
            return b""  # longer than LINE_BYTES_MAX

    async def exited(self) -> int:
        """Wait for its end: the exit status, or minus the signal that ended it."""
        status = self._process.poll()
        if status is None:
            await _wait_pidfd(self._process.pid)
            status = self._process.wait()
        return status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens if it has ended."""
        self._process.send_signal(number)


async def _wait_pidfd(pid: int) -> None:
    """Wait for the end of a process; returns at once if there is none."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    try:
        loop.add_reader(fd, ended.set)
        await ended.wait()
    finally:
        loop.remove_reader(fd)
        os.close(fd)


def _boot() -> str:
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read(8)


def _environment() -> dict[str, str]:
    # Compiled modules may be kept even where a caller wants none: six processes start at once, again and again.
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def _popen(arguments: Sequence[str], log_path: str) -> subprocess.Popen[bytes]:
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd="/",  # so that it never keeps somebody's file system busy
            env=_environment(),
            start_new_session=True,
        )
    finally:
        os.close(log)


class LocalProcesses:
    """The processes of this machine."""

    async def start(self, arguments: Sequence[str], *, log_path: str) -> LocalChild:
        """Start a process in a session of its own, its standard error appended to a file.

        Its own session: Ctrl-C in the terminal reaches the supervisor alone, which then stops things in order.
        """
        process = _popen(arguments, log_path)
        identity = self.identity(process.pid)
        # A child that has ended already is a zombie until it is waited for, and its start time can still be read.
        identity = identity or ProcessIdentity(process.pid, "")
        return LocalChild(process, identity, await _reader(process))

    def identity(self, pid: int) -> ProcessIdentity | None:
        """Who has this pid now; None if nobody, or only a zombie."""
        try:
            with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
                # The name may hold anything, spaces and parentheses too: fields count from its last parenthesis.
                fields = file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        if fields[0] in ("Z", "X"):
            return None
        return ProcessIdentity(pid, f"{_boot()}-{fields[19]}")

    def signal(self, process: ProcessIdentity, number: signal.Signals) -> bool:
        """Send a signal to exactly this process. False if it has ended."""
        return self._with_pidfd(process, lambda fd: signal.pidfd_send_signal(fd, number))

    def _with_pidfd(self, process: ProcessIdentity, act: Callable[[int], None]) -> bool:
        try:
            fd = os.pidfd_open(process.pid)
        except ProcessLookupError:
            return False
        try:
            if self.identity(process.pid) != process:
                return False
            act(fd)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True

    async def wait_ended(self, process: ProcessIdentity, timeout_s: float) -> bool:
        """Wait until a process, ours or not, has ended. False if it still runs after `timeout_s`."""
        if self.identity(process.pid) != process:
            return True
        try:
            async with asyncio.timeout(timeout_s):
                await _wait_pidfd(process.pid)
        except TimeoutError:
            return self.identity(process.pid) != process
        return True


async def _reader(process: subprocess.Popen[bytes]) -> asyncio.StreamReader:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=LINE_BYTES_MAX, loop=loop)
    assert process.stdout is not None, "it was started with a pipe"
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader, loop=loop), process.stdout)
    return reader


def raise_file_limit() -> None:
    """Allow this process as many descriptors as it may have.

    The default of 1024 is for programs that use select(2); a store of 1 TiB has 4096 segments.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
