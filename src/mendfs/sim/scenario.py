"""A cluster in one process: its machines, network, time and trace.

with Simulation(seed=1) as sim:
    sim.run(my_test(sim))
"""

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from mendfs.client.volume import Volume
from mendfs.model import KiB
from mendfs.model import Volume as Parameters
from mendfs.sim.cluster_audit import ClusterAudit
from mendfs.sim.loop import SimLoop
from mendfs.sim.machines import ClientMachine, DataMachine, Machine, MetaMachine
from mendfs.sim.network import SimNetwork
from mendfs.sim.trace import Trace
from mendfs.world import World

Result = TypeVar("Result")


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """What a cluster is made of."""

    servers: int = 4
    replicas: int = 3
    write_quorum: int = 2
    read_quorum: int = 1
    block_size: int = 8 * KiB
    page_size: int = 1 * KiB
    partitions: int = 16
    checksum: str = "xxh3"
    layout: str = "ring"


class Simulation:
    """One run."""

    def __init__(self, seed: int, shape: Shape | None = None, *, keep_trace: bool = False) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.shape = shape or Shape()
        self.loop = SimLoop()  # type: ignore[abstract] # what nobody calls is not there
        self.trace = Trace(self.loop.time, keep=keep_trace)
        self.network = SimNetwork(self.loop, random.Random(self.rng.getrandbits(64)))
        self.secret = b"simulated secret"
        self.problems: list[str] = []
        """Mistakes of ours that came up: any is a failure of the run."""
        shape_now = self.shape
        self.meta = MetaMachine(
            self,
            Parameters(
                id=f"{self.rng.getrandbits(128):032x}",
                block_size=shape_now.block_size,
                page_size=shape_now.page_size,
                replicas=shape_now.replicas,
                partitions=shape_now.partitions,
                checksum=shape_now.checksum,  # type: ignore[arg-type] # a name from a profile; the volume checks it
                layout=shape_now.layout,  # type: ignore[arg-type] # as above
                write_quorum=shape_now.write_quorum,
                read_quorum=shape_now.read_quorum,
                server_count=shape_now.servers,
                created_ns=self.loop.now_ns(),
            ),
        )
        self.data = [DataMachine(self, number) for number in range(shape_now.servers)]
        self.clients: list[ClientMachine] = []
        self.when_synced: list[Callable[[], None]] = []
        """What happens as soon as the next fsync was answered."""
        self.audit = ClusterAudit(self.meta, self.data, shape_now.write_quorum)
        self._auditing = self.audit.watching_stores()

    def __enter__(self) -> "Simulation":
        self._auditing.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._auditing.__exit__(None, None, None)
        self.loop.close()

    def report_to(self, violation: Callable[[str], None]) -> None:
        """Where every broken rule is told that is seen from outside."""
        self.audit.violation = violation
        for machine in self.servers:
            machine.violation = violation
        if self.meta.engine is not None:
            self.meta.engine.violation = violation

    @property
    def servers(self) -> list[Machine]:
        """All machines but the clients'."""
        return [self.meta, *self.data]

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Start the servers and run `work` to its end."""
        for machine in self.servers:
            machine.start()
        result: Result = self.loop.run_until_complete(self.loop.create_task(work))
        return result

    def fsynced(self) -> None:
        """An application was told that what it has written is durable."""
        happens, self.when_synced = self.when_synced, []
        for each in happens:
            each()

    def client(self, name: str, work: Any, **options: Any) -> ClientMachine:
        """A client that opens the volume and then runs `work(volume, world)`."""
        machine = ClientMachine(self, name, work, options=options)
        self.clients.append(machine)
        machine.start()
        return machine

    async def open(self, name: str = "client", **options: Any) -> Volume:
        """A client's open volume, for tests that drive it from outside."""
        opened: asyncio.Future[Volume] = self.loop.create_future()

        async def work(volume: Volume, world: World) -> None:
            opened.set_result(volume)
            await self.loop.create_future()

        self.client(name, work, **options)
        return await opened
