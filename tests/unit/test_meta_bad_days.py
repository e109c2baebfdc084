"""What a meta server does when its engine fails it: the seam `kv.engine`, with a disk that does not do as told."""

import asyncio
import errno
import stat
from collections.abc import Mapping
from typing import get_args

import pytest

from mendfs.client.volume import Volume
from mendfs.errors import EngineFailed, EngineUnreadable, MendfsError, OperationError
from mendfs.kv.memory import MemoryEngine
from mendfs.kv.optimistic import Pairs
from mendfs.meta import background, members
from mendfs.meta.room import BUFFER_MAX, BUFFER_MIN, Room, write_buffer_bytes
from mendfs.meta.server import ROOM_NEEDED
from mendfs.model import GiB, Inode, MiB
from mendfs.wire.messages.meta import GetStatus, MetaMessage, StatusReport
from tests.unit.client_tools import cluster, contents, until, write_file


class BadEngine(MemoryEngine):
    """Its disk fails, hangs or has rotten places, as the test says."""

    sync_error = ""
    hangs: asyncio.Event | None = None
    rotten = b"never"

    async def sync_log(self) -> None:
        if self.hangs is not None:
            await self.hangs.wait()
        if self.sync_error:
            raise EngineFailed(self.sync_error)

    def read_range(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> Pairs:
        if begin.startswith(self.rotten):
            raise EngineUnreadable("the database cannot be read: Corruption: block checksum mismatch")
        return super().read_range(begin, end, limit, reverse)

    def restarted(self, at: "BadEngine") -> "BadEngine":
        """What the disk held at `at`."""
        self._values, self._keys = dict(at._values), sorted(at._values)
        self._last = self._synced = at._last
        return self


async def status(volume: Volume) -> Mapping[str, object]:
    return (await volume._shared.session.query(GetStatus(), StatusReport)).document


async def test_a_failed_sync_stops_the_server_and_clients_go_on_with_the_next_one() -> None:
    """What was not synced is lost: the fsync that waited says so, and nobody is told a lie afterwards."""
    engine = BadEngine()
    async with cluster(engine=engine) as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"durable")
        await file.fsync()
        synced = BadEngine().restarted(engine)
        await file.write(b"LOST", 0)
        await file.flush()
        engine.sync_error = "the log cannot be synced: Input/output error"
        waiting = asyncio.create_task(file.fsync())
        error = await asyncio.wait_for(asyncio.shield(c.meta.state.failed), 10)
        assert "Input/output error" in str(error)
        # Until its process has ended, whoever asks is told why.
        with pytest.raises(EngineFailed, match="the meta server stopped: the log cannot be synced"):
            await c.meta.handle(next(iter(c.meta._server.peers)), GetStatus(), None)  # type: ignore[union-attr]
        await c.meta.close()
        generation = c.meta.state.generation
        c.engine = BadEngine().restarted(synced)
        await c.start_meta()
        assert c.meta.state.generation == generation + 1
        with pytest.raises(MendfsError, match="not synced are lost"):
            await asyncio.wait_for(waiting, 15)
        await file.fsync()
        assert await contents(volume, file.inode) == b"durable"
        await file.write(b"again", 0)
        await file.fsync()


async def test_metadata_that_cannot_be_read_fails_only_who_asks_for_it() -> None:
    """One rotten block of a table must not take the whole volume away."""
    engine = BadEngine()
    async with cluster(engine=engine) as c:
        volume = await c.client()
        await write_file(volume, b"f", b"x")
        rotten = await volume.make(Inode(1), b"d", stat.S_IFDIR | 0o755, uid=0, gid=0)
        engine.rotten = b"d" + rotten.inode.to_bytes(8, "big")
        with pytest.raises(MendfsError, match="cannot be read") as failure:
            await volume.list_directory(rotten.inode, b"", 10, False)
        assert failure.value.errno == errno.EIO
        assert len((await volume.list_directory(Inode(1), b"", 10, False)).entries) == 2
        document = await status(volume)
        assert document["health"] == "at-risk"
        assert "block checksum mismatch" in str(document["troubles"])
        assert not c.meta.state.failed.done()


async def test_freeing_that_meets_unreadable_metadata_waits_and_the_server_goes_on() -> None:
    engine = BadEngine()
    async with cluster(engine=engine) as c:
        engine.rotten = b"f"
        c.meta.state.work.set()
        await until(lambda: "unreadable" in c.meta.state.troubles)
        await write_file(await c.client(), b"f", b"x")
        assert not c.meta.state.failed.done()


async def test_a_hung_sync_is_told_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "DISK_STUCK_S", 0.3)
    engine = BadEngine()
    async with cluster(engine=engine) as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"x")
        await file.flush()
        engine.hangs = asyncio.Event()
        waiting = asyncio.create_task(file.fsync())
        await until(lambda: "sync" in c.meta.state.troubles)
        assert "the disk under the meta server does not answer" in str((await status(volume))["troubles"])
        assert not waiting.done()
        engine.hangs.set()
        engine.hangs = None
        await asyncio.wait_for(waiting, 10)
        await until(lambda: "sync" not in c.meta.state.troubles)
    assert members.DISK_STUCK_S > 1


def test_room_is_kept_back_for_removals() -> None:
    room = Room()
    room.check("grow")  # not measured yet
    assert room.trouble("/m") is None
    for total, kept_back in ((32 * MiB, 4 * MiB), (64 * MiB, 8 * MiB), (100 * GiB, 256 * MiB)):
        room.measure(kept_back, total)
        room.check("grow")
        room.measure(kept_back - 1, total)
        room.check("keep")
        with pytest.raises(OperationError) as full:
            room.check("grow")
        assert full.value.errno == errno.ENOSPC
        assert "until there is room below /m" in str(room.trouble("/m"))
        room.measure(kept_back // 4 - 1, total)
        with pytest.raises(OperationError):
            room.check("keep")
        room.check("remove")
        # Two buffers as logs and as tables fit in what is kept back.
        assert 4 * write_buffer_bytes(total) <= kept_back
    assert write_buffer_bytes(1) == BUFFER_MIN
    assert write_buffer_bytes(1 << 50) == BUFFER_MAX


def test_every_change_says_what_it_needs_of_the_disk() -> None:
    """One that did not failed with a KeyError for whoever asked for it."""
    changes = {kind for kind in get_args(MetaMessage) if "at" in kind.__struct_fields__}
    assert set(ROOM_NEEDED) == changes
