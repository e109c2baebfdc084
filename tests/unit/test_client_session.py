"""Sessions: what a client does when connections end, answers are lost, the meta server restarts or ends its session."""

import asyncio
import os
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

from mendfs.client import session as sessions
from mendfs.errors import DeadlineExceeded, MendfsError, OperationError
from mendfs.kv.engine import Engine, Transaction
from mendfs.kv.memory import MemoryEngine
from mendfs.meta import background, freeing
from mendfs.meta.state import State
from mendfs.model import Inode, SessionId
from mendfs.wire.messages.meta import ListDirectory, Listing
from mendfs.wire.peer import connect
from tests.unit.client_tools import Cluster, Proxy, cluster, contents, read_all, until, write_file


@asynccontextmanager
async def proxied() -> AsyncIterator[tuple[Cluster, Proxy]]:
    async with cluster() as c:
        proxy = Proxy(c.meta.address)
        await proxy.start()
        try:
            yield c, proxy
        finally:
            proxy.is_refusing = proxy.is_swallowing = False
            for volume in c.clients:
                await volume.close(timeout_s=1)
            await proxy.close()


async def names(c: Cluster) -> list[bytes]:
    session = (await c.client())._shared.session
    listing = await session.query(ListDirectory(Inode(1), b"", 100, False), Listing)
    return [entry.name for entry in listing.entries]


async def test_a_change_whose_answer_was_lost_is_done_once() -> None:
    """The repeated Make must be answered with what the first one did, not with EEXIST."""
    async with proxied() as (c, proxy):
        volume = await c.client(proxy.address)
        await volume.make(Inode(1), b"before", stat.S_IFREG | 0o644, uid=0, gid=0)
        proxy.is_swallowing = True
        made = asyncio.create_task(volume.make(Inode(1), b"f", stat.S_IFREG | 0o644, uid=0, gid=0))
        async with asyncio.timeout(5):
            while b"f" not in await names(c):
                await asyncio.sleep(0.02)
        assert not made.done()
        proxy.cut()
        proxy.is_swallowing = False
        async with asyncio.timeout(5):
            attributes = await made
        assert (await volume.lookup(Inode(1), b"f")).inode == attributes.inode


async def test_many_changes_survive_many_cuts() -> None:
    async with proxied() as (c, proxy):
        volume = await c.client(proxy.address)

        async def make(number: int) -> None:
            await volume.make(Inode(1), b"%d" % number, stat.S_IFREG | 0o644, uid=0, gid=0)

        work = asyncio.gather(*[make(number) for number in range(200)])
        for _ in range(6):
            await asyncio.sleep(0.03)
            proxy.cut()
        async with asyncio.timeout(20):
            await work
        assert len(await volume_names(c)) == 200


async def volume_names(c: Cluster) -> set[bytes]:
    session = (await c.client())._shared.session
    found: set[bytes] = set()
    after = b""
    while True:
        listing = await session.query(ListDirectory(Inode(1), after, 100, False), Listing)
        found.update(entry.name for entry in listing.entries)
        if listing.complete:
            return found
        after = listing.entries[-1].name


async def test_writing_goes_on_through_a_restart_of_the_meta_server() -> None:
    async with cluster() as c:
        volume = await c.client()
        data = os.urandom(200_000)
        file = await write_file(volume, b"f", data)
        await file.flush()
        await file.write(b"more", len(data))
        engine = c.engine
        await c.meta._server.close()  # type: ignore[union-attr]  # it is running
        assert c.meta._loops is not None
        c.meta._loops.cancel()
        flush = asyncio.create_task(file.flush())
        await asyncio.sleep(0.1)
        assert not flush.done()
        c.engine = engine
        await c.start_meta()
        async with asyncio.timeout(15):
            await flush
        assert await contents(await c.client(), file.inode) == data + b"more"


async def test_a_lost_session_is_told_to_files_with_uncommitted_data_and_replaced() -> None:
    async with cluster() as c:
        volume = await c.client()
        dirty = await write_file(volume, b"dirty", b"x" * 1000)
        clean = await write_file(volume, b"clean", b"y" * 1000)
        await clean.flush()
        for session in c.meta.state.sessions.all():
            await background.close_session(c.meta.state, session)
        first_id = volume._shared.session._id
        with pytest.raises(MendfsError):
            await volume.make(Inode(1), b"uncertain", stat.S_IFREG | 0o644, uid=0, gid=0)
        async with asyncio.timeout(10):
            with pytest.raises(MendfsError):
                await dirty.flush()
            await dirty.flush()
            await dirty.write(b"again", 0)
            await dirty.flush()
        assert volume._shared.session._id != first_id
        assert await read_all(clean) == b"y" * 1000
        await clean.write(b"z", 0)
        await clean.fsync()
        assert await contents(await c.client(), dirty.inode) == b"again"
        # What was open is open in the new session too.
        await until(lambda: any(clean.inode in session.opens for session in c.meta.state.sessions.all()))


async def test_a_call_gives_up_after_its_deadline_and_its_slot_is_used_again_only_when_answered() -> None:
    async with proxied() as (c, proxy):
        volume = await c.client(proxy.address, meta_timeout_s=0.5)
        await volume.make(Inode(1), b"a", stat.S_IFREG | 0o644, uid=0, gid=0)
        session = volume._shared.session
        assert len(session._free_slots) == sessions.REQUEST_SLOTS
        proxy.is_swallowing = True
        with pytest.raises(DeadlineExceeded):
            await volume.make(Inode(1), b"b", stat.S_IFREG | 0o644, uid=0, gid=0)
        assert len(session._free_slots) == sessions.REQUEST_SLOTS - 1
        proxy.is_swallowing = False
        proxy.cut()
        await until(lambda: len(session._free_slots) == sessions.REQUEST_SLOTS)
        with pytest.raises(OperationError):
            await volume.make(Inode(1), b"b", stat.S_IFREG | 0o644, uid=0, gid=0)


async def test_a_cancelled_change_does_not_lose_its_place() -> None:
    async with proxied() as (c, proxy):
        volume = await c.client(proxy.address)
        await volume.make(Inode(1), b"a", stat.S_IFREG | 0o644, uid=0, gid=0)
        proxy.is_swallowing = True
        made = asyncio.create_task(volume.make(Inode(1), b"b", stat.S_IFREG | 0o644, uid=0, gid=0))
        await asyncio.sleep(0.1)
        made.cancel()
        await asyncio.wait([made])
        proxy.is_swallowing = False
        proxy.cut()
        session = volume._shared.session
        await until(lambda: len(session._free_slots) == sessions.REQUEST_SLOTS)
        assert set(await names(c)) == {b"a", b"b"}


async def test_a_connection_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A half-open connection: renewals notice it, and everything waiting goes over a new one."""
    monkeypatch.setattr(sessions, "RENEW_EVERY_S", 0.1)
    monkeypatch.setattr(sessions, "RENEW_TIMEOUT_S", 0.3)
    async with proxied() as (c, proxy):
        volume = await c.client(proxy.address)
        await volume.attributes(Inode(1))
        monkeypatch.setattr(sessions, "HANDSHAKE_TIMEOUT_S", 0.5)  # the second connection may say nothing either
        proxy.is_swallowing = True
        asked = asyncio.create_task(volume.attributes(Inode(1)))
        await until(lambda: proxy.connections >= 2)
        proxy.is_swallowing = False
        async with asyncio.timeout(10):
            await asked


async def test_closed_files_are_told_to_the_meta_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "RENEW_EVERY_S", 0.1)
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"x")
        (session,) = c.meta.state.sessions.all()
        assert file.inode in session.opens
        await file.release()
        await until(lambda: file.inode not in session.opens)
        unlinked = await write_file(volume, b"g", b"x")
        await volume.unlink(Inode(1), b"g")
        assert (await volume.attributes(unlinked.inode)).nlink == 0
        await unlinked.release()
        await until(lambda: unlinked.inode not in session.opens)


async def stop_meta(c: Cluster) -> None:
    """As kill -9 would, but for the engine, which the test goes on with."""
    await c.meta._server.close()  # type: ignore[union-attr]  # it is running
    assert c.meta._loops is not None
    c.meta._loops.cancel()


def forgetful(engine: Engine) -> Callable[[], MemoryEngine]:
    """What the engine's log holds on the disk now; call it for an engine that a power cut has left with just that."""
    assert isinstance(engine, MemoryEngine)
    values, last = dict(engine._values), engine._last

    def cut() -> MemoryEngine:
        left = MemoryEngine()
        left._values, left._keys, left._last, left._synced = values, sorted(values), last, last
        return left

    return cut


@pytest.mark.parametrize("later_commits", [0, 5])
async def test_after_the_meta_server_lost_changes_files_that_lost_some_say_so(later_commits: int) -> None:
    """Raising the generation is a commit too, and others commit: sequences alone do not show that some were lost."""
    async with cluster() as c:
        volume, other = await c.client(), await c.client()
        kept = await write_file(volume, b"kept", b"x" * 10)
        await kept.fsync()
        lossy = await write_file(volume, b"lossy", b"x" * 10)
        await lossy.fsync()
        made = await other.make(Inode(1), b"other", stat.S_IFDIR | 0o755, uid=0, gid=0)
        cut = forgetful(c.engine)
        await lossy.write(b"lost", 3)
        await lossy.flush()
        await stop_meta(c)
        c.engine = cut()
        await c.start_meta()
        for number in range(later_commits):
            await other.make(made.inode, b"%d" % number, stat.S_IFDIR | 0o755, uid=0, gid=0)
        await volume.attributes(Inode(1))
        with pytest.raises(MendfsError, match="changes of this file that were not synced are lost"):
            await lossy.fsync()
        await lossy.fsync()
        await kept.fsync()
        with pytest.raises(MendfsError, match="changes that were not synced are lost"):
            await volume.sync()
        await volume.sync()
        assert await contents(volume, lossy.inode) == b"x" * 10


async def test_what_survived_of_a_file_that_lost_changes_is_still_made_durable_by_its_fsync() -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"file", b"x" * 10)
        await file.flush()
        cut = forgetful(c.engine)
        await file.write(b"lost", c.volume.block_size)
        await file.flush()
        await stop_meta(c)
        c.engine = cut()
        await c.start_meta()
        await volume.attributes(Inode(1))
        with pytest.raises(MendfsError, match="changes of this file that were not synced are lost"):
            await file.fsync()
        await file.fsync()
        for store in c.stores:
            store.lose_unsynced()
        assert await contents(volume, file.inode) == b"x" * 10


async def test_an_unforeseen_error_while_reconnecting_does_not_leave_callers_waiting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As when the event loop raised a ValueError for a connection that ended at once: the mount hung for ever."""
    async with proxied() as (c, proxy):
        volume = await c.client(proxy.address)
        real, failures = connect, 0

        async def breaks_once(*args: object, **kwargs: object) -> object:
            nonlocal failures
            failures += 1
            if failures == 1:
                raise RuntimeError("unforeseen")
            return await real(*args, **kwargs)  # type: ignore[arg-type]

        monkeypatch.setattr(sessions, "connect", breaks_once)
        proxy.cut()
        async with asyncio.timeout(10):
            await volume.make(Inode(1), b"after", stat.S_IFREG | 0o644, uid=0, gid=0)
        assert failures >= 2


async def test_who_unlinks_what_is_just_being_reclaimed_sees_that_it_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"data")
        await file.flush()
        openers: list[tuple[SessionId, ...]] = []
        real = freeing.reclaim_unlinked

        async def reclaim_unlinked(tx: Transaction, session: SessionId, inodes: tuple[Inode, ...]) -> None:
            openers.append(c.meta.state.sessions.of(file.inode))
            await real(tx, session, inodes)

        monkeypatch.setattr(freeing, "reclaim_unlinked", reclaim_unlinked)
        await c.meta._server.close()  # type: ignore[union-attr]  # it is running
        assert c.meta._loops is not None
        c.meta._loops.cancel()
        await c.start_meta()
        await until(lambda: bool(openers))
        assert all(openers)


async def freeing_looks_at_everything(c: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until a pass that begins after now has ended."""
    passes = 0
    real = background.free_once

    async def free_once(state: State) -> bool:
        nonlocal passes
        again = await real(state)
        passes += 1
        return again

    monkeypatch.setattr(background, "free_once", free_once)
    c.meta.state.work.set()
    await until(lambda: passes > 0)


async def test_a_file_that_was_unlinked_before_the_answer_to_its_making_came_lives_as_long_as_it_is_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(background, "FREE_EVERY_S", 0.01)
    async with proxied() as (c, proxy):
        volume, other = await c.client(proxy.address), await c.client()
        await volume._shared.inodes.take()
        proxy.is_swallowing = True
        making = asyncio.create_task(volume.make(Inode(1), b"f", stat.S_IFREG | 0o644, uid=0, gid=0, open=True))
        async with asyncio.timeout(10):
            while b"f" not in await names(c):
                await asyncio.sleep(0.005)
        proxy.is_refusing = True
        proxy.cut()
        await other.unlink(Inode(1), b"f")
        proxy.is_refusing = proxy.is_swallowing = False
        file = await volume.open_made(await making, flags=os.O_RDWR)
        await freeing_looks_at_everything(c, monkeypatch)
        await file.write(b"data", 0)
        await file.fsync()
        assert await read_all(file) == b"data"
        await file.release()
