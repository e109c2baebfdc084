"""How a store is: disk operations under way and their age, troubles in words, room, counters. Feeds `StoreHealth`."""

import asyncio
import errno
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import structlog

from mendfs.errors import BlockCorrupt, ReplicaError, StoreFailed, StoreFull
from mendfs.model import StoreHealth
from mendfs.world.disk import Disk

log = structlog.get_logger("data")

FULL_PERCENT = 95
"""Above this puts are refused: the index, deletes and mending need room to work."""

STUCK_S = 3.0
"""A disk operation unfinished for so long: whoever asks is told so at once instead of queueing behind it. The meta
server takes this server for down at the same age."""
LIVELY_S = 2.0
"""A write that ended this long ago still says that the next one will not hang: dirty stores sync once a second."""
SLOW_S = 0.25
"""An operation unfinished for so long says that it may."""
COPIES_ROOM_PERCENT = 1
"""Of the disk, left when records are copied to give space back: the index needs some to say where they are."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REMEDIES = {
    errno.EIO: "the disk fails: replace it",
    errno.EROFS: "the file system is read-only: see the kernel's log, then mount it writable",
    errno.EMFILE: "no file descriptors are left: raise the limit (ulimit -n)",
    errno.ENFILE: "no file descriptors are left on this machine: raise fs.file-max",
}


class Watch:
    """One store's account of itself."""

    def __init__(self, disk: Disk, folder: str, capacity: int) -> None:
        self._disk = disk
        self._folder = folder
        self._capacity = capacity
        self._operations: dict[int, float] = {}
        self._ended = asyncio.Event()
        self._last_operation = 0
        self._troubles: dict[str, str] = {}
        self._free = self._total = 0
        self._wrote_s = float("-inf")
        self.blocks = 0
        self.record_bytes = 0
        """Of the blocks that are held."""
        self.longest_record_bytes = 0
        """Of a block of the volume's block size."""
        self.occupied = 0
        """Bytes that the segments take on the disk, with what is deleted and not yet given back."""
        self.reads = 0
        self.writes = 0
        self.mended = 0
        self.corrupt_found = 0

    async def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Call `function` in one of the disk's threads, watched: its age is what a heartbeat tells of a stuck disk."""
        self._last_operation += 1
        operation = self._last_operation
        self._operations[operation] = asyncio.get_running_loop().time()

        def ended(work: "asyncio.Future[Result]") -> None:
            del self._operations[operation]
            self._ended.set()
            if not work.cancelled():
                work.exception()

        work = asyncio.ensure_future(self._disk.run(function, *args, **kwargs))
        # By the thread's end, not the caller's: one who waits no more does not make the disk any quicker.
        work.add_done_callback(ended)
        return await asyncio.shield(work)

    async def run_writing(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """As `run`, for what really goes to the disk: that it ended well says that the disk answers."""
        result = await self.run(function, *args, **kwargs)
        self._wrote_s = asyncio.get_running_loop().time()
        return result

    async def idle(self) -> None:
        """Until no operation is under way, those included that nobody waits for any more."""
        while self._operations:
            self._ended.clear()
            await self._ended.wait()

    @property
    def is_lively(self) -> bool:
        """Whether a small write may be made in the event loop: the disk has just answered, and owes no answer."""
        return self.oldest_operation_s < SLOW_S and asyncio.get_running_loop().time() - self._wrote_s < LIVELY_S

    def refuse_if_stuck(self) -> None:
        """Raise StoreFailed if the disk does not answer."""
        age_s = self.oldest_operation_s
        if age_s > STUCK_S:
            raise StoreFailed(f"the disk of {self._folder} has not answered for {age_s:.0f} s")

    def count_in(self, record_bytes: int) -> None:
        """A block more."""
        self.blocks += 1
        self.record_bytes += record_bytes

    def count_out(self, record_bytes: int) -> None:
        """A block less."""
        self.blocks -= 1
        self.record_bytes -= record_bytes

    @property
    def oldest_operation_s(self) -> float:
        """Age of the oldest unfinished disk operation. They end in any order, but begin in this one."""
        for begun_s in self._operations.values():
            return asyncio.get_running_loop().time() - begun_s
        return 0.0

    def trouble(self, topic: str, text: str) -> None:
        """Something is wrong with the store: one line that says what, and what to do."""
        if self._troubles.get(topic) != text:
            log.error("store in trouble", topic=topic, trouble=text)
        self._troubles[topic] = text

    def relieve(self, topic: str) -> None:
        """It is over."""
        if self._troubles.pop(topic, None) is not None:
            log.info("store trouble over", topic=topic)

    def written(self) -> None:
        """A write went well: what earlier ones complained of is over."""
        if self._troubles:
            self.relieve("disk")
            self.look_for_room()

    def disk_error(self, what: str, error: OSError) -> ReplicaError:
        """The error that a writer is told, noted in health too."""
        code = error.errno or errno.EIO
        if code in _FULL:
            self.trouble("full", f"{self._folder}: no room on its disk: delete files or add servers")
            return StoreFull(f"{what}: no room on the disk of {self._folder}")
        remedy = _REMEDIES.get(code, "see the kernel's log")
        self.trouble("disk", f"{what} in {self._folder}: {error.strerror or error}; {remedy}")
        return StoreFailed(f"{what}: {error.strerror or error}; {remedy}")

    def read_error(self, segment: int, error: OSError) -> BlockCorrupt:
        """What a reader is told when the disk cannot read. Health says it until the segment is gone."""
        remedy = _REMEDIES.get(error.errno or errno.EIO, "see the kernel's log")
        text = f"segment {segment} cannot be read: {error.strerror or error}"
        self.trouble(f"read {segment}", f"{text}; {remedy}")
        return BlockCorrupt(text)

    def measure_room(self) -> None:
        """Ask the file system. Blocks, but no longer than a look at the superblock."""
        self._free = self._disk.free_bytes(self._folder)
        self._total = self._disk.total_bytes(self._folder)

    def look_for_room(self) -> None:
        """If the store was full and there is room for the longest block again, health says so no more."""
        if "full" in self._troubles and self._has_room(self.longest_record_bytes, is_copy=False):
            self.relieve("full")

    def reserve(self, length: int, *, is_copy: bool = False) -> None:
        """Raise StoreFull if `length` more bytes would fill the disk, or the capacity, over FULL_PERCENT."""
        if not self._has_room(length, is_copy=is_copy):
            # The estimate only ever falls: what others freed is seen by asking again before anybody is refused.
            try:
                self.measure_room()
            except OSError as error:
                raise self.disk_error("cannot see how much room there is", error) from None
            if not self._has_room(length, is_copy=is_copy):
                text = f"over {FULL_PERCENT} % of its room is used"
                self.trouble("full", f"{self._folder}: {text}; no new blocks are taken: delete files or add servers")
                raise StoreFull(f"the store in {self._folder} is full: {text}")
        self._free -= length
        self.occupied += length

    def _has_room(self, length: int, *, is_copy: bool) -> bool:
        if is_copy:
            return (self._free - length) * 100 >= self._total * COPIES_ROOM_PERCENT
        if self._capacity and (self.occupied + length) * 100 > self._capacity * FULL_PERCENT:
            return False
        return (self._free - length) * 100 >= self._total * (100 - FULL_PERCENT)

    @property
    def bytes_free(self) -> int:
        """What may still be written, by the last measurement."""
        free = self._free - self._total * (100 - FULL_PERCENT) // 100
        if self._capacity:
            free = min(free, self._capacity * FULL_PERCENT // 100 - self.occupied)
        return max(0, free)

    def health(self) -> StoreHealth:
        """What a heartbeat carries. Touches no disk."""
        if self.oldest_operation_s > STUCK_S:
            self.trouble("stuck", f"{self._folder}: its disk has not answered for {STUCK_S:.0f} s or more: see its log")
        else:
            self.relieve("stuck")
        return StoreHealth(
            blocks=self.blocks,
            bytes_used=self.occupied,
            bytes_free=self.bytes_free,
            reads=self.reads,
            writes=self.writes,
            mended=self.mended,
            corrupt_found=self.corrupt_found,
            oldest_disk_operation_s=self.oldest_operation_s,
            troubles=tuple(self._troubles.values()),
        )
