"""The data servers as this client knows them: one connection each, and which to go round.

A server whose connection failed, or that left a request unanswered, is suspect: nobody waits for it, and a background
task tries it again (50 ms to 1 s apart, at once when the meta server says it is up). Whoever needs one more server
waits for `changes`.
"""

import asyncio
import contextlib
from collections.abc import Iterable

import structlog

from mendfs.client.tasks import Changes, Tasks
from mendfs.errors import DeadlineExceeded, MendfsError, NotAuthentic, ReplicaError, Unreachable
from mendfs.model import ServerNumber, ServerView
from mendfs.wire.messages import Message
from mendfs.wire.messages.session import Done, Ping
from mendfs.wire.peer import Credentials, Peer, connect
from mendfs.world import World

log = structlog.get_logger("mendfs.client")

CONNECT_TIMEOUT_S = 2.0
RETRY_MIN_S = 0.05
RETRY_MAX_S = 1.0
LATENCY_WEIGHT = 0.1
"""Of a new sample in the running mean: ten requests decide."""
LATENCY_LARGE_BYTES = 256 << 10
"""Above it a request's time is mostly transfer, and is kept apart from small ones'."""


async def _answer_ping(peer: Peer, message: Message, received: object) -> Done:
    return Done()


class DataServer:
    """One data server: its connection, whether it is suspect, how fast it answers."""

    def __init__(self, view: ServerView, world: World, credentials: Credentials, changes: Changes, tasks: Tasks):
        self.view = view
        self.is_suspect = False
        self._world = world
        self._credentials = credentials
        self._changes = changes
        self._tasks = tasks
        self._peer: Peer | None = None
        self._connecting: asyncio.Task[Peer] | None = None
        self._retrying: asyncio.Task[None] | None = None
        self._retry_now = Changes()
        self._latency_s = [0.0, 0.0]

    @property
    def is_up(self) -> bool:
        """Whether it is worth waiting for."""
        return self.view.state != "down" and not self.is_suspect

    def update(self, view: ServerView) -> None:
        """The meta server's newest view of it."""
        moved = view.address != self.view.address
        came_back = view.state != "down" and (self.view.state == "down" or view.incarnation != self.view.incarnation)
        self.view = view
        if moved and self._peer is not None:
            self._tasks.spawn(self._peer.close())
            self._peer = None
        if came_back or moved:
            self._retry_now.notify()

    @property
    def connected(self) -> Peer | None:
        """Its connection, if there is one."""
        return self._peer if self._peer is not None and not self._peer.is_closed else None

    async def peer(self) -> Peer:
        """Its connection, made if there is none. Raises Unreachable at once while it is suspect."""
        if self._peer is not None and not self._peer.is_closed:
            return self._peer
        if self.is_suspect:
            raise Unreachable(f"data server {self.view.number} at {self.view.address} does not answer")
        try:
            return await self._connect()
        except NotAuthentic as error:
            self.suspect(error)
            raise Unreachable(str(error)) from error
        except Unreachable as error:
            self.suspect(error)
            raise

    async def _connect(self) -> Peer:
        if self._connecting is None or self._connecting.done():
            self._connecting = self._tasks.spawn(self._open(), is_awaited=True)
        # Shared by everyone who needs the server: one of them giving up must not end it.
        return await asyncio.shield(self._connecting)

    async def _open(self) -> Peer:
        peer = await connect(
            self._world.network,
            self.view.address,
            self._credentials,
            role="client",
            handler=_answer_ping,
            on_closed=self._closed,
            deadline_s=CONNECT_TIMEOUT_S,
        )
        self._peer = peer
        return peer

    def _closed(self, peer: Peer) -> None:
        if self._peer is peer:
            self._peer = None
            self.suspect(Unreachable(f"the connection to data server {self.view.number} ended"))

    def failed(self, error: MendfsError) -> None:
        """A request failed: suspect if that was for want of an answer."""
        if isinstance(error, DeadlineExceeded) or (isinstance(error, Unreachable) and self._peer is None):
            self.suspect(error)

    def suspect(self, error: MendfsError) -> None:
        """Go round it until it answers again."""
        if not self.is_suspect:
            self.is_suspect = True
            log.warning("data server does not answer, going round it", server=self.view.number, reason=str(error))
            self._changes.notify()
        if self._retrying is None or self._retrying.done():
            self._retrying = self._tasks.spawn(self._retry())

    async def _retry(self) -> None:
        pause_s = RETRY_MIN_S
        while self.is_suspect:
            await self._retry_now.wait(pause_s)
            pause_s = min(2 * pause_s, RETRY_MAX_S)
            try:
                peer = self._peer
                if peer is None or peer.is_closed:
                    peer = await self._connect()
                await peer.call(Ping(), deadline_s=CONNECT_TIMEOUT_S)
            except MendfsError:
                continue  # Said once, when it became suspect; it stays so.
            self.is_suspect = False
            log.info("data server answers again", server=self.view.number)
            self._changes.notify()

    def took(self, seconds: float, length: int) -> None:
        """A request of `length` bytes was answered after `seconds`."""
        at = length >= LATENCY_LARGE_BYTES
        mean = self._latency_s[at]
        self._latency_s[at] = seconds if mean == 0 else mean + LATENCY_WEIGHT * (seconds - mean)

    def expected_s(self, length: int) -> float:
        """The running mean for a request of about `length` bytes."""
        return self._latency_s[length >= LATENCY_LARGE_BYTES]

    async def close(self) -> None:
        """Close the connection."""
        peer, self._peer = self._peer, None
        if peer is not None:
            await peer.close()


class Servers:
    """All data servers of the volume."""

    def __init__(self, world: World, credentials: Credentials, tasks: Tasks) -> None:
        self._world = world
        self._credentials = credentials
        self._tasks = tasks
        self._servers: dict[ServerNumber, DataServer] = {}
        self.changes = Changes()

    def update(self, views: Iterable[ServerView]) -> None:
        """The meta server's newest views, of all servers or of those that changed."""
        for view in views:
            known = self._servers.get(view.number)
            if known is None:
                self._servers[view.number] = DataServer(view, self._world, self._credentials, self.changes, self._tasks)
            else:
                known.update(view)
        self.changes.notify()

    def connect_ahead(self) -> None:
        """Begin to connect to all servers that are up: a connection takes three round trips, and is needed soon."""
        for server in self._servers.values():
            if server.is_up and server.connected is None:
                self._tasks.spawn(self._try_to_connect(server))

    @staticmethod
    async def _try_to_connect(server: DataServer) -> None:
        with contextlib.suppress(ReplicaError):  # it is suspect now, and tried again
            await server.peer()

    def views(self) -> tuple[ServerView, ...]:
        """All servers as the meta server last described them."""
        return tuple(server.view for _, server in sorted(self._servers.items()))

    def all(self) -> tuple[DataServer, ...]:
        """All servers, by number."""
        return tuple(server for _, server in sorted(self._servers.items()))

    def find(self, number: ServerNumber) -> DataServer | None:
        """The server with this number, if the meta server has told of it."""
        return self._servers.get(number)

    def get(self, number: ServerNumber) -> DataServer:
        """The server with this number. Raises ReplicaError for one that nobody has told of."""
        server = self._servers.get(number)
        if server is None:
            raise ReplicaError(f"data server {number} is not known")
        return server

    def is_up(self, number: ServerNumber) -> bool:
        """Whether the server is worth waiting for."""
        server = self._servers.get(number)
        return server is not None and server.is_up

    def is_suspect(self, number: ServerNumber) -> bool:
        """Whether a request would fail at once."""
        server = self._servers.get(number)
        return server is None or server.is_suspect

    async def close(self) -> None:
        """Close all connections."""
        for server in list(self._servers.values()):
            await server.close()
