"""Messages between clients and the meta server: queries, and changes, which are done once however often they arrive.

Every change names one of its session's request slots and a number in it (as in NFS 4.1, RFC 8881 section 2.10.6): the
slot's last answer is stored in the change's own transaction, so a repeated request is answered, not done again.
"""

from typing import Any

import msgspec

from mendfs.model import (
    Attributes,
    BlockId,
    CommitSequence,
    Extent,
    Generation,
    Inode,
    Partition,
    Seen,
    ServerNumber,
    Slot,
    SlotExtents,
)

OPEN_SLOTS_MAX = 8
"""Slots whose extents come with an open: a file of up to 8 blocks is read with one metadata call."""


class RequestId(msgspec.Struct, frozen=True, array_like=True):
    """The request slot of the session, and the number of the request in it: one more than the last one's."""

    slot: int
    number: int


class Lookup(msgspec.Struct, frozen=True, tag="lookup", forbid_unknown_fields=True):
    """Answer: `LookedUp`."""

    parent: Inode
    name: bytes


class LookedUp(msgspec.Struct, frozen=True, tag="looked_up", forbid_unknown_fields=True):
    """What the name stands for, None if nothing has it; and the directory, which a walk mostly asks for next."""

    attributes: Attributes | None
    directory: Attributes
    sequence: CommitSequence


WALK_NAMES_MAX = 64
"""Names of one walk: deeper paths take another one."""


class Walk(msgspec.Struct, frozen=True, tag="walk", forbid_unknown_fields=True):
    """From a directory on, one name in the other, as long as there are directories. Answer: `Walked`."""

    inode: Inode
    names: tuple[bytes, ...]


class Walked(msgspec.Struct, frozen=True, tag="walked", forbid_unknown_fields=True):
    """The directory itself, then what each name stands for: up to one that is missing, or that is no directory.

    All of one moment.
    """

    found: tuple[Attributes, ...]
    sequence: CommitSequence


class GetAttributes(msgspec.Struct, frozen=True, tag="get_attributes", forbid_unknown_fields=True):
    """Answer: `Found`."""

    inode: Inode


class Found(msgspec.Struct, frozen=True, tag="found", forbid_unknown_fields=True):
    """An inode's attributes. The answer to most changes of the namespace too."""

    attributes: Attributes
    sequence: CommitSequence
    changed: tuple[Attributes, ...] = ()
    """The other inodes that a change has changed, as they are now: the directory of a new name."""


class OpenInode(msgspec.Struct, frozen=True, tag="open_inode", forbid_unknown_fields=True):
    """The session has the inode open from now on: it is not freed while unlinked. Answer: `Opened`."""

    inode: Inode


class Opened(msgspec.Struct, frozen=True, tag="opened", forbid_unknown_fields=True):
    """Attributes and the extents of the first slots (OPEN_SLOTS_MAX, fewer if they are long)."""

    attributes: Attributes
    slots: tuple[SlotExtents, ...]
    slots_complete: int
    """`slots` says everything about the slots below this number; one it does not list is a hole."""
    sequence: CommitSequence


class GetExtents(msgspec.Struct, frozen=True, tag="get_extents", forbid_unknown_fields=True):
    """Extents of the slots `first` to `first + count - 1`. Answer: `Extents`."""

    inode: Inode
    first: Slot
    count: int


class Extents(msgspec.Struct, frozen=True, tag="extents", forbid_unknown_fields=True):
    """Slots without an entry, up to `slots_complete`, are holes. `size` is the file's."""

    slots: tuple[SlotExtents, ...]
    slots_complete: int
    size: int
    version: CommitSequence
    sequence: CommitSequence


class ListDirectory(msgspec.Struct, frozen=True, tag="list_directory", forbid_unknown_fields=True):
    """The names after `after`, in order of their bytes. Answer: `Listing`."""

    inode: Inode
    after: bytes
    limit: int
    with_attributes: bool


class DirectoryEntry(msgspec.Struct, frozen=True, array_like=True):
    """`kind` is the S_IFMT part of the mode."""

    name: bytes
    inode: Inode
    kind: int
    attributes: Attributes | None = None


class Listing(msgspec.Struct, frozen=True, tag="listing", forbid_unknown_fields=True):
    """`directory` is what the kernel asks for before it goes on to the names; `parent` is the inode of `..`."""

    entries: tuple[DirectoryEntry, ...]
    complete: bool
    directory: Attributes
    parent: Inode
    sequence: CommitSequence


class ReadLink(msgspec.Struct, frozen=True, tag="read_link", forbid_unknown_fields=True):
    """Answer: `LinkTarget`."""

    inode: Inode


class LinkTarget(msgspec.Struct, frozen=True, tag="link_target", forbid_unknown_fields=True):
    """What the symbolic link says."""

    target: bytes


class GetXattr(msgspec.Struct, frozen=True, tag="get_xattr", forbid_unknown_fields=True):
    """Answer: `XattrValue`, or ENODATA."""

    inode: Inode
    name: bytes


class XattrValue(msgspec.Struct, frozen=True, tag="xattr_value", forbid_unknown_fields=True):
    """The attribute's value."""

    value: bytes


class ListXattr(msgspec.Struct, frozen=True, tag="list_xattr", forbid_unknown_fields=True):
    """Answer: `XattrNames`."""

    inode: Inode


class XattrNames(msgspec.Struct, frozen=True, tag="xattr_names", forbid_unknown_fields=True):
    """The names, in order."""

    names: tuple[bytes, ...]


class StatVolume(msgspec.Struct, frozen=True, tag="stat_volume", forbid_unknown_fields=True):
    """Answer: `VolumeStat`."""


class VolumeStat(msgspec.Struct, frozen=True, tag="volume_stat", forbid_unknown_fields=True):
    """Bytes of user data: what fits with R copies on the servers that are up. Files counted in inodes."""

    bytes_total: int
    bytes_free: int
    files: int


class Make(msgspec.Struct, frozen=True, tag="make", forbid_unknown_fields=True):
    """Make a file, directory, symbolic link, fifo, socket or device: what `mode` says. Answer: `Found`, or EEXIST.

    The new inode number lies in a range of the session.
    """

    at: RequestId
    parent: Inode
    name: bytes
    inode: Inode
    mode: int
    uid: int
    gid: int
    now_ns: int
    rdev: int = 0
    target: bytes = b""
    open: bool = False
    """The session has it open from now on."""


class Link(msgspec.Struct, frozen=True, tag="link", forbid_unknown_fields=True):
    """One more name for `inode`. Answer: `Found`."""

    at: RequestId
    inode: Inode
    parent: Inode
    name: bytes
    now_ns: int


class Unlink(msgspec.Struct, frozen=True, tag="unlink", forbid_unknown_fields=True):
    """Remove a name; with `directory`, an empty directory. Answer: `Removed`."""

    at: RequestId
    parent: Inode
    name: bytes
    directory: bool
    now_ns: int


class Removed(msgspec.Struct, frozen=True, tag="removed", forbid_unknown_fields=True):
    """The inode that lost a name, as it is now (nlink 0: the last one), None if no inode did."""

    attributes: Attributes | None
    sequence: CommitSequence
    changed: tuple[Attributes, ...] = ()
    """The other inodes that were changed, as they are now: directories, and what was moved."""


class Rename(msgspec.Struct, frozen=True, tag="rename", forbid_unknown_fields=True):
    """As renameat2: `flags` 0, RENAME_NOREPLACE (1) or RENAME_EXCHANGE (2). Answer: `Removed`: what was replaced.

    Or ChangesLost, if something would be replaced by contents that a restarted server has lost: an application that
    writes a new file and renames it over the old one must never be left with neither.
    """

    at: RequestId
    parent: Inode
    name: bytes
    new_parent: Inode
    new_name: bytes
    flags: int
    now_ns: int
    source_seen: CommitSequence = CommitSequence(0)
    """The newest change of what is renamed that this client knows of."""
    generation: Generation = Generation(0)
    """In which it knows of that; 0: of none."""


class SetAttributes(msgspec.Struct, frozen=True, tag="set_attributes", forbid_unknown_fields=True):
    """Change what is not None. A `size` truncates, by a cut. Answer: `Found`."""

    at: RequestId
    inode: Inode
    now_ns: int
    mode: int | None = None
    """Permission bits only."""
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None
    clear_set_id: bool = False
    """A regular file loses its set-id bits in the same change, unless it sets the mode: never is a program
    set-user-id for its new owner, or with new contents."""


class SetXattr(msgspec.Struct, frozen=True, tag="set_xattr", forbid_unknown_fields=True):
    """`flags` 0, XATTR_CREATE (1) or XATTR_REPLACE (2). Answer: `Found`."""

    at: RequestId
    inode: Inode
    name: bytes
    value: bytes
    flags: int
    now_ns: int


class RemoveXattr(msgspec.Struct, frozen=True, tag="remove_xattr", forbid_unknown_fields=True):
    """Answer: `Found`, or ENODATA."""

    at: RequestId
    inode: Inode
    name: bytes
    now_ns: int


class NewBlock(msgspec.Struct, frozen=True, array_like=True):
    """A block that a commit refers to, and the servers that acknowledged it."""

    partition: Partition
    block: BlockId
    length: int
    root: bytes
    servers: tuple[ServerNumber, ...]


class SlotChange(msgspec.Struct, frozen=True, array_like=True):
    """What a commit lays over one slot: disjoint extents of new blocks. Their cut number is set by the meta server."""

    slot: Slot
    extents: tuple[Extent, ...]


class Commit(msgspec.Struct, frozen=True, tag="commit", forbid_unknown_fields=True):
    """The ranges of a file that uploaded blocks now hold. Answer: `Committed`, CommitRefused or AppendMoved."""

    at: RequestId
    inode: Inode
    blocks: tuple[NewBlock, ...]
    slots: tuple[SlotChange, ...]
    end: int
    """The file is at least this long afterwards."""
    now_ns: int
    sync: bool = False
    """Answer when the change is durable. The data is already, on W servers each: data first, then the log."""
    append_at: int | None = None
    """Not None: an append, prepared for this file size; its extents move to the end if they stay in their slot."""
    append_length: int = 0


class Committed(msgspec.Struct, frozen=True, tag="committed", forbid_unknown_fields=True):
    """The change is made; durable, with all before it, only if the commit asked for that."""

    attributes: Attributes
    previous_version: CommitSequence
    slots: tuple[SlotExtents, ...]
    """The changed slots as they are now."""
    sequence: CommitSequence


class Punch(msgspec.Struct, frozen=True, tag="punch", forbid_unknown_fields=True):
    """Let the bytes [begin, end) of a file read as zeros and hold no blocks; the size stays. Answer: `Punched`."""

    at: RequestId
    inode: Inode
    begin: int
    end: int
    now_ns: int


class Punched(msgspec.Struct, frozen=True, tag="punched", forbid_unknown_fields=True):
    """Done up to byte `next`: ask again from there until it is the end."""

    attributes: Attributes
    next: int
    sequence: CommitSequence


class MergeSlot(msgspec.Struct, frozen=True, tag="merge_slot", forbid_unknown_fields=True):
    """A block with bytes that the slot already has, to stand in their place. Answer: `Merged`, or ESTALE.

    It is laid only where the slot still shows what was `seen`: no write is buried, no byte changes, nor do size, times
    and version. W servers have it durably, for it may replace what an fsync was promised for.
    """

    at: RequestId
    inode: Inode
    slot: Slot
    block: NewBlock
    extents: tuple[Extent, ...]
    seen: tuple[Seen, ...]


class Merged(msgspec.Struct, frozen=True, tag="merged", forbid_unknown_fields=True):
    """The slot as it is now, and the inode's version, which a merge leaves alone."""

    slot: SlotExtents
    version: CommitSequence
    sequence: CommitSequence


class AcknowledgeLate(msgspec.Struct, frozen=True, tag="acknowledge_late", forbid_unknown_fields=True):
    """A server that a commit did not name has the block now: it is owed no more. Answer: `Done`."""

    at: RequestId
    server: ServerNumber
    blocks: tuple[tuple[Partition, BlockId], ...]


class SyncLog(msgspec.Struct, frozen=True, tag="sync_log", forbid_unknown_fields=True):
    """Make every change answered before durable (group-committed). Answer: `LogSynced`.

    The client has synced the data servers of its commits before: data first, then the log.
    """


class LogSynced(msgspec.Struct, frozen=True, tag="log_synced", forbid_unknown_fields=True):
    """Everything up to this commit sequence is durable."""

    sequence: CommitSequence


class GetStatus(msgspec.Struct, frozen=True, tag="get_status", forbid_unknown_fields=True):
    """Tool -> meta server. Answer: `StatusReport`."""


class StatusReport(msgspec.Struct, frozen=True, tag="status_report", forbid_unknown_fields=True):
    """The document that `mendfs status --json` prints (shared contract of the command line)."""

    document: dict[str, Any]


class LocateBlocks(msgspec.Struct, frozen=True, tag="locate_blocks", forbid_unknown_fields=True):
    """Tool -> meta server: which server should hold each replica, and which are owed one. Answer: `BlocksLocated`."""

    blocks: tuple[tuple[Partition, BlockId], ...]


class BlocksLocated(msgspec.Struct, frozen=True, tag="blocks_located", forbid_unknown_fields=True):
    """For each block asked for: (server, replica number, owed) of every entry of its row."""

    rows: tuple[tuple[tuple[ServerNumber, int, bool], ...], ...]


MetaMessage = (
    Lookup
    | LookedUp
    | Walk
    | Walked
    | GetAttributes
    | Found
    | OpenInode
    | Opened
    | GetExtents
    | Extents
    | ListDirectory
    | Listing
    | ReadLink
    | LinkTarget
    | GetXattr
    | XattrValue
    | ListXattr
    | XattrNames
    | StatVolume
    | VolumeStat
    | Make
    | Link
    | Unlink
    | Removed
    | Rename
    | SetAttributes
    | SetXattr
    | RemoveXattr
    | Commit
    | Punch
    | Punched
    | Committed
    | MergeSlot
    | Merged
    | AcknowledgeLate
    | SyncLog
    | LogSynced
    | GetStatus
    | StatusReport
    | LocateBlocks
    | BlocksLocated
)
