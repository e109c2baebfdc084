"""Every error that is raised on purpose, classed by what the caller does next.

Each class knows the errno an application sees and the exit code a command ends with; only `fuse` and `cli` read
them. A message names the thing, the place and the remedy, on one line. `code` is the name an error travels under
in a `wire.messages.session.Failure`; `from_code` makes the error again on the other side.
"""

import errno as errno_codes
import functools
import os
from typing import ClassVar


class MendfsError(Exception):
    """The root of the family. Raised as it is only for what has no better class."""

    errno: int = errno_codes.EIO
    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "error"


class UsageError(MendfsError):
    """The user asked for something impossible: say what, and what to write instead."""

    errno = errno_codes.EINVAL
    exit_code = 2
    code = "usage"


class OperationError(MendfsError):
    """The operation fails as POSIX says it should (ENOENT, EEXIST, ENOTEMPTY...): hand it to the application."""

    code = "operation"

    def __init__(self, errno: int, what: str = "") -> None:
        super().__init__(f"{what}: {os.strerror(errno)}" if what else os.strerror(errno))
        self.errno = errno


class ReplicaError(MendfsError):
    """One replica cannot serve: try the next one at once, and report it."""

    code = "replica"


class BlockMissing(ReplicaError):
    """The server does not hold the block."""

    code = "block_missing"


class BlockCorrupt(ReplicaError):
    """Bytes failed their checksum."""

    code = "block_corrupt"


class BlockConflict(MendfsError):
    """A block id is held with another root. Two different contents under one id are never right: refuse loudly."""

    code = "block_conflict"


class StoreFull(ReplicaError):
    """The disk has no room; the block was not stored."""

    errno = errno_codes.ENOSPC
    code = "store_full"


class StoreFailed(ReplicaError):
    """The disk failed (EIO, a failed fdatasync, read-only, no descriptors): nothing was acknowledged."""

    code = "store_failed"


class Unreachable(ReplicaError):
    """No connection, or it ended before the answer came. The request may or may not have been done."""

    errno = errno_codes.EIO
    code = "unreachable"


class DeadlineExceeded(Unreachable):
    """The answer did not come in time."""

    errno = errno_codes.ETIMEDOUT
    code = "deadline"


class AllReplicasFailed(MendfsError):
    """No replica returned good bytes within the deadline, though the metadata still names the block."""

    code = "all_replicas_failed"


class NotAuthentic(MendfsError):
    """The other side does not know the cluster's secret, or is of another volume: do not retry."""

    errno = errno_codes.EACCES
    code = "not_authentic"


class BadFrame(MendfsError):
    """Bytes on a connection are no frame of ours: close it, log the reason."""

    errno = errno_codes.EPROTO
    code = "bad_frame"


class BadMessage(MendfsError):
    """A frame's message could not be decoded, or has a field out of range."""

    errno = errno_codes.EPROTO
    code = "bad_message"


class SessionLost(MendfsError):
    """The meta server ended this session: its uncommitted changes are refused; begin a new one."""

    code = "session_lost"


class CommitRefused(MendfsError):
    """The commit's blocks are not what the table or the ranges allow: fetch both and upload again."""

    code = "commit_refused"


class ChangesLost(MendfsError):
    """The meta server stopped before it had synced what this depends on."""

    code = "changes_lost"


class AppendMoved(MendfsError):
    """An append would leave its slot: prepare it again at `size`."""

    code = "append_moved"

    def __init__(self, size: int | str) -> None:
        super().__init__(str(int(size)))
        self.size = int(size)


class NotReady(MendfsError):
    """The server is starting, waits for data servers, or grants only reclaims: try again shortly."""

    errno = errno_codes.EAGAIN
    code = "not_ready"


class Fenced(MendfsError):
    """A deleting command carried an older generation or sequence than one already obeyed."""

    code = "fenced"


class Conflict(MendfsError):
    """A transaction read what another has changed since: `kv.engine.run` does it again."""

    errno = errno_codes.EAGAIN
    code = "conflict"


class TooBig(MendfsError):
    """A transaction is over 100 keys or 1 MiB, or a slot would be in too many pieces: ask for less, or merge first."""

    errno = errno_codes.EFBIG

    code = "too_big"


class EngineFailed(MendfsError):
    """The engine's log cannot be written or synced: the server must stop, for what it would say next may be lost."""

    code = "engine_failed"


class EngineFull(EngineFailed):
    """The engine's log has no room on its disk: it takes nothing more until it is opened anew."""

    errno = errno_codes.ENOSPC
    code = "engine_full"


class EngineUnreadable(EngineFailed):
    """Something stored cannot be read (a damaged block, no descriptor): this request fails, others may go on."""

    code = "engine_unreadable"


class EngineDamaged(EngineUnreadable):
    """What cannot be read is not what was written: reading it again will not help."""

    code = "engine_damaged"


class StoreDamaged(MendfsError):
    """A stored file cannot be what we wrote. Says which, where, and what can still be done."""

    code = "store_damaged"


def _family(root: type[MendfsError]) -> dict[str, type[MendfsError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_family(child))
    return found


@functools.cache
def _by_code() -> dict[str, type[MendfsError]]:
    return _family(MendfsError)


def from_code(code: str, text: str, errno: int) -> MendfsError:
    """The error that travelled as (`code`, `text`, `errno`); an unknown code becomes a plain MendfsError."""
    kind = _by_code().get(code, MendfsError)
    if kind is AppendMoved:
        return AppendMoved(text)
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    error.errno = errno
    return error
