"""Engine for tests and simulation, and the reference that others are compared with: a dictionary and its sorted keys.

With a disk it also writes a log file, one framed record a commit, so that a simulated power cut loses an unsynced
suffix and nothing else: `>II` body length and checksum (XXH3-64, low 32 bits, seeded with the record's offset), then
the body: MessagePack of the sequence and of a map from keys to values, nil to delete. The log is never compacted:
whoever needs that wants `kv.rocks`.
"""

import errno
import posixpath
import struct
from bisect import bisect_left

import msgspec
from xxhash import xxh3_64_intdigest

from mendfs.errors import EngineFailed, EngineFull, StoreDamaged
from mendfs.kv.engine import BYTES_MAX, KEYS_MAX
from mendfs.kv.optimistic import OptimisticEngine, Pairs, Writes
from mendfs.world.disk import Disk, File

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(tuple[int, dict[bytes, bytes | None]]).decode
_FRAME = struct.Struct(">II")
_LENGTH_BYTES_MAX = 5
"""What MessagePack puts before a key or value."""
_BODY_MAX = BYTES_MAX + 2 * KEYS_MAX * _LENGTH_BYTES_MAX + 16
"""No commit makes a longer record; a longer length in a frame is garbage."""


class MemoryEngine(OptimisticEngine):
    """See `kv.engine.Engine`."""

    def __init__(self, disk: Disk | None = None, path: str = "", file: File | None = None) -> None:
        super().__init__(0)
        self._disk = disk
        self._path = path
        self._file = file
        self._end = 0
        self._values: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []

    @classmethod
    async def open(cls, disk: Disk | None = None, path: str | None = None) -> "MemoryEngine":
        """An engine on the log file `path`, made if missing; without one it forgets all. Raises StoreDamaged."""
        if disk is None or path is None:
            return cls()
        return await disk.run(cls._open, disk, path)

    @classmethod
    def _open(cls, disk: Disk, path: str) -> "MemoryEngine":
        try:
            folder = posixpath.dirname(path)
            disk.make_directories(folder)
            is_new = not disk.exists(path)
            file = disk.open(path, create=is_new)
            if is_new:
                disk.sync_directory(folder)
            engine = cls(disk, path, file)
            engine._replay(file)
        except OSError as error:
            raise StoreDamaged(f"the log {path} does not open: {error.strerror or error}") from None
        return engine

    def read(self, key: bytes) -> bytes | None:
        """The committed value."""
        return self._values.get(key)

    def read_range(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> Pairs:
        """Up to `limit` committed pairs with begin <= key < end."""
        low = bisect_left(self._keys, begin)
        high = bisect_left(self._keys, end, low)
        keys = self._keys[max(low, high - limit) : high] if reverse else self._keys[low : min(high, low + limit)]
        if reverse:
            keys.reverse()
        return [(key, self._values[key]) for key in keys]

    def write(self, writes: Writes, sequence: int) -> None:
        """Apply at once. Raises EngineFailed when the log cannot take it."""
        if self._file is not None:
            body = _encode((sequence, writes))
            frame = _FRAME.pack(len(body), _checksum(body, self._end))
            try:
                self._file.write((frame, body), self._end)
            except OSError as error:
                kind = EngineFull if error.errno == errno.ENOSPC else EngineFailed
                raise kind(f"the log {self._path} cannot be written: {error.strerror or error}") from None
            self._end += len(frame) + len(body)
        self._apply(writes)

    async def sync_log(self) -> None:
        """One datasync of the log file."""
        if self._file is None or self._disk is None:
            return
        try:
            await self._disk.run(self._file.datasync)
        except OSError as error:
            raise EngineFailed(f"the log {self._path} cannot be synced: {error.strerror or error}") from None

    async def release(self) -> None:
        """Close the log file."""
        if self._file is not None:
            self._file.close()

    def _apply(self, writes: Writes) -> None:
        for key, value in writes.items():
            if value is not None:
                if key not in self._values:
                    self._keys.insert(bisect_left(self._keys, key), key)
                self._values[key] = value
            elif self._values.pop(key, None) is not None:
                del self._keys[bisect_left(self._keys, key)]

    def _replay(self, file: File) -> None:
        """Read the log up to the first record that is not whole, and cut it there: what follows was never synced."""
        # What is in the page cache only (a killed process) counts as synced from here on; what an earlier sync failed
        # to write is there too, and must not.
        file.datasync()
        size = file.size()
        file.forget_cached(0, size)
        content = bytearray(size)
        file.read_into(content, 0)
        changes: dict[bytes, bytes | None] = {}
        while self._end + _FRAME.size <= size:
            length, checksum = _FRAME.unpack_from(content, self._end)
            begin = self._end + _FRAME.size
            body = bytes(content[begin : begin + min(length, _BODY_MAX)])
            if len(body) != length or _checksum(body, self._end) != checksum:
                break
            self._last, writes = _decode(body)
            changes.update(writes)
            self._end = begin + length
        self._values = {key: value for key, value in changes.items() if value is not None}
        self._keys = sorted(self._values)
        if self._end < size:
            file.truncate(self._end)
            file.datasync()
        self._synced = self._last


def _checksum(body: bytes, at: int) -> int:
    return xxh3_64_intdigest(body, at) & 0xFFFFFFFF
