"""Changes whose time is up, or whose caller was interrupted: they may yet be made, and must undo nothing later."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from mendfs.client import session as sessions
from mendfs.client.commits import drained
from mendfs.client.exclusive import Caller, exclusively
from mendfs.client.files import File, Generation
from mendfs.client.slot_buffer import SlotBuffer
from mendfs.client.space import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE
from mendfs.client.tasks import Tasks
from mendfs.client.volume import OpenFile, Volume
from mendfs.errors import DeadlineExceeded, MendfsError, NotReady
from mendfs.model import Inode, Slot
from mendfs.wire.messages.meta import Commit, Punch, SetAttributes
from mendfs.world.buffers import BufferPool
from tests.unit.client_tools import Cluster, cluster, contents, read_all, until, write_file

PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


class Held:
    """The first request of a kind is not taken, however often it is repeated, before it is let go."""

    def __init__(self, c: Cluster, kind: type) -> None:
        self.asked = 0
        self.is_let_go = False
        self._at: Any = None
        self._real = c.meta._handlers[kind]
        c.meta._handlers[kind] = self._handle

    async def _handle(self, peer: Any, request: Any) -> Any:
        if self._at is None:
            self._at = request.at
        if request.at == self._at and not self.is_let_go:
            self.asked += 1
            raise NotReady("held")
        return await self._real(peer, request)


async def settled(volume: Volume) -> None:
    """Until no change of the client is under way."""
    await until(lambda: len(volume._shared.session._free_slots) == sessions.REQUEST_SLOTS)


async def interrupted(call: "asyncio.Task[Any]", held: Held) -> None:
    """Interrupt a call whose request is held: it returns at once."""
    await until(lambda: held.asked > 0)
    call.cancel()
    async with asyncio.timeout(1):
        await asyncio.wait([call])
    assert call.cancelled() and not held.is_let_go


async def write_and_flush(file: OpenFile, data: bytes) -> None:
    await file.write(data, 0)
    await file.flush()


@asynccontextmanager
async def one_file(data: bytes, **options: Any) -> AsyncIterator[tuple[Cluster, Volume, OpenFile]]:
    async with cluster() as c:
        volume = await c.client(**options)
        file = await write_file(volume, b"f", data)
        await file.flush()
        yield c, volume, file


@pytest.mark.parametrize("kind", [SetAttributes, Punch])
async def test_what_is_written_after_an_interrupted_cut_is_not_destroyed_by_it(kind: type) -> None:
    async with one_file(b"old" * 100) as (c, volume, file):
        held = Held(c, kind)
        cut = volume.set_attributes(file.inode, size=0) if kind is SetAttributes else file.allocate(PUNCH, 0, 300)
        await interrupted(asyncio.create_task(cut), held)
        writing = asyncio.create_task(write_and_flush(file, b"new"))
        seen = held.asked
        await until(lambda: writing.done() or held.asked > seen + 2)
        held.is_let_go = True
        async with asyncio.timeout(5):
            await writing
        await settled(volume)
        assert (await contents(volume, file.inode))[:3] == b"new"
        assert (await contents(await c.client(), file.inode))[:3] == b"new"


async def test_what_is_written_after_a_cut_whose_time_was_up_is_not_destroyed_by_it() -> None:
    async with one_file(b"old" * 100, meta_timeout_s=0.3) as (c, volume, file):
        held = Held(c, SetAttributes)
        with pytest.raises(DeadlineExceeded):
            await volume.set_attributes(file.inode, size=0)
        writing = asyncio.create_task(write_and_flush(file, b"new"))
        seen = held.asked
        await until(lambda: writing.done() or held.asked > seen + 2)
        held.is_let_go = True
        async with asyncio.timeout(5):
            await writing
        await settled(volume)
        assert await contents(await c.client(), file.inode) == b"new"


async def test_an_interrupted_cut_that_was_made_is_seen_by_the_same_mount() -> None:
    """Neither what is cached nor what waits to be committed may bring back the bytes behind it."""
    async with one_file(b"old" * 100) as (c, volume, file):
        await read_all(file)
        await file.write(b"dirty" * 100, 0)
        held = Held(c, SetAttributes)
        await interrupted(asyncio.create_task(volume.set_attributes(file.inode, size=10)), held)
        held.is_let_go = True
        await settled(volume)
        await until(lambda: not file._file.lock.locked())
        assert await read_all(file) == b"dirtydirty"
        await file.flush()
        assert await contents(volume, file.inode) == b"dirtydirty"
        assert await contents(await c.client(), file.inode) == b"dirtydirty"


async def test_a_cut_that_was_interrupted_before_it_set_out_is_not_made() -> None:
    async with one_file(b"old") as (c, volume, file):
        held = Held(c, SetAttributes)
        first = asyncio.create_task(volume.set_attributes(file.inode, size=2))
        await until(lambda: held.asked > 0)
        second = asyncio.create_task(volume.set_attributes(file.inode, size=0))
        await asyncio.wait([second], timeout=0)
        second.cancel()
        await asyncio.wait([second])
        held.is_let_go = True
        await first
        await file.flush()
        assert await contents(await c.client(), file.inode) == b"ol"


async def test_an_interrupted_opening_that_truncates_returns_at_once() -> None:
    async with one_file(b"old") as (c, volume, file):
        held = Held(c, SetAttributes)
        opening = asyncio.create_task(volume.open_file(file.inode, flags=os.O_RDWR | os.O_TRUNC))
        await interrupted(opening, held)
        held.is_let_go = True
        await settled(volume)
        await until(lambda: not file._file.lock.locked())
        assert await read_all(file) == b""


async def test_a_commit_whose_time_was_up_gives_its_ids_back_and_undoes_nothing_later() -> None:
    async with one_file(b"old", write_timeout_s=0.5) as (c, volume, file):
        held = Held(c, Commit)
        with pytest.raises(MendfsError):
            await write_and_flush(file, b"lost")
        assert volume._shared.blocks._in_flight
        writing = asyncio.create_task(write_and_flush(file, b"new!"))
        seen = held.asked
        await until(lambda: writing.done() or held.asked > seen + 1)
        held.is_let_go = True
        async with asyncio.timeout(5):
            await writing
        await settled(volume)
        assert not volume._shared.blocks._in_flight
        assert await contents(await c.client(), file.inode) == b"new!"


async def test_a_commit_that_was_made_after_its_time_is_read_by_the_same_mount() -> None:
    async with one_file(b"old", write_timeout_s=0.3) as (c, volume, file):
        held = Held(c, Commit)
        with pytest.raises(MendfsError):
            await write_and_flush(file, b"late")
        assert await read_all(file) == b"old"
        held.is_let_go = True
        await settled(volume)
        await until(lambda: not file._file.is_committing)
        assert await read_all(file) == b"late"
        assert not volume._shared.blocks._in_flight
        # It is committed and not durable: the next fsync covers it.
        await file.fsync()
        for store in c.stores:
            store.lose_unsynced()
        assert await contents(await c.client(), file.inode) == b"late"


async def test_who_comes_after_a_commit_that_is_not_answered_has_a_deadline_too() -> None:
    async with one_file(b"old", write_timeout_s=0.3) as (c, volume, file):
        held = Held(c, Commit)
        for data in (b"lost", b"this too"):
            with pytest.raises(MendfsError):
                async with asyncio.timeout(5):
                    await write_and_flush(file, data)
        async with asyncio.timeout(5):
            with pytest.raises(DeadlineExceeded):
                await volume.set_attributes(file.inode, size=0)
        held.is_let_go = True
        await settled(volume)
        await until(lambda: not file._file.is_committing)
        await volume.set_attributes(file.inode, size=0)
        assert not volume._shared.blocks._in_flight


async def test_an_append_whose_time_was_up_gives_its_ids_back() -> None:
    async with one_file(b"old", write_timeout_s=0.3) as (c, volume, file):
        held = Held(c, Commit)
        appending = await volume.open_file(file.inode, flags=os.O_WRONLY | os.O_APPEND)
        with pytest.raises(DeadlineExceeded):
            await appending.write(b"late", 0)
        assert volume._shared.blocks._in_flight
        held.is_let_go = True
        await settled(volume)
        await until(lambda: not file._file.lock.locked())
        assert not volume._shared.blocks._in_flight
        assert await read_all(file) == b"oldlate"
        await appending.write(b"!", 0)
        assert await contents(await c.client(), file.inode) == b"oldlate!"


async def test_what_sets_out_while_a_commit_is_not_answered_is_waited_for_too() -> None:
    """A slot that was held back for a merge: its bytes must not pass the truncation that waits."""
    file = File(Inode(2))
    file.is_committing = True
    waiting = asyncio.create_task(drained(file, None))
    await asyncio.wait([waiting], timeout=0)
    file.frozen[Slot(0)] = Generation(SlotBuffer(Slot(0), 4096, BufferPool()))
    file.is_committing = False
    file.changes.notify()
    for _ in range(5):
        await asyncio.wait([waiting], timeout=0)
    assert not waiting.done()
    file.frozen.clear()
    file.changes.notify()
    async with asyncio.timeout(1):
        await waiting


async def test_the_kernel_does_not_keep_what_it_read_before_a_late_commit_was_made() -> None:
    async with one_file(b"old", write_timeout_s=0.3) as (c, volume, file):
        held = Held(c, Commit)
        with pytest.raises(MendfsError):
            await write_and_flush(file, b"late")
        assert await read_all(file) == b"old"
        held.is_let_go = True
        await settled(volume)
        await until(lambda: not file._file.is_committing)
        again = await volume.open_file(file.inode, flags=os.O_RDONLY)
        assert not again.keep_cache
        await again.release()


async def test_an_opening_that_was_interrupted_before_its_truncation_set_out_destroys_nothing() -> None:
    async with one_file(b"old") as (c, volume, file):
        held = Held(c, SetAttributes)
        first = asyncio.create_task(volume.set_attributes(file.inode, size=2))
        await until(lambda: held.asked > 0)
        opening = asyncio.create_task(volume.open_file(file.inode, flags=os.O_RDWR | os.O_TRUNC))
        await asyncio.wait([opening], timeout=0)
        opening.cancel()
        await asyncio.wait([opening])
        held.is_let_go = True
        await first
        await settled(volume)
        await until(lambda: not file._file.lock.locked())
        assert await contents(await c.client(), file.inode) == b"ol"


async def test_who_comes_just_as_the_lock_is_handed_on_has_a_deadline_too() -> None:
    file = File(Inode(2))
    await file.take_lock(None)
    next_one = asyncio.create_task(file.take_lock(None))
    await asyncio.wait([next_one], timeout=0)
    file.lock.release()
    with pytest.raises(DeadlineExceeded):
        async with asyncio.timeout(5):
            await file.take_lock(0.01)
    assert next_one.done()


async def test_a_file_that_cannot_be_flushed_keeps_no_other_from_being_flushed() -> None:
    async with cluster() as c:
        volume = await c.client(write_timeout_s=0.2, flush_after_s=1000.0)
        stuck, other = await write_file(volume, b"stuck", b"a"), await write_file(volume, b"other", b"b")
        await stuck._file.take_lock(None)
        await other._file.take_lock(None)
        flushing = asyncio.create_task(volume._writer.flush_everything())
        await asyncio.wait([flushing], timeout=0)
        other._file.lock.release()
        with pytest.raises(DeadlineExceeded):
            await flushing
        assert not other._file.is_dirty
        stuck._file.lock.release()


async def test_a_commit_without_a_deadline_is_not_given_up_after_the_hour_that_stands_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sessions, "BACKOFF_MAX_S", 0.01)
    async with one_file(b"old") as (c, volume, file):
        session, late = volume._shared.session, [DeadlineExceeded("an hour is over")]
        real = session._call

        async def call(peer: Any, message: Any, deadline_s: float) -> object:
            if isinstance(message, Commit) and late:
                raise late.pop()
            return await real(peer, message, deadline_s)

        monkeypatch.setattr(session, "_call", call)
        await write_and_flush(file, b"new")
        assert not late
        assert await contents(await c.client(), file.inode) == b"new"


async def test_a_change_that_was_ended_before_it_began_gives_the_lock_back() -> None:
    class Closing(Tasks):
        def spawn(self, work: Any, *, is_awaited: bool = False) -> "asyncio.Task[Any]":
            task = super().spawn(work, is_awaited=is_awaited)
            task.cancel()
            return task

    async def change(caller: Caller[None]) -> None:
        raise AssertionError("it is not begun")

    file = File(Inode(2))
    shared: Any = SimpleNamespace(tasks=Closing(), options=SimpleNamespace(write_timeout_s=None))
    with pytest.raises(asyncio.CancelledError):
        await exclusively(shared, file, change)
    assert not file.lock.locked()
