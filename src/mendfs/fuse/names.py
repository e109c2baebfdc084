"""Names and inodes: each operation of the kernel as a call of the volume and its answer.

Nothing is remembered about inodes, so FORGET needs no work: the kernel's node is the inode number.
"""

import errno
import stat
from collections.abc import Callable

from mendfs.errors import OperationError
from mendfs.fuse import protocol_replies
from mendfs.fuse.constants import VOLUME_ID
from mendfs.fuse.protocol_replies import Replies
from mendfs.fuse.protocol_requests import (
    GetAttributes,
    GetXattr,
    Header,
    Link,
    ListXattr,
    MakeDirectory,
    MakeNode,
    Name,
    Nothing,
    Rename,
    SetAttributes,
    SetXattr,
    Symlink,
)
from mendfs.fuse.served import ServedVolume
from mendfs.model import NAME_BYTES_MAX, Inode

STATFS_BLOCK_BYTES = 4096
INODES_MAX = 1 << 40
"""What `df -i` shows as possible: numbers are plentiful, room is the limit."""
TRUSTED = b"trusted."
CAPABILITY = b"security.capability"
NAMESPACES = (b"user.", TRUSTED, b"security.")
"""Others are refused, ACLs (`system.posix_acl_*`) and file capabilities too: they would be kept but not enforced. A
refusal is honest, and answered without the volume."""


class Names:
    """LOOKUP to STATFS, extended attributes: everything that is no open file or directory."""

    def __init__(
        self,
        volume: ServedVolume,
        replies: Replies,
        now_ns: Callable[[], int],
        mode_changed: Callable[[Inode, int], None],
    ) -> None:
        self._volume = volume
        self._replies = replies
        self._now_ns = now_ns
        self._mode_changed = mode_changed

    async def lookup(self, header: Header, request: Name) -> bytes:
        """`.` and `..` come when the mount is exported: the node may then be a file."""
        node = Inode(header.node)
        found = self._volume.attributes(node) if request.name == b"." else self._volume.lookup(node, request.name)
        return self._replies.entry(await found)

    async def get_attributes(self, header: Header, request: GetAttributes) -> bytes:
        """With this mount's unflushed writes. What another answer has brought a moment ago is not asked for again."""
        inode = Inode(header.node)
        recent = self._volume.recent_attributes(inode, self._replies.walk_timeout_s)
        if recent is not None:
            return self._replies.attributes(recent[0], age_s=recent[1])
        return self._replies.attributes(await self._volume.attributes(inode))

    async def set_attributes(self, header: Header, request: SetAttributes) -> bytes:
        """Mode, owner, size, times."""
        inode = Inode(header.node)
        mode = request.mode
        attributes = await self._volume.set_attributes(
            inode,
            mode=None if mode is None else stat.S_IMODE(mode),
            uid=request.uid,
            gid=request.gid,
            size=request.size,
            atime_ns=self._now_ns() if request.atime_is_now else request.atime_ns,
            mtime_ns=self._now_ns() if request.mtime_is_now else request.mtime_ns,
            clear_set_id=request.kill_suid_sgid,
        )
        if mode is not None or request.kill_suid_sgid:
            self._mode_changed(inode, attributes.mode)
        return self._replies.attributes(attributes)

    async def readlink(self, header: Header, request: Nothing) -> bytes:
        """The link's text."""
        return await self._volume.readlink(Inode(header.node))

    async def symlink(self, header: Header, request: Symlink) -> bytes:
        """A symbolic link."""
        attributes = await self._volume.make(
            Inode(header.node),
            request.name,
            stat.S_IFLNK | 0o777,
            uid=header.uid,
            gid=header.gid,
            target=request.target,
        )
        return self._replies.entry(attributes)

    async def make_node(self, header: Header, request: MakeNode) -> bytes:
        """A file, fifo, socket or device."""
        attributes = await self._volume.make(
            Inode(header.node), request.name, request.mode, uid=header.uid, gid=header.gid, rdev=request.rdev
        )
        return self._replies.entry(attributes)

    async def make_directory(self, header: Header, request: MakeDirectory) -> bytes:
        """A directory."""
        mode = stat.S_IFDIR | stat.S_IMODE(request.mode)
        attributes = await self._volume.make(Inode(header.node), request.name, mode, uid=header.uid, gid=header.gid)
        return self._replies.entry(attributes)

    async def unlink(self, header: Header, request: Name) -> bytes:
        """Remove a name; the inode lives on while it has others, or is open."""
        await self._volume.unlink(Inode(header.node), request.name)
        return b""

    async def rmdir(self, header: Header, request: Name) -> bytes:
        """Remove an empty directory."""
        await self._volume.rmdir(Inode(header.node), request.name)
        return b""

    async def rename(self, header: Header, request: Rename) -> bytes:
        """RENAME, and RENAME2 with its flags; the volume refuses those it does not know."""
        await self._volume.rename(
            Inode(header.node), request.name, Inode(request.new_parent), request.new_name, request.flags
        )
        return b""

    async def link(self, header: Header, request: Link) -> bytes:
        """One more name."""
        return self._replies.entry(await self._volume.link(Inode(request.target), Inode(header.node), request.name))

    async def statfs(self, header: Header, request: Nothing) -> bytes:
        """Room for user data, in blocks of 4 KiB."""
        room = await self._volume.stat_volume()
        return protocol_replies.statfs(
            blocks=room.bytes_total // STATFS_BLOCK_BYTES,
            blocks_free=room.bytes_free // STATFS_BLOCK_BYTES,
            files=INODES_MAX,
            files_free=max(INODES_MAX - room.files, 0),
            block_bytes=STATFS_BLOCK_BYTES,
            io_bytes=STATFS_BLOCK_BYTES,
            name_bytes_max=NAME_BYTES_MAX,
        )

    async def sync(self, header: Header, request: Nothing) -> bytes:
        """SYNCFS: everything durable."""
        await self._volume.sync()
        return b""

    # --- extended attributes ----------------------------------------------------------------------------------

    def known_xattr(self, request: GetXattr) -> int | None:
        """The errno of an attribute that no inode has; None: ask the volume."""
        if request.name == CAPABILITY:
            return errno.ENODATA
        return None if request.name == VOLUME_ID or _is_supported(request.name) else errno.EOPNOTSUPP

    async def get_xattr(self, header: Header, request: GetXattr) -> bytes:
        """A value, or its length."""
        if request.name == VOLUME_ID:
            return _sized(self._volume.parameters.id.encode(), request.size)
        return _sized(await self._volume.get_xattr(Inode(header.node), request.name), request.size)

    async def list_xattr(self, header: Header, request: ListXattr) -> bytes:
        """The names, each with its NUL."""
        names = await self._volume.list_xattr(Inode(header.node))
        if header.uid:
            # As on a local disk: their values are root's, so are their names.
            names = tuple(name for name in names if not name.startswith(TRUSTED))
        return _sized(b"".join(name + b"\0" for name in names), request.size)

    async def set_xattr(self, header: Header, request: SetXattr) -> bytes:
        """Set, create or replace."""
        if not _is_supported(request.name):
            raise OperationError(errno.EOPNOTSUPP)
        await self._volume.set_xattr(Inode(header.node), request.name, request.value, request.flags)
        return b""

    async def remove_xattr(self, header: Header, request: Name) -> bytes:
        """Remove one."""
        if not _is_supported(request.name):
            raise OperationError(errno.ENODATA if request.name == CAPABILITY else errno.EOPNOTSUPP)
        await self._volume.remove_xattr(Inode(header.node), request.name)
        return b""


def _is_supported(name: bytes) -> bool:
    return name.startswith(NAMESPACES) and name != CAPABILITY


def _sized(value: bytes, size: int) -> bytes:
    if size == 0:
        return protocol_replies.xattr_size(len(value))
    if len(value) > size:
        raise OperationError(errno.ERANGE)
    return value
