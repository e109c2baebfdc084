"""The namespace as a client sees it: lookup to rename, attributes, extended attributes. Changes are made once."""

import asyncio
import errno
from collections.abc import Awaitable, Callable

import msgspec

from mendfs.client.durability import Durability
from mendfs.client.exclusive import Caller, exclusively
from mendfs.client.files import File
from mendfs.client.opens import Opens
from mendfs.client.recent import Recent
from mendfs.client.shared import Shared
from mendfs.client.writer import Writer
from mendfs.errors import CommitRefused, OperationError
from mendfs.model import Attributes, CommitSequence, Generation, Inode
from mendfs.wire.messages import Message
from mendfs.wire.messages import meta as messages
from mendfs.wire.messages.meta import RequestId

RENAME_NOREPLACE = 1
REFUSED_MAX = 3
"""New inode numbers tried when a range was void: the session was lost in between."""


class Names:
    """Operations on names and attributes of one client."""

    def __init__(self, shared: Shared, writer: Writer, durability: Durability, opens: Opens) -> None:
        self._shared = shared
        self._writer = writer
        self._durability = durability
        self._opens = opens
        self.recent = Recent()

    async def _change(self, build: Callable[[RequestId], Message]) -> Attributes:
        return self._changed(await self._shared.session.change(build, messages.Found))

    def _changed(self, found: messages.Found) -> Attributes:
        self.recent.note(found.attributes, *found.changed)
        return self._shared.files.shown(found.attributes)

    def recent_attributes(self, inode: Inode, within_s: float) -> tuple[Attributes, float] | None:
        """Attributes that an answer brought no longer ago than this, with unflushed writes, and their age."""
        found = self.recent.find(inode, within_s)
        return None if found is None else (self._shared.files.shown(found[0]), found[1])

    def _now_ns(self) -> int:
        return self._shared.world.now_ns()

    async def lookup(self, parent: Inode, name: bytes) -> Attributes:
        """The inode that a name stands for."""
        found = await self._shared.session.query(messages.Lookup(parent, name), messages.LookedUp)
        self.recent.note(found.directory)
        if found.attributes is None:
            raise OperationError(errno.ENOENT)
        return self._shared.files.shown(found.attributes)

    async def walk(self, inode: Inode, names: tuple[bytes, ...]) -> tuple[Attributes, ...]:
        """The directory `inode`, then what each name in the one before stands for, as far as there are directories."""
        answer = await self._shared.session.query(messages.Walk(inode, names), messages.Walked)
        self.recent.note(*answer.found)
        return tuple(self._shared.files.shown(attributes) for attributes in answer.found)

    async def attributes(self, inode: Inode) -> Attributes:
        """Fresh attributes, with this client's unflushed writes."""
        found = await self._shared.session.query(messages.GetAttributes(inode), messages.Found)
        file = self._shared.files.find(inode)
        if file is not None and file.is_dirty:
            # The kernel asks again after each write (an assembler looks where it is between all of them); what they
            # change is known here. Who reads what others write has nothing unflushed, and asks each time.
            self.recent.note_any(found.attributes)
        return self._shared.files.shown(found.attributes)

    async def make(
        self, parent: Inode, name: bytes, mode: int, *, uid: int, gid: int, rdev: int, target: bytes, open: bool
    ) -> Attributes:
        """Make a file, directory, symbolic link, fifo, socket or device."""
        for attempt in range(REFUSED_MAX):
            inode = Inode(await self._shared.inodes.take())
            now_ns = self._now_ns()

            def build(at: RequestId, inode: Inode = inode, now_ns: int = now_ns) -> Message:
                return messages.Make(
                    at, parent, name, inode, mode, uid, gid, now_ns, rdev=rdev, target=target, open=open
                )

            if open:
                self._opens.making(inode)
            try:
                return await self._change(build)
            except BaseException as error:
                if open:
                    self._opens.not_made(inode, error)
                if not isinstance(error, CommitRefused) or attempt == REFUSED_MAX - 1:
                    raise
            finally:
                self._shared.inodes.settle(inode)
        raise AssertionError("the last attempt returns or raises")

    async def link(self, inode: Inode, parent: Inode, name: bytes) -> Attributes:
        """One more name for an inode."""
        now_ns = self._now_ns()
        return await self._change(lambda at: messages.Link(at, inode, parent, name, now_ns))

    async def unlink(self, parent: Inode, name: bytes, *, directory: bool) -> Attributes | None:
        """Remove a name."""
        now_ns = self._now_ns()
        removed = await self._shared.session.change(
            lambda at: messages.Unlink(at, parent, name, directory, now_ns), messages.Removed
        )
        return self._removed(removed)

    def _removed(self, removed: messages.Removed) -> Attributes | None:
        self.recent.note(removed.attributes, *removed.changed)
        if removed.attributes is None:
            return None
        attributes = self._shared.files.shown(removed.attributes)
        file = self._shared.files.find(attributes.inode)
        if attributes.nlink == 0 and file is not None and not file.opens:
            file.unsynced.clear()  # nobody can ever read it again
        return attributes

    async def rename(
        self, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes, flags: int
    ) -> Attributes | None:
        """As renameat2; returns what was replaced. What replaces something is made durable before."""
        seen, generation = CommitSequence(0), Generation(0)
        files = self._shared.files
        if not flags & RENAME_NOREPLACE and (
            self._durability.has_unsynced or files.went_back or self._writer.dirty_files()
        ):
            source = await self._secure(parent, name, new_parent, new_name)
            if source is not None:
                seen, generation = source.version, self._shared.session.generation
                files.tell_went_back(source.inode)
        now_ns = self._now_ns()
        removed = await self._shared.session.change(
            lambda at: messages.Rename(at, parent, name, new_parent, new_name, flags, now_ns, seen, generation),
            messages.Removed,
        )
        return self._removed(removed)

    async def _secure(self, parent: Inode, name: bytes, new_parent: Inode, new_name: bytes) -> File | None:
        """Write to a new file, rename over the old one: a power cut must leave one of them (design section 5).

        Returns the source, if it is a file that is known here and something would be replaced.
        """
        source, target = await asyncio.gather(
            self.lookup(parent, name), self.lookup(new_parent, new_name), return_exceptions=True
        )
        for found in (source, target):
            if isinstance(found, OperationError):
                return None  # nothing there to replace, or nothing to rename: the rename itself will say
            if isinstance(found, BaseException):
                raise found
        assert isinstance(source, Attributes), "an error would have been raised"
        file = self._shared.files.find(source.inode)
        if file is not None and (file.is_dirty or file.unsynced):
            with file.durability_awaited():
                await self._writer.drain(file)
                await self._durability.sync_data([file])
        return file

    async def set_attributes(
        self,
        inode: Inode,
        *,
        mode: int | None,
        uid: int | None,
        gid: int | None,
        size: int | None,
        atime_ns: int | None,
        mtime_ns: int | None,
        clear_set_id: bool = False,
    ) -> Attributes:
        """Change what is not None."""
        now_ns = self._now_ns()

        async def send() -> messages.Found:
            return await self._shared.session.change(
                lambda at: messages.SetAttributes(
                    at, inode, now_ns, mode, uid, gid, size, atime_ns, mtime_ns, clear_set_id
                ),
                messages.Found,
            )

        file = self._shared.files.find(inode)
        others = (mode, uid, gid, atime_ns, mtime_ns)
        if file is not None and any(value is not None for value in others):
            # A commit sets mtime and ctime: it must not come after these.
            await self._writer.drain(file)
        if size is None:
            return self._changed(await send())
        file = self._shared.files.get(inode)
        length = size

        async def truncate(caller: Caller[Attributes]) -> Attributes:
            return await self._truncate(file, length, caller, send)

        return await exclusively(self._shared, file, truncate)

    async def _truncate(
        self, file: File, size: int, caller: Caller[Attributes], send: Callable[[], Awaitable[messages.Found]]
    ) -> Attributes:
        """With the file's lock held."""
        # No commit of older data may pass the truncation: with the lock held nothing new sets out.
        await self._writer.wait_for_commits(file)
        caller.check()
        with self._writer.cutting(file):
            attributes = (await caller.certain(send())).attributes
            self._writer.clip(file, size)
        file.learn(attributes)
        if size == 0:
            # Whatever size is known here: another client may have written, or nothing is known yet, for the file is
            # just being opened with O_TRUNC.
            file.was_emptied = True
            file.emptied_count += 1
            self._shared.files.went_back.discard(file.inode)
            file.unsynced.clear()
        return file.shown(attributes)

    async def list_directory(self, inode: Inode, after: bytes, limit: int, with_attributes: bool) -> messages.Listing:
        """The names after `after`; attributes are with this client's unflushed writes."""
        listing = await self._shared.session.query(
            messages.ListDirectory(inode, after, limit, with_attributes), messages.Listing
        )
        self.recent.note(listing.directory)
        if not with_attributes:
            return listing
        entries = tuple(
            entry
            if entry.attributes is None or self._shared.files.find(entry.inode) is None
            else msgspec.structs.replace(entry, attributes=self._shared.files.shown(entry.attributes))
            for entry in listing.entries
        )
        return msgspec.structs.replace(listing, entries=entries)

    async def set_xattr(self, inode: Inode, name: bytes, value: bytes, flags: int) -> None:
        """Set an extended attribute."""
        now_ns = self._now_ns()
        await self._change(lambda at: messages.SetXattr(at, inode, name, value, flags, now_ns))

    async def remove_xattr(self, inode: Inode, name: bytes) -> None:
        """Remove an extended attribute."""
        now_ns = self._now_ns()
        await self._change(lambda at: messages.RemoveXattr(at, inode, name, now_ns))
