"""Connections over real sockets: calls both ways, payloads, deadlines, limits, and how they end."""

import asyncio
import errno
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import uvloop

from mendfs.errors import (
    AppendMoved,
    BadMessage,
    BlockMissing,
    DeadlineExceeded,
    MendfsError,
    NotAuthentic,
    OperationError,
    Unreachable,
    UsageError,
)
from mendfs.model import BlockId, Epoch, Incarnation, Inode, MiB, Partition, Slot
from mendfs.wire import frame
from mendfs.wire.calls import CALLS_MAX
from mendfs.wire.connection import UNREAD_ANSWER_BYTES_MAX, Peer
from mendfs.wire.frame import Kind
from mendfs.wire.messages import Message
from mendfs.wire.messages.data import BlockPages, GetBlock, GetHealth, PutBlock, Stored, SyncStore
from mendfs.wire.messages.session import Done, Ping, Renew
from mendfs.wire.peer import Credentials, Received, Reply, connect, serve
from mendfs.wire.requests import UNPROCESSED_BYTES_MAX
from mendfs.world.tcp import TcpNetwork
from tests.unit.wire_tools import CREDENTIALS, Result, connected, feed, pair, raw, say_done, serving, unconnected, until

PUT = PutBlock(Partition(1), BlockId(2), Inode(3), Slot(4), b"root")
GET = GetBlock(Partition(1), BlockId(2), 0, 1)
STORED = Stored(Incarnation(1), Epoch(1))


@pytest.fixture(autouse=True, params=["uvloop tcp", "uvloop unix", "asyncio tcp"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each test on the loop that we run on, on both kinds of socket, and once on the loop that others have."""
    loop, kind = request.param.split()
    if loop == "uvloop":
        asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    yield "127.0.0.1:0" if kind == "tcp" else str(tmp_path / "socket")
    asyncio.set_event_loop_policy(None)


async def settled(value: Callable[[], int]) -> int:
    """The value once it stays the same for 40 ms: long enough for what must not happen to happen."""
    last, seen = value(), 0
    while seen < 20:
        await asyncio.sleep(0.002)
        last, seen = value(), seen + 1 if value() == last else 0
    return last


class Store:
    """Keeps one payload, and gives it back as two pieces."""

    def __init__(self) -> None:
        self.data = b""
        self.sent = 0

    async def handle(self, peer: Peer, message: Message, received: Received | None) -> Result:
        if isinstance(message, PutBlock):
            self.data = bytes(received.view) if received is not None else b""
            return STORED
        middle = len(self.data) // 3
        return Reply(BlockPages(len(self.data), b"", Epoch(1)), [self.data[:middle], self.data[middle:]], self.count)

    def count(self) -> None:
        self.sent += 1


@pytest.mark.parametrize("length", [1, 1000, 16 << 10, 100_000, 5 * MiB + 1, 16 * MiB])
async def test_payloads_of_all_sizes_arrive_as_they_were_sent(address: str, length: int) -> None:
    data = (bytes(range(251)) * (length // 251 + 1))[:length]
    store = Store()
    async with pair(address, store.handle) as peer:
        answer = await peer.call(PUT, [memoryview(data)[:7], memoryview(data)[7:]], deadline_s=10)
        assert answer == (STORED, None)
        pooled = await peer.call(GET, deadline_s=10)
        assert pooled[1] is not None and bytes(pooled[1].view) == data
        pooled[1].release()
        pooled[1].release()
        with pytest.raises(ValueError):
            bytes(pooled[1].view)
        own = bytearray(length + 10)
        message, landed = await peer.call(GET, deadline_s=10, into=memoryview(own))
        assert landed is not None and len(landed.view) == length
        assert own == data + bytes(10)
        assert message == BlockPages(length, b"", Epoch(1))
        await until(lambda: store.sent == 2)


async def test_a_payload_longer_than_asked_for_is_refused_and_touches_nothing(address: str) -> None:
    store = Store()
    store.data = b"x" * 100_000
    async with pair(address, store.handle) as peer:
        own = bytearray(50_000)
        with pytest.raises(BadMessage):
            await peer.call(GET, deadline_s=10, into=memoryview(own))
        assert own == bytes(50_000)
        assert await peer.call(PUT, deadline_s=10) == (STORED, None)


async def test_many_calls_at_once_get_their_own_answers(address: str) -> None:
    async def answer(peer: Peer, message: Message, received: Received | None) -> Result:
        assert isinstance(message, GetBlock) and received is not None
        # Later requests are answered first.
        await asyncio.sleep(0.05 - message.first_page / 10_000)
        size = len(received.view)
        return Reply(BlockPages(message.first_page, b"", Epoch(0)), [bytes((message.first_page,)) * size])

    async with pair(address, answer) as peer:

        async def one(number: int) -> None:
            request = GetBlock(Partition(0), BlockId(0), number, 1)
            size = number * number * 10 + 1
            message, received = await peer.call(request, [bytes(size)], deadline_s=10)
            assert message == BlockPages(number, b"", Epoch(0))
            assert received is not None and received.view == bytes((number,)) * size
            received.release()

        await asyncio.gather(*(one(number) for number in range(200)))


async def test_either_side_calls(address: str) -> None:
    async def answer(peer: Peer, message: Message, received: Received | None) -> Result:
        if isinstance(message, Ping):
            return (await peer.call(SyncStore(), deadline_s=5))[0]
        return BlockPages(7, b"", Epoch(1))

    async with pair(address, answer, answer) as peer:
        assert (await peer.call(Ping(), deadline_s=5))[0] == BlockPages(7, b"", Epoch(1))


@pytest.mark.parametrize(
    "error",
    [BlockMissing("block 7 is not here"), OperationError(errno.ENOTEMPTY, "/a"), AppendMoved(77), MendfsError("x" * 9)],
)
async def test_an_error_of_the_handler_is_raised_in_the_caller(address: str, error: MendfsError) -> None:
    async def fail(peer: Peer, message: Message, received: Received | None) -> Result:
        raise error

    async with pair(address, fail) as peer:
        for payload in ([], [b"x" * 100_000]):
            with pytest.raises(type(error)) as caught:
                await peer.call(PUT, payload, deadline_s=5)
            assert type(caught.value) is type(error)
            assert (str(caught.value), caught.value.errno) == (str(error), error.errno)


async def test_a_mistake_of_ours_in_a_handler_is_an_answer_too(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    async def fail(peer: Peer, message: Message, received: Received | None) -> Result:
        if isinstance(message, Ping):
            return Done()
        raise ZeroDivisionError("our mistake")

    async with pair(address, fail) as peer:
        with pytest.raises(MendfsError, match="SyncStore: ZeroDivisionError: our mistake"):
            await peer.call(SyncStore(), deadline_s=5)
        assert await peer.call(Ping(), deadline_s=5) == (Done(), None)
    assert "ZeroDivisionError" in capsys.readouterr().out


async def test_pushes_arrive_in_order(address: str) -> None:
    seen: list[int] = []

    async def note(peer: Peer, message: Message, received: Received | None) -> Result:
        assert isinstance(message, Renew)
        seen.append(message.lowest_block_in_flight)
        return None

    async with pair(address, note) as peer:
        for number in range(1000):
            peer.push(Renew(BlockId(number)))
        await until(lambda: len(seen) == 1000)
        assert seen == list(range(1000))
    peer.push(Renew(BlockId(0)))


async def test_a_wrong_secret_is_told_from_an_address_that_does_not_answer(address: str) -> None:
    network = TcpNetwork()
    opened: list[Peer] = []
    async with serving(address, on_opened=opened.append) as server:
        with pytest.raises(
            NotAuthentic, match=f"{server.address} does not accept the secret of this cluster"
        ) as caught:
            await connect(network, server.address, Credentials(b"wrong"), role="client", handler=say_done)
        assert "\n" not in str(caught.value)
        assert opened == []
        where = server.address
    with pytest.raises(Unreachable, match=f"{where} does not answer"):
        await connect(network, where, CREDENTIALS, role="client", handler=say_done)


async def test_a_server_ends_its_connections_in_the_order_of_their_coming(address: str) -> None:
    """In that of their addresses in memory, the same seed of a simulation gave another run now and then."""
    network, opened = TcpNetwork(), list[Peer]()
    server = await serve(network, address, CREDENTIALS, role="meta", handler=say_done, on_opened=opened.append)
    peers = [await connect(network, server.address, CREDENTIALS, role="client", handler=say_done) for _ in range(8)]
    assert list(server.peers) == opened
    assert len(opened) == len(peers)
    await server.close()


async def test_another_volume_is_refused_and_none_accepts_any(address: str) -> None:
    network = TcpNetwork()
    ours = Credentials(CREDENTIALS.secret, "aa")
    server = await serve(network, address, ours, role="meta", handler=say_done)
    peers = []
    for volume in ("aa", ""):
        peer = await connect(network, server.address, Credentials(ours.secret, volume), role="client", handler=say_done)
        assert (peer.remote_role, peer.remote_volume) == ("meta", "aa")
        peers.append(peer)
    with pytest.raises(NotAuthentic, match="serves volume aa, not bb"):
        await connect(network, server.address, Credentials(ours.secret, "bb"), role="client", handler=say_done)
    # A server without a volume learns it later; the same credentials are read at the next handshake.
    ours.volume = ""
    peer = await connect(network, server.address, Credentials(ours.secret, "bb"), role="client", handler=say_done)
    peers.append(peer)
    assert {peer.remote_role for peer in server.peers} == {"client"}
    await asyncio.gather(*(peer.close() for peer in peers))
    await server.close()


async def test_a_server_that_accepts_and_says_nothing_is_unreachable(address: str) -> None:
    listener = await TcpNetwork().listen(address, asyncio.Protocol)
    with pytest.raises(DeadlineExceeded, match=f"{listener.address} does not answer"):
        await connect(TcpNetwork(), listener.address, CREDENTIALS, role="client", handler=say_done, deadline_s=0.05)
    await listener.close()


async def test_after_a_deadline_nothing_lands_in_the_callers_memory(address: str) -> None:
    may_answer = asyncio.Event()
    cancelled: list[Message] = []

    async def answer(peer: Peer, message: Message, received: Received | None) -> Result:
        if isinstance(message, Ping):
            return Done()
        try:
            await may_answer.wait()
        except asyncio.CancelledError:
            cancelled.append(message)
            # A handler that answers although nobody waits: the answer is dropped.
            await may_answer.wait()
        return Reply(BlockPages(1, b"", Epoch(1)), [b"x" * MiB])

    async with pair(address, answer) as peer:
        own = bytearray(MiB)
        with pytest.raises(DeadlineExceeded, match=f"{peer.remote_address} did not answer"):
            await peer.call(GET, deadline_s=0.03, into=memoryview(own))
        await until(lambda: cancelled == [GET])
        call = asyncio.create_task(peer.call(GET, deadline_s=30, into=memoryview(own)))
        await asyncio.sleep(0)
        await peer.call(Ping(), deadline_s=5)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: cancelled == [GET, GET])
        may_answer.set()
        assert await peer.call(Ping(), deadline_s=5) == (Done(), None)
        assert own == bytes(MiB)


async def test_a_payload_that_is_arriving_when_its_call_is_cancelled_is_discarded(address: str) -> None:
    async with serving(address) as server:
        own = bytearray(MiB)
        # The server's side is played by hand, to stop in the middle of a payload.
        async with raw(server.address) as side:
            (remote,) = server.peers
            call = asyncio.create_task(remote.call(GET, deadline_s=30, into=memoryview(own)))
            header, message, _ = await side.receive()
            assert message == GET
            data = b"x" * MiB
            side.send(Kind.ANSWER, header.request_id, BlockPages(1, b"", Epoch(1)), data[:0])
            assert (await call)[1] is None
            call = asyncio.create_task(remote.call(GET, deadline_s=30, into=memoryview(own)))
            header, _, _ = await side.receive()
            side.writer.write(frame.encode(Kind.ANSWER, header.request_id, BlockPages(1, b"", Epoch(1)), MiB))
            side.writer.write(data[: MiB // 2])
            await until(lambda: own[MiB // 2 - 1])
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            side.writer.write(data[MiB // 2 :])
            side.send(Kind.REQUEST, 1, Ping())
            while (await side.receive())[0].kind != Kind.ANSWER:
                pass
            assert own == bytearray(data[: MiB // 2]).ljust(MiB, b"\0")


async def test_a_handler_is_stopped_when_its_callers_deadline_has_passed(address: str) -> None:
    stopped: list[Message] = []

    async def wait(peer: Peer, message: Message, received: Received | None) -> Result:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(message)
        return None

    async with serving(address, wait) as server, raw(server.address) as side:
        side.send(Kind.REQUEST, 1, Ping(), deadline_ms=30)
        side.send(Kind.REQUEST, 2, SyncStore(), deadline_ms=30_000)
        await until(lambda: stopped)
        assert stopped == [Ping()]


async def test_when_a_connection_ends_everybody_is_told(address: str) -> None:
    stopped: list[Message] = []
    closed: list[Peer] = []

    async def wait(peer: Peer, message: Message, received: Received | None) -> Result:
        try:
            await asyncio.Event().wait()
        finally:
            stopped.append(message)
        return None

    async with serving(address, wait, on_closed=closed.append) as server:
        peer = await connect(
            TcpNetwork(), server.address, CREDENTIALS, role="client", handler=say_done, on_closed=closed.append
        )
        calls = [asyncio.create_task(peer.call(Ping(), deadline_s=30)) for _ in range(3)]
        await until(lambda: len(server.peers) == 1 and len(next(iter(server.peers))._requests) == 3)
        (remote,) = server.peers
        remote.abort(Unreachable("the test ends it"))
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(result) for result in results] == [Unreachable] * 3
        assert server.address in str(results[0])
        await until(lambda: len(stopped) == 3 and len(closed) == 2)
        assert peer.is_closed and peer.closed.is_set() and not server.peers
        # A quarter of a MiB each, in objects that refer to each other: it must not wait for the garbage collector.
        assert not peer._scratch and not remote._scratch
        assert set(closed) == {peer, remote}
        with pytest.raises(Unreachable):
            await peer.call(Ping(), deadline_s=30)


async def test_closing_sends_what_was_waiting(address: str) -> None:
    seen: list[Message] = []

    async def note(peer: Peer, message: Message, received: Received | None) -> Result:
        seen.append(message)
        return None

    async with serving(address, note) as server:
        async with connected(server.address) as peer:
            for number in range(100):
                peer.push(Renew(BlockId(number), tuple(Inode(inode) for inode in range(3000))))
        await until(lambda: len(seen) == 100)


async def test_callers_beyond_the_limit_wait_for_a_place(address: str) -> None:
    may_answer = asyncio.Event()
    handled = 0

    async def answer(peer: Peer, message: Message, received: Received | None) -> Result:
        nonlocal handled
        handled += 1
        await may_answer.wait()
        return Done()

    async with pair(address, answer) as peer:
        calls = [asyncio.create_task(peer.call(Ping(), deadline_s=30)) for _ in range(CALLS_MAX + 50)]
        await until(lambda: handled == CALLS_MAX)
        with pytest.raises(DeadlineExceeded):
            await peer.call(Ping(), deadline_s=0.02)
        for call in calls[:5] + calls[-5:]:
            call.cancel()
        await until(lambda: handled == CALLS_MAX + 5)
        may_answer.set()
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(result, asyncio.CancelledError) for result in results) == 10
        assert results[5:-5] == [(Done(), None)] * (CALLS_MAX + 40)


async def test_more_requests_than_allowed_are_not_read(address: str) -> None:
    may_answer = asyncio.Event()
    handled = 0

    async def answer(peer: Peer, message: Message, received: Received | None) -> Result:
        nonlocal handled
        handled += 1
        await may_answer.wait()
        return Done()

    async with serving(address, answer) as server, raw(server.address) as side:
        for number in range(1000):
            side.send(Kind.REQUEST, number, Ping())
        await until(lambda: handled > CALLS_MAX)
        assert await settled(lambda: handled) == CALLS_MAX + 1
        may_answer.set()
        answered = {(await side.receive())[0].request_id for _ in range(1000)}
        assert answered == set(range(1000))


async def test_payloads_being_handled_are_bounded(address: str) -> None:
    may_answer = asyncio.Event()
    handled = 0

    async def answer(peer: Peer, message: Message, received: Received | None) -> Result:
        nonlocal handled
        handled += 1
        await may_answer.wait()
        return Done()

    async with pair(address, answer) as peer:
        data = bytes(4 * MiB)
        calls = [asyncio.create_task(peer.call(PUT, [data], deadline_s=30)) for _ in range(40)]
        expected = UNPROCESSED_BYTES_MAX // len(data)
        await until(lambda: handled >= expected)
        assert await settled(lambda: handled) == expected
        # Calls that were not begun to be sent are simply taken back.
        for call in calls[30:]:
            call.cancel()
        may_answer.set()
        await asyncio.gather(*calls[:30])
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*calls[30:])
        assert handled == 30


async def test_answers_that_nobody_reads_are_bounded_and_given_back(address: str) -> None:
    data = bytes(4 * MiB)
    handled = given_back = 0

    def count() -> None:
        nonlocal given_back
        given_back += 1

    async def answer(peer: Peer, message: Message, received: Received | None) -> Result:
        nonlocal handled
        if isinstance(message, Ping):
            return Done()
        handled += 1
        return Reply(BlockPages(1, b"", Epoch(1)), [data], count)

    async with serving(address, answer) as server:
        async with raw(server.address) as side:
            side.writer.transport.pause_reading()  # type: ignore[attr-defined] # a transport of both directions
            for number in range(CALLS_MAX):
                side.send(Kind.REQUEST, number, GET)
                await asyncio.sleep(0)
            await until(lambda: handled * len(data) > UNREAD_ANSWER_BYTES_MAX)
            reached = await settled(lambda: handled)
            assert reached < 60
            # Nobody else waits for the one that does not read.
            async with connected(server.address) as peer:
                assert await peer.call(Ping(), deadline_s=5) == (Done(), None)
        await until(lambda: given_back == handled)


async def test_reading_goes_on_when_answers_that_had_to_wait_have_left_at_once(address: str) -> None:
    """The transport may take everything without ever asking for a pause: found as a connection that hung for good."""
    data = bytes(16 * MiB)

    async def answer(peer: Peer, message: Message, received: Received | None) -> Result:
        return Reply(BlockPages(1, b"", Epoch(1)), [data])

    peer, transport = unconnected(answer)
    paused = 0
    for number in range(5):
        feed(peer, b"".join(frame.encode(Kind.REQUEST, 10 * number + i, GET) for i in range(4)))
        async with asyncio.timeout(5):
            while len(peer._requests) or not transport.is_reading or len(peer._outbox):
                paused += not transport.is_reading
                await asyncio.sleep(0)
    assert paused
    assert len(transport.written) > 5 * 4 * len(data)
    peer.connection_lost(None)


async def test_the_other_sides_own_failure_to_encode_is_an_answer(address: str) -> None:
    async def answer(peer: Peer, message: Message, received: Received | None) -> Result:
        return BlockPages(1, bytes(3 * MiB), Epoch(1))

    async with pair(address, answer) as peer:
        with pytest.raises(BadMessage):
            await peer.call(GetHealth(), deadline_s=5)


async def test_an_address_in_use_is_named(address: str) -> None:
    async with serving(address) as server:
        with pytest.raises(UsageError, match=f"cannot listen on {server.address}"):
            await serve(TcpNetwork(), server.address, CREDENTIALS, role="data", handler=say_done)
        async with connected(server.address) as peer:
            assert await peer.call(Ping(), deadline_s=5) == (Done(), None)
        where = server.address
    async with serving(where) as again, connected(again.address) as peer:
        assert await peer.call(Ping(), deadline_s=5) == (Done(), None)
