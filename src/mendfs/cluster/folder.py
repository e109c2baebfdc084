"""The folder of a cluster on this machine, and what `up` writes down in it.

    cluster.json   the volume's parameters, ports, and which processes run (for `down`, `status` and the next `up`)
    secret         what everyone in the cluster must know, mode 0600
    lock           held by the supervisor while it lives
    stop.json      how long the mount may flush, written by `down` before it asks the supervisor to stop
    unflushed.json what the mount could not flush, said by the mount
    troubles.json  why a process is not running, said by the supervisor
    stopped.json   what did not go well when all was stopped, said by the supervisor
    meta/ data-N/  the stores
    logs/          one file a process

Every file is replaced as a whole and synced. Nothing here starts or stops anything.
"""

import os
import stat

import msgspec

from mendfs.errors import MendfsError, StoreDamaged, UsageError
from mendfs.model import Volume
from mendfs.world.disk import Disk, File
from mendfs.world.processes import ProcessIdentity

SECRET_BYTES = 32
SECRET_LENGTH_MIN = 16
"""A secret that is typed by hand may be shorter than ours, but not so short that it can be guessed."""
LOG_BYTES_MAX = 8 << 20
"""A log that is longer when its process starts is set aside once (NAME.log.1), so logs stay bounded over restarts."""


class ChildRecord(msgspec.Struct, frozen=True):
    """One process that the supervisor started."""

    name: str
    """`meta`, `data-0` ... or `mount`."""
    process: ProcessIdentity
    address: str = ""


class ClusterRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`cluster.json`."""

    volume: Volume
    base_port: int
    meta: str
    """Address of the meta server."""
    mount: str = ""
    """Where the volume is mounted; empty: nowhere."""
    supervisor: ProcessIdentity | None = None
    children: tuple[ChildRecord, ...] = ()
    record_version: int = 1
    is_formatted: bool = False
    """The volume was there once: a meta server's folder without one has lost it."""


class StopWish(msgspec.Struct, frozen=True):
    """`stop.json`."""

    timeout_s: float


class ClusterFolder:
    """The paths and files of one cluster's folder."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self.path = os.path.abspath(path)

    def inside(self, *names: str) -> str:
        """A path in the folder."""
        return os.path.join(self.path, *names)

    @property
    def secret_path(self) -> str:
        """The file of the cluster's secret."""
        return self.inside("secret")

    def log_path(self, name: str) -> str:
        """The log of a process, which is set aside first if it has grown too long."""
        path = self.inside("logs", f"{name}.log")
        if os.path.exists(path) and os.path.getsize(path) > LOG_BYTES_MAX:
            os.replace(path, f"{path}.1")
        return path

    def make(self) -> None:
        """Make the folder and that of the logs."""
        try:
            self._disk.make_directories(self.inside("logs"))
        except OSError as error:
            raise UsageError(f"cannot make {self.path} ({error.strerror}): choose another folder with --dir") from error

    def lock(self) -> File:
        """Take the supervisor's lock. Raises UsageError if another one holds it."""
        try:
            return self._disk.lock(self.inside("lock"))
        except BlockingIOError as error:
            raise UsageError(
                f'a cluster is already running from {self.path}: stop it with "mendfs down --dir {self.path}", '
                f"or choose another folder with --dir"
            ) from error

    def read(self) -> ClusterRecord | None:
        """What `up` wrote down; None if it never ran here."""
        try:
            raw = self._disk.read_file(self.inside("cluster.json"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            remedy = (
                ": the cluster is another user's, name it with --meta and --secret-file"
                if isinstance(error, PermissionError)
                else ""
            )
            raise MendfsError(f"cannot read {self.inside('cluster.json')} ({error.strerror}){remedy}") from error
        try:
            return msgspec.json.decode(raw, type=ClusterRecord)
        except msgspec.MsgspecError as error:
            raise StoreDamaged(
                f"{self.inside('cluster.json')} is not as we wrote it ({error}): move it away, and "
                f'"mendfs up" makes it again from the stores'
            ) from error

    def write(self, record: ClusterRecord) -> None:
        """Replace what is written down."""
        raw = msgspec.json.format(msgspec.json.encode(record), indent=1)
        self._disk.replace_file(self.inside("cluster.json"), raw + b"\n", mode=0o600)

    def write_secret(self, secret: bytes) -> None:
        """Write the secret of a new cluster."""
        self._disk.replace_file(self.secret_path, secret.hex().encode() + b"\n", mode=0o600)

    def write_stop(self, wish: StopWish) -> None:
        """Say how the cluster is to be stopped. Root may stop a user's, whose processes must be able to read it."""
        self._disk.replace_file(self.inside("stop.json"), msgspec.json.encode(wish), mode=0o644)

    def read_stop(self) -> StopWish | None:
        """How the cluster is to be stopped, if somebody said so."""
        raw = self._read_if_there("stop.json")
        return None if raw is None else msgspec.json.decode(raw, type=StopWish)

    def write_unflushed(self, lines: tuple[str, ...]) -> None:
        """Note what the mount could not flush."""
        self._disk.replace_file(self.inside("unflushed.json"), msgspec.json.encode(lines))

    def read_unflushed(self) -> tuple[str, ...]:
        """What the mount could not flush when it was last stopped."""
        return self._read_lines("unflushed.json")

    def write_stopped(self, lines: tuple[str, ...]) -> None:
        """Note what did not go well when all was stopped."""
        self._disk.replace_file(self.inside("stopped.json"), msgspec.json.encode(lines))

    def read_stopped(self) -> tuple[str, ...]:
        """What did not go well when all was last stopped."""
        return self._read_lines("stopped.json")

    def write_troubles(self, troubles: dict[str, str]) -> None:
        """Note why which processes are not running; none: no note."""
        if troubles:
            self._disk.replace_file(self.inside("troubles.json"), msgspec.json.encode(troubles))
        else:
            self.forget("troubles.json")

    def read_troubles(self) -> dict[str, str]:
        """Why which processes are not running, by name."""
        raw = self._read_if_there("troubles.json")
        return {} if raw is None else msgspec.json.decode(raw, type=dict[str, str])

    def forget(self, *names: str) -> None:
        """Remove files that belong to one stop, if they are there."""
        for name in names:
            if self._disk.exists(self.inside(name)):
                self._disk.unlink(self.inside(name))

    def holds_store(self) -> bool:
        """Whether there is a meta server's store; a disk that was just mounted there is none."""
        path = self.inside("meta")
        return self._disk.exists(path) and any(name != "lost+found" for name in self._disk.names(path))

    def _read_lines(self, name: str) -> tuple[str, ...]:
        raw = self._read_if_there(name)
        return () if raw is None else msgspec.json.decode(raw, type=tuple[str, ...])

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self._disk.read_file(self.inside(name))
        except FileNotFoundError:
            return None


def read_secret(disk: Disk, path: str) -> bytes:
    """The secret in a file. Raises UsageError saying what is wrong with it."""
    try:
        secret = disk.read_file(path).strip()
    except OSError as error:
        remedy = (
            "only its owner may; ask them for a copy of your own, mode 0600"
            if isinstance(error, PermissionError)
            else "copy it from where the cluster was made"
        )
        raise UsageError(f"cannot read the cluster's secret in {path} ({error.strerror}): {remedy}") from error
    _check_private(path)
    if len(secret) < SECRET_LENGTH_MIN:
        raise UsageError(f"the secret in {path} is shorter than {SECRET_LENGTH_MIN} bytes: copy the cluster's own")
    return secret


def _check_private(path: str) -> None:
    """As ssh does with its keys: whoever can read the secret can read and change every file of the volume."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return  # a disk of the tests, or gone since it was read
    # A file of somebody else's that we may read all the same was arranged by whoever looks after this machine.
    if status.st_uid == os.geteuid() and stat.S_ISREG(status.st_mode) and status.st_mode & 0o077:
        raise UsageError(
            f"the secret in {path} can be read by others (mode {stat.S_IMODE(status.st_mode):04o}): chmod 600 {path}"
        )
