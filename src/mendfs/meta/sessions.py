"""The sessions that live now, what they have open, and requests answered once.

The engine holds the truth (keys SESSION, RANGE, ANSWER, OPEN_UNLINKED); this table is the part that only matters while
the client is connected: its lease, its connection, its opens of files that still have a name. `due` is pure; the meta
server acts on it.
"""

from collections.abc import Awaitable, Callable, Iterable

import msgspec

from mendfs.errors import BadMessage
from mendfs.kv.engine import Transaction
from mendfs.meta import schema
from mendfs.meta.namespace import Openers
from mendfs.meta.ranges import find_session
from mendfs.model import Inode, SessionId
from mendfs.wire.messages import meta as messages
from mendfs.wire.messages.session import Done
from mendfs.wire.peer import Peer

LEASE_S = 10.0
"""How long a session lives without a renewal; clients renew every 2 s."""
ANSWERS_KEPT_NS = 3600 * 10**9
"""Answers outlive their session by an hour: a client may come back from a long sleep and ask again."""
REQUEST_SLOTS_MAX = 256
OWN_PAUSE_S = 1.0
"""A gap between two ticks above which it was we who slept: leases go on by as much."""

Answer = messages.Found | messages.Removed | messages.Committed | messages.Punched | messages.Merged | Done
_ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_ENCODER = msgspec.msgpack.Encoder()


class Session(msgspec.Struct):
    """One living session. `deadline_s` is loop time."""

    id: SessionId
    client: str
    deadline_s: float
    peer: Peer | None = None
    opens: set[Inode] = msgspec.field(default_factory=set)
    reclaimed: bool = False


class Sessions(Openers):
    """All living sessions, and who has what open."""

    def __init__(self) -> None:
        self._sessions: dict[SessionId, Session] = {}
        self._openers: dict[Inode, set[SessionId]] = {}
        self._ticked_s: float | None = None

    def __len__(self) -> int:
        return len(self._sessions)

    def all(self) -> list[Session]:
        """Every living session."""
        return list(self._sessions.values())

    def get(self, session: SessionId) -> Session | None:
        """A living session, or None."""
        return self._sessions.get(session)

    def add(self, session: Session) -> None:
        """A session begins, or is known from before a restart."""
        self._sessions[session.id] = session

    def remove(self, session: SessionId) -> None:
        """It has ended."""
        gone = self._sessions.pop(session, None)
        if gone is not None:
            self.closed(gone, tuple(gone.opens))

    def opened(self, session: Session, inodes: Iterable[Inode]) -> None:
        """The session has these open."""
        for inode in inodes:
            session.opens.add(inode)
            self._openers.setdefault(inode, set()).add(session.id)

    def closed(self, session: Session, inodes: Iterable[Inode]) -> None:
        """The session has these open no more."""
        for inode in inodes:
            session.opens.discard(inode)
            openers = self._openers.get(inode)
            if openers is not None:
                openers.discard(session.id)
                if not openers:
                    del self._openers[inode]

    def of(self, inode: Inode) -> tuple[SessionId, ...]:
        """The sessions that have an inode open."""
        return tuple(self._openers.get(inode, ()))

    def due(self, at_s: float) -> list[Session]:
        """Sessions whose lease has run out. Time in which we did not run ourselves does not count."""
        before, self._ticked_s = self._ticked_s, at_s
        if before is not None and at_s - before > OWN_PAUSE_S:
            for session in self._sessions.values():
                session.deadline_s += at_s - before
            return []
        return [session for session in self._sessions.values() if session.deadline_s < at_s]

    def all_reclaimed(self) -> bool:
        """Whether every session known from before a restart has come back or ended."""
        return all(session.reclaimed for session in self._sessions.values())


async def answered_once(
    tx: Transaction,
    session: SessionId,
    at: messages.RequestId,
    operation: Callable[[Transaction], Awaitable[Answer]],
) -> Answer:
    """Do a change unless it was done before; its answer is stored in the change's own transaction.

    The slot rules of NFS 4.1 (RFC 8881 section 2.10.6.1): the last number again is answered from store, a higher one
    is done, a lower one is a request that its sender has long had an answer to.
    """
    if not 0 <= at.slot < REQUEST_SLOTS_MAX:
        raise BadMessage(f"request slot {at.slot} is not below {REQUEST_SLOTS_MAX}")
    key = schema.answer_key(session, at.slot)
    raw = await tx.get(key)
    if raw is not None:
        last = schema.ANSWER.decode(raw)
        if at.number == last.number:
            return _ANSWERS.decode(last.answer)
        if at.number < last.number:
            raise BadMessage(f"request {at.number} in slot {at.slot} is older than {last.number}, which was answered")
    # Only now: a repeated request is answered even when its session has ended meanwhile.
    await find_session(tx, session)
    answer = await operation(tx)
    tx.put(key, schema.ANSWER.encode(schema.AnswerRecord(at.number, _ENCODER.encode(answer))))
    return answer


async def purge_answers(tx: Transaction, now_ns: int) -> bool:
    """Remove the answers of one session that ended more than an hour ago. True if there was one."""
    found = await tx.range(*schema.all_of(schema.Kind.ENDED), limit=100)
    due = [key for key, ended in found if now_ns - schema.NUMBER.decode(ended) > ANSWERS_KEPT_NS]
    if not due:
        return False
    key = due[0]
    session = SessionId(schema.number_in(key))
    begin = schema.answer_key(session, 0)
    answers = await tx.range(begin, schema.answer_key(SessionId(session + 1), 0), limit=90)
    for answer, _ in answers:
        tx.delete(answer)
    if len(answers) < 90:
        tx.delete(key)
    return True
