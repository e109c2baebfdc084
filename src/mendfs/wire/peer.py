"""Connecting and serving: how a `Peer` comes to be. Everything above the wire imports from here."""

import asyncio
import resource
from collections.abc import Callable, Collection

import structlog

from mendfs.errors import DeadlineExceeded, MendfsError, Unreachable
from mendfs.wire.calls import Answer
from mendfs.wire.connection import POOL, Handler, Peer, Pending
from mendfs.wire.handshake import Accepting, Connecting, Credentials
from mendfs.wire.outbox import Payload
from mendfs.wire.payload import Received
from mendfs.wire.requests import Reply
from mendfs.world.buffers import BufferPool
from mendfs.world.network import Address, Listener, Network

__all__ = [
    "POOL",
    "Answer",
    "Credentials",
    "Handler",
    "Payload",
    "Peer",
    "Pending",
    "Received",
    "Reply",
    "Server",
    "connect",
    "serve",
]

log = structlog.get_logger()

HANDSHAKE_S = 5.0
"""What a stranger has to prove itself."""
STRANGERS_MAX = 256
"""Connections in their handshake; one more is closed at once."""
DESCRIPTORS_SPARED = 512
"""Of those that the process may have, for files: 128 tables, logs, segments. Of few, half."""


async def connect(
    network: Network,
    address: Address,
    credentials: Credentials,
    *,
    role: str,
    handler: Handler,
    on_closed: Callable[[Peer], None] | None = None,
    deadline_s: float = 5.0,
    pool: BufferPool = POOL,
) -> Peer:
    """Connect and do the handshake. Raises Unreachable, or NotAuthentic: then there is no use in trying again."""
    made: list[Peer] = []

    def closed(peer: Peer) -> None:
        # One whose handshake failed was never the caller's: it gets the exception instead.
        if on_closed is not None and peer.remote_role:
            on_closed(peer)

    def make() -> Peer:
        peer = Peer(
            Connecting(credentials, role=role, address=address),
            handler,
            address=address,
            on_closed=closed,
            pool=pool,
        )
        made.append(peer)
        return peer

    try:
        async with asyncio.timeout(deadline_s):
            await network.connect(address, make)
            peer = made[-1]
            await peer.ready
            return peer
    except TimeoutError as error:
        raise DeadlineExceeded(f"{address} does not answer (nothing came in {deadline_s:g} s)") from error
    finally:
        for peer in made:
            if not peer.ready.done() or peer.ready.cancelled():
                peer.abort(Unreachable("the handshake was not finished"))


def connections_max() -> int:
    """Connections that leave enough descriptors for the disk: a store that cannot open a file has to stop."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(allowed - DESCRIPTORS_SPARED, allowed // 2)


class Server:
    """Accepts connections until `close`, which ends those it accepted too."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        role: str,
        handler: Handler,
        on_opened: Callable[[Peer], None] | None,
        on_closed: Callable[[Peer], None] | None,
        pool: BufferPool,
    ) -> None:
        # In the order of their coming: `close` follows it, and that of a set would be another one in each run.
        self._peers: dict[Peer, None] = {}
        self._strangers: dict[Peer, asyncio.TimerHandle] = {}
        self._credentials = credentials
        self._role = role
        self._handler = handler
        self._on_opened = on_opened
        self._on_closed = on_closed
        self._pool = pool
        self._most = connections_max()
        self._listener: Listener

    @property
    def peers(self) -> Collection[Peer]:
        """Those whose handshake is done."""
        return self._peers

    @property
    def address(self) -> Address:
        """Where it listens, with the port that the system chose if 0 was asked for."""
        return self._listener.address

    async def listen(self, network: Network, address: Address) -> None:
        """Begin. Raises UsageError, naming the address."""
        self._listener = await network.listen(address, self._make)

    async def close(self) -> None:
        """Accept no more, end all connections and wait until the requests in them have ended."""
        await self._listener.close()
        strangers = list(self._strangers)
        for stranger in strangers:
            stranger.abort(Unreachable("the server stops"))
        await asyncio.gather(
            *(peer.close() for peer in self._peers), *(stranger.closed.wait() for stranger in strangers)
        )

    def _make(self) -> Peer:
        peer = Peer(
            Accepting(self._credentials, role=self._role),
            self._handler,
            address="",
            on_ready=self._ready,
            on_closed=self._closed,
            pool=self._pool,
        )
        loop = asyncio.get_running_loop()
        is_crowded = len(self._strangers) >= STRANGERS_MAX or len(self.peers) + len(self._strangers) >= self._most
        wait_s = 0 if is_crowded else HANDSHAKE_S
        self._strangers[peer] = loop.call_later(wait_s, self._expire, peer)
        return peer

    def _expire(self, peer: Peer) -> None:
        reason: MendfsError = DeadlineExceeded(f"no handshake within {HANDSHAKE_S:g} s")
        if len(self.peers) + len(self._strangers) > self._most:
            reason = Unreachable(f"more than {self._most} connections: the process has no descriptors for more")
        elif len(self._strangers) > STRANGERS_MAX:
            reason = Unreachable(f"more than {STRANGERS_MAX} connections in their handshake")
        log.warning("connection closed", remote=peer.remote_address, reason=str(reason))
        peer.abort(reason)

    def _ready(self, peer: Peer) -> None:
        self._strangers.pop(peer).cancel()
        self._peers[peer] = None
        if self._on_opened is not None:
            self._on_opened(peer)

    def _closed(self, peer: Peer) -> None:
        timer = self._strangers.pop(peer, None)
        if timer is not None:
            timer.cancel()
            return
        self._peers.pop(peer, None)
        if self._on_closed is not None:
            self._on_closed(peer)


async def serve(
    network: Network,
    address: Address,
    credentials: Credentials,
    *,
    role: str,
    handler: Handler,
    on_opened: Callable[[Peer], None] | None = None,
    on_closed: Callable[[Peer], None] | None = None,
    pool: BufferPool = POOL,
) -> Server:
    """Accept connections at `address`. Raises UsageError if it is in use."""
    server = Server(credentials, role=role, handler=handler, on_opened=on_opened, on_closed=on_closed, pool=pool)
    await server.listen(network, address)
    return server
