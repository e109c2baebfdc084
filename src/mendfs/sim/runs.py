"""One run: a cluster, a workload, faults, and the promises checked at the end. The same seed gives the same run."""

import asyncio
import random
import stat
import time

import msgspec
import structlog

from mendfs.client import ids
from mendfs.client.ids import FETCH_BELOW
from mendfs.client.volume import Volume
from mendfs.errors import MendfsError
from mendfs.kv.optimistic import Pairs
from mendfs.meta import ranges, schema
from mendfs.model import Attributes, Inode
from mendfs.promises import check_metadata
from mendfs.sim import audit
from mendfs.sim.drills.run import draw_drills, run_drills
from mendfs.sim.driver import Driver
from mendfs.sim.faults import PROFILES, Breaker, Fault, Losses, Profile, draw_plan
from mendfs.sim.file_session import files_actor
from mendfs.sim.machines import ClientMachine
from mendfs.sim.scenario import Shape, Simulation
from mendfs.sim.sharing import Appends, Replaced, race_for_names, use_unlinked_files
from mendfs.sim.tree_actor import TreeActor
from mendfs.sim.workload import Workload

CLIENTS = 3
SETTLE_S = 60.0
"""After the faults: every lease, deadline and grace has passed."""
FREED_WITHIN_S, FREED_STEP_S = 120, 5
"""How long what is free may wait for its freeing after that, and how often it is looked."""
QUEUES = (schema.Kind.CUTTING, schema.Kind.UNLINKED, schema.Kind.DROP, schema.Kind.DEAD)


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a run."""

    seed: int
    profile: str
    simulated_s: float
    real_s: float
    steps: int
    acknowledged: int
    refused: int
    unknown: int
    faults: int
    digest: str
    failures: tuple[str, ...]
    plan: tuple[Fault, ...]
    trace: tuple[str, ...] = ()

    @property
    def is_ok(self) -> bool:
        """No promise was broken."""
        return not self.failures


class Run:
    """One run in the making."""

    def __init__(self, seed: int, profile: Profile, seconds: float, *, keep_trace: bool) -> None:
        self.sim = Simulation(seed, draw_shape(random.Random(seed)), keep_trace=keep_trace)
        draw_speeds(self.sim, random.Random(self.sim.rng.getrandbits(64)))
        self.profile = profile
        self.seconds = seconds
        self.damaged: set[str] = set()
        self.driver: Driver
        self.workload: Workload
        self.breaker: Breaker
        self.plan: list[Fault] = []
        self.appends: Appends
        self.replaced: list[Replaced] = []
        self.tree: TreeActor

    async def main(self, plan: list[Fault] | None) -> None:
        """All of it."""
        sim = self.sim
        rng = random.Random(sim.rng.getrandbits(64))
        plan_rng = random.Random(sim.rng.getrandbits(64))
        self.driver = driver = Driver(sim, CLIENTS)
        sim.report_to(driver.violation)
        workload = self.workload = Workload(driver, rng)
        self.breaker = Breaker(
            sim, Losses(workload.meta_lost, self._server_lost, self._server_damaged, self._server_unreadable)
        )
        workload.may_lose_all = self.profile.is_ruinous
        await workload.begin()
        drawn = draw_plan(
            self.profile, plan_rng, servers=sim.shape.servers, clients=CLIENTS, seconds=self.seconds - 40.0
        )
        self.plan = drawn if plan is None else plan
        self.appends = Appends(workload)
        self.replaced = [
            Replaced(workload, b"config", by_rename=True),
            Replaced(workload, b"rewritten", by_rename=False),
        ]
        self.tree = TreeActor(workload)
        workload.on_meta_lost = [self.tree.meta_lost, *(each.meta_lost for each in self.replaced)]
        actors = [
            *(workload.names_actor() for _ in range(2)),
            *(files_actor(workload) for _ in range(3)),
            *(self.appends.actor() for _ in range(2)),
            *(each.writer() for each in self.replaced),
            *(each.reader() for each in self.replaced),
            race_for_names(workload),
            use_unlinked_files(workload),
            self.tree.actor(),
        ]
        tasks = [sim.loop.create_task(actor) for actor in actors]
        breaking = sim.loop.create_task(self.breaker.run(self.plan))
        await asyncio.sleep(self.seconds)
        await breaking
        workload.is_over = True
        await self.breaker.stop()
        _, late = await asyncio.wait(tasks, timeout=600.0)
        if late:
            driver.violation(f"{len(late)} actors have not ended 600 s after the faults")
            return
        for task in tasks:
            task.result()
        await asyncio.sleep(SETTLE_S)
        await self._check()
        if not self.profile.is_ruinous:
            drills_rng = random.Random(sim.rng.getrandbits(64))
            await run_drills(sim, driver.violation, drills_rng, draw_drills(drills_rng))

    def _server_lost(self, server: str) -> None:
        self.workload.server_lost(server, quorum=self._quorum())

    def _server_damaged(self, server: str) -> None:
        self.damaged.add(server)
        self.workload.server_lost(server, quorum=self._quorum())

    def _server_unreadable(self, server: str) -> None:
        """It may not find what it has: nothing is expected of it any more."""
        next(machine for machine in self.sim.data if machine.name == server).audit.is_excused = True

    def _quorum(self) -> int:
        """Servers that must lose an unsynced block before it may be nowhere; a damaged one counts for lost."""
        return max(1, self.sim.shape.write_quorum - (1 if self.damaged else 0))

    async def _check(self) -> None:
        """Everything that the model is sure of, seen by a client that has nothing cached."""
        sim, workload = self.sim, self.workload
        if self.profile.is_ruinous:
            return
        checker = Driver(sim, 0)
        checker.violations = self.driver.violations
        workload.driver = checker
        client = self.driver.clients[0]
        client.kill(restart=False)
        client.start()
        for name in workload.names:
            if not await workload.resolve_name(client, name) and name.candidates:
                self.driver.violation(f"name {name.name!r} cannot be looked up")
        await self._check_names(client)
        for file in {id(name.value.file): name.value.file for name in workload.names}.values():
            if file is not None:
                await workload.check_content(client, file, adopt=False, final=True)
        await self.appends.check(client)
        await self.tree.check(client)
        for each in self.replaced:
            await each.check(client, final=True)
        await self._check_freed()
        for problem in check_metadata(self._pairs(b"\0\xff", b"\xff")):
            self.driver.violation(problem)
        for machine in sim.data:
            machine.audit.check_inventory()

    def _pairs(self, begin: bytes, end: bytes) -> Pairs:
        engine = self.sim.meta.engine
        assert engine is not None, "it was started"
        return engine.read_range(begin, end, 1 << 30, False)

    async def _check_freed(self) -> None:
        """Nothing waits to be freed for ever: no session has anything unlinked open any more."""
        left: list[bytes] = []
        for _ in range(FREED_WITHIN_S // FREED_STEP_S):
            left = [key for kind in QUEUES for key, _ in self._pairs(*schema.all_of(kind))]
            if not left:
                return
            await asyncio.sleep(FREED_STEP_S)
        self.driver.violation(f"{len(left)} keys wait to be freed {FREED_WITHIN_S} s after everything, as {left[0]!r}")

    async def _check_names(self, client: ClientMachine) -> None:
        workload = self.workload

        async def walk(volume: Volume) -> list[list[tuple[bytes, Attributes]]]:
            found = []
            for directory in workload.directories:
                listing = await volume.list_directory(Inode(directory), b"", 1000, True)
                found.append([(entry.name, entry.attributes) for entry in listing.entries if entry.attributes])
            return found

        outcome = await workload.call(client, "walk", walk)
        if not outcome.is_ok:
            self.driver.violation(f"the tree cannot be walked: {outcome}")
            return
        links: dict[int, int] = {}
        seen: dict[int, Attributes] = {}
        for number, entries in enumerate(outcome.value):
            there = {raw: attributes for raw, attributes in entries if raw.startswith(b"n")}
            for name in (name for name in workload.names if name.directory == number):
                workload.match(name, there.pop(name.name, None))
            for raw in there:
                self.driver.violation(f"a name that nobody made: {raw!r} in directory {number}")
            for _, attributes in entries:
                if not stat.S_ISDIR(attributes.mode):
                    links[attributes.inode] = links.get(attributes.inode, 0) + 1
                    seen[attributes.inode] = attributes
        for inode, count in links.items():
            if seen[inode].nlink != count:
                self.driver.violation(f"inode {inode} has {count} names and a link count of {seen[inode].nlink}")


def draw_shape(rng: random.Random) -> Shape:
    """Mostly the usual cluster, now and then another one."""
    if rng.random() < 0.6:
        return Shape()
    servers = rng.choice([3, 4, 5])
    return Shape(
        servers=servers,
        partitions=4 * servers,
        block_size=rng.choice([512, 4096, 8192, 65536]),
        page_size=512,
        checksum=rng.choice(["xxh3", "blake3"]),
        layout=rng.choice(["ring", "spread"]),
    )


def draw_speeds(sim: Simulation, rng: random.Random) -> None:
    """Some clusters are fast, others far apart or busy: what is slow is more often hit in the middle."""
    rules = sim.network.rules
    rules.delay_max_s = rng.choice([0.000_5, 0.005, 0.03])
    rules.slow_chance = rng.choice([0.0, 0.005, 0.03])
    for machine in sim.servers:
        machine.disk.rules.delay_max_s = rng.choice([0.000_5, 0.005, 0.05])
        machine.disk.rules.slow_chance = rng.choice([0.0, 0.01, 0.05])


def draw_ranges(rng: random.Random) -> None:
    """Ranges of ids are short in most runs, so that they run out all the time."""
    bits = rng.choice([3, 5, 10])
    for module in (schema, ranges, audit):
        module.RANGE_BITS = bits  # type: ignore[attr-defined] # each has imported the constant under this name
    ranges.RANGE_IDS = 1 << bits  # type: ignore[attr-defined] # as above
    # In the same proportion to a range as it is for users, mostly. The whole number is more than a session may hold of
    # short ranges, so its clients ask for more and are refused five times a second: a fifth of all that happens in such
    # a run, and the same each time.
    ids.FETCH_BELOW = FETCH_BELOW if rng.random() < 0.2 else 1 << bits >> 2


def simulate(
    seed: int,
    *,
    profile: str = "mixed",
    seconds: float = 600.0,
    plan: list[Fault] | None = None,
    keep_trace: bool = False,
) -> Report:
    """Run one seed. `plan` replaces the faults that the seed would draw."""
    draw_ranges(random.Random(seed))
    run = Run(seed, PROFILES[profile], seconds, keep_trace=keep_trace)
    sim = run.sim
    structlog.configure(processors=[sim.trace.log], cache_logger_on_first_use=False)
    begun_s = time.perf_counter()
    failures: list[str] = []
    with sim:
        try:
            sim.run(run.main(plan))
        except Exception as error:
            failures.append(f"the run ended with {error!r}")
    workload = getattr(run, "driver", None)
    failures += workload.violations if workload is not None else []
    failures += sim.problems
    # An error of ours that nobody waited for is told in health, or to the next who asks.
    unseen = [problem for problem in sim.loop.problems if not isinstance(problem.get("exception"), MendfsError)]
    failures += [f"{problem.get('message')}: {problem.get('exception')!r}" for problem in unseen]
    return Report(
        seed=seed,
        profile=profile,
        simulated_s=sim.loop.time() - 1000.0,
        real_s=time.perf_counter() - begun_s,
        steps=sim.loop.steps,
        acknowledged=run.driver.acknowledged,
        refused=run.driver.refused,
        unknown=run.driver.unknown,
        faults=run.breaker.count,
        digest=sim.trace.digest(),
        failures=tuple(failures),
        plan=tuple(run.plan),
        trace=tuple(sim.trace.lines),
    )
