"""Hosts for tests: network namespaces with cables between them that have a delay, can be cut, and can be listened to.

Each host has the addresses 10.213.0.N and fd6d:66::N (N from 1 on) and nothing else, so tests beside one another do not
meet. Programs run on a host with `nsenter`, not `ip netns exec`: that would hide their mounts from us.
"""

import contextlib
import fcntl
import ipaddress
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.real_cluster import COMMAND_TIMEOUT_S, until
from tests.warm import warm

TUN = "/dev/net/tun"
MTU = 60_000
"""Long packets: fewer of them pass through a process written in Python."""
_TUNSETIFF = 0x400454CA
_IFF_TUN = 1
_IFF_NO_PI = 0x1000
_numbers = count(1)


def missing() -> str:
    """Why there can be no hosts here; empty if there can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if not os.path.exists(TUN):
        return f"hosts are connected by TUN devices, and there is no {TUN}"
    for tool in ("ip", "nsenter"):
        if shutil.which(tool) is None:
            return f"the program {tool} is missing (Debian packages iproute2 and util-linux)"
    return ""


needs_hosts = pytest.mark.skipif(bool(missing()) or not os.path.exists("/dev/fuse"), reason=missing() or "no /dev/fuse")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=30)


class Sent(NamedTuple):
    """A request that a host sent."""

    at_s: float
    name: str


def rounds(requests: list[Sent], trip_s: float) -> int:
    """How many of these wait for the answer to one before, at most: no two such are less than a round trip apart.

    A slow machine makes rounds longer, not more; only what it sends late although nothing was waited for counts twice.
    """
    count, began_s = 0, float("-inf")
    for request in requests:
        if request.at_s - began_s >= trip_s:
            count, began_s = count + 1, request.at_s
    return count


class Program:
    """A program that runs on a host."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process = process
        self.log = log

    def said(self) -> str:
        """What it has written so far, to either output."""
        return self.log.read_text(errors="replace")

    def wait_for(self, text: str, within_s: float = 60) -> None:
        """Until it has written this."""
        until(lambda: text in self.said() or self.process.poll() is not None, within_s)
        assert text in self.said(), f"it ended with {self.process.poll()}: {self.said()}"

    def end(self, number: int = signal.SIGTERM, within_s: float = 60) -> int:
        """Send it a signal and wait for its end; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(within_s)


class Hosts:
    """Some hosts, by name."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.path = path
        self.programs: list[Program] = []
        self._prefix = f"mfs{os.getpid()}-{next(_numbers)}"
        self._numbers = {name: number for number, name in enumerate(names, 1)}
        self._logs = count(1)
        self._made: list[str] = []
        self._wires: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Make the namespaces, their devices and the cables."""
        fds: dict[str, int] = {}
        try:
            for name in self._numbers:
                fds[name] = self._make(name)
            arguments = [
                f"{fd}={name}={','.join(ipaddress.ip_address(a).packed.hex() for a in self._addresses(name))}"
                for name, fd in fds.items()
            ]
            self._wires = subprocess.Popen(
                [sys.executable, "-m", "tests.wires", *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=tuple(fds.values()),
                cwd=Path(__file__).parent.parent,
            )
        finally:
            for fd in fds.values():
                os.close(fd)
        os.setpriority(os.PRIO_PROCESS, self._wires.pid, -10)  # a late packet is a wrong measurement
        self._tell(delay_s=0.0)

    def _make(self, name: str) -> int:
        space, device = self._space(name), f"{self._prefix}{self._numbers[name]}".replace("mfs", "t").replace("-", "")
        _ip("netns", "add", space)
        self._made.append(space)
        fd = os.open(TUN, os.O_RDWR)
        try:
            fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", device.encode(), _IFF_TUN | _IFF_NO_PI))
            _ip("link", "set", device, "netns", space)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", device, "name", "eth0", "mtu", str(MTU))
            v4, v6 = self._addresses(name)
            _ip("-n", space, "address", "add", f"{v4}/24", "dev", "eth0")
            _ip("-n", space, "address", "add", f"{v6}/64", "dev", "eth0", "nodad")
            _ip("-n", space, "link", "set", "eth0", "up")
            # A new connection's window opens over several round trips; here those of our own protocol are counted.
            settings = (("tcp_rmem", "4096 6291456 6291456"), ("tcp_slow_start_after_idle", "0"))
            for setting, value in settings:  # what /proc/sys/net shows is the network of who looks
                write = f"echo {value} > /proc/sys/net/ipv4/{setting}"
                subprocess.run(self.on(name, "sh", "-c", write), check=True, timeout=30)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _space(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _addresses(self, name: str) -> tuple[str, str]:
        number = self._numbers[name]
        return f"10.213.0.{number}", f"fd6d:66::{number:x}"

    def address(self, name: str, port: int) -> str:
        """HOST:PORT on a host."""
        return f"{self._addresses(name)[0]}:{port}"

    def folder(self, name: str) -> Path:
        """A host's own folder."""
        folder = self.path / name
        folder.mkdir(exist_ok=True)
        return folder

    # --- cables -----------------------------------------------------------------------------------------------

    def _tell(self, **command: Any) -> Any:
        wires = self._wires
        assert wires is not None and wires.stdin is not None and wires.stdout is not None
        wires.stdin.write(json.dumps(command) + "\n")
        wires.stdin.flush()
        return json.loads(wires.stdout.readline())

    def delay(self, seconds: float) -> None:
        """What every packet takes from now on, in each direction."""
        self._tell(delay_s=seconds)

    def cut(self, *names: str) -> None:
        """Lose every packet from and to these hosts, and to no others: nobody is told."""
        self._tell(cut=names)

    @contextlib.contextmanager
    def trace(self, source: str) -> Iterator[list[Sent]]:
        """Collect the requests that a host sends meanwhile, in order; renewals and pings are left out."""
        found: list[Sent] = []
        self._tell(trace="begin")
        try:
            yield found
        finally:
            said = self._tell(trace="end")
            found += [
                Sent(at_s, name) for at_s, host, _, name in said if host == source and name not in ("renew", "ping")
            ]

    def link(self, name: str, state: str) -> None:
        """`up` or `down`: the host itself sees that its cable is gone."""
        _ip("-n", self._space(name), "link", "set", "eth0", state)

    # --- programs ---------------------------------------------------------------------------------------------

    def network(self, name: str) -> str:
        """The file that stands for a host's network."""
        return f"/run/netns/{self._space(name)}"

    def on(self, name: str, *arguments: object) -> list[str]:
        """The command that runs another one on a host."""
        return ["nsenter", f"--net={self.network(name)}", *map(str, arguments)]

    def mendfs(self, name: str, *arguments: object, stdin: bytes = b"", env: dict[str, str] | None = None) -> list[Any]:
        """[exit code, standard output, standard error] of `mendfs ARGUMENTS` on a host."""
        code, out, err = warm().run(
            [*map(str, arguments)],
            stdin=stdin,
            env=_environment(env),
            cwd=self.folder(name),
            timeout_s=COMMAND_TIMEOUT_S,
            network=self.network(name),
        )
        assert b"Traceback" not in err, err.decode()
        return [code, out.decode(), err.decode()]

    def must(self, name: str, *arguments: object, stdin: bytes = b"") -> str:
        """Standard output of a command that must succeed."""
        code, out, err = self.mendfs(name, *arguments, stdin=stdin)
        assert code == 0, f"mendfs {' '.join(map(str, arguments))}: {err}{self.logs()}"
        return str(out)

    def begin(self, name: str, *arguments: object, env: dict[str, str] | None = None) -> Program:
        """Start `mendfs ARGUMENTS` on a host, to run on."""
        log = self.folder(name) / f"{arguments[0]}-{next(self._logs)}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                self.on(name, sys.executable, "-m", "mendfs.cli.main", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=_environment(env),
                cwd=self.folder(name),
            )
        self.programs.append(Program(process, log))
        return self.programs[-1]

    def logs(self) -> str:
        """The ends of what all programs have said, for a test that failed."""
        return "".join(f"\n--- {program.log}\n{program.said()[-2000:]}" for program in self.programs)

    def close(self) -> None:
        """Leave nothing behind."""
        for program in self.programs:
            if program.process.poll() is None:
                program.process.kill()
                program.process.wait(60)
        if self._wires is not None:
            assert self._wires.stdin is not None
            assert self._wires.stdout is not None
            self._wires.stdin.close()
            self._wires.wait(60)
            self._wires.stdout.close()
        for space in self._made:
            subprocess.run(["ip", "netns", "delete", space], check=False, capture_output=True, timeout=30)


def _environment(extra: dict[str, str] | None) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MENDFS_")}
    return environment | (extra or {})
