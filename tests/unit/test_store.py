"""The store: what is acknowledged, what is refused, what a failing disk leads to."""

import asyncio
import errno
import os
from collections.abc import Callable

import pytest

from mendfs.data import schema, watch
from mendfs.data.schema import Fence
from mendfs.errors import BlockConflict, BlockCorrupt, BlockMissing, Fenced, StoreFailed, StoreFull
from mendfs.model import BlockId, CommitSequence, Generation, KiB, MiB, Partition
from mendfs.wire.messages.data import PutBlock
from tests.unit.data_tools import FIRST_BLOCK, abandon, block, content, open_on, opened, read, until, volume
from tests.unit.memory_disk import MemoryDisk

SEGMENT = "/data/segments/0000000001.seg"


def failing(operation: str, code: int, path: str = "/data/segments/") -> Callable[[str, str], None]:
    def fault(done: str, at: str) -> None:
        if done == operation and at.startswith(path):
            raise OSError(code, os.strerror(code), at)

    return fault


def no_fault(operation: str, path: str) -> None:
    pass


def order(generation: int, sequence: int) -> Fence:
    return Fence(Generation(generation), CommitSequence(sequence))


@pytest.mark.parametrize("checksum", ["xxh3", "blake3"])
@pytest.mark.parametrize("length", [1, 4095, 4096, 4097, 60_000, 200_000])
async def test_what_was_put_is_got_back(checksum: str, length: int) -> None:
    of = volume(block_size=256 * KiB, checksum=checksum)  # type: ignore[arg-type]  # one of the two
    store = await open_on(MemoryDisk(), of=of)
    data = content(1, length)
    message = block(1, data, of)
    assert await store.put(message, data) == store.incarnation
    assert await read(store, message) == data
    pages = await store.get(message.partition, message.block, 1, 2)
    assert bytes(pages.view) == data[4096 : 3 * 4096]
    assert pages.length == length
    await store.close()


async def test_blocks_outlive_the_page_cache_and_the_store() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        for number in range(20):
            await store.put(block(number, content(number, 5000)), content(number, 5000))
        incarnation = store.incarnation
    disk.is_cached = False
    async with opened(disk, seed=2) as store:
        assert store.incarnation != incarnation
        for number in range(20):
            assert await read(store, block(number, content(number, 5000))) == content(number, 5000)
        assert store.health().blocks == 20


async def test_a_missing_block_is_said_to_be_missing() -> None:
    async with opened(MemoryDisk()) as store:
        with pytest.raises(BlockMissing):
            await store.get(Partition(1), BlockId(1), 0, 1)


async def test_data_with_another_root_is_refused_and_leaves_nothing() -> None:
    async with opened(MemoryDisk()) as store:
        for length in (5000, 200_000):
            message = block(1, content(1, length))
            with pytest.raises(BlockCorrupt):
                await store.put(message, content(2, length))
            with pytest.raises(BlockMissing):
                await read(store, message)
        await store.put(block(1, b"x"), b"x")


async def test_a_second_put_is_answered_as_stored_or_refused_loudly() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        await store.put(block(1, b"one"), b"one")
        written = disk.counts["write"]
        await store.put(block(1, b"one"), b"one")
        assert disk.counts["write"] == written
        with pytest.raises(BlockConflict):
            await store.put(block(1, b"two"), b"two")
        assert await read(store, block(1, b"one")) == b"one"


async def test_two_puts_of_one_block_at_once_write_it_once() -> None:
    disk = MemoryDisk()
    async with opened(disk, segment_bytes=4 * MiB) as store:
        data = content(1, 200_000)
        await asyncio.gather(*(store.put(block(1, data), data) for _ in range(5)))
        assert store.health().writes == 1
        results = await asyncio.gather(
            store.put(block(2, data), data), store.put(block(2, b"other"), b"other"), return_exceptions=True
        )
        assert isinstance(results[1], BlockConflict)


async def test_a_put_whose_caller_went_away_is_finished_all_the_same() -> None:
    async with opened(MemoryDisk()) as store:
        data = content(1, 200_000)
        putting = asyncio.create_task(store.put(block(1, data), data))
        await asyncio.sleep(0)
        putting.cancel()
        await asyncio.gather(putting, return_exceptions=True)
        await until(lambda: store.health().blocks == 1)
        assert await read(store, block(1, data)) == data


async def test_a_sync_covers_every_put_before_it_and_costs_one_for_all() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        for number in range(10):
            await store.put(block(number, b"x" * 100), b"x" * 100)
        before = disk.counts["sync"]
        assert set(await asyncio.gather(*(store.sync() for _ in range(10)))) == {store.incarnation}
        assert disk.counts["sync"] == before + 1
        assert not disk.nodes[SEGMENT].changes
        assert disk.nodes[SEGMENT].is_named
        await store.sync()
        assert disk.counts["sync"] == before + 1, "nothing was dirty"


async def test_a_dirty_store_is_synced_unasked_within_a_second() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        await store.put(block(1, b"x"), b"x")
        await until(lambda: not disk.nodes[SEGMENT].changes, within_s=3)


async def test_a_failed_sync_gives_up_what_was_not_durable_and_the_store_goes_on() -> None:
    disk = MemoryDisk()
    store = await open_on(disk)
    durable, lost, later = block(1, b"durable"), block(2, b"lost"), block(3, b"later")
    await store.put(durable, b"durable")
    await store.sync()
    incarnation = await store.put(lost, b"lost")
    disk.fault = failing("sync", errno.EIO)
    results = await asyncio.gather(store.sync(), store.sync(), return_exceptions=True)
    assert [type(result) for result in results] == [StoreFailed, StoreFailed]
    disk.fault = no_fault
    assert store.incarnation != incarnation
    assert await store.have([(m.partition, m.block) for m in (durable, lost)]) == (durable.root, None)
    assert any("could not be synced" in line for line in store.health().troubles)
    assert await store.put(later, b"later") == store.incarnation == await store.sync()
    assert await store.put(lost, b"lost") == store.incarnation
    assert "/data/segments/0000000002.seg" in disk.nodes
    assert store.health().blocks == 3
    await abandon(store)
    disk.kill()
    async with opened(disk, seed=2) as store:
        assert await read(store, durable) == b"durable"
        assert await read(store, later) == b"later"


async def test_what_a_failed_sync_gave_up_does_not_come_back_with_the_process() -> None:
    """The page cache still shows it, but the disk has not got it."""
    disk = MemoryDisk()
    store = await open_on(disk)
    await store.put(block(1, b"lost"), b"lost")
    disk.fault = failing("sync", errno.EIO)
    with pytest.raises(StoreFailed):
        await store.sync()
    disk.fault = no_fault
    await abandon(store)
    disk.kill()
    async with opened(disk, seed=2) as store:
        assert store.health().blocks == 0
        with pytest.raises(BlockMissing):
            await read(store, block(1, b"lost"))


async def test_a_put_under_way_during_a_failed_sync_is_not_acknowledged() -> None:
    disk = MemoryDisk()
    store = await open_on(disk)
    begin, go = asyncio.Event(), asyncio.Event()
    run = disk.run

    async def slow(function: Callable[..., object], *args: object, **kwargs: object) -> object:
        if function.__name__ == "_write":
            begin.set()
            await go.wait()
        return await run(function, *args, **kwargs)

    disk.run = slow  # type: ignore[method-assign,assignment]  # a thread that takes its time
    data = content(1, 200_000)
    await store.put(block(2, b"small"), b"small")
    putting = asyncio.create_task(store.put(block(1, data), data))
    await begin.wait()
    disk.fault = failing("sync", errno.EIO)
    with pytest.raises(StoreFailed):
        await store.sync()
    disk.fault = no_fault
    go.set()
    with pytest.raises(StoreFailed):
        await putting
    assert store.health().blocks == 0
    await store.put(block(1, data), data)
    await store.close()


async def test_the_checkpoint_stays_before_a_write_under_way() -> None:
    disk = MemoryDisk()
    store = await open_on(disk)
    begin, go = asyncio.Event(), asyncio.Event()
    run = disk.run

    async def slow(function: Callable[..., object], *args: object, **kwargs: object) -> object:
        if function.__name__ == "_write":
            begin.set()
            await go.wait()
        return await run(function, *args, **kwargs)

    disk.run = slow  # type: ignore[method-assign,assignment]  # a thread that takes its time
    data = content(1, 200_000)
    putting = asyncio.create_task(store.put(block(1, data), data))
    await begin.wait()
    await store.put(block(2, b"small"), b"small")
    await store.sync()
    checkpoint = await store._index.checkpoint()
    assert checkpoint == schema.Place(1, 4096)
    go.set()
    await putting
    await store.sync()
    checkpoint = await store._index.checkpoint()
    assert checkpoint is not None and checkpoint.offset > 200_000
    await store.close()


@pytest.mark.parametrize(
    ("code", "error", "words"),
    [
        (errno.ENOSPC, StoreFull, "no room"),
        (errno.EIO, StoreFailed, "replace it"),
        (errno.EROFS, StoreFailed, "read-only"),
    ],
)
@pytest.mark.parametrize("length", [5000, 200_000])
async def test_a_failed_write_is_a_clear_error_and_leaves_no_entry(
    code: int, error: type[Exception], words: str, length: int
) -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        await store.put(block(1, b"before"), b"before")
        disk.fault = failing("write", code)
        data = content(2, length)
        with pytest.raises(error, match=words):
            await store.put(block(2, data), data)
        assert any(words in line for line in store.health().troubles)
        # Half of it was written, as by a disk that fills up: on one that is full that room is given back.
        (content_of_segment,) = [bytes(node.content) for path, node in disk.nodes.items() if "/segments/" in path]
        assert data[: length // 4] not in content_of_segment
        disk.fault = no_fault
        assert await store.have([(block(2, data).partition, block(2, data).block)]) == (None,)
        await store.put(block(2, data), data)
        assert await read(store, block(2, data)) == data
        assert store.health().troubles == ()


async def test_no_descriptors_for_a_new_segment_is_said_and_got_over() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        disk.fault = failing("open", errno.EMFILE)
        for _ in range(3):
            with pytest.raises(StoreFailed, match="descriptors"):
                await store.put(block(1, b"x"), b"x")
        disk.fault = no_fault
        await asyncio.sleep(0.6)
        await store.put(block(1, b"x"), b"x")
        assert store.health().troubles == ()


async def test_above_95_percent_puts_are_refused_and_reads_go_on() -> None:
    disk = MemoryDisk()
    disk.total, disk.free = 1000 * KiB, 60 * KiB
    async with opened(disk) as store:
        data = content(1, 5000)
        await store.put(block(1, data), data)
        with pytest.raises(StoreFull):
            await store.put(block(2, content(2, 50_000)), content(2, 50_000))
        assert any("95 %" in line for line in store.health().troubles)
        assert await read(store, block(1, data)) == data
        disk.free = 500 * KiB
        await store.put(block(2, content(2, 50_000)), content(2, 50_000))
        assert store.health().troubles == ()


async def test_a_capacity_is_kept() -> None:
    async with opened(MemoryDisk(), capacity=20_000) as store:
        for number in range(3):
            await store.put(block(number, content(number, 5000)), content(number, 5000))
        with pytest.raises(StoreFull):
            await store.put(block(9, content(9, 5000)), content(9, 5000))
        assert store.health().bytes_free < 5000


async def test_segments_follow_one_another() -> None:
    disk = MemoryDisk()
    async with opened(disk, segment_bytes=1) as store:
        for number in range(8):
            await store.put(block(number, content(number, 150_000)), content(number, 150_000))
        await store.sync()
        assert len(disk.names("/data/segments")) == 8
        for number in range(8):
            assert await read(store, block(number, content(number, 150_000))) == content(number, 150_000)


async def test_deleting_is_fenced_durably() -> None:
    disk = MemoryDisk()
    store = await open_on(disk)
    messages = [block(number, content(number, 9000)) for number in range(5)]
    for number, message in enumerate(messages):
        await store.put(message, content(number, 9000))
    names = [(message.partition, message.block) for message in messages]
    assert await store.delete(order(3, 10), [*names[:2], (Partition(1), BlockId(FIRST_BLOCK + 999))]) == 2
    with pytest.raises(BlockMissing):
        await read(store, messages[0])
    with pytest.raises(Fenced, match="accept-rollback"):
        await store.delete(order(2, 99), names)
    with pytest.raises(Fenced):
        await store.delete(order(3, 9), names)
    assert await store.delete(order(3, 10), names[:3]) == 1
    assert store.health().blocks == 2
    await abandon(store)
    disk.cut(1)
    async with opened(disk, seed=2) as store:
        with pytest.raises(Fenced):
            await store.delete(order(3, 9), names)
        assert await store.have(names[:3]) == (None, None, None)
        assert store.highest_generation == 3


async def test_a_deleted_record_is_punched_out() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        data = content(1, 50_000)
        await store.put(block(1, data), data)
        assert data in disk.nodes[SEGMENT].content
        await store.delete(order(1, 1), [(block(1, data).partition, block(1, data).block)])
        assert not any(disk.nodes[SEGMENT].content[4096:])


async def test_a_record_damaged_on_disk_is_found_by_verifying() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        for number in range(3):
            await store.put(block(number, content(number, 9000)), content(number, 9000))
        at = disk.nodes[SEGMENT].content.index(content(1, 9000)) + 5000
        disk.nodes[SEGMENT].content[at] ^= 1
        first = (Partition(0), BlockId(0))
        assert [held.ok for held in await store.list_blocks(first, 10)] == [True] * 3
        assert [held.ok for held in await store.list_blocks(first, 10, verify=True)] == [True, False, True]
        message = block(1, content(1, 9000))
        assert await store.have([(message.partition, message.block)]) == (None,)
        assert store.health().corrupt_found == 1
        # Its good pages are served all the same: another replica may lack just those.
        assert (await read(store, message))[:4096] == content(1, 9000)[:4096]
        await store.put(message, content(1, 9000))
        assert await read(store, message) == content(1, 9000)
        assert [held.ok for held in await store.list_blocks(first, 10, verify=True)] == [True] * 3
        await store.sync()
        assert disk.nodes[SEGMENT].content[at] == 0, "the bad record is punched once the good one is durable"


@pytest.mark.parametrize("place", [0, 5, 20, 40, 87])
async def test_a_damaged_header_is_corrupt_and_counted(place: int) -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        await store.put(block(1, b"x" * 9000), b"x" * 9000)
        disk.nodes[SEGMENT].content[4096 + place] ^= 0x40
        with pytest.raises(BlockCorrupt):
            await read(store, block(1, b"x" * 9000))
        assert store.health().corrupt_found == 1


async def test_an_unreadable_sector_is_corrupt_not_missing() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        await store.put(block(1, b"x"), b"x")
        disk.fault = failing("read", errno.EIO)
        with pytest.raises(BlockCorrupt, match="cannot be read"):
            await read(store, block(1, b"x"))
        disk.fault = no_fault


@pytest.mark.seed("C13")
async def test_a_segment_deleted_under_the_running_store_is_noticed() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        await store.put(block(1, b"old"), b"old")
        await store.sync()
        incarnation = await store.put(block(2, b"new"), b"new")
        disk.unlink(SEGMENT)
        with pytest.raises(StoreFailed):
            await store.sync()
        assert store.incarnation != incarnation
        await until(lambda: any("from other servers" in line for line in store.health().troubles))
        names = [(block(n, b"").partition, block(n, b"").block) for n in (1, 2)]
        assert await store.have(names) == (None, None)
        assert await read(store, block(1, b"old")) == b"old", "still a source while the file is open"
        await store.put(block(1, b"old"), b"old")
        await store.sync()
        assert await store.have(names[:1]) == (block(1, b"old").root,)
    async with opened(disk, seed=2) as store:
        assert await read(store, block(1, b"old")) == b"old"


async def test_the_age_of_a_stuck_disk_operation_is_told() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        assert store.health().oldest_disk_operation_s == 0
        go = asyncio.Event()
        run = disk.run

        async def stuck(function: Callable[..., object], *args: object, **kwargs: object) -> object:
            await go.wait()
            return await run(function, *args, **kwargs)

        disk.run = stuck  # type: ignore[method-assign,assignment]  # a disk that does not answer
        await store.put(block(1, b"x"), b"x") if store._append.active else None
        syncing = asyncio.create_task(store.sync())
        reading = asyncio.create_task(store.watch.run(disk.names, "/"))
        await until(lambda: store.health().oldest_disk_operation_s > 0.05)
        go.set()
        await asyncio.gather(syncing, reading)
        assert store.health().oldest_disk_operation_s == 0


async def test_a_disk_that_hangs_is_said_to_whoever_asks_instead_of_keeping_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "STUCK_S", 0.2)
    disk = MemoryDisk()
    async with opened(disk) as store:
        await store.put(block(1, b"x"), b"x")
        await store.sync()
        go = asyncio.Event()
        run = disk.run

        async def stuck(function: Callable[..., object], *args: object, **kwargs: object) -> object:
            await go.wait()
            return await run(function, *args, **kwargs)

        disk.run = stuck  # type: ignore[method-assign,assignment]  # a disk that does not answer
        await store.put(block(2, b"y"), b"y")
        syncing = asyncio.create_task(store.sync())
        await until(lambda: store.health().oldest_disk_operation_s > 0.3)
        for asked in (store.put(block(3, b"z"), b"z"), store.sync(), store.delete(order(1, 1), [])):
            with pytest.raises(StoreFailed, match="has not answered"):
                await asked
        assert any("has not answered" in line for line in store.health().troubles)
        # What is in memory is served all the same; what is not is another server's to give.
        assert await read(store, block(1, b"x")) == b"x"
        disk.is_cached = False
        with pytest.raises(StoreFailed, match="has not answered"):
            await read(store, block(1, b"x"))
        go.set()
        await syncing
        await store.put(block(3, b"z"), b"z")
        assert not store.health().troubles
        assert await read(store, block(2, b"y")) == b"y"


async def test_after_a_pause_the_first_small_write_is_not_made_in_the_event_loop() -> None:
    """The disk may have died meanwhile, and then the loop would hang with it."""
    disk = MemoryDisk()
    threads = 0
    run = disk.run

    async def counted(function: Callable[..., object], *args: object, **kwargs: object) -> object:
        nonlocal threads
        threads += function.__name__ == "_write"
        return await run(function, *args, **kwargs)

    disk.run = counted  # type: ignore[method-assign,assignment]  # a disk that counts
    async with opened(disk) as store:
        for number in range(3):
            await store.put(block(number, b"x"), b"x")
        await store.sync()
        busy = threads
        await store.put(block(5, b"x"), b"x")
        assert threads == busy, "the disk has just answered"
        store.watch._wrote_s -= watch.LIVELY_S + 1
        await store.put(block(6, b"x"), b"x")
        assert threads == busy + 1


@pytest.mark.parametrize(("code", "told"), [(errno.EIO, StoreFailed), (errno.ENOSPC, StoreFull)])
async def test_an_index_that_fails_takes_nothing_more_but_is_read(code: int, told: type[Exception]) -> None:
    disk = MemoryDisk()
    store = await open_on(disk)
    await store.put(block(1, b"x"), b"x")
    await store.sync()
    disk.fault = failing("write", code, path="/data/index")
    with pytest.raises(told):
        await store.put(block(2, b"y"), b"y")
    disk.fault = no_fault
    assert "cannot be written" in str(store.failed.result())
    for refused in (store.put(block(3, b"z"), b"z"), store.delete(order(1, 1), [])):
        with pytest.raises(told):
            await refused
    assert await store.sync() == store.incarnation, "what it had taken before is durable"
    assert any("nothing is written here" in line for line in store.health().troubles)
    assert await read(store, block(1, b"x")) == b"x"
    with pytest.raises(BlockMissing):
        await read(store, block(2, b"y"))
    await store.close()
    async with opened(disk, seed=2) as store:
        assert await read(store, block(1, b"x")) == b"x"
        await store.put(block(3, b"z"), b"z")


async def test_listing_goes_on_where_it_stopped() -> None:
    async with opened(MemoryDisk()) as store:
        for number in range(40):
            await store.put(block(number, b"x"), b"x")
        seen: list[tuple[int, int]] = []
        after = (Partition(0), BlockId(0))
        while found := await store.list_blocks(after, 7):
            after = (found[-1].partition, found[-1].block)
            seen += [(held.partition, held.block) for held in found]
        assert seen == sorted((n % 16, FIRST_BLOCK + n) for n in range(40))
        only = await store.list_blocks((Partition(0), BlockId(0)), 99, only=Partition(3))
        assert [held.block - FIRST_BLOCK for held in only] == [3, 19, 35]
        assert all(isinstance(held.root, bytes) and held.inode == 7 for held in only)


def test_messages_are_what_the_store_takes() -> None:
    assert PutBlock.__struct_fields__ == ("partition", "block", "inode", "slot", "root", "sync")


async def test_blocks_that_a_failed_sync_took_are_not_believed_when_the_index_fails_with_it() -> None:
    """One bad disk is under both: pages in memory say that the blocks are there, and no disk has them."""
    disk = MemoryDisk()
    store = await open_on(disk)
    data = content(1, 5000)
    await store.put(block(1, data), data)

    def bad_disk(operation: str, path: str) -> None:
        if operation == "sync" or (operation == "write" and path.startswith("/data/index")):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    disk.fault = bad_disk
    with pytest.raises(StoreFailed):
        await store.sync()
    with pytest.raises(StoreFailed):
        await store.have([(block(1, data).partition, block(1, data).block)])
    disk.fault = no_fault
    await abandon(store)
    disk.kill()
    store = await open_on(disk, seed=2)
    assert await store.have([(block(1, data).partition, block(1, data).block)]) == (None,)
    await store.close()
