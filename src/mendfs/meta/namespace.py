"""Names: lookup, make, link, unlink, rename, listing, as functions over a transaction.

Permissions are checked by the kernel of the machine that mounts (`default_permissions`); what is kept here is what only
the metadata can know: that names are unique, directories empty before they go, and the namespace a tree (promise 5).
"""

import errno
import stat

import msgspec

from mendfs.errors import BadMessage, ChangesLost, OperationError
from mendfs.kv.engine import Transaction
from mendfs.meta import schema
from mendfs.meta.inodes import changed, find, find_directory, new_record, touch, visible, write
from mendfs.model import NAME_BYTES_MAX, PATH_BYTES_MAX, ROOT_INODE, Attributes, Generation, Inode, SessionId
from mendfs.wire.messages import meta as messages

LINKS_MAX = 1 << 30
LISTING_MAX = 2000
"""Names in one answer, however many are asked for: with attributes about 300 KB."""
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
DEPTH_MAX = 4096
"""Directories above one another when a move is checked for a loop: more than any PATH_MAX can name."""

_FILE_KINDS = {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK}


def check_name(name: bytes) -> None:
    """Raise ENAMETOOLONG or EINVAL for a name no directory can have."""
    if len(name) > NAME_BYTES_MAX:
        raise OperationError(errno.ENAMETOOLONG)
    if not name or name in (b".", b"..") or b"/" in name or b"\0" in name:
        raise OperationError(errno.EINVAL, f"name {name!r}")


async def _entry(tx: Transaction, parent: Inode, name: bytes) -> schema.NameRecord | None:
    raw = await tx.get(schema.name_key(parent, name))
    return None if raw is None else schema.NAME.decode(raw)


async def _existing(tx: Transaction, parent: Inode, name: bytes) -> schema.NameRecord:
    entry = await _entry(tx, parent, name)
    if entry is None:
        raise OperationError(errno.ENOENT)
    return entry


async def lookup(tx: Transaction, parent: Inode, name: bytes) -> Attributes:
    """The attributes of what `name` names. Raises ENOENT, ENOTDIR; understands `.` and `..`."""
    if len(name) > NAME_BYTES_MAX:
        raise OperationError(errno.ENAMETOOLONG)
    if name in (b".", b".."):
        directory = await find_directory(tx, parent)
        return directory.attributes if name == b"." else visible(await find(tx, directory.parent))
    entry = await _entry(tx, parent, name)
    if entry is None:
        await find_directory(tx, parent)
        raise OperationError(errno.ENOENT)
    return visible(await find(tx, entry.inode))


async def look_up(tx: Transaction, parent: Inode, name: bytes) -> tuple[Attributes | None, Attributes]:
    """What `name` names, None if nothing has it, and its directory. Raises ENOTDIR, and ENOENT for the directory."""
    directory = await find_directory(tx, parent)
    if name in (b".", b".."):
        return await lookup(tx, parent, name), directory.attributes
    if len(name) > NAME_BYTES_MAX:
        raise OperationError(errno.ENAMETOOLONG)
    entry = await _entry(tx, parent, name)
    return None if entry is None else visible(await find(tx, entry.inode)), directory.attributes


async def walk(tx: Transaction, inode: Inode, names: tuple[bytes, ...]) -> tuple[Attributes, ...]:
    """The directory, then what each name in the one before stands for, as far as that goes. Raises ENOENT, ENOTDIR."""
    if len(names) > messages.WALK_NAMES_MAX:
        raise BadMessage(f"a walk of {len(names)} names; up to {messages.WALK_NAMES_MAX} at once")
    found = [(await find_directory(tx, inode)).attributes]
    for name in names:
        entry = await _entry(tx, found[-1].inode, name) if stat.S_ISDIR(found[-1].mode) else None
        if entry is None:
            break
        found.append(visible(await find(tx, entry.inode)))
    return tuple(found)


async def named(tx: Transaction, *names: tuple[Inode, bytes]) -> tuple[Attributes, ...]:
    """The directories of these names and what the names stand for, as they are now, without repeats."""
    inodes = dict.fromkeys(parent for parent, _ in names)
    for parent, name in names:
        entry = await _entry(tx, parent, name)
        if entry is not None:
            inodes[entry.inode] = None
    return tuple([visible(await find(tx, inode)) for inode in inodes])


async def list_directory(tx: Transaction, request: messages.ListDirectory) -> messages.Listing:
    """The next names of a directory, in the order of their bytes."""
    directory = await find(tx, request.inode)
    if not stat.S_ISDIR(directory.attributes.mode):
        raise OperationError(errno.ENOTDIR)
    begin, end = schema.names_of(request.inode)
    if request.after:
        begin = schema.name_key(request.inode, request.after) + b"\0"
    limit = max(1, min(request.limit, LISTING_MAX))
    found = await tx.range(begin, end, limit=limit + 1)
    entries = []
    for key, raw in found[:limit]:
        entry = schema.NAME.decode(raw)
        attributes = visible(await find(tx, entry.inode)) if request.with_attributes else None
        entries.append(messages.DirectoryEntry(schema.name_in(key), entry.inode, entry.kind, attributes))
    # No `sequence()` here: a listing must not conflict with every commit of the volume.
    shown = visible(directory)
    return messages.Listing(tuple(entries), len(found) <= limit, shown, directory.parent, shown.version)


async def make(tx: Transaction, request: messages.Make, generation: int) -> Attributes:
    """Make what `request.mode` says under a new inode number, whose range the caller has checked."""
    check_name(request.name)
    kind = stat.S_IFMT(request.mode)
    if kind not in _FILE_KINDS or len(request.target) > PATH_BYTES_MAX:
        raise OperationError(errno.EINVAL, f"mode {request.mode:o}")
    parent = await find_directory(tx, request.parent)
    if await _entry(tx, request.parent, request.name) is not None:
        raise OperationError(errno.EEXIST)
    if await tx.get(schema.inode_key(request.inode)) is not None:
        raise OperationError(errno.EIO, f"inode number {request.inode} is in use")
    mode, gid = request.mode, request.gid
    if parent.attributes.mode & stat.S_ISGID:
        # A setgid directory hands its group down, and directories below it do so too.
        gid = parent.attributes.gid
        mode |= stat.S_ISGID if kind == stat.S_IFDIR else 0
    record = new_record(
        request.inode,
        generation=generation,
        mode=mode,
        uid=request.uid,
        gid=gid,
        now_ns=request.now_ns,
        version=tx.sequence(),
    )
    if kind == stat.S_IFDIR:
        record = msgspec.structs.replace(record, parent=request.parent)
    elif kind == stat.S_IFLNK:
        record = changed(msgspec.structs.replace(record, target=request.target), size=len(request.target))
    elif kind in (stat.S_IFCHR, stat.S_IFBLK):
        record = changed(record, rdev=request.rdev)
    write(tx, record)
    tx.put(schema.name_key(request.parent, request.name), schema.NAME.encode(schema.NameRecord(request.inode, kind)))
    touch(tx, parent, request.now_ns, links=1 if kind == stat.S_IFDIR else 0)
    return record.attributes


async def link(tx: Transaction, request: messages.Link) -> Attributes:
    """One more name for an inode that still has one. Raises EPERM for a directory, EEXIST, EMLINK."""
    check_name(request.name)
    record = await find(tx, request.inode)
    if stat.S_ISDIR(record.attributes.mode):
        raise OperationError(errno.EPERM)
    if record.attributes.nlink == 0:
        # Its blocks may be on their way to be freed: a new name could come too late.
        raise OperationError(errno.ENOENT)
    if record.attributes.nlink >= LINKS_MAX:
        raise OperationError(errno.EMLINK)
    parent = await find_directory(tx, request.parent)
    if await _entry(tx, request.parent, request.name) is not None:
        raise OperationError(errno.EEXIST)
    entry = schema.NameRecord(request.inode, stat.S_IFMT(record.attributes.mode))
    tx.put(schema.name_key(request.parent, request.name), schema.NAME.encode(entry))
    touch(tx, parent, request.now_ns)
    record = changed(record, nlink=record.attributes.nlink + 1, ctime_ns=request.now_ns, version=tx.sequence())
    write(tx, record)
    return visible(record)


async def _check_empty(tx: Transaction, inode: Inode) -> None:
    if await tx.range(*schema.names_of(inode), limit=1):
        raise OperationError(errno.ENOTEMPTY)


def _lose_name(
    tx: Transaction, record: schema.InodeRecord, now_ns: int, openers: tuple[SessionId, ...]
) -> schema.InodeRecord:
    """One name less; the last one queues the inode for freeing, and notes who has it open in the same transaction."""
    attributes = record.attributes
    nlink = 0 if stat.S_ISDIR(attributes.mode) else attributes.nlink - 1
    record = changed(record, nlink=nlink, ctime_ns=now_ns, version=tx.sequence())
    write(tx, record)
    if nlink == 0:
        tx.put(schema.unlinked_key(attributes.inode), b"")
        for session in openers:
            tx.put(schema.open_unlinked_key(attributes.inode, session), b"")
    return record


class Openers:
    """Which sessions have an inode open: asked by unlink and rename, answered by the session table."""

    def of(self, inode: Inode) -> tuple[SessionId, ...]:
        """The sessions, at most as many as fit a transaction."""
        raise NotImplementedError


async def unlink(tx: Transaction, request: messages.Unlink, openers: Openers) -> Attributes:
    """Remove a name, or with `request.directory` an empty directory. Raises ENOENT, EISDIR, ENOTDIR, ENOTEMPTY."""
    parent = await find_directory(tx, request.parent)
    entry = await _existing(tx, request.parent, request.name)
    is_directory = entry.kind == stat.S_IFDIR
    if is_directory != request.directory:
        raise OperationError(errno.EISDIR if is_directory else errno.ENOTDIR)
    if is_directory:
        await _check_empty(tx, entry.inode)
    record = await find(tx, entry.inode)
    tx.delete(schema.name_key(request.parent, request.name))
    touch(tx, parent, request.now_ns, links=-1 if is_directory else 0)
    return visible(_lose_name(tx, record, request.now_ns, openers.of(entry.inode)))


async def _check_no_loop(tx: Transaction, moved: Inode, new_parent: Inode) -> None:
    """Raise EINVAL if directory `moved` is `new_parent` or above it: the namespace stays a tree."""
    at = new_parent
    for _ in range(DEPTH_MAX):
        if at == moved:
            raise OperationError(errno.EINVAL)
        if at == ROOT_INODE:
            return
        at = (await find(tx, at)).parent
    raise OperationError(errno.ELOOP)


async def _check_replaceable(tx: Transaction, source: schema.NameRecord, target: schema.NameRecord) -> None:
    if target.kind == stat.S_IFDIR:
        if source.kind != stat.S_IFDIR:
            raise OperationError(errno.EISDIR)
        await _check_empty(tx, target.inode)
    elif source.kind == stat.S_IFDIR:
        raise OperationError(errno.ENOTDIR)


async def _hand_over(tx: Transaction, inode: Inode, parent: Inode, now_ns: int) -> None:
    """The moved inode's change time and, for a directory, its new `..`."""
    record = changed(await find(tx, inode), ctime_ns=now_ns, version=tx.sequence())
    if stat.S_ISDIR(record.attributes.mode):
        record = msgspec.structs.replace(record, parent=parent)
    write(tx, record)


async def _move_links(tx: Transaction, request: messages.Rename, *, old: int, new: int) -> None:
    """Times of both parents, and their link counts by `old` and `new`; once if they are one directory."""
    if request.parent == request.new_parent:
        touch(tx, await find_directory(tx, request.parent), request.now_ns, links=old + new)
        return
    touch(tx, await find_directory(tx, request.parent), request.now_ns, links=old)
    touch(tx, await find_directory(tx, request.new_parent), request.now_ns, links=new)


async def rename(tx: Transaction, request: messages.Rename, openers: Openers) -> Attributes | None:
    """As renameat2; atomic (promise 4). Returns what was replaced, as it is now, or None."""
    check_name(request.name)
    check_name(request.new_name)
    if request.flags not in (0, RENAME_NOREPLACE, RENAME_EXCHANGE):
        raise OperationError(errno.EINVAL)
    await find_directory(tx, request.parent)
    await find_directory(tx, request.new_parent)
    source = await _existing(tx, request.parent, request.name)
    target = await _entry(tx, request.new_parent, request.new_name)
    if source.kind == stat.S_IFDIR:
        await _check_no_loop(tx, source.inode, request.new_parent)
    if request.flags == RENAME_EXCHANGE:
        await _exchange(tx, request, source, target)
        return None
    replaced = None
    if target is not None:
        if request.flags == RENAME_NOREPLACE:
            raise OperationError(errno.EEXIST)
        if target.inode == source.inode:
            # POSIX: two names of one file, nothing happens.
            return None
        await _check_replaceable(tx, source, target)
        await _check_survived(tx, request)
        replaced = _lose_name(tx, await find(tx, target.inode), request.now_ns, openers.of(target.inode))
    tx.delete(schema.name_key(request.parent, request.name))
    tx.put(schema.name_key(request.new_parent, request.new_name), schema.NAME.encode(source))
    moved = 1 if source.kind == stat.S_IFDIR else 0
    gone = 1 if target is not None and target.kind == stat.S_IFDIR else 0
    await _move_links(tx, request, old=-moved, new=moved - gone)
    await _hand_over(tx, source.inode, request.new_parent, request.now_ns)
    return None if replaced is None else visible(replaced)


async def _check_survived(tx: Transaction, request: messages.Rename) -> None:
    """Raise ChangesLost if an earlier life of the server took what the client knows of the source with it."""
    raw = await tx.get(schema.life_key(Generation(request.generation + 1))) if request.generation else None
    if raw is not None and request.source_seen > schema.NUMBER.decode(raw):
        raise ChangesLost(
            "the meta server stopped before the contents of what is renamed were durable: nothing was replaced"
        )


async def _exchange(
    tx: Transaction, request: messages.Rename, source: schema.NameRecord, target: schema.NameRecord | None
) -> None:
    if target is None:
        raise OperationError(errno.ENOENT)
    if target.kind == stat.S_IFDIR:
        await _check_no_loop(tx, target.inode, request.parent)
    tx.put(schema.name_key(request.parent, request.name), schema.NAME.encode(target))
    tx.put(schema.name_key(request.new_parent, request.new_name), schema.NAME.encode(source))
    gain = (1 if source.kind == stat.S_IFDIR else 0) - (1 if target.kind == stat.S_IFDIR else 0)
    await _move_links(tx, request, old=-gain, new=gain)
    await _hand_over(tx, source.inode, request.new_parent, request.now_ns)
    await _hand_over(tx, target.inode, request.parent, request.now_ns)
