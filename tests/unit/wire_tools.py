"""What tests of the wire share: a server and a client in one process, a hostile side that writes raw bytes."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

from mendfs.wire import frame
from mendfs.wire.connection import Peer
from mendfs.wire.frame import HEADER_BYTES, Kind
from mendfs.wire.handshake import Accepting, Connecting
from mendfs.wire.messages import Message
from mendfs.wire.messages.session import Done
from mendfs.wire.peer import Credentials, Handler, Received, Reply, Server, connect, serve
from mendfs.world.tcp import TcpNetwork, parse_address

CREDENTIALS = Credentials(b"a secret of the tests")

Result = Reply | Message | None


async def say_done(peer: Peer, message: Message, received: Received | None) -> Result:
    """A handler that has nothing to say."""
    return Done()


@asynccontextmanager
async def serving(address: str, handler: Handler = say_done, **options: Any) -> AsyncIterator[Server]:
    server = await serve(TcpNetwork(), address, CREDENTIALS, role="data", handler=handler, **options)
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def connected(address: str, handler: Handler = say_done, **options: Any) -> AsyncIterator[Peer]:
    peer = await connect(TcpNetwork(), address, CREDENTIALS, role="client", handler=handler, **options)
    try:
        yield peer
    finally:
        await peer.close()


@asynccontextmanager
async def pair(address: str, handler: Handler, client_handler: Handler = say_done) -> AsyncIterator[Peer]:
    """A client of a server that answers with `handler`."""
    async with serving(address, handler) as server, connected(server.address, client_handler) as peer:
        yield peer


async def until(condition: Callable[[], Any], within_s: float = 30.0) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(within_s):
        while not condition():
            await asyncio.sleep(0.001)


class RawSide:
    """The other end of a connection, written by somebody else: sends any bytes, reads frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, address: str) -> "RawSide":
        where = parse_address(address)
        if where is None:
            return cls(*await asyncio.open_unix_connection(address))
        return cls(*await asyncio.open_connection(*where))

    def send(self, kind: int, request_id: int, message: Message | None, payload: bytes = b"", **fields: int) -> None:
        self.writer.write(frame.encode(kind, request_id, message, len(payload), **fields) + payload)

    async def receive(self) -> tuple[frame.Header, Message | None, bytes]:
        """The next frame. Raises IncompleteReadError if the connection ends, TimeoutError if nothing comes."""
        async with asyncio.timeout(10):
            head = await self.reader.readexactly(HEADER_BYTES)
            header = frame.parse_header(head)
            head += await self.reader.readexactly(header.message_bytes)
            message = frame.decode_message(header, memoryview(head))
            return header, message, await self.reader.readexactly(header.payload_bytes)

    async def shake_hands(self, credentials: Credentials = CREDENTIALS) -> None:
        handshake = Connecting(credentials, role="client", address="the server")
        self.send(Kind.REQUEST, 1, handshake.hello)
        welcome = (await self.receive())[1]
        assert welcome is not None
        self.send(Kind.REQUEST, 2, handshake.take(welcome))
        assert (await self.receive())[1] == Done()

    async def close(self) -> None:
        self.writer.close()
        try:
            await self.writer.wait_closed()
        except ConnectionError:
            return


@asynccontextmanager
async def raw(address: str, *, is_stranger: bool = False) -> AsyncIterator[RawSide]:
    """A raw connection to a server, after its handshake unless it is a stranger's."""
    side = await RawSide.open(address)
    try:
        if not is_stranger:
            await side.shake_hands()
        yield side
    finally:
        await side.close()


class FakeTransport:
    """Takes everything at once and remembers it, for tests without I/O."""

    def __init__(self) -> None:
        self.written = bytearray()
        self.is_reading = True
        self.is_aborted = False

    def get_extra_info(self, name: str) -> None:
        return None

    def set_write_buffer_limits(self, high: int) -> None:
        return None

    def write(self, data: bytes) -> None:
        self.written += data

    def writelines(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self.written += piece

    def pause_reading(self) -> None:
        self.is_reading = False

    def resume_reading(self) -> None:
        self.is_reading = True

    def abort(self) -> None:
        self.is_aborted = True

    def close(self) -> None:
        self.is_aborted = True


def unconnected(
    handler: Callable[[Peer, Message, Received | None], Awaitable[Result]] = say_done,
    *,
    is_stranger: bool = False,
    **options: Any,
) -> tuple[Peer, FakeTransport]:
    """A peer on a fake transport, to be fed by hand; its handshake is done unless it is to be a stranger's."""
    handshake = Accepting(CREDENTIALS, role="data")
    peer = Peer(handshake, handler, address="nobody", **options)
    transport = FakeTransport()
    peer.connection_made(cast(asyncio.BaseTransport, transport))
    if not is_stranger:
        connecting = Connecting(CREDENTIALS, role="client", address="nobody")
        proof = connecting.take(Accepting.take(handshake, connecting.hello))
        feed(peer, frame.encode(Kind.REQUEST, 2, proof))
        assert peer.ready.done()
        transport.written.clear()
    return peer, transport


def feed(peer: Peer, data: bytes | memoryview, piece: int = 1 << 20) -> None:
    """Hand over bytes as a transport does, at most `piece` at a time, until they end or the peer wants no more."""
    rest = memoryview(data)
    while rest and not peer._is_held:
        buffer = peer.get_buffer(65536)
        assert len(buffer)
        count = min(len(buffer), len(rest), piece)
        buffer[:count] = rest[:count]
        peer.buffer_updated(count)
        rest = rest[count:]
