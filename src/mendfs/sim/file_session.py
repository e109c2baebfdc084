"""Sessions on files: a client opens one, reads, writes, truncates, syncs and closes it, and the model follows.

One session works on a file at a time. What was only written is certain to its own client; a close makes it certain to
all, a sync durable; an error or a death leaves open what has happened.
"""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from typing import Any

from mendfs.client.space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE
from mendfs.client.volume import OpenFile, Volume
from mendfs.model import CommitSequence, Inode
from mendfs.sim.driver import Outcome
from mendfs.sim.loop import Process
from mendfs.sim.machines import ClientMachine
from mendfs.sim.model import FILE_BYTES_MAX, Content, Event, FileState
from mendfs.sim.workload import Workload

PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
ZERO = FALLOC_FL_ZERO_RANGE
ZERO_INSIDE = FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE
WRITE_BYTES_MAX = 20_000
STALE = b"\xaa"
"""What memory holds that nobody has written to: a read must fill all that it answers for."""
READ_AGAIN_TIMES = 6
READ_AGAIN_S = 15.0
"""Between tries to read what could not be read: faults last 30 s at most, and rarely is everything broken at once."""


async def files_actor(workload: Workload) -> None:
    """Sessions on files: open, read, write, truncate, sync, close."""
    while not workload.is_over:
        await asyncio.sleep(workload.rng.expovariate(0.35))
        name = workload.rng.choice(workload.names)
        async with workload.lock(name):
            file = name.value.file
            if name.candidates or file is None or not file.inode or not workload.is_settled(name):
                continue
            # By its inode from here on: the name may go its way, and an unlinked file lives while it is open.
            client = workload.client()
            async with workload.lock(file):
                if workload.is_settled(file):
                    await _session(workload, client, file)
                if workload.rng.random() < 0.2 and not file.is_unsure:
                    # Closed: whoever opens it next sees that, whatever they have cached of it.
                    await workload.check_content(workload.client(), file, adopt=False)


async def _session(workload: Workload, client: ClientMachine, file: FileState) -> None:
    if file.is_unsure and not await workload.check_content(client, file, adopt=True):
        return
    session = FileSession(workload, client, file)
    await session.run()


class FileSession:
    """One client's work on one file, from open to close."""

    def __init__(self, workload: Workload, client: ClientMachine, file: FileState) -> None:
        self._workload = workload
        self._client = client
        self._file = file
        self._rng = workload.rng
        self._written: list[Event] = []
        """Answered, but not yet by a flush."""
        self._losses = workload.meta_losses
        self._server_losses = workload.server_losses
        self._had_error = False
        self._uses_size = False
        """It has appended or allocated."""
        self._doubts: list[str] = []
        """Reads that were wrong, unless the next write, fsync or close tells of a write that was lost before them."""
        self._answered = 0
        """Operations on names that had been answered when this session last began to write."""
        self._life: Process | None = None

    async def _call(self, what: str, work: Callable[[Volume], Awaitable[Any]]) -> Outcome:
        return await self._workload.call(self._client, f"{what} {self._file.label}", work, self._life)

    async def run(self) -> None:
        """Open, a few steps, close."""
        await self._workload.driver.ready(self._client)
        self._life = self._client.process
        append = self._uses_size = self._rng.random() < 0.15
        flags = os.O_RDWR | (os.O_APPEND if append else 0)
        if self._rng.random() < 0.07:
            flags |= os.O_TRUNC
            self._written.append(Event(self._client.name, 0, None))
        what = "open and empty" if flags & os.O_TRUNC else "open"
        outcome = await self._call(what, lambda volume: volume.open_file(Inode(self._file.inode), flags=flags))
        if not outcome.is_ok:
            if flags & os.O_TRUNC:
                self._uncertain()
            if outcome.errno and self._losses == self._workload.meta_losses:
                self._workload.driver.violation(f"open of {self._file.label}: {outcome}")
            return
        opened: OpenFile = outcome.value
        alive = True
        for _ in range(self._rng.randrange(1, 6)):
            alive = await self._step(opened, append=append)
            if not alive or self._had_error:
                break
            if self._rng.random() < 0.3:
                await asyncio.sleep(self._rng.expovariate(1.5))
        if alive:
            alive = await self._close(opened)
        if not alive or self._had_error:
            self._uncertain()
        elif self._doubts:
            self._workload.driver.violation(self._doubts[0])

    def _is_disturbed(self) -> bool:
        """Whether the meta server lost something since this session was sure of all."""
        return self._losses != self._workload.meta_losses

    def _uncertain(self) -> None:
        for event in self._written:
            self._file.happened(event, is_certain=False)
        # What depended on the size when the meta server lost something was done with the size of that moment.
        self._file.is_beyond_knowing |= self._uses_size and self._is_disturbed() and bool(self._written)
        self._written = []
        self._file.is_unsure = True
        self._workload.leave_alone(self._file)

    async def _step(self, opened: OpenFile, *, append: bool) -> bool:
        match self._rng.choices(
            ["write", "read", "truncate", "fsync", "allocate", "seek", "stat", "beside", "hurry"],
            [6, 4, 1, 2, 1.5, 0.7, 0.5, 0.5, 0 if append else 1],
        )[0]:
            case "write":
                return await self._write(opened, append=append)
            case "read":
                return await self._read(opened)
            case "truncate":
                return await self._truncate()
            case "allocate":
                return await self._allocate(opened)
            case "seek":
                return await self._seek(opened)
            case "stat":
                return await self._stat()
            case "beside":
                return await self._beside()
            case "hurry":
                return await self._hurry(opened)
        return await self._fsync(opened)

    async def _write(self, opened: OpenFile, *, append: bool) -> bool:
        length = self._rng.choice([1, 100, 512, 1000, 4096, 8192, self._rng.randrange(1, WRITE_BYTES_MAX)])
        size = self._view_size()
        offset = size if append else self._rng.randrange(0, max(1, min(FILE_BYTES_MAX - WRITE_BYTES_MAX, size + 3000)))
        # Where an append goes is not known either while the meta server may have lost what the size comes from.
        if offset + length > FILE_BYTES_MAX or (append and (self._is_disturbed() or self._file.is_unsure)):
            return True
        event = Event(self._client.name, offset, self._workload.data(length))
        assert event.data is not None
        self._answered = self._workload.operations
        outcome = await self._call(f"write {length} at {offset} of", lambda _: opened.write(event.data or b"", offset))
        self._written.append(event)
        return self._continues(outcome)

    def _view(self) -> Content:
        """What this client must see."""
        view = self._file.now.copy()
        for event in self._written:
            view.apply(event, is_certain=True)
        return view

    def _doubt(self, problem: str) -> None:
        self._doubts.append(f"{self._client.name} {self._file.label}: {problem}")

    async def _allocate(self, opened: OpenFile) -> bool:
        """fallocate: room, a hole, or zeros."""
        if self._is_disturbed() or self._file.is_unsure:
            return True  # what it does depends on the size
        size = self._view_size()
        mode = self._rng.choice([0, PUNCH, ZERO, ZERO_INSIDE])
        offset = self._rng.randrange(0, max(1, min(FILE_BYTES_MAX - WRITE_BYTES_MAX, size + 3000)))
        end = min(FILE_BYTES_MAX, offset + self._rng.choice([1, 700, 4096, 8192, self._rng.randrange(1, 20_000)]))
        begin = size if mode == 0 else offset
        upto = min(end, size) if mode in (PUNCH, ZERO_INSIDE) else end
        if begin < upto:
            self._written.append(Event(self._client.name, begin, bytes(upto - begin)))
        self._uses_size = True
        self._answered = self._workload.operations
        what = f"allocate {end - offset} at {offset} with mode {mode:#x} of"
        return self._continues(await self._call(what, lambda _: opened.allocate(mode, offset, end - offset)))

    async def _seek(self, opened: OpenFile) -> bool:
        """SEEK_DATA passes nothing but zeros, SEEK_HOLE ends at a zero."""
        whence = self._rng.choice([os.SEEK_DATA, os.SEEK_HOLE])
        offset = self._rng.randrange(0, self._view_size() + 10)
        outcome = await self._call(f"seek {whence} from {offset} in", lambda _: opened.seek(offset, whence))
        is_answer = outcome.is_ok or outcome.errno == errno.ENXIO
        if not is_answer or self._is_disturbed() or self._had_error:
            return not outcome.has_died
        view = self._view()
        if view.alternatives or view.size_min != view.size_max:
            return True
        size, content = view.size_min, view.certain
        if not outcome.is_ok:
            if offset < size and (whence == os.SEEK_HOLE or any(content[offset:size])):
                self._doubt(f"seek {whence} from {offset} of {size} bytes found nothing")
            return True
        found = outcome.value
        is_right = offset <= found <= size and offset < size
        if whence == os.SEEK_DATA:
            is_right = is_right and found < size and not any(content[offset:found])
        else:
            is_right = is_right and (found == size or content[found] == 0)
        if not is_right:
            self._doubt(f"seek {whence} from {offset} of {size} bytes found {found}")
        return True

    async def _stat(self) -> bool:
        """The size, with what is not flushed."""
        outcome = await self._call("stat", lambda volume: volume.attributes(Inode(self._file.inode)))
        if outcome.is_ok and not (self._is_disturbed() or self._had_error):
            problem = self._view().problem_with_size(outcome.value.size)
            if problem is not None:
                self._doubt(problem)
        return not outcome.has_died

    async def _beside(self) -> bool:
        """Another descriptor of the same client: POSIX, so it sees what nobody has flushed."""
        outcome = await self._call(
            "open beside", lambda volume: volume.open_file(Inode(self._file.inode), flags=os.O_RDONLY)
        )
        if not outcome.is_ok:
            return not outcome.has_died
        opened: OpenFile = outcome.value
        alive = await self._read(opened)
        if alive:
            alive = not (await self._call("close beside", lambda _: opened.release())).has_died
        return alive

    async def _hurry(self, opened: OpenFile) -> bool:
        """Writes over one another, each on its way before the one before has got there: the last one counts."""
        begin = self._rng.randrange(0, max(1, min(FILE_BYTES_MAX - WRITE_BYTES_MAX, self._view_size() + 100)))
        events = []
        for _ in range(self._rng.randrange(2, 6)):
            offset, length = begin + self._rng.randrange(0, 2000), self._rng.choice([10, 1000, 9000])
            events.append(Event(self._client.name, offset, self._workload.data(length)))
        self._written += events
        self._answered = self._workload.operations
        pause_s = self._rng.choice([0.0, 0.000_5, 0.005, 0.05])

        async def work(volume: Volume) -> None:
            flushes = []
            for event in events:
                await opened.write(event.data or b"", event.offset)
                flushes.append(asyncio.get_running_loop().create_task(opened.flush()))
                await asyncio.sleep(pause_s)  # so that it sets out
            for ended in await asyncio.gather(*flushes, return_exceptions=True):
                if isinstance(ended, BaseException):
                    raise ended

        return self._continues(await self._call(f"write {len(events)} times at {begin} of", work))

    def _view_size(self) -> int:
        size = self._file.now.size_max
        for event in self._written:
            size = event.offset if event.data is None else max(size, event.range[1])
        return size

    async def _read(self, opened: OpenFile) -> bool:
        size = self._view_size()
        offset = self._rng.randrange(0, size + 1)
        length = self._rng.randrange(1, 12_000)
        buffer = bytearray(STALE * length)
        outcome = await self._call(
            f"read {length} at {offset} of", lambda _: opened.read_into(memoryview(buffer), offset)
        )
        if outcome.has_died:
            return False
        if not outcome.is_ok:
            return await self._read_again(opened, offset, min(length, max(0, size - offset)))
        if self._is_disturbed() or self._had_error:
            return True
        count = outcome.value
        view = self._view()
        wanted = max(0, min(offset + length, view.size_min) - offset)
        problem = view.problem_with(bytes(buffer[:count]), offset)
        if count < wanted or offset + count > max(view.size_max, offset):
            problem = f"{count} bytes at {offset} came, and the file has {view.size_min}"
        if problem is not None:
            self._doubts.append(f"{self._client.name} read {self._file.label}: {problem}")
        return True

    async def _read_again(self, opened: OpenFile, offset: int, length: int) -> bool:
        """A read failed. While something is broken that says nothing, but it must work again before long."""
        end = offset + length
        for _ in range(READ_AGAIN_TIMES):
            await asyncio.sleep(READ_AGAIN_S)
            outcome = await self._call(
                f"read {length} at {offset} again of", lambda _: opened.read_into(memoryview(bytearray(length)), offset)
            )
            if outcome.is_ok or outcome.has_died:
                return not outcome.has_died
        is_own_loss = self._server_losses != self._workload.server_losses and any(
            event.range[0] < end and offset < event.range[1] for event in self._written
        )
        is_excused = self._workload.may_lose_all or is_own_loss or self._file.may_be_unreadable(offset, end)
        if not (is_excused or self._is_disturbed() or self._had_error):
            self._workload.driver.violation(f"{length} bytes at {offset} of {self._file.label} cannot be read any more")
        return True

    async def _truncate(self) -> bool:
        size = self._rng.choice([0, 1, self._rng.randrange(1, 30_000)])
        outcome = await self._call(
            f"truncate to {size}", lambda volume: volume.set_attributes(Inode(self._file.inode), size=size)
        )
        self._written.append(Event(self._client.name, size, None))
        return self._continues(outcome)

    def _continues(self, outcome: Outcome) -> bool:
        if not outcome.is_ok:
            self._had_error = True
        return not outcome.has_died

    async def _fsync(self, opened: OpenFile) -> bool:
        before = self._newest_change()
        outcome = await self._call("fsync", lambda _: opened.fsync())
        if outcome.is_ok and not self._had_error:
            if not self._file.has_unsynced_of_others(self._client.name):
                self._workload.driver.sim.audit.synced(self._client.name, Inode(self._file.inode), before)
            # Whatever happened before: nobody told this descriptor of an error, so all of it is durable now.
            self._commit_written()
            self._file.synced(self._client.name)
            self._workload.driver.sim.fsynced()
            self._workload.changed(self._client.name, self._answered)
            self._workload.synced(self._client.name)
            self._losses = self._workload.meta_losses
            self._server_losses = self._workload.server_losses
        return self._continues(outcome)

    def _newest_change(self) -> CommitSequence:
        volume = self._client.volume
        return volume._durability.newest_change if volume is not None else CommitSequence(0)

    def _commit_written(self) -> None:
        for event in self._written:
            self._file.happened(event, is_certain=True)
        self._written = []

    async def _close(self, opened: OpenFile) -> bool:
        async def work(volume: Volume) -> None:
            try:
                await opened.flush()
            finally:
                await opened.release()

        outcome = await self._call("close", work)
        if outcome.is_ok and not self._had_error:
            if self._is_disturbed():
                self._uncertain()
                return True
            ranges = [event.range for event in self._written]
            self._commit_written()
            if self._server_losses != self._workload.server_losses:
                # Closed is not synced: servers that lost power meanwhile may have had what was stored before.
                self._file.unreadable += ranges
            return True
        return self._continues(outcome)
