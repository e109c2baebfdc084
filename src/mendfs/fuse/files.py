"""Open files: OPEN and CREATE to RELEASE. Data goes between the kernel's buffers and the volume without our copying."""

import errno
import os
import stat

import structlog

from mendfs.errors import MendfsError, OperationError
from mendfs.fuse import protocol_replies
from mendfs.fuse.channel import Channel
from mendfs.fuse.constants import FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE, FOPEN_NOFLUSH
from mendfs.fuse.handles import Handles
from mendfs.fuse.protocol_replies import Replies
from mendfs.fuse.protocol_requests import Allocate, Create, Flush, Fsync, Header, Open, Read, Release, Seek, Write
from mendfs.fuse.served import ServedFile, ServedVolume
from mendfs.model import Inode, without_set_id
from mendfs.world.buffers import BufferPool

log = structlog.get_logger("mendfs.fuse")


class OpenFile:
    """One open(2), and what the kernel knows it as."""

    __slots__ = ("file", "inode", "is_append", "is_mappable", "is_writable", "mode", "positional")

    def __init__(self, file: ServedFile, flags: int) -> None:
        self.file = file
        self.inode = file.attributes.inode
        self.mode = file.attributes.mode
        """As last known: whether it has set-id bits that a write takes away."""
        self.is_writable = flags & os.O_ACCMODE != os.O_RDONLY
        self.is_mappable = flags & os.O_ACCMODE == os.O_RDWR
        """A shared mapping of it may be written to."""
        self.is_append = flags & os.O_APPEND != 0
        self.positional: ServedFile | None = None
        """Beside a file that appends: the same one for pages of mappings, which belong where they are."""

    @property
    def has_set_id(self) -> bool:
        """Whether a write by an ordinary user changes the mode."""
        return without_set_id(self.mode) != self.mode

    async def release(self) -> None:
        """The last descriptor is gone."""
        try:
            if self.positional is not None:
                await self.positional.release()
        finally:
            await self.file.release()


class Files:
    """The mount's open files."""

    def __init__(self, volume: ServedVolume, replies: Replies, pool: BufferPool) -> None:
        self._volume = volume
        self._replies = replies
        self._pool = pool
        self._handles: Handles[OpenFile] = Handles()
        self._opens: dict[Inode, int] = {}

    # --- opening and closing ----------------------------------------------------------------------------------

    def is_open(self, inode: Inode) -> bool:
        """Whether a descriptor or a mapping of it exists on this mount."""
        return inode in self._opens

    def mode_changed(self, inode: Inode, mode: int) -> None:
        """chmod: later writes through files that are already open must know of set-id bits."""
        if inode in self._opens:
            for opened in self._handles:
                if opened.inode == inode:
                    opened.mode = mode

    def _add(self, file: ServedFile, flags: int) -> bytes:
        opened = OpenFile(file, flags)
        self._opens[opened.inode] = self._opens.get(opened.inode, 0) + 1
        answer = FOPEN_KEEP_CACHE if file.keep_cache else 0
        if flags & os.O_APPEND:
            # The kernel's idea of the end may be old: bytes must not go through its cache at that offset.
            answer |= FOPEN_DIRECT_IO
        if not opened.is_writable:
            # Nothing to flush: spares a request at each close. Locks will need it: they go when a descriptor is closed.
            answer |= FOPEN_NOFLUSH
        return protocol_replies.opened(self._handles.add(opened), answer)

    async def open(self, header: Header, request: Open) -> bytes:
        """Revalidates; O_TRUNC is done here."""
        inode = Inode(header.node)
        file = await self._volume.open_file(inode, flags=request.flags, clear_set_id=request.kill_suid_sgid)
        if request.kill_suid_sgid:
            self.mode_changed(inode, file.attributes.mode)
        return self._add(file, request.flags)

    async def create(self, header: Header, request: Create) -> bytes:
        """Make and open in one request."""
        mode = stat.S_IFREG | stat.S_IMODE(request.mode)
        try:
            attributes = await self._volume.make(
                Inode(header.node), request.name, mode, uid=header.uid, gid=header.gid, open=True
            )
        except OperationError as error:
            if error.errno == errno.EEXIST and not request.flags & os.O_EXCL:
                # Made by another mount since the kernel looked. ESTALE makes it look again and open what is there,
                # with the permission check that opening it here would leave out.
                raise OperationError(errno.ESTALE) from None
            raise
        file = await self._volume.open_made(attributes, flags=request.flags)
        return self._replies.entry(attributes) + self._add(file, request.flags)

    async def flush(self, header: Header, request: Flush) -> bytes:
        """close(2): what was written is stored and committed, or its error is told."""
        await self._handles.get(request.handle).file.flush()
        return b""

    async def fsync(self, header: Header, request: Fsync) -> bytes:
        """Durable."""
        await self._handles.get(request.handle).file.fsync(request.is_datasync)
        return b""

    def remove(self, request: Release) -> OpenFile:
        """The last descriptor is gone: the caller releases the file."""
        opened = self._handles.remove(request.handle)
        left = self._opens[opened.inode] - 1
        if left:
            self._opens[opened.inode] = left
        else:
            del self._opens[opened.inode]
        return opened

    async def release_all(self) -> None:
        """The mount is gone, and the kernel releases nothing any more."""
        for opened in self._handles:
            try:
                await opened.release()
            except MendfsError as error:
                log.error("releasing a file failed", inode=opened.inode, error=str(error))

    # --- room -------------------------------------------------------------------------------------------------

    async def allocate(self, header: Header, request: Allocate) -> bytes:
        """fallocate(2). What the kernel has cached of a punched range it forgets by itself."""
        opened = self._handles.get(request.handle)
        if header.uid:
            # A change of contents by an ordinary user, but here the kernel does not say so.
            await self._clear_set_id(opened)
        await opened.file.allocate(request.mode, request.offset, request.length)
        return b""

    async def seek(self, header: Header, request: Seek) -> bytes:
        """SEEK_DATA and SEEK_HOLE."""
        opened = self._handles.get(request.handle)
        if not any(each.inode == opened.inode and each.is_mappable for each in self._handles):
            return protocol_replies.sought(await opened.file.seek(request.offset, request.whence))
        # Pages that a mapping has changed may still be with the kernel, which does not tell: a copy that left them out
        # as a hole would lose them. All of the file counts as data until nobody can map it any more.
        size = (await self._volume.attributes(opened.inode)).size
        if request.offset >= size:
            raise OperationError(errno.ENXIO)
        return protocol_replies.sought(request.offset if request.whence == os.SEEK_DATA else size)

    # --- data -------------------------------------------------------------------------------------------------

    async def read(self, channel: Channel, header: Header, request: Read) -> None:
        """Answers by itself: the buffer goes back to the pool when the kernel has copied it."""
        file = self._handles.get(request.handle).file
        buffer = self._pool.take(request.size)
        view = memoryview(buffer)[: request.size]
        count = await file.read_into(view, request.offset)
        channel.answer(header.unique, view[:count])
        # Not in a `finally`: after an error nobody knows who may still write into the buffer, so it is let go.
        self._pool.give(buffer)

    def try_write(self, request: Write, data: memoryview) -> bool:
        """Whether the bytes could be taken without waiting."""
        opened = self._handles.get(request.handle)
        if request.kill_suid_sgid and opened.has_set_id:
            return False
        if opened.is_append and (request.is_from_cache or request.is_synchronous):
            return False
        return opened.file.try_write(data, request.offset)

    async def write(self, request: Write, data: memoryview) -> bytes:
        """Take the bytes, waiting for room."""
        opened = self._handles.get(request.handle)
        if request.kill_suid_sgid:
            await self._clear_set_id(opened)
        file = await self._positional(opened) if request.is_from_cache and opened.is_append else opened.file
        count = await file.write(data, request.offset)
        if request.is_synchronous and opened.is_append and not request.is_from_cache:
            # Past its page cache (FOPEN_DIRECT_IO) the kernel sends no fsync after such a write; otherwise it does.
            await file.fsync(datasync=True)
        return protocol_replies.written(count)

    async def _clear_set_id(self, opened: OpenFile) -> None:
        if opened.has_set_id:
            attributes = await self._volume.set_attributes(opened.inode, clear_set_id=True)
            self.mode_changed(opened.inode, attributes.mode)

    async def _positional(self, opened: OpenFile) -> ServedFile:
        if opened.positional is None:
            file = await self._volume.open_file(opened.inode, flags=os.O_WRONLY)
            if opened.positional is None:
                opened.positional = file
            else:
                await file.release()  # another page of the mapping came here meanwhile
        return opened.positional
