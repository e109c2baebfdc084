"""What a running meta server holds in memory: a cache of the engine, and who is connected."""

import asyncio

import structlog

from mendfs.errors import EngineFailed, EngineUnreadable, MendfsError, NotReady
from mendfs.kv.engine import Engine
from mendfs.meta import schema, volume
from mendfs.meta.members import Decision, Member, Members
from mendfs.meta.room import Room
from mendfs.meta.rounds import Rounds
from mendfs.meta.sessions import Session, Sessions
from mendfs.model import Epoch, Generation, ServerNumber, SessionId, Table, Volume
from mendfs.placement import Candidate, first_table
from mendfs.wire.messages import data as data_messages
from mendfs.wire.messages.session import TableChanged
from mendfs.wire.peer import Peer
from mendfs.world import World

log = structlog.get_logger("meta")

DATA_CALL_S = 5.0
"""How long a data server may take for a sync or a delete before the round goes on without it."""


class State:
    """Shared by the request handlers and the background loops; everything in it may be lost at any moment."""

    def __init__(self, world: World, engine: Engine, parameters: Volume, generation: Generation) -> None:
        self.world = world
        self.engine = engine
        self.volume = parameters
        self.generation = generation
        self.sessions = Sessions()
        self.members = Members()
        self.table: Table | None = None
        self.data_peers: dict[ServerNumber, Peer] = {}
        self.troubles: dict[str, str] = {}
        """One line each, by topic: what is wrong and what to do. Shown by `status`."""
        self.room = Room()
        self.rounds = Rounds()
        self.sync_since_s: float | None = None
        """Since when the log's sync has been waited for."""
        self.grace_until_s = 0.0
        self.work = asyncio.Event()
        """Set when there is something to free or to cut."""
        self.failed: asyncio.Future[MendfsError] = asyncio.get_running_loop().create_future()
        """Done when the engine failed: the process must end, for nothing it answers would last."""

    @property
    def epoch(self) -> Epoch:
        """The table's epoch, 0 before there is one."""
        return Epoch(0) if self.table is None else self.table.epoch

    def fail(self, error: MendfsError) -> None:
        """The engine cannot be trusted any more, or the background work has ended: this life of the server is over."""
        if not self.failed.done():
            log.error("the meta server stops", reason=str(error))
            self.failed.set_result(error)

    @property
    def awaited(self) -> str:
        """What a new volume waits for before it has a table, in one line."""
        return (
            f"the volume waits for its data servers: {len(self.members)} of {self.volume.server_count} have registered"
        )

    def unreadable(self, error: EngineUnreadable) -> None:
        """Something stored cannot be read: who asked is told, everybody else goes on."""
        if self.troubles.get("unreadable") != str(error):
            log.error("metadata cannot be read", reason=str(error))
        self.troubles["unreadable"] = str(error)

    def stopped(self) -> EngineFailed | None:
        """What clients are told once this life is over."""
        if not self.failed.done():
            return None
        return EngineFailed(f"the meta server stopped: {self.failed.result()}")

    def need_table(self) -> Table:
        """The table. Raises NotReady until enough data servers have registered."""
        if self.table is None:
            raise NotReady(self.awaited)
        return self.table

    async def make_table(self) -> None:
        """The first table, once enough servers are known."""
        if self.table is not None or len(self.members) < self.volume.server_count:
            return
        candidates = [Candidate(member.number, member.zone) for member in self.members]
        rows = first_table(
            self.volume.layout, candidates, replicas=self.volume.replicas, partitions=self.volume.partitions
        )
        self.table = await volume.write_first_table(self.engine, rows)
        log.info("placement table made", partitions=len(rows), servers=len(candidates))

    async def load(self, at_s: float, lease_s: float) -> None:
        """Read what is known from before: servers, table, sessions; begin the grace in which nothing is freed."""
        for number, record in (await volume.read_servers(self.engine)).items():
            self.members.add(
                Member(number=number, id=record.id, address=record.address, zone=record.zone, draining=record.draining)
            )
        self.table = await volume.read_table(self.engine)
        begin, end = schema.all_of(schema.Kind.SESSION)
        while found := await self.engine.begin().range(begin, end, limit=1000):
            for key, raw in found:
                record_of = schema.SESSION.decode(raw)
                session = Session(SessionId(schema.number_in(key)), record_of.client, at_s + lease_s)
                self.sessions.add(session)
            begin = found[-1][0] + b"\0"
        self.grace_until_s = at_s + lease_s if len(self.sessions) else at_s

    def in_grace(self, at_s: float) -> bool:
        """Whether sessions from before the start may still come back and say what they have open."""
        return at_s < self.grace_until_s and not self.sessions.all_reclaimed()

    async def act(self, decision: Decision) -> None:
        """Perform what the members decided."""
        if decision.raise_epoch and self.table is not None:
            self.table = Table(await volume.raise_epoch(self.engine), self.table.rows)
        if decision.publish:
            changed = TableChanged(self.table if decision.raise_epoch else None, self.members.views())
            for session in self.sessions.all():
                if session.peer is not None and not session.peer.is_closed:
                    session.peer.push(changed)

    async def sync_data(self) -> bool:
        """Sync every data server that is up. False if one that is up did not: what follows must not count on it."""
        numbers = [member.number for member in self.members if member.state() in ("up", "draining")]
        results = await asyncio.gather(*(self._sync_one(number) for number in numbers))
        return all(results)

    async def _sync_one(self, number: ServerNumber) -> bool:
        peer = self.data_peers.get(number)
        if peer is None:
            return False
        try:
            await peer.call(data_messages.SyncStore(), deadline_s=DATA_CALL_S)
        except MendfsError as error:
            log.warning("data server did not sync", server=number, error=str(error))
            return False
        return True

    async def sync_log(self) -> None:
        """Sync the engine; if it fails, the server fails."""
        began_s = asyncio.get_running_loop().time()
        if self.sync_since_s is None:
            self.sync_since_s = began_s
        try:
            await self.engine.sync()
        except EngineFailed as error:
            self.fail(error)
            raise
        finally:
            # Whoever began later shares a later sync: the age counts from the first that is still waited for.
            if self.sync_since_s == began_s:
                self.sync_since_s = None
