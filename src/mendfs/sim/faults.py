"""What breaks in a run, and when: a plan drawn from the seed, so that it can be replayed, and shortened.

A plan leaves what the promises assume. One data server, the weak one, is where things go wrong for good: rotten bits,
failing disks. Everything else recovers: processes start again, links heal, machines get their power back.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

import msgspec

from mendfs.sim.machines import DataMachine, Machine
from mendfs.sim.scenario import Simulation

MOMENT_S_MAX = 5.0
"""A fault that waits for its moment happens after this anyway."""
DURATION_S_MAX = 30.0
"""Longest that anything stays broken."""


class Fault(msgspec.Struct, frozen=True):
    """One fault. `at_s` counts from the beginning of the workload; `draw` decides whatever else is to be decided."""

    at_s: float
    kind: str
    target: str
    other: str = ""
    """The other end, of a link's faults."""
    duration_s: float = 0.0
    draw: int = 0
    moment: str = "now"
    """now; sending: when the target next sends something, which is lost; written: when its disk has done something;
    synced: when an application was told that what it has written is durable."""

    def __str__(self) -> str:
        link = f" - {self.other}" if self.other else ""
        moment = "" if self.moment == "now" else f" when {self.moment}"
        return f"{self.at_s:.1f} s: {self.kind} {self.target}{link}{moment} for {self.duration_s:.1f} s"


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Which faults, and how often."""

    weights: dict[str, float]
    every_s: float = 12.0
    is_ruinous: bool = False
    """Good copies may be lost: only promise 2 is checked."""


_PLAIN = {
    "kill": 6.0,
    "kill_meta": 3.0,
    "kill_client": 3.0,
    "pause": 3.0,
    "pause_meta": 1.0,
    "pause_client": 1.0,
    "power": 3.0,
    "power_meta": 2.0,
    "power_all": 1.0,
    "cut": 3.0,
    "cut_one_way": 3.0,
    "slow": 2.0,
    "reset": 4.0,
    "half_open": 3.0,
    "hang": 2.0,
    "full": 2.0,
    "write_errors": 2.0,
    "sync_error": 3.0,
    "read_errors": 2.0,
    "rot": 3.0,
}

PROFILES: dict[str, Profile] = {
    "mixed": Profile(weights=_PLAIN),
    "crashes": Profile(weights={name: _PLAIN[name] for name in _PLAIN if name.startswith(("kill", "power", "sync"))}),
    "network": Profile(weights={name: _PLAIN[name] for name in ("cut", "cut_one_way", "slow", "reset", "half_open")}),
    "disks": Profile(
        weights={name: _PLAIN[name] for name in ("hang", "full", "write_errors", "sync_error", "read_errors", "rot")}
    ),
    "calm": Profile(weights={"slow": 1.0}, every_s=60.0),
    "ruin": Profile(weights={**_PLAIN, "rot_any": 6.0, "read_errors_any": 2.0}, every_s=8.0, is_ruinous=True),
}


def draw_plan(profile: Profile, rng: random.Random, *, servers: int, clients: int, seconds: float) -> list[Fault]:
    """A plan for a run of `seconds`."""
    plan: list[Fault] = []
    weak = rng.randrange(servers)
    kinds, weights = list(profile.weights), list(profile.weights.values())
    at_s = rng.uniform(1, 5)
    while at_s < seconds:
        kind = rng.choices(kinds, weights)[0]
        any_server = f"data{rng.randrange(servers)}"
        target, other = any_server, ""
        base = kind.removesuffix("_any")
        if kind.endswith("_meta"):
            target = "meta"
        elif kind == "power_all":
            target = "all"
        elif kind.endswith("_client"):
            target = f"client{rng.randrange(clients)}"
        elif kind in ("cut", "cut_one_way", "slow", "reset", "half_open"):
            hosts = ["meta", *(f"data{n}" for n in range(servers)), *(f"client{n}" for n in range(clients))]
            target, other = rng.sample(hosts, 2)
        elif kind in ("rot", "sync_error", "read_errors"):
            target = f"data{weak}"
        duration_s = min(DURATION_S_MAX, rng.expovariate(1 / 6))
        moments = ["now"]
        if base.startswith(("kill", "power", "reset", "half_open")):
            moments = ["now", "sending", "sending", "written"]
        if base.startswith("power"):
            moments += ["synced", "synced"]
        moment = rng.choice(moments)
        if base in ("reset", "half_open") and moment != "now":
            # What is lost matters most on the way from the meta server: an answer to a change that was made.
            moment, target = "sending", rng.choice(["meta", "meta", target])
        plan.append(Fault(round(at_s, 3), base, target, other, round(duration_s, 3), rng.getrandbits(32), moment))
        at_s += rng.expovariate(1 / profile.every_s)
    return plan


class Losses(msgspec.Struct):
    """Whom to tell what was lost."""

    meta_lost: Callable[[], None]
    server_lost: Callable[[str], None]
    server_damaged: Callable[[str], None]
    server_unreadable: Callable[[str], None]


class Breaker:
    """Performs a plan."""

    def __init__(self, sim: Simulation, losses: Losses) -> None:
        self.count = 0
        self._sim = sim
        self._losses = losses
        self._tasks: list[asyncio.Task[None]] = []
        self._machines: dict[str, Machine] = {}

    async def run(self, plan: list[Fault]) -> None:
        """All of it; returns when the last one was begun."""
        self._machines = {machine.name: machine for machine in [*self._sim.servers, *self._sim.clients]}
        begin_s = self._sim.loop.time()
        for fault in plan:
            await asyncio.sleep(max(0.0, begin_s + fault.at_s - self._sim.loop.time()))
            self._sim.trace.say(f"fault: {fault}")
            self.count += 1
            self._tasks.append(self._sim.loop.create_task(self._perform(fault)))

    async def stop(self) -> None:
        """Faults are over: whatever is broken and can be mended is."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._sim.trace.say("faults stop")
        self._sim.network.heal()
        for machine in self._machines.values():
            rules = machine.disk.rules
            rules.read_error_chance = rules.write_error_chance = rules.sync_error_chance = 0.0
            rules.is_full = False
            machine.disk.unhang()
            machine.resume()
            machine.start()

    async def _perform(self, fault: Fault) -> None:
        work: dict[str, Callable[[Fault], Awaitable[None]]] = {
            "kill": self._kill,
            "kill_meta": self._kill,
            "kill_client": self._kill,
            "pause": self._pause,
            "pause_meta": self._pause,
            "pause_client": self._pause,
            "power": self._power,
            "power_meta": self._power,
            "power_all": self._power_all,
            "cut": self._cut,
            "cut_one_way": self._cut,
            "slow": self._slow,
            "reset": self._reset,
            "half_open": self._reset,
            "hang": self._hang,
            "full": self._disk,
            "write_errors": self._disk,
            "read_errors": self._disk,
            "sync_error": self._disk,
            "rot": self._rot,
        }
        if fault.kind not in ("reset", "half_open"):
            await self._moment(fault)
        await work[fault.kind](fault)

    async def _moment(self, fault: Fault) -> None:
        """Wait for it, but not for ever."""
        if fault.moment == "now":
            return
        target = f"data{fault.draw % len(self._sim.data)}" if fault.target == "all" else fault.target
        come: asyncio.Future[None] = self._sim.loop.create_future()

        def happens(_: object = None) -> None:
            if not come.done():
                come.set_result(None)

        if fault.moment == "sending":
            self._sim.network.when_sending[target] = happens
        elif fault.moment == "synced":
            self._sim.when_synced.append(happens)
        else:
            self._machines[target].disk.when_written = happens
        await asyncio.wait([come], timeout=MOMENT_S_MAX)

    async def _kill(self, fault: Fault) -> None:
        self._machines[fault.target].kill()

    async def _pause(self, fault: Fault) -> None:
        machine = self._machines[fault.target]
        machine.pause()
        await asyncio.sleep(fault.duration_s)
        machine.resume()

    async def _power(self, fault: Fault) -> None:
        machine = self._machines[fault.target]
        if not machine.is_running:
            return
        self._cut_power(machine)
        await asyncio.sleep(fault.duration_s / 3)
        machine.start()

    async def _power_all(self, fault: Fault) -> None:
        servers = [machine for machine in self._sim.servers if machine.is_running]
        for machine in servers:
            self._cut_power(machine)
        await asyncio.sleep(fault.duration_s / 3)
        for machine in servers:
            machine.start()

    def _cut_power(self, machine: Machine) -> None:
        machine.cut_power()
        if machine is self._sim.meta:
            self._losses.meta_lost()
        elif isinstance(machine, DataMachine):
            self._losses.server_lost(machine.name)

    async def _cut(self, fault: Fault) -> None:
        network = self._sim.network
        links = [(fault.target, fault.other)]
        if fault.kind == "cut":
            links.append((fault.other, fault.target))
        for link in links:
            network.cut(*link)
        await asyncio.sleep(fault.duration_s)
        for link in links:
            network.heal(*link)

    async def _slow(self, fault: Fault) -> None:
        network = self._sim.network
        delay_s = 0.02 + (fault.draw % 1000) / 500
        for link in ((fault.target, fault.other), (fault.other, fault.target)):
            network.slow(*link, delay_s)
        await asyncio.sleep(fault.duration_s)
        for link in ((fault.target, fault.other), (fault.other, fault.target)):
            network.heal(*link)

    async def _reset(self, fault: Fault) -> None:
        network = self._sim.network
        rng = random.Random(fault.draw)
        if fault.moment == "sending":
            told = None if fault.kind == "reset" else rng.randrange(2)
            network.when_sending[fault.target] = lambda connection: network.reset(connection, told=told)
            return
        hosts = {fault.target, fault.other}
        found = [each for each in network.connections if set(each.hosts) == hosts] or list(network.connections)
        if found:
            network.reset(rng.choice(found), told=None if fault.kind == "reset" else rng.randrange(2))

    async def _hang(self, fault: Fault) -> None:
        disk = self._machines[fault.target].disk
        disk.hang()
        await asyncio.sleep(fault.duration_s)
        disk.unhang()

    async def _disk(self, fault: Fault) -> None:
        rules = self._machines[fault.target].disk.rules
        chance = 0.02 + (fault.draw % 100) / 200
        if fault.kind == "full":
            rules.is_full = True
        elif fault.kind == "write_errors":
            rules.write_error_chance = chance
        elif fault.kind == "read_errors":
            rules.read_error_chance = chance
            self._losses.server_unreadable(fault.target)
        else:
            rules.sync_error_chance = 0.5
            # What a failed sync drops is lost to this server as if its power had been cut.
            self._losses.server_damaged(fault.target)
        await asyncio.sleep(fault.duration_s)
        rules.is_full = False
        rules.write_error_chance = rules.read_error_chance = rules.sync_error_chance = 0.0

    async def _rot(self, fault: Fault) -> None:
        disk = self._machines[fault.target].disk
        rng = random.Random(fault.draw)
        segments = sorted(path for path, node in disk.nodes.items() if "/segments/" in path and node.content)
        self._losses.server_damaged(fault.target)
        self._losses.server_unreadable(fault.target)
        for _ in range(rng.choice([1, 3, 30])):
            if segments:
                path = rng.choice(segments)
                disk.flip(path, rng.randrange(8 * len(disk.nodes[path].content)))
