"""The cables between the hosts of `tests.hosts`: carries IP packets from one to another, each with a delay.

A process of its own (`python wires.py FD=NAME=ADDRESS,... ...`, one argument a host; FD is its TUN device), so that
nothing the tests do makes packets late. It stands in for `tc netem`, which many kernels lack. Commands come as lines of
JSON on standard input, each is answered with one on standard output. Cut cables lose packets silently, as real ones do.
"""

import heapq
import json
import os
import select
import struct
import sys
import time
from typing import Any

import msgspec

from mendfs.errors import MendfsError
from mendfs.wire import frame

PACKET_BYTES_MAX = 1 << 16
TCP = 6
READ_AT_ONCE = 64
"""Packets of one host before the others have their turn."""


class Wires:
    """All cables: packets wait in a heap until they are due."""

    def __init__(self, hosts: dict[str, int], addresses: dict[bytes, str]) -> None:
        self.delay_s = 0.0
        self._fds = hosts
        self._names = {fd: name for name, fd in hosts.items()}
        self._addresses = addresses
        self._cut: set[str] = set()
        self._waiting: list[tuple[float, int, str, str, bytes]] = []
        self._count = 0
        self._trace: list[tuple[float, str, str, str]] | None = None

    def run(self) -> None:
        """Until standard input ends."""
        for fd in self._names:
            os.set_blocking(fd, False)
        while True:
            now_s = time.monotonic()
            self._deliver(now_s)
            wait_s = max(0.0, self._waiting[0][0] - now_s) if self._waiting else None
            readable, _, _ = select.select([0, *self._names], [], [], wait_s)
            for fd in readable:
                if fd != 0:
                    self._take(fd)
                elif not self._command():
                    return

    def _take(self, fd: int) -> None:
        for _ in range(READ_AT_ONCE):
            try:
                packet = os.read(fd, PACKET_BYTES_MAX)
            except OSError:  # nothing more there, or the device is down
                return
            self._count += 1
            source = self._names[fd]
            target = self._addresses.get(packet[16:20] if packet[0] >> 4 == 4 else packet[24:40])
            if target is None:
                continue
            at_s = time.monotonic()
            if self._trace is not None:
                self._trace += [(at_s, source, target, name) for name in messages_in(packet)]
            heapq.heappush(self._waiting, (at_s + self.delay_s, self._count, source, target, packet))

    def _deliver(self, now_s: float) -> None:
        while self._waiting and self._waiting[0][0] <= now_s:
            _, _, source, target, packet = heapq.heappop(self._waiting)
            if source in self._cut or target in self._cut:
                continue
            try:
                os.write(self._fds[target], packet)
            except OSError:  # the device is down: lost, as on a cable that was pulled
                continue

    def _command(self) -> bool:
        line = sys.stdin.buffer.readline()
        if not line:
            return False
        command = json.loads(line)
        answer: Any = None
        if "delay_s" in command:
            self.delay_s = command["delay_s"]
        if "cut" in command:
            self._cut = set(command["cut"])
        if command.get("trace") == "begin":
            self._trace = []
        elif command.get("trace") == "end":
            answer, self._trace = self._trace, None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()
        return True


def messages_in(packet: bytes) -> list[str]:
    """The names of the requests whose frames begin in a packet: a small frame is sent in one piece."""
    if packet[0] >> 4 != 4 or packet[9] != TCP:
        return []
    tcp = (packet[0] & 15) * 4
    at = tcp + (packet[tcp + 12] >> 4) * 4
    end = struct.unpack_from(">H", packet, 2)[0]
    found = []
    while packet[at : at + 4] == frame.MAGIC and end - at >= frame.HEADER_BYTES:
        try:
            header = frame.parse_header(packet, at)
        except MendfsError:
            break
        body = at + frame.HEADER_BYTES
        if header.kind == frame.REQUEST and body + header.message_bytes <= end:
            found.append(str(msgspec.msgpack.decode(packet[body : body + header.message_bytes])["type"]))
        at = body + header.message_bytes + header.payload_bytes
    return found


def main() -> None:
    """Run the wires that the arguments describe."""
    hosts: dict[str, int] = {}
    addresses: dict[bytes, str] = {}
    for argument in sys.argv[1:]:
        fd, name, those = argument.split("=")
        hosts[name] = int(fd)
        addresses |= {bytes.fromhex(address): name for address in those.split(",")}
    Wires(hosts, addresses).run()


if __name__ == "__main__":
    main()
