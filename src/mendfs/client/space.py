"""The room that a file takes: allocating, punching holes, finding holes and data (fallocate and lseek of Linux).

Nothing is reserved: blocks come into being when bytes are written. Allocating therefore makes the file as long as was
asked for, after a look at what is free, and says at once what would not fit.
"""

import errno
import stat
from collections.abc import Iterator

from mendfs.client.exclusive import Caller, exclusively
from mendfs.client.files import File
from mendfs.client.reader import Reader
from mendfs.client.shared import Shared
from mendfs.client.writer import Writer
from mendfs.errors import OperationError
from mendfs.model import SIZE_MAX, Slot
from mendfs.wire.messages.meta import (
    Commit,
    Committed,
    Found,
    GetAttributes,
    Punch,
    Punched,
    RequestId,
    StatVolume,
    VolumeStat,
)

FALLOC_FL_KEEP_SIZE = 0x01
FALLOC_FL_PUNCH_HOLE = 0x02
FALLOC_FL_ZERO_RANGE = 0x10
SEEK_DATA = 3
SEEK_HOLE = 4
SLOTS_AT_ONCE = 1024
"""Slots looked at before the loop turns to others: what one question to the meta server may ask for."""


class Space:
    """Allocating and seeking of one client."""

    def __init__(self, shared: Shared, writer: Writer, reader: Reader) -> None:
        self._shared = shared
        self._writer = writer
        self._reader = reader

    async def allocate(self, file: File, mode: int, offset: int, length: int) -> None:
        """As fallocate(2): mode 0, PUNCH_HOLE | KEEP_SIZE, ZERO_RANGE with or without KEEP_SIZE; else EOPNOTSUPP."""
        if offset < 0 or length <= 0:
            raise OperationError(errno.EINVAL)
        end = offset + length
        if end > SIZE_MAX:
            raise OperationError(errno.EFBIG)
        if mode == 0:
            await self._check_room(length)
        elif mode in (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE):
            await self._punch(file, offset, end)
            return
        elif mode == FALLOC_FL_ZERO_RANGE:
            await self._punch(file, offset, end)
        else:
            raise OperationError(errno.EOPNOTSUPP)
        await self._grow(file, end)

    async def _check_room(self, length: int) -> None:
        room = await self._shared.session.query(StatVolume(), VolumeStat)
        if length > room.bytes_free:
            raise OperationError(errno.ENOSPC)

    async def _grow(self, file: File, size: int) -> None:
        """The file is at least this long: by a commit that brings nothing, for sizes only grow in those. Setting the
        size could cut off what another client has written meanwhile."""
        now_ns = self._shared.world.now_ns()

        async def grow(caller: Caller[None]) -> None:
            await self._writer.wait_for_commits(file)
            caller.check()
            change = self._shared.session.change(lambda at: Commit(at, file.inode, (), (), size, now_ns), Committed)
            file.learn_committed(await caller.certain(change))

        await exclusively(self._shared, file, grow)

    async def _punch(self, file: File, begin: int, end: int) -> None:
        """Bytes [begin, end) are zeros and take no room; those past the end of the file stay unwritten."""
        now_ns = self._shared.world.now_ns()

        async def punch(caller: Caller[None]) -> None:
            # What was written before must not be committed over the hole; what comes after waits for the lock.
            await self._writer.drain_locked(file)
            caller.check()
            file.take_error()
            at = begin
            while at < end and not caller.is_gone:

                def build(request: RequestId, at: int = at) -> Punch:
                    return Punch(request, file.inode, at, end, now_ns)

                answer = await caller.certain(self._shared.session.change(build, Punched))
                file.learn(answer.attributes)
                at = answer.next

        await exclusively(self._shared, file, punch)

    async def seek(self, file: File, offset: int, whence: int) -> int:
        """The first byte from `offset` on that holds data, or is in a hole; the end of the file is one.

        Raises ENXIO at and past the end, and if no data follows.
        """
        if whence not in (SEEK_DATA, SEEK_HOLE):
            raise OperationError(errno.EINVAL)
        if file.attributes is None:
            file.learn((await self._shared.session.query(GetAttributes(file.inode), Found)).attributes)
        assert file.attributes is not None, "an answer was learnt"
        if not stat.S_ISREG(file.attributes.mode):
            raise OperationError(errno.EINVAL)
        size = file.size
        if not 0 <= offset < size:
            raise OperationError(errno.ENXIO)
        step = SLOTS_AT_ONCE * self._shared.volume.block_size
        at = offset
        while at < size:
            upto = min(size, at - at % step + step)
            await self._reader.know_extents(file, at, upto)
            # No await in here: extents and dirty bytes must be of one moment.
            for begin, end in self._data(file, at, upto):
                if whence == SEEK_DATA:
                    return begin
                if begin > at:
                    return at
                at = end
            if whence == SEEK_HOLE and at < upto:
                return at
            at = upto
        if whence == SEEK_DATA:
            raise OperationError(errno.ENXIO)
        return size

    def _data(self, file: File, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """Ranges with data inside [begin, end), in order; neighbours may touch."""
        block_size = self._shared.volume.block_size
        for slot in range(begin // block_size, -(-end // block_size)):
            start = slot * block_size
            ranges = [(each.offset_in_slot, each.end_in_slot) for each in file.slots[Slot(slot)]]
            for generations in (file.frozen, file.collecting):
                generation = generations.get(Slot(slot))
                if generation is not None:
                    ranges += generation.buffer.ranges()
            at = begin
            for first, last in sorted(ranges):
                lower, upper = max(start + first, at), min(start + last, end)
                if lower < upper:
                    yield lower, upper
                    at = upper
