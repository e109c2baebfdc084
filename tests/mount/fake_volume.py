"""A volume in memory with the API of client.volume: what the mount is tested with before and beside a cluster."""

import asyncio
import errno
import os
import stat
import time
from dataclasses import dataclass, field

from mendfs import model
from mendfs.errors import OperationError
from mendfs.model import NAME_BYTES_MAX, ROOT_INODE, Attributes, CommitSequence, Inode, without_set_id
from mendfs.wire.messages.meta import DirectoryEntry, Listing, VolumeStat

PARAMETERS = model.Volume(
    id="0" * 32,
    block_size=4 << 20,
    page_size=16 << 10,
    replicas=3,
    partitions=12,
    checksum="xxh3",
    layout="ring",
    write_quorum=2,
    read_quorum=1,
    server_count=4,
    created_ns=0,
)
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2


@dataclass
class Node:
    """An inode."""

    inode: Inode
    mode: int
    uid: int
    gid: int
    rdev: int = 0
    target: bytes = b""
    nlink: int = 1
    opens: int = 0
    data: bytearray = field(default_factory=bytearray)
    names: dict[bytes, Inode] = field(default_factory=dict)
    parent: Inode = ROOT_INODE
    xattrs: dict[bytes, bytes] = field(default_factory=dict)
    atime_ns: int = field(default_factory=time.time_ns)
    mtime_ns: int = field(default_factory=time.time_ns)
    ctime_ns: int = field(default_factory=time.time_ns)

    def attributes(self) -> Attributes:
        return Attributes(
            inode=self.inode,
            generation=1,
            mode=self.mode,
            uid=self.uid,
            gid=self.gid,
            nlink=self.nlink,
            size=len(self.target) or len(self.data),
            stored=len(self.data),
            rdev=self.rdev,
            atime_ns=self.atime_ns,
            mtime_ns=self.mtime_ns,
            ctime_ns=self.ctime_ns,
            version=CommitSequence(1),
        )

    def touch(self) -> None:
        self.mtime_ns = self.ctime_ns = time.time_ns()

    def resize(self, size: int) -> None:
        if size < len(self.data):
            del self.data[size:]
        else:
            self.data.extend(bytes(size - len(self.data)))


class FakeFile:
    """An open file. With `volume.writes_wait` set, writes find no room at first, as when uploads lag behind."""

    def __init__(self, volume: "FakeVolume", node: Node, flags: int) -> None:
        self._volume = volume
        self._node = node
        self._flags = flags
        self.attributes = node.attributes()
        self.keep_cache = volume.keep_cache

    async def read_into(self, buffer: memoryview, offset: int) -> int:
        await self._volume.gate()
        part = memoryview(self._node.data)[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def try_write(self, data: memoryview, offset: int) -> bool:
        if self._volume.writes_wait:
            return False
        node = self._node
        if self._flags & os.O_APPEND:
            offset = len(node.data)
        if offset + len(data) > len(node.data):
            node.resize(offset + len(data))
        # Into a view: assigning to a slice of a bytearray makes a copy first, and a benchmark would measure that.
        with memoryview(node.data) as view:
            view[offset : offset + len(data)] = data
        node.touch()
        return True

    async def write(self, data: memoryview, offset: int) -> int:
        for _ in range(3):
            await asyncio.sleep(0)
        await self._volume.gate()
        waits, self._volume.writes_wait = self._volume.writes_wait, False
        assert self.try_write(data, offset)
        self._volume.writes_wait = waits
        return len(data)

    async def allocate(self, mode: int, offset: int, length: int) -> None:
        if mode not in (0, 3, 0x10, 0x11):
            raise OperationError(errno.EOPNOTSUPP)
        data = self._node.data
        if mode:
            end = min(offset + length, len(data))
            data[offset:end] = bytes(max(0, end - offset))
        if mode in (0, 0x10) and offset + length > len(data):
            self._node.resize(offset + length)
        self._node.touch()

    async def seek(self, offset: int, whence: int) -> int:
        size = len(self._node.data)
        if offset >= size:
            raise OperationError(errno.ENXIO)
        return offset if whence == os.SEEK_DATA else size

    async def flush(self) -> None:
        self._volume.calls.append(("flush", self._node.inode))
        if self._volume.flush_error:
            raise OperationError(self._volume.flush_error)

    async def fsync(self, datasync: bool = False) -> None:
        self._volume.calls.append(("fsync", self._node.inode))

    async def release(self) -> None:
        self._node.opens -= 1
        self._volume.forget_unreachable(self._node)


class FakeVolume:
    """Everything in dictionaries."""

    def __init__(self, parameters: model.Volume = PARAMETERS) -> None:
        self.parameters = parameters
        self.nodes: dict[Inode, Node] = {}
        self.calls: list[tuple[str, Inode]] = []
        self.writes_wait = False
        self.keep_cache = False
        self.flush_error = 0
        self.made_meanwhile: set[bytes] = set()
        """Names that another mount makes just before this one does."""
        self.is_open_gate = asyncio.Event()
        self.is_open_gate.set()
        self.waiting_at_gate = 0
        self.is_closed = False
        self._last = ROOT_INODE
        self.nodes[ROOT_INODE] = Node(ROOT_INODE, stat.S_IFDIR | 0o755, os.geteuid(), os.getegid(), nlink=2)

    async def gate(self) -> None:
        """Where reads and waiting writes stand while no server answers."""
        self.waiting_at_gate += 1
        try:
            await self.is_open_gate.wait()
        finally:
            self.waiting_at_gate -= 1

    def _node(self, inode: Inode) -> Node:
        try:
            return self.nodes[inode]
        except KeyError:
            raise OperationError(errno.ENOENT) from None

    def _directory(self, inode: Inode) -> Node:
        node = self._node(inode)
        if not stat.S_ISDIR(node.mode):
            raise OperationError(errno.ENOTDIR)
        return node

    def _child(self, parent: Inode, name: bytes) -> Node:
        if len(name) > NAME_BYTES_MAX:
            raise OperationError(errno.ENAMETOOLONG)
        try:
            return self._node(self._directory(parent).names[name])
        except KeyError:
            raise OperationError(errno.ENOENT) from None

    def forget_unreachable(self, node: Node) -> None:
        if node.nlink == 0 and node.opens == 0:
            self.nodes.pop(node.inode, None)

    async def close(self, timeout_s: float = 30) -> tuple[str, ...]:
        self.is_closed = True
        return ()

    async def sync_committed(self) -> None:
        self.calls.append(("sync_committed", ROOT_INODE))

    async def sync(self) -> None:
        self.calls.append(("sync", ROOT_INODE))

    async def lookup(self, parent: Inode, name: bytes) -> Attributes:
        if name == b"..":
            return self._node(self._directory(parent).parent).attributes()
        return self._child(parent, name).attributes()

    async def attributes(self, inode: Inode) -> Attributes:
        return self._node(inode).attributes()

    def recent_attributes(self, inode: Inode, within_s: float) -> tuple[Attributes, float] | None:
        return None

    async def set_attributes(
        self,
        inode: Inode,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        size: int | None = None,
        atime_ns: int | None = None,
        mtime_ns: int | None = None,
        clear_set_id: bool = False,
    ) -> Attributes:
        node = self._node(inode)
        node.ctime_ns = time.time_ns()
        if mode is not None:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(mode)
        elif clear_set_id and stat.S_ISREG(node.mode):
            node.mode = without_set_id(node.mode)
        node.uid = node.uid if uid is None else uid
        node.gid = node.gid if gid is None else gid
        if size is not None:
            node.resize(size)
            node.touch()
        node.atime_ns = node.atime_ns if atime_ns is None else atime_ns
        node.mtime_ns = node.mtime_ns if mtime_ns is None else mtime_ns
        return node.attributes()

    async def make(
        self,
        parent: Inode,
        name: bytes,
        mode: int,
        *,
        uid: int,
        gid: int,
        rdev: int = 0,
        target: bytes = b"",
        open: bool = False,
    ) -> Attributes:
        if len(name) > NAME_BYTES_MAX:
            raise OperationError(errno.ENAMETOOLONG)
        directory = self._directory(parent)
        if name in self.made_meanwhile:
            self.made_meanwhile.discard(name)
            await self.make(parent, name, mode, uid=uid, gid=gid)
        if name in directory.names:
            raise OperationError(errno.EEXIST)
        if directory.mode & stat.S_ISGID:
            gid = directory.gid
        self._last = Inode(self._last + 1)
        node = Node(self._last, mode, uid, gid, rdev=rdev, target=target, parent=parent)
        if stat.S_ISDIR(mode):
            node.nlink = 2
            directory.nlink += 1
        node.opens = int(open)
        self.nodes[node.inode] = node
        directory.names[name] = node.inode
        directory.touch()
        return node.attributes()

    async def link(self, inode: Inode, parent: Inode, name: bytes) -> Attributes:
        directory = self._directory(parent)
        if name in directory.names:
            raise OperationError(errno.EEXIST)
        node = self._node(inode)
        node.nlink += 1
        node.ctime_ns = time.time_ns()
        directory.names[name] = inode
        directory.touch()
        return node.attributes()

    async def unlink(self, parent: Inode, name: bytes) -> Attributes | None:
        node = self._child(parent, name)
        if stat.S_ISDIR(node.mode):
            raise OperationError(errno.EISDIR)
        del self._directory(parent).names[name]
        self._directory(parent).touch()
        node.nlink -= 1
        node.ctime_ns = time.time_ns()
        self.forget_unreachable(node)
        return node.attributes()

    async def rmdir(self, parent: Inode, name: bytes) -> None:
        node = self._child(parent, name)
        if not stat.S_ISDIR(node.mode):
            raise OperationError(errno.ENOTDIR)
        if node.names:
            raise OperationError(errno.ENOTEMPTY)
        directory = self._directory(parent)
        del directory.names[name]
        directory.nlink -= 1
        directory.touch()
        node.nlink = 0
        self.forget_unreachable(node)

    async def rename(
        self, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, flags: int = 0
    ) -> Attributes | None:
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE):
            raise OperationError(errno.EINVAL)
        node = self._child(parent, name)
        source, destination = self._directory(parent), self._directory(new_parent)
        other = self.nodes.get(destination.names.get(new_name, Inode(0)))
        if other is not None and flags & RENAME_NOREPLACE:
            raise OperationError(errno.EEXIST)
        if flags & RENAME_EXCHANGE:
            if other is None:
                raise OperationError(errno.ENOENT)
            source.names[name], destination.names[new_name] = other.inode, node.inode
            self._moved(other, destination, source)
            self._moved(node, source, destination)
            return None
        if other is node:
            return None
        if other is not None:
            await (self.rmdir if stat.S_ISDIR(other.mode) else self.unlink)(new_parent, new_name)
        del source.names[name]
        destination.names[new_name] = node.inode
        self._moved(node, source, destination)
        return other.attributes() if other is not None else None

    def _moved(self, node: Node, source: Node, destination: Node) -> None:
        for directory in (source, destination):
            directory.touch()
        node.ctime_ns = time.time_ns()
        if stat.S_ISDIR(node.mode):
            source.nlink -= 1
            destination.nlink += 1
            node.parent = destination.inode

    async def readlink(self, inode: Inode) -> bytes:
        return self._node(inode).target

    async def list_directory(self, inode: Inode, after: bytes, limit: int, with_attributes: bool) -> Listing:
        self.calls.append(("list", inode))
        directory = self._directory(inode)
        names = sorted(name for name in directory.names if name > after)
        entries = []
        for name in names[:limit]:
            node = self.nodes[directory.names[name]]
            attributes = node.attributes() if with_attributes else None
            entries.append(DirectoryEntry(name, node.inode, stat.S_IFMT(node.mode), attributes))
        return Listing(tuple(entries), len(names) <= limit, directory.attributes(), directory.parent, CommitSequence(1))

    async def get_xattr(self, inode: Inode, name: bytes) -> bytes:
        self.calls.append(("get_xattr", inode))
        try:
            return self._node(inode).xattrs[name]
        except KeyError:
            raise OperationError(errno.ENODATA) from None

    async def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int) -> None:
        xattrs = self._node(inode).xattrs
        if flags == os.XATTR_CREATE and name in xattrs:
            raise OperationError(errno.EEXIST)
        if flags == os.XATTR_REPLACE and name not in xattrs:
            raise OperationError(errno.ENODATA)
        xattrs[name] = bytes(value)

    async def list_xattr(self, inode: Inode) -> tuple[bytes, ...]:
        return tuple(sorted(self._node(inode).xattrs))

    async def remove_xattr(self, inode: Inode, name: bytes) -> None:
        if self._node(inode).xattrs.pop(name, None) is None:
            raise OperationError(errno.ENODATA)

    async def stat_volume(self) -> VolumeStat:
        return VolumeStat(bytes_total=100 << 30, bytes_free=60 << 30, files=len(self.nodes))

    async def open_file(self, inode: Inode, *, flags: int, clear_set_id: bool = False) -> FakeFile:
        node = self._node(inode)
        if flags & os.O_TRUNC:
            node.mode = without_set_id(node.mode) if clear_set_id else node.mode
            node.resize(0)
            node.touch()
        node.opens += 1
        return FakeFile(self, node, flags)

    async def open_made(self, attributes: Attributes, *, flags: int) -> FakeFile:
        return FakeFile(self, self._node(attributes.inode), flags)
