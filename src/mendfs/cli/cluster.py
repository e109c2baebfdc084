"""A cluster on this machine: up, down."""

import sys
from typing import Annotated

import typer

from mendfs.cli import options
from mendfs.errors import MendfsError, UsageError
from mendfs.model import ChecksumKind, Layout

Servers = Annotated[int | None, typer.Option("--servers", help="Data servers [default: 4].", show_default=False)]
Replicas = Annotated[int | None, typer.Option("--replicas", help="Copies of each block [default: 3 or all servers].")]
BlockSize = Annotated[str, typer.Option("--block-size", metavar="SIZE", help="8 to 16MiB [default: 4MiB].")]
PageSize = Annotated[str, typer.Option("--page-size", metavar="SIZE", help="Unit of a checksum [default: 16KiB].")]
Partitions = Annotated[
    int | None, typer.Option("--partitions", help="A multiple of the servers [default: 1024 or so].")
]
LayoutOption = Annotated[Layout | None, typer.Option("--layout", help="How partitions are laid out [default: ring].")]
Checksum = Annotated[ChecksumKind | None, typer.Option("--checksum", help="Kind of checksum [default: xxh3].")]
WriteQuorum = Annotated[int | None, typer.Option("--write-quorum", help="Copies before a write is acknowledged.")]
BasePort = Annotated[int | None, typer.Option("--base-port", help="First of the ports [default: some free ones].")]
ReadQuorum = Annotated[int | None, typer.Option("--read-quorum", help="Copies that a read compares [default: 1].")]

MountOptions = Annotated[
    list[str] | None, typer.Option("-o", metavar="OPTIONS", help="As mount(8): ro, allow_other, noexec, ...")
]


def checked_mount_options(given: list[str] | None) -> str:
    """What was said after -o, several times perhaps. Raises UsageError for an unknown word."""
    from mendfs.fuse.device import is_root
    from mendfs.fuse.mount_options import parse_mount_options

    words = ",".join(given or ())
    parse_mount_options(words, is_root=is_root())
    return words


def up(
    dir: options.Dir = "",
    servers: Servers = None,
    replicas: Replicas = None,
    block_size: BlockSize = "",
    page_size: PageSize = "",
    partitions: Partitions = None,
    layout: LayoutOption = None,
    checksum: Checksum = None,
    write_quorum: WriteQuorum = None,
    read_quorum: ReadQuorum = None,
    mount: Annotated[str, typer.Option("--mount", metavar="MNT", help="Mount the volume at this folder.")] = "",
    mount_options: MountOptions = None,
    base_port: Annotated[
        int | None, typer.Option("--base-port", help="First of the ports [default: free ones].")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Return when everything answers.")] = False,
) -> None:
    """Start a cluster on this machine: meta server, data servers and, if asked, a mount.

    The volume is made the first time; its parameters are fixed from then on. Ctrl-C, or `mendfs down`, stops it.
    """
    from mendfs.cluster.child import SupervisorChild
    from mendfs.cluster.parameters import VolumeWishes
    from mendfs.cluster.sizes import parse_size
    from mendfs.fuse.device import absolute

    if base_port is not None and not 1 <= base_port <= 65535:
        raise UsageError(f"--base-port {base_port} is no port: choose one from 1024 to 65000")
    words = checked_mount_options(mount_options)
    if words and not mount:
        raise UsageError("-o is about the mount: add --mount MNT")
    wishes = VolumeWishes(
        servers=servers,
        replicas=replicas,
        block_size=parse_size(block_size) if block_size else None,
        page_size=parse_size(page_size) if page_size else None,
        partitions=partitions,
        layout=layout,
        checksum=checksum,
        write_quorum=write_quorum,
        read_quorum=read_quorum,
    )
    role = SupervisorChild(
        dir=options.folder_of(dir),
        wishes=wishes,
        mount=absolute(mount) if mount else "",
        mount_options=words,
        base_port=base_port,
    )
    if detach:
        from mendfs.cli.foreground import start_detached

        options.run(start_detached(role))
    else:
        from mendfs.cli.foreground import run_here

        options.run(run_here(role))


def down(
    dir: options.Dir = "",
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for flushing.", min=0)] = 30.0,
    wipe: Annotated[bool, typer.Option("--wipe", help="Delete the folder and all data too.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Flush, unmount and stop all that `mendfs up` started."""
    from mendfs.cluster import shutdown

    folder = options.folder_of(dir)
    if wipe and not yes:
        if not sys.stdin.isatty():
            raise UsageError("--wipe deletes all data: add --yes if that is meant")
        typer.confirm(f"Delete {folder} and all data in it?", abort=True, err=True)
    was_running, lines = options.run(shutdown.shut_down(folder, timeout_s=timeout))
    for line in lines:
        print(f"mendfs: {line}", file=sys.stderr)
    if lines and not wipe:
        raise typer.Exit(MendfsError.exit_code)
    if wipe:
        shutdown.wipe(folder)
    print(("stopped" if was_running else "nothing was running") + (f"; {folder} is deleted" if wipe else ""))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(up)
    app.command()(down)
