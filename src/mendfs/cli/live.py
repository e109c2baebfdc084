"""The live view of `mendfs up` on a terminal: servers, health and what happened last, until Ctrl-C."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mendfs.cli.status_text import SERVER_HEADS, health_line, server_rows, volume_line
from mendfs.cluster.folder import read_secret
from mendfs.cluster.query import ask, connect_as_tool
from mendfs.cluster.service import RunningCluster
from mendfs.errors import MendfsError
from mendfs.wire.messages.meta import GetStatus, StatusReport
from mendfs.wire.peer import Peer
from mendfs.world import World, real_world

REFRESH_S = 1.0
STATUS_TIMEOUT_S = 3.0
NOTICES_SHOWN = 8
HEADS_SHOWN = {"server", "state", "address", "pid", "blocks", "used", "reads", "writes"}
COLOURS = {"up": "green", "down": "red", "whole": "green", "at-risk": "red"}


class _Asker:
    """The meta server's status, over a connection that is made anew when it was lost."""

    def __init__(self, world: World, cluster: RunningCluster) -> None:
        self._world = world
        self._cluster = cluster
        self._peer: Peer | None = None

    async def status(self) -> Mapping[str, Any] | str:
        """The document, or why there is none."""
        try:
            if self._peer is None or self._peer.is_closed:
                record = self._cluster.folder.read()
                assert record is not None, "it runs"
                secret = read_secret(self._world.disk, self._cluster.folder.secret_path)
                self._peer = await connect_as_tool(self._world, record.meta, secret)
            report = await ask(self._peer, GetStatus(), StatusReport, deadline_s=STATUS_TIMEOUT_S)
        except MendfsError as error:
            return str(error)
        return report.document

    async def close(self) -> None:
        if self._peer is not None:
            await self._peer.close()


def _view(status: Mapping[str, Any] | str, mount: str, notices: deque[str]) -> Group:
    if isinstance(status, str):
        parts: list[Text | Table] = [Text(status, style="red")]
    else:
        parts = [
            Text(volume_line(status["volume"])),
            Text(health_line(status), style=COLOURS.get(status["health"], "yellow")),
            _servers(status),
        ]
    if mount:
        parts.append(Text(f"mounted at {mount}", style="bold"))
    parts += [Text(line, style="dim") for line in notices]
    parts.append(Text("Ctrl-C unmounts and stops everything", style="dim"))
    return Group(*parts)


def _servers(status: Mapping[str, Any]) -> Table:
    shown = Table(box=None, pad_edge=False)
    # All of `mendfs status` is wider than the 80 columns that a terminal may have.
    places = [at for at, head in enumerate(SERVER_HEADS) if head in HEADS_SHOWN]
    for at in places:
        shown.add_column(SERVER_HEADS[at], justify="left" if SERVER_HEADS[at] in ("state", "address") else "right")
    for row in server_rows(status["servers"]):
        shown.add_row(*(Text(str(row[at]), style=COLOURS.get(str(row[at]), "")) for at in places))
    return shown


async def watch_live(cluster: RunningCluster, stop: asyncio.Event) -> None:
    """Show the cluster until `stop`, keeping it running meanwhile."""
    notices: deque[str] = deque(maxlen=NOTICES_SHOWN)
    cluster.supervisor.notice = notices.append
    record = cluster.folder.read()
    mount = record.mount if record is not None else ""
    asker = _Asker(real_world(), cluster)
    watching = asyncio.create_task(cluster.watch(stop))
    try:
        with Live(_view("starting", mount, notices), auto_refresh=False, transient=True) as live:
            while not watching.done():
                live.update(_view(await asker.status(), mount, notices), refresh=True)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(REFRESH_S):
                        await asyncio.shield(watching)  # the watching goes on when the wait is over
        await watching
    finally:
        await asker.close()
