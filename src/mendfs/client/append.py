"""O_APPEND writes: each at the file's end at that moment, whole, whoever else appends (design promise 4).

A write is uploaded for the slots where it is expected to go and committed on condition that the file has the expected
size. Inside its slot the meta server moves it to the real end; where it would leave the slot, it says the size, and
the write is prepared again for that.
"""

import asyncio

from mendfs.client.commits import FOREVER_S, extents_of
from mendfs.client.durability import Durability
from mendfs.client.exclusive import Caller, exclusively
from mendfs.client.files import File, Generation, Upload
from mendfs.client.shared import Shared
from mendfs.client.slot_buffer import SlotBuffer
from mendfs.client.uploader import Uploader, payload_of
from mendfs.client.writer import Writer
from mendfs.errors import AppendMoved, CommitRefused, DeadlineExceeded
from mendfs.model import MiB, Slot
from mendfs.wire.messages.meta import Commit, Committed, Found, GetAttributes, NewBlock, RequestId, SlotChange

APPEND_BYTES_MAX = MiB
"""One atomic piece: the largest FUSE write."""
BLOCKS_MAX = 16
"""Blocks of one commit: a piece is shorter than a MiB where blocks are tiny."""
REFUSED_MAX = 5


class Appender:
    """Appends of one client."""

    def __init__(self, shared: Shared, writer: Writer, uploader: Uploader, durability: Durability) -> None:
        self._shared = shared
        self._writer = writer
        self._uploader = uploader
        self._durability = durability

    async def append(self, file: File, data: memoryview) -> None:
        """All of `data`, in pieces of up to a MiB."""
        file.tell_writer()
        # On a copy and to the end, even if the caller gives up: a commit that was sent may be made, and must find its
        # blocks in place; and an append torn between two pieces is none.
        copy = memoryview(bytes(data))
        await exclusively(self._shared, file, lambda caller: self._append(file, copy, caller))

    async def _append(self, file: File, data: memoryview, caller: Caller[None]) -> None:
        await self._writer.drain_locked(file)
        caller.check()
        file.tell_writer()
        position = 0
        length_max = min(APPEND_BYTES_MAX, BLOCKS_MAX * self._shared.volume.block_size)
        while position < len(data) and not caller.is_refused:
            part = data[position : position + length_max]
            await self._append_piece(file, part, caller)
            position += len(part)

    async def _append_piece(self, file: File, data: memoryview, caller: Caller[None]) -> None:
        timeout_s = self._shared.options.write_timeout_s
        deadline_s = FOREVER_S if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        if file.attributes is None:
            found = await self._shared.session.query(GetAttributes(file.inode), Found)
            file.learn(found.attributes)
        assert file.attributes is not None, "an answer was learnt"
        size = file.attributes.size
        refused = 0
        while True:
            generations = self._split(data, size)
            try:
                answer = await self._store_and_commit(file, generations, size, len(data), deadline_s, caller)
                break
            except AppendMoved as moved:
                if caller.is_refused:
                    raise
                size = moved.size
            except CommitRefused:
                refused += 1
                if refused >= REFUSED_MAX or caller.is_refused:
                    raise
                await self._shared.session.refresh_table()
            if asyncio.get_running_loop().time() >= deadline_s:
                raise DeadlineExceeded("an append found no quiet moment in time")
        # Appends go past the kernel's page cache (FOPEN_DIRECT_IO): it must not take its old last page for good.
        file.learn_committed(answer, by_kernel=False)

    def _split(self, data: memoryview, size: int) -> list[Generation]:
        block_size = self._shared.volume.block_size
        generations = []
        slot, at = divmod(size, block_size)
        position = 0
        while position < len(data):
            part = data[position : position + block_size - at]
            buffer = SlotBuffer(Slot(slot), block_size, self._shared.pool)
            buffer.write(part, at)
            generations.append(Generation(buffer))
            position += len(part)
            slot, at = slot + 1, 0
        return generations

    async def _store_and_commit(
        self,
        file: File,
        generations: list[Generation],
        size: int,
        length: int,
        deadline_s: float,
        caller: Caller[None],
    ) -> Committed:
        uploads: list[Upload] = []
        is_done = False
        try:
            for generation in generations:
                payload, _ = payload_of(generation)
                buffer = generation.buffer
                upload = await self._uploader.prepare(file.inode, buffer.slot, payload, buffer.covered)
                upload.memory = buffer
                generation.upload = upload
                uploads.append(upload)
            async with asyncio.TaskGroup() as group:
                for upload in uploads:
                    group.create_task(self._uploader.store(upload))
            answer = await caller.certain(
                self._shared.session.change(
                    lambda at: self._message(at, file, generations, size, length),
                    Committed,
                    timeout_s=deadline_s - asyncio.get_running_loop().time(),
                )
            )
            is_done = True
        except BaseExceptionGroup as group_error:
            raise group_error.exceptions[0] from None
        finally:
            if not is_done:
                for upload in uploads:
                    self._uploader.given_up(upload)
        kept = {(e.partition, e.block) for each in answer.slots for e in each.extents}
        for upload in uploads:
            if upload.name in kept:
                self._durability.committed(file, upload)
            self._uploader.committed(upload)
        return answer

    def _message(self, at: RequestId, file: File, generations: list[Generation], size: int, length: int) -> Commit:
        blocks = []
        slots = []
        for generation in generations:
            upload = generation.upload
            assert upload is not None, "stored before it is committed"
            upload.named = frozenset(upload.acknowledged)
            blocks.append(NewBlock(*upload.name, upload.length, upload.root, tuple(sorted(upload.named))))
            slots.append(SlotChange(upload.slot, extents_of(generation)))
        return Commit(
            at,
            file.inode,
            tuple(blocks),
            tuple(slots),
            size + length,
            self._shared.world.now_ns(),
            append_at=size,
            append_length=length,
        )
