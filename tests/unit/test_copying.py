"""Segments that take much more than is needed of them are copied: nothing is lost, nothing comes back."""

import asyncio
import errno
import os
import random
import threading
from typing import Any

import pytest

from mendfs.data import copying
from mendfs.data.files import OpenFiles
from mendfs.data.schema import Fence
from mendfs.data.store import Store
from mendfs.errors import BlockCorrupt, BlockMissing, MendfsError, StoreFailed
from mendfs.model import BlockId, CommitSequence, Generation, Partition
from tests.unit.data_tools import FIRST_BLOCK, abandon, block, content, open_on, opened, read, until
from tests.unit.memory_disk import MemoryDisk, MemoryFile

LENGTH = 20_000
"""Thirteen fit into a segment of a volume with blocks of 256 KiB."""
PARTITIONS = [Partition(number) for number in range(16)]


def order(sequence: int) -> Fence:
    return Fence(Generation(1), CommitSequence(sequence))


def segment_path(number: int) -> str:
    return f"/data/segments/{number:010}.seg"


def name_of(number: int) -> tuple[Partition, BlockId]:
    return Partition(number % 16), BlockId(FIRST_BLOCK + number)


async def fill(store: Store, count: int, length: int = LENGTH) -> None:
    for number in range(count):
        await store.put(block(number, content(number, length)), content(number, length))
    await store.sync()


async def are_there(store: Store, numbers: set[int], length: int = LENGTH) -> None:
    """Just these are held, with the right bytes, and the sums say so."""
    found = await store.list_blocks((Partition(0), BlockId(0)), 10_000, verify=True)
    assert {each.block - FIRST_BLOCK for each in found if each.ok} == numbers
    assert store.health().blocks == len(numbers)
    assert sum(each.count for each in await store.inventory(PARTITIONS)) == len(numbers)
    for number in numbers:
        assert await read(store, block(number, content(number, length))) == content(number, length)


async def settled(store: Store) -> None:
    """Measured and counted, as a second later."""
    await until(lambda: store._index.usage.is_complete)
    await store._tend(is_index_due=True)


async def copy_all(store: Store) -> int:
    """Until there is nothing worth copying."""
    await settled(store)
    copied = 0
    while await store.copier.copy_one():
        await store._tend(is_index_due=False)
        copied += 1
    return copied


def without_holes(operation: str, path: str) -> None:
    if operation == "punch":
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP), path)


@pytest.fixture(autouse=True)
def _at_full_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copier of the store under test runs when the test says so, not once a second."""
    monkeypatch.setattr(copying, "LOOK_EVERY_S", 3600.0)


async def test_the_space_of_deleted_blocks_comes_back_where_holes_cannot_be_punched() -> None:
    disk = MemoryDisk()
    disk.fault = without_holes
    async with opened(disk, segment_bytes=1) as store:
        await fill(store, 60)
        kept = {number for number in range(60) if number % 3 == 0}
        await store.delete(order(1), [name_of(number) for number in range(60) if number not in kept])
        await settled(store)
        used, sums = store.health().bytes_used, await store.inventory(PARTITIONS)
        assert used > 60 * LENGTH, "what is dead still takes its room"
        assert await copy_all(store) >= 4
        assert store.health().bytes_used < used * 0.6
        assert await store.inventory(PARTITIONS) == sums
        await are_there(store, kept)
    async with opened(disk, seed=2, segment_bytes=1) as store:
        await are_there(store, kept)
        assert not store.health().troubles


async def test_a_segment_that_is_needed_by_more_than_half_is_left_alone() -> None:
    disk = MemoryDisk()
    disk.fault = without_holes
    async with opened(disk, segment_bytes=1) as store:
        await fill(store, 26)
        await store.delete(order(1), [name_of(number) for number in range(0, 26, 3)])
        assert await copy_all(store) == 0


async def test_small_records_between_holes_are_copied_together() -> None:
    """A hole frees whole pages only: 24 records of 128 bytes share one, and one of them keeps it."""
    disk = MemoryDisk()
    async with opened(disk, segment_bytes=1) as store:
        await fill(store, 3000, length=20)
        kept = set(range(0, 3000, 24))
        await store.delete(order(1), [name_of(number) for number in range(3000) if number not in kept])
        await settled(store)
        used = store.health().bytes_used
        assert await copy_all(store) >= 1
        assert store.health().bytes_used < used / 2
        await are_there(store, kept, length=20)


async def test_an_empty_segment_is_deleted_but_never_the_highest_number() -> None:
    disk = MemoryDisk()
    async with opened(disk, segment_bytes=1) as store:
        await fill(store, 26)
        await store.delete(order(1), [name_of(number) for number in range(26)])
        store._append.leave(store._append.active)  # type: ignore[arg-type]  # there is one
        await copy_all(store)
        assert disk.names("/data/segments") == ["0000000003.seg"]
        await fill(store, 3)
    async with opened(disk, seed=2, segment_bytes=1) as store:
        await are_there(store, {0, 1, 2})


class Dying:
    """A disk on which the power goes, or the process is killed, at its k-th change."""

    def __init__(self, disk: MemoryDisk, at: int, *, by_power: bool) -> None:
        self.changes = 0
        self.is_dead = False
        self._disk = disk
        self._at = at
        self._by_power = by_power

    def __call__(self, operation: str, path: str) -> None:
        if operation in ("write", "sync", "punch", "unlink", "names"):
            self.changes += 1
            if self.changes == self._at:
                self.is_dead = True
                if self._by_power:
                    self._disk.cut(self._at)
                else:
                    self._disk.kill()
        if self.is_dead:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)


async def half_deleted(disk: MemoryDisk) -> tuple[Store, set[int]]:
    """A store whose first two segments are worth copying, one with holes and one that could not be punched."""
    store = await open_on(disk, segment_bytes=1)
    await fill(store, 30)
    kept = {number for number in range(30) if number % 4 == 0}
    gone = [name_of(number) for number in range(30) if number not in kept]
    disk.fault = without_holes
    await store.delete(order(1), gone)
    disk.fault = lambda operation, path: None
    await store.sync()
    await settled(store)
    return store, kept


@pytest.mark.parametrize("is_index_lost", [False, True])
@pytest.mark.parametrize("by_power", [False, True])
async def test_a_crash_at_any_moment_of_copying_loses_nothing(by_power: bool, is_index_lost: bool) -> None:
    at = 0
    while True:
        at += 1
        disk = MemoryDisk()
        store, kept = await half_deleted(disk)
        dying = disk.fault = Dying(disk, at, by_power=by_power)
        try:
            while await store.copier.copy_one():
                await store._tend(is_index_due=False)
        except MendfsError:
            assert dying.is_dead
        await abandon(store)
        disk.fault = lambda operation, path: None
        if not dying.is_dead:
            break
        if is_index_lost:
            del disk.nodes["/data/index"]
        async with opened(disk, seed=2, segment_bytes=1) as store:
            if is_index_lost:
                # Deleted ones may be back, for no hole says that they were: garbage, which reconcile deletes.
                found = await store.list_blocks((Partition(0), BlockId(0)), 10_000, verify=True)
                back = {each.block - FIRST_BLOCK for each in found if each.ok}
                assert kept <= back
                await store.delete(order(2), [name_of(number) for number in back - kept])
            await are_there(store, kept)
            await copy_all(store)
            await are_there(store, kept)
    assert at > 10, "the copying changes the disk a few times at least"


class Users:
    """Who reads, deletes and stores while segments are copied."""

    def __init__(self, store: Store, seed: int) -> None:
        self.store = store
        self.rng = random.Random(seed)
        self.alive = set(range(60))
        self.deleted: set[int] = set()
        self.is_over = False

    async def delete_half(self) -> None:
        gone = range(0, 60, 2)
        await self.store.delete(order(1), [name_of(number) for number in gone])
        self.alive.difference_update(gone)

    async def get_for_ever(self) -> None:
        while not self.is_over:
            number = self.rng.choice(sorted(self.alive | self.deleted))
            was_deleted = number in self.deleted
            try:
                assert await read(self.store, block(number, content(number, LENGTH))) == content(number, LENGTH)
            except BlockMissing:
                assert number in self.deleted or number not in self.alive
            else:
                assert not was_deleted
            await asyncio.sleep(0)

    async def delete_some(self) -> None:
        for sequence in range(2, 14):
            number = self.rng.choice(sorted(self.alive))
            self.alive.discard(number)
            await self.store.delete(order(sequence), [name_of(number)])
            self.deleted.add(number)
            await asyncio.sleep(0)

    async def put_some(self) -> None:
        for number in range(100, 112):
            await self.store.put(block(number, content(number, LENGTH)), content(number, LENGTH))
            self.alive.add(number)


@pytest.mark.parametrize("seed", range(12))
async def test_reading_deleting_and_storing_go_on_meanwhile(seed: int) -> None:
    """Every read returns the right bytes or says that the block was deleted; what was deleted stays so."""
    disk = MemoryDisk()
    disk.fault = without_holes
    store = await open_on(disk, segment_bytes=1)
    await fill(store, 60)
    users = Users(store, seed)
    await users.delete_half()
    await settled(store)
    if seed % 2:
        disk.fault = lambda operation, path: None
    disk.yields = True
    getting = [asyncio.create_task(users.get_for_ever()) for _ in range(3)]
    changing = asyncio.gather(users.delete_some(), users.put_some())
    while not changing.done() or await store.copier.copy_one():
        await store.copier.copy_one()
        await store._tend(is_index_due=False)
        await asyncio.sleep(0)
    await changing
    users.is_over = True
    await asyncio.gather(*getting)
    await are_there(store, users.alive)
    assert store.copier.copied_segments > 0
    await store.sync()
    await store._index.engine.sync()
    await abandon(store)
    disk.cut(seed)
    disk.yields = False
    async with opened(disk, seed=2, segment_bytes=1) as store:
        await are_there(store, users.alive)


async def test_a_bad_record_moves_with_its_good_pages_and_a_bad_header_is_made_anew() -> None:
    disk = MemoryDisk()
    async with opened(disk, segment_bytes=1) as store:
        await fill(store, 15)
        disk.fault = without_holes
        node = disk.nodes[segment_path(1)]
        bad, headless = content(4, LENGTH), content(8, LENGTH)
        node.content[node.content.index(bad) + 5000] ^= 1
        node.content[node.content.rindex(b"MFSR", 0, node.content.index(headless))] ^= 1
        await store.delete(order(1), [name_of(number) for number in range(15) if number not in (4, 8)])
        assert await copy_all(store) == 1
        assert segment_path(1) not in disk.nodes
        assert store.health().corrupt_found == 1
        assert await store.have([name_of(4), name_of(8)]) == (None, block(8, headless).root)
        assert (await read(store, block(4, bad)))[:4096] == bad[:4096]
        assert await read(store, block(8, headless)) == headless
        assert store.health().blocks == 1
        await store.put(block(4, bad), bad)
        await are_there(store, {4, 8})


async def test_what_the_disk_cannot_read_stays_where_it_is() -> None:
    disk = MemoryDisk()
    async with opened(disk, segment_bytes=1) as store:
        await fill(store, 15)
        disk.fault = without_holes
        await store.delete(order(1), [name_of(number) for number in range(15) if number not in (2, 3, 14)])
        await settled(store)
        bad = store._segments.get(1)
        assert bad is not None
        place = (await store._index.find(*name_of(3))).offset  # type: ignore[union-attr]  # it is there
        real = bad.file.read_into

        def read_into(buffer: memoryview | bytearray, offset: int) -> int:
            if offset <= place + 9000 < offset + len(buffer):
                raise OSError(errno.EIO, os.strerror(errno.EIO), bad.file.path)
            return real(buffer, offset)

        bad.file.read_into = read_into  # type: ignore[method-assign]  # a bad sector
        disk.is_cached = False
        assert not await store.copier.copy_one()
        assert segment_path(1) in disk.nodes
        assert any("segment 1 cannot be read" in line for line in store.health().troubles)
        assert await read(store, block(2, content(2, LENGTH))) == content(2, LENGTH)
        with pytest.raises(BlockCorrupt):
            await read(store, block(3, content(3, LENGTH)))
        assert not await store.copier.copy_one(), "not tried again before something changes"
        await store.delete(order(2), [name_of(3)])
        assert await copy_all(store) == 1
        assert not store.health().troubles
        await are_there(store, {2, 14})


async def test_a_segment_whose_sync_failed_is_left_and_then_health_is_well_again() -> None:
    disk = MemoryDisk()
    async with opened(disk, segment_bytes=1) as store:
        await fill(store, 5)
        await store.put(block(9, b"lost"), b"lost")

        def fail(operation: str, path: str) -> None:
            if operation == "sync" and path.startswith("/data/segments"):
                raise OSError(errno.EIO, os.strerror(errno.EIO), path)

        disk.fault = fail
        with pytest.raises(StoreFailed):
            await store.sync()
        disk.fault = lambda operation, path: None
        assert any("could not be synced" in line for line in store.health().troubles)
        assert await copy_all(store) == 1
        assert segment_path(1) not in disk.nodes
        assert not store.health().troubles
        await are_there(store, set(range(5)))


async def test_a_full_disk_is_no_reason_not_to_copy_and_copying_makes_room() -> None:
    disk = MemoryDisk()
    disk.fault = without_holes
    async with opened(disk, segment_bytes=1) as store:
        await fill(store, 26)
        await store.delete(order(1), [name_of(number) for number in range(26) if number % 9])
        disk.total, disk.free = 100 * LENGTH, 55 * LENGTH // 10
        await store._tend(is_index_due=False)
        with pytest.raises(MendfsError, match="full"):
            await store.put(block(50, content(50, LENGTH)), content(50, LENGTH))
        assert await copy_all(store) >= 1
        await are_there(store, set(range(0, 26, 9)))


async def test_a_copy_that_could_not_be_synced_changes_nothing() -> None:
    disk = MemoryDisk()
    store, kept = await half_deleted(disk)
    calls = 0

    def fail(operation: str, path: str) -> None:
        nonlocal calls
        if operation == "sync" and path.startswith("/data/segments"):
            calls += 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

    disk.fault = fail
    assert not await store.copier.copy_one()
    assert calls
    disk.fault = lambda operation, path: None
    await are_there(store, kept)
    assert await copy_all(store) >= 2
    await are_there(store, kept)
    await store.close()


class SlowDisk(MemoryDisk):
    """Its threads begin a copy's write when they may."""

    def __init__(self) -> None:
        super().__init__()
        self.writing = asyncio.Event()
        self.may_write = asyncio.Event()

    async def run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        if function is copying._write:
            self.writing.set()
            await self.may_write.wait()
        return await super().run(function, *args, **kwargs)


async def test_the_place_of_a_copy_that_was_given_up_is_nobody_elses_while_a_thread_writes_there() -> None:
    disk = SlowDisk()
    store, kept = await half_deleted(disk)
    copy = asyncio.create_task(store.copier.copy_one())
    await disk.writing.wait()
    copy.cancel()
    await asyncio.wait([copy])
    await store.put(block(30, content(30, LENGTH)), content(30, LENGTH))
    await store.sync()
    closing = asyncio.create_task(store.close())
    await asyncio.wait([closing], timeout=0.1)
    assert not closing.done(), "a store opened now would be written to by the thread of this one"
    disk.may_write.set()
    await closing
    async with opened(disk, seed=2, segment_bytes=1) as store:
        await are_there(store, kept | {30})


async def test_more_segments_than_may_be_open_are_all_read() -> None:
    disk = MemoryDisk()
    async with opened(disk, segment_bytes=1, open_files_max=8) as store:
        await fill(store, 300)
        files = store._segments._files
        assert len(disk.names("/data/segments")) > 20
        await settled(store)
        await are_there(store, set(range(300)))
        assert len(files) <= 8
        await store.delete(order(1), [name_of(number) for number in range(300) if number % 5])
        await copy_all(store)
        await are_there(store, set(range(0, 300, 5)))


async def test_the_event_loop_closes_no_segment_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the last descriptor of a deleted file goes the file: freeing it takes a slow disk long."""
    is_in_thread = False
    closed: list[tuple[str, bool]] = []
    close = MemoryFile.close

    def noted(file: MemoryFile) -> None:
        closed.append((file._path, is_in_thread))
        close(file)

    class WatchedDisk(MemoryDisk):
        async def run(self, function: Any, *args: Any, **kwargs: Any) -> Any:
            def in_thread() -> Any:
                nonlocal is_in_thread
                is_in_thread = True
                try:
                    return function(*args, **kwargs)
                finally:
                    is_in_thread = False

            return await super().run(in_thread)

    monkeypatch.setattr(MemoryFile, "close", noted)
    disk = WatchedDisk()
    disk.fault = without_holes
    async with opened(disk, segment_bytes=1, open_files_max=8) as store:
        await fill(store, 300)
        await store.delete(order(1), [name_of(number) for number in range(300) if number % 5])
        await settled(store)
        await copy_all(store)
        assert store.copier.copied_segments > 5
        await are_there(store, set(range(0, 300, 5)))
        assert segment_path(1) in {path for path, _ in closed}
    assert [path for path, is_there in closed if path.endswith(".seg") and not is_there] == []


async def test_a_file_that_is_read_is_closed_when_the_read_is_over() -> None:
    disk = MemoryDisk()
    file = OpenFiles(disk, 8).open("/data/segments/1", create=True)
    file.write((b"here",), 0)
    began, may_end = threading.Event(), threading.Event()

    def slow(operation: str, path: str) -> None:
        if operation == "read":
            began.set()
            assert may_end.wait(10)

    disk.fault = slow
    buffer = bytearray(4)
    reading = threading.Thread(target=file.read_into, args=(buffer, 0))
    closing = threading.Thread(target=file.close)
    reading.start()
    assert began.wait(10)
    closing.start()
    try:
        assert file.is_open, "its number could become another file's"
    finally:
        may_end.set()
        await asyncio.to_thread(reading.join)
        await asyncio.to_thread(closing.join)
    assert bytes(buffer) == b"here" and not file.is_open
    with pytest.raises(OSError):
        file.read_into(buffer, 0)


async def test_when_no_descriptors_are_left_files_nobody_uses_are_closed() -> None:
    disk = MemoryDisk()
    async with opened(disk, segment_bytes=1, open_files_max=1000) as store:
        await fill(store, 300)
        files = store._segments._files
        opened_before = len(files)
        assert opened_before > 20
        is_first = True

        def none_left(operation: str, path: str) -> None:
            nonlocal is_first
            if operation == "open" and len(files) >= opened_before:
                is_first = False
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), path)

        disk.fault = none_left
        store._append.leave(store._append.active)  # type: ignore[arg-type]  # there is one
        await store.put(block(300, content(300, LENGTH)), content(300, LENGTH))
        assert not is_first and len(files) < opened_before
        await store.sync()
        await are_there(store, set(range(301)))


async def test_a_disk_that_takes_long_to_open_one_file_delays_no_read_of_another_from_memory() -> None:
    disk = MemoryDisk()
    files = OpenFiles(disk, 8)
    file = files.open("/data/segments/1", create=True)
    file.write((b"here",), 0)
    began, may_end = threading.Event(), threading.Event()

    def slow(operation: str, path: str) -> None:
        if operation == "open" and not began.is_set():
            began.set()
            assert may_end.wait(10)

    disk.fault = slow
    opening = threading.Thread(target=lambda: files.open("/data/segments/2", create=True))
    opening.start()
    assert began.wait(10)
    buffer = bytearray(4)
    try:
        async with asyncio.timeout(5):
            assert await asyncio.to_thread(file.read_cached_into, buffer, 0)
    finally:
        may_end.set()
        await asyncio.to_thread(opening.join)
    assert bytes(buffer) == b"here"
