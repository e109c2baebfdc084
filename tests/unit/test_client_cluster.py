"""Volumes on a real meta server and failing data servers: what applications see of writing, reading, and faults."""

import asyncio
import errno
import os
import random
import stat

import pytest

from mendfs.client.volume import Volume, VolumeOptions
from mendfs.errors import AllReplicasFailed, CommitRefused, MendfsError, NotAuthentic, OperationError, StoreFull
from mendfs.model import Inode
from mendfs.wire.messages import Message
from mendfs.wire.messages.meta import Commit, GetStatus, StatusReport
from mendfs.wire.peer import Peer
from tests.unit.client_tools import Cluster, cluster, contents, read_all, until, write_file


async def test_what_one_client_closed_another_reads() -> None:
    async with cluster() as c:
        writer, reader = await c.client(), await c.client()
        data = os.urandom(300_000)
        file = await write_file(writer, b"f", data)
        assert await read_all(file) == data, "unflushed writes are read back"
        await file.flush()
        await file.release()
        found = await reader.lookup(Inode(1), b"f")
        assert found.size == len(data)
        assert await contents(reader, found.inode) == data


async def test_random_writes_truncations_and_reads_agree_with_a_plain_file() -> None:
    """Two clients by turns; what is read is what a local file would have."""
    rng = random.Random(7)
    async with cluster(block_size=256, page_size=64) as c:
        first, second = await c.client(), await c.client()
        file = await write_file(first, b"f", b"")
        model = bytearray()
        for turn in range(150):
            volume = (first, second)[turn // 25 % 2]
            file = await volume.open_file(file.inode, flags=os.O_RDWR)
            for _ in range(3):
                offset, data = rng.randrange(3000), rng.randbytes(rng.randrange(1, 700))
                if rng.random() < 0.2:
                    size = rng.randrange(3000)
                    await volume.set_attributes(file.inode, size=size)
                    model[size:] = bytes(max(0, size - len(model)))
                else:
                    await file.write(data, offset)
                    model.extend(bytes(max(0, offset - len(model))))
                    model[offset : offset + len(data)] = data
                begin = rng.randrange(3500)
                buffer = bytearray(rng.randrange(1, 1500))
                count = await file.read_into(memoryview(buffer), begin)
                assert buffer[:count] == model[begin : begin + len(buffer)]
                assert (await volume.attributes(file.inode)).size == len(model)
                if rng.random() < 0.3:
                    await file.flush()
            await file.flush()
            await file.release()
        assert await contents(second, file.inode) == model


@pytest.mark.seed("C2")
@pytest.mark.seed("C4")
async def test_blocks_of_eight_bytes() -> None:
    async with cluster(block_size=8, page_size=8) as c:
        volume = await c.client()
        data = os.urandom(5003)
        file = await write_file(volume, b"f", data)
        await file.fsync()
        assert await contents(await c.client(), file.inode) == data
        slots = await volume.where(file.inode)
        assert len(slots) == 626
        first = slots[0].extents[0].extent.partition
        for number, slot in enumerate(slots):
            (extent,) = slot.extents
            assert [replica.state for replica in extent.replicas] == ["ok"] * 3
            row = [replica.server for replica in extent.replicas]
            assert row == [(first + number + k) % 4 for k in range(3)], "round robin, copies on the next servers"


@pytest.mark.seed("C10.3")
async def test_reads_and_writes_go_on_with_one_server_gone() -> None:
    async with cluster() as c:
        volume = await c.client()
        data = os.urandom(400_000)
        file = await write_file(volume, b"f", data)
        await file.flush()
        await c.stores[1].stop()
        assert await contents(await c.client(), file.inode) == data
        more = await write_file(volume, b"g", data)
        await more.fsync()
        assert await contents(await c.client(), more.inode) == data


@pytest.mark.seed("C10.2")
async def test_with_w_equal_r_a_write_waits_until_the_server_is_back() -> None:
    async with cluster(write_quorum=3) as c:
        volume = await c.client()
        await c.stores[0].stop()
        file = await write_file(volume, b"f", os.urandom(300_000))
        flush = asyncio.create_task(file.flush())
        done, _ = await asyncio.wait([flush], timeout=0.5)
        assert not done
        await c.stores[0].start(c.meta.address)
        async with asyncio.timeout(10):
            await flush


@pytest.mark.seed("C14")
async def test_a_read_waits_while_all_replicas_are_down_and_returns_once_one_is_back() -> None:
    async with cluster(server_count=3) as c:
        volume = await c.client(read_timeout_s=20)
        data = os.urandom(100_000)
        file = await write_file(volume, b"f", data)
        await file.flush()
        for store in c.stores:
            await store.stop()
        read = asyncio.create_task(contents(volume, file.inode))
        done, _ = await asyncio.wait([read], timeout=0.5)
        assert not done
        await c.stores[2].start(c.meta.address)
        async with asyncio.timeout(10):
            assert await read == data


async def test_a_read_fails_after_its_deadline_and_not_before() -> None:
    async with cluster(server_count=3) as c:
        volume = await c.client(read_timeout_s=0.6)
        file = await write_file(volume, b"f", b"x" * 1000)
        await file.flush()
        for store in c.stores:
            await store.stop()
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(AllReplicasFailed):
            await contents(volume, file.inode)
        assert 0.5 < loop.time() - began < 5


@pytest.mark.seed("C8.2")
@pytest.mark.seed("A12")
async def test_one_good_replica_is_enough_whatever_the_others_return() -> None:
    async with cluster() as c:
        volume = await c.client()
        data = os.urandom(60_000)
        file = await write_file(volume, b"f", data)
        await file.flush()
        (slot,) = await volume.where(file.inode)
        extent = slot.extents[0]
        rotten = [replica.server for replica in extent.replicas[:2]]
        for server in rotten:
            c.stores[server].corrupt(extent.extent.partition, extent.extent.block)
        for _ in range(5):
            assert await contents(await c.client(), file.inode) == data
        (slot,) = await volume.where(file.inode)
        assert [replica.state for replica in slot.extents[0].replicas] == ["corrupt", "corrupt", "ok"]


async def test_no_read_ever_returns_bytes_that_fail_their_checksum() -> None:
    """Promise 2: with every copy bad there is an error, soon, since no server is left to wait for."""
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"f", os.urandom(60_000))
        await file.flush()
        (slot,) = await volume.where(file.inode)
        for replica in slot.extents[0].replicas:
            c.stores[replica.server].corrupt(slot.extents[0].extent.partition, slot.extents[0].extent.block)
        async with asyncio.timeout(15):
            with pytest.raises(AllReplicasFailed):
                await contents(await c.client(), file.inode)


@pytest.mark.seed("A4")
async def test_a_read_quorum_reads_that_many_and_returns_what_verifies() -> None:
    async with cluster(read_quorum=3) as c:
        volume = await c.client()
        data = os.urandom(4096)
        file = await write_file(volume, b"f", data)
        await file.flush()
        before = sum(store.gets for store in c.stores)
        assert await contents(await c.client(), file.inode) == data
        assert sum(store.gets for store in c.stores) - before >= 3


async def test_an_upload_error_is_told_once_by_the_next_call_on_the_file() -> None:
    async with cluster() as c:
        volume = await c.client(flush_after_s=0.05)
        for store in c.stores:
            store.put_error = StoreFull("no room")
        file = await write_file(volume, b"f", b"x" * 1000)
        await until(lambda: not volume._writer.dirty_files())
        with pytest.raises(OperationError) as raised:
            await file.flush()
        assert raised.value.errno == errno.ENOSPC
        await file.flush()
        for store in c.stores:
            store.put_error = None
        await file.write(b"again", 0)
        await file.flush()
        assert await contents(volume, file.inode) == b"again"


async def test_writers_wait_for_room_and_memory_stays_bounded() -> None:
    async with cluster(block_size=256 << 10) as c:
        volume = await c.client(dirty_bytes_max=1 << 20)
        for store in c.stores:
            store.hold_puts = asyncio.Event()
        file = await write_file(volume, b"f", b"")
        chunk = os.urandom(128 << 10)
        offset = 0
        while file.try_write(memoryview(chunk), offset):
            offset += len(chunk)
        assert (1 << 20) - (256 << 10) <= offset <= (1 << 20)
        blocked = asyncio.create_task(file.write(chunk * 16, offset))
        done, _ = await asyncio.wait([blocked], timeout=0.2)
        assert not done
        for store in c.stores:
            assert store.hold_puts is not None
            store.hold_puts.set()
        async with asyncio.timeout(10):
            await blocked
            await file.flush()
        assert await read_all(file, 8 << 20) == chunk * (offset // len(chunk) + 16)


async def test_fsync_gives_a_block_again_to_a_server_that_lost_it() -> None:
    """Two of three servers lose power between the put and the sync: their syncs do not count for it."""
    async with cluster(server_count=3) as c:
        volume = await c.client()
        data = os.urandom(50_000)
        file = await write_file(volume, b"f", data)
        await file.flush()
        for store in c.stores[:2]:
            await store.stop()
            store.lose_unsynced()
            assert not store.blocks
            await store.start(c.meta.address)
        await file.fsync()
        assert sum(bool(store.blocks) and not store.unsynced for store in c.stores) >= 2
        assert await contents(volume, file.inode) == data


async def test_fsync_syncs_only_servers_that_hold_something_new() -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"x" * 100)
        await file.fsync()
        syncs = sum(store.syncs for store in c.stores)
        await file.fsync()
        assert sum(store.syncs for store in c.stores) == syncs


@pytest.mark.parametrize("block_size", [64, 4096])
async def test_appends_of_two_clients_lose_and_tear_nothing(block_size: int) -> None:
    async with cluster(block_size=block_size, page_size=64) as c:
        clients = [await c.client(), await c.client()]
        file = await write_file(clients[0], b"log", b"")
        await file.release()
        pieces = [bytes([65 + index]) * (20 + index * 7 % 100) for index in range(26)]

        async def append(number: int) -> None:
            log = await clients[number].open_file(file.inode, flags=os.O_WRONLY | os.O_APPEND)
            for piece in pieces[number::2]:
                await log.write(piece, 0)
            await log.release()

        await asyncio.gather(append(0), append(1))
        found = await contents(clients[1], file.inode)
        assert len(found) == sum(map(len, pieces))
        assert all(found.count(piece) == 1 for piece in pieces)


async def test_an_open_file_outlives_its_last_name() -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"still here")
        await file.flush()
        await volume.unlink(Inode(1), b"f")
        assert await read_all(file) == b"still here"
        await file.write(b"STILL", 0)
        await file.flush()
        assert await read_all(file) == b"STILL here"
        await file.release()


async def test_times_set_after_writing_stay() -> None:
    """What `cp -a` does: write, set times, close."""
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"x" * 70_000)
        await volume.set_attributes(file.inode, mtime_ns=5_000_000_001, atime_ns=6)
        await file.flush()
        await file.release()
        found = await (await c.client()).lookup(Inode(1), b"f")
        assert (found.mtime_ns, found.atime_ns, found.size) == (5_000_000_001, 6, 70_000)


async def test_what_replaces_a_file_by_rename_is_durable_before() -> None:
    async with cluster() as c:
        volume = await c.client()
        old = await write_file(volume, b"f", b"old")
        await old.fsync()
        new = await write_file(volume, b"f.new", b"new")
        await new.flush()
        assert any(store.unsynced for store in c.stores)
        await volume.rename(Inode(1), b"f.new", Inode(1), b"f")
        assert sum(not store.unsynced for store in c.stores) >= 3
        found = await volume.lookup(Inode(1), b"f")
        assert await contents(volume, found.inode) == b"new"


async def test_what_replaces_contents_after_a_truncation_is_durable_at_close() -> None:
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"old")
        await file.fsync()
        again = await volume.open_file(file.inode, flags=os.O_WRONLY | os.O_TRUNC)
        await again.write(b"new", 0)
        await again.flush()
        names = {name for store in c.stores for name in store.unsynced}
        assert all(
            sum(name in store.blocks and name not in store.unsynced for store in c.stores) >= 2 for name in names
        )


async def test_the_kernel_may_keep_its_pages_until_somebody_else_writes() -> None:
    async with cluster() as c:
        first, second = await c.client(), await c.client()
        file = await write_file(first, b"f", b"one")
        await file.flush()
        assert (await first.open_file(file.inode, flags=os.O_RDONLY)).keep_cache
        other = await second.open_file(file.inode, flags=os.O_WRONLY)
        await other.write(b"two", 0)
        await other.flush()
        assert not (await first.open_file(file.inode, flags=os.O_RDONLY)).keep_cache
        assert (await first.open_file(file.inode, flags=os.O_RDONLY)).keep_cache


async def test_a_slow_server_is_named_later() -> None:
    """The commit does not wait for it; its late acknowledgement clears the debt."""
    async with cluster(server_count=3) as c:
        volume = await c.client()
        slow = c.stores[2]
        slow.hold_puts = asyncio.Event()
        file = await write_file(volume, b"f", b"x" * 1000)
        await file.flush()
        slow.hold_puts.set()
        await until(lambda: bool(slow.blocks))
        await until(lambda: not volume._uploader._late)
        assert not await owed(c)


async def owed(c: Cluster) -> int:
    peer = (await c.client())._shared.session
    status = await peer.query(GetStatus(), StatusReport)
    return int(status.document["owed"])


async def test_a_late_read_is_asked_of_another_replica() -> None:
    async with cluster() as c:
        volume = await c.client()
        data = os.urandom(30_000)
        file = await write_file(volume, b"f", data)
        await file.flush()
        (slot,) = await volume.where(file.inode, verify=False)
        c.stores[slot.extents[0].replicas[0].server].hold_gets = asyncio.Event()
        loop = asyncio.get_running_loop()
        for _ in range(4):
            began = loop.time()
            assert await contents(await c.client(), file.inode) == data
            assert loop.time() - began < 2


async def test_closing_a_volume_flushes_and_says_what_could_not_be() -> None:
    async with cluster() as c:
        volume = await c.client()
        await write_file(volume, b"f", b"data")
        assert await volume.close() == ()
        assert await contents(await c.client(), (await (await c.client()).lookup(Inode(1), b"f")).inode) == b"data"
        stuck = await c.client()
        file = await write_file(stuck, b"g", b"data")
        for store in c.stores:
            await store.stop()
        lines = await stuck.close(timeout_s=0.5)
        assert lines == (f"inode {file.inode}: not flushed",)


async def test_a_read_only_volume_refuses_changes() -> None:
    async with cluster() as c:
        volume = await c.client(read_only=True)
        with pytest.raises(OperationError) as raised:
            await volume.make(Inode(1), b"f", stat.S_IFREG | 0o644, uid=0, gid=0)
        assert raised.value.errno == errno.EROFS


async def test_a_big_file_is_read_ahead_and_read_right() -> None:
    async with cluster(block_size=1 << 20, page_size=16384) as c:
        volume = await c.client()
        data = os.urandom(9_000_001)
        file = await write_file(volume, b"f", data)
        await file.flush()
        reader = await (await c.client()).open_file(file.inode, flags=os.O_RDONLY)
        found = bytearray()
        buffer = bytearray(131072)
        while count := await reader.read_into(memoryview(buffer), len(found)):
            found += buffer[:count]
        assert found == data
        assert sum(store.gets for store in c.stores) < 60, "69 reads of 128 KiB, fewer requests of a MiB each"


async def test_a_wrong_secret_is_said_at_once() -> None:
    async with cluster() as c:
        async with asyncio.timeout(30):  # not tried again until the time is over
            with pytest.raises(NotAuthentic):
                await Volume.open(c.world, VolumeOptions(meta=c.meta.address, open_timeout_s=120), b"wrong" * 8)
        with pytest.raises(MendfsError):
            await Volume.open(c.world, VolumeOptions(meta="127.0.0.1:1", open_timeout_s=0.2), b"x" * 32)


async def test_a_reader_follows_when_its_blocks_were_replaced_and_freed() -> None:
    """All replicas of what it knows are gone: the extents have moved on, so it reads the new ones, without an error."""
    async with cluster() as c:
        first, second = await c.client(), await c.client()
        file = await write_file(first, b"f", b"a" * 10_000)
        await file.flush()
        reader = await second.open_file(file.inode, flags=os.O_RDONLY)
        old = {name for store in c.stores for name in store.blocks}
        await file.write(b"b" * 10_000, 0)
        await file.flush()
        for store in c.stores:
            for name in old:
                store.blocks.pop(name, None)
        assert await read_all(reader) == b"b" * 10_000


async def test_a_refused_commit_is_uploaded_again_under_a_new_id() -> None:
    async with cluster() as c:
        volume = await c.client()
        real = c.meta._handlers[Commit]
        seen: list[set[int]] = []

        async def refuse_twice(peer: Peer, request: Commit) -> Message:
            seen.append({block.block for block in request.blocks})
            if len(seen) <= 2:
                raise CommitRefused("the row has changed")
            return await real(peer, request)

        c.meta._handlers[Commit] = refuse_twice
        data = os.urandom(150_000)
        file = await write_file(volume, b"f", data)
        await file.flush()
        assert len(set.union(*seen)) == sum(map(len, seen)), "no id is used for two uploads"
        assert await contents(await c.client(), file.inode) == data
        assert not volume._shared.blocks._in_flight


async def test_a_commit_that_is_refused_again_and_again_is_an_error() -> None:
    async with cluster() as c:
        volume = await c.client()

        async def refuse(peer: Peer, request: Commit) -> Message:
            raise CommitRefused("the row has changed")

        c.meta._handlers[Commit] = refuse
        file = await write_file(volume, b"f", b"x")
        with pytest.raises(CommitRefused):
            await file.flush()
        assert volume._shared.dirty.used == 0


async def test_commits_of_many_tiny_slots_fit_a_transaction_with_a_server_gone() -> None:
    """Every block owes a replica: one more key each."""
    async with cluster(block_size=8, page_size=8) as c:
        volume = await c.client()
        await c.stores[2].stop()
        data = os.urandom(3000)
        file = await write_file(volume, b"f", data)
        await file.flush()
        assert await contents(await c.client(), file.inode) == data


async def test_a_hung_server_holds_only_so_much_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mendfs.client.uploader.STRAGGLING_BYTES_MAX", 1 << 20)
    async with cluster(block_size=256 << 10, server_count=3) as c:
        volume = await c.client()
        hung = c.stores[1]
        hung.hold_puts = asyncio.Event()
        data = os.urandom(4 << 20)
        file = await write_file(volume, b"f", data)
        async with asyncio.timeout(20):
            await file.flush()
        assert volume._uploader._straggling_bytes <= 1 << 20
        assert await contents(await c.client(), file.inode) == data
        hung.hold_puts.set()


async def test_what_was_committed_is_synced_by_itself_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mendfs.client.durability.SYNC_EVERY_S", 0.05)
    async with cluster() as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"x" * 100)
        await file.flush()
        await until(lambda: not volume._durability.has_unsynced)


async def test_a_truncation_does_not_let_older_writes_pass() -> None:
    async with cluster() as c:
        volume = await c.client()
        for store in c.stores:
            store.hold_puts = asyncio.Event()
        file = await write_file(volume, b"f", b"x" * 70_000)
        shrink = asyncio.create_task(volume.set_attributes(file.inode, size=10))
        late = asyncio.create_task(file.write(b"y" * 5, 20))
        await asyncio.sleep(0.05)
        assert not shrink.done() and not late.done()
        for store in c.stores:
            assert store.hold_puts is not None
            store.hold_puts.set()
        async with asyncio.timeout(10):
            await shrink
            await late
            await file.flush()
        assert await contents(await c.client(), file.inode) == b"x" * 10 + bytes(10) + b"y" * 5


async def test_data_that_every_server_lost_before_its_fsync_is_an_error() -> None:
    """Everything lost power but the meta server: fsync must not say that it is durable."""
    async with cluster(server_count=3) as c:
        volume = await c.client()
        file = await write_file(volume, b"f", b"x" * 1000)
        await file.flush()
        for store in c.stores:
            await store.stop()
            store.lose_unsynced()
        for store in c.stores:
            await store.start(c.meta.address)
        async with asyncio.timeout(20):
            with pytest.raises(MendfsError, match="lost before it was durable"):
                await file.fsync()
            await file.write(b"y" * 1000, 0)
            await file.fsync()
        assert await contents(await c.client(), file.inode) == b"y" * 1000


async def test_a_missing_replica_is_asked_once_and_then_last() -> None:
    async with cluster(block_size=1 << 20, page_size=4096) as c:
        volume = await c.client()
        file = await write_file(volume, b"f", os.urandom(1 << 20))
        await file.flush()
        c.stores[next(number for number in range(4) if c.stores[number].blocks)].blocks.clear()
        reader = await (await c.client()).open_file(file.inode, flags=os.O_RDONLY)
        buffer = bytearray(100)
        before = sum(store.gets for store in c.stores)
        for page in range(200, 0, -2):
            assert await reader.read_into(memoryview(buffer), page * 4096) == 100
        assert sum(store.gets for store in c.stores) - before <= 110, "one refusal, hedges aside"
