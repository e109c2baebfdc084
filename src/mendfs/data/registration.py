"""Standing with the meta server: register, send heartbeats, reconnect for ever. It calls back over this connection."""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from mendfs.errors import MendfsError, NotAuthentic, Unreachable
from mendfs.model import Epoch, Generation, ServerNumber
from mendfs.wire.messages import data as messages
from mendfs.wire.peer import Credentials, Handler, Peer, connect
from mendfs.world.network import Network

log = structlog.get_logger("data")

HEARTBEAT_EVERY_S = 0.5
"""The meta server takes a server for down after 3 s without one: five may be lost."""
ANSWER_WITHIN_S = 2.0
BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 1.0


class Registration:
    """Keeps one data server registered."""

    def __init__(
        self,
        network: Network,
        meta: str,
        handler: Handler,
        *,
        credentials: Callable[[], Credentials],
        introduce: Callable[[Peer], messages.RegisterServer],
        admitted: Callable[[messages.Registered], Awaitable[None]],
        beat: Callable[[], messages.Heartbeat],
    ) -> None:
        self.epoch = Epoch(0)
        self.generation = Generation(0)
        self.number: ServerNumber | None = None
        self.registered = asyncio.Event()
        """Set while the meta server knows us."""
        self._network = network
        self._meta = meta
        self._handler = handler
        self._credentials = credentials
        self._introduce = introduce
        self._admitted = admitted
        self._beat = beat
        self._last_trouble = ""

    async def run(self) -> None:
        """Until cancelled. Raises what makes it senseless: another volume's folder, a store that does not open.

        A secret that is wrong from the start too; one that becomes wrong later may be the meta server's mistake.
        """
        backoff_s = BACKOFF_MIN_S
        while True:
            try:
                peer = await connect(self._network, self._meta, self._credentials(), role="data", handler=self._handler)
            except Unreachable as error:
                self._say(error)
            except NotAuthentic as error:
                if self.number is None:
                    raise
                self._say(error)
            else:
                try:
                    await self._stay(peer)
                except Unreachable as error:
                    self._say(error)
                finally:
                    if self.registered.is_set():
                        backoff_s = BACKOFF_MIN_S
                    self.registered.clear()
                    await peer.close()
            await asyncio.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    def _say(self, error: MendfsError) -> None:
        # Once, not once a second: a meta server may be away for a day.
        if str(error) != self._last_trouble:
            log.warning("not registered with the meta server, trying on", meta=self._meta, reason=str(error))
        self._last_trouble = str(error)

    async def _stay(self, peer: Peer) -> None:
        """Register, and send heartbeats until the connection ends. Raises Unreachable."""
        answer = await self._ask(peer, self._introduce(peer))
        assert isinstance(answer, messages.Registered)
        self.epoch, self.generation = answer.epoch, answer.generation
        await self._admitted(answer)
        self.number = answer.number
        self._last_trouble = ""
        self.registered.set()
        log.info("registered with the meta server", meta=self._meta, number=answer.number, epoch=answer.epoch)
        while True:
            seen = await self._ask(peer, self._beat())
            assert isinstance(seen, messages.HeartbeatSeen)
            self.epoch, self.generation = seen.epoch, seen.generation
            await asyncio.sleep(HEARTBEAT_EVERY_S)

    async def _ask(
        self, peer: Peer, message: messages.RegisterServer | messages.Heartbeat
    ) -> messages.Registered | messages.HeartbeatSeen:
        answer, received = await peer.call(message, deadline_s=ANSWER_WITHIN_S)
        if received is not None:
            received.release()
        if not isinstance(answer, messages.Registered | messages.HeartbeatSeen):
            raise Unreachable(f"{self._meta} answered {type(answer).__name__}: is it a meta server?")
        return answer
