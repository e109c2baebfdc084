"""What is checked in RocksDB's folder before RocksDB may change anything there, and the mark that makes it possible.

RocksDB recovers its log up to the first record that is not whole and calls that a success, whether a power cut tore an
unsynced tail or a bad disk hit the middle of what was synced; a manifest that lost its end opens as well, without the
tables it no longer names. So the sequence that was last synced is kept beside the database, in a file of its own, and
opening looks first, without writing: do the tables and the logs join, and do they reach that far? If not, nothing is
touched, for what is damaged now may still be put back. docs/formats/mark.md has the format.
"""

import contextlib
import errno
import os
import re
import struct
import tempfile
from collections.abc import Iterator

import structlog
from rocksdict import AccessType, Options, Rdict
from xxhash import xxh3_64_intdigest

from mendfs.errors import EngineFailed, EngineFull, StoreDamaged, UsageError
from mendfs.kv.optimistic import SEQUENCE_KEY

log = structlog.get_logger("kv")

MARK_NAME = "mendfs-synced"
SET_ASIDE = ".unsynced"
"""Added to the name of a log that begins after a gap which a power cut left: nothing in it was ever synced."""
SEQUENCE = struct.Struct(">Q")
_MARK = struct.Struct(">8sQ")
_MARK_SUM = struct.Struct(">Q")
_MARK_MAGIC = b"mendsync"
_MARK_SYNC_EVERY_S = 1.0
"""The mark is written at each sync but synced this often: it need not survive a power cut by more to be useful, and a
second fdatasync would double the cost of an fsync."""

# RocksDB's log: blocks of 32 KiB with records `checksum, length, type`, which are parts of batches.
_LOG_BLOCK = 32 * 1024
_LOG_HEADER = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_BATCH_END = b"\x01" + bytes([len(SEQUENCE_KEY)]) + SEQUENCE_KEY + bytes([SEQUENCE.size])
"""Every batch of ours ends with a put of SEQUENCE_KEY: tag, length and key, length of the value."""

REMEDIES = (
    ("No space left", "make room on that disk"),
    ("Disk quota exceeded", "make room for that user"),
    ("Read-only file system", "mount that disk writable, or see why the system does not"),
    ("Too many open files", "allow the process more descriptors (ulimit -n)"),
    ("Permission denied", "give the folder and all in it to the user who runs mendfs"),
    ("Operation not permitted", "give the folder and all in it to the user who runs mendfs"),
    ("Input/output error", "the disk fails: look at the system's log"),
)
"""What the system may say about any file, and what to do. It says nothing about what is stored: it may pass."""


_DAMAGE = ("Corruption", "No such file or directory", "Invalid argument", "Not implemented")
"""What RocksDB says of contents that cannot be its own."""


def one_line(error: Exception) -> str:
    """RocksDB's words on one line, each said once."""
    said = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return re.sub(r"^(Corruption: )+", "Corruption: ", " ".join(said.split()))[:300]


def remedy(text: str) -> str:
    """`text` with what to do about it, if the system said it."""
    for said, todo in REMEDIES:
        if said in text:
            return f"{text}: {todo}"
    return text


def is_damage(text: str) -> bool:
    """Whether RocksDB speaks of contents, not the system of a file."""
    return any(said in text for said in _DAMAGE) and not any(said in text for said, _ in REMEDIES)


def is_full(text: str) -> bool:
    """Whether the system said that there is no room."""
    return "No space left" in text or "Disk quota exceeded" in text


def cannot_open(path: str, error: Exception) -> EngineFailed | StoreDamaged | UsageError:
    """Why the database does not open, as what the caller can do about it."""
    text = one_line(error)
    if "lock hold by" in text or "While lock file" in text:
        return _in_use(path)
    if not is_damage(text):
        kind = EngineFull if is_full(text) else EngineFailed
        return kind(f"the database in {path} does not open: {remedy(text)}")
    return damaged(path, f"does not open ({text})")


def _in_use(path: str) -> UsageError:
    return UsageError(f"the database in {path} is in use: is another process running on it?")


def _is_in_use(lock: str) -> bool:
    """Whether somebody holds RocksDB's lock. Not by trying: closing the file would take a lock of our own away."""
    try:
        status = os.stat(lock)
        with open("/proc/locks", "rb") as file:
            held = [line.decode().split() for line in file]
    except OSError:
        return False  # no file, no lock; without /proc RocksDB says it later
    # With the device: a tmpfs counts its inodes from 1, as every other one does.
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(fields[-3] == device for fields in held if len(fields) >= 8)


def damaged(path: str, what: str, *, otherwise: str = "") -> StoreDamaged:
    """The folder's contents cannot be what RocksDB wrote."""
    return StoreDamaged(
        f"the database in {path} {what}: it is damaged, and was not touched. "
        f"Put back a good copy of the whole folder{otherwise}"
    )


class Mark:
    """The file that says up to where the database was synced. Used by one thread at a time."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd
        self._synced_s = float("-inf")

    @classmethod
    def open(cls, path: str, sequence: int) -> "Mark":
        """Open or make it in the folder `path`, saying `sequence`, durably."""
        fd = os.open(os.path.join(path, MARK_NAME), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        mark = cls(path, fd)
        try:
            mark.write(sequence, 0.0)
            os.fsync(fd)
            sync_directory(path)
        except BaseException:
            os.close(fd)
            raise
        return mark

    def write(self, sequence: int, at_s: float) -> None:
        """Say that everything up to `sequence` is synced. Only after it is. Raises OSError."""
        if not os.fstat(self._fd).st_nlink:
            # Syncs of files without a name succeed, and keep nothing.
            raise OSError(errno.ENOENT, f"the folder {self._path} was deleted under the server")
        body = _MARK.pack(_MARK_MAGIC, sequence)
        os.pwrite(self._fd, body + _MARK_SUM.pack(xxh3_64_intdigest(body)), 0)
        if at_s - self._synced_s >= _MARK_SYNC_EVERY_S:
            self._synced_s = at_s
            os.fdatasync(self._fd)

    def close(self) -> None:
        """Sync and close it."""
        try:
            os.fdatasync(self._fd)
        finally:
            os.close(self._fd)


def read_mark(path: str) -> int | None:
    """What the mark says; None if there is none that can be read."""
    try:
        with open(os.path.join(path, MARK_NAME), "rb") as file:
            raw = file.read(_MARK.size + _MARK_SUM.size)
    except FileNotFoundError:
        return None
    body = raw[: _MARK.size]
    if len(raw) != _MARK.size + _MARK_SUM.size or raw[_MARK.size :] != _MARK_SUM.pack(xxh3_64_intdigest(body)):
        log.warning("the mark of what was synced is damaged: written anew", path=path)
        return None
    magic, sequence = _MARK.unpack(body)
    return int(sequence) if magic == _MARK_MAGIC else None


def check(path: str, options: Options) -> None:
    """Look whether the database in `path` is whole, before it is opened. Raises StoreDamaged, EngineFailed, UsageError.

    `options` are for reading; their log folder is changed here. Costs about 5 ms and, where a log is replayed, what
    RocksDB takes for that once more.
    """
    if _is_in_use(os.path.join(path, "LOCK")):
        # Files that another process is changing cannot be judged.
        raise _in_use(path)
    names = os.listdir(path)
    logs = sorted((name for name in names if name.endswith(".log")), key=lambda name: int(name[:-4]))
    if "CURRENT" not in names:
        # A creation that was interrupted leaves a manifest, but no table, no log and no mark.
        if logs or MARK_NAME in names or any(name.endswith(".sst") for name in names):
            raise damaged(path, "has lost its file CURRENT")
        return
    synced = read_mark(path)
    _check_joins(path, options, logs, synced)
    options.set_wal_dir(path)
    reached = _sequence(path, options)
    if synced is not None and reached < synced:
        raise damaged(
            path,
            f"ends at change {reached}, but {synced} had been synced",
            otherwise=f", or delete {MARK_NAME} in it to go on without what is lost",
        )


def _check_joins(path: str, options: Options, logs: list[str], synced: int | None) -> None:
    """Whether each log begins where the tables and the logs before it end."""
    with _empty_folder(path) as empty:
        options.set_wal_dir(empty)
        end = _sequence(path, options)
    filled = [name for name in logs if os.path.getsize(os.path.join(path, name))]
    for at, name in enumerate(filled):
        # The last log's end is found by RocksDB itself; where there is only one, 16 MiB need not be read here.
        first, last = _sequences_in(os.path.join(path, name), whole=at < len(filled) - 1)
        if first is not None and first > end + 1:
            if synced is None or end < synced:
                raise damaged(path, f"lacks the changes from {end + 1} to {first - 1}")
            # A power cut has torn an unsynced log whose successor was begun already: that one was not synced either.
            for later in filled[at:]:
                log.warning("a log after a power cut's gap is set aside", path=path, log=later, change=end)
                os.rename(os.path.join(path, later), os.path.join(path, later + SET_ASIDE))
            sync_directory(path)
            return
        end = max(end, last or 0)


@contextlib.contextmanager
def _empty_folder(path: str) -> Iterator[str]:
    # RocksDB wants a folder for its logs: with an empty one it shows what the tables alone hold. Elsewhere if that can
    # be, for this disk may be full or read-only.
    try:
        made = tempfile.TemporaryDirectory(prefix="mendfs-")
    except OSError:
        made = tempfile.TemporaryDirectory(prefix="mendfs-", dir=path)
    with made as empty:
        yield empty


def _sequence(path: str, options: Options) -> int:
    """The commit sequence that the database in `path` has reached; nothing is written."""
    database = None
    try:
        database = Rdict(path, options, access_type=AccessType.read_only())
        raw = database.get(SEQUENCE_KEY)
    except Exception as error:  # rocksdict raises no narrower class
        raise cannot_open(path, error) from None
    finally:
        if database is not None:
            database.close()
    return SEQUENCE.unpack(raw)[0] if raw else 0


def _sequences_in(path: str, *, whole: bool) -> tuple[int | None, int | None]:
    """Our sequences of the first and, with `whole`, the last batch of one log; None where it cannot be read."""
    first = last = None
    for batch, is_good in _batches(path):
        if not is_good or batch[-len(_BATCH_END) - SEQUENCE.size : -SEQUENCE.size] != _BATCH_END:
            break
        last = SEQUENCE.unpack(batch[-SEQUENCE.size :])[0]
        first = last if first is None else first
        if not whole:
            break
    return first, last


def _batches(path: str) -> Iterator[tuple[bytes, bool]]:
    """The batches of a log, up to the first that is not whole; the first one's checksum is verified.

    For the others RocksDB does that: here it would take seconds.
    """
    parts: list[bytes] = []
    is_first, is_good = True, True
    with open(path, "rb") as file:
        while block := file.read(_LOG_BLOCK):
            at = 0
            while at + _LOG_HEADER.size <= len(block):
                checksum, length, kind = _LOG_HEADER.unpack_from(block, at)
                begin = at + _LOG_HEADER.size
                at = begin + length
                if at > len(block) or not (kind or length):
                    return
                if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST):
                    continue
                if kind in (_WHOLE, _FIRST):
                    parts = []
                if is_first and checksum != _log_checksum(block[begin - 1 : at]):
                    is_good = False
                parts.append(block[begin:at])
                if kind in (_WHOLE, _LAST):
                    yield b"".join(parts), is_good
                    is_first = False


def _log_checksum(type_and_data: bytes) -> int:
    """CRC-32C, masked as RocksDB keeps it."""
    crc = 0xFFFFFFFF
    for byte in type_and_data:
        crc = _CRC[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _crc_of_byte(crc: int) -> int:
    for _ in range(8):
        crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc


_CRC = [_crc_of_byte(byte) for byte in range(256)]


def sync_directory(path: str) -> None:
    """The names in a folder must survive a power cut too; RocksDB syncs only its own."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
