"""The client's standing with the meta server: one connection, reconnected for ever; changes answered once.

A query is simply asked again when its connection ends. A change names a request slot and a number in it; it is sent
again with the same pair until it was answered, so the server does it once. `SessionLost` means that the server has
ended the session: what was in flight is uncertain and fails with it, and a new session begins by itself.
"""

import asyncio
from collections.abc import Callable
from math import isinf
from typing import Protocol, TypeVar

import structlog

from mendfs.client.options import VolumeOptions
from mendfs.client.tasks import Changes, Tasks
from mendfs.errors import (
    BadMessage,
    DeadlineExceeded,
    EngineFailed,
    EngineUnreadable,
    MendfsError,
    NotAuthentic,
    NotReady,
    SessionLost,
    Unreachable,
)
from mendfs.model import BlockId, CommitSequence, Generation, Inode, ServerView, SessionId, Table, Volume
from mendfs.wire.messages import Message
from mendfs.wire.messages import session as messages
from mendfs.wire.messages.meta import LogSynced, RequestId, SyncLog
from mendfs.wire.peer import Credentials, Peer, connect
from mendfs.world import World

log = structlog.get_logger("mendfs.client")

REQUEST_SLOTS = 32
"""Changes in flight at once: more than a mount's threads use, few enough for the server to keep an answer for each."""
RENEW_EVERY_S = 2.0
RENEW_TIMEOUT_S = 5.0
"""A connection on which a renewal takes longer is given up: half the lease is left to come back."""
BACKOFF_MIN_S = 0.02
BACKOFF_MAX_S = 1.0
NOT_READY_PAUSE_S = 0.1
HANDSHAKE_TIMEOUT_S = 5.0

Answer = TypeVar("Answer")


class Uncertain(DeadlineExceeded):
    """The time is up, and the change may yet be made: it is repeated until it was answered.

    `fate` is done when that is known: with the answer, or with the error that says that the change was not made, or
    that nobody will ever know (SessionLost).
    """

    code = "uncertain"

    def __init__(self, text: str, fate: "asyncio.Future[object]") -> None:
        super().__init__(text)
        self.fate = fate


class SessionOwner(Protocol):
    """What a session asks and tells the volume it serves."""

    def open_inodes(self) -> tuple[Inode, ...]:
        """Every inode that a descriptor has open."""
        ...

    def lowest_block_in_flight(self) -> BlockId:
        """For the renewal."""
        ...

    def take_closed(self) -> tuple[Inode, ...]:
        """Inodes closed since the last call; `told` or `closed_again` follows."""
        ...

    def told(self, inodes: tuple[Inode, ...]) -> None:
        """The server knows that these are closed."""
        ...

    def closed_again(self, inodes: tuple[Inode, ...]) -> None:
        """These could not be told."""
        ...

    def session_lost(self) -> None:
        """Nothing of the old session counts any more: ranges, uncommitted data, opens."""
        ...

    def session_begun(self, opened: messages.SessionOpened) -> None:
        """A session was opened or resumed: table and servers are the newest."""
        ...

    def went_back(self, survived: CommitSequence) -> None:
        """The server has lost the changes above `survived` that it had answered: what is cached may be wrong."""
        ...

    def table_changed(self, table: Table, servers: tuple[ServerView, ...]) -> None:
        """Pushed by the meta server, or asked for."""
        ...


class Session:
    """One client's session, over however many connections. `volume` and `table` are there once `open` returned."""

    volume: Volume
    table: Table
    generation: Generation

    def __init__(self, world: World, options: VolumeOptions, secret: bytes, owner: SessionOwner, tasks: Tasks) -> None:
        self._world = world
        self._options = options
        self._secret = secret
        self._owner = owner
        self._tasks = tasks
        self._id: SessionId | None = None
        self._volume_id = ""
        self._life = 0
        self._peer: Peer | None = None
        self._connected = Changes()
        self._trouble: MendfsError | None = None
        self._free_slots = list(range(REQUEST_SLOTS))
        self._slot_freed = Changes()
        self._numbers = [0] * REQUEST_SLOTS
        self._is_ending = False
        self.sequence_seen = CommitSequence(0)
        self.sequence_changed = CommitSequence(0)
        """The newest change that this client was answered."""
        self.sequence_synced = CommitSequence(0)
        """Up to here the meta server's log is known to be durable."""

    async def open(self, waiting: Callable[[str], None] | None = None) -> None:
        """Open the session. Raises Unreachable, NotAuthentic, NotReady when that did not work in time.

        `waiting` is told what it waits for, each time that is something else.
        """
        self._tasks.spawn(self._keep_connected())
        deadline_s = self._now() + self._options.open_timeout_s
        said = ""
        while self._peer is None:
            trouble = self._trouble
            if isinstance(trouble, NotReady) and self._options.wait_until_ready:
                deadline_s = self._now() + self._options.open_timeout_s
            if isinstance(trouble, NotAuthentic) or self._now() >= deadline_s:
                raise trouble or Unreachable(f"{self._options.meta} does not answer")
            if waiting is not None and trouble is not None and str(trouble) != said:
                said = str(trouble)
                waiting(said)
            await self._connected.wait(deadline_s - self._now())

    async def end(self) -> None:
        """Tell the server that this is over; best effort, for the lease would end it too."""
        self._is_ending = True
        if self._peer is not None:
            try:
                await self._peer.call(messages.EndSession(), deadline_s=2.0)
            except MendfsError as error:
                log.warning("the session could not be ended; its lease will", reason=str(error))
            await self._peer.close()

    @property
    def is_connected(self) -> bool:
        """Whether the meta server is there, as far as the connection shows."""
        return self._peer is not None and not self._peer.is_closed

    @property
    def connection_changes(self) -> Changes:
        """Notified when the connection has come or gone, or could not be made."""
        return self._connected

    # --- asking -----------------------------------------------------------------------------------------------

    async def query(self, message: Message, answer: type[Answer], *, timeout_s: float | None = None) -> Answer:
        """Ask until an answer of type `answer` comes; the operation's own errors pass through."""
        deadline_s = self._now() + (self._options.meta_timeout_s if timeout_s is None else timeout_s)
        while True:
            peer = await self._connection(deadline_s)
            life = self._life
            try:
                return self._checked(await self._call(peer, message, deadline_s), answer)
            except SessionLost:
                self._lost(life)
            except (DeadlineExceeded, EngineUnreadable):
                raise
            except (Unreachable, NotReady, EngineFailed) as error:
                await self._pause(peer, error, deadline_s)

    async def change(
        self, build: Callable[[RequestId], Message], answer: type[Answer], *, timeout_s: float | None = None
    ) -> Answer:
        """Make a change once, however often it has to be sent. Raises SessionLost if it is uncertain for ever.

        When the time is up it raises Uncertain for what was sent, else DeadlineExceeded. What was sent goes on in the
        background after that, and after a cancellation.
        """
        deadline_s = self._now() + (self._options.meta_timeout_s if timeout_s is None else timeout_s)
        slot = await self._take_slot(deadline_s)
        self._numbers[slot] += 1
        message = build(RequestId(slot, self._numbers[slot]))
        progress = _Progress()
        try:
            result = await self._send(message, deadline_s, progress)
        except (asyncio.CancelledError, DeadlineExceeded) as error:
            if progress.sent_in_life is None:
                self._release_slot(slot)
                raise
            # The number is used: the next one in this slot must wait until the server has answered this one.
            fate = self._tasks.spawn(self._settle(slot, message, progress, answer), is_awaited=True)
            if isinstance(error, DeadlineExceeded):
                raise Uncertain(str(error), fate) from error
            raise
        except BaseException:
            self._release_slot(slot)
            raise
        self._release_slot(slot)
        return self._made(result, answer)

    def _made(self, result: object, answer: type[Answer]) -> Answer:
        sequence: CommitSequence = getattr(result, "sequence", CommitSequence(0))
        self.sequence_changed = max(self.sequence_changed, sequence)
        return self._checked(result, answer)

    async def sync_log(self, timeout_s: float) -> None:
        """Every change answered before survives a power cut of the meta server."""
        self.log_synced((await self.query(SyncLog(), LogSynced, timeout_s=timeout_s)).sequence)

    def log_synced(self, sequence: CommitSequence) -> None:
        """The meta server's log is durable up to here."""
        self.sequence_synced = max(self.sequence_synced, sequence)

    def push(self, message: Message) -> None:
        """Tell the server something that needs no answer; nothing happens while there is no connection."""
        if self._peer is not None and not self._peer.is_closed:
            self._peer.push(message)

    async def refresh_table(self) -> None:
        """Ask for the newest table and servers."""
        self._take_table(await self.query(messages.GetTable(), messages.TableChanged))

    async def _send(self, message: Message, deadline_s: float, progress: "_Progress") -> object:
        while True:
            peer = await self._connection(deadline_s)
            if progress.sent_in_life is not None and progress.sent_in_life != self._life:
                raise SessionLost("the session ended while a change was under way: it may or may not have been made")
            progress.sent_in_life = life = self._life
            try:
                return await self._call(peer, message, deadline_s)
            except SessionLost:
                self._lost(life)
                raise
            except DeadlineExceeded:
                if not isinf(deadline_s):
                    raise
                # Only the hour is up that stands for no deadline: what became of the change is still to be asked.
                await asyncio.sleep(BACKOFF_MAX_S)
            except EngineUnreadable:
                raise
            except (Unreachable, NotReady, EngineFailed) as error:
                await self._pause(peer, error, deadline_s)

    async def _settle(self, slot: int, message: Message, progress: "_Progress", answer: type[Answer]) -> Answer:
        """Go on with a change that its caller gave up, so that its slot can be used again and its fate is known."""
        try:
            return self._made(await self._send(message, float("inf"), progress), answer)
        except MendfsError as error:
            log.info("a change whose caller had given up failed", reason=str(error))
            raise
        finally:
            self._release_slot(slot)

    async def _call(self, peer: Peer, message: Message, deadline_s: float) -> object:
        # An hour stands for no deadline: a dead connection ends by its renewals long before.
        answer, received = await peer.call(message, deadline_s=min(max(deadline_s - self._now(), 0.001), 3600.0))
        if received is not None:
            received.release()
        sequence: CommitSequence | None = getattr(answer, "sequence", None)
        if sequence is not None and sequence > self.sequence_seen:
            self.sequence_seen = sequence
        return answer

    @staticmethod
    def _checked(reply: object, answer: type[Answer]) -> Answer:
        if not isinstance(reply, answer):
            raise BadMessage(f"the meta server answered with {type(reply).__name__} instead of {answer.__name__}")
        return reply

    async def _connection(self, deadline_s: float) -> Peer:
        while self._peer is None or self._peer.is_closed:
            left_s = deadline_s - self._now()
            if left_s <= 0:
                raise DeadlineExceeded(f"{self._options.meta} does not answer ({self._trouble or 'no connection'})")
            await self._connected.wait(min(left_s, BACKOFF_MAX_S))
        return self._peer

    async def _pause(self, peer: Peer, error: MendfsError, deadline_s: float) -> None:
        if self._now() >= deadline_s:
            raise DeadlineExceeded(f"{self._options.meta}: {error}")
        if isinstance(error, EngineFailed):
            # The server says that it stops: the same request is asked of the one that follows it.
            self._trouble = error
        if not isinstance(error, NotReady) and not peer.is_closed:
            await peer.close()
        elif isinstance(error, NotReady):
            await asyncio.sleep(NOT_READY_PAUSE_S)

    async def _take_slot(self, deadline_s: float) -> int:
        while not self._free_slots:
            left_s = deadline_s - self._now()
            if left_s <= 0:
                raise DeadlineExceeded(f"{self._options.meta} does not answer: all request slots are in use")
            await self._slot_freed.wait(min(left_s, 3600.0))
        return self._free_slots.pop()

    def _release_slot(self, slot: int) -> None:
        self._free_slots.append(slot)
        self._slot_freed.notify()

    # --- staying connected ------------------------------------------------------------------------------------

    async def _keep_connected(self) -> None:
        while not self._is_ending:
            try:
                await self._connect_again_and_again()
            except Exception as error:
                # A mistake of ours, said with all we know. Ending here would leave every caller waiting for ever.
                log.error("staying connected failed, trying again", exc_info=error)
                self._peer = None
                await asyncio.sleep(BACKOFF_MAX_S)

    async def _connect_again_and_again(self) -> None:
        backoff_s = BACKOFF_MIN_S
        while not self._is_ending:
            try:
                peer = await connect(
                    self._world.network,
                    self._options.meta,
                    Credentials(self._secret, self._volume_id),
                    role="client",
                    handler=self._handle,
                    deadline_s=HANDSHAKE_TIMEOUT_S,
                )
                await self._begin(peer)
            except MendfsError as error:
                self._trouble = error
                self._connected.notify()
                await asyncio.sleep(backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)
                continue
            backoff_s = BACKOFF_MIN_S
            self._peer = peer
            self._trouble = None
            self._connected.notify()
            await self._renew_until_closed(peer)
            self._peer = None
            self._connected.notify()

    async def _begin(self, peer: Peer) -> None:
        """Open or resume the session on a new connection; the connection is closed if that fails."""
        try:
            opened = await self._opened(peer)
        except BaseException:
            await peer.close()
            raise
        is_new = self._id is None and self.sequence_seen > 0
        # A new session does not say of which generation the old one was: from another one nothing is sure.
        survived = CommitSequence(0) if is_new and opened.generation != self.generation else opened.survived
        if survived < self.sequence_seen:
            log.warning("the meta server lost changes", seen=self.sequence_seen, survived=survived)
            self.sequence_changed = min(self.sequence_changed, survived)
            self.sequence_synced = min(self.sequence_synced, survived)
            self._owner.went_back(survived)
        self.sequence_seen = opened.sequence
        self._id = opened.session
        self._volume_id = opened.volume.id
        self.volume = opened.volume
        self.generation = opened.generation
        self.table = opened.table
        self._owner.session_begun(opened)

    async def _opened(self, peer: Peer) -> messages.SessionOpened:
        if self._id is not None:
            resume = messages.ResumeSession(self._id, self._owner.open_inodes(), self.sequence_seen, self.generation)
            try:
                answer, _ = await peer.call(resume, deadline_s=HANDSHAKE_TIMEOUT_S)
                return self._checked(answer, messages.SessionOpened)
            except SessionLost:
                self._lost(self._life)
        answer, _ = await peer.call(messages.OpenSession(self._options.name), deadline_s=HANDSHAKE_TIMEOUT_S)
        return self._checked(answer, messages.SessionOpened)

    async def _renew_until_closed(self, peer: Peer) -> None:
        while not peer.is_closed:
            closed = self._owner.take_closed()
            renew = messages.Renew(self._owner.lowest_block_in_flight(), closed)
            life = self._life
            try:
                answer, _ = await peer.call(renew, deadline_s=RENEW_TIMEOUT_S)
                renewed = self._checked(answer, messages.Renewed)
                self._owner.told(closed)
                if renewed.epoch > self.table.epoch:
                    table, _ = await peer.call(messages.GetTable(), deadline_s=RENEW_TIMEOUT_S)
                    self._take_table(self._checked(table, messages.TableChanged))
            except SessionLost:
                self._owner.told(closed)
                self._lost(life)
            except MendfsError as error:
                log.warning("the session was not renewed; connecting again", reason=str(error))
                self._owner.closed_again(closed)
                await peer.close()
            try:
                async with asyncio.timeout(RENEW_EVERY_S):
                    await peer.closed.wait()
            except TimeoutError:
                continue

    def _lost(self, life: int) -> None:
        """The session that `life` counted has ended: begin a new one. Only the first to notice acts."""
        if life != self._life or self._id is None:
            return
        log.error("the meta server ended this session; changes not committed are lost", session=self._id)
        self._life += 1
        self._id = None
        peer, self._peer = self._peer, None
        self._connected.notify()
        self._owner.session_lost()
        if peer is not None:
            self._tasks.spawn(peer.close())

    async def _handle(self, peer: Peer, message: Message, received: object) -> messages.Done:
        if isinstance(message, messages.TableChanged):
            self._take_table(message)
        elif not isinstance(message, messages.Ping):
            raise BadMessage(f"a client does not answer {type(message).__name__}")
        return messages.Done()

    def _take_table(self, change: messages.TableChanged) -> None:
        if change.table is not None and change.table.epoch >= self.table.epoch:
            self.table = change.table
        self._owner.table_changed(self.table, change.servers)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


class _Progress:
    """How far a change has come: the life of the session it was first sent in."""

    sent_in_life: int | None = None
