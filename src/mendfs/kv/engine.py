"""What every engine gives: ordered byte keys, optimistic transactions, an explicit sync (design sections 1.5 and 5).

Promises of any engine: a commit is atomic and survives the death of the process; it survives a power cut after a
`sync` that began after it. Transactions are serializable: one that read a key or range which another commit has
changed since it began raises Conflict, at the read or at the commit. `run` does it again then.
"""

from collections.abc import Awaitable, Callable
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from mendfs.errors import Conflict
from mendfs.model import CommitSequence

KEYS_MAX = 100
"""Keys one transaction may put or delete: what any engine we would ever use takes (etcd: 128 operations)."""
BYTES_MAX = 1 << 20
"""Bytes of keys and values one transaction may put: etcd's default request limit is 1.5 MiB."""
ATTEMPTS_MAX = 100
"""Conflicts in a row before `run` gives up: with one process they are rare, and a hundred mean a livelock of ours."""

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


class Transaction(Protocol):
    """Reads see the state at the first read and the transaction's own writes. Not for use after commit."""

    async def get(self, key: bytes) -> bytes | None:
        """The value, or None. Raises Conflict if the key was changed since the transaction began."""
        ...

    async def range(self, begin: bytes, end: bytes, *, limit: int, reverse: bool = False) -> list[tuple[bytes, bytes]]:
        """Up to `limit` pairs with begin <= key < end, in order (the last ones first with `reverse`)."""
        ...

    def put(self, key: bytes, value: bytes) -> None:
        """Set a key when the transaction commits."""
        ...

    def delete(self, key: bytes) -> None:
        """Remove a key, if it is there, when the transaction commits."""
        ...

    def sequence(self) -> CommitSequence:
        """The commit sequence this transaction will have; it conflicts with any other commit from then on."""
        ...


class Engine(Protocol):
    """An ordered store of keys. Not safe for use from several threads."""

    @property
    def last_sequence(self) -> CommitSequence:
        """The sequence of the last commit. Raised by every commit that puts or deletes something."""
        ...

    @property
    def failure(self) -> str:
        """Why nothing more is accepted; empty as long as all is well."""
        ...

    @property
    def synced_sequence(self) -> CommitSequence:
        """Everything up to this commit survives a power cut."""
        ...

    def begin(self) -> Transaction:
        """A new transaction."""
        ...

    def begin_reading(self) -> Transaction:
        """A transaction that only reads; as long as the engine is not closed, also after it failed."""
        ...

    async def commit(self, transaction: Transaction) -> CommitSequence:
        """Apply the writes at once or not at all. Raises Conflict, TooBig, EngineFailed.

        Returns the commit's sequence, or the last one for a transaction that wrote nothing.
        """
        ...

    async def sync(self) -> CommitSequence:
        """Make every commit answered before durable; concurrent callers share one sync. Raises EngineFailed.

        After EngineFailed nothing more is accepted: a failed sync is never retried.
        """
        ...

    async def close(self) -> None:
        """Sync and close."""
        ...


async def run(
    engine: Engine,
    operation: Callable[Concatenate[Transaction, Arguments], Awaitable[Result]],
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> tuple[Result, CommitSequence]:
    """Run `operation(transaction, *args)` and commit it, again after each Conflict. Returns result and sequence.

    The operation must have no effect outside its transaction: it may run several times.
    """
    attempt = 0
    while True:
        transaction = engine.begin()
        try:
            result = await operation(transaction, *args, **kwargs)
            return result, await engine.commit(transaction)
        except Conflict:
            attempt += 1
            if attempt >= ATTEMPTS_MAX:
                raise
