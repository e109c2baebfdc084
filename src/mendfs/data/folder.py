"""A data server's folder: its lock, and the small file that says whose it is.

`lock`, `server.json`, `index/`, `segments/`. With the volume's parameters and its own number written down, a server
that is started again serves reads before it has reached the meta server.
"""

import posixpath
import random

import msgspec

from mendfs.errors import StoreDamaged, StoreFailed, UsageError
from mendfs.model import MiB, ServerNumber, Volume
from mendfs.world.disk import Disk, File

_ID_BITS = 128
SPARE_BYTES = 8 * MiB
SPARE_DIVISOR = 32
"""On small disks the spare is this part of them: well within the 5 % that no block may take."""
SPARE_ROOM_FACTOR = 2
"""It is made again when this many of it are free: not at once, out of the room that it has just made."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who a data server is."""

    id: str
    """32 hexadecimal digits, drawn when the folder is made."""
    number: ServerNumber | None = None
    """Given by the meta server; None before the first registration."""
    volume: Volume | None = None
    format_version: int = 1


class Folder:
    """An open, locked folder."""

    def __init__(self, disk: Disk, path: str, lock: File, identity: Identity) -> None:
        self.path = path
        self.identity = identity
        self._disk = disk
        self._lock = lock

    @classmethod
    def open(cls, disk: Disk, path: str, rng: random.Random) -> "Folder":
        """Make the folder if it is missing, lock it, read who it belongs to. Blocks.

        Raises UsageError if another process has it, StoreDamaged, StoreFailed.
        """
        try:
            disk.make_directories(path)
            lock = disk.lock(posixpath.join(path, "lock"))
        except BlockingIOError:
            raise UsageError(
                f"the folder {path} is in use by another data server; stop it, or use another --dir"
            ) from None
        except OSError as error:
            raise StoreFailed(f"cannot use the folder {path}: {error.strerror or error}") from None
        try:
            return cls(disk, path, lock, cls._read(disk, path, rng))
        except OSError as error:
            lock.close()
            raise StoreFailed(f"cannot use the folder {path}: {error.strerror or error}") from None
        except BaseException:
            lock.close()
            raise

    @staticmethod
    def _read(disk: Disk, path: str, rng: random.Random) -> Identity:
        file = posixpath.join(path, "server.json")
        if disk.exists(file):
            try:
                identity = msgspec.json.decode(disk.read_file(file), type=Identity)
            except msgspec.MsgspecError as error:
                raise StoreDamaged(f"{file} cannot be read: {error}") from None
            if identity.format_version != 1:
                raise StoreDamaged(f"{file} has format version {identity.format_version}; this program reads 1")
            return identity
        segments = posixpath.join(path, "segments")
        if disk.exists(segments) and disk.names(segments):
            raise StoreDamaged(f"{path} holds segments but no server.json: put it back, or start on an empty folder")
        identity = Identity(id=f"{rng.getrandbits(_ID_BITS):032x}")
        disk.replace_file(file, msgspec.json.encode(identity))
        return identity

    def check(self, number: ServerNumber, volume: Volume, meta: str) -> None:
        """Raise UsageError if the meta server at `meta` takes this folder for another one's."""
        mine = self.identity
        if mine.volume is not None and mine.volume.id != volume.id:
            raise UsageError(
                f"the folder {self.path} belongs to volume {mine.volume.id}, but {meta} serves {volume.id}: "
                "name the right --meta, or use an empty folder"
            )
        if mine.number is not None and mine.number != number:
            raise UsageError(
                f"the folder {self.path} is server {mine.number}'s, but {meta} says that it is server {number}: "
                "was it copied? Use an empty folder"
            )

    def write(self, number: ServerNumber, volume: Volume) -> None:
        """Write down what the meta server said. Blocks. Raises StoreFailed."""
        identity = Identity(id=self.identity.id, number=number, volume=volume)
        if identity == self.identity:
            return
        try:
            self._disk.replace_file(posixpath.join(self.path, "server.json"), msgspec.json.encode(identity))
        except OSError as error:
            raise StoreFailed(f"cannot write into {self.path}: {error.strerror or error}") from None
        self.identity = identity

    def restore(self) -> bool:
        """Write down who this is again if somebody deleted it under the running server. Blocks. Raises OSError."""
        file = posixpath.join(self.path, "server.json")
        if self._disk.exists(file):
            return False
        self._disk.make_directories(self.path)
        self._disk.replace_file(file, msgspec.json.encode(self.identity))
        return True

    def keep_spare(self) -> None:
        """Have a file of zeros that can be given up when the disk is full, if there is room for it. Blocks.

        Without room the index cannot even note what is deleted to make room. Raises OSError.
        """
        path = posixpath.join(self.path, "spare")
        length = min(SPARE_BYTES, self._disk.total_bytes(self.path) // SPARE_DIVISOR)
        if not self._disk.exists(path) and self._disk.free_bytes(self.path) > SPARE_ROOM_FACTOR * length:
            self._disk.replace_file(path, bytes(length))

    def give_up_spare(self) -> bool:
        """Make a little room; False if that was done before. Blocks. Raises OSError."""
        path = posixpath.join(self.path, "spare")
        if not self._disk.exists(path):
            return False
        self._disk.unlink(path)
        return True

    def try_writing(self, length: int) -> None:
        """Write `length` bytes, make them durable, and take them away. Blocks. Raises OSError."""
        path = posixpath.join(self.path, "probe")
        try:
            self._disk.replace_file(path, bytes(length))
        finally:
            if self._disk.exists(path):
                self._disk.unlink(path)

    def close(self) -> None:
        """Give the lock back."""
        self._lock.close()
