"""Opening a store after whatever happened to it."""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

from mendfs.data.opening import StoreOptions, open_store
from mendfs.data.record import SEGMENT_HEADER_BYTES
from mendfs.data.schema import MARK_KEY, Fence, encode_mark
from mendfs.data.store import Store
from mendfs.errors import BlockCorrupt, BlockMissing, Fenced, StoreDamaged
from mendfs.kv.memory import MemoryEngine
from mendfs.kv.rocks import RocksEngine
from mendfs.model import BlockId, CommitSequence, Generation, Partition
from mendfs.wire.messages.data import HeldBlock, PutBlock
from mendfs.world.local_disk import LocalDisk
from tests.unit.data_tools import FIRST_BLOCK, SERVER, abandon, block, content, open_on, opened, read, volume, world_of
from tests.unit.memory_disk import MemoryDisk

SEGMENT = "/data/segments/0000000001.seg"
GOLDEN = Path(__file__).parents[1] / "golden" / "data-v1"


def lose_index(disk: MemoryDisk) -> None:
    del disk.nodes["/data/index"]


async def held(store: Store, *, verify: bool = True) -> dict[int, HeldBlock]:
    found = await store.list_blocks((Partition(0), BlockId(0)), 10_000, verify=verify)
    return {each.block - FIRST_BLOCK: each for each in found}


async def sums_are_right(store: Store) -> None:
    """The inventory says what a list says."""
    sums = await store.inventory([Partition(number) for number in range(16)])
    good = [each for each in (await held(store, verify=False)).values() if each.ok]
    assert sum(each.count for each in sums) == len(good) == store.health().blocks


async def put_all(store: Store, numbers: range, length: int = 3000) -> list[PutBlock]:
    messages = [block(number, content(number, length)) for number in numbers]
    for number, message in zip(numbers, messages, strict=True):
        await store.put(message, content(number, length))
    return messages


async def test_kill_9_loses_nothing_acknowledged() -> None:
    disk = MemoryDisk()
    for life in range(4):
        store = await open_on(disk, seed=life)
        assert set(await held(store)) == set(range(life * 10))
        await put_all(store, range(life * 10, life * 10 + 10))
        if life == 2:
            await store.sync()
        await abandon(store)
        disk.kill()
    async with opened(disk, seed=9) as store:
        assert all(each.ok for each in (await held(store)).values())
        await sums_are_right(store)


async def test_what_recovery_brought_back_is_durable_before_it_is_said() -> None:
    """Its new incarnation vouches for what it says it has: a power cut right after opening must not take it."""
    disk = MemoryDisk()
    store = await open_on(disk)
    await put_all(store, range(10))
    await abandon(store)
    disk.kill()
    store = await open_on(disk, seed=2)
    assert len(await held(store)) == 10
    await abandon(store)
    disk.cut(1)
    async with opened(disk, seed=3) as store:
        assert len(await held(store)) == 10


@pytest.mark.parametrize("seed", range(60))
async def test_a_power_cut_takes_only_what_was_not_synced(seed: int) -> None:
    """Promise 1 for one server: synced blocks are there, unsynced ones are right or missing, the sums agree."""
    disk = MemoryDisk()
    rng = random.Random(seed)
    synced: set[int] = set()
    deleted: set[int] = set()
    following = 0
    was_scanned = False
    for life in range(5):
        store = await open_on(disk, seed=seed * 10 + life, segment_bytes=1)
        found = {number: each.ok for number, each in (await held(store)).items()}
        assert synced <= {number for number, is_ok in found.items() if is_ok}
        # Without an index a torn record cannot be told from a rotten one: it is listed as bad, and not held.
        was_scanned |= store.recovered_without_index and life > 0
        assert was_scanned or (all(found.values()) and not deleted & found.keys())
        await sums_are_right(store)
        for _ in range(rng.randrange(1, 12)):
            await put_all(store, range(following, following + 1), length=rng.choice([10, 5000, 150_000]))
            following += 1
            if rng.random() < 0.2:
                await store.sync()
                synced = {number for number, each in (await held(store)).items() if each.ok}
            if rng.random() < 0.1 and synced:
                gone = rng.choice(sorted(synced))
                name = (Partition(gone % 16), BlockId(FIRST_BLOCK + gone))
                await store.delete(Fence(Generation(1), CommitSequence(len(deleted) + 1)), [name])
                deleted.add(gone)
                synced.discard(gone)
        await abandon(store)
        disk.cut(seed * 10 + life)
        if rng.random() < 0.2:
            lose_index(disk)


async def test_a_tail_torn_at_any_position_opens_with_what_lies_before_it() -> None:
    disk = MemoryDisk()
    store = await open_on(disk)
    await put_all(store, range(2), length=300)
    await store.sync()
    synced_end = len(disk.nodes[SEGMENT].content)
    await put_all(store, range(2, 4), length=300)
    await abandon(store)
    whole = bytes(disk.nodes[SEGMENT].content)
    index = bytes(disk.nodes["/data/index"].content)
    record = 448
    for end in range(synced_end, len(whole), 7):
        disk.kill()
        disk.nodes[SEGMENT].content[:] = whole[:end]
        disk.nodes["/data/index"].content[:] = index
        store = await open_on(disk, seed=2)
        found = await held(store)
        expected = {0, 1} | ({2} if end >= SEGMENT_HEADER_BYTES + 3 * record - 64 else set())
        assert {0, 1} <= set(found) <= expected | {2}
        assert all(each.ok for each in found.values())
        assert len(disk.nodes[SEGMENT].content) >= synced_end - 64
        await put_all(store, range(4, 5))
        assert await read(store, block(4, content(4, 3000))) == content(4, 3000)
        await sums_are_right(store)
        await abandon(store)


@pytest.mark.parametrize("seed", range(30))
async def test_flipped_bits_past_the_checkpoint_are_never_believed(seed: int) -> None:
    disk = MemoryDisk()
    store = await open_on(disk)
    await put_all(store, range(3), length=1000)
    await store.sync()
    begin = len(disk.nodes[SEGMENT].content)
    await put_all(store, range(3, 9), length=1000)
    await abandon(store)
    disk.kill()
    content_of = disk.nodes[SEGMENT].content
    rng = random.Random(seed)
    place = rng.randrange(begin + 64, len(content_of))
    content_of[place] ^= 1 << rng.randrange(8)
    async with opened(disk, seed=2) as store:
        found = await held(store)
        assert len(found) >= 8, "one record at most is hit"
        assert {0, 1, 2} <= set(found)
        assert all(each.ok for each in found.values())
        await sums_are_right(store)


@pytest.mark.parametrize("place", [0, 40, 87, 90, 1000])
async def test_rot_before_the_checkpoint_is_found_by_reading_not_at_the_start(place: int) -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        await put_all(store, range(3))
    disk.nodes[SEGMENT].content[SEGMENT_HEADER_BYTES + place] ^= 1
    async with opened(disk, seed=2) as store:
        assert [each.ok for each in (await held(store)).values()] == [False, True, True]
        await sums_are_right(store)


@pytest.mark.seed("D5")
async def test_without_its_index_a_store_is_what_its_segments_say() -> None:
    disk = MemoryDisk()
    async with opened(disk, segment_bytes=1) as store:
        messages = await put_all(store, range(30), length=100_000)
        await store.delete(Fence(Generation(1), CommitSequence(1)), [(messages[4].partition, messages[4].block)])
        before = await store.inventory([Partition(number) for number in range(16)])
    lose_index(disk)
    async with opened(disk, seed=2, segment_bytes=1) as store:
        found = await held(store)
        assert set(found) == set(range(30)) - {4}
        assert all(each.ok for each in found.values())
        assert await store.inventory([Partition(number) for number in range(16)]) == before
        assert await read(store, messages[7]) == content(7, 100_000)
        await put_all(store, range(30, 32), length=100_000)
    async with opened(disk, seed=3, segment_bytes=1) as store:
        assert len(await held(store)) == 31


async def test_without_its_index_a_store_still_refuses_older_generations_orders() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        await put_all(store, range(1))
    lose_index(disk)
    async with opened(disk, seed=2) as store:
        assert store.highest_generation == 1
        with pytest.raises(Fenced):
            await store.delete(Fence(Generation(0), CommitSequence(99)), [])


async def test_without_its_index_a_store_still_refuses_orders_older_than_those_it_obeyed() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        await put_all(store, range(2))
        await store.delete(Fence(Generation(7), CommitSequence(3)), [(Partition(0), BlockId(FIRST_BLOCK))])
    lose_index(disk)
    async with opened(disk, seed=2) as store:
        assert store.highest_generation == 7
        with pytest.raises(Fenced):
            await store.delete(Fence(Generation(6), CommitSequence(99)), [])
    lose_index(disk)
    disk.nodes["/data/fence"].content[0] ^= 1
    async with opened(disk, seed=3) as store:
        assert store.highest_generation == 1, "a damaged note is none"


async def test_what_the_disk_cannot_read_costs_what_lies_there_and_nothing_else() -> None:
    """A bad sector in the middle: the store opens, with its index and without, and everything else is found."""
    for is_index_lost in (True, False):
        disk = MemoryDisk()
        store = await open_on(disk)
        await put_all(store, range(10), length=9000)
        entry = await store._index.find(Partition(4), BlockId(FIRST_BLOCK + 4))
        assert entry is not None
        await abandon(store)
        disk.kill()
        if is_index_lost:
            lose_index(disk)
        disk.unreadable = range(entry.offset + 5000, entry.offset + 5512)
        async with opened(disk, seed=2) as store:
            assert {number for number, each in (await held(store)).items() if each.ok} == set(range(10)) - {4}
            assert any("cannot be read" in line for line in store.health().troubles)
            await sums_are_right(store)


async def test_an_index_half_built_is_built_again() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        await put_all(store, range(40))
    lose_index(disk)
    store = await open_on(disk, seed=2)
    await abandon(store)
    disk.kill()
    log = disk.nodes["/data/index"].content
    del log[len(log) // 2 :]
    async with opened(disk, seed=3) as store:
        assert set(await held(store)) == set(range(40))
        await sums_are_right(store)


async def test_a_rotten_block_found_by_a_full_scan_serves_its_good_pages_but_is_not_held() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        messages = await put_all(store, range(3), length=10_000)
    data = content(1, 10_000)
    at = disk.nodes[SEGMENT].content.index(data)
    disk.nodes[SEGMENT].content[at + 9000] ^= 1
    lose_index(disk)
    async with opened(disk, seed=2) as store:
        assert await store.have([(m.partition, m.block) for m in messages]) == (
            messages[0].root,
            None,
            messages[2].root,
        )
        assert (await read(store, messages[1]))[:8192] == data[:8192]
        await sums_are_right(store)


async def test_a_damaged_segment_header_is_written_again_from_the_index() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        messages = await put_all(store, range(3))
    before = bytes(disk.nodes[SEGMENT].content)
    disk.nodes[SEGMENT].content[20] ^= 1
    async with opened(disk, seed=2) as store:
        assert await read(store, messages[1]) == content(1, 3000)
        assert disk.nodes[SEGMENT].content == before
        assert not disk.nodes[SEGMENT].changes


async def test_without_index_and_header_a_segment_is_left_alone_and_said() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        messages = await put_all(store, range(3))
    for half in (0, 2048):
        disk.nodes[SEGMENT].content[half + 30] ^= 1
    before = bytes(disk.nodes[SEGMENT].content)
    lose_index(disk)
    async with opened(disk, seed=3) as store:
        assert any("cannot be found again" in line for line in store.health().troubles)
        with pytest.raises(BlockMissing):
            await read(store, messages[1])
        await put_all(store, range(5, 6))
    assert disk.nodes[SEGMENT].content == before


@pytest.mark.seed("D5")
async def test_a_deleted_segment_file_is_said_and_its_blocks_are_missing() -> None:
    disk = MemoryDisk()
    async with opened(disk, segment_bytes=1) as store:
        messages = await put_all(store, range(4), length=150_000)
    del disk.nodes[SEGMENT]
    async with opened(disk, seed=2, segment_bytes=1) as store:
        assert len(await held(store)) == 3
        assert any("from other servers" in line for line in store.health().troubles)
        await sums_are_right(store)
        await store.put(messages[0], content(0, 150_000))
        assert await read(store, messages[0]) == content(0, 150_000)


async def test_a_file_shorter_than_what_was_synced_is_corrupt_where_it_is_missing() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        messages = await put_all(store, range(3))
    del disk.nodes[SEGMENT].content[SEGMENT_HEADER_BYTES + 5000 :]
    async with opened(disk, seed=2) as store:
        assert await read(store, messages[0]) == content(0, 3000)
        with pytest.raises(BlockCorrupt):
            await read(store, messages[1])
        await put_all(store, range(3, 5))
        assert await read(store, block(4, content(4, 3000))) == content(4, 3000)


async def test_data_that_looks_like_records_is_none() -> None:
    """A block holds the bytes of a segment; it is torn; the scan goes through it and believes nothing in it."""
    disk = MemoryDisk()
    async with opened(disk) as store:
        await put_all(store, range(20), length=1000)
    copy = bytes(disk.nodes[SEGMENT].content)
    store = await open_on(disk, seed=2)
    await store.put(block(50, copy), copy)
    await put_all(store, range(51, 52))
    await abandon(store)
    disk.kill()
    at = disk.nodes[SEGMENT].content.rindex(copy[:4096])
    # The header goes, so that the scan walks through the data.
    at = disk.nodes[SEGMENT].content.rindex(b"MFSR", 0, at)
    disk.nodes[SEGMENT].content[at] = 0
    async with opened(disk, seed=3) as store:
        found = await held(store)
        assert set(found) == {51, *range(20)}
        assert all(each.ok for each in found.values())


async def test_segments_of_another_server_are_not_touched() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        await put_all(store, range(1))
    lose_index(disk)
    raw = disk.nodes[SEGMENT]
    raw.content[56:72] = b"z" * 16
    raw.content[72:80] = xxh3_64_intdigest(bytes(raw.content[:72])).to_bytes(8, "big")
    before = bytes(raw.content)
    with pytest.raises(StoreDamaged, match="belongs to server"):
        await open_on(disk, seed=2)
    assert bytes(raw.content) == before


async def test_an_index_of_another_server_is_refused() -> None:
    disk = MemoryDisk()
    async with opened(disk) as store:
        await put_all(store, range(1))
    engine = await MemoryEngine.open(disk, "/data/index")
    tx = engine.begin()
    tx.put(MARK_KEY, encode_mark(b"x" * 16, b"v" * 16))
    await engine.commit(tx)
    await engine.close()
    with pytest.raises(StoreDamaged, match="another server"):
        await open_on(disk, seed=2)


async def test_the_stored_sample_of_format_version_1_is_still_read(tmp_path: Path) -> None:
    """Whatever later versions write, they read this: a folder's segments as the first version left them."""
    shutil.copytree(GOLDEN / "segments", tmp_path / "segments")

    async def no_log(path: str) -> MemoryEngine:
        return await MemoryEngine.open()

    disk = LocalDisk()
    store = await open_store(
        world_of(disk), str(tmp_path), no_log, volume=volume(), server_id=SERVER, options=StoreOptions()
    )
    for number, length in enumerate([1, 4095, 4096, 9000]):
        assert await read(store, block(number, content(number, length))) == content(number, length)
    assert store.health().blocks == 4
    await store.close()


WRITER = """
import asyncio, sys
from mendfs.data.opening import StoreOptions, open_store
from mendfs.kv.rocks import RocksEngine
from mendfs.world.local_disk import LocalDisk
from tests.unit.data_tools import SERVER, block, content, volume, world_of
import random

async def main(folder, first):
    disk = LocalDisk()
    store = await open_store(
        world_of(disk, random.SystemRandom().getrandbits(64)), folder, RocksEngine.open,
        volume=volume(), server_id=SERVER, options=StoreOptions(),
    )
    number = int(first)
    while True:
        length = (100, 5000, 250_000)[number % 3]
        await store.put(block(number, content(number, length)), content(number, length))
        print(number, flush=True)
        number += 1
        if number % 20 == 0:
            await store.sync()

asyncio.run(main(*sys.argv[1:]))
"""


def write_and_kill(folder: Path, first: int, lines: int) -> int:
    """Kill a process that puts blocks (-9) once `lines` were acknowledged. Returns the last one that was."""
    command = [sys.executable, "-c", WRITER, str(folder), str(first)]
    acknowledged: list[int] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=GOLDEN.parents[2]) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            # structlog writes to the same place; a line cut off by the kill has no end.
            if line.strip().isdigit() and line.endswith(b"\n"):
                acknowledged.append(int(line))
            if len(acknowledged) == lines:
                writer.kill()
    return acknowledged[-1]


async def test_kill_9_of_a_process_on_the_real_disk_loses_nothing_acknowledged(tmp_path: Path) -> None:
    following = 0
    for lines in (30, 7, 50):
        following = write_and_kill(tmp_path, following, lines) + 1
        disk = LocalDisk()
        store = await open_store(
            world_of(disk), str(tmp_path), RocksEngine.open, volume=volume(), server_id=SERVER, options=StoreOptions()
        )
        found = await held(store)
        assert set(range(following)) <= set(found)
        assert all(each.ok for each in found.values())
        await sums_are_right(store)
        await store.close()
