"""Merging: crowded slots are rewritten as one block, in the background (design section 6).

Every answer with extents is looked at, so a slot that a dead client has left crowded is mended by whoever opens or
reads the file next. A slot is merged when nobody has written to it for a while, or during steady writing as soon as
its crowd has cost as much as a merge does. The block is durable on W servers before it is committed, because what it
replaces may have been fsynced; the commit lays it only where the slot still is as it was read (`mendfs.merging`).
A merge that fails leaves nothing behind but a block that no metadata names, and is tried again later.
"""

import asyncio
import errno
from collections import OrderedDict
from collections.abc import Callable

import msgspec
import structlog

from mendfs.client.commits import FOREVER_S
from mendfs.client.files import File, Upload
from mendfs.client.gather import Want
from mendfs.client.reader import Reader
from mendfs.client.shared import Shared
from mendfs.client.tasks import Changes
from mendfs.client.uploader import Uploader
from mendfs.errors import MendfsError, OperationError
from mendfs.extents import Piece
from mendfs.merging import Burden, extents_of_merged, is_crowded, plan_merge, seen_by
from mendfs.model import CommitSequence, Extent, Inode, MiB, Slot
from mendfs.wire.messages.meta import (
    Extents,
    GetExtents,
    Merged,
    MergeSlot,
    NewBlock,
    RequestId,
)
from mendfs.world.buffers import BufferPool

log = structlog.get_logger("mendfs.client")

QUIET_S = 2.0
"""A file that this client has written to is merged when it was left alone this long: twice the time after which it is
committed, so that a writer that goes on is seen to go on. The file, not the slot: a random writer leaves each slot
alone for seconds, and would have all of them merged again and again (measured: five times the bytes written)."""
QUIET_MAX_S = 16.0
"""A file that is written to in bursts is left alone for longer each time."""
SLOT_QUIET_S = 30.0
"""A slot that was left alone this long is merged although its file is still written to elsewhere."""
RECENT_S = 60.0
RECENT_MAX = 10_000
OTHERS_QUIET_S = 4.0
"""A slot that was found crowded gets up to twice this, for its writer would merge it by itself, or a second reader."""
CANDIDATES_MAX = 10_000
"""Crowded slots remembered; others are noticed when they are next read or written."""
MERGES_MAX = 4
"""At once: the next slot is read while others are stored, and one sync serves several."""
MERGING_BYTES_MAX = 16 * MiB
TICK_S = 0.25
STORE_TIMEOUT_S = 30.0
META_TIMEOUT_S = 30.0
RETRY_MIN_S = 2.0
RETRY_MAX_S = 300.0
HOLD_FROM = 4096
"""Extents of a slot at which its next bytes wait for its merge: what is on its way still has room in the slot."""
GROWN_BY = 64
"""Extents that a slot must gain before it is looked at again after there was nothing to merge in it."""

Key = tuple[Inode, Slot]


class _Candidate(msgspec.Struct):
    """A crowded slot."""

    due_s: float
    """When it is merged even if its file is written to."""
    quiet_s: float
    """How long the file must be left alone for it to be merged earlier."""
    count: int
    version: CommitSequence
    is_own: bool = False
    is_urgent: bool = False
    ignored_up_to: int = 0
    """There was nothing to merge when it had this many extents: its holes are what makes them so many."""
    failures: int = 0
    retry_s: float = 0.0
    """After a failure: not before this."""
    burden: Burden = msgspec.field(default_factory=Burden)

    @property
    def is_anothers(self) -> bool:
        """Whether its writer, who is another client, should come first."""
        return not (self.is_own or self.is_urgent)


class _Pooled:
    """The memory of a merged block on its way."""

    def __init__(self, pool: BufferPool, memory: bytearray, view: memoryview) -> None:
        self._pool = pool
        self._memory = memory
        self._view = view

    def release(self, *, reuse: bool) -> None:
        """See Memory."""
        if reuse:
            self._view.release()
            self._pool.give(self._memory)


class Merger:
    """The merges of one client."""

    def __init__(self, shared: Shared, reader: Reader, uploader: Uploader) -> None:
        self._shared = shared
        self._reader = reader
        self._uploader = uploader
        self.on_ended: Callable[[File, Slot], None] = lambda file, slot: None
        """Called when a merge has ended, well or not: the writer may have held bytes back for it."""
        self._candidates: dict[Key, _Candidate] = {}
        self._running: dict[Key, asyncio.Task[bool]] = {}
        self._running_bytes = 0
        self._recent: OrderedDict[Key, tuple[float, float]] = OrderedDict()
        """When a slot was last merged, and how long it had been left alone before."""
        self._woken = Changes()
        self._is_stopped = False
        self.merged_count = 0
        """Merges made since the start."""

    # --- noticing -----------------------------------------------------------------------------------------------

    def learnt(self, file: File, slot: Slot, extents: tuple[Extent, ...], *, is_own: bool) -> None:
        """See SlotWatch."""
        key = (file.inode, slot)
        candidate = self._candidates.get(key)
        now_s = self._now()
        if is_own:
            file.committed_s = now_s
        if not is_crowded(extents, self._shared.volume.block_size):
            if candidate is not None:
                del self._candidates[key]
                if key not in self._running:
                    # Somebody else has merged or cut it: no merge of ours will let go what was held back for one.
                    self.on_ended(file, slot)
            return
        if candidate is None:
            if len(self._candidates) >= CANDIDATES_MAX or self._is_stopped:
                return
            due_s = now_s + OTHERS_QUIET_S * (1 + self._shared.world.rng.random())
            candidate = _Candidate(due_s, self._quiet_s(key, now_s), len(extents), file.version)
            self._candidates[key] = candidate
            self._woken.notify()
        candidate.count = len(extents)
        if is_own:
            candidate.is_own = True
            candidate.burden.visits += len(extents)
            candidate.due_s = now_s + SLOT_QUIET_S
        if not candidate.is_urgent and candidate.burden.is_merge_due(extents):
            candidate.is_urgent = True
            self._woken.notify()

    def _quiet_s(self, key: Key, now_s: float) -> float:
        merged_s, quiet_s = self._recent.get(key, (0.0, 0.0))
        return min(2 * quiet_s, QUIET_MAX_S) if quiet_s and now_s - merged_s < RECENT_S else QUIET_S

    def holds(self, file: File, slot: Slot) -> bool:
        """Whether the next bytes of a slot must wait for its merge: it is near what the meta server accepts."""
        if len(file.slots.get(slot, ())) < HOLD_FROM or self._is_stopped:
            return False
        candidate = self._candidates.get((file.inode, slot))
        # One that cannot be merged goes on growing: the meta server has the last word.
        return candidate is not None and candidate.is_urgent and not candidate.failures

    # --- when -----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Start merges when they are due; runs as long as the volume is open."""
        while True:
            await self._woken.wait(TICK_S if self._candidates else None)
            if not self._is_stopped:
                self._start_due()

    def stop(self) -> None:
        """No more merges, and give up those under way: closing does not wait for them."""
        self._is_stopped = True
        for task in self._running.values():
            task.cancel()

    def _start_due(self) -> None:
        now_s = self._now()
        for key, candidate in list(self._candidates.items()):
            if len(self._running) >= MERGES_MAX or self._running_bytes >= MERGING_BYTES_MAX:
                return
            if key not in self._running and self._is_due(key, candidate, now_s):
                self._start(key)

    def _is_due(self, key: Key, candidate: _Candidate, now_s: float) -> bool:
        if candidate.count <= candidate.ignored_up_to + GROWN_BY * (candidate.ignored_up_to > 0):
            return False
        if candidate.retry_s > now_s:
            return False
        if candidate.is_urgent:
            return True
        if 2 * self._shared.dirty.used > self._shared.dirty.limit:
            return False
        file = self._shared.files.find(key[0])
        if file is None:
            return True
        is_quiet = candidate.is_own and not file.is_dirty and file.committed_s + candidate.quiet_s <= now_s
        return (is_quiet or candidate.due_s <= now_s) and not (key[1] in file.collecting or key[1] in file.frozen)

    def _start(self, key: Key) -> "asyncio.Task[bool]":
        task = self._running[key] = self._shared.tasks.spawn(self._merge(key))
        return task

    async def merge_now(self, file: File, slot: Slot) -> bool:
        """Merge a slot that has no room for a commit. False if that did not work."""
        key = (file.inode, slot)
        running = self._running.get(key)
        if running is not None and await _ended_well(running):
            return True
        return await _ended_well(self._running.get(key) or self._start(key))

    # --- doing it -------------------------------------------------------------------------------------------------

    async def _merge(self, key: Key) -> bool:
        file = self._shared.files.get(key[0])
        size = self._shared.volume.block_size
        self._running_bytes += size
        # Counted with the writers' bytes: both are memory on its way to the servers.
        self._shared.dirty.take(size)
        try:
            return await self._try_merge(file, key)
        except (MendfsError, TimeoutError) as error:
            self._failed(key, error)
            return False
        finally:
            self._shared.dirty.take(-size)
            self._running_bytes -= size
            del self._running[key]
            self._woken.notify()
            self.on_ended(file, key[1])

    def _failed(self, key: Key, error: Exception) -> None:
        candidate = self._candidates.get(key)
        if isinstance(error, OperationError) and error.errno in (errno.ENOENT, errno.ESTALE):
            # It is gone, or somebody has merged it or written all of it anew: whoever looks at it next will see.
            self._candidates.pop(key, None)
        elif candidate is not None:
            candidate.failures += 1
            candidate.retry_s = self._now() + min(RETRY_MIN_S * 2**candidate.failures, RETRY_MAX_S)
            log.info("a merge did not work, trying later", inode=key[0], slot=key[1], reason=str(error))

    async def _try_merge(self, file: File, key: Key) -> bool:
        inode, slot = key
        answer = await self._shared.session.query(GetExtents(inode, slot, 1), Extents, timeout_s=META_TIMEOUT_S)
        extents = next((each.extents for each in answer.slots if each.slot == slot), ())
        candidate = self._candidates.get(key)
        if candidate is not None and candidate.is_anothers and answer.version != candidate.version:
            # Somebody else is writing to the file: the merge is his as long as he goes on.
            candidate.version = answer.version
            candidate.due_s = self._now() + OTHERS_QUIET_S
            return False
        pieces = plan_merge(extents, self._shared.volume.block_size)
        if not pieces:
            self._nothing_to_merge(key, extents)
            return False
        upload = await self._stored(inode, slot, pieces)
        generation = self._shared.session.generation
        merged = await self._commit(upload, pieces)
        self.merged_count += 1
        self._candidates.pop(key, None)
        self._remember(key, candidate)
        file.learn_merged(merged)
        self._uploader.committed(upload)
        log.debug("slot merged", inode=inode, slot=slot, extents=len(extents), left=len(merged.slot.extents))
        if file.unsynced and await self._sync_log() and generation == self._shared.session.generation:
            file.merge_is_durable(merged)
        return True

    async def _sync_log(self) -> bool:
        """Make what was committed durable; whether that worked. The merge is made in any case."""
        try:
            await self._shared.session.sync_log(META_TIMEOUT_S)
        except MendfsError as error:
            log.info("the log was not synced after a merge", reason=str(error))
            return False
        return True

    def _nothing_to_merge(self, key: Key, extents: tuple[Extent, ...]) -> None:
        candidate = self._candidates.get(key)
        if candidate is None:
            return
        if is_crowded(extents, self._shared.volume.block_size):
            candidate.ignored_up_to = len(extents)
            candidate.is_urgent = False
        else:
            del self._candidates[key]

    def _remember(self, key: Key, candidate: _Candidate | None) -> None:
        if candidate is None or candidate.is_urgent:
            return
        self._recent[key] = (self._now(), candidate.quiet_s)
        self._recent.move_to_end(key)
        if len(self._recent) > RECENT_MAX:
            self._recent.popitem(last=False)

    async def _stored(self, inode: Inode, slot: Slot, pieces: tuple[Piece, ...]) -> Upload:
        """The pieces as one block, durable on W servers."""
        length = sum(piece.length for piece in pieces)
        # Left to the collector when it fails: a request that was given up may still fill it.
        memory = self._shared.pool.take(length)
        view = memoryview(memory)[:length]
        await self._reader.fetch_all(_wants(pieces, view), keep=False)
        upload = await self._uploader.prepare(inode, slot, [view], length)
        upload.memory = _Pooled(self._shared.pool, memory, view)
        upload.is_synced = True
        try:
            async with asyncio.timeout(STORE_TIMEOUT_S):
                await self._uploader.store(upload)
        except BaseException:
            self._uploader.given_up(upload)
            raise
        return upload

    async def _commit(self, upload: Upload, pieces: tuple[Piece, ...]) -> Merged:
        seen = seen_by(pieces)
        extents = extents_of_merged(pieces, *upload.name, upload.root)

        def message(at: RequestId) -> MergeSlot:
            upload.named = frozenset(upload.acknowledged)
            block = NewBlock(*upload.name, upload.length, upload.root, tuple(sorted(upload.named)))
            return MergeSlot(at, upload.inode, upload.slot, block, extents, seen)

        try:
            # However long it takes: a merge that was given up may yet be made, so its block's id would stay in flight
            # until the session ends, and keep the session from getting ids in the end.
            return await self._shared.session.change(message, Merged, timeout_s=FOREVER_S)
        except MendfsError:
            self._uploader.given_up(upload)
            raise

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


async def _ended_well(merging: "asyncio.Task[bool]") -> bool:
    # Not awaited itself: closing cancels merges, but not the commit that has waited for one.
    await asyncio.wait([merging])
    return not merging.cancelled() and merging.exception() is None and merging.result()


def _wants(pieces: tuple[Piece, ...], view: memoryview) -> list[Want]:
    """What to fetch, and where to; small holes between the pieces are filled here."""
    wants = []
    at = 0
    for piece in pieces:
        target = view[at : at + piece.length]
        if piece.extent is None:
            target[:] = bytes(piece.length)
        else:
            wants.append(Want(piece.extent, piece.offset_in_block, target))
        at += piece.length
    return wants
