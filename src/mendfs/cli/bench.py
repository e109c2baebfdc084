"""`mendfs bench`: how fast this cluster is, seen from here, as a table or a document."""

import json
from typing import Annotated, Any

import typer

from mendfs.cli import options
from mendfs.errors import UsageError

KINDS = ("latency", "throughput", "files")


def bench(
    what: Annotated[str, typer.Argument(metavar="[latency|throughput|files]", help="One of them [all].")] = "",
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
    count: Annotated[int, typer.Option("--count", help="Operations of each kind, and files.")] = 200,
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Of the big file.")] = "256MiB",
    as_json: options.Json = False,
) -> None:
    """Measure this cluster, in a directory that is removed again."""
    from mendfs.cli.measure import measure
    from mendfs.cluster.sizes import parse_size

    if what and what not in KINDS:
        raise UsageError(f"there is no measurement {what!r}: use {', '.join(KINDS)}")
    size_bytes = parse_size(size)
    if count < 1 or size_bytes < 1:
        raise UsageError("--count and --size must be at least 1")
    located = options.locate(meta, dir, secret_file)
    found = options.run(measure(located, (what,) if what else KINDS, count=count, size=size_bytes))
    print(json.dumps(found)) if as_json else print(_text(found))


def _text(found: dict[str, Any]) -> str:
    from mendfs.cli.tables import table
    from mendfs.cluster.sizes import short_size

    parts = []
    for kind, results in found.items():
        match kind:
            case "latency":
                heads = ("latency, one at a time", "median ms", "90 % below", "worst")
                keys = ("median_ms", "p90_ms", "max_ms")
                rows = [(each["operation"], *(round(each[key], 2) for key in keys)) for each in results]
            case "throughput":
                heads = ("throughput, one file", "size", "a second", "")
                rows = [
                    (r["operation"], short_size(r["bytes"]), short_size(r["bytes_per_second"]), "") for r in results
                ]
            case _:
                heads = ("small files, 16 at a time", "files", "a second", "")
                rows = [(r["operation"], r["count"], round(r["files_per_second"]), "") for r in results]
        parts.append(table(heads, rows))
    return "\n\n".join(parts)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)
