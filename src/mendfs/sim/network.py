"""The simulated network: connections between hosts that are late, cut, reset, half open or slow, as a run wants them.

A connection is two streams of bytes. A stream keeps its order; different ones overtake each other. What a cut link
holds is delivered when it heals, as TCP would repeat it, unless the sender has given up before. Buffers are bounded, so
writers are paused and resumed as by a kernel.
"""

import asyncio
import contextvars
import random
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import msgspec

from mendfs.errors import Unreachable, UsageError
from mendfs.model import KiB
from mendfs.sim.loop import Handle, Process, SimLoop
from mendfs.world.network import Address, Listener

WINDOW_BYTES = 256 * KiB
"""What the kernels of both sides hold of a stream before its writer is paused."""
UNACKNOWLEDGED_S = 25.0
"""How long the far end of a stream may be silent before the kernel ends the connection (world/tcp.py sets it)."""
Factory = Callable[[], asyncio.BaseProtocol]


class LinkRules(msgspec.Struct, kw_only=True):
    """How long bytes take, in seconds. A run changes them as it goes."""

    delay_min_s: float = 0.000_05
    delay_max_s: float = 0.000_5
    slow_chance: float = 0.002
    slow_max_s: float = 0.2
    """Now and then something is held up: another one's burst, a repeated packet."""
    bytes_per_s: float = 500e6


class SimNetwork:
    """All hosts' network. `at(host, process)` is what one process is given."""

    def __init__(self, loop: SimLoop, rng: random.Random) -> None:
        self.loop = loop
        self.rng = rng
        self.rules = LinkRules()
        self.connections: list[Connection] = []
        self._listeners: dict[Address, tuple[Process, str, Factory]] = {}
        self._cut: set[tuple[str, str]] = set()
        self._slow: dict[tuple[str, str], float] = {}
        self._dark: set[str] = set()
        self._last_port = 0
        self.when_sending: dict[str, Callable[[Connection], None]] = {}
        """Host -> what happens the next time that a process of it sends something, which is lost then."""

    def at(self, host: str, process: Process) -> "HostNetwork":
        """The network as a process on `host` sees it."""
        return HostNetwork(self, host, process)

    # --- what a run does to it ----------------------------------------------

    def cut(self, source: str, target: str) -> None:
        """Nothing gets from `source` to `target` any more."""
        self._cut.add((source, target))

    def heal(self, source: str | None = None, target: str | None = None) -> None:
        """Whole again: one direction, or everything."""
        if source is None or target is None:
            self._cut.clear()
            self._slow.clear()
        else:
            self._cut.discard((source, target))
            self._slow.pop((source, target), None)
        for connection in list(self.connections):
            for stream in connection.streams:
                stream.schedule()

    def slow(self, source: str, target: str, delay_s: float) -> None:
        """Everything takes up to `delay_s` longer on this link."""
        self._slow[source, target] = delay_s

    def is_cut(self, source: str, target: str) -> bool:
        """Whether bytes cannot pass."""
        return (source, target) in self._cut or source in self._dark or target in self._dark

    def power_off(self, host: str) -> None:
        """The host says nothing any more, not even that a connection is gone."""
        self._dark.add(host)

    def power_on(self, host: str) -> None:
        """Its kernel answers again; of old connections it knows nothing."""
        self._dark.discard(host)

    def delay_s(self, source: str, target: str, length: int) -> float:
        """How long `length` bytes take."""
        rules, rng = self.rules, self.rng
        delay_s = rng.uniform(rules.delay_min_s, rules.delay_max_s) + length / rules.bytes_per_s
        if rng.random() < rules.slow_chance:
            delay_s += rng.uniform(0, rules.slow_max_s)
        if not self._slow:
            return delay_s
        slow_s = self._slow.get((source, target))
        return delay_s if slow_s is None else delay_s + rng.uniform(0, slow_s)

    def process_died(self, process: Process, *, silent: bool) -> None:
        """Its connections end: with a reset from its kernel, or, if the host lost power, without a word."""
        for address in [name for name, entry in self._listeners.items() if entry[0] is process]:
            del self._listeners[address]
        for connection in list(self.connections):
            for end in connection.ends:
                if end.process is process:
                    end.die(silent=silent)

    def reset(self, connection: "Connection", *, told: int | None = None) -> None:
        """End a connection from the middle. With `told` only that end learns of it: the other one is half open."""
        for number, end in enumerate(connection.ends):
            if told is None or told == number:
                self.loop.call_later(0, end.lose, ConnectionResetError("connection reset"), context=end.process.context)

    # --- connecting ----------------------------------------------

    def listen(self, host: str, process: Process, address: Address, factory: Factory) -> Address:
        """Take an address."""
        name, _, port = address.rpartition(":")
        if name != host:
            raise UsageError(f"cannot listen on {address} (not an address of {host}): name an address of this machine")
        if port == "0":
            self._last_port += 1
            address = f"{host}:{self._last_port}"
        if address in self._listeners:
            raise UsageError(f"cannot listen on {address} (Address already in use): stop what listens there")
        self._listeners[address] = (process, host, factory)
        return address

    def ignore(self, address: Address, process: Process) -> None:
        """Accept no more there."""
        if address in self._listeners and self._listeners[address][0] is process:
            del self._listeners[address]

    async def connect(self, host: str, process: Process, address: Address, factory: Factory) -> None:
        """See `Network.connect`."""
        target = address.rpartition(":")[0]
        await self._pass(host, target)
        listener = self._listeners.get(address)
        await self._pass(target, host)
        if listener is None or self._listeners.get(address) is not listener:
            raise Unreachable(f"{address} does not answer (Connection refused)")
        other, _, accept = listener
        connection = Connection(self, (host, target), (process, other))
        near, far = connection.ends
        protocol = factory()
        near.begin(protocol)
        # The far side's kernel has accepted; its process finds out when it runs.
        self.loop.call_later(0, lambda: far.begin(accept()), context=other.context)

    async def _pass(self, source: str, target: str) -> None:
        """Wait as long as a packet takes; it is repeated while the link is cut, and the caller has a deadline."""
        await asyncio.sleep(self.delay_s(source, target, 60))
        wait_s = 0.2
        while self.is_cut(source, target):
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, 3.0)


class Connection:
    """Two ends and the two streams between them."""

    def __init__(self, network: SimNetwork, hosts: tuple[str, str], processes: tuple[Process, Process]) -> None:
        self.network = network
        self.hosts = hosts
        self.ends = (End(self, 0, processes[0], hosts), End(self, 1, processes[1], (hosts[1], hosts[0])))
        network.connections.append(self)

    @property
    def streams(self) -> "tuple[Stream, Stream]":
        """What goes from each end to the other."""
        return self.ends[0].stream, self.ends[1].stream

    def forget(self) -> None:
        """Both ends are gone."""
        if all(end.is_gone for end in self.ends) and self in self.network.connections:
            self.network.connections.remove(self)


class Stream:
    """Bytes on their way from end `number` to the other."""

    def __init__(self, connection: Connection, number: int, hosts: tuple[str, str]) -> None:
        self.connection = connection
        self.number = number
        self.hosts = hosts
        self._network = connection.network
        self._loop = connection.network.loop
        self.flying: deque[tuple[float, bytes | str]] = deque()
        """(earliest arrival, bytes or "fin" or "reset"), in order."""
        self.flying_bytes = 0
        self._arrival_s = 0.0
        self._timer: Handle | None = None
        self._stalled_since_s: float | None = None

    def send(self, what: bytes | str) -> None:
        """Set out; arrives after all that was sent before."""
        network, loop = self._network, self._loop
        is_data = isinstance(what, bytes)
        if is_data and self.hosts[0] in network.when_sending:
            # Not from within the sender's own call: what kills it must find it between two steps.
            happens = network.when_sending.pop(self.hosts[0])
            loop.call_soon(happens, self.connection, context=_OUTSIDE)
            return
        length = len(what) if is_data else 0
        self._arrival_s = max(self._arrival_s, loop.time() + network.delay_s(*self.hosts, length))
        self.flying.append((self._arrival_s, what))
        self.flying_bytes += length
        if self._timer is None:
            self.schedule()

    def schedule(self) -> None:
        """Look again when the next piece is due."""
        if self.flying and self._timer is None:
            loop = self._loop
            self._timer = loop.call_at(max(self.flying[0][0], loop.time()), self._due, context=_OUTSIDE)

    def _due(self) -> None:
        self._timer = None
        network, flying = self._network, self.flying
        now_s = self._loop.time()
        sender, receiver = self.connection.ends[self.number], self.connection.ends[1 - self.number]
        if network.is_cut(*self.hosts):
            if self._stalled_since_s is None:
                self._stalled_since_s = now_s
            if now_s - self._stalled_since_s >= UNACKNOWLEDGED_S:
                flying.clear()
                sender.lose_soon(TimeoutError("nothing was acknowledged"))
                return
            # Looked at again when the link heals, and when the kernel's patience ends.
            self._timer = self._loop.call_at(now_s + 1.0, self._due, context=_OUTSIDE)
            return
        self._stalled_since_s = None
        while flying and flying[0][0] <= now_s:
            what = flying.popleft()[1]
            if isinstance(what, bytes):
                self.flying_bytes -= len(what)
            receiver.arrive(what)
        sender.room_made()
        if flying:
            self.schedule()


class End(asyncio.Transport):
    """One side of a connection, as its protocol sees it."""

    def __init__(self, connection: Connection, number: int, process: Process, hosts: tuple[str, str]) -> None:
        super().__init__()
        self.process = process
        self.is_gone = False
        """The protocol was told that the connection is lost, or its process is dead."""
        self._connection = connection
        self.stream = Stream(connection, number, hosts)
        """What it sends."""
        self._loop = connection.network.loop
        self._number = number
        self._protocol: asyncio.BaseProtocol | None = None
        self._unsent: deque[bytes] = deque()
        self._is_writing_paused = False
        self._is_reading_paused = False
        self._is_closing = False
        self._inbox: deque[bytes | str] = deque()
        self._is_receive_due = False

    # --- from the network ----------------------------------------------

    def begin(self, protocol: asyncio.BaseProtocol) -> None:
        """The connection is made."""
        self._protocol = protocol
        protocol.connection_made(self)
        self._receive_soon()

    def arrive(self, what: bytes | str) -> None:
        """Something has reached this host."""
        if not self.process.is_alive or self.is_gone:
            # The host is up, or the link would be cut: its kernel knows no such connection (any more).
            if what != "reset":
                self.stream.send("reset")
            return
        self._inbox.append(what)
        self._receive_soon()

    def _receive_soon(self) -> None:
        if self._inbox and not self._is_receive_due and self._protocol is not None:
            self._is_receive_due = True
            self._loop.call_soon(self._receive, context=self.process.context)

    def _receive(self) -> None:
        self._is_receive_due = False
        while self._inbox and not self.is_gone:
            what = self._inbox[0]
            if what == "reset":
                self.lose(ConnectionResetError("connection reset by peer"))
                return
            if self._is_reading_paused or self._is_closing:
                if self._is_closing:
                    self._inbox.clear()
                return
            self._inbox.popleft()
            if isinstance(what, bytes):
                self._hand_over(what)
            else:
                protocol = cast(asyncio.Protocol, self._protocol)
                if not protocol.eof_received():
                    self.close()

    def _hand_over(self, data: bytes) -> None:
        if not isinstance(self._protocol, asyncio.BufferedProtocol):
            cast(asyncio.Protocol, self._protocol).data_received(data)
            return
        rest = memoryview(data)
        while rest and not self.is_gone:
            buffer = memoryview(self._protocol.get_buffer(-1))
            count = min(len(buffer), len(rest))
            buffer[:count] = rest[:count]
            rest = rest[count:]
            self._protocol.buffer_updated(count)
            if self._is_reading_paused and rest:
                self._inbox.appendleft(bytes(rest))
                return

    def room_made(self) -> None:
        """The other side's kernel has taken something."""
        if not self.process.is_alive or self.is_gone:
            return
        if not self._unsent and not self._is_writing_paused:
            return
        stream = self.stream
        while self._unsent and stream.flying_bytes < WINDOW_BYTES:
            stream.send(self._unsent.popleft())
        if self._unsent:
            return
        if self._is_writing_paused:
            self._is_writing_paused = False
            self._loop.call_soon(self._resume_writing, context=self.process.context)

    def _resume_writing(self) -> None:
        if not self.is_gone and not self._is_writing_paused:
            cast(asyncio.Protocol, self._protocol).resume_writing()
        self._finish_closing()

    def lose_soon(self, error: Exception | None) -> None:
        """Tell the protocol, in its process, that the connection is gone."""
        self._loop.call_soon(self.lose, error, context=self.process.context)

    def lose(self, error: Exception | None) -> None:
        """The connection is gone."""
        if self.is_gone:
            return
        self.is_gone = self._is_closing = True
        self._inbox.clear()
        self._unsent.clear()
        if self._protocol is not None:
            self._protocol.connection_lost(error)
        self._connection.forget()

    def die(self, *, silent: bool) -> None:
        """The process is dead."""
        if self.is_gone:
            return
        self.is_gone = True
        self._inbox.clear()
        self._unsent.clear()
        if silent:
            self._loop.call_later(UNACKNOWLEDGED_S, self._missed, context=_OUTSIDE)
        else:
            self.stream.send("reset")
        self._connection.forget()

    def _missed(self) -> None:
        """The other side's kernel has asked for long whether anybody is there."""
        other = self._connection.ends[1 - self._number]
        if not other.is_gone:
            other.lose_soon(TimeoutError("no answer"))

    # --- asyncio.Transport ----------------------------------------------

    def write(self, data: Any) -> None:
        """Hand bytes to the kernel; what it does not take waits, and the protocol is told."""
        self.writelines([data])

    def writelines(self, list_of_data: Any) -> None:
        """The same for several pieces."""
        if self.is_gone or self._is_closing:
            return
        data = b"".join(list_of_data)
        if not data:
            return
        stream = self.stream
        room = WINDOW_BYTES - stream.flying_bytes
        if self._unsent or room <= 0:
            self._unsent.append(data)
        elif len(data) <= room:
            stream.send(data)
        else:
            stream.send(data[:room])
            self._unsent.append(data[room:])
        if self._unsent and not self._is_writing_paused:
            self._is_writing_paused = True
            cast(asyncio.Protocol, self._protocol).pause_writing()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Always 0: pause as soon as not everything was taken."""

    def get_write_buffer_size(self) -> int:
        """Bytes that the kernel has not taken."""
        return sum(map(len, self._unsent))

    def pause_reading(self) -> None:
        """Hand nothing over until `resume_reading`."""
        self._is_reading_paused = True

    def resume_reading(self) -> None:
        """Go on."""
        self._is_reading_paused = False
        self._receive_soon()

    def is_reading(self) -> bool:
        """Whether what arrives is handed over."""
        return not self._is_reading_paused and not self._is_closing

    def is_closing(self) -> bool:
        """Whether `close` or `abort` was called, or the connection is lost."""
        return self._is_closing

    def close(self) -> None:
        """Send what waits, then end."""
        if self._is_closing:
            return
        self._is_closing = True
        self._finish_closing()

    def _finish_closing(self) -> None:
        if self._is_closing and not self.is_gone and not self._unsent:
            self.stream.send("fin")
            self.lose_soon(None)

    def abort(self) -> None:
        """End now."""
        if self.is_gone:
            return
        if not self._is_closing or self._unsent:
            self.stream.send("reset")
        self._is_closing = True
        self._unsent.clear()
        self.lose_soon(None)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Only who is at the other end."""
        if name == "peername":
            return self._connection.hosts[1 - self._number], 0
        return default

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Whom it serves."""
        assert self._protocol is not None
        return self._protocol


class SimListener:
    """See `Listener`."""

    def __init__(self, network: SimNetwork, address: Address, process: Process) -> None:
        self._network = network
        self._process = process
        self.address = address

    async def close(self) -> None:
        """Accept no more."""
        self._network.ignore(self.address, self._process)


class HostNetwork:
    """See `Network`: that of one process."""

    def __init__(self, network: SimNetwork, host: str, process: Process) -> None:
        self._network = network
        self._host = host
        self._process = process

    async def connect(self, address: Address, factory: Factory) -> None:
        """Connect. Raises Unreachable."""
        await self._network.connect(self._host, self._process, address, factory)

    async def listen(self, address: Address, factory: Factory) -> Listener:
        """Accept connections. Raises UsageError."""
        return SimListener(
            self._network, self._network.listen(self._host, self._process, address, factory), self._process
        )


_OUTSIDE = contextvars.Context()
"""Kernels and cables belong to no process."""
