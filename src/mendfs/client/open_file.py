"""One descriptor of a file: what an application does between open and close."""

import asyncio
import os
from contextlib import nullcontext

from mendfs.client.append import Appender
from mendfs.client.durability import Durability
from mendfs.client.files import File
from mendfs.client.opens import Opens
from mendfs.client.reader import Reader, Stream
from mendfs.client.space import Space
from mendfs.client.writer import Writer
from mendfs.model import Attributes, Inode


class OpenFile:
    """Made by `Volume.open_file` and `Volume.open_made`. `attributes` are those at the open."""

    def __init__(
        self,
        file: File,
        *,
        flags: int,
        keep_cache: bool,
        reader: Reader,
        writer: Writer,
        appender: Appender,
        durability: Durability,
        opens: Opens,
        space: Space,
    ) -> None:
        assert file.attributes is not None, "opening has learnt them"
        self.inode: Inode = file.inode
        self.attributes: Attributes = file.shown(file.attributes)
        self.keep_cache = keep_cache
        """Whether the kernel may keep the pages it has cached: nobody else has changed the file."""
        self.flags = flags
        self._file = file
        self._stream = Stream()
        self._is_append = bool(flags & os.O_APPEND)
        self._is_released = False
        self._reader = reader
        self._writer = writer
        self._appender = appender
        self._durability = durability
        self._opens = opens
        self._space = space

    async def read_into(self, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` on; returns the bytes read, fewer only at the end of the file."""
        return await self._reader.read_into(self._file, self._stream, buffer, offset)

    def try_write(self, data: memoryview, offset: int) -> bool:
        """Take all of `data` without waiting, or return False: then use `write`. Raises an error not told yet."""
        return not self._is_append and self._writer.try_write(self._file, data, offset)

    async def write(self, data: memoryview | bytes | bytearray, offset: int) -> int:
        """Write `data` at `offset`, or at the end of the file if it was opened with O_APPEND; returns its length.

        `data` must stay as it is until this returns. Raises an error of an earlier write that was not told yet.
        """
        view = memoryview(data)
        if not view:
            self._file.tell_writer()
        elif self._is_append:
            await self._appender.append(self._file, view)
        else:
            await self._writer.write(self._file, view, offset)
        return len(view)

    async def allocate(self, mode: int, offset: int, length: int) -> None:
        """As fallocate(2), for the modes that `client.space` knows; else EOPNOTSUPP."""
        await self._space.allocate(self._file, mode, offset, length)

    async def seek(self, offset: int, whence: int) -> int:
        """As lseek(2) with SEEK_DATA and SEEK_HOLE."""
        return await self._space.seek(self._file, offset, whence)

    async def flush(self) -> None:
        """What close(2) waits for: W replicas have the data and it is committed. Raises an error not told yet."""
        # The old contents are gone: a power cut must not take the new ones too (design section 5).
        emptied = self._file.was_emptied
        emptied_count = self._file.emptied_count
        with self._file.durability_awaited() if emptied else nullcontext():
            await self._writer.flush(self._file, synced=emptied)
            if emptied and self._file.unsynced:
                await self._durability.sync_data([self._file])
                self._file.take_error()
        if emptied and self._file.emptied_count == emptied_count:
            self._file.was_emptied = False

    async def fsync(self, datasync: bool = False) -> None:
        """Everything of the file is durable afterwards: data on W servers first, then the metadata's log."""
        # What was stored before is synced while the rest is stored: mostly the commit then finds all data durable, and
        # is answered after the log's sync. So an fsync takes two rounds, to the data servers and to the meta server.
        changed = self._durability.newest_change
        with self._file.durability_awaited():
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._durability.sync_data([self._file]))
                    group.create_task(self._writer.drain(self._file, synced=True, logged=True))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            await self._durability.sync_data([self._file])
        await self._durability.sync_log_to(max(changed, self._file.version))
        self._durability.made_durable(self._file)
        self._file.take_error()

    async def release(self) -> None:
        """The descriptor is gone. Errors not told yet stay with the file."""
        if self._is_released:
            return
        self._is_released = True
        try:
            await self._writer.drain(self._file)
        finally:
            self._opens.closed(self._file)

    def abandon(self) -> None:
        """As `release`, for a caller that was interrupted and waits for nothing: what was written goes on its way."""
        self._opens.in_background(self.release())
