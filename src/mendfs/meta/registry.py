"""Who is connected: clients' sessions, and data servers with their heartbeats. Handlers for their messages."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from mendfs.errors import MendfsError, NotAuthentic, SessionLost, Unreachable, UsageError
from mendfs.kv.engine import Transaction, run
from mendfs.meta import background, freeing, ranges, schema, volume
from mendfs.meta.members import Member
from mendfs.meta.sessions import LEASE_S, Session
from mendfs.meta.state import State
from mendfs.model import CommitSequence, Generation, Inode, ServerNumber, SessionId
from mendfs.wire.messages import data as data_messages
from mendfs.wire.messages import session as messages
from mendfs.wire.peer import Peer
from mendfs.world.tcp import is_local, is_loopback

log = structlog.get_logger("meta")

GONE_WITHIN_S = 1.0
"""For a data server's earlier connection to show that it lives: less than the new one waits for its answer."""
CLOSED_MAX = 60
"""Opens or closes of unlinked inodes noted in one transaction."""


class Registry:
    """Sessions and data servers, by the connections they came over."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._tasks: set[asyncio.Task[None]] = set()

    def handlers(self) -> dict[type, Callable[[Peer, Any], Awaitable[Any]]]:
        """What the registry answers."""
        return {
            messages.Ping: self._ping,
            messages.OpenSession: self._open_session,
            messages.ResumeSession: self._resume_session,
            messages.Renew: self._renew,
            messages.CloseInodes: self._close_inodes,
            messages.EndSession: self._end_session,
            messages.GrantIds: self._grant_ids,
            messages.GetTable: self._get_table,
            messages.ReportReplica: self._report_replica,
            data_messages.RegisterServer: self._register_server,
            data_messages.Heartbeat: self._heartbeat,
        }

    def session_of(self, peer: Peer) -> Session:
        """The living session that opened or resumed on this connection. Raises SessionLost, Unreachable."""
        session = peer.context
        if not isinstance(session, Session):
            raise SessionLost("no session was opened on this connection")
        if self._state.sessions.get(session.id) is not session:
            raise SessionLost(f"session {session.id} has ended: its lease ran out")
        if session.peer is not peer:
            # What a broken network delivers late, such as the close of what was opened again since, must not count.
            raise Unreachable(f"session {session.id} goes on over another connection")
        return session

    def peer_closed(self, peer: Peer) -> None:
        """A connection ended: its data server is suspect; its session lives on until its lease runs out."""
        if isinstance(peer.context, Session):
            if peer.context.peer is peer:
                peer.context.peer = None
        elif isinstance(peer.context, Member):
            number = peer.context.number
            if self._state.data_peers.get(number) is peer:
                del self._state.data_peers[number]
                self._spawn(self._state.act(self._state.members.disconnected(number)))

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ping(self, peer: Peer, request: messages.Ping) -> messages.Done:
        return messages.Done()

    # Clients

    def _opened(self, session: Session, survived: CommitSequence) -> messages.SessionOpened:
        state = self._state
        return messages.SessionOpened(
            session=session.id,
            lease_s=LEASE_S,
            generation=state.generation,
            sequence=state.engine.last_sequence,
            volume=state.volume,
            table=state.need_table(),
            servers=state.members.views(),
            survived=survived,
        )

    async def _open_session(self, peer: Peer, request: messages.OpenSession) -> messages.SessionOpened:
        self._state.need_table()
        now_ns = self._state.world.now_ns()

        async def operation(tx: Transaction) -> SessionId:
            raw = await tx.get(schema.counter_key("session"))
            number = SessionId(1 if raw is None else schema.NUMBER.decode(raw))
            tx.put(schema.counter_key("session"), schema.NUMBER.encode(number + 1))
            tx.put(
                schema.session_key(number), schema.SESSION.encode(schema.SessionRecord(request.client[:200], now_ns))
            )
            return number

        number, _ = await run(self._state.engine, operation)
        # A session number given twice would let one client repeat another's requests.
        await self._state.sync_log()
        deadline_s = asyncio.get_running_loop().time() + LEASE_S
        session = Session(number, request.client, deadline_s, peer=peer, reclaimed=True)
        self._state.sessions.add(session)
        peer.context = session
        log.info("session opened", session=number, client=request.client)
        return self._opened(session, self._state.engine.last_sequence)

    async def _resume_session(self, peer: Peer, request: messages.ResumeSession) -> messages.SessionOpened:
        session = self._state.sessions.get(request.session)
        if session is None:
            raise SessionLost(f"session {request.session} has ended")
        survived = self._state.engine.last_sequence
        if request.generation != self._state.generation:
            survived, _ = await run(self._state.engine, volume.survived, request.generation)
        if request.sequence_seen > survived:
            log.warning(
                "a client has seen changes that this server lost",
                session=session.id,
                seen=request.sequence_seen,
                survived=survived,
            )
        # First: whoever unlinks something from now on sees whether it is open, whoever has done so is found below.
        self._state.sessions.closed(session, tuple(session.opens.difference(request.opens)))
        self._state.sessions.opened(session, request.opens)
        for start in range(0, len(request.opens), CLOSED_MAX):
            part = request.opens[start : start + CLOSED_MAX]
            await run(self._state.engine, freeing.reclaim_unlinked, session.id, part)
        # What it has told us it closed may be among what a power cut has taken: then it will not say so again.
        kept = frozenset(request.opens)

        def is_stale(inode: Inode, holder: SessionId) -> bool:
            return holder == session.id and inode not in kept

        while (await run(self._state.engine, freeing.forget_opens, is_stale))[0]:
            await asyncio.sleep(0)
        self._state.work.set()
        session.peer, session.reclaimed = peer, True
        session.deadline_s = asyncio.get_running_loop().time() + LEASE_S
        peer.context = session
        return self._opened(session, survived)

    async def _renew(self, peer: Peer, request: messages.Renew) -> messages.Renewed:
        session = self.session_of(peer)
        await self._closed(session, request.closed)
        session.deadline_s = asyncio.get_running_loop().time() + LEASE_S
        return messages.Renewed(self._state.epoch, self._state.engine.last_sequence)

    async def _close_inodes(self, peer: Peer, request: messages.CloseInodes) -> messages.Done:
        await self._closed(self.session_of(peer), request.inodes)
        return messages.Done()

    async def _closed(self, session: Session, inodes: tuple[Inode, ...]) -> None:
        self._state.sessions.closed(session, inodes)
        for start in range(0, len(inodes), CLOSED_MAX):
            part = inodes[start : start + CLOSED_MAX]
            unlinked, _ = await run(self._state.engine, freeing.opened_unlinked, session.id, part)
            if unlinked:
                await run(self._state.engine, freeing.close_unlinked, session.id, unlinked)
                self._state.work.set()

    async def _end_session(self, peer: Peer, request: messages.EndSession) -> messages.Done:
        session = self.session_of(peer)
        await background.close_session(self._state, session)
        log.info("session ended", session=session.id, client=session.client)
        return messages.Done()

    async def _grant_ids(self, peer: Peer, request: messages.GrantIds) -> messages.IdsGranted:
        session = self.session_of(peer)
        granted, _ = await run(self._state.engine, ranges.grant, session.id, request, self._state.generation)
        await self._state.sync_log()
        return granted

    async def _get_table(self, peer: Peer, request: messages.GetTable) -> messages.TableChanged:
        return messages.TableChanged(self._state.need_table(), self._state.members.views())

    async def _report_replica(self, peer: Peer, request: messages.ReportReplica) -> messages.Done:
        log.info("replica did not serve", server=request.server, block=request.block, reason=request.reason)
        return messages.Done()

    # Data servers

    async def _register_server(self, peer: Peer, request: data_messages.RegisterServer) -> data_messages.Registered:
        if peer.remote_role != "data":
            raise NotAuthentic(f"a connection with role {peer.remote_role!r} cannot register a data server")
        state = self._state
        if is_local(request.address) and not is_loopback(peer.local_host):
            raise UsageError(
                f"the data server is on another machine, but says that it is reached at {request.address}: let it "
                "--listen on an address of its network, or name one with --advertise"
            )
        member = state.members.find(request.id)
        if member is None:
            member = await self._admit(request)
        old = state.data_peers.get(member.number)
        if old is not None and old is not peer and member.incarnation != request.incarnation:
            await self._check_gone(old, member)
        if peer.is_closed:
            # It ended while we looked: what is noted for it now would never be taken back.
            raise Unreachable(f"the connection to data server {member.number} ended")
        if (member.address, member.zone) != (request.address, request.zone):
            record = schema.ServerRecord(request.id, request.address, request.zone, request.capacity, member.draining)
            await volume.write_server(state.engine, member.number, record)
        old = state.data_peers.get(member.number)
        state.data_peers[member.number] = peer
        peer.context = member
        if old is not None and old is not peer:
            await old.close()
        if request.highest_generation > state.generation:
            state.troubles["generation"] = (
                f"server {member.number} has obeyed generation {request.highest_generation}, this metadata is of "
                f"{state.generation}: it is an old copy; nothing is deleted until `mendfs meta accept-rollback`"
            )
        at_s = asyncio.get_running_loop().time()
        await state.act(state.members.registered(member.number, request, at_s))
        await state.make_table()
        return data_messages.Registered(member.number, state.volume, state.epoch, Generation(state.generation))

    async def _check_gone(self, old: Peer, member: Member) -> None:
        """Raise UsageError if the process that registered as this server before still answers: two have one folder."""
        try:
            await old.call(messages.Ping(), deadline_s=GONE_WITHIN_S)
        except MendfsError:
            return
        raise UsageError(
            f"data server {member.number} runs already, at {member.address} (process {member.pid}): if this folder is "
            "a copy of its folder, use an empty one"
        )

    async def _admit(self, request: data_messages.RegisterServer) -> Member:
        """A server that was never seen: it gets a number, durably."""
        state = self._state
        if state.table is not None or len(state.members) >= state.volume.server_count:
            raise UsageError(
                f"the volume has its {len(state.members)} data servers, and {request.address} is none of them: start "
                "it on the folder of the server that it is, for a volume does not grow yet"
            )
        holder = None if request.wanted_number is None else state.members.get(request.wanted_number)
        if holder is not None:
            raise UsageError(
                f"number {holder.number} is that of the data server at {holder.address}: leave out --number, or name "
                "another"
            )
        number = ServerNumber(state.members.free_number(request.wanted_number))
        member = Member(number=number, id=request.id, address=request.address, zone=request.zone)
        # Before the await: a second registration must not get the same number.
        state.members.add(member)
        record = schema.ServerRecord(request.id, request.address, request.zone, request.capacity)
        await volume.write_server(state.engine, number, record)
        log.info("data server admitted", server=number, id=request.id, address=request.address)
        return member

    async def _heartbeat(self, peer: Peer, request: data_messages.Heartbeat) -> data_messages.HeartbeatSeen:
        member = peer.context
        if not isinstance(member, Member) or self._state.data_peers.get(member.number) is not peer:
            raise SessionLost("register first: this connection is no data server's")
        at_s = asyncio.get_running_loop().time()
        await self._state.act(self._state.members.heard(member.number, request, at_s))
        return data_messages.HeartbeatSeen(self._state.epoch, Generation(self._state.generation))
