"""Optimistic transactions in one process, shared by the engines of this package (kv/engine.py says what they promise).

A transaction sees the state at its beginning: reading what was committed since raises Conflict at once, and a commit
raises it if anything read before has changed. Commits form a linked list that is only kept alive by the transactions
which began before them, so nothing has to be pruned, and where nothing interleaves, the check is one comparison.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from mendfs.errors import Conflict, EngineFailed, TooBig
from mendfs.kv.engine import BYTES_MAX, KEYS_MAX, Transaction
from mendfs.kv.group import GroupCommit
from mendfs.model import CommitSequence

SEQUENCE_KEY = b"\x00sequence"
"""Where the commit sequence is kept, in the batch of each commit: 8 bytes big endian. No range shows it."""

Writes = Mapping[bytes, bytes | None]
"""Key -> new value, or None to delete."""
Pairs = list[tuple[bytes, bytes]]


class _Commit:
    """What one commit wrote, once it is there; the last node of the list is still empty."""

    __slots__ = ("keys", "next")

    def __init__(self) -> None:
        self.keys: Writes = {}
        self.next: _Commit | None = None


class OptimisticTransaction:
    """See `kv.engine.Transaction`."""

    __slots__ = ("_changed", "_engine", "_exact", "_keys", "_ranges", "_seen", "is_over", "writes")

    def __init__(self, engine: "OptimisticEngine") -> None:
        self._engine = engine
        self._seen = engine.tail
        self._changed: set[bytes] = set()
        self._keys: set[bytes] = set()
        self._ranges: list[tuple[bytes, bytes]] = []
        self._exact: CommitSequence | None = None
        self.writes: dict[bytes, bytes | None] = {}
        self.is_over = False

    async def get(self, key: bytes) -> bytes | None:
        """The value, or None. Raises Conflict if the key was changed since the transaction began."""
        if key in self.writes:
            return self.writes[key]
        # Noted before the check: a transaction that was told of a conflict cannot be committed all the same.
        self._keys.add(key)
        if (self._changed or self._seen.next is not None) and key in self._changes():
            raise Conflict(f"key {key!r} was changed by another transaction")
        return self._engine.read(key)

    async def range(self, begin: bytes, end: bytes, *, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        """Up to `limit` pairs with begin <= key < end, in order (the last ones first with `reverse`)."""
        if limit <= 0 or begin >= end:
            return []
        own = [key for key in self.writes if begin <= key < end] if self.writes else []
        hidden = len(own) + (begin <= SEQUENCE_KEY < end)
        # As many more as own writes (and the reserved key) could hide: what is left is enough to answer with.
        pairs = self._engine.read_range(begin, end, limit + hidden, reverse)
        if hidden:
            pairs = self._merge(pairs, own, reverse=reverse)
        if len(pairs) >= limit:
            # Only what was looked at can conflict: a queue's reader must not be disturbed by its writers.
            del pairs[limit:]
            last = pairs[-1][0]
            begin, end = (last, end) if reverse else (begin, last + b"\x00")
        self._ranges.append((begin, end))
        if (self._changed or self._seen.next is not None) and any(begin <= key < end for key in self._changes()):
            raise Conflict(f"keys from {begin!r} to {end!r} were changed by another transaction")
        return pairs

    def put(self, key: bytes, value: bytes) -> None:
        """Set a key when the transaction commits."""
        assert not self.is_over and key != SEQUENCE_KEY, "a finished transaction, or the engine's own key"
        self.writes[key] = value

    def delete(self, key: bytes) -> None:
        """Remove a key, if it is there, when the transaction commits."""
        assert not self.is_over and key != SEQUENCE_KEY, "a finished transaction, or the engine's own key"
        self.writes[key] = None

    def sequence(self) -> CommitSequence:
        """The commit sequence this transaction will have; it conflicts with any other commit from then on."""
        if self._exact is None:
            self._exact = CommitSequence(self._engine.last_sequence + 1)
        return self._exact

    def check(self) -> None:
        """Raise Conflict if what was read has been changed, or the sequence that was promised was taken."""
        if self._exact is not None and self._exact != self._engine.last_sequence + 1:
            raise Conflict("another transaction was committed first")
        if not self._changed and self._seen.next is None:
            return
        changed = self._changes()
        if not changed.isdisjoint(self._keys):
            raise Conflict("a key that was read has been changed by another transaction")
        for begin, end in self._ranges:
            if any(begin <= key < end for key in changed):
                raise Conflict("a range that was read has been changed by another transaction")

    def _changes(self) -> set[bytes]:
        """Every key committed since the transaction began; each commit is looked at once."""
        while self._seen.next is not None:
            self._changed.update(self._seen.keys)
            self._seen = self._seen.next
        return self._changed

    def _merge(self, pairs: Pairs, own: list[bytes], *, reverse: bool) -> Pairs:
        merged = dict(pairs)
        merged.pop(SEQUENCE_KEY, None)
        for key in own:
            value = self.writes[key]
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = value
        return sorted(merged.items(), reverse=reverse)


class OptimisticEngine(ABC):
    """Transactions and group commit over four plain operations that an engine brings."""

    def __init__(self, last_sequence: int) -> None:
        self._last = self._synced = last_sequence
        self._failure = ""
        self._group = GroupCommit(self._sync_all)
        self.tail = _Commit()

    @abstractmethod
    def read(self, key: bytes) -> bytes | None:
        """The committed value."""

    @abstractmethod
    def read_range(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> Pairs:
        """Up to `limit` committed pairs with begin <= key < end."""

    @abstractmethod
    def write(self, writes: Writes, sequence: int) -> None:
        """Apply at once, with `sequence` under SEQUENCE_KEY. Raises EngineFailed when the log cannot take it."""

    @abstractmethod
    async def sync_log(self) -> None:
        """Make what was written before durable, away from the event loop. Raises EngineFailed."""

    @abstractmethod
    async def release(self) -> None:
        """Close what is open."""

    @property
    def last_sequence(self) -> CommitSequence:
        """The sequence of the last commit."""
        return CommitSequence(self._last)

    @property
    def synced_sequence(self) -> CommitSequence:
        """Everything up to this commit survives a power cut."""
        return CommitSequence(self._synced)

    @property
    def failure(self) -> str:
        """Why nothing more is accepted; empty as long as all is well."""
        return self._failure

    def begin(self) -> OptimisticTransaction:
        """A new transaction."""
        if self._failure:
            raise EngineFailed(self._failure)
        return OptimisticTransaction(self)

    def begin_reading(self) -> OptimisticTransaction:
        """A transaction that only reads: what was committed before a failure can still be read."""
        return OptimisticTransaction(self)

    async def commit(self, transaction: Transaction) -> CommitSequence:
        """Apply the writes at once or not at all. Raises Conflict, TooBig, EngineFailed."""
        assert isinstance(transaction, OptimisticTransaction) and not transaction.is_over
        # No await in here: the check still holds when the batch is written.
        if self._failure:
            raise EngineFailed(self._failure)
        transaction.check()
        transaction.is_over = True
        writes = transaction.writes
        if not writes:
            return CommitSequence(self._last)
        _check_limits(writes)
        sequence = self._last + 1
        try:
            self.write(writes, sequence)
        except EngineFailed as error:
            # Whether the batch is in the log is unknown now, so nothing that builds on it may be said.
            self._failure = str(error)
            raise
        self._last = sequence
        done, self.tail = self.tail, _Commit()
        done.keys = writes
        done.next = self.tail
        return CommitSequence(sequence)

    async def sync(self) -> CommitSequence:
        """Make every commit answered before durable; concurrent callers share one sync. Raises EngineFailed."""
        if self._failure:
            raise EngineFailed(self._failure)
        if self._synced == self._last:
            return CommitSequence(self._synced)
        return await self._group.wait()

    async def close(self) -> None:
        """Sync and close."""
        try:
            if not self._failure:
                await self.sync()
        finally:
            await self._group.idle()
            self._failure = self._failure or "the engine is closed"
            await self.release()

    async def _sync_all(self) -> CommitSequence:
        if self._failure:
            raise EngineFailed(self._failure)
        covered = self._last
        try:
            await self.sync_log()
        except EngineFailed as error:
            self._failure = str(error)
            raise
        self._synced = covered
        return CommitSequence(covered)


def _check_limits(writes: Writes) -> None:
    if len(writes) > KEYS_MAX:
        raise TooBig(f"a transaction of {len(writes)} keys; {KEYS_MAX} are allowed")
    size = 0
    for key, value in writes.items():
        size += len(key) + (0 if value is None else len(value))
    if size > BYTES_MAX:
        raise TooBig(f"a transaction of {size} bytes; {BYTES_MAX} are allowed")
