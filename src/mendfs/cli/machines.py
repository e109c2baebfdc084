"""A cluster over machines: format, meta, data, mount, umount. Each runs one role of `cluster.roles` here."""

import os
import sys
from typing import Annotated, Any

import typer

from mendfs.cli import cluster, options
from mendfs.errors import UsageError

Listen = Annotated[str, typer.Option("--listen", metavar="HOST:PORT", help="Where to listen.")]
Folder = Annotated[str, typer.Option("--dir", metavar="DIR", help="The server's folder.")]


def format(
    dir: Folder,
    servers: Annotated[int, typer.Option("--servers", help="Data servers that the volume begins with.")],
    replicas: cluster.Replicas = None,
    block_size: cluster.BlockSize = "",
    page_size: cluster.PageSize = "",
    partitions: cluster.Partitions = None,
    layout: cluster.LayoutOption = None,
    checksum: cluster.Checksum = None,
    write_quorum: cluster.WriteQuorum = None,
    read_quorum: cluster.ReadQuorum = None,
) -> None:
    """Make a volume and its secret in DIR, for `mendfs meta`."""
    from mendfs.cluster.format import format_folder
    from mendfs.cluster.parameters import VolumeWishes
    from mendfs.cluster.sizes import parse_size

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
    folder = os.path.abspath(dir)
    volume = options.run(format_folder(folder, wishes))
    print(f"volume {volume.id} is made in {folder}; its secret is in {os.path.join(folder, 'secret')}")


def meta(dir: Folder, listen: Listen, secret_file: options.SecretFile = "") -> None:
    """Run a meta server on the volume in DIR, until it is stopped by SIGTERM or Ctrl-C."""
    from mendfs.cluster.child import MetaChild

    folder = os.path.abspath(dir)
    _run_here(MetaChild(dir=os.path.join(folder, "meta"), listen=listen, secret_path=_secret(secret_file, folder)))


def data(
    dir: Folder,
    meta: Annotated[str, typer.Option("--meta", metavar="HOST:PORT", help="Address of the meta server.")],
    listen: Listen,
    zone: Annotated[str, typer.Option("--zone", help="Replicas avoid sharing one [default: host name].")] = "",
    capacity: Annotated[str, typer.Option("--capacity", metavar="SIZE", help="Bytes it may use.")] = "",
    number: Annotated[int | None, typer.Option("--number", help="The number it would like in a new volume.")] = None,
    advertise: Annotated[str, typer.Option("--advertise", metavar="HOST:PORT", help="What others connect to.")] = "",
    secret_file: options.SecretFile = "",
) -> None:
    """Run a data server with its store in DIR, until it is stopped by SIGTERM or Ctrl-C."""
    from mendfs.cluster.child import DataChild
    from mendfs.cluster.sizes import parse_size

    folder = os.path.abspath(dir)
    role = DataChild(
        dir=folder,
        listen=listen,
        meta=meta,
        secret_path=_secret(secret_file, folder),
        zone=zone,
        number=number,
        capacity=parse_size(capacity) if capacity else 0,
        advertise=advertise,
    )
    _run_here(role)


def _secret(secret_file: str, folder: str) -> str:
    own = os.path.join(folder, "secret")
    path = secret_file or (own if os.path.exists(own) else os.environ.get("MENDFS_SECRET_FILE", ""))
    if not path:
        raise UsageError("the cluster's secret is needed: name its file with --secret-file or MENDFS_SECRET_FILE")
    return os.path.abspath(path)


def _run_here(role: Any) -> None:
    import uvloop

    from mendfs.cluster import child, logs
    from mendfs.world.processes import raise_file_limit

    def say(report: child.Report) -> None:
        if isinstance(report, child.Ready):
            print(f"ready on {report.address}", file=sys.stderr)
        elif isinstance(report, child.Waiting):
            print(f"mendfs: waiting: {report.text}", file=sys.stderr)

    logs.configure()
    raise_file_limit()
    uvloop.run(child.run(role, say))


def mount(
    mountpoint: Annotated[str, typer.Argument(metavar="MNT")],
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
    read_only: Annotated[bool, typer.Option("--read-only", help="Refuse every change.")] = False,
    foreground: Annotated[bool, typer.Option("--foreground", help="Stay, until it is unmounted.")] = False,
    mount_options: cluster.MountOptions = None,
) -> None:
    """Mount a volume at the folder MNT. An ordinary user needs fusermount3 for it, of the package fuse3."""
    from mendfs.cluster.child import MountChild
    from mendfs.fuse.device import absolute, check_mountpoint

    words = cluster.checked_mount_options(mount_options)
    path = absolute(mountpoint)
    check_mountpoint(path, allow_nonempty="nonempty" in words.split(","))
    located = options.locate(meta, dir, secret_file)
    role = MountChild(
        mountpoint=path,
        meta=located.meta,
        secret_path=located.secret_path,
        read_only=read_only,
        options=words,
        waits=True,
    )
    if foreground:
        _run_here(role)
    else:
        from mendfs.cli.foreground import mount_detached

        options.run(mount_detached(role, located.dir))


def umount(mountpoint: Annotated[str, typer.Argument(metavar="MNT")]) -> None:
    """Unmount MNT, also when the process behind it has died."""
    from mendfs.fuse.device import unmount_command

    unmount_command(mountpoint)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (format, meta, data, mount, umount):
        app.command()(command)
