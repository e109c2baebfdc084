"""The file commands, of the command line and of the shell: their options. The work is in the modules they call."""

from typing import Annotated

import typer

from mendfs.cli import options
from mendfs.cli.command import At, Command, on_command_line, register
from mendfs.errors import UsageError

IN_VOLUME = "In the volume (/a/b), or below a mount."
Path = Annotated[str, typer.Argument(metavar="PATH", help=IN_VOLUME)]
Paths = Annotated[list[str], typer.Argument(metavar="PATH", help=IN_VOLUME)]
Force = Annotated[bool, typer.Option("-f", help="A name that is not there is no error.")]


async def ls(
    at: At,
    path: Annotated[str | None, typer.Argument(metavar="PATH", help=IN_VOLUME)] = None,
    long: Annotated[bool, typer.Option("-l", help="Modes, owners, sizes and times too.")] = False,
    everything: Annotated[bool, typer.Option("-a", help="Names that begin with a dot too.")] = False,
    as_json: options.Json = False,
) -> None:
    """The names in a directory. With --json all of them, whatever they begin with."""
    from mendfs.cli import file_actions, file_text

    path = path if path is not None else at.here
    entries = await file_actions.list_path(at, path, follow=not long or path.endswith("/"))
    targets = await file_actions.link_targets(at.volume, entries) if long or as_json else {}
    if as_json:
        await at.write_json([file_text.document(name, each, targets.get(each.inode)) for name, each in entries])
        return
    shown = [(name, each) for name, each in entries if everything or len(entries) == 1 or not name.startswith(b".")]
    if long:
        await at.write(file_text.long_listing(shown, targets, at.name))
    else:
        await at.write("".join(f"{at.name(name)}\n" for name, _ in shown))


async def mkdir(
    at: At,
    paths: Paths,
    parents: Annotated[bool, typer.Option("-p", help="Make missing parents; one that exists is fine.")] = False,
) -> None:
    """Make directories."""
    from mendfs.cli import file_actions

    await file_actions.make_directories(at, paths, parents=parents)


async def create(
    at: At,
    paths: Paths,
    size: Annotated[str, typer.Option("--size", metavar="SIZE", help="Bytes, all zero [default: 0].")] = "0",
    mode: Annotated[str, typer.Option("--mode", metavar="MODE", help="As 0640 [default: 0666 without umask].")] = "",
) -> None:
    """Make new files. One that exists is an error."""
    from mendfs.cli import file_actions
    from mendfs.cluster.sizes import parse_size
    from mendfs.model import SIZE_MAX

    if mode and (set(mode) - set("01234567") or int(mode, 8) > 0o7777):
        raise UsageError(f"{mode!r} is no mode: write it in octal, as 0640")
    length = parse_size(size)
    if length > SIZE_MAX:
        raise UsageError(f"{size} is more than a file can have")
    await file_actions.create_files(at, paths, size=length, mode=int(mode, 8) if mode else None)


async def cat(
    at: At,
    paths: Paths,
    offset: Annotated[int, typer.Option("--offset", min=0, help="From this byte on.")] = 0,
    length: Annotated[int | None, typer.Option("--length", min=0, help="At most this many bytes.")] = None,
) -> None:
    """Write files to standard output."""
    from mendfs.cli import file_actions

    await file_actions.copy_out(at, paths, offset=offset, length=length)


async def write(
    at: At,
    path: Path,
    text: Annotated[str | None, typer.Argument(metavar="[TEXT]", help="Else standard input.")] = None,
    offset: Annotated[int | None, typer.Option("--offset", min=0, help="Overwrite from this byte on.")] = None,
    append: Annotated[bool, typer.Option("--append", help="Write at the end.")] = False,
) -> None:
    """Write a file, from an argument or standard input: replaced whole, unless --offset or --append is given."""
    from mendfs.cli import file_actions

    if offset is not None and append:
        raise UsageError("--offset and --append exclude each other: name one")
    await file_actions.write_file(at, path, text, offset=offset, append=append)


async def put(
    at: At,
    local: Annotated[list[str], typer.Argument(metavar="LOCAL")],
    path: Path,
    recursive: Annotated[bool, typer.Option("-r", help="Directories too, with all that is in them.")] = False,
    as_json: options.Json = False,
) -> None:
    """Copy local files into the volume, to PATH or into the directory PATH. Modes and times are kept."""
    from mendfs.cli.progress import Progress
    from mendfs.cli.put import put as copy

    with Progress("put", wanted=not as_json) as progress:
        counts = await copy(at, local, path, recursive=recursive, progress=progress)
    if as_json:
        import msgspec

        await at.write_json(msgspec.to_builtins(counts))


async def get(
    at: At,
    paths: Paths,
    local: Annotated[str, typer.Argument(metavar="LOCAL")],
    recursive: Annotated[bool, typer.Option("-r", help="Directories too, with all that is in them.")] = False,
    as_json: options.Json = False,
) -> None:
    """Copy files of the volume to LOCAL, or into the directory LOCAL. Modes and times are kept."""
    from mendfs.cli.get import get as copy
    from mendfs.cli.progress import Progress

    with Progress("get", wanted=not as_json) as progress:
        counts = await copy(at, paths, local, recursive=recursive, progress=progress)
    if as_json:
        import msgspec

        await at.write_json(msgspec.to_builtins(counts))


async def mv(
    at: At,
    sources: Annotated[list[str], typer.Argument(metavar="FROM", help=IN_VOLUME)],
    target: Annotated[str, typer.Argument(metavar="TO", help=IN_VOLUME)],
) -> None:
    """Rename, or move into the directory TO."""
    from mendfs.cli import file_actions

    await file_actions.move(at, sources, target)


async def rm(
    at: At,
    paths: Paths,
    recursive: Annotated[bool, typer.Option("-r", help="Directories too, with all that is in them.")] = False,
    force: Force = False,
    whole_volume: Annotated[bool, typer.Option("--whole-volume", help='Allow "rm -r /".')] = False,
) -> None:
    """Remove files, and with -r directories. Interrupted, it goes on where it was when it is run again."""
    from mendfs.cli.remove import remove

    await remove(at, paths, recursive=recursive, force=force, whole_volume=whole_volume)


async def stat(at: At, path: Path, as_json: options.Json = False) -> None:
    """What is known of a file; of a symbolic link, not of what it names."""
    from mendfs.cli import file_actions, file_text

    entry = await file_actions.stat_path(at, path)
    targets = await file_actions.link_targets(at.volume, [entry])
    document = file_text.document(*entry, targets.get(entry[1].inode))
    if as_json:
        await at.write_json(document)
    else:
        document["name"] = at.name(entry[0])
        await at.write("".join(f"{key}: {value}\n" for key, value in document.items()))


async def tree(
    at: At,
    path: Annotated[str | None, typer.Argument(metavar="PATH", help=IN_VOLUME)] = None,
    depth: Annotated[int | None, typer.Option("-L", metavar="DEPTH", min=0, help="So many levels deep.")] = None,
    as_json: options.Json = False,
) -> None:
    """A directory and everything below it."""
    from mendfs.cli import trees

    await trees.tree(at, path if path is not None else at.here, depth_max=depth, as_json=as_json)


async def du(
    at: At,
    paths: Annotated[list[str] | None, typer.Argument(metavar="PATH", help=IN_VOLUME)] = None,
    summary: Annotated[bool, typer.Option("-s", help="Only the sum of each PATH.")] = False,
    human: Annotated[bool, typer.Option("-h", help="Sizes as 1.5MiB.")] = False,
    as_json: options.Json = False,
) -> None:
    """Bytes stored below each directory, each file once, before replication. --json says the files' sizes as well."""
    from mendfs.cli import trees

    await trees.disk_usage(at, paths or [at.here], summary=summary, human=human, as_json=as_json)


async def df(
    at: At,
    human: Annotated[bool, typer.Option("-h", help="Sizes as 1.5MiB.")] = False,
    as_json: options.Json = False,
) -> None:
    """What the volume holds and what can still be written with all its replicas; then each data server."""
    from mendfs.cli import space

    document = await space.space_of(at)
    await (at.write_json(document) if as_json else at.write(space.space_text(document, human=human)))


COMMANDS = (
    Command(ls),
    Command(mkdir),
    Command(create),
    Command(cat),
    Command(cat, "read"),
    Command(write),
    Command(put),
    Command(get),
    Command(mv),
    Command(rm),
    Command(stat),
    Command(tree),
    Command(du, has_h=True),
    Command(df, has_h=True),
)


def add_to(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    for command in COMMANDS:
        register(app, command, on_command_line(command))
