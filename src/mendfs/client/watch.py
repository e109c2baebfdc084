"""Which servers a client can reach, for people who want to be told: the shell.

A client that only reads now and then would notice a dead server late, so whoever watches keeps a connection to each.
"""

import asyncio
from collections.abc import Callable

import msgspec

from mendfs.client.servers import DataServer
from mendfs.client.shared import Shared
from mendfs.errors import MendfsError
from mendfs.model import ServerNumber

CONNECTED_MAX = 64
"""Connections held only to see them end. In a larger cluster, of the others one hears what the meta server says."""
FIRST_S = 1.0
"""For the first connections: until then nothing is said of servers that have not answered yet."""


class Reach(msgspec.Struct, frozen=True):
    """What can be reached."""

    meta: bool
    servers: dict[ServerNumber, bool]
    addresses: dict[ServerNumber, str]


def _reach(shared: Shared) -> Reach:
    servers = shared.servers.all()
    return Reach(
        shared.session.is_connected,
        {server.view.number: server.is_up for server in servers},
        {server.view.number: server.view.address for server in servers},
    )


async def watch(shared: Shared, tell: Callable[[Reach], None]) -> None:
    """Tell what can be reached, and again whenever that changes, until cancelled."""
    async with asyncio.TaskGroup() as group:
        connecting: dict[ServerNumber, asyncio.Task[None]] = {}

        def connect_all() -> None:
            for server in shared.servers.all()[:CONNECTED_MAX]:
                task = connecting.get(server.view.number)
                if server.connected is None and not server.is_suspect and (task is None or task.done()):
                    connecting[server.view.number] = group.create_task(_connect(server))

        connect_all()
        if connecting:
            await asyncio.wait(connecting.values(), timeout=FIRST_S)
        last: Reach | None = None
        while True:
            # Before looking, so that no change falls between the look and the wait.
            waiters = [changes.future() for changes in (shared.servers.changes, shared.session.connection_changes)]
            try:
                reach = _reach(shared)
                if reach != last:
                    last = reach
                    tell(reach)
                connect_all()
                await asyncio.wait(waiters, return_when=asyncio.FIRST_COMPLETED)
            finally:
                shared.servers.changes.forget(waiters[0])
                shared.session.connection_changes.forget(waiters[1])


async def _connect(server: DataServer) -> None:
    try:
        await server.peer()
    except MendfsError:
        return  # it is suspect now, and tried again in the background: that is what the watcher is told
