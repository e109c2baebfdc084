"""Messages of connections and sessions: the handshake, failures, a client's standing with the meta server."""

import msgspec

from mendfs.model import (
    BlockId,
    CommitSequence,
    Epoch,
    Generation,
    Inode,
    ServerNumber,
    ServerView,
    SessionId,
    Table,
    Volume,
)


class Hello(msgspec.Struct, frozen=True, tag="hello", forbid_unknown_fields=True):
    """First frame of the side that connects. Answer: `Welcome`."""

    versions: tuple[int, ...]
    """Protocol versions it speaks, best first."""
    role: str
    """`client`, `data`, `meta` or `tool`."""
    volume: str
    """The volume's id, or empty: not known yet."""
    nonce: bytes


class Welcome(msgspec.Struct, frozen=True, tag="welcome", forbid_unknown_fields=True):
    """Answer to `Hello`: proves that the listening side knows the secret. Answer: `Proof`."""

    version: int
    role: str
    volume: str
    nonce: bytes
    proof: bytes
    """HMAC-SHA-256 over the label "server", version, volume, both roles and nonces; the key is the secret."""


class Proof(msgspec.Struct, frozen=True, tag="proof", forbid_unknown_fields=True):
    """The connecting side's proof, with the label "client". Answer: `Done`, or a `Failure` and the end."""

    proof: bytes


class Done(msgspec.Struct, frozen=True, tag="done", forbid_unknown_fields=True):
    """It is done, and there is nothing else to say."""


class Failure(msgspec.Struct, frozen=True, tag="failure", forbid_unknown_fields=True):
    """Any request's answer when it failed: `errors.from_code` makes the error again."""

    code: str
    text: str
    errno: int


class Ping(msgspec.Struct, frozen=True, tag="ping", forbid_unknown_fields=True):
    """Either side, any time. Answer: `Done`."""


class OpenSession(msgspec.Struct, frozen=True, tag="open_session", forbid_unknown_fields=True):
    """Client -> meta server: begin a session. Answer: `SessionOpened`."""

    client: str
    """Host, process and mount, for people: shown where sessions are listed."""


class ResumeSession(msgspec.Struct, frozen=True, tag="resume_session", forbid_unknown_fields=True):
    """Client -> meta server on a new connection: go on with a session, reclaiming what it had open.

    Answer: `SessionOpened`, or SessionLost.
    """

    session: SessionId
    opens: tuple[Inode, ...]
    sequence_seen: CommitSequence
    """The highest commit sequence that an answer carried; see `SessionOpened.survived`."""
    generation: Generation = Generation(0)
    """In which the session was last opened or resumed: commit sequences of different ones cannot be compared."""


class SessionOpened(msgspec.Struct, frozen=True, tag="session_opened", forbid_unknown_fields=True):
    """The session lives; everything a client needs to begin."""

    session: SessionId
    lease_s: float
    generation: Generation
    sequence: CommitSequence
    volume: Volume
    table: Table
    servers: tuple[ServerView, ...]
    survived: CommitSequence = CommitSequence(0)
    """The last commit of the generation that the client was of which is still there. Changes above it are lost."""


class Renew(msgspec.Struct, frozen=True, tag="renew", forbid_unknown_fields=True):
    """Client -> meta server every 2 s: the lease goes on. Answer: `Renewed`."""

    lowest_block_in_flight: BlockId
    """Ids are used in order: unreferenced ids of this session below it are garbage."""
    closed: tuple[Inode, ...] = ()
    """Inodes that no descriptor of the session has open any more."""


class Renewed(msgspec.Struct, frozen=True, tag="renewed", forbid_unknown_fields=True):
    """The lease runs from the moment the answer was sent."""

    epoch: Epoch
    sequence: CommitSequence


class CloseInodes(msgspec.Struct, frozen=True, tag="close_inodes", forbid_unknown_fields=True):
    """Client -> meta server: no descriptor of the session has these open any more. Answer: `Done`."""

    inodes: tuple[Inode, ...]


class EndSession(msgspec.Struct, frozen=True, tag="end_session", forbid_unknown_fields=True):
    """Client -> meta server at unmount: everything is committed, the ranges may go. Answer: `Done`."""


class GrantIds(msgspec.Struct, frozen=True, tag="grant_ids", forbid_unknown_fields=True):
    """Client -> meta server: more ids. Answer: `IdsGranted`, after the grant was synced."""

    kind: str
    """`block` or `inode`."""
    lowest_in_flight: int = 0
    """The lowest id of this kind still to be referred to: ranges below it are given back."""


class IdsGranted(msgspec.Struct, frozen=True, tag="ids_granted", forbid_unknown_fields=True):
    """`count` ids from `first` on are the session's."""

    first: int
    count: int


class GetTable(msgspec.Struct, frozen=True, tag="get_table", forbid_unknown_fields=True):
    """Anyone -> meta server. Answer: `TableChanged`."""


class TableChanged(msgspec.Struct, frozen=True, tag="table_changed", forbid_unknown_fields=True):
    """Meta server -> sessions, pushed when a server's state or the table changed, and the answer to `GetTable`."""

    table: Table | None
    """None: the table is as it was, only servers changed."""
    servers: tuple[ServerView, ...]


class ReportReplica(msgspec.Struct, frozen=True, tag="report_replica", forbid_unknown_fields=True):
    """Client -> meta server, pushed: a replica did not serve. It only makes the server verify."""

    server: ServerNumber
    block: BlockId
    reason: str


SessionMessage = (
    Hello
    | Welcome
    | Proof
    | Done
    | Failure
    | Ping
    | OpenSession
    | ResumeSession
    | SessionOpened
    | Renew
    | Renewed
    | CloseInodes
    | EndSession
    | GrantIds
    | IdsGranted
    | GetTable
    | TableChanged
    | ReportReplica
)
