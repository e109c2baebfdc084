"""Options that many commands share, and how a command finds its cluster and the secret."""

import asyncio
import logging
import os
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

import msgspec
import typer

from mendfs.errors import MendfsError, Unreachable, UsageError

DEFAULT_DIR = "./mendfs-data"
DEBUG = "MENDFS_DEBUG"

Meta = Annotated[str, typer.Option("--meta", metavar="HOST:PORT", help="Address of the meta server.")]
Dir = Annotated[str, typer.Option("--dir", metavar="DIR", help="The cluster's folder [default: ./mendfs-data].")]
SecretFile = Annotated[str, typer.Option("--secret-file", metavar="FILE", help="File with the cluster's secret.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of text.")]

Result = TypeVar("Result")


class Located(msgspec.Struct, frozen=True):
    """A cluster that a command talks to."""

    meta: str
    secret_path: str
    dir: str
    """Its folder on this machine, or empty: known by its address only."""


def folder_of(dir: str) -> str:
    """The cluster's folder: the option, the environment, the default."""
    return os.path.abspath(dir or os.environ.get("MENDFS_DIR") or DEFAULT_DIR)


def locate(meta: str, dir: str, secret_file: str) -> Located:
    """--meta, else --dir, else MENDFS_META, else MENDFS_DIR, else ./mendfs-data. Raises UsageError."""
    if not meta and not dir:
        meta = os.environ.get("MENDFS_META", "")
    folder = folder_of(dir)
    if not meta or dir:
        address = _written_down(folder)
        return Located(meta or address, _secret_path(secret_file, folder), folder)
    return Located(meta, _secret_path(secret_file or os.environ.get("MENDFS_SECRET_FILE", ""), folder), "")


def _written_down(folder: str) -> str:
    from mendfs.cluster.folder import ClusterFolder
    from mendfs.world.local_disk import LocalDisk

    record = ClusterFolder(LocalDisk(), folder).read()
    if record is None:
        raise UsageError(
            f'there is no cluster in {folder}: start one with "mendfs up", or name another with --dir or --meta'
        )
    return record.meta


def _secret_path(named: str, folder: str) -> str:
    own = os.path.join(folder, "secret")
    path = named or (own if os.path.exists(own) else os.environ.get("MENDFS_SECRET_FILE", ""))
    if not path:
        raise UsageError("the cluster's secret is needed: name its file with --secret-file or MENDFS_SECRET_FILE")
    return os.path.abspath(path)


def why_silent(located: Located, error: Unreachable) -> MendfsError:
    """Why the meta server of a cluster on this machine does not answer, as far as its folder knows."""
    if not located.dir:
        return error
    from mendfs.cluster.folder import ClusterFolder
    from mendfs.world.local_disk import LocalDisk
    from mendfs.world.processes import LocalProcesses

    folder = ClusterFolder(LocalDisk(), located.dir)
    trouble = folder.read_troubles().get("meta")
    if trouble:
        what = "hangs" if trouble.startswith("it runs") else "stopped"
        return MendfsError(f"the meta server {what}: {trouble}")
    record = folder.read()
    for child in record.children if record is not None else ():
        if child.name == "meta" and LocalProcesses().identity(child.process.pid) == child.process:
            log = folder.inside("logs", "meta.log")
            return MendfsError(f"{error}: its process {child.process.pid} runs, see {log} (does its disk hang?)")
    return error


def run(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a command's coroutine; a cluster that does not answer is said with what to do about it."""
    import uvloop

    from mendfs.cluster import logs

    # A user gets one line, the error; what led to it is for those who ask for it.
    logs.configure(logging.DEBUG if os.environ.get(DEBUG) else logs.NOTHING)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(work)
    except Unreachable as error:
        raise Unreachable(f'{error}: start the cluster with "mendfs up", or name it with --meta or --dir') from error
