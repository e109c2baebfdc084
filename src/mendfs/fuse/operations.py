"""Which operation of the kernel is done by what: parse the body, call the handler, get the answer's bytes.

`waiting` operations may wait for the volume and run as tasks; `immediate` ones are answered from the reading loop.
"""

from collections.abc import Callable, Coroutine
from typing import TypeVar

from mendfs.fuse import constants
from mendfs.fuse.channel import Channel
from mendfs.fuse.directories import Directories
from mendfs.fuse.files import Files
from mendfs.fuse.names import Names
from mendfs.fuse.protocol_requests import (
    Allocate,
    Create,
    Flush,
    Fsync,
    GetAttributes,
    GetXattr,
    Header,
    Link,
    ListXattr,
    MakeDirectory,
    MakeNode,
    Name,
    Nothing,
    Open,
    Read,
    Release,
    Rename,
    Seek,
    SetAttributes,
    SetXattr,
    Symlink,
)

Request = TypeVar("Request")
Answering = Coroutine[None, None, bytes | None]
"""Ends with the answer's body; with None the handler has answered by itself."""
Waiting = Callable[[Header, bytes], Answering]
Immediate = Callable[[Header, bytes], bytes]

BY_INODE = frozenset(
    {
        constants.GETATTR,
        constants.SETATTR,
        constants.READLINK,
        constants.OPEN,
        constants.OPENDIR,
        constants.SETXATTR,
        constants.GETXATTR,
        constants.LISTXATTR,
        constants.REMOVEXATTR,
    }
)
"""Operations on an inode that a path led to a moment ago. If it is gone meanwhile, ESTALE makes the kernel walk the
path once more: the name may be another file's by now (a rename over it elsewhere), and then ENOENT would be wrong."""


def _waiting(
    parse: Callable[[bytes], Request], handle: Callable[[Header, Request], Coroutine[None, None, bytes | None]]
) -> Waiting:
    def start(header: Header, body: bytes) -> Answering:
        return handle(header, parse(body))

    return start


def _immediate(parse: Callable[[bytes], Request], handle: Callable[[Header, Request], bytes]) -> Immediate:
    def answer(header: Header, body: bytes) -> bytes:
        return handle(header, parse(body))

    return answer


def waiting_operations(names: Names, files: Files, directories: Directories, channel: Channel) -> dict[int, Waiting]:
    """Those that may wait. WRITE is not among them: its data is not in the body."""

    async def read(header: Header, request: Read) -> None:
        await files.read(channel, header, request)

    return {
        constants.LOOKUP: _waiting(Name.parse, names.lookup),
        constants.GETATTR: _waiting(GetAttributes.parse, names.get_attributes),
        constants.SETATTR: _waiting(SetAttributes.parse, names.set_attributes),
        constants.READLINK: _waiting(Nothing.parse, names.readlink),
        constants.SYMLINK: _waiting(Symlink.parse, names.symlink),
        constants.MKNOD: _waiting(MakeNode.parse, names.make_node),
        constants.MKDIR: _waiting(MakeDirectory.parse, names.make_directory),
        constants.UNLINK: _waiting(Name.parse, names.unlink),
        constants.RMDIR: _waiting(Name.parse, names.rmdir),
        constants.RENAME: _waiting(Rename.parse, names.rename),
        constants.RENAME2: _waiting(Rename.parse_with_flags, names.rename),
        constants.LINK: _waiting(Link.parse, names.link),
        constants.STATFS: _waiting(Nothing.parse, names.statfs),
        constants.SYNCFS: _waiting(Nothing.parse, names.sync),
        constants.GETXATTR: _waiting(GetXattr.parse, names.get_xattr),
        constants.LISTXATTR: _waiting(ListXattr.parse, names.list_xattr),
        constants.SETXATTR: _waiting(SetXattr.parse, names.set_xattr),
        constants.REMOVEXATTR: _waiting(Name.parse, names.remove_xattr),
        constants.OPEN: _waiting(Open.parse, files.open),
        constants.CREATE: _waiting(Create.parse, files.create),
        constants.READ: _waiting(Read.parse, read),
        constants.FLUSH: _waiting(Flush.parse, files.flush),
        constants.FALLOCATE: _waiting(Allocate.parse, files.allocate),
        constants.LSEEK: _waiting(Seek.parse, files.seek),
        constants.FSYNC: _waiting(Fsync.parse, files.fsync),
        constants.READDIR: _waiting(Read.parse, directories.read),
        constants.READDIRPLUS: _waiting(Read.parse, directories.read_plus),
        constants.FSYNCDIR: _waiting(Fsync.parse, directories.fsync),
    }


def immediate_operations(directories: Directories) -> dict[int, Immediate]:
    """Those that need nothing but memory."""
    return {
        constants.OPENDIR: _immediate(Open.parse, directories.open),
        constants.RELEASEDIR: _immediate(Release.parse, directories.release),
        constants.DESTROY: _immediate(Nothing.parse, lambda header, request: b""),
    }
