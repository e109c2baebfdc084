"""Looking at a cluster: status, servers, contents, where."""

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from mendfs.cli import options

ServerName = Annotated[str, typer.Argument(metavar="SERVER", help="Number of a data server, or its id.")]


def show_json(document: object) -> None:
    """One JSON document on standard output."""
    print(json.dumps(document))


def status(
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
    as_json: options.Json = False,
) -> None:
    """The volume, its health, and every data server."""
    from mendfs.cli.questions import status_of
    from mendfs.cli.status_text import status_text

    document = options.run(status_of(options.locate(meta, dir, secret_file)))
    show_json(document) if as_json else print(status_text(document))


def servers(
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
    as_json: options.Json = False,
) -> None:
    """Every data server."""
    from mendfs.cli.questions import status_of
    from mendfs.cli.status_text import servers_text

    found = options.run(status_of(options.locate(meta, dir, secret_file)))["servers"]
    show_json(found) if as_json else print(servers_text(found))


def contents(
    server: ServerName,
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
    verify: Annotated[bool, typer.Option("--verify", help="Read and check every block.")] = False,
    as_json: options.Json = False,
) -> None:
    """Every block that a data server holds."""
    from mendfs.cli.questions import contents_of
    from mendfs.cli.tables import table

    blocks = options.run(contents_of(options.locate(meta, dir, secret_file), server, verify=verify))
    if as_json:
        show_json(blocks)
        return
    heads = ("partition", "id", "inode", "slot", "replica", "length", "ok")
    rows = [tuple("-" if block[head] is None else block[head] for head in heads[:-1]) for block in blocks]
    print(table(heads, [(*row, "yes" if block["ok"] else "NO") for row, block in zip(rows, blocks, strict=True)]))


def where(
    path: Annotated[str, typer.Argument(metavar="PATH", help="In the volume (/a/b), or below a mount.")],
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
    quick: Annotated[bool, typer.Option("--quick", help="Ask what is there; do not read and check it.")] = False,
    as_json: options.Json = False,
) -> None:
    """Where a file's blocks are, and how each replica is."""
    from mendfs.cli.questions import where_of

    document = options.run(where_of(options.locate(meta, dir, secret_file), path, verify=not quick))
    show_json(document) if as_json else print(_where_text(document))


def _where_text(document: Mapping[str, Any]) -> str:
    from mendfs.cli.tables import table
    from mendfs.cluster.sizes import exact_size

    lines = [
        f"{document['path']}: inode {document['inode']}, {document['size']} bytes, "
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


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (status, servers, contents, where):
        app.command()(command)
