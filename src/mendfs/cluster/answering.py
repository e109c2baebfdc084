"""Whether the meta server answers: a process that runs may still hang, in a write to a disk that does not come back.

It cannot tell by itself: RocksDB's write holds the interpreter. So the supervisor asks, and says what it finds.
"""

import asyncio
from collections.abc import Callable

from mendfs.cluster.folder import read_secret
from mendfs.cluster.query import ask, connect_as_tool
from mendfs.errors import DeadlineExceeded, MendfsError
from mendfs.wire.messages.session import Done, Ping
from mendfs.wire.peer import Peer
from mendfs.world import World

ASK_EVERY_S = 1.0
SILENT_S = 5.0
"""No answer for so long: a busy machine delays one by tenths of a second, a slow sync is waited for elsewhere."""


class Answering:
    """Asks one server again and again, until it is cancelled."""

    def __init__(
        self, world: World, *, address: str, secret_path: str, store: str, tell: Callable[[str], None]
    ) -> None:
        self._world = world
        self._address = address
        self._secret_path = secret_path
        self._store = store
        self._tell = tell
        self._peer: Peer | None = None

    async def run(self) -> None:
        """Tell what is wrong, or an empty text, after each question."""
        try:
            while True:
                await asyncio.sleep(ASK_EVERY_S)
                self._tell(await self._ask())
        finally:
            if self._peer is not None:
                await self._peer.close()

    async def _ask(self) -> str:
        try:
            if self._peer is None or self._peer.is_closed:
                secret = read_secret(self._world.disk, self._secret_path)
                self._peer = await connect_as_tool(self._world, self._address, secret)
            await ask(self._peer, Ping(), Done, deadline_s=SILENT_S)
        except DeadlineExceeded:
            return f"it runs, but has not answered for {SILENT_S:.0f} s: does the disk below {self._store} hang?"
        except MendfsError:
            # It is not there, or is being started again: whoever watches its process says so.
            return ""
        return ""
