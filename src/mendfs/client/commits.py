"""Committing uploaded slots: one commit of an inode at a time, several slots in each (design section 5, Commit).

The dirty bytes are kept until the commit was answered; reads lay them over the extents until then. What cannot be
committed is lost, and the file keeps the error for the next write, fsync or close.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from mendfs.client.durability import Durability
from mendfs.client.files import File, Generation, Upload
from mendfs.client.session import Uncertain
from mendfs.client.shared import Shared
from mendfs.client.uploader import Uploader
from mendfs.errors import CommitRefused, DeadlineExceeded, MendfsError, TooBig
from mendfs.model import Extent, Slot
from mendfs.wire.messages.meta import Commit, Committed, NewBlock, RequestId, SlotChange

log = structlog.get_logger("mendfs.client")

KEYS_MAX = 80
"""Keys of one commit as we count them; the engine refuses 100."""
KEYS_FIXED = 3
"""The inode, the stored answer, and one to spare."""
KEYS_SLOT = 2
"""The slot, and what it drops."""
KEYS_BLOCK = 2
"""The block, and its partition's tally; owed keys are added."""
EXTENTS_MAX = 4000
"""Extents that a commit's slots may hold before and with it: the transaction must stay below 1 MiB."""
ATTEMPTS_MAX = 5
"""Uploads of one generation under new ids before its loss is told: the table or our ranges changed each time."""
FOREVER_S = float("inf")


class Committer:
    """Commits of one client."""

    def __init__(self, shared: Shared, uploader: Uploader, durability: Durability) -> None:
        self._shared = shared
        self._uploader = uploader
        self._durability = durability
        self.on_ended: Callable[[File, Generation], None] = _nothing
        """Called when a generation has ended, committed or lost: the writer freezes the next one."""
        self.on_again: Callable[[File, Generation], None] = _nothing
        """Called when a generation must be uploaded again under a new id."""
        self.make_room: Callable[[File, Slot], Awaitable[bool]] = _no_room
        """Merges a slot that has no room for a commit. False if that did not work."""

    def stored(self, file: File, generation: Generation) -> None:
        """A generation's block is on W servers."""
        file.ready.append(generation)
        if not file.is_committing:
            file.is_committing = True
            self._shared.tasks.spawn(self._commit_ready(file))

    async def _commit_ready(self, file: File) -> None:
        try:
            while file.ready:
                await self._commit(file, self._take_batch(file))
        finally:
            file.is_committing = False
            file.changes.notify()

    def _take_batch(self, file: File) -> list[Generation]:
        batch: list[Generation] = []
        keys, extents = KEYS_FIXED, 0
        while file.ready:
            upload = file.ready[0].upload
            assert upload is not None, "only uploaded generations are ready"
            row = self._shared.row(upload.name[0])
            keys += KEYS_SLOT + KEYS_BLOCK + sum(server not in upload.acknowledged for server in row)
            extents += len(file.slots.get(upload.slot, ())) + sum(1 for _ in file.ready[0].buffer.pieces())
            if batch and (keys > KEYS_MAX or extents > EXTENTS_MAX):
                break
            batch.append(file.ready.popleft())
        return batch

    async def _commit(self, file: File, batch: list[Generation]) -> None:
        timeout_s = self._shared.options.write_timeout_s
        is_synced = False

        def build(at: RequestId) -> Commit:
            nonlocal is_synced
            message = self._message(at, file, batch)
            is_synced = message.sync
            return message

        try:
            answer = await self._shared.session.change(
                build,
                Committed,
                timeout_s=FOREVER_S if timeout_s is None else timeout_s,
            )
        except CommitRefused as error:
            await self._again(file, batch, error)
        except TooBig as error:
            await self._in_smaller_steps(file, batch, error)
        except Uncertain as error:
            for generation in batch:
                self.lost(file, generation, error)
            await self._settle(file, batch, error.fate)
        except MendfsError as error:
            for generation in batch:
                self.lost(file, generation, error)
        else:
            if is_synced:
                self._shared.session.log_synced(answer.sequence)
            self._committed(file, batch, answer)

    async def _settle(self, file: File, batch: list[Generation], fate: "asyncio.Future[object]") -> None:
        """A commit whose loss was told may yet be made: until that is known no later one may pass it."""
        timeout_s = self._shared.options.write_timeout_s
        while not fate.done():
            waiting = list(file.ready)
            await asyncio.wait([fate], timeout=timeout_s)
            if not fate.done():
                # Who came after it has a deadline too.
                late = DeadlineExceeded("an earlier commit of the file is not answered yet")
                for generation in waiting:
                    if generation in file.ready:
                        file.ready.remove(generation)
                        self.lost(file, generation, late)
        uploads = [each.upload for each in batch if each.upload is not None]
        if fate.cancelled() or fate.exception() is not None:
            for upload in uploads:
                self._uploader.given_up(upload)
            return
        answer = fate.result()
        assert isinstance(answer, Committed), "the session has checked it"
        log.warning("a commit was made after its time was up", inode=file.inode, blocks=len(uploads))
        # Since its loss was told, the kernel may have read again what was there before.
        file.learn_committed(answer, by_kernel=False)
        self._note_unsynced(file, uploads, answer)
        for upload in uploads:
            self._uploader.committed(upload)

    async def _in_smaller_steps(self, file: File, batch: list[Generation], error: TooBig) -> None:
        """One slot at a time; a slot that is too crowded for its commit is merged first."""
        if len(batch) > 1:
            for generation in batch:
                await self._commit(file, [generation])
            return
        generation = batch[0]
        generation.attempts += 1
        if generation.attempts < ATTEMPTS_MAX and await self.make_room(file, generation.buffer.slot):
            await self._commit(file, batch)
        else:
            self.lost(file, generation, error)

    def _message(self, at: RequestId, file: File, batch: list[Generation]) -> Commit:
        blocks = []
        slots = []
        end = 0
        for generation in batch:
            upload = generation.upload
            assert upload is not None, "only uploaded generations are committed"
            upload.named = frozenset(upload.acknowledged)
            blocks.append(NewBlock(*upload.name, upload.length, upload.root, tuple(sorted(upload.named))))
            slots.append(SlotChange(upload.slot, extents_of(generation)))
            end = max(end, upload.slot * self._shared.volume.block_size + generation.buffer.end)
        return Commit(at, file.inode, tuple(blocks), tuple(slots), end, file.written_ns, self._may_sync(file, batch))

    def _may_sync(self, file: File, batch: list[Generation]) -> bool:
        """Whether the commit is to be durable at once: somebody waits for that, and all data is durable already.

        Else the log could name blocks that a power cut takes: they are synced first, then the log (`Durability`).
        """
        quorum = self._shared.volume.write_quorum
        synced = all(each.upload is not None and len(each.upload.synced) >= quorum for each in batch)
        return synced and any(each.is_logged for each in batch) and not file.unsynced and not file.ready

    def _committed(self, file: File, batch: list[Generation], answer: Committed) -> None:
        file.learn_committed(answer)
        self._note_unsynced(file, [each.upload for each in batch if each.upload is not None], answer)
        for generation in batch:
            upload = generation.upload
            assert upload is not None, "only uploaded generations are committed"
            self._end(file, generation)
            self._uploader.committed(upload)
            self.on_ended(file, generation)

    def _note_unsynced(self, file: File, uploads: list[Upload], answer: Committed) -> None:
        kept = {each.slot: {(extent.partition, extent.block) for extent in each.extents} for each in answer.slots}
        for upload in uploads:
            if upload.name in kept.get(upload.slot, ()):
                self._durability.committed(file, upload)

    async def _again(self, file: File, batch: list[Generation], error: CommitRefused) -> None:
        log.warning("commit refused, uploading again", inode=file.inode, blocks=len(batch), reason=str(error))
        try:
            await self._shared.session.refresh_table()
        except MendfsError as trouble:
            log.warning("the table could not be fetched", reason=str(trouble))
        for generation in batch:
            generation.attempts += 1
            if generation.attempts >= ATTEMPTS_MAX:
                self.lost(file, generation, error)
                continue
            upload, generation.upload = generation.upload, None
            if upload is not None:
                upload.memory = None  # the generation keeps its bytes: they are uploaded again
                self._uploader.given_up(upload)
            self.on_again(file, generation)

    def lost(self, file: File, generation: Generation, error: MendfsError) -> None:
        """A generation cannot be stored or committed: its bytes are gone, and the file keeps the error."""
        if generation.done.done():
            return
        log.error("written data lost", inode=file.inode, slot=generation.buffer.slot, reason=str(error))
        if not file.errors or str(file.errors[-1]) != str(error):
            file.errors.append(error)
        self._end(file, generation)
        upload = generation.upload
        if upload is not None and isinstance(error, Uncertain):
            log.warning("the commit may yet be made; its block ids are in flight until that is known", inode=file.inode)
        elif upload is not None:
            self._uploader.given_up(upload)
        elif generation.task is None or generation.task.done():
            generation.buffer.release(reuse=False)
        self.on_ended(file, generation)

    def _end(self, file: File, generation: Generation) -> None:
        slot = generation.buffer.slot
        if file.frozen.get(slot) is generation:
            del file.frozen[slot]
        elif file.collecting.get(slot) is generation:
            del file.collecting[slot]
        self._shared.dirty.take(-generation.buffer.cost)
        if not file.is_dirty:
            file.dirty_end = 0
        generation.finish()
        file.changes.notify()


def _nothing(file: File, generation: Generation) -> None:
    """Until the writer is there."""


async def _no_room(file: File, slot: Slot) -> bool:
    """Until the merger is there."""
    return False


def extents_of(generation: Generation) -> tuple[Extent, ...]:
    """The extents of a generation's block: its pieces one after the other, touching ones joined."""
    upload = generation.upload
    assert upload is not None, "extents name the uploaded block"
    parts: list[tuple[int, int, int]] = []
    offset_in_block = 0
    for offset, data in generation.buffer.pieces():
        if parts and parts[-1][0] + parts[-1][1] == offset:
            begin, length, at = parts.pop()
            parts.append((begin, length + len(data), at))
        else:
            parts.append((offset, len(data), offset_in_block))
        offset_in_block += len(data)
    partition, block = upload.name
    return tuple(
        Extent(offset, length, partition, block, upload.length, at, upload.root) for offset, length, at in parts
    )


async def drained(file: File, timeout_s: float | None) -> None:
    """Until every frozen generation is committed or lost, and nothing of them can be made any more.

    Raises DeadlineExceeded if a commit whose loss was told is not settled within `timeout_s` after that.
    """
    while file.frozen or file.is_committing:
        while file.frozen:
            await file.changes.wait(None)
        try:
            async with asyncio.timeout(timeout_s):
                # What was held back for a merge may set out meanwhile: then there is more to wait for.
                while file.is_committing and not file.frozen:
                    await file.changes.wait(None)
        except TimeoutError:
            raise DeadlineExceeded(f"an earlier commit of inode {file.inode} is not answered yet") from None


async def until_done(generations: list[Generation]) -> None:
    """Until all of these are committed or lost."""
    waiting = [generation.done for generation in generations if not generation.done.done()]
    if waiting:
        await asyncio.wait(waiting)
