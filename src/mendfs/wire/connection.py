"""A connection between two processes of a cluster. Either side calls, answers and pushes; calls are multiplexed.

A peer owns the tasks of the requests it is handling and cancels them when the connection ends, when the caller says so
and when the caller's deadline has passed. What comes in is bounded (`wire.requests`). A frame that cannot be understood
ends the connection with a logged reason and touches no other one.
"""

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable
from typing import Any, cast

import structlog

from mendfs.errors import BadFrame, BadMessage, MendfsError, Unreachable
from mendfs.model import KiB, MiB
from mendfs.wire import frame
from mendfs.wire.calls import Answer, Call, Calls
from mendfs.wire.frame import ANSWER, CANCEL, FAILURE, PUSH, REQUEST, Header
from mendfs.wire.handshake import Accepting, Connecting
from mendfs.wire.messages import Message
from mendfs.wire.messages.session import Failure
from mendfs.wire.outbox import Outbox, Payload
from mendfs.wire.payload import Received
from mendfs.wire.protocol import FrameReader
from mendfs.wire.requests import Reply, Requests, Result, error_of, failure_of
from mendfs.world.buffers import BufferPool
from mendfs.world.network import Address
from mendfs.world.tcp import local_host, name_of, widen

log = structlog.get_logger()

UNREAD_ANSWER_BYTES_MAX = 32 * MiB
"""Answers that the other side does not read, above which its requests are read no more: what a fast reader has asked
for in advance stays below it."""
FRAMES_WAITING_MAX = 16 * KiB
"""Only pushes can wait in such numbers: the other side has not read for long, and is better off anew."""
CLOSE_S = 1.0
"""How long `close` waits until what was written has left."""
POOL = BufferPool()
"""Payload buffers of this process's connections: one pool, for a block may come by any of them."""

_ANSWERS = (ANSWER, FAILURE)

Handler = Callable[["Peer", Message, Received | None], Awaitable[Result]]
"""Handles a request or a push. A MendfsError it raises is the answer; anything else is our mistake: logged, and
answered as a plain error. The payload it got is released when it returns, so no answer may refer to it."""


class Pending:
    """A call that was begun."""

    __slots__ = ("_call", "_peer", "_request_id")

    def __init__(self, peer: "Peer", request_id: int, call: Call) -> None:
        self._peer = peer
        self._request_id = request_id
        self._call = call

    async def result(self) -> Answer:
        """Wait for the answer: see `Peer.call`."""
        try:
            answer = await self._call.future
        except BaseException:
            self.cancel()
            raise
        # The payload is the caller's from here on: a late `cancel` must not take it away.
        self._call.received = None
        message = answer[0]
        if type(message) is Failure:
            raise error_of(message)
        return answer

    async def is_answered_within(self, seconds: float) -> bool:
        """Wait so long for the answer, or for the error that there will be instead; False if none came."""
        call, loop = self._call, asyncio.get_running_loop()
        waiter = loop.create_future()

        def wake(_: object = None) -> None:
            if not waiter.done():
                waiter.set_result(None)

        timer = loop.call_later(seconds, wake)
        call.future.add_done_callback(wake)
        try:
            await waiter
        except BaseException:
            self.cancel()
            raise
        finally:
            timer.cancel()
        return call.future.done()

    def cancel(self) -> None:
        """Nobody waits any more: nothing is written into the caller's memory from now on."""
        self._peer.give_up(self._request_id, self._call)
        future = self._call.future
        if not future.done():
            future.cancel()
        elif not future.cancelled():
            future.exception()  # Seen, lest asyncio report it as an error that nobody looked at.


class Peer(FrameReader):
    """One connection. Made by `wire.peer.connect` and `wire.peer.serve`."""

    def __init__(
        self,
        handshake: Connecting | Accepting,
        handler: Handler,
        *,
        address: Address,
        on_ready: Callable[["Peer"], None] | None = None,
        on_closed: Callable[["Peer"], None] | None = None,
        pool: BufferPool = POOL,
    ) -> None:
        super().__init__()
        self.remote_role = ""
        self.remote_volume = ""
        self.remote_address = address
        self.is_closed = False
        self.closed = asyncio.Event()
        self.context: Any = None
        """Whatever the owner keeps about this connection."""
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        """Done when the handshake is; its exception says why it failed."""
        self._loop = loop
        self._handshake: Connecting | Accepting | None = handshake
        self._on_ready = on_ready
        self._on_closed = on_closed
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._outbox: Outbox
        self._reason: MendfsError | None = None
        self._calls = Calls(loop, pool, self._give_up)
        self._requests = Requests(loop, functools.partial(handler, self), self._answer, self._room_made)
        self._incoming: Received | None = None

    # For those who use the connection.

    async def call(
        self, message: Message, payload: Payload = (), *, deadline_s: float, into: memoryview | None = None
    ) -> Answer:
        """Ask the other side; returns its answer and the payload that came with it.

        Raises the error it answered with, Unreachable if the connection ended, DeadlineExceeded. With `into`, a payload
        that fits lands there (the Received's view is a part of it); once this has returned or raised, nothing more is
        written to it. `payload` must stay unchanged until the answer. After a deadline or a cancellation an unfinished
        send may still read it, so whoever receives one must check what came, as a put does.
        """
        if self._calls.is_full:
            deadline = self._loop.time() + deadline_s
            await self._calls.wait_for_place(deadline)
            deadline_s = max(deadline - self._loop.time(), 0.0)
        return await self.start(message, payload, deadline_s=deadline_s, into=into).result()

    @property
    def local_host(self) -> str:
        """The address of this machine that the connection uses; empty for a Unix socket."""
        assert self._transport is not None, "connect and serve give out connected peers only"
        return local_host(self._transport)

    @property
    def may_start(self) -> bool:
        """Whether a call can be begun without waiting for a place."""
        return not self._calls.is_full

    def start(
        self, message: Message, payload: Payload = (), *, deadline_s: float, into: memoryview | None = None
    ) -> "Pending":
        """As `call`, but without waiting for the answer: the caller must await its `result`, or `cancel` it."""
        if self.is_closed:
            raise self._ended()
        request_id, call = self._calls.begin(self._loop.time() + deadline_s, into)
        try:
            payload_bytes = sum(map(len, payload)) if payload else 0
            deadline_ms = min(int(deadline_s * 1000) + 1, frame.DEADLINE_MS_MAX)
            head = frame.encode(REQUEST, request_id, message, payload_bytes, deadline_ms)
        except BaseException:
            self._calls.forget(request_id)
            raise
        # A caller that is alone waits for nobody; calls of many leave together.
        at_once = len(self._calls) == 1
        self._outbox.send(head, payload, payload_bytes, at_once=at_once, request_id=request_id)
        return Pending(self, request_id, call)

    def give_up(self, request_id: int, call: Call) -> None:
        """Nobody waits for this call of ours any more."""
        if self._calls.forget(request_id):
            self._give_up(request_id)
        elif call.received is not None:
            call.received.release()

    def push(self, message: Message) -> None:
        """Tell the other side something that needs no answer. Lost if the connection ends."""
        if self.is_closed:
            return
        if len(self._outbox) >= FRAMES_WAITING_MAX:
            self.abort(Unreachable(f"{self.remote_address} does not read what it is sent"))
            return
        self._outbox.send(frame.encode(PUSH, 0, message), at_once=False)

    def abort(self, reason: MendfsError) -> None:
        """End the connection now; calls in flight fail with `reason`."""
        self._is_held = True
        if self._reason is None:
            self._reason = reason
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        """Send what is waiting, within a second, end the connection, and wait until its requests have ended too."""
        assert self._transport is not None, "connect and serve give out connected peers only"
        if not self.is_closed:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_S):
                    await self._outbox.drain()
                    self._transport.close()
                    await self.closed.wait()
        self._transport.abort()
        await self.closed.wait()
        await self._requests.wait()

    # asyncio.BufferedProtocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport is there; the connecting side speaks first."""
        # uvloop's transports are asyncio.Transports in all but their class.
        self._transport = cast(asyncio.Transport, transport)
        widen(transport)
        self._outbox = Outbox(self._loop, self._transport, self._room_made)
        if not self.remote_address:
            self.remote_address = name_of(transport)
        self._calls.remote = self.remote_address
        if self._reason is not None:
            # Given up before the transport was there.
            self._transport.abort()
            return
        if isinstance(self._handshake, Connecting):
            self._send_simple(REQUEST, 1, self._handshake.hello)

    def connection_lost(self, exc: Exception | None) -> None:
        """Everybody who waits is told; requests being handled are cancelled."""
        self.is_closed = self._is_held = True
        if self._reason is None:
            self._reason = Unreachable(f"the connection to {self.remote_address} ended{f' ({exc})' if exc else ''}")
        self.let_go()
        self._outbox.close()
        self._requests.cancel_all()
        self._calls.fail_all(self._ended)
        if not self.ready.done():
            self.ready.set_exception(self._reason)
            # Nobody waits for it on the listening side, which has logged the reason.
            self.ready.exception()
        self.closed.set()
        if self._on_closed is not None:
            self._on_closed(self)

    def pause_writing(self) -> None:
        """The kernel takes no more for the moment."""
        self._outbox.pause()

    def resume_writing(self) -> None:
        """The kernel has taken everything."""
        self._outbox.resume()

    # FrameReader

    def place_payload(self, header: Header, message: Message) -> memoryview | None:
        """Answers' payloads go where the caller wants them, requests' into a buffer of the pool."""
        if header.kind == ANSWER:
            return self._calls.place_payload(header.request_id, header.payload_bytes)
        if header.kind == FAILURE:
            return None
        self._incoming = Received.take(header.payload_bytes, self._pool)
        return self._incoming.view

    def frame_received(self, header: Header, message: Message | BadMessage | None) -> None:
        """Hand a frame to whom it concerns."""
        kind = header.kind
        if self._handshake is not None:
            self._shake(header, message)
        elif isinstance(message, BadMessage):
            self._bad_message_received(header, message)
        elif message is None:
            if kind != CANCEL:
                raise BadFrame("a frame without a message")
            self._requests.cancel(header.request_id)
        elif kind in _ANSWERS:
            self._calls.answer(header.request_id, message)
        else:
            received, self._incoming = self._incoming, None
            self._requests.begin(header, message, received)
            if not self._requests.has_room:
                self._regulate()

    def frame_refused(self, error: BadFrame) -> None:
        """Nothing after such a frame can be trusted."""
        log.warning(
            "bad frame, connection closed", remote=self.remote_address, role=self.remote_role, reason=str(error)
        )
        self.abort(error)

    # The rest is ours.

    def _ended(self) -> MendfsError:
        """A new exception each time, for each is raised in a task of its own."""
        return Unreachable(str(self._reason))

    def _send_simple(self, kind: int, request_id: int, message: Message | None) -> None:
        self._outbox.send(frame.encode(kind, request_id, message), at_once=True)

    def _give_up(self, request_id: int) -> None:
        """A call ended without its answer: nothing of it may be sent or received any more."""
        self.discard_payload(request_id)
        if not self.is_closed and not self._outbox.take_back(request_id):
            self._send_simple(CANCEL, request_id, None)

    def _answer(self, request_id: int, result: Result) -> None:
        """Send a handler's result."""
        reply = result if type(result) is Reply else Reply(cast(Message, result))
        payload = reply.payload
        payload_bytes = sum(map(len, payload)) if payload else 0
        kind = FAILURE if type(reply.message) is Failure else ANSWER
        try:
            head = frame.encode(kind, request_id, reply.message, payload_bytes)
        except BadMessage as error:
            log.error("an answer could not be sent", remote=self.remote_address, reason=str(error))
            head, payload, payload_bytes = frame.encode(FAILURE, request_id, failure_of(error)), (), 0
        # The answer to the only request leaves now; those to many leave together.
        at_once = not len(self._requests)
        self._outbox.send(head, payload, payload_bytes, at_once=at_once, is_answer=True, sent=reply.sent)
        if self._outbox.answer_bytes > UNREAD_ANSWER_BYTES_MAX:
            self._regulate()

    def _room_made(self) -> None:
        """A request ended, or waiting answers have left."""
        if self._is_held:
            self._regulate()

    def _regulate(self) -> None:
        """Stop reading while the other side asks for more than is being handled, or than it reads answers of."""
        if self._reason is not None or self._transport is None:
            return
        if self._is_held and self._has_room():
            # What arrived before comes first, and may be enough to stop again.
            self._is_held = False
            try:
                self.parse()
            except BadFrame as error:
                self.frame_refused(error)
                return
            self._is_held = not self._has_room()
            if not self._is_held:
                self._transport.resume_reading()
        elif not self._is_held and not self._has_room():
            self._is_held = True
            self._transport.pause_reading()

    def _has_room(self) -> bool:
        return self._requests.has_room and self._outbox.answer_bytes <= UNREAD_ANSWER_BYTES_MAX

    def _bad_message_received(self, header: Header, error: BadMessage) -> None:
        """The stream is intact, so only what this frame belongs to fails."""
        log.warning("bad message", remote=self.remote_address, role=self.remote_role, reason=str(error))
        if header.kind == REQUEST:
            self._send_simple(FAILURE, header.request_id, failure_of(error))
        elif header.kind != PUSH:
            self._calls.fail(header.request_id, error)

    def _shake(self, header: Header, message: Message | BadMessage | None) -> None:
        """A frame of the handshake."""
        handshake = self._handshake
        try:
            if message is None or isinstance(message, BadMessage):
                raise BadFrame(f"no handshake: {message}")
            if isinstance(handshake, Connecting):
                if type(message) is Failure:
                    text = f"{self.remote_address}: {message.text}"
                    raise error_of(Failure(message.code, text, message.errno))
                proof = handshake.take(message)
                if proof is not None:
                    self._send_simple(REQUEST, 2, proof)
                    return
            elif handshake is not None:
                answer = handshake.take(message)
                self._send_simple(ANSWER, header.request_id, answer)
                if not handshake.is_done:
                    return
        except MendfsError as error:
            self._refuse_stranger(header, error)
            return
        assert handshake is not None
        self.remote_role, self.remote_volume = handshake.remote_role, handshake.remote_volume
        self._handshake = None
        self.admit()
        if not self.ready.done():
            self.ready.set_result(None)
        if self._on_ready is not None:
            self._on_ready(self)

    def _refuse_stranger(self, header: Header, error: MendfsError) -> None:
        self._reason = error
        self._is_held = True
        if isinstance(self._handshake, Accepting):
            # The connecting side gets the reason as an exception.
            log.warning("handshake failed, connection closed", remote=self.remote_address, reason=str(error))
        if header.kind == REQUEST:
            self._send_simple(FAILURE, header.request_id, failure_of(error))
        if self._transport is not None:
            self._transport.close()
