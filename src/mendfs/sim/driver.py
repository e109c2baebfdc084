"""Operations on clients, driven from outside: whatever dies, whoever drives learns how far it came."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from mendfs.client.volume import Volume
from mendfs.errors import MendfsError, OperationError
from mendfs.sim.machines import ClientMachine
from mendfs.sim.scenario import Simulation
from mendfs.world import World

CALL_S_MAX = 400.0
"""An operation that takes longer hangs: every fault ends within a minute, every deadline within two."""


class Outcome(msgspec.Struct, frozen=True):
    """How an operation ended."""

    value: Any = None
    error: MendfsError | None = None
    has_died: bool = False
    """The client did, so nobody knows."""

    @property
    def is_ok(self) -> bool:
        """It was answered, without an error."""
        return self.error is None and not self.has_died

    @property
    def errno(self) -> int:
        """What POSIX calls the refusal; 0 if it is none of those: then it may or may not have been done."""
        return self.error.errno if isinstance(self.error, OperationError) else 0

    @property
    def is_unknown(self) -> bool:
        """It may or may not have been done."""
        return self.has_died or (self.error is not None and not self.errno)

    def __str__(self) -> str:
        return "died" if self.has_died else "ok" if self.error is None else f"{type(self.error).__name__} {self.error}"


class Driver:
    """Calls operations in client processes, counts them, and keeps what went wrong."""

    def __init__(self, sim: Simulation, clients: int, *, restart_after_s: float = 3.0) -> None:
        self.sim = sim
        self.restart_after_s = restart_after_s
        self.acknowledged = 0
        self.refused = 0
        self.unknown = 0
        self.violations: list[str] = []
        self._gone: dict[int, asyncio.Future[None]] = {}
        self.clients = [self._client(number) for number in range(clients)]

    def _client(self, number: int) -> ClientMachine:
        async def work(volume: Volume, world: World) -> None:
            await asyncio.get_running_loop().create_future()

        return self.sim.client(f"client{number}", work, open_timeout_s=60.0, **_CLIENT_OPTIONS)

    def violation(self, text: str) -> None:
        """A promise was broken."""
        self.sim.trace.say(f"VIOLATION: {text}")
        self.violations.append(f"{self.sim.loop.time():.3f} {text}")

    async def ready(self, client: ClientMachine) -> Volume:
        """Wait until the client has its volume open."""
        while not (client.is_running and client.volume is not None and client.process is client.opened_by):
            await asyncio.sleep(0.2)
        return client.volume

    async def call(
        self, client: ClientMachine, what: str, work: Callable[[Volume], Awaitable[Any]], *, expect_life: object = None
    ) -> Outcome:
        """Run `work(volume)` in the client's process; with `expect_life` only if it is still that process."""
        volume = await self.ready(client)
        process = client.process
        assert process is not None
        if expect_life is not None and process is not expect_life:
            return Outcome(has_died=True)
        loop, trace = self.sim.loop, self.sim.trace
        done: asyncio.Future[Outcome] = loop.create_future()

        async def inside() -> None:
            try:
                outcome = Outcome(await work(volume))
            except MendfsError as error:
                outcome = Outcome(error=error)
            except Exception as error:
                if not loop.is_closed():  # else it is only being ended, with the run
                    self.sim.problems.append(f"{what} raised {error!r}")
                raise
            if not done.done():
                done.set_result(outcome)

        trace.say(f"{client.name}: {what}")
        begun_s = loop.time()
        loop.start(process, inside())
        gone = client.gone_of(process)
        both: list[asyncio.Future[Any]] = [done, gone]
        while True:
            await asyncio.wait(both, timeout=CALL_S_MAX, return_when=asyncio.FIRST_COMPLETED)
            if done.done() or gone.done():
                break
            self.violation(f"{client.name}: {what} has not ended for {loop.time() - begun_s:.0f} s")
        outcome = done.result() if done.done() else Outcome(has_died=True)
        if outcome.is_ok:
            self.acknowledged += 1
        elif outcome.errno:
            self.refused += 1
        else:
            self.unknown += 1
        trace.say(f"{client.name}: {what}: {outcome}")
        return outcome


_CLIENT_OPTIONS: dict[str, Any] = {
    "dirty_bytes_max": 1 << 20,
    "cache_bytes_max": 1 << 20,
    "meta_timeout_s": 60.0,
    "read_timeout_s": 20.0,
}
