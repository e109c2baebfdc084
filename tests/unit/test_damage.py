"""Damaged segment files: every byte of a small one flipped in turn, pages zeroed, files cut, swapped, doubled, mixed.

Whatever is done, a block is read with its right bytes or not at all, the store opens, and each record that was not
touched is found: with the index there and with one made again by a scan.
"""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from mendfs.blocks import bad_pages, check_root, page_count
from mendfs.data.opening import StoreOptions, open_store
from mendfs.data.schema import Fence
from mendfs.data.store import Store
from mendfs.errors import BlockCorrupt, BlockMissing
from mendfs.kv.rocks import RocksEngine
from mendfs.model import BlockId, CommitSequence, Generation, Partition, Volume
from mendfs.world.local_disk import LocalDisk
from tests.unit.data_tools import FIRST_BLOCK, SERVER, abandon, block, content, open_on, volume, world_of
from tests.unit.memory_disk import MemoryDisk

INDEX = "/data/index"
SMALL = volume(block_size=512, page_size=64)
SMALL_LENGTHS = (1, 64, 65, 200, 512, 30)
HEADER = 4096

Stored = dict[str, bytes]
"""Path -> content of every file."""


def segment_path(number: int) -> str:
    return f"/data/segments/{number:010}.seg"


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """Thousands of openings: what they log would take longer than they do."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    yield
    structlog.reset_defaults()


def name_of(number: int) -> tuple[Partition, BlockId]:
    return Partition(number % 16), BlockId(FIRST_BLOCK + number)


def saved(disk: MemoryDisk) -> Stored:
    return {path: bytes(node.content) for path, node in disk.nodes.items()}


def restored(stored: Stored) -> MemoryDisk:
    disk = MemoryDisk()
    for path, raw in stored.items():
        disk.replace_file(path, raw)
    disk.counts.clear()
    return disk


async def right_ones(store: Store, lengths: dict[int, int], of: Volume) -> set[int]:
    """The blocks that are read whole and right. One that is returned otherwise fails where a reader verifies it."""
    right = set()
    for number, length in lengths.items():
        data = content(number, length)
        message = block(number, data, of)
        try:
            pages = await store.get(*name_of(number), 0, 1 << 20)
        except (BlockCorrupt, BlockMissing):
            continue
        view, rule = bytes(pages.view), {"page_size": of.page_size, "kind": of.checksum}
        try:
            check_root(pages.checksums, message.root, length=length, **rule)  # type: ignore[arg-type]  # as they are
        except BlockCorrupt:
            continue
        bad = bad_pages(view, pages.checksums, first_page=0, **rule)  # type: ignore[arg-type]  # as they are
        for page in set(range(page_count(length, of.page_size))) - set(bad):
            begin = page * of.page_size
            assert view[begin : begin + of.page_size] == data[begin : begin + of.page_size], "a wrong page verifies"
        if not bad:
            assert view == data
            right.add(number)
    return right


async def survivors(stored: Stored, lengths: dict[int, int], of: Volume, *, is_brief: bool = False) -> set[int]:
    """What can be read after opening; what the store says of itself agrees, and it takes new blocks."""
    disk = restored(stored)
    store = await open_on(disk, of=of, seed=2)
    right = await right_ones(store, lengths, of)
    found = await store.list_blocks((Partition(0), BlockId(0)), 1000, verify=True)
    assert {each.block - FIRST_BLOCK for each in found if each.ok} == right
    sums = await store.inventory([Partition(number) for number in range(16)])
    assert sum(each.count for each in sums) == len(right) == store.health().blocks
    if is_brief:
        await abandon(store)
        return right
    fresh = block(900, b"fresh", of)
    await store.put(fresh, b"fresh")
    await store.sync()
    await abandon(store)
    disk.kill()
    store = await open_on(disk, of=of, seed=3)
    assert await right_ones(store, {900: 0} | lengths, of) >= right
    pages = await store.get(*name_of(900), 0, 1)
    assert bytes(pages.view) == b"fresh"
    await abandon(store)
    return right


async def small_store() -> tuple[Stored, dict[int, int], dict[int, tuple[int, int]]]:
    """One segment of a few small records with a hole between them; where each record lies, without its padding."""
    disk = MemoryDisk()
    store = await open_on(disk, of=SMALL, segment_bytes=1 << 20)
    lengths = dict(enumerate(SMALL_LENGTHS))
    for number, length in lengths.items():
        await store.put(block(number, content(number, length), SMALL), content(number, length))
    await store.sync()
    await store.delete(Fence(Generation(1), CommitSequence(1)), [name_of(2)])
    del lengths[2]
    spans = {}
    for number in lengths:
        entry = await store._index.find(*name_of(number))
        assert entry is not None
        pages = page_count(entry.length, SMALL.page_size)
        spans[number] = (entry.offset, entry.offset + 88 + 8 * pages + entry.length)
    await store.close()
    return saved(disk), lengths, spans


def untouched(spans: dict[int, tuple[int, int]], begin: int, end: int) -> set[int]:
    """The records that have no byte in the range."""
    return {number for number, (first, last) in spans.items() if last <= begin or first >= end}


def damaged(stored: Stored, path: str, begin: int, what: bytes, *, with_index: bool) -> Stored:
    raw = stored[path]
    changed = {**stored, path: raw[:begin] + what + raw[begin + len(what) :]}
    if not with_index:
        del changed[INDEX]
    return changed


@pytest.mark.parametrize("with_index", [True, False])
async def test_every_byte_of_a_segment_flipped_in_turn(with_index: bool) -> None:
    stored, lengths, spans = await small_store()
    path = segment_path(1)
    raw = stored[path]
    # What fills up the two halves of the header is read by nobody: sixteen bytes of it at a time.
    filling = [range(at, at + 16) for half in (0, 2048) for at in range(half + 80, half + 2048, 16)]
    one_by_one = [range(at, at + 1) for at in (*range(80), *range(2048, 2128), *range(HEADER, len(raw)))]
    for turn, places in enumerate(filling + one_by_one):
        flipped = bytes(raw[at] ^ (1 << at % 8) for at in places)
        changed = damaged(stored, path, places.start, flipped, with_index=with_index)
        right = await survivors(changed, lengths, SMALL, is_brief=turn % 8 != 0)
        # A damaged record header, page checksum or page costs its record, and nothing else does.
        assert right == untouched(spans, places.start, places.stop), f"bytes {places}"


@pytest.mark.parametrize("with_index", [True, False])
async def test_a_segment_cut_at_every_length(with_index: bool) -> None:
    stored, lengths, spans = await small_store()
    path = segment_path(1)
    raw = stored[path]
    for end in (*range(0, HEADER, 64), *range(HEADER, len(raw))):
        changed = {**stored, path: raw[:end]}
        if not with_index:
            del changed[INDEX]
        right = await survivors(changed, lengths, SMALL, is_brief=end % 8 != 0)
        assert right == untouched(spans, end, len(raw)), f"cut at {end}"


async def two_segments() -> tuple[Stored, dict[int, int], dict[int, tuple[int, int, int]]]:
    """Two segments of blocks of some pages; number -> segment and place."""
    disk = MemoryDisk()
    store = await open_on(disk, segment_bytes=1)
    lengths = {number: 9000 + number for number in range(40)}
    for number, length in lengths.items():
        await store.put(block(number, content(number, length)), content(number, length))
    places = {}
    for number, length in lengths.items():
        entry = await store._index.find(*name_of(number))
        assert entry is not None
        places[number] = (entry.segment, entry.offset, entry.offset + 88 + 8 * 3 + length)
    await store.close()
    assert {segment for segment, _, _ in places.values()} == {1, 2}
    return saved(disk), lengths, places


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize("shift", [0, 700])
async def test_a_page_of_zeros_anywhere(with_index: bool, shift: int) -> None:
    stored, lengths, places = await two_segments()
    path = segment_path(1)
    for at in range(HEADER + shift, 40 * 4096, 4096):
        changed = damaged(stored, path, at, bytes(4096), with_index=with_index)
        hit = {n for n, (segment, begin, end) in places.items() if segment == 1 and begin < at + 4096 and end > at}
        assert set(lengths) - hit <= await survivors(changed, lengths, volume())


async def test_a_segment_header_of_zeros_is_written_again_from_the_index_and_said_without() -> None:
    stored, lengths, places = await two_segments()
    path = segment_path(1)
    zeroed = damaged(stored, path, 0, bytes(4096), with_index=True)
    assert await survivors(zeroed, lengths, volume()) == set(lengths)
    del zeroed[INDEX]
    rest = {number for number, (segment, _, _) in places.items() if segment == 2}
    assert await survivors(zeroed, lengths, volume()) == rest
    store = await open_on(restored(zeroed))
    assert any("cannot be found again" in line for line in store.health().troubles)
    await abandon(store)
    # Half of it, as a disk with sectors of 2 KiB would lose it, costs nothing.
    for begin in (0, 2048):
        half = damaged(stored, path, begin, bytes(2048), with_index=False)
        assert await survivors(half, lengths, volume()) == set(lengths)


@pytest.mark.parametrize("with_index", [True, False])
async def test_swapped_doubled_and_strange_segment_files(with_index: bool) -> None:
    stored, lengths, _ = await two_segments()
    if not with_index:
        del stored[INDEX]
    one, two = segment_path(1), segment_path(2)
    rng = random.Random(1)
    swapped = {**stored, one: stored[two], two: stored[one]}
    doubled = {**stored, segment_path(3): stored[one], segment_path(9): stored[one][:50_000]}
    moved = {path: raw for path, raw in stored.items() if path != one} | {segment_path(7): stored[one]}
    strange = {**stored, segment_path(5): rng.randbytes(9000), segment_path(6): b"", "/data/segments/x.seg": b"x"}
    for changed in (swapped, doubled, moved, strange):
        assert await survivors(changed, lengths, volume()) == set(lengths)
    store = await open_on(restored(doubled))
    assert sum("as another file does" in line for line in store.health().troubles) == 2
    await abandon(store)


async def test_an_older_copy_of_a_segment_has_what_it_had() -> None:
    """Segments put back from a backup: what was stored since is missing, and not mistaken for what is there."""
    disk = MemoryDisk()
    store = await open_on(disk)
    lengths = dict.fromkeys(range(20), 3000)
    for number in range(10):
        await store.put(block(number, content(number, 3000)), content(number, 3000))
    await store.sync()
    before = saved(disk)
    for number in range(10, 20):
        await store.put(block(number, content(number, 3000)), content(number, 3000))
    await store.close()
    newer = saved(disk)
    path = segment_path(1)
    assert await survivors({**newer, path: before[path]}, lengths, volume()) == set(range(10))
    # And the other way round: an index of that time beside the segments of now.
    assert await survivors({**newer, INDEX: before[INDEX]}, lengths, volume()) == set(range(20))


async def test_an_older_index_finds_what_was_copied_since() -> None:
    disk = MemoryDisk()
    store = await open_on(disk, segment_bytes=1)
    lengths = dict.fromkeys(range(30), 20000)
    for number in lengths:
        await store.put(block(number, content(number, 20_000)), content(number, 20_000))
    await store.sync()
    older = saved(disk)[INDEX]
    kept = set(range(0, 30, 5))
    gone = [name_of(number) for number in lengths if number not in kept]
    await store.delete(Fence(Generation(1), CommitSequence(1)), gone)
    # Copied and punched, but for the deleting of the file; then all of it.
    for is_file_left in (True, False):
        while not store._index.usage.is_complete:
            await store._index.count_usage()
        await store._tend(is_index_due=True)
        victim = store._segments.get(1)
        assert victim is not None
        held = await store._index.in_segment(1)
        await store.copier._copy_held(victim, held, set())
        if not is_file_left:
            await store.copier._retire(victim, copied_bytes=0)
        stored = {**saved(disk), INDEX: older}
        assert kept <= await survivors(stored, lengths, volume())
    await store.close()


@pytest.mark.parametrize("seed", range(40))
async def test_any_mixture_of_damage_is_never_a_wrong_byte_nor_a_crash(seed: int) -> None:
    rng = random.Random(seed)
    stored, lengths, places = await two_segments()
    touched: list[tuple[int, int, int]] = []
    for _ in range(rng.randrange(1, 6)):
        number = rng.choice((1, 2))
        path = segment_path(number)
        at = rng.randrange(HEADER, len(stored[path]))
        length = min(rng.choice((1, 100, 4096, 30_000)), len(stored[path]) - at)
        what = rng.choice((bytes(length), rng.randbytes(length), stored[segment_path(3 - number)][at : at + length]))
        stored = damaged(stored, path, at, what[:length], with_index=True)
        touched.append((number, at, at + length))
    if rng.random() < 0.5:
        del stored[INDEX]
    hit = {
        number
        for number, (segment, begin, end) in places.items()
        if any(segment == of and begin < last and end > first for of, first, last in touched)
    }
    assert set(lengths) - hit <= await survivors(stored, lengths, volume())


@pytest.mark.parametrize("with_index", [True, False])
async def test_flipped_bytes_on_the_real_disk(tmp_path: Path, with_index: bool) -> None:
    """A sample of what the disk in memory shows for all places."""
    lengths = dict.fromkeys(range(8), 3000)
    places: dict[int, tuple[int, int]] = {}

    async def opened() -> Store:
        disk = world_of(LocalDisk(), random.SystemRandom().getrandbits(64))
        return await open_store(
            disk, str(tmp_path), RocksEngine.open, volume=volume(), server_id=SERVER, options=StoreOptions()
        )

    store = await opened()
    for number in lengths:
        await store.put(block(number, content(number, 3000)), content(number, 3000))
        entry = await store._index.find(*name_of(number))
        assert entry is not None
        places[number] = (entry.offset, entry.offset + 88 + 8 + 3000)
    await store.close()
    segment = next((tmp_path / "segments").iterdir())
    raw = segment.read_bytes()
    for at in random.Random(3).sample(range(len(raw)), 10):
        segment.write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        if not with_index:
            (tmp_path / "index").rename(tmp_path / f"old-{at}")
        store = await opened()
        assert untouched(places, at, at + 1) <= await right_ones(store, lengths, volume())
        await store.close()
