"""Our answers and notifications: values -> bytes as the kernel reads them. Sans-I/O.

An answer is a 16-byte header (`answer_header`, `failure`) and a body, which these functions make.
"""

import stat
from collections.abc import Iterable
from struct import Struct

import msgspec

from mendfs.fuse import constants
from mendfs.fuse.protocol_requests import NS_PER_S, Init
from mendfs.model import Attributes, KiB

ANSWER = Struct("=IiQ")
ANSWER_BYTES = ANSWER.size
_INIT = Struct("=IIIIHHIIHHII24x")
_ENTRY = Struct("=QQQQII")
_ATTRIBUTES_VALID = Struct("=QII")
_ATTRIBUTES = Struct("=QQQqqqIIIIIIIIII")
_OPENED = Struct("=QII")
_STATFS = Struct("=QQQQQIII28x")
_U64 = Struct("=Q")
_U32_2 = Struct("=II")
_DIRENT = Struct("=QQII")
_INVAL_INODE = Struct("=Qqq")
_INVAL_ENTRY = Struct("=QII")

ENTRY_BYTES = _ENTRY.size + _ATTRIBUTES.size
DIRENT_BYTES = _DIRENT.size
_NO_ENTRY = bytes(ENTRY_BYTES)
"""Node 0 in a READDIRPLUS answer: the kernel learns the name and looks the rest up itself."""
_PADDING = tuple(bytes(-length % 8) for length in range(8))

SECTOR_BYTES = 512
"""The unit of st_blocks, whatever st_blksize is."""
PREFERRED_IO_BYTES_MIN = 4 * KiB
PREFERRED_IO_BYTES_MAX = 128 * KiB
"""st_blksize: `cp` reads and writes in this size, and Python makes file buffers of it: 1 MiB would make a program that
seeks and reads a few bytes fetch 1 MiB each time, while sequential reading gets long requests by read-ahead anyway."""

WANTED_FLAGS = (
    constants.INIT_ASYNC_READ
    | constants.INIT_ATOMIC_O_TRUNC
    | constants.INIT_EXPORT_SUPPORT
    | constants.INIT_BIG_WRITES
    | constants.INIT_PARALLEL_DIROPS
    | constants.INIT_MAX_PAGES
    # A link's text never changes during its inode's life, and its inode is looked up anew each time.
    | constants.INIT_CACHE_SYMLINKS
    | constants.INIT_EXPLICIT_INVAL_DATA
    # Without it the kernel asks for security.capability before each single write (measured: one request a write).
    | constants.INIT_HANDLE_KILLPRIV_V2
    | constants.INIT_EXT
    | constants.INIT_DIRECT_IO_ALLOW_MMAP
)
"""Not AUTO_INVAL_DATA: opens revalidate. Not WRITEBACK_CACHE: sizes and times would be the kernel's, not the volume's.
Not ASYNC_DIO: it sends the parts of one direct write at once, which would shuffle an append."""


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What the kernel is told to keep to."""

    read_ahead_bytes: int
    background_requests: int
    with_readdirplus: bool


def init(request: Init, limits: Limits) -> bytes:
    """The answer to INIT: the older of both versions, and of the wanted flags those that the kernel offers."""
    if request.major > constants.PROTOCOL_MAJOR:
        # By the protocol: say ours, the kernel asks again with it.
        return _INIT.pack(constants.PROTOCOL_MAJOR, constants.PROTOCOL_MINOR, *[0] * 10)
    wanted = WANTED_FLAGS
    if limits.with_readdirplus:
        wanted |= constants.INIT_DO_READDIRPLUS | constants.INIT_READDIRPLUS_AUTO
    flags = wanted & request.flags
    return _INIT.pack(
        constants.PROTOCOL_MAJOR,
        min(constants.PROTOCOL_MINOR, request.minor),
        limits.read_ahead_bytes,
        flags & 0xFFFFFFFF,
        limits.background_requests,
        limits.background_requests * 3 // 4,
        constants.MAX_WRITE,
        1,
        constants.MAX_PAGES,
        0,
        flags >> 32,
        0,
    )


def answer_header(unique: int, body_bytes: int) -> bytes:
    """What goes before the body of a successful answer."""
    return ANSWER.pack(ANSWER_BYTES + body_bytes, 0, unique)


def failure(unique: int, errno: int) -> bytes:
    """A whole answer: the request failed."""
    return ANSWER.pack(ANSWER_BYTES, -errno, unique)


def preferred_io_bytes(block_size: int) -> int:
    """st_blksize: a power of two, since the kernel keeps only its logarithm."""
    size = max(PREFERRED_IO_BYTES_MIN, min(block_size, PREFERRED_IO_BYTES_MAX))
    return 1 << (size.bit_length() - 1)


def _timeout(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * NS_PER_S)


class Replies:
    """Answers about inodes: how long they hold, and the preferred size of reads and writes, are the mount's."""

    def __init__(
        self,
        *,
        block_size: int,
        entry_timeout_s: float = 0,
        attribute_timeout_s: float = 0,
        walk_timeout_s: float = 0,
    ) -> None:
        self._entry_valid_s, self._entry_valid_ns = _timeout(entry_timeout_s)
        self._valid = _timeout(attribute_timeout_s)
        self.walk_timeout_s = max(attribute_timeout_s, walk_timeout_s)
        """How long attributes that came with a name, or are a directory's, may be believed."""
        self._walked_valid = _timeout(self.walk_timeout_s)
        self._io_bytes = preferred_io_bytes(block_size)

    def _raw(self, attributes: Attributes) -> bytes:
        atime_s, atime_ns = divmod(attributes.atime_ns, NS_PER_S)
        mtime_s, mtime_ns = divmod(attributes.mtime_ns, NS_PER_S)
        ctime_s, ctime_ns = divmod(attributes.ctime_ns, NS_PER_S)
        return _ATTRIBUTES.pack(
            attributes.inode,
            attributes.size,
            -(-attributes.stored // SECTOR_BYTES),
            atime_s,
            mtime_s,
            ctime_s,
            atime_ns,
            mtime_ns,
            ctime_ns,
            attributes.mode,
            attributes.nlink,
            attributes.uid,
            attributes.gid,
            attributes.rdev,
            self._io_bytes,
            0,
        )

    def attributes(self, attributes: Attributes, *, age_s: float = 0) -> bytes:
        """The answer to GETATTR and SETATTR. Attributes that are known for some time hold so much less long."""
        # The root has no name to look up, so a walk learns about directories in this way too.
        valid_s, valid_ns = self._walked_valid if stat.S_ISDIR(attributes.mode) else self._valid
        if age_s > 0:
            left_s = self.walk_timeout_s - age_s if stat.S_ISDIR(attributes.mode) else 0
            valid_s, valid_ns = _timeout(max(0, left_s))
        return _ATTRIBUTES_VALID.pack(valid_s, valid_ns, 0) + self._raw(attributes)

    def entry(self, attributes: Attributes) -> bytes:
        """The answer to LOOKUP and to everything that makes a name."""
        valid_s, valid_ns = self._walked_valid
        return _ENTRY.pack(
            attributes.inode,
            attributes.generation,
            self._entry_valid_s,
            valid_s,
            self._entry_valid_ns,
            valid_ns,
        ) + self._raw(attributes)

    def directory_entry_plus(self, entry: bytes, attributes: Attributes | None) -> bytes:
        """One entry of a READDIRPLUS answer: `entry` as made by `directory_entry`."""
        return (_NO_ENTRY if attributes is None else self.entry(attributes)) + entry


def directory_entry(*, inode: int, position: int, name: bytes, kind: int) -> bytes:
    """One entry of a READDIR answer. `position` continues after it; `kind` is the S_IFMT part of the mode."""
    return _DIRENT.pack(inode, position, len(name), kind >> 12) + name + _PADDING[len(name) % 8]


def opened(handle: int, flags: int) -> bytes:
    """The answer to OPEN and OPENDIR, and the end of that to CREATE."""
    return _OPENED.pack(handle, flags, 0)


def written(size: int) -> bytes:
    """The answer to WRITE."""
    return _U32_2.pack(size, 0)


def sought(offset: int) -> bytes:
    """The answer to LSEEK."""
    return _U64.pack(offset)


def xattr_size(size: int) -> bytes:
    """The answer to GETXATTR and LISTXATTR of size 0: how long the value is."""
    return _U32_2.pack(size, 0)


def statfs(
    *, blocks: int, blocks_free: int, files: int, files_free: int, block_bytes: int, io_bytes: int, name_bytes_max: int
) -> bytes:
    """The answer to STATFS. Blocks are of `block_bytes`."""
    return _STATFS.pack(blocks, blocks_free, blocks_free, files, files_free, io_bytes, name_bytes_max, block_bytes)


def _notification(code: int, parts: Iterable[bytes]) -> bytes:
    body = b"".join(parts)
    # A notification is an answer to no request: its number is 0 and its code stands where an error would.
    return ANSWER.pack(ANSWER_BYTES + len(body), code, 0) + body


def invalidate_inode(inode: int, *, offset: int, length: int) -> bytes:
    """Drop cached pages (and attributes); a negative offset drops attributes only, length 0 means to the end."""
    return _notification(constants.NOTIFY_INVAL_INODE, (_INVAL_INODE.pack(inode, offset, length),))


def invalidate_entry(parent: int, name: bytes) -> bytes:
    """Drop a cached name."""
    return _notification(constants.NOTIFY_INVAL_ENTRY, (_INVAL_ENTRY.pack(parent, len(name), 0), name, b"\0"))
