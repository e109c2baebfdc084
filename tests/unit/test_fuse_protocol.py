"""The kernel's protocol byte by byte: one table for each direction, and bytes no kernel would send."""

import contextlib
import os
import stat
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mendfs.errors import BadMessage
from mendfs.fuse import constants, protocol_replies
from mendfs.fuse import protocol_requests as requests
from mendfs.fuse.protocol_replies import Limits, Replies
from mendfs.model import SIZE_MAX, Attributes, CommitSequence, Inode

ATTRIBUTES = Attributes(
    inode=Inode(0x1122334455667788),
    generation=7,
    mode=stat.S_IFREG | 0o644,
    uid=1000,
    gid=100,
    nlink=2,
    size=1025,
    stored=513,
    rdev=0,
    atime_ns=1_000_000_001,
    mtime_ns=-1,
    ctime_ns=5_999_999_999,
    version=CommitSequence(9),
)
RAW_ATTRIBUTES = (
    "8877665544332211" + "0104000000000000" + "0200000000000000"  # inode, size, blocks of 512
    "0100000000000000" + "ffffffffffffffff" + "0500000000000000"  # seconds: -1 ns lies in second -1
    "01000000" + "ffc99a3b" + "ffc99a3b"  # nanoseconds
    "a4810000" + "02000000" + "e8030000" + "64000000" + "00000000" + "00000200" + "00000000"  # mode to flags
)

Parse = Callable[[bytes], object]

REQUESTS: list[tuple[str, Parse, bytes, object]] = [
    (
        "init",
        requests.Init.parse,
        struct.pack("=IIIII44x", 7, 44, 131072, 1 << 30 | 1, 1 << 4),
        requests.Init(7, 44, 131072, 1 << 36 | 1 << 30 | 1),
    ),
    ("init before 7.36", requests.Init.parse, struct.pack("=IIII", 7, 31, 65536, 9), requests.Init(7, 31, 65536, 9)),
    ("lookup", requests.Name.parse, b"name\0", requests.Name(b"name")),
    ("getattr", requests.GetAttributes.parse, struct.pack("=IIQ", 0, 0, 5), requests.GetAttributes(None)),
    ("getattr of a handle", requests.GetAttributes.parse, struct.pack("=IIQ", 1, 0, 5), requests.GetAttributes(5)),
    ("symlink", requests.Symlink.parse, b"name\0to/there\0", requests.Symlink(b"name", b"to/there")),
    (
        "mknod",
        requests.MakeNode.parse,
        struct.pack("=IIII", 0o20644, 0x103, 0o22, 0) + b"null\0",
        requests.MakeNode(0o20644, 0x103, b"null"),
    ),
    (
        "mkdir",
        requests.MakeDirectory.parse,
        struct.pack("=II", 0o755, 0o22) + b"d\0",
        requests.MakeDirectory(0o755, b"d"),
    ),
    ("rename", requests.Rename.parse, struct.pack("=Q", 9) + b"a\0b\0", requests.Rename(9, 0, b"a", b"b")),
    (
        "rename2",
        requests.Rename.parse_with_flags,
        struct.pack("=QII", 9, 2, 0) + b"a\0b\0",
        requests.Rename(9, 2, b"a", b"b"),
    ),
    ("link", requests.Link.parse, struct.pack("=Q", 9) + b"a\0", requests.Link(9, b"a")),
    ("open", requests.Open.parse, struct.pack("=II", 0o1002, 1), requests.Open(0o1002, True)),
    (
        "create",
        requests.Create.parse,
        struct.pack("=IIII", 0o102, 0o100644, 0o22, 0) + b"f\0",
        requests.Create(0o102, 0o100644, b"f"),
    ),
    (
        "read",
        requests.Read.parse,
        struct.pack("=QQIIQII", 3, 1 << 40, 1 << 20, 0, 0, 0, 0),
        requests.Read(3, 1 << 40, 1 << 20),
    ),
    ("release", requests.Release.parse, struct.pack("=QIIQ", 3, 0, 0, 0), requests.Release(3)),
    ("flush", requests.Flush.parse, struct.pack("=QIIQ", 3, 0, 0, 77), requests.Flush(3)),
    ("fallocate", requests.Allocate.parse, struct.pack("=QQQII", 3, 4, 5, 17, 0), requests.Allocate(3, 4, 5, 17)),
    ("lseek", requests.Seek.parse, struct.pack("=QQII", 3, 4, 4, 0), requests.Seek(3, 4, 4)),
    ("fsync", requests.Fsync.parse, struct.pack("=QII", 3, 1, 0), requests.Fsync(3, True)),
    (
        "setxattr",
        requests.SetXattr.parse,
        struct.pack("=II", 4, 1) + b"user.a\0v\0\0w",
        requests.SetXattr(1, b"user.a", b"v\0\0w"),
    ),
    ("setxattr empty", requests.SetXattr.parse, struct.pack("=II", 0, 0) + b"u\0", requests.SetXattr(0, b"u", b"")),
    ("getxattr", requests.GetXattr.parse, struct.pack("=II", 9, 0) + b"user.a\0", requests.GetXattr(9, b"user.a")),
    ("listxattr", requests.ListXattr.parse, struct.pack("=II", 9, 0), requests.ListXattr(9)),
    ("interrupt", requests.Interrupt.parse, struct.pack("=Q", 44), requests.Interrupt(44)),
]


@pytest.mark.parametrize(("parse", "body", "expected"), [row[1:] for row in REQUESTS], ids=[row[0] for row in REQUESTS])
def test_bodies_are_read_as_the_kernel_writes_them(parse: Parse, body: bytes, expected: object) -> None:
    assert parse(body) == expected


SETATTR_FIELDS = (
    *("valid", "padding", "handle", "size", "owner", "atime", "mtime", "ctime"),
    *("atimensec", "mtimensec", "ctimensec", "mode", "unused4", "uid", "gid", "unused5"),
)


def set_attributes(valid: int, **fields: int) -> bytes:
    values = {"valid": valid} | fields
    return struct.pack("=IIQQQqqqIIIIIIII", *[values.get(name, 0) for name in SETATTR_FIELDS])


def test_setattr_reads_only_what_counts() -> None:
    nothing = requests.SetAttributes.parse(set_attributes(0, mode=1, uid=2, gid=3, size=4, atime=5, mtime=6))
    assert nothing == requests.SetAttributes(None, None, None, None, None, None, False, False, False)
    valid = constants.SET_MODE | constants.SET_SIZE | constants.SET_ATIME | constants.SET_KILL_SUIDGID
    some = requests.SetAttributes.parse(set_attributes(valid, mode=0o100600, size=4, atime=-2, atimensec=999_999_999))
    assert some == requests.SetAttributes(0o100600, None, None, 4, -1_000_000_001, None, False, False, True)
    now = requests.SetAttributes.parse(set_attributes(constants.SET_MTIME_NOW | constants.SET_UID, uid=0xFFFFFFFE))
    assert (now.mtime_is_now, now.atime_is_now, now.uid) == (True, False, 0xFFFFFFFE)
    far = requests.SetAttributes.parse(set_attributes(constants.SET_MTIME, mtime=1 << 62))
    assert far.mtime_ns == requests.TIME_NS_MAX


def test_header_and_write_are_read_from_the_first_buffer() -> None:
    head = struct.pack("=IIQQIIIHH", 80 + 5, constants.WRITE, 12, 34, 1000, 100, 4321, 0, 0)
    head += struct.pack("=QQIIQII", 3, 4096, 5, 1 | 4, 0, os.O_WRONLY | os.O_SYNC, 0)
    assert len(head) == requests.HEAD_BYTES == 80
    header = requests.parse_header(head, 85)
    assert header == requests.Header(85, constants.WRITE, 12, 34, 1000, 100, 4321, 0, 0)
    assert requests.Write.parse_head(head, 85) == requests.Write(3, 4096, 5, True, True, True)
    for length in (84, 86, 40, 0, 80 + (1 << 20) + 1):
        with pytest.raises(BadMessage):
            requests.parse_header(head, length)
        with pytest.raises(BadMessage):
            requests.Write.parse_head(head, length)


HOSTILE: list[tuple[Parse, bytes]] = [
    (requests.Name.parse, b""),
    (requests.Name.parse, b"\0"),
    (requests.Name.parse, b"no end"),
    (requests.Name.parse, b"two\0names\0"),
    (requests.Name.parse, b"x" * 5000 + b"\0"),
    (requests.Symlink.parse, b"only one\0"),
    (requests.Rename.parse, struct.pack("=Q", 9) + b"\0b\0"),
    (requests.Read.parse, struct.pack("=QQIIQII", 3, 0, (1 << 20) + 1, 0, 0, 0, 0)),
    (requests.SetXattr.parse, struct.pack("=II", 5, 1) + b"user.a\0v"),
    (requests.SetXattr.parse, struct.pack("=II", 0xFFFFFFFF, 1) + b"user.a\0v"),
    (requests.SetXattr.parse, struct.pack("=II", 1, 1) + b"\0v"),
    (requests.SetAttributes.parse, set_attributes(constants.SET_ATIME, atimensec=1_000_000_000)),
]


@pytest.mark.parametrize(("parse", "body"), HOSTILE)
def test_malformed_bodies_are_refused(parse: Parse, body: bytes) -> None:
    with pytest.raises(BadMessage):
        parse(body)


@pytest.mark.parametrize("parse", sorted({row[1] for row in REQUESTS}, key=str))
@given(body=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(parse: Parse, body: bytes) -> None:
    with contextlib.suppress(BadMessage):
        parse(body)


@pytest.mark.parametrize("row", REQUESTS, ids=[row[0] for row in REQUESTS])
@given(data=st.data())
def test_cut_and_bent_bodies_are_read_or_refused(row: tuple[str, Parse, bytes, object], data: st.DataObject) -> None:
    _, parse, body, _ = row
    bent = bytearray(body[: data.draw(st.integers(0, len(body)))])
    for index in data.draw(st.lists(st.integers(0, max(len(bent) - 1, 0)), max_size=3)) if bent else []:
        bent[index] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadMessage):
        parse(bytes(bent))


# --- replies ------------------------------------------------------------------------------------------------------

LIMITS = Limits(read_ahead_bytes=4 << 20, background_requests=64, with_readdirplus=True)


def test_init_takes_what_is_offered_and_known() -> None:
    every = requests.Init(7, 44, 1 << 17, (1 << 64) - 1)
    fields = struct.unpack("=IIIIHHIIHHII24x", protocol_replies.init(every, LIMITS))
    major, minor, read_ahead, flags, background, congestion, max_write, granularity, pages, _, flags2, _ = fields
    assert (major, minor, read_ahead) == (7, constants.PROTOCOL_MINOR, 4 << 20)
    assert (background, congestion, max_write, granularity, pages) == (64, 48, 1 << 20, 1, 256)
    both = flags | flags2 << 32
    assert both & constants.INIT_DO_READDIRPLUS
    assert not both & (1 << 12 | 1 << 16), "neither AUTO_INVAL_DATA nor WRITEBACK_CACHE"
    assert not both & (1 << 1 | 1 << 10), "no locks yet: the kernel does them for one mount"
    older = protocol_replies.init(requests.Init(7, 38, 1 << 17, 1 << 5), LIMITS)
    assert struct.unpack_from("=IIII", older) == (7, 38, 4 << 20, 1 << 5)
    newer = protocol_replies.init(requests.Init(8, 1, 0, 0), LIMITS)
    assert struct.unpack_from("=I", newer) == (7,)
    assert len(older) == len(newer) == 64


def test_answers_are_what_the_kernel_reads() -> None:
    replies = Replies(block_size=4 << 20, entry_timeout_s=1.5, attribute_timeout_s=0.25)
    assert replies.attributes(ATTRIBUTES).hex() == "0000000000000000" + "80b2e60e" + "00000000" + RAW_ATTRIBUTES
    assert replies.entry(ATTRIBUTES).hex() == (
        "8877665544332211" + "0700000000000000" + "0100000000000000" + "0000000000000000"
        "0065cd1d" + "80b2e60e" + RAW_ATTRIBUTES
    )
    assert protocol_replies.answer_header(258, 4).hex() == "14000000" + "00000000" + "0201000000000000"
    assert protocol_replies.failure(258, 2).hex() == "10000000" + "feffffff" + "0201000000000000"
    assert protocol_replies.opened(5, 3).hex() == "0500000000000000" + "03000000" + "00000000"
    assert protocol_replies.written(4096).hex() == "00100000" + "00000000"
    entry = protocol_replies.directory_entry(inode=3, position=2, name=b"abc", kind=stat.S_IFDIR)
    assert entry.hex() == "0300000000000000" + "0200000000000000" + "03000000" + "04000000" + "6162630000000000"
    assert replies.directory_entry_plus(entry, None) == bytes(128) + entry
    assert replies.directory_entry_plus(entry, ATTRIBUTES) == replies.entry(ATTRIBUTES) + entry
    assert protocol_replies.invalidate_entry(1, b"ab").hex() == (
        "23000000" + "03000000" + "0000000000000000" + "0100000000000000" + "02000000" + "00000000" + "616200"
    )
    assert protocol_replies.invalidate_inode(1, offset=-1, length=0).hex() == (
        "28000000" + "02000000" + "0000000000000000" + "0100000000000000" + "ff" * 8 + "00" * 8
    )


def test_a_walk_lets_attributes_hold_but_descriptors_see_sizes_as_they_are() -> None:
    replies = Replies(block_size=8, walk_timeout_s=2)
    directory = Attributes(Inode(1), 0, stat.S_IFDIR | 0o755, 0, 0, 2, 0, 0, 0, 0, 0, 0, CommitSequence(1))
    assert struct.unpack_from("=Q", replies.attributes(directory)) == (2,)
    assert struct.unpack_from("=Q", replies.attributes(ATTRIBUTES)) == (0,)
    assert struct.unpack_from("=QQQQ", replies.entry(ATTRIBUTES))[2:] == (0, 2)


@given(
    times=st.tuples(*[st.integers(-requests.TIME_NS_MAX, requests.TIME_NS_MAX)] * 3),
    size=st.integers(0, SIZE_MAX),
    stored=st.integers(0, SIZE_MAX),
)
def test_any_attributes_can_be_answered(times: tuple[int, int, int], size: int, stored: int) -> None:
    attributes = Attributes(Inode(1), 1, 0o100644, 0, 0, 1, size, stored, 0, *times, CommitSequence(1))
    raw = Replies(block_size=8).attributes(attributes)
    fields = struct.unpack("=QIIQQQqqqIIIIIIIIII", raw)
    seconds, nanoseconds = fields[6:9], fields[9:12]
    assert tuple(second * 10**9 + rest for second, rest in zip(seconds, nanoseconds, strict=True)) == times
    assert (fields[4], fields[5]) == (size, (stored + 511) // 512)


@pytest.mark.parametrize(
    ("block_size", "expected"), [(8, 4096), (5000, 4096), (65536, 65536), (100_000, 65536), (16 << 20, 131072)]
)
def test_the_preferred_size_is_a_power_of_two_within_bounds(block_size: int, expected: int) -> None:
    assert protocol_replies.preferred_io_bytes(block_size) == expected
