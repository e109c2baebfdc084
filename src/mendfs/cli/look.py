"""Looking at a cluster: status, servers, contents, where."""

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from mendfs.cli import options
from mendfs.cli.command import At, Command, on_command_line, register

ServerName = Annotated[str, typer.Argument(metavar="SERVER", help="Number of a data server, or its id.")]


async def status(at: At, as_json: options.Json = False) -> None:
    """The volume, its health, and every data server."""
    from mendfs.cli.questions import status_of
    from mendfs.cli.status_text import status_text

    document = await status_of(at.located)
    await (at.write_json(document) if as_json else at.write(status_text(document) + "\n"))


async def servers(at: At, as_json: options.Json = False) -> None:
    """Every data server."""
    from mendfs.cli.questions import status_of
    from mendfs.cli.status_text import servers_text

    found = (await status_of(at.located))["servers"]
    await (at.write_json(found) if as_json else at.write(servers_text(found) + "\n"))


async def contents(
    at: At,
    server: ServerName,
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every block.")] = False,
    as_json: options.Json = False,
) -> None:
    """Every block that a data server holds."""
    from mendfs.cli.questions import contents_of
    from mendfs.cli.tables import table

    blocks = await contents_of(at.located, server, verify=verify)
    if as_json:
        await at.write_json(blocks)
        return
    heads = ("partition", "id", "inode", "slot", "replica", "length", "ok")
    rows = [tuple("-" if block[head] is None else block[head] for head in heads[:-1]) for block in blocks]
    rows = [(*row, "yes" if block["ok"] else "NO") for row, block in zip(rows, blocks, strict=True)]
    await at.write(table(heads, rows) + "\n")


async def where(
    at: At,
    path: Annotated[str, typer.Argument(metavar="PATH", help="In the volume (/a/b), or below a mount.")],
    quick: Annotated[bool, typer.Option("--quick", help="Ask what is there; do not read and check it.")] = False,
    as_json: options.Json = False,
) -> None:
    """Where a file's blocks are, and how each replica is."""
    from mendfs.cli.questions import where_of

    document = await where_of(at.volume, at.path(path), verify=not quick)
    await (at.write_json(document) if as_json else at.write(_where_text(document) + "\n"))


def _where_text(document: Mapping[str, Any]) -> str:
    from mendfs.cli.complaints import escaped
    from mendfs.cli.tables import table
    from mendfs.cluster.sizes import exact_size

    lines = [
        f"{escaped(document['path'])}: inode {document['inode']}, {document['size']} bytes, "
        f"blocks of {exact_size(document['block_size'])}"
    ]
    rows = [
        (
            slot["slot"],
            extent["offset"],
            extent["length"],
            extent["block"],
            ", ".join(
                f"{replica['server']}" + ("" if replica["state"] == "ok" else f" ({replica['state']})")
                for replica in extent["replicas"]
            ),
        )
        for slot in document["slots"]
        for extent in slot["extents"]
    ]
    if rows:
        lines.append(table(("slot", "offset", "length", "block", "on servers"), rows))
    return "\n".join(lines)


COMMANDS = (
    Command(status, needs_volume=False),
    Command(servers, needs_volume=False),
    Command(contents, needs_volume=False),
    Command(where),
)


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in COMMANDS:
        register(app, command, on_command_line(command))
