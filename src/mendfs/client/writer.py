"""Writing: bytes collect per slot, full slots upload at once, commits follow (design section 6).

The path of a slot's bytes: collecting -> frozen (uploading) -> stored -> committed. At most one generation of a slot is
frozen; newer writes collect behind it, so commits of one slot keep their order. `try_write` does everything that
needs no waiting; `write` waits where it says no: for room, for a truncation, for an append.
"""

import asyncio
import errno
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog

from mendfs.client.commits import Committer, drained, until_done
from mendfs.client.files import File, Generation
from mendfs.client.shared import Shared
from mendfs.client.slot_buffer import SlotBuffer
from mendfs.client.uploader import Uploader, payload_of
from mendfs.errors import MendfsError, OperationError, SessionLost
from mendfs.model import SIZE_MAX, Inode, MiB, Slot

log = structlog.get_logger("mendfs.client")

UPLOADS_MAX = 64
"""Blocks on their way at once: a bound on tasks when blocks are tiny."""
UPLOADING_BYTES_MAX = 32 * MiB
"""Bytes on their way at once: eight default blocks keep every server busy; more only adds memory and lateness."""
SYNCED_MAX = 8
"""Blocks stored with a sync each: one fdatasync serves those that wait at the same time, but many would queue up."""
CHUNK_BYTES = MiB
"""A waiting write takes its share in pieces of this, so that big writes do not overshoot the limit of dirty bytes."""
TIMER_S = 0.25


class Writer:
    """All writing of one client, except appends."""

    def __init__(self, shared: Shared, uploader: Uploader, committer: Committer) -> None:
        self._shared = shared
        self._uploader = uploader
        self._committer = committer
        committer.on_ended = self._generation_ended
        committer.on_again = self._enqueue
        self._queue: deque[tuple[File, Generation]] = deque()
        self._queued_bytes = 0
        self._uploading = 0
        self._uploading_bytes = 0
        self._dirty: dict[Inode, File] = {}
        self.holds: Callable[[File, Slot], bool] = lambda file, slot: False
        """Whether a slot's bytes must wait for its merge."""

    # --- writing ------------------------------------------------------------------------------------------------

    def try_write(self, file: File, data: memoryview, offset: int) -> bool:
        """Take all of `data` now, or return False: `write` must be used. Raises an error of an earlier write."""
        if file.errors:
            file.tell_writer()
        if file.lock.locked() or self._shared.dirty.is_exhausted or self._is_blocked(file, offset, len(data)):
            return False
        self._collect(file, data, offset)
        return True

    async def write(self, file: File, data: memoryview, offset: int) -> None:
        """Take all of `data`, waiting for room as long as it needs."""
        position = 0
        while position < len(data):
            part = data[position : position + CHUNK_BYTES]
            if self.try_write(file, part, offset + position):
                position += len(part)
            elif file.lock.locked():
                async with file.locked(self._shared.options.write_timeout_s):
                    pass
            elif self._is_blocked(file, offset + position, len(part)):
                await file.changes.wait(None)
            else:
                self._make_room()
                await self._shared.dirty.wait()

    def _is_blocked(self, file: File, offset: int, length: int) -> bool:
        """Whether a slot has too many pieces while the ones before them are still on their way: no commit could hold
        them all. A crowded buffer that may be frozen is frozen at once, so one that is there has to wait.
        """
        if not file.collecting:
            return False
        block_size = self._shared.volume.block_size
        for slot in range(offset // block_size, (offset + length - 1) // block_size + 1):
            generation = file.collecting.get(Slot(slot))
            if generation is not None and generation.buffer.is_crowded:
                return True
        return False

    def _collect(self, file: File, data: memoryview, offset: int) -> None:
        block_size = self._shared.volume.block_size
        end = offset + len(data)
        if end > SIZE_MAX:
            raise OperationError(errno.EFBIG)
        slot, at = divmod(offset, block_size)
        position = 0
        while position < len(data):
            part = data[position : position + block_size - at]
            self._collect_in_slot(file, Slot(slot), part, at)
            position += len(part)
            slot, at = slot + 1, 0
        file.dirty_end = max(file.dirty_end, end)
        file.written_ns = self._shared.world.now_ns()
        if file.dirty_since_s is None:
            file.dirty_since_s = asyncio.get_running_loop().time()
        self._dirty[file.inode] = file

    def _collect_in_slot(self, file: File, slot: Slot, data: memoryview, at: int) -> None:
        generation = file.collecting.get(slot)
        cost = 0
        if generation is None:
            buffer = SlotBuffer(slot, self._shared.volume.block_size, self._shared.pool)
            generation = file.collecting[slot] = Generation(buffer)
        else:
            buffer = generation.buffer
            cost = buffer.cost
        buffer.write(data, at)
        self._shared.dirty.take(buffer.cost - cost)
        if (buffer.is_full or buffer.is_crowded) and self._may_freeze(file, slot):
            self._freeze(file, slot)

    def _may_freeze(self, file: File, slot: Slot) -> bool:
        return slot not in file.frozen and not file.is_being_cut and not self.holds(file, slot)

    def _make_room(self) -> None:
        """When most of the limit is held by slots that are still filling, upload those too."""
        if 2 * (self._uploading_bytes + self._queued_bytes) > self._shared.dirty.limit:
            return
        for file in list(self._dirty.values()):
            if not file.lock.locked():
                self.freeze_all(file)

    # --- freezing and uploading -----------------------------------------------------------------------------------

    def freeze_all(self, file: File, *, synced: bool = False, logged: bool = False) -> list[Generation]:
        """Everything dirty goes on its way; returns the generations to wait for. `synced`, `logged`: see `drain`."""
        may_sync = len(file.collecting) <= SYNCED_MAX
        for slot in sorted(file.collecting):
            file.collecting[slot].is_synced |= synced and may_sync
            file.collecting[slot].is_logged |= logged and may_sync
            if self._may_freeze(file, slot):
                self._freeze(file, slot)
            else:
                file.collecting[slot].is_wanted = True
        file.dirty_since_s = None
        return [*file.frozen.values(), *file.collecting.values()]

    def _freeze(self, file: File, slot: Slot) -> None:
        generation = file.collecting.pop(slot)
        file.frozen[slot] = generation
        self._enqueue(file, generation)

    def _enqueue(self, file: File, generation: Generation) -> None:
        self._queue.append((file, generation))
        self._queued_bytes += generation.buffer.covered
        self._start_uploads()

    def _start_uploads(self) -> None:
        while self._queue:
            if self._uploading >= UPLOADS_MAX or (self._uploading and self._uploading_bytes >= UPLOADING_BYTES_MAX):
                break
            file, generation = self._queue.popleft()
            length = generation.buffer.covered
            self._queued_bytes -= length
            self._uploading += 1
            self._uploading_bytes += length
            generation.task = self._shared.tasks.spawn(self._upload(file, generation, length))

    async def _upload(self, file: File, generation: Generation, length: int) -> None:
        try:
            await self._store(file, generation)
        except MendfsError as error:
            self._committer.lost(file, generation, error)
        else:
            if not generation.done.done():
                self._committer.stored(file, generation)
        finally:
            self._uploading -= 1
            self._uploading_bytes -= length
            self._start_uploads()

    async def _store(self, file: File, generation: Generation) -> None:
        payload, _ = payload_of(generation)
        buffer = generation.buffer
        upload = await self._uploader.prepare(file.inode, buffer.slot, payload, buffer.covered)
        upload.memory = buffer
        # The commit may become durable with anybody's fsync: if it hid durable bytes before its own were, a power cut
        # would leave neither.
        upload.is_synced = generation.is_synced or self._hides_durable(file, buffer)
        # An earlier put of the same bytes may still have them in a connection's buffers.
        upload.is_reusable = generation.attempts == 0
        if generation.done.done():
            self._uploader.given_up(upload)
            return
        generation.upload = upload
        await self._uploader.store(upload)

    def _hides_durable(self, file: File, buffer: SlotBuffer) -> bool:
        start = buffer.slot * self._shared.volume.block_size
        return file.may_hide_durable(buffer.slot, buffer.ranges(), start=start)

    def _generation_ended(self, file: File, generation: Generation) -> None:
        self.freeze_waiting(file, generation.buffer.slot)
        if not file.is_dirty:
            self._dirty.pop(file.inode, None)

    def freeze_waiting(self, file: File, slot: Slot) -> None:
        """The generation before, or a merge, has ended: what has waited for it sets out."""
        waiting = file.collecting.get(slot)
        if waiting is None or not self._may_freeze(file, slot):
            return
        if waiting.is_wanted or waiting.buffer.is_full or waiting.buffer.is_crowded:
            self._freeze(file, slot)
            file.changes.notify()

    # --- flushing -------------------------------------------------------------------------------------------------

    async def drain(self, file: File, *, synced: bool = False, logged: bool = False) -> None:
        """Until all that is dirty now is committed, or lost and its error kept.

        With `synced` the data of what is not on its way yet becomes durable with that, with `logged` the commit too:
        puts answered after their sync and a commit answered after the log's spare a round of waiting each. What was on
        its way before is for `Durability` to sync.
        """
        if not file.is_dirty and not file.lock.locked():
            return
        async with file.locked(self._shared.options.write_timeout_s):
            waiting = self.freeze_all(file, synced=synced, logged=logged)
        await until_done(waiting)

    async def drain_locked(self, file: File) -> None:
        """The same for a caller that holds the file's lock; nothing that was lost can be committed after it either."""
        await until_done(self.freeze_all(file))
        await self.wait_for_commits(file)

    async def flush(self, file: File, *, synced: bool = False) -> None:
        """As `drain`, and raise an error of the file that was not told yet."""
        await self.drain(file, synced=synced)
        file.take_error()

    async def flush_everything(self) -> None:
        """Until all that is dirty now, in all files, is committed or lost."""
        files = list(self._dirty.values())
        for file in files:
            if not file.lock.locked():
                self.freeze_all(file)
        errors = []
        for file in files:
            try:
                await self.drain(file)
            except MendfsError as error:
                errors.append(error)  # one that cannot be flushed now must not keep us from waiting for the others
        if errors:
            raise errors[0]

    def dirty_files(self) -> list[File]:
        """Files with something to commit."""
        return [file for file in self._dirty.values() if file.is_dirty]

    async def run_timer(self) -> None:
        """Commit what has been dirty for a second; runs as long as the volume is open."""
        while True:
            await asyncio.sleep(TIMER_S)
            due_s = asyncio.get_running_loop().time() - self._shared.options.flush_after_s
            for file in list(self._dirty.values()):
                if file.dirty_since_s is not None and file.dirty_since_s <= due_s and not file.lock.locked():
                    self.freeze_all(file)

    # --- truncating, and losing all -----------------------------------------------------------------------------------

    async def wait_for_commits(self, file: File) -> None:
        """Until nothing of the file is on its way; the caller holds its lock, so nothing new sets out.

        But for what is held back for a merge: see `cutting`.
        """
        await drained(file, self._shared.options.write_timeout_s)

    @contextmanager
    def cutting(self, file: File) -> Iterator[None]:
        """While a truncation is made: a merge that ends meanwhile must not let go what is older than the truncation."""
        file.is_being_cut = True
        try:
            yield
        finally:
            file.is_being_cut = False
            for slot in list(file.collecting):
                self.freeze_waiting(file, slot)
            file.changes.notify()  # a writer may wait for room in a slot that has been cut away

    def clip(self, file: File, size: int) -> None:
        """Forget collected bytes at and past `size`, after a truncation; the caller holds the file's lock."""
        block_size = self._shared.volume.block_size
        for slot, generation in list(file.collecting.items()):
            buffer = generation.buffer
            cost = buffer.cost
            buffer.clip(max(0, size - slot * block_size))
            self._shared.dirty.take(buffer.cost - cost)
            if buffer.is_empty:
                del file.collecting[slot]
                self._shared.dirty.take(-buffer.cost)
                generation.finish()
        file.dirty_end = min(file.dirty_end, size) if file.is_dirty else 0
        if not file.is_dirty:
            self._dirty.pop(file.inode, None)

    def session_lost(self) -> None:
        """The session's ids are void: what was not committed is lost, and its files say so."""
        self._queue.clear()
        self._queued_bytes = 0
        for file in list(self._dirty.values()):
            file.ready.clear()
            error = SessionLost("the meta server ended the session before this file's data was committed")
            for generation in [*file.frozen.values(), *file.collecting.values()]:
                if generation.task is not None:
                    generation.task.cancel()
                self._committer.lost(file, generation, error)
