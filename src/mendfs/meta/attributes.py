"""Attributes, extended attributes and what symbolic links say, as functions over a transaction."""

import errno
import stat

import msgspec

from mendfs.errors import NotReady, OperationError
from mendfs.extents import add_cut
from mendfs.kv.engine import Transaction
from mendfs.meta import schema
from mendfs.meta.inodes import changed, find, visible, write
from mendfs.model import NAME_BYTES_MAX, SIZE_MAX, Attributes, Inode, without_set_id
from mendfs.wire.messages import meta as messages

XATTR_CREATE = 1
XATTR_REPLACE = 2
XATTR_BYTES_MAX = 64 << 10
"""As Linux itself allows (XATTR_SIZE_MAX)."""
XATTRS_MAX = 1000
CUTS_MAX = 64
"""Truncations that wait to be applied: past this the background must catch up first, so a record stays small."""


async def set_attributes(tx: Transaction, request: messages.SetAttributes) -> Attributes:
    """Change mode, owner, times; a size truncates or extends."""
    record = await find(tx, request.inode)
    fields: dict[str, object] = {"ctime_ns": request.now_ns, "version": tx.sequence()}
    if request.mode is not None:
        fields["mode"] = stat.S_IFMT(record.attributes.mode) | stat.S_IMODE(request.mode)
    elif request.clear_set_id and stat.S_ISREG(record.attributes.mode):
        fields["mode"] = without_set_id(record.attributes.mode)
    for name in ("uid", "gid", "atime_ns", "mtime_ns"):
        value = getattr(request, name)
        if value is not None:
            fields[name] = value
    if request.size is not None:
        record = _resize(tx, record, request.size)
        fields.setdefault("mtime_ns", request.now_ns)
    record = changed(record, **fields)
    write(tx, record)
    return visible(record)


def _resize(tx: Transaction, record: schema.InodeRecord, size: int) -> schema.InodeRecord:
    """Set the size; going down also makes a cut, so that what lay behind never comes back when the file grows again."""
    attributes = record.attributes
    if not stat.S_ISREG(attributes.mode):
        raise OperationError(errno.EISDIR if stat.S_ISDIR(attributes.mode) else errno.EINVAL)
    if not 0 <= size <= SIZE_MAX:
        raise OperationError(errno.EFBIG if size > 0 else errno.EINVAL)
    if size < attributes.size:
        if len(record.cuts) >= CUTS_MAX:
            raise NotReady(f"inode {attributes.inode}: {CUTS_MAX} truncations wait for the background")
        number = record.cut_number + 1
        record = msgspec.structs.replace(record, cut_number=number, cuts=add_cut(record.cuts, number=number, size=size))
        tx.put(schema.cutting_key(attributes.inode), b"")
    return changed(record, size=size)


async def read_link(tx: Transaction, inode: Inode) -> bytes:
    """What a symbolic link says. Raises EINVAL for anything else."""
    record = await find(tx, inode)
    if not stat.S_ISLNK(record.attributes.mode):
        raise OperationError(errno.EINVAL)
    return record.target


async def get_xattr(tx: Transaction, inode: Inode, name: bytes) -> bytes:
    """The value. Raises ENODATA."""
    value = await tx.get(schema.xattr_key(inode, name))
    if value is None:
        await find(tx, inode)
        raise OperationError(errno.ENODATA)
    return value


async def list_xattr(tx: Transaction, inode: Inode) -> tuple[bytes, ...]:
    """The names, in order."""
    await find(tx, inode)
    found = await tx.range(*schema.xattrs_of(inode), limit=XATTRS_MAX)
    return tuple(schema.name_in(key) for key, _ in found)


async def set_xattr(tx: Transaction, request: messages.SetXattr) -> Attributes:
    """Set an extended attribute. Raises EEXIST, ENODATA by `flags`, ERANGE, E2BIG, ENOSPC."""
    if not 0 < len(request.name) <= NAME_BYTES_MAX:
        raise OperationError(errno.ERANGE)
    if len(request.value) > XATTR_BYTES_MAX:
        raise OperationError(errno.E2BIG)
    record = await find(tx, request.inode)
    key = schema.xattr_key(request.inode, request.name)
    exists = await tx.get(key) is not None
    if exists and request.flags == XATTR_CREATE:
        raise OperationError(errno.EEXIST)
    if not exists and request.flags == XATTR_REPLACE:
        raise OperationError(errno.ENODATA)
    if not exists and len(await list_xattr(tx, request.inode)) >= XATTRS_MAX:
        raise OperationError(errno.ENOSPC, "too many extended attributes")
    tx.put(key, request.value)
    return _changed_now(tx, record, request.now_ns)


async def remove_xattr(tx: Transaction, request: messages.RemoveXattr) -> Attributes:
    """Remove an extended attribute. Raises ENODATA."""
    record = await find(tx, request.inode)
    key = schema.xattr_key(request.inode, request.name)
    if await tx.get(key) is None:
        raise OperationError(errno.ENODATA)
    tx.delete(key)
    return _changed_now(tx, record, request.now_ns)


def _changed_now(tx: Transaction, record: schema.InodeRecord, now_ns: int) -> Attributes:
    record = changed(record, ctime_ns=now_ns, version=tx.sequence())
    write(tx, record)
    return visible(record)
