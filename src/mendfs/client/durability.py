"""Which committed blocks no sync covers yet, and making them durable (design sections 4 and 6).

A sync of a data server counts for a block only if it carries the incarnation that its put was answered with: a server
that was started again in between may have lost the block. Then it is asked whether it has it, and is given it again.
"""

import asyncio
from collections.abc import Awaitable, Iterable

import structlog

from mendfs.blocks import page_count
from mendfs.client.fetcher import Fetcher
from mendfs.client.files import BlockName, File, Unsynced, Upload
from mendfs.client.shared import Shared
from mendfs.errors import AllReplicasFailed, MendfsError, OperationError, ReplicaError, StoreFailed, Unreachable
from mendfs.model import CommitSequence, Incarnation, Inode, ServerNumber
from mendfs.transfer import BlockRef
from mendfs.wire.messages.data import BlocksHeld, HaveBlocks, PutBlock, Stored, Synced, SyncStore
from mendfs.wire.messages.meta import Extents, GetExtents

log = structlog.get_logger("mendfs.client")

UNSYNCED_MAX = 10_000
"""Entries at which servers are synced without being asked: 5 MiB of memory."""
SYNC_EVERY_S = 5.0
"""Servers sync their stores every second anyway, so this asks for little. It keeps small what an fsync or a rename must
wait for, and finds blocks that a restarted server has lost while their bytes are still elsewhere."""
SYNC_TIMEOUT_S = 30.0
"""A slow disk may take seconds to write back what it holds; a hung server is declared down long before."""
REPAIR_PAUSE_MIN_S = 0.005
"""The first time it is mostly a server that was started again: its new incarnation only wants another sync."""
REPAIR_PAUSE_MAX_S = 0.5
HAVE_BATCH_MAX = 1000

Pending = list[tuple[File, BlockName]]


class Durability:
    """Unsynced blocks of one client."""

    def __init__(self, shared: Shared, fetcher: Fetcher) -> None:
        self._shared = shared
        self._fetcher = fetcher
        self._files: dict[Inode, File] = {}
        self._count = 0
        self._running: dict[ServerNumber, asyncio.Task[None]] = {}
        self._next: dict[ServerNumber, asyncio.Task[None]] = {}
        self._background: asyncio.Task[None] | None = None
        self._lost: MendfsError | None = None

    def lost(self, error: MendfsError) -> None:
        """Names that nobody synced may be gone: who syncs them next is told, once."""
        self._lost = error

    def committed(self, file: File, upload: Upload) -> None:
        """A block that the metadata names from now on; late acknowledgements still enter `acknowledged`."""
        if len(upload.synced) >= self._shared.volume.write_quorum:
            return
        entry = Unsynced(upload.slot, upload.length, upload.root, upload.acknowledged, upload.synced)
        file.unsynced[upload.name] = entry
        self._files[file.inode] = file
        self._count += 1
        if self._count > UNSYNCED_MAX:
            self._sync_in_background()

    def made_durable(self, file: File) -> None:
        """All of it is, and whoever has asked for that is told of what was lost before."""
        self._shared.files.went_back.discard(file.inode)

    @property
    def has_unsynced(self) -> bool:
        """Whether any block of this client may be lost in a power cut."""
        return any(file.unsynced for file in self._files.values())

    async def run_timer(self) -> None:
        """Sync what is unsynced every few seconds; runs as long as the volume is open."""
        while True:
            await asyncio.sleep(SYNC_EVERY_S)
            self._recount()
            if self._files:
                self._sync_in_background()

    def _sync_in_background(self) -> None:
        if self._background is None or self._background.done():
            self._background = self._shared.tasks.spawn(self.sync_data(list(self._files.values())))

    def _recount(self) -> None:
        self._files = {inode: file for inode, file in self._files.items() if file.unsynced}
        self._count = sum(len(file.unsynced) for file in self._files.values())

    async def sync_all(self) -> None:
        """Everything this client has committed, and the log."""
        changed = self.newest_change
        await self.sync_everything_committed()
        await self.sync_log_to(changed)
        error, self._lost = self._lost, None
        if error is not None:
            raise error

    async def sync_everything_committed(self) -> None:
        """The data of everything this client has committed."""
        await self.sync_data(list(self._files.values()))

    async def sync_log(self) -> None:
        """Every change answered before survives a power cut of the meta server."""
        timeout_s = self._shared.options.write_timeout_s
        forever_or_s = float("inf") if timeout_s is None else timeout_s
        await self._shared.session.sync_log(forever_or_s)

    @property
    def newest_change(self) -> CommitSequence:
        """The newest change that this client was answered."""
        return self._shared.session.sequence_changed

    async def sync_log_to(self, sequence: CommitSequence) -> None:
        """The same, unless the log is known to be durable up to `sequence`."""
        if self._shared.session.sequence_synced < sequence:
            await self.sync_log()

    async def sync_data(self, files: Iterable[File]) -> None:
        """Until every block these files had committed by now is durable on W servers. Raises when that cannot be."""
        pending: Pending = [(file, name) for file in files for name in file.unsynced]
        timeout_s = self._shared.options.write_timeout_s
        deadline_s = self._now() + timeout_s if timeout_s is not None else float("inf")
        pause_s = REPAIR_PAUSE_MIN_S
        while pending:
            await self._sync_servers(pending)
            pending = self._left(pending)
            if pending:
                await self._give_again(pending)
                pending = self._left(pending)
            if pending:
                if self._now() >= deadline_s:
                    raise Unreachable(f"{len(pending)} blocks are durable on fewer than W servers")
                await self._shared.servers.changes.wait(pause_s)
                pause_s = min(2 * pause_s, REPAIR_PAUSE_MAX_S)
                pending = self._left(pending)

    @staticmethod
    def _left(pending: Pending) -> Pending:
        return [(file, name) for file, name in pending if name in file.unsynced]

    # --- syncing ------------------------------------------------------------------------------------------------

    async def _sync_servers(self, pending: Pending) -> None:
        """Sync the servers that hold these, until each block has enough or every sync has ended."""
        servers: set[ServerNumber] = set()
        for file, name in pending:
            entry = file.unsynced[name]
            servers.update(entry.puts.keys() - entry.synced)
        running = {self._sync(server) for server in servers if not self._shared.servers.is_suspect(server)}
        while running and self._left(pending):
            _, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)

    def _sync(self, server: ServerNumber) -> "asyncio.Task[None]":
        """A sync of `server` that begins after now. Those who ask while one is under way share the next one."""
        waiting = self._next.get(server)
        if waiting is not None:
            return waiting
        running = self._running.get(server)
        task = self._shared.tasks.spawn(self._sync_after(running, server))
        if running is None or running.done():
            self._running[server] = task
        else:
            self._next[server] = task
        return task

    async def _sync_after(self, before: "asyncio.Task[None] | None", server: ServerNumber) -> None:
        if before is not None and not before.done():
            await asyncio.wait([before])
        if (task := self._next.get(server)) is asyncio.current_task() and task is not None:
            self._running[server] = self._next.pop(server)
        try:
            await self._sync_now(server)
        except ReplicaError as error:
            log.warning("sync failed", server=server, reason=str(error))

    async def _sync_now(self, number: ServerNumber) -> None:
        # Taken before the request goes out: only what was acknowledged by now is covered.
        covered = [
            (file, name, entry, entry.puts[number])
            for file in self._files.values()
            for name, entry in file.unsynced.items()
            if number in entry.puts and number not in entry.synced
        ]
        server = self._shared.servers.get(number)
        try:
            answer, _ = await (await server.peer()).call(SyncStore(), deadline_s=SYNC_TIMEOUT_S)
            synced = answer.incarnation if isinstance(answer, Synced) else Incarnation(-1)
        except StoreFailed:
            synced = Incarnation(-1)  # what it held unsynced has left its index
        except Unreachable as error:
            server.failed(error)
            raise
        for file, name, entry, incarnation in covered:
            if incarnation != synced:
                if entry.puts.get(number) == incarnation:
                    del entry.puts[number]
                continue
            entry.synced.add(number)
            self._clear_if_durable(file, name, entry)

    def _clear_if_durable(self, file: File, name: BlockName, entry: Unsynced) -> None:
        if len(entry.synced) >= self._shared.volume.write_quorum and file.unsynced.get(name) is entry:
            del file.unsynced[name]
            self._count -= 1

    # --- after a server was started again -------------------------------------------------------------------------

    async def _give_again(self, pending: Pending) -> None:
        """Find out who has these blocks, and store them again where they are missing."""
        lacking: dict[ServerNumber, Pending] = {}
        for file, name in pending:
            entry = file.unsynced[name]
            for server in self._shared.known(self._shared.row(name[0])):
                if server not in entry.puts and server not in entry.synced:
                    lacking.setdefault(server, []).append((file, name))
        asked = [self._ask(server, blocks) for server, blocks in lacking.items()]
        await asyncio.gather(*asked)
        for file, name in pending:
            left = file.unsynced.get(name)  # others come and go while this one is stored again
            if left is not None and len(left.puts.keys() | left.synced) < self._shared.volume.write_quorum:
                await self._put_again(file, name, left)

    async def _ask(self, number: ServerNumber, blocks: Pending) -> None:
        for begin in range(0, len(blocks), HAVE_BATCH_MAX):
            part = blocks[begin : begin + HAVE_BATCH_MAX]
            answer = await self._call(number, HaveBlocks(tuple(name for _, name in part)))
            if not isinstance(answer, BlocksHeld):
                return
            for (file, name), root in zip(part, answer.roots, strict=True):
                entry = file.unsynced.get(name)
                if entry is not None and root == entry.root:
                    entry.puts[number] = answer.incarnation

    async def _call(self, number: ServerNumber, message: HaveBlocks) -> object:
        server = self._shared.servers.get(number)
        try:
            answer, _ = await (await server.peer()).call(message, deadline_s=SYNC_TIMEOUT_S)
        except ReplicaError as error:
            server.failed(error)
            return None
        return answer

    async def _put_again(self, file: File, name: BlockName, entry: Unsynced) -> None:
        """Read the block from a replica and store it, synced, where it is missing."""
        memory = self._shared.pool.take(entry.length)
        data = memoryview(memory)[: entry.length]
        pages = page_count(entry.length, self._shared.volume.page_size)
        try:
            await self._fetcher.fetch(BlockRef(*name, entry.length, entry.root), 0, pages, data)
        except AllReplicasFailed:
            await self._check_named(file, name, entry)
            return
        targets = [
            server
            for server in self._shared.known(self._shared.row(name[0]))
            if server not in entry.puts and server not in entry.synced
        ]
        puts: list[Awaitable[None]] = [self._put_synced(server, file, name, entry, data) for server in targets]
        # The memory is left to the collector: a put that failed may still have its bytes in a connection's buffers.
        await asyncio.gather(*puts)

    async def _put_synced(
        self, number: ServerNumber, file: File, name: BlockName, entry: Unsynced, data: memoryview
    ) -> None:
        message = PutBlock(*name, file.inode, entry.slot, entry.root, sync=True)
        server = self._shared.servers.get(number)
        try:
            timeout_s = self._shared.options.put_timeout_s
            answer, _ = await (await server.peer()).call(message, [data], deadline_s=timeout_s)
        except ReplicaError as error:
            server.failed(error)
            log.warning("put failed", server=number, block=name[1], reason=str(error))
            return
        if isinstance(answer, Stored):
            entry.synced.add(number)
            self._clear_if_durable(file, name, entry)

    async def _check_named(self, file: File, name: BlockName, entry: Unsynced) -> None:
        """No server has the block: right if nothing names it any more. Else its loss is for the caller to tell."""
        try:
            answer = await self._shared.session.query(GetExtents(file.inode, entry.slot, 1), Extents)
        except OperationError:
            answer = None
        named = {(e.partition, e.block) for each in (answer.slots if answer else ()) for e in each.extents}
        if name not in named:
            # For good: a power cut must not bring back metadata that names it.
            await self.sync_log()
            file.unsynced.pop(name, None)
        elif all(self._shared.servers.is_up(server) for server in self._shared.row(name[0])):
            file.unsynced.pop(name, None)
            error = MendfsError(f"block {name[1]:#x} of inode {file.inode} was lost before it was durable")
            log.error("written data lost", inode=file.inode, slot=entry.slot, reason=str(error))
            # Kept for the file's next call, for it may be the background that has found out.
            file.errors.append(error)

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()
