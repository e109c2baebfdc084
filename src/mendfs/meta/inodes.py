"""Reading and changing inode records inside a transaction: what every operation of the meta server builds on."""

import errno
import stat

import msgspec

from mendfs.errors import OperationError
from mendfs.kv.engine import Transaction
from mendfs.meta import schema
from mendfs.model import Attributes, CommitSequence, Inode

SETGID_DIRECTORY = stat.S_ISGID


def changed(record: schema.InodeRecord, **fields: object) -> schema.InodeRecord:
    """`record` with these attributes."""
    return msgspec.structs.replace(record, attributes=msgspec.structs.replace(record.attributes, **fields))


async def find(tx: Transaction, inode: Inode) -> schema.InodeRecord:
    """The inode's record. Raises ENOENT."""
    raw = await tx.get(schema.inode_key(inode))
    if raw is None:
        raise OperationError(errno.ENOENT, f"inode {inode}")
    return schema.INODE.decode(raw)


async def find_directory(tx: Transaction, inode: Inode) -> schema.InodeRecord:
    """The record of a directory that still has a name. Raises ENOENT, ENOTDIR."""
    record = await find(tx, inode)
    if not stat.S_ISDIR(record.attributes.mode):
        raise OperationError(errno.ENOTDIR, f"inode {inode}")
    if record.attributes.nlink == 0:
        raise OperationError(errno.ENOENT, f"directory {inode} was removed")
    return record


def write(tx: Transaction, record: schema.InodeRecord) -> None:
    """Store a record."""
    tx.put(schema.inode_key(record.attributes.inode), schema.INODE.encode(record))


def touch(tx: Transaction, record: schema.InodeRecord, now_ns: int, *, links: int = 0) -> schema.InodeRecord:
    """A directory's names changed: its times, version and, for a directory come or gone, its link count."""
    attributes = record.attributes
    result = changed(
        record,
        mtime_ns=now_ns,
        ctime_ns=now_ns,
        version=tx.sequence(),
        nlink=attributes.nlink + links,
    )
    write(tx, result)
    return result


def visible(record: schema.InodeRecord) -> Attributes:
    """The attributes as they are shown: bytes behind a cut count no more, though the background still holds them."""
    attributes = record.attributes
    if record.cuts and attributes.stored > attributes.size:
        return msgspec.structs.replace(attributes, stored=attributes.size)
    return attributes


async def read_attributes(tx: Transaction, inode: Inode) -> Attributes:
    """The attributes as they are shown. Raises ENOENT."""
    return visible(await find(tx, inode))


def new_record(
    inode: Inode, *, generation: int, mode: int, uid: int, gid: int, now_ns: int, version: CommitSequence
) -> schema.InodeRecord:
    """A new inode with one name; a directory has two links, its name and its own dot."""
    return schema.InodeRecord(
        Attributes(
            inode=inode,
            generation=generation,
            mode=mode,
            uid=uid,
            gid=gid,
            nlink=2 if stat.S_ISDIR(mode) else 1,
            size=0,
            stored=0,
            rdev=0,
            atime_ns=now_ns,
            mtime_ns=now_ns,
            ctime_ns=now_ns,
            version=version,
        )
    )
