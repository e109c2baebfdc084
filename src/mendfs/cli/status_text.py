"""The status document as text, for `mendfs status` and for the live view of `mendfs up`. Pure."""

from collections.abc import Mapping, Sequence
from typing import Any

from mendfs.cli.tables import table
from mendfs.cluster.sizes import exact_size, short_size

SERVER_HEADS = ("server", "state", "address", "pid", "blocks", "used", "free", "reads", "writes", "mended", "corrupt")


def server_rows(servers: Sequence[Mapping[str, Any]]) -> list[tuple[object, ...]]:
    """One row a server, under SERVER_HEADS."""
    return [
        (
            server["number"],
            server["state"],
            server["address"],
            server["pid"],
            server["blocks"],
            short_size(server["bytes_used"]),
            short_size(server["bytes_free"]),
            server["reads"],
            server["writes"],
            server["mended"],
            server["corrupt_found"],
        )
        for server in servers
    ]


def servers_text(servers: Sequence[Mapping[str, Any]]) -> str:
    """The table of servers, and their troubles below it."""
    lines = [table(SERVER_HEADS, server_rows(servers))]
    lines += [f"server {server['number']}: {line}" for server in servers for line in server.get("troubles", ())]
    return "\n".join(lines)


def volume_line(volume: Mapping[str, Any]) -> str:
    """What the volume is, on one line."""
    return (
        f"volume {volume['id'][:8]}: {volume['server_count']} servers, {volume['replicas']} replicas, "
        f"blocks of {exact_size(volume['block_size'])}, pages of {exact_size(volume['page_size'])}, "
        f"layout {volume['layout']}, {volume['checksum']}, W {volume['write_quorum']}, Qr {volume['read_quorum']}"
    )


def health_line(document: Mapping[str, Any]) -> str:
    """How it is, on one line."""
    blocks = document["blocks"]
    counts = ", ".join(
        f"{blocks[key]} {words}"
        for key, words in (
            ("under_replicated", "with too few replicas"),
            ("corrupt", "found corrupt"),
            ("lost", "lost"),
            ("garbage", "waiting to be freed"),
        )
        if blocks[key]
    )
    return f"health {document['health']}: {blocks['live']} live blocks{', ' + counts if counts else ''}"


def status_text(document: Mapping[str, Any]) -> str:
    """The whole of `mendfs status`."""
    lines = [volume_line(document["volume"]), health_line(document)]
    lines += [f"trouble: {line}" for line in document.get("troubles", ())]
    return "\n".join([*lines, "", servers_text(document["servers"])])
