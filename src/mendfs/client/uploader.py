"""Storing a block on the servers of its partition: at least W of them, briefly waiting for the others that are up.

A put of the same id is idempotent, so a server that failed is simply asked again, for as long as the policy says. Puts
still under way when W have acknowledged go on in the background: the commit names whoever acknowledged by then, and
a later acknowledgement is reported, so that the server is owed nothing.
"""

import asyncio
import errno
from collections import deque
from functools import partial

import structlog

from mendfs.blocks import page_checksums, root_of
from mendfs.client.files import BlockName, Generation, Upload
from mendfs.client.shared import Shared
from mendfs.errors import BadMessage, BlockConflict, MendfsError, OperationError, StoreFull, Unreachable
from mendfs.model import BlockId, Inode, MiB, ServerNumber, Slot
from mendfs.placement import partition_of
from mendfs.wire.messages.data import PutBlock, Stored
from mendfs.wire.messages.meta import AcknowledgeLate, RequestId
from mendfs.wire.messages.session import Done

log = structlog.get_logger("mendfs.client")

GRACE_S = 0.05
GRACE_BYTES_PER_S = 50 * MiB
"""How long a commit waits for servers that are up, beyond W: a missing replica costs a debt and a mending."""
GRACE_FACTOR = 3.0
"""The wait grows with what the quorum took: on a loaded machine the last one is not late after 50 ms."""
GRACE_MAX_S = 1.0
RETRY_MIN_S = 0.05
RETRY_MAX_S = 1.0
STRAGGLING_BYTES_MAX = 32 * MiB
"""Committed blocks still on their way to slow servers; above it the oldest are given up (mending brings them)."""
THREAD_FROM_BYTES = MiB
"""BLAKE3 of a MiB takes half a ms, and lets other threads run meanwhile. XXH3 of 4 MiB takes 0.3 ms: done here."""
LATE_PAUSE_S = 0.05
"""Late acknowledgements are collected this long: a server that was slow once was slow for many blocks."""
LATE_BATCH_MAX = 64


class Uploader:
    """Puts of one client."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._straggling: deque[Upload] = deque()
        self._straggling_bytes = 0
        self._late: dict[ServerNumber, list[Upload]] = {}

    async def prepare(self, inode: Inode, slot: Slot, payload: list[memoryview], length: int) -> Upload:
        """Checksum a block and give it an id. The payload must stay as it is until the upload is over."""
        shared, volume = self._shared, self._shared.volume
        if len(payload) > 1:
            payload = [memoryview(b"".join(payload))]
        rule = volume.page_size, volume.checksum
        if volume.checksum == "blake3" and length >= THREAD_FROM_BYTES:
            checksums = await shared.world.disk.run(page_checksums, payload[0], *rule)
        else:
            checksums = page_checksums(payload[0], *rule)
        root = root_of(checksums, length=length, page_size=volume.page_size, kind=volume.checksum)
        partition = partition_of(inode, slot, volume.partitions)
        block = BlockId(await shared.blocks.take())
        return Upload((partition, block), inode, slot, payload, length, root)

    async def store(self, upload: Upload) -> None:
        """Until W servers of the row have the block. Raises ENOSPC, or Unreachable after write_timeout_s."""
        began_s = self._now()
        timeout_s = self._shared.options.write_timeout_s
        while True:
            self._start_puts(upload)
            if self._has_quorum(upload):
                break
            self._refuse_hopeless(upload, None if timeout_s is None else began_s + timeout_s)
            change = self._shared.servers.changes.future()
            try:
                await asyncio.wait(
                    [change, *upload.putting.values()],
                    timeout=self._patience(upload),
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                self._shared.servers.changes.forget(change)
        await self._wait_for_others(upload, self._now() - began_s)

    def _has_quorum(self, upload: Upload) -> bool:
        row = self._shared.row(upload.name[0])
        return sum(server in upload.acknowledged for server in row) >= self._shared.volume.write_quorum

    def _start_puts(self, upload: Upload) -> None:
        now_s = self._now()
        row = self._shared.known(self._shared.row(upload.name[0]))
        # A server that the meta server calls down is tried only if the others are too few: it would hold memory.
        up = [server for server in row if self._shared.servers.is_up(server)]
        asked = up if len(up) >= self._shared.volume.write_quorum else row
        for server in asked:
            if server in upload.acknowledged or server in upload.putting or self._shared.servers.is_suspect(server):
                continue
            if upload.retry_at_s.get(server, 0.0) <= now_s:
                upload.putting[server] = self._shared.tasks.spawn(self._put(upload, server))

    def _patience(self, upload: Upload) -> float:
        """Until a server that refused is asked again; a second at most, for tables and clocks move on."""
        due = [at_s for server, at_s in upload.retry_at_s.items() if server not in upload.putting]
        return min(max(min(due, default=0.0) - self._now(), RETRY_MIN_S), RETRY_MAX_S) if due else RETRY_MAX_S

    def _refuse_hopeless(self, upload: Upload, deadline_s: float | None) -> None:
        row, quorum = self._shared.row(upload.name[0]), self._shared.volume.write_quorum
        full = sum(isinstance(upload.errors.get(server), StoreFull) for server in row)
        if len(row) - full < quorum:
            raise OperationError(errno.ENOSPC, f"{full} of servers {list(row)} have no room")
        conflicts = [error for error in upload.errors.values() if isinstance(error, BlockConflict)]
        if conflicts:
            raise conflicts[0]
        if deadline_s is not None and self._now() >= deadline_s:
            raise Unreachable(
                f"only {len(upload.acknowledged)} of servers {list(row)} have stored block {upload.name[1]:#x}; "
                f"{quorum} must"
            )

    async def _wait_for_others(self, upload: Upload, quorum_took_s: float) -> None:
        waiting = [task for server, task in upload.putting.items() if self._shared.servers.is_up(server)]
        if waiting:
            wait_s = max(GRACE_S + upload.length / GRACE_BYTES_PER_S, GRACE_FACTOR * quorum_took_s)
            await asyncio.wait(waiting, timeout=min(wait_s, GRACE_MAX_S))

    async def _put(self, upload: Upload, number: ServerNumber) -> None:
        partition, block = upload.name
        message = PutBlock(partition, block, upload.inode, upload.slot, upload.root, sync=upload.is_synced)
        try:
            server = self._shared.servers.get(number)
            try:
                peer = await server.peer()
                timeout_s = self._shared.options.put_timeout_s
                answer, _ = await peer.call(message, upload.payload, deadline_s=timeout_s)
                if not isinstance(answer, Stored):
                    raise BadMessage(f"data server {number} answered a put with {type(answer).__name__}")
            except Unreachable as error:
                upload.is_reusable = False
                server.failed(error)
                raise
            if message.sync:
                upload.synced.add(number)
            upload.acknowledged[number] = answer.incarnation
            upload.errors.pop(number, None)
        except MendfsError as error:
            if number not in upload.errors:
                log.warning("put failed", server=number, block=block, reason=str(error))
            again_s = min(2 * max(RETRY_MIN_S, upload.retry_at_s.get(number, 0.0) - self._now()), RETRY_MAX_S)
            upload.errors[number] = error
            upload.retry_at_s[number] = self._now() + again_s
        except asyncio.CancelledError:
            upload.is_reusable = False
            raise
        finally:
            del upload.putting[number]
            self._put_ended(upload, number)

    def _put_ended(self, upload: Upload, number: ServerNumber) -> None:
        if not upload.is_over:
            return
        if upload.is_committed and number in upload.acknowledged and number not in (upload.named or ()):
            self._acknowledge_late(upload, number)
        if not upload.putting:
            self._release(upload)

    # --- the end of an upload -----------------------------------------------------------------------------------

    def committed(self, upload: Upload) -> None:
        """The metadata names the block now."""
        upload.is_over = upload.is_committed = True
        self._shared.blocks.settle(upload.name[1])
        for server in upload.acknowledged.keys() - (upload.named or frozenset()):
            self._acknowledge_late(upload, server)
        if not upload.putting:
            self._release(upload)
            return
        self._straggling.append(upload)
        self._straggling_bytes += upload.length
        while self._straggling_bytes > STRAGGLING_BYTES_MAX and self._straggling:
            oldest = self._straggling.popleft()
            self._straggling_bytes -= oldest.length
            self._cancel_puts(oldest)

    def given_up(self, upload: Upload) -> None:
        """Nothing will ever name the block."""
        upload.is_over = True
        self._cancel_puts(upload)
        if not upload.putting:
            self._release(upload)

    def _cancel_puts(self, upload: Upload) -> None:
        for task in list(upload.putting.values()):
            task.cancel()

    def _release(self, upload: Upload) -> None:
        if not upload.is_committed:
            self._shared.blocks.settle(upload.name[1])
        if upload.memory is not None:
            upload.memory.release(reuse=upload.is_reusable)
            upload.memory = None
        upload.payload = []
        while self._straggling and not self._straggling[0].putting:
            self._straggling_bytes -= self._straggling.popleft().length

    def _acknowledge_late(self, upload: Upload, server: ServerNumber) -> None:
        waiting = self._late.setdefault(server, [])
        waiting.append(upload)
        if len(waiting) == 1:
            self._shared.tasks.spawn(self._tell_late(server))

    async def _tell_late(self, server: ServerNumber) -> None:
        await asyncio.sleep(LATE_PAUSE_S)
        while names := tuple(upload.name for upload in self._late[server][:LATE_BATCH_MAX]):
            try:
                await self._shared.session.change(partial(_acknowledge_late, server, names), Done)
            except MendfsError as error:
                # The debt stays: reconcile finds the replica there and clears it.
                log.info("late acknowledgements were not taken", server=server, reason=str(error))
            del self._late[server][: len(names)]
        del self._late[server]

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _acknowledge_late(server: ServerNumber, names: tuple[BlockName, ...], at: RequestId) -> AcknowledgeLate:
    return AcknowledgeLate(at, server, names)


def payload_of(generation: Generation) -> tuple[list[memoryview], list[tuple[int, int]]]:
    """The bytes of a frozen generation as a scatter list, and (offset in the slot, length) of each part."""
    payload: list[memoryview] = []
    layout: list[tuple[int, int]] = []
    for offset, data in generation.buffer.pieces():
        payload.append(data)
        layout.append((offset, len(data)))
    return payload, layout
