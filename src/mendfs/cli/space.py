"""`df`: what the volume holds, what can still be written, and where."""

from collections.abc import Mapping
from typing import Any

from mendfs.cli.command import At
from mendfs.cli.questions import status_of
from mendfs.cli.tables import table
from mendfs.cluster.sizes import short_size


async def space_of(at: At) -> dict[str, Any]:
    """The volume's bytes count what users store, the servers' bytes what their disks hold: R times as much."""
    stat = await at.volume.stat_volume()
    status = await status_of(at.located)
    return {
        "total": stat.bytes_total,
        "used": stat.bytes_total - stat.bytes_free,
        "available": stat.bytes_free,
        "files": stat.files,
        "replicas": at.volume.parameters.replicas,
        "servers": [
            {key: server[key] for key in ("number", "address", "zone", "state", "bytes_used", "bytes_free")}
            for server in status["servers"]
        ],
    }


def space_text(document: Mapping[str, Any], *, human: bool) -> str:
    """The document for people."""

    def size(count: int) -> object:
        return short_size(count) if human else count

    total, used = document["total"], document["used"]
    share = f"{100 * used / total:.0f}%" if total else "-"
    volume = (size(total), size(used), size(document["available"]), share, document["files"])
    heads = ("server", "state", "used", "available", "use", "address")
    rows = []
    for server in document["servers"]:
        held, free = server["bytes_used"], server["bytes_free"]
        part = f"{100 * held / (held + free):.0f}%" if held + free else "-"
        rows.append((server["number"], server["state"], size(held), size(free), part, server["address"]))
    return (
        f"{table(('total', 'used', 'available', 'use', 'files'), [volume])}\n"
        f"(of users' data: each byte is stored {document['replicas']} times)\n\n{table(heads, rows)}\n"
    )
