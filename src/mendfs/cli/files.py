"""Files without a mount: ls, mkdir, create, cat, write, put, get, mv, rm, stat. The work is in `cli.file_actions`."""

import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Concatenate, ParamSpec, TypeVar

import typer

from mendfs.cli import options
from mendfs.errors import UsageError

if TYPE_CHECKING:
    from mendfs.client.volume import Volume  # a command that shows its help needs no client

Path = Annotated[str, typer.Argument(metavar="PATH", help="In the volume (/a/b), or below a mount.")]
Paths = Annotated[list[str], typer.Argument(metavar="PATH...", help="In the volume (/a/b), or below a mount.")]

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def _on_volume(
    meta: str,
    dir: str,
    secret_file: str,
    action: "Callable[Concatenate[Volume, Arguments], Awaitable[Result]]",
    *args: Arguments.args,
    **kwargs: Arguments.kwargs,
) -> Result:
    """Open the volume, run `action` on it, close it."""
    from mendfs.cli.volumes import open_volume

    async def work() -> Result:
        async with open_volume(options.locate(meta, dir, secret_file)) as volume:
            return await action(volume, *args, **kwargs)

    return options.run(work())


def ls(
    path: Annotated[str, typer.Argument(metavar="PATH")] = "/",
    long: Annotated[bool, typer.Option("-l", help="Modes, owners, sizes and times too.")] = False,
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
    as_json: options.Json = False,
) -> None:
    """The names in a directory."""
    from mendfs.cli import file_actions, file_text
    from mendfs.cli.look import show_json

    entries = _on_volume(meta, dir, secret_file, file_actions.list_path, path)
    if as_json:
        show_json([file_text.document(name, attributes) for name, attributes in entries])
    elif long:
        print(file_text.long_listing(entries), end="")
    else:
        print("".join(f"{file_text.shown(name)}\n" for name, _ in entries), end="")


def mkdir(
    paths: Paths,
    parents: Annotated[bool, typer.Option("-p", help="Make missing parents; one that exists is fine.")] = False,
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
) -> None:
    """Make directories."""
    from mendfs.cli import file_actions

    _on_volume(meta, dir, secret_file, file_actions.make_directories, paths, parents=parents)


def create(paths: Paths, meta: options.Meta = "", dir: options.Dir = "", secret_file: options.SecretFile = "") -> None:
    """Make empty files."""
    from mendfs.cli import file_actions

    _on_volume(meta, dir, secret_file, file_actions.create_files, paths)


def cat(paths: Paths, meta: options.Meta = "", dir: options.Dir = "", secret_file: options.SecretFile = "") -> None:
    """Write files to standard output."""
    from mendfs.cli import file_actions

    _on_volume(meta, dir, secret_file, file_actions.copy_out, paths, sys.stdout.buffer)


def write(
    path: Path,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Else standard input.")] = None,
    offset: Annotated[int | None, typer.Option("--offset", min=0, help="Overwrite from this byte on.")] = None,
    append: Annotated[bool, typer.Option("--append", help="Write at the end.")] = False,
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
) -> None:
    """Write a file, from an argument or standard input: replaced whole, unless --offset or --append is given."""
    import io
    import os

    from mendfs.cli import file_actions

    if offset is not None and append:
        raise UsageError("--offset and --append exclude each other: name one")
    source = sys.stdin.buffer if text is None else io.BytesIO(os.fsencode(text))
    _on_volume(meta, dir, secret_file, file_actions.write_file, path, source, offset=offset, append=append)


def put(
    local: Annotated[str, typer.Argument(metavar="LOCAL")],
    path: Path,
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
) -> None:
    """Copy a local file into the volume."""
    from mendfs.cli import file_actions

    _on_volume(meta, dir, secret_file, file_actions.put_file, local, path)


def get(
    path: Path,
    local: Annotated[str, typer.Argument(metavar="LOCAL")],
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
) -> None:
    """Copy a file of the volume to a local one."""
    from mendfs.cli import file_actions

    _on_volume(meta, dir, secret_file, file_actions.get_file, path, local)


def mv(
    source: Annotated[str, typer.Argument(metavar="FROM")],
    target: Annotated[str, typer.Argument(metavar="TO")],
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
) -> None:
    """Rename, or move into the directory TO."""
    from mendfs.cli import file_actions

    _on_volume(meta, dir, secret_file, file_actions.move, source, target)


def rm(
    paths: Paths,
    recursive: Annotated[bool, typer.Option("-r", help="Directories too, with all that is in them.")] = False,
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
) -> None:
    """Remove files."""
    from mendfs.cli import file_actions

    _on_volume(meta, dir, secret_file, file_actions.remove, paths, recursive=recursive)


def stat(
    path: Path,
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
    as_json: options.Json = False,
) -> None:
    """What is known of a file."""
    from mendfs.cli import file_actions, file_text
    from mendfs.cli.look import show_json

    name, attributes = _on_volume(meta, dir, secret_file, file_actions.stat_path, path)
    document = file_text.document(name, attributes)
    show_json(document) if as_json else print("\n".join(f"{key}: {value}" for key, value in document.items()))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (ls, mkdir, create, cat, write, put, get, mv, rm, stat):
        app.command()(command)
    app.command("read", help="The same as cat.")(cat)
