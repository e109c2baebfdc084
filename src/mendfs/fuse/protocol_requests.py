"""The kernel's requests: bytes -> frozen structs. Sans-I/O: nothing here reads a device (design section 7).

A request is a 40-byte header and a body. `parse_header` checks what all requests share; each struct's `parse` takes the
whole body and raises BadMessage for one that is cut, overlong or without its NUL: nothing of it was acted on then.
Offsets and sizes are in bytes, `node` is the inode number, `handle` what we answered to an open.
"""

import os
from struct import Struct, error
from typing import NamedTuple, Self

import msgspec

from mendfs.errors import BadMessage
from mendfs.fuse import constants

HEADER = Struct("=IIQQIIIHH")
HEADER_BYTES = HEADER.size
WRITE_BODY = Struct("=QQIIQII")
HEAD_BYTES = HEADER_BYTES + WRITE_BODY.size
"""The first buffer of the reading call: a WRITE's header and fields, so that its data starts the second one."""
REQUEST_BYTES_MAX = HEAD_BYTES + constants.MAX_WRITE
XATTR_BYTES_MAX = 64 << 10

_U32 = Struct("=I")
_U32_2 = Struct("=II")
_U32_4 = Struct("=IIII")
_U64 = Struct("=Q")
_INIT = Struct("=IIII")
_GETATTR = Struct("=IIQ")
_SETATTR = Struct("=IIQQQqqqIIIIIIII")
_READ = Struct("=QQIIQII")
_RELEASE = Struct("=QIIQ")
_FLUSH = Struct("=QIIQ")
_FSYNC = Struct("=QII")
_ALLOCATE = Struct("=QQQII")
_SEEK = Struct("=QQII")
_RENAME2 = Struct("=QII")

NS_PER_S = 1_000_000_000
TIME_NS_MAX = (1 << 63) - 1
"""Times are kept in 64 bits of nanoseconds (the year 2262); as file systems do, those beyond are moved to the edge."""


class Header(NamedTuple):
    """What every request begins with."""

    length: int
    operation: int
    unique: int
    """The request's number; the answer names it."""
    node: int
    uid: int
    gid: int
    pid: int
    extension_words: int
    """Extensions at the end of the body, in units of 8 bytes. We negotiate none."""
    padding: int


_tuple_new = tuple.__new__


def parse_header(head: bytes | bytearray, length: int) -> Header:
    """The header of a request of which `length` bytes were read."""
    if not HEADER_BYTES <= length <= REQUEST_BYTES_MAX or len(head) < HEADER_BYTES:
        raise BadMessage(f"a FUSE request of {length} bytes")
    # Not Header(*...): one call instead of nine arguments, for every request there is.
    header = _tuple_new(Header, HEADER.unpack_from(head))
    if header.length != length:
        raise BadMessage(f"a FUSE request says it has {header.length} bytes, but {length} came")
    return header


def _fields(layout: Struct, body: bytes) -> tuple[int, ...]:
    """The fields at the beginning of a body; newer kernels may send more than we know of."""
    try:
        return layout.unpack_from(body)
    except error:
        raise BadMessage(f"a FUSE request's body has {len(body)} bytes, not {layout.size}") from None


def _names(body: bytes, start: int, count: int) -> list[bytes]:
    """`count` NUL-terminated names that fill the body from `start` on. Empty ones are refused."""
    if len(body) <= start or body[-1]:
        raise BadMessage("a FUSE request's name has no end")
    names = body[start:-1].split(b"\0")
    if len(names) != count or not all(names) or max(map(len, names)) > constants.NAME_BYTES_MAX:
        raise BadMessage(f"a FUSE request has {len(names)} names, not {count}, or empty or overlong ones")
    return names


class Init(NamedTuple):
    """The first request. Answer: `protocol_replies.init`."""

    major: int
    minor: int
    read_ahead_bytes_max: int
    flags: int

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Kernels before 7.36 send no second word of flags."""
        major, minor, read_ahead, flags = _fields(_INIT, body)
        if flags & constants.INIT_EXT and len(body) >= _INIT.size + _U32.size:
            flags |= _U32.unpack_from(body, _INIT.size)[0] << 32
        return cls(major, minor, read_ahead, flags)


class Nothing(NamedTuple):
    """READLINK, STATFS, SYNCFS, DESTROY: the header says it all."""

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Whatever the body holds does not matter."""
        return cls()


class Name(NamedTuple):
    """LOOKUP, UNLINK, RMDIR, REMOVEXATTR: the node is the directory, or the inode with the attribute."""

    name: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """One name."""
        return cls(*_names(body, 0, 1))


class GetAttributes(NamedTuple):
    """Answer: `Replies.attributes`. `handle` is None unless an open file was asked about."""

    handle: int | None

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """An optional handle."""
        flags, _, handle = _fields(_GETATTR, body)
        return cls(handle if flags & constants.GETATTR_FH else None)


class SetAttributes(msgspec.Struct, frozen=True):
    """Change what is not None. Answer: `Replies.attributes`."""

    mode: int | None
    uid: int | None
    gid: int | None
    size: int | None
    atime_ns: int | None
    mtime_ns: int | None
    atime_is_now: bool
    mtime_is_now: bool
    kill_suid_sgid: bool
    """A change of owner, or a truncation by somebody without CAP_FSETID: these bits must not survive it."""

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Only the fields that `valid` names count."""
        valid, _, _, size, _, atime_s, mtime_s, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = _fields(_SETATTR, body)
        return cls(
            mode if valid & constants.SET_MODE else None,
            uid if valid & constants.SET_UID else None,
            gid if valid & constants.SET_GID else None,
            size if valid & constants.SET_SIZE else None,
            _time_ns(atime_s, atime_ns) if valid & constants.SET_ATIME else None,
            _time_ns(mtime_s, mtime_ns) if valid & constants.SET_MTIME else None,
            valid & constants.SET_ATIME_NOW != 0,
            valid & constants.SET_MTIME_NOW != 0,
            valid & constants.SET_KILL_SUIDGID != 0,
        )


def _time_ns(seconds: int, nanoseconds: int) -> int:
    if nanoseconds >= NS_PER_S:
        raise BadMessage(f"a FUSE request has a time with {nanoseconds} nanoseconds")
    return max(-TIME_NS_MAX, min(seconds * NS_PER_S + nanoseconds, TIME_NS_MAX))


class Symlink(NamedTuple):
    """Answer: `Replies.entry`."""

    name: bytes
    target: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Name first, then what it points to."""
        return cls(*_names(body, 0, 2))


class MakeNode(NamedTuple):
    """MKNOD: a file, fifo, socket or device. The kernel has taken the umask off `mode`. Answer: `Replies.entry`."""

    mode: int
    rdev: int
    """As Linux encodes it in 32 bits; kept and given back as it is."""
    name: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Mode, device, name."""
        mode, rdev, _, _ = _fields(_U32_4, body)
        return cls(mode, rdev, *_names(body, _U32_4.size, 1))


class MakeDirectory(NamedTuple):
    """Answer: `Replies.entry`."""

    mode: int
    name: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Mode, name."""
        mode, _ = _fields(_U32_2, body)
        return cls(mode, *_names(body, _U32_2.size, 1))


class Rename(NamedTuple):
    """From the header's node into `new_parent`. Answer: nothing."""

    new_parent: int
    flags: int
    name: bytes
    new_name: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """RENAME: without flags."""
        (new_parent,) = _fields(_U64, body)
        return cls(new_parent, 0, *_names(body, _U64.size, 2))

    @classmethod
    def parse_with_flags(cls, body: bytes) -> Self:
        """RENAME2."""
        new_parent, flags, _ = _fields(_RENAME2, body)
        return cls(new_parent, flags, *_names(body, _RENAME2.size, 2))


class Link(NamedTuple):
    """One more name, in the header's node, for `target`. Answer: `Replies.entry`."""

    target: int
    name: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Inode, name."""
        (target,) = _fields(_U64, body)
        return cls(target, *_names(body, _U64.size, 1))


class Open(NamedTuple):
    """OPEN, OPENDIR. `flags` are open(2)'s. Answer: `protocol_replies.opened`."""

    flags: int
    kill_suid_sgid: bool

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Flags of the application, flags of the kernel."""
        flags, open_flags = _fields(_U32_2, body)
        return cls(flags, open_flags & constants.OPEN_KILL_SUIDGID != 0)


class Create(NamedTuple):
    """Make a file and open it. Answer: `Replies.entry` and `protocol_replies.opened`."""

    flags: int
    mode: int
    name: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Flags, mode, name."""
        flags, mode, _, _ = _fields(_U32_4, body)
        return cls(flags, mode, *_names(body, _U32_4.size, 1))


class Read(NamedTuple):
    """READ, READDIR, READDIRPLUS. Answer: at most `size` bytes; fewer only at the end."""

    handle: int
    offset: int
    """For a directory: the position after the last entry it has."""
    size: int

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Refuses more than was negotiated."""
        handle, offset, size, *_ = _fields(_READ, body)
        if size > constants.MAX_WRITE:
            raise BadMessage(f"a FUSE request wants to read {size} bytes, more than was agreed on")
        return cls(handle, offset, size)


class Write(NamedTuple):
    """The data is in the second buffer. Answer: `protocol_replies.written`."""

    handle: int
    offset: int
    size: int
    kill_suid_sgid: bool
    is_from_cache: bool
    """A page of a shared mapping, sent through whichever writable handle the kernel found: the offset is what counts,
    even if that handle appends."""
    is_synchronous: bool
    """O_DSYNC or RWF_DSYNC: durable before the answer, where the kernel does not send an fsync by itself."""

    @classmethod
    def parse_head(cls, head: bytes | bytearray, length: int) -> Self:
        """From the whole first buffer of a request of `length` bytes."""
        if length < HEAD_BYTES:
            raise BadMessage(f"a FUSE write request of {length} bytes")
        handle, offset, size, flags, _, file_flags, _ = WRITE_BODY.unpack_from(head, HEADER_BYTES)
        if size != length - HEAD_BYTES:
            raise BadMessage(f"a FUSE write request says it has {size} bytes of data, but {length - HEAD_BYTES} came")
        kill, is_from_cache = flags & constants.WRITE_KILL_SUIDGID != 0, flags & constants.WRITE_CACHE != 0
        return cls(handle, offset, size, kill, is_from_cache, file_flags & os.O_DSYNC != 0)


class Release(NamedTuple):
    """RELEASE, RELEASEDIR: the last descriptor is gone. Answer: nothing."""

    handle: int

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Flags and lock owner are for locks, which come later."""
        return cls(_fields(_RELEASE, body)[0])


class Flush(NamedTuple):
    """One of perhaps several descriptors is closed. Answer: nothing."""

    handle: int

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The lock owner is for locks, which come later."""
        return cls(_fields(_FLUSH, body)[0])


class Fsync(NamedTuple):
    """FSYNC, FSYNCDIR. Answer: nothing."""

    handle: int
    is_datasync: bool

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Handle and flags."""
        handle, flags, _ = _fields(_FSYNC, body)
        return cls(handle, flags & constants.FSYNC_FDATASYNC != 0)


class Allocate(NamedTuple):
    """FALLOCATE. Answer: nothing."""

    handle: int
    offset: int
    length: int
    mode: int

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Handle, range, mode."""
        handle, offset, length, mode, _ = _fields(_ALLOCATE, body)
        return cls(handle, offset, length, mode)


class Seek(NamedTuple):
    """LSEEK, only ever with SEEK_DATA or SEEK_HOLE. Answer: `protocol_replies.sought`."""

    handle: int
    offset: int
    whence: int

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Handle, offset, whence."""
        handle, offset, whence, _ = _fields(_SEEK, body)
        return cls(handle, offset, whence)


class SetXattr(NamedTuple):
    """Answer: nothing."""

    flags: int
    name: bytes
    value: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Size, flags, name, value."""
        size, flags = _fields(_U32_2, body)
        end = body.find(b"\0", _U32_2.size)
        if end < 0 or size > XATTR_BYTES_MAX or len(body) != end + 1 + size:
            raise BadMessage(f"a FUSE request to set {size} bytes of an extended attribute has {len(body)} bytes")
        (name,) = _names(body[: end + 1], _U32_2.size, 1)
        return cls(flags, name, body[end + 1 :])


class GetXattr(NamedTuple):
    """Answer: the value, or with `size` 0 `protocol_replies.xattr_size`; ERANGE if it is longer than `size`."""

    size: int
    name: bytes

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """Size, name."""
        size, _ = _fields(_U32_2, body)
        return cls(size, *_names(body, _U32_2.size, 1))


class ListXattr(NamedTuple):
    """Answer: the names, each with its NUL, or their length as for GETXATTR."""

    size: int

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The size."""
        return cls(_fields(_U32_2, body)[0])


class Interrupt(NamedTuple):
    """Somebody who waits for request `unique` got a signal. No answer."""

    unique: int

    @classmethod
    def parse(cls, body: bytes) -> Self:
        """The request's number."""
        return cls(*_fields(_U64, body))
