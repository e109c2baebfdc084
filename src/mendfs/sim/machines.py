"""Machines of a simulated cluster: a host name, a disk, and the process that runs there and is started again."""

import asyncio
import contextvars
import random
from collections.abc import Callable
from typing import Any, Protocol

from mendfs.client.volume import Volume, VolumeOptions
from mendfs.data.server import DataOptions, DataServer, start_data
from mendfs.errors import MendfsError
from mendfs.kv.engine import Engine
from mendfs.kv.memory import MemoryEngine
from mendfs.meta.server import MetaOptions, MetaServer, start_meta
from mendfs.meta.volume import format_volume, read_volume
from mendfs.model import KiB
from mendfs.model import Volume as Parameters
from mendfs.sim.audit import AuditedEngine
from mendfs.sim.cluster_audit import ClusterAudit
from mendfs.sim.disk import SimDisk
from mendfs.sim.loop import Process, SimLoop
from mendfs.sim.network import SimNetwork
from mendfs.sim.store_audit import StoreAudit
from mendfs.sim.trace import Trace
from mendfs.world import World

META_ADDRESS = "meta:1"
SEGMENT_BYTES = 256 * KiB
"""Small, so that a run of minutes has many."""
RESTART_MIN_S = 0.2
RESTART_MAX_S = 2.0
"""What a supervisor takes to notice that a process has ended, and to start it again."""


class Cluster(Protocol):
    """What machines need of the run that they are part of."""

    loop: SimLoop
    network: SimNetwork
    trace: Trace
    rng: random.Random
    secret: bytes
    problems: list[str]

    @property
    def audit(self) -> ClusterAudit:
        """Who sees all disks at once."""
        ...


class Machine:
    """A host with a disk; `serve` says what runs there."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.name = name
        self.cluster = cluster
        self.disk = SimDisk(cluster.loop, random.Random(cluster.rng.getrandbits(64)), name, cluster.trace.say)
        self.process: Process | None = None
        self.processes: list[Process] = []
        """All there ever were: nothing of them may be collected during the run."""
        self.is_wanted = False
        """Whether a supervisor would start it again."""
        self.violation: Callable[[str], None] = cluster.problems.append
        """Told of every broken rule that is seen from outside."""
        self._gone_futures: dict[Process, asyncio.Future[None]] = {}

    async def serve(self, world: World) -> MendfsError | None:
        """Run until there is nothing left to do; returns why."""
        raise NotImplementedError

    @property
    def is_running(self) -> bool:
        """Whether there is a process, be it paused."""
        return self.process is not None and self.process.is_alive

    def start(self) -> None:
        """Start the process, unless it runs."""
        self.is_wanted = True
        if self.is_running:
            return
        cluster = self.cluster
        process = self.process = Process(self.name)
        self.processes.append(process)
        cluster.network.power_on(self.name)
        cluster.trace.say(f"{self.name} starts")
        world = World(
            cluster.network.at(self.name, process),
            self.disk.at(process),
            random.Random(cluster.rng.getrandbits(64)),
            cluster.loop.now_ns,
            pid=len(self.processes),
        )
        cluster.loop.start(process, self._life(process, world))

    async def _life(self, process: Process, world: World) -> None:
        reason: object
        try:
            reason = await self.serve(world)
        except MendfsError as error:
            reason = error
        except Exception as error:
            if not self.cluster.loop.is_closed():  # else it is only being ended, with the run
                self.cluster.problems.append(f"{self.name} died of {error!r}")
                self.cluster.trace.say(f"{self.name} died of {error!r}")
            raise
        self.cluster.trace.say(f"{self.name} ends: {reason}")
        # Outside the process, which is over with that.
        self.cluster.loop.call_soon(self._ended, process, context=contextvars.Context())

    def _ended(self, process: Process) -> None:
        if process is self.process:
            self.kill(told=False)

    def kill(self, *, told: bool = True, restart: bool = True) -> None:
        """kill -9. It is started again soon, if a supervisor would."""
        if self.process is None or not self.process.is_alive:
            return
        if told:
            self.cluster.trace.say(f"{self.name} is killed")
        self._gone(silent=False)
        if restart and self.is_wanted:
            self.restart_soon()

    def restart_soon(self) -> None:
        """As a supervisor would."""
        delay_s = self.cluster.rng.uniform(RESTART_MIN_S, RESTART_MAX_S)
        self.cluster.loop.call_later(delay_s, self._start_again, context=contextvars.Context())

    def _start_again(self) -> None:
        if self.is_wanted:
            self.start()

    def cut_power(self) -> None:
        """The machine stops: its disk forgets what was not synced, its connections learn nothing."""
        self.cluster.trace.say(f"{self.name} loses power")
        self.cluster.network.power_off(self.name)
        self._gone(silent=True)
        self.disk.lose_power()
        self.power_lost()
        self.is_wanted = False

    def power_lost(self) -> None:
        """What was not synced is gone: for whoever keeps count."""

    def gone_of(self, process: Process) -> "asyncio.Future[None]":
        """Done when that process is dead."""
        future = self._gone_futures.get(process)
        if future is None:
            future = self._gone_futures[process] = self.cluster.loop.create_future()
            if not process.is_alive:
                future.set_result(None)
        return future

    def _gone(self, *, silent: bool) -> None:
        process = self.process
        if process is not None and process.is_alive:
            self.cluster.loop.kill(process)
            self.cluster.network.process_died(process, silent=silent)
            future = self.gone_of(process)
            if not future.done():
                future.set_result(None)

    def pause(self) -> None:
        """SIGSTOP."""
        if self.process is not None and self.process.is_alive:
            self.cluster.trace.say(f"{self.name} is paused")
            self.cluster.loop.pause(self.process)

    def resume(self) -> None:
        """SIGCONT."""
        if self.process is not None and self.process.is_paused:
            self.cluster.trace.say(f"{self.name} goes on")
            self.cluster.loop.resume(self.process)


class MetaMachine(Machine):
    """The meta server's."""

    server: MetaServer | None = None

    def __init__(self, cluster: Cluster, parameters: Parameters) -> None:
        super().__init__(cluster, "meta")
        self.engine: AuditedEngine | None = None
        """That of the newest process."""
        self._parameters = parameters

    async def serve(self, world: World) -> MendfsError | None:
        """Run a meta server; its volume is made first."""
        engine = await AuditedEngine.open(world.disk, "/meta/log")
        assert isinstance(engine, AuditedEngine), "open makes one of its own class"
        engine.violation, engine.nodes = self.violation, self.disk.nodes
        self.engine = engine
        self.cluster.audit.watch_metadata(engine)
        if await read_volume(engine) is None:
            await format_volume(engine, self._parameters, world)
        server = self.server = await start_meta(world, engine, MetaOptions(listen=META_ADDRESS), self.cluster.secret)
        reason = await server.state.failed
        await server.close()
        return reason


class DataMachine(Machine):
    """A data server's."""

    server: DataServer | None = None

    def __init__(self, cluster: Cluster, number: int) -> None:
        super().__init__(cluster, f"data{number}")
        self.number = number
        self.audit = StoreAudit(self.name, self.disk, self.violation)

    def power_lost(self) -> None:
        """Told to the audit."""
        self.audit.power_lost()

    async def serve(self, world: World) -> MendfsError | None:
        """Run a data server."""

        async def open_engine(path: str) -> Engine:
            return await MemoryEngine.open(world.disk, f"{path}/log")

        self.audit.process_ended()
        options = DataOptions(
            dir="/data",
            listen=f"{self.name}:1",
            meta=META_ADDRESS,
            zone=self.name,
            number=self.number,
            segment_bytes=SEGMENT_BYTES,
        )
        server = self.server = await start_data(world, open_engine, options, self.cluster.secret)
        reason = await server.failed
        await server.close()
        return reason


class ClientMachine(Machine):
    """A client's: opens the volume, then does what it is given, for as long as it lives."""

    def __init__(
        self, cluster: Cluster, name: str, work: Callable[[Volume, World], Any], *, options: dict[str, Any]
    ) -> None:
        super().__init__(cluster, name)
        self._work = work
        self._options = options
        self.volume: Volume | None = None
        self.opened_by: Process | None = None
        """The process whose volume it is."""

    async def serve(self, world: World) -> MendfsError | None:
        """Open the volume and work."""
        options = VolumeOptions(meta=META_ADDRESS, name=self.name, **self._options)
        volume = await Volume.open(world, options, self.cluster.secret)
        self.cluster.audit.watch_client(self.name, volume)
        self.volume, self.opened_by = volume, self.process
        await self._work(volume, world)
        return None
