"""What a client knows and holds of each inode: attributes, extents, unflushed writes, errors, opens.

`version` says which state of the inode the cached extents are of; an answer about an older one is ignored, one about a
newer one clears them. `kernel_version` is the state that the kernel's page cache agrees with: own commits move it
along, as long as nobody else's change lies between.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from itertools import islice
from typing import Protocol

import msgspec
import structlog

from mendfs.client.slot_buffer import SlotBuffer
from mendfs.client.tasks import Changes
from mendfs.errors import ChangesLost, DeadlineExceeded, MendfsError
from mendfs.extents import hidden
from mendfs.model import (
    Attributes,
    BlockId,
    CommitSequence,
    Extent,
    Incarnation,
    Inode,
    Partition,
    ServerNumber,
    Slot,
    SlotExtents,
)
from mendfs.wire.messages.meta import OPEN_SLOTS_MAX, Committed, Extents, Merged, Opened

log = structlog.get_logger("mendfs.client")

IDLE_FILES_MAX = 4096
"""Files that nobody has open whose state is kept: it spares the kernel's cache and a metadata call when reopened."""
SLOTS_KNOWN_MAX = 20_000
"""Slots of one file whose extents are cached: about 10 MiB when blocks are tiny."""
EXTENTS_KNOWN_MAX = 200_000
"""Extents of one file that are cached, but for those near what was asked last: about 70 MiB. A file of 64 GiB that is
rewritten at random would else take gigabytes."""
EXTENTS_IDLE_MAX = 64
"""Extents kept for a file that nobody has open: enough for most files, little for 4,096 of them."""

SLOTS_NEAR = 128
"""On either side of what was asked last: a read of a MiB has that many slots only where blocks are tiny."""

BlockName = tuple[Partition, BlockId]


class Memory(Protocol):
    """What holds an upload's bytes."""

    def release(self, *, reuse: bool) -> None:
        """Nobody needs them any more; without `reuse` they may still be on their way to a server."""
        ...


class Upload:
    """One block on its way to its servers."""

    def __init__(
        self, name: BlockName, inode: Inode, slot: Slot, payload: list[memoryview], length: int, root: bytes
    ) -> None:
        self.name = name
        self.inode = inode
        self.slot = slot
        self.payload = payload
        self.length = length
        self.root = root
        self.acknowledged: dict[ServerNumber, Incarnation] = {}
        self.is_synced = False
        """Its puts ask for an answer when the block is durable."""
        self.synced: set[ServerNumber] = set()
        """Servers that have answered such a put."""
        self.named: frozenset[ServerNumber] | None = None
        """The servers that the commit named, once it was sent."""
        self.is_over = False
        """Committed, or given up: its id is settled."""
        self.is_committed = False
        self.is_reusable = True
        """False when a put ended without an answer: its bytes may still lie in a connection's buffers."""
        self.putting: dict[ServerNumber, asyncio.Task[None]] = {}
        self.errors: dict[ServerNumber, MendfsError] = {}
        self.retry_at_s: dict[ServerNumber, float] = {}
        self.memory: Memory | None = None
        """Given back when no put needs it any more."""


class Generation:
    """The dirty bytes of one slot: collecting, then frozen and uploaded, then committed."""

    def __init__(self, buffer: SlotBuffer) -> None:
        self.buffer = buffer
        self.upload: Upload | None = None
        self.task: asyncio.Task[None] | None = None
        self.attempts = 0
        self.is_wanted = False
        """To be frozen as soon as the generation before it is committed."""
        self.is_synced = False
        """Somebody waits for its data to be durable: it is stored so."""
        self.is_logged = False
        """And for its commit to be durable."""
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Committed or failed; errors are kept by the file."""

    def finish(self) -> None:
        """It is committed, or lost."""
        if not self.done.done():
            self.done.set_result(None)


class Unsynced(msgspec.Struct):
    """A committed block that no sync on W servers covers yet."""

    slot: Slot
    length: int
    root: bytes
    puts: dict[ServerNumber, Incarnation]
    synced: set[ServerNumber]


class SlotWatch(Protocol):
    """Whoever wants to know which slots have become crowded."""

    def learnt(self, file: "File", slot: Slot, extents: tuple[Extent, ...], *, is_own: bool) -> None:
        """The extents of a slot, from an answer; `is_own` if this client's commit has changed them."""
        ...


WRITES_TOLD = 2
"""See `File.tell_writer`."""


class File:
    """One inode's state."""

    def __init__(self, inode: Inode, watch: SlotWatch | None = None) -> None:
        self.inode = inode
        self._watch = watch
        self.attributes: Attributes | None = None
        self.version = CommitSequence(0)
        self.kernel_version = CommitSequence(0)
        self.slots: dict[Slot, tuple[Extent, ...]] = {}
        """Extents of the slots that are known, holes as ()."""
        self._extents_learnt = 0
        """Since it was last looked whether they are too many."""
        self.asking_extents: tuple[range, asyncio.Task[None]] | None = None
        """The newest question for extents: its slots, and the task that waits for the answer."""
        self.collecting: dict[Slot, Generation] = {}
        self.frozen: dict[Slot, Generation] = {}
        self.ready: deque[Generation] = deque()
        """Uploaded, to be committed."""
        self.is_committing = False
        """A commit is under way, or one whose time was up may yet be made: no other one may overtake it."""
        self.changes = Changes()
        self.lock = asyncio.Lock()
        """Held by whatever must not meet a commit of older data: truncation and appends. See `locked`."""
        self.is_being_cut = False
        """A truncation is under way: not even what has waited for a merge sets out."""
        self._writes_told = 0
        self.errors: deque[MendfsError] = deque()
        self.opens = 0
        self.dirty_since_s: float | None = None
        self.dirty_end = 0
        self.written_ns = 0
        self.committed_s = 0.0
        """When this client last had a change of it answered, as far as its slots are watched."""
        self.unsynced: dict[BlockName, Unsynced] = {}
        self.was_emptied = False
        """Truncated to nothing since it was last made durable: close must do that first (design section 5)."""
        self.emptied_count = 0
        """Truncations to nothing: a close that has waited for durability may have met one more."""
        self._durability_awaited = 0
        """Callers that wait for what is committed to become durable."""

    @property
    def is_dirty(self) -> bool:
        """Whether a commit is still to come."""
        return bool(self.collecting or self.frozen)

    @property
    def is_idle(self) -> bool:
        """Whether its state may be forgotten."""
        return not (self.opens or self.is_dirty or self.unsynced or self.is_committing or self.lock.locked())

    @property
    def size(self) -> int:
        """The file's size, this client's unflushed writes included."""
        return max(self.attributes.size if self.attributes else 0, self.dirty_end)

    async def take_lock(self, timeout_s: float | None) -> None:
        """Raises DeadlineExceeded if whoever has the lock does not give it back in time; None: for ever."""
        try:
            # Even if it looks free: somebody who has waited for it may be about to run.
            async with asyncio.timeout(timeout_s):
                await self.lock.acquire()
        except TimeoutError:
            raise DeadlineExceeded(f"an earlier change of inode {self.inode} is not over in time") from None

    @asynccontextmanager
    async def locked(self, timeout_s: float | None) -> AsyncIterator[None]:
        """Hold the lock. Raises as `take_lock`."""
        await self.take_lock(timeout_s)
        try:
            yield
        finally:
            self.lock.release()

    def take_error(self) -> None:
        """Raise the oldest error of an upload or commit that nobody was told of, if there is one."""
        if self.errors:
            error = self.errors[0]
            # One tells that bytes are lost: the others are of the same day, and would hit whoever opens the file next.
            self.errors.clear()
            self._writes_told = 0
            raise error

    def tell_writer(self) -> None:
        """The same for a write. The error stays until it was told twice, or to an fsync or a close.

        The kernel cuts a long write(2) into requests: an error of a later one only makes its count shorter, and the
        application never sees it. The next write(2) begins with a request of its own.
        """
        if self.errors:
            self._writes_told += 1
            if self._writes_told >= WRITES_TOLD:
                self.take_error()
            raise self.errors[0]

    # --- learning from answers --------------------------------------------------------------------------------

    def learn(self, attributes: Attributes) -> Attributes:
        """Attributes from an answer; returns the newest known ones."""
        if self.attributes is None or attributes.version >= self.attributes.version:
            self.attributes = attributes
        self._at_version(attributes.version)
        return self.attributes

    def _at_version(self, version: CommitSequence) -> bool:
        """Whether an answer about `version` says something about the newest known state."""
        if version > self.version:
            self.slots.clear()
            self.version = version
        return version == self.version

    def learn_opened(self, opened: Opened) -> bool:
        """The answer to an open. Returns whether the kernel may keep what it has cached."""
        self.learn(opened.attributes)
        keep = opened.attributes.version == self.kernel_version
        if opened.attributes.version == self.version:
            self._learn_slots(opened.slots, range(opened.slots_complete))
            self.kernel_version = self.version
        return keep

    def learn_made(self, attributes: Attributes) -> None:
        """The answer to the making of a file: it has no extents, and the kernel has nothing cached of it."""
        self.learn(attributes)
        if attributes.version == self.version:
            self._learn_slots((), range(OPEN_SLOTS_MAX))
            self.kernel_version = self.version

    def learn_extents(self, answer: Extents, first: Slot) -> bool:
        """An answer with extents. False if it is older than what is known: ask again."""
        if not self._at_version(answer.version):
            return False
        if self.attributes is not None and answer.version > self.attributes.version:
            self.attributes = msgspec.structs.replace(self.attributes, size=answer.size)
        self._learn_slots(answer.slots, range(first, answer.slots_complete))
        return True

    def _learn_slots(self, slots: Iterable[SlotExtents], complete: range, *, is_own: bool = False) -> None:
        slots = tuple(slots)
        if len(self.slots) + len(complete) > SLOTS_KNOWN_MAX:
            self.slots.clear()
        self._extents_learnt += sum(len(each.extents) for each in slots)
        if self._extents_learnt > EXTENTS_KNOWN_MAX // 4:
            self._forget_far(complete or range(slots[0].slot, slots[-1].slot + 1))
        self.slots.update(dict.fromkeys((Slot(slot) for slot in complete), ()))
        for each in slots:
            self.slots[each.slot] = each.extents
            if self._watch is not None:
                self._watch.learnt(self, each.slot, each.extents, is_own=is_own)

    def _forget_far(self, near: range) -> None:
        """Keep no more extents than may be; those that a step of the read under way may need stay in any case."""
        self._extents_learnt = 0
        known = sum(map(len, self.slots.values()))
        for slot in list(self.slots):
            if known <= EXTENTS_KNOWN_MAX:
                return
            if not near.start - SLOTS_NEAR <= slot < near.stop + SLOTS_NEAR:
                known -= len(self.slots.pop(slot))

    def learn_committed(self, answer: Committed, *, by_kernel: bool = True) -> None:
        """The answer to an own commit; `by_kernel` False if the kernel's pages do not have what was written."""
        version = answer.attributes.version
        if by_kernel and answer.previous_version == self.kernel_version:
            self.kernel_version = version
        if answer.previous_version == self.version:
            self.version = version
        elif version > self.version:
            self.slots.clear()
            self.version = version
        if version == self.version:
            self._learn_slots(answer.slots, range(0), is_own=True)
        if self.attributes is None or version >= self.attributes.version:
            self.attributes = answer.attributes
        self._forget_overwritten(answer.slots)

    def may_hide_durable(self, slot: Slot, ranges: Iterable[tuple[int, int]], *, start: int) -> bool:
        """Whether bytes written at these ranges of a slot, which begins at `start`, hide some that a power cut leaves.

        What this client has committed and not made durable yet hides nothing durable itself, for it was asked then. But
        when somebody waits for it to become durable, it may be that before the bytes that hide it are.
        """
        extents = self.slots.get(slot)
        if extents is None:
            return self.attributes is None or start < self.attributes.size
        over = hidden(extents, ranges)
        if self._durability_awaited:
            return any(True for _ in over)
        return any((extent.partition, extent.block) not in self.unsynced for extent in over)

    @contextmanager
    def durability_awaited(self) -> Iterator[None]:
        """While somebody waits for what is committed to become durable, and will then say that it is."""
        self._durability_awaited += 1
        try:
            yield
        finally:
            self._durability_awaited -= 1

    def learn_merged(self, answer: Merged) -> None:
        """The answer to a merge: other extents for the same bytes, of the same version."""
        if answer.version == self.version:
            self._learn_slots((answer.slot,), range(0))

    def merge_is_durable(self, answer: Merged) -> None:
        """What a merge has replaced is in its block, and no power cut undoes it: nobody has to wait for that any more.

        Not before: the metadata could go back to naming what it has replaced, which nobody would sync then.
        """
        self._forget_overwritten((answer.slot,))

    def _forget_overwritten(self, slots: Iterable[SlotExtents]) -> None:
        """Blocks that a slot names no more need no sync."""
        if not self.unsynced:
            return
        now = {each.slot: {(extent.partition, extent.block) for extent in each.extents} for each in slots}
        for name, entry in list(self.unsynced.items()):
            if entry.slot in now and name not in now[entry.slot]:
                del self.unsynced[name]

    def forget_extents(self) -> None:
        """Read them again before they are used; an answer that is on its way may be the one that was wrong."""
        self.slots.clear()
        self.asking_extents = None

    def forget_all(self) -> None:
        """The meta server lost changes: nothing known counts."""
        self.attributes = None
        self.version = self.kernel_version = CommitSequence(0)
        self.slots.clear()

    def shown(self, attributes: Attributes) -> Attributes:
        """`attributes` as an application must see them: with this client's unflushed writes."""
        if not self.is_dirty:
            return attributes
        return msgspec.structs.replace(
            attributes,
            size=max(attributes.size, self.dirty_end),
            mtime_ns=max(attributes.mtime_ns, self.written_ns),
            ctime_ns=max(attributes.ctime_ns, self.written_ns),
        )


class Files:
    """The state of all inodes this client works with; that of idle ones is bounded."""

    def __init__(self) -> None:
        self._files: OrderedDict[Inode, File] = OrderedDict()
        self.watch: SlotWatch | None = None
        """Told of every slot that is learnt of."""
        self.went_back: set[Inode] = set()
        """Changes of these were lost by the meta server, and nobody was told yet."""

    def tell_went_back(self, inode: Inode) -> None:
        """Raise ChangesLost, once, if changes of this file were lost."""
        if inode in self.went_back:
            self.went_back.discard(inode)
            raise ChangesLost("the meta server stopped, and changes of this file that were not synced are lost")

    def __iter__(self) -> Iterator[File]:
        return iter(list(self._files.values()))

    def find(self, inode: Inode) -> File | None:
        """The state of an inode, if there is one."""
        return self._files.get(inode)

    def get(self, inode: Inode) -> File:
        """The state of an inode, begun if there is none."""
        file = self._files.get(inode)
        if file is None:
            file = self._files[inode] = File(inode, self.watch)
            if len(self._files) > IDLE_FILES_MAX:
                self._forget_idle(keep=file)
        else:
            self._files.move_to_end(inode)
        return file

    def _forget_idle(self, *, keep: File) -> None:
        # A few of the oldest each time: one call never walks all files.
        for inode, file in list(islice(self._files.items(), 8)):
            if file.is_idle and file is not keep:
                for error in file.errors:
                    log.error("an error of a closed file was told to nobody", inode=inode, error=str(error))
                del self._files[inode]
            else:
                self._files.move_to_end(inode)

    def shown(self, attributes: Attributes) -> Attributes:
        """Attributes from an answer as an application must see them."""
        file = self._files.get(attributes.inode)
        return attributes if file is None else file.shown(file.learn(attributes))

    def settle(self, file: File) -> None:
        """Nobody has the file open any more: keep little of it."""
        if sum(map(len, file.slots.values())) + len(file.slots) > EXTENTS_IDLE_MAX:
            file.slots.clear()
