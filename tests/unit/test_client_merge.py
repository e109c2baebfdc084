"""Merging on a cluster in one process: bytes stay as they are, whoever writes, cuts, appends or dies meanwhile."""

import asyncio
import os
import random
import time
from typing import Any

import pytest

from mendfs import merging
from mendfs.client import merge
from mendfs.client.volume import OpenFile, Volume
from mendfs.errors import StoreFull
from mendfs.meta import commit
from mendfs.model import Inode, KiB
from mendfs.wire.messages.meta import MergeSlot, SetAttributes
from tests.unit.client_tools import Cluster, cluster, contents, read_all, until, write_file

SLOT = 64 * KiB


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Crowded slots are merged without waiting for quiet."""
    monkeypatch.setattr(merge, "QUIET_S", 0.0)
    monkeypatch.setattr(merge, "QUIET_MAX_S", 0.0)
    monkeypatch.setattr(merge, "OTHERS_QUIET_S", 0.0)
    monkeypatch.setattr(merge, "TICK_S", 0.005)
    monkeypatch.setattr(merge, "RETRY_MIN_S", 0.01)


async def counts(volume: Volume, inode: Inode) -> list[int]:
    """How many extents each slot has."""
    return [len(each.extents) for each in await volume.where(inode, verify=False)]


async def until_merged(volume: Volume, inode: Inode, within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while max(await counts(volume, inode)) > merging.EXTENTS_MAX:
            await asyncio.sleep(0.01)


async def crowd(file: OpenFile, data: bytearray, *, first: int = 0, every: int = 512, length: int = 100) -> None:
    """Write a piece at every `every` bytes, and commit."""
    for at in range(first, len(data) - length, every):
        piece = os.urandom(length)
        data[at : at + length] = piece
        await file.write(piece, at)
    await file.flush()


async def crowded_file(volume: Volume, slots: int = 2) -> tuple[OpenFile, bytearray]:
    data = bytearray(os.urandom(slots * SLOT))
    file = await write_file(volume, b"f", bytes(data))
    await file.flush()
    await crowd(file, data)
    return file, data


def merges(volume: Volume) -> int:
    """How many it has made."""
    assert volume._merger is not None
    return volume._merger.merged_count


def stop_merging(volume: Volume) -> None:
    """As if it died before it got to them."""
    assert volume._merger is not None
    volume._merger.stop()


def names(made: Cluster) -> set[tuple[int, int]]:
    """Every block that any store holds."""
    return {name for store in made.stores for name in store.blocks}


async def test_a_crowded_slot_is_merged_and_nobody_sees_it(at_once: None) -> None:
    async with cluster() as made:
        volume = await made.client()
        file, data = await crowded_file(volume)
        before = await volume.attributes(file.inode)
        await until_merged(volume, file.inode)
        assert await counts(volume, file.inode) == [1, 1]
        assert await volume.attributes(file.inode) == before
        assert await read_all(file) == data
        assert (await volume.open_file(file.inode, flags=os.O_RDONLY)).keep_cache, "the kernel may keep its pages"
        await until(lambda: len(names(made)) == 2)
        assert await contents(await made.client(), file.inode) == data


@pytest.mark.parametrize(("slot_quiet_s", "is_merged"), [(30.0, False), (0.2, True)])
async def test_a_slot_is_left_alone_while_its_file_is_written_to_unless_for_long(
    slot_quiet_s: float, is_merged: bool, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A random writer leaves each slot alone for a while, all the time: merging then would multiply what is written."""
    monkeypatch.setattr(merge, "QUIET_S", 0.3)
    monkeypatch.setattr(merge, "QUIET_MAX_S", 0.3)
    monkeypatch.setattr(merge, "SLOT_QUIET_S", slot_quiet_s)
    async with cluster() as made:
        volume = await made.client()
        file, data = await crowded_file(volume, slots=1)
        began_s = time.monotonic()
        while time.monotonic() < began_s + 1.0 and not merges(volume):
            await file.write(b"elsewhere", SLOT)
            await file.flush()
            await asyncio.sleep(0.02)
        assert bool(merges(volume)) is is_merged
        await until(lambda: merges(volume) == 1)
        assert (await counts(volume, file.inode))[0] == 1
        assert await contents(volume, file.inode) == data + b"elsewhere"


async def test_what_was_fsynced_survives_a_power_cut_right_after_its_merge(at_once: None) -> None:
    """The merge may free blocks that an fsync has promised: its own must be durable before."""
    async with cluster() as made:
        volume = await made.client()
        file, data = await crowded_file(volume)
        await file.fsync()
        await until_merged(volume, file.inode)
        for store in made.stores:
            store.lose_unsynced()
        assert await contents(await made.client(), file.inode) == data
        await file.fsync()


async def test_an_fsync_under_way_while_its_slots_are_merged_waits_for_the_merges_to_be_durable(at_once: None) -> None:
    """The log was synced before the merge: without another sync a power cut brings back blocks that nobody synced."""
    async with cluster() as made:
        sequences = []
        merge_slot = made.meta._handlers[MergeSlot]

        async def noting(peer: Any, request: MergeSlot) -> Any:
            answer: Any = await merge_slot(peer, request)
            sequences.append(answer.sequence)
            return answer

        made.meta._handlers[MergeSlot] = noting
        volume = await made.client()
        gets = asyncio.Event()
        syncs = [asyncio.Event() for _ in made.stores]
        for store, sync in zip(made.stores, syncs, strict=True):
            store.hold_gets, store.hold_syncs = gets, sync
        file, _ = await crowded_file(volume)
        await volume._durability.sync_log()
        assert file._file.unsynced
        fsync = asyncio.create_task(file.fsync())
        await until(lambda: all(store.syncs for store in made.stores))
        gets.set()
        await until(lambda: merges(volume) == 2)
        syncs[1].set()  # too few to have made anything durable
        await fsync
        assert made.engine.synced_sequence >= max(sequences)
        for sync in syncs:
            sync.set()


async def test_what_waits_for_a_merge_does_not_pass_a_truncation(
    at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merging, "CROWD_MAX", merging.EXTENTS_MAX + 1)
    monkeypatch.setattr(merge, "HOLD_FROM", merging.EXTENTS_MAX)
    async with cluster() as made:
        truncate = made.meta._handlers[SetAttributes]
        cut, answered, gets = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def late(peer: Any, request: SetAttributes) -> Any:
            answer = await truncate(peer, request)
            cut.set()
            await answered.wait()
            return answer

        made.meta._handlers[SetAttributes] = late
        volume = await made.client()
        for store in made.stores:
            store.hold_gets = gets
        file, _ = await crowded_file(volume, slots=1)
        await until(lambda: any(store.gets for store in made.stores))
        await file.write(b"old", 50)
        flush = asyncio.create_task(file.flush())
        await until(lambda: any(generation.is_wanted for generation in file._file.collecting.values()))
        truncation = asyncio.create_task(volume.set_attributes(file.inode, size=0))
        await cut.wait()
        gets.set()
        assert volume._merger is not None
        running = volume._merger._running
        await until(lambda: not running)
        await asyncio.wait([flush], timeout=0.2)
        answered.set()
        await truncation
        await flush
        assert (await volume.attributes(file.inode)).size == 0
        assert await contents(await made.client(), file.inode) == b""


async def test_a_merge_that_the_meta_server_answers_late_leaves_no_id_in_flight(
    at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session with an id in flight for ever gets no more ranges after some time: every write would hang."""
    monkeypatch.setattr(merge, "META_TIMEOUT_S", 0.2)
    async with cluster() as made:
        merge_slot = made.meta._handlers[MergeSlot]
        asked, may_answer = asyncio.Event(), asyncio.Event()

        async def late(peer: Any, request: MergeSlot) -> Any:
            asked.set()
            await may_answer.wait()
            return await merge_slot(peer, request)

        made.meta._handlers[MergeSlot] = late
        volume = await made.client()
        file, data = await crowded_file(volume, slots=1)
        await asked.wait()
        await asyncio.wait([asyncio.create_task(until_merged(volume, file.inode))], timeout=0.5)
        may_answer.set()
        await until_merged(volume, file.inode)
        await until(lambda: not volume._shared.blocks._in_flight)
        assert await contents(volume, file.inode) == data


async def test_another_client_goes_on_reading_what_was_merged_and_freed_under_it(at_once: None) -> None:
    async with cluster() as made:
        volume = await made.client()
        file, data = await crowded_file(volume)
        await until_merged(volume, file.inode)
        await until(lambda: len(names(made)) == 2)
        reader = await made.client(read_only=True, cache_bytes_max=1 << 20)
        other = await reader.open_file(file.inode, flags=os.O_RDONLY)
        assert await read_all(other) == data
        old = names(made)
        await crowd(file, data, first=7)
        assert await read_all(await reader.open_file(file.inode, flags=os.O_RDONLY)) == data
        await until_merged(volume, file.inode)
        await until(lambda: not old & names(made))
        assert await read_all(other) == data


async def test_whoever_opens_a_file_that_a_dead_client_left_crowded_merges_it(at_once: None) -> None:
    async with cluster() as made:
        first = await made.client()
        stop_merging(first)
        file, data = await crowded_file(first)
        reader = await made.client(read_only=True)
        assert await contents(reader, file.inode) == data
        second = await made.client()
        assert min(await counts(second, file.inode)) > merging.EXTENTS_MAX
        assert await contents(second, file.inode) == data
        await until_merged(second, file.inode)
        assert await contents(reader, file.inode) == data


async def test_a_merge_that_cannot_be_stored_harms_nothing_and_is_made_later(at_once: None) -> None:
    async with cluster() as made:
        volume = await made.client(write_timeout_s=1.0)
        stop_merging(volume)
        file, data = await crowded_file(volume, slots=1)
        second = await made.client()
        for store in made.stores:
            store.put_error = StoreFull("no room")
        assert await contents(second, file.inode) == data
        puts = sum(store.puts for store in made.stores)
        await until(lambda: sum(store.puts for store in made.stores) > puts)
        assert await contents(second, file.inode) == data
        for store in made.stores:
            store.put_error = None
        await until_merged(second, file.inode)
        assert await contents(second, file.inode) == data


async def test_closing_does_not_wait_for_merges(at_once: None) -> None:
    async with cluster() as made:
        volume = await made.client()
        file, data = await crowded_file(volume, slots=1)
        stop_merging(volume)
        other = await made.client()
        for store in made.stores:
            store.hold_puts = asyncio.Event()
        puts = sum(store.puts for store in made.stores)
        assert await contents(other, file.inode) == data
        await until(lambda: sum(store.puts for store in made.stores) > puts)
        began_s = time.monotonic()
        assert await other.close() == ()
        assert time.monotonic() - began_s < 5
        for store in made.stores:
            assert store.hold_puts is not None
            store.hold_puts.set()


async def test_a_slot_never_has_more_pieces_than_a_commit_can_hold(
    at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many tiny writes with an fsync here and there: held back for merges, and never refused."""
    monkeypatch.setattr(merge, "HOLD_FROM", 300)
    monkeypatch.setattr(merging, "CROWD_MAX", 200)
    monkeypatch.setattr(commit, "EXTENTS_MAX", 1500)
    monkeypatch.setattr("mendfs.client.slot_buffer.PIECES_MAX", 100)
    rng = random.Random(5)
    async with cluster() as made:
        volume = await made.client(flush_after_s=0.01)
        data = bytearray(os.urandom(SLOT))
        file = await write_file(volume, b"f", bytes(data))
        await file.flush()
        most = 0
        for n in range(6000):
            at = rng.randrange(SLOT)
            data[at] = n & 255
            await file.write(data[at : at + 1], at)
            if n % 100 == 0:
                most = max(most, *await counts(volume, file.inode))
        await file.fsync()
        assert merging.EXTENTS_MAX < most < 1500
        assert await read_all(file) == data
        await until_merged(volume, file.inode)
        assert await contents(await made.client(), file.inode) == data


async def test_a_commit_without_room_merges_its_slot_first(at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge, "TICK_S", 3600.0)
    monkeypatch.setattr(commit, "EXTENTS_MAX", 300)
    async with cluster() as made:
        volume = await made.client()
        file, data = await crowded_file(volume, slots=1)
        await crowd(file, data, first=211)
        assert max(await counts(volume, file.inode)) <= 300
        assert await contents(await made.client(), file.inode) == data


@pytest.mark.parametrize("seed", range(3))
async def test_writes_cuts_and_appends_of_two_clients_among_merges(
    seed: int, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step is compared with a plain array of bytes, while both clients merge whatever they can, all the time."""
    monkeypatch.setattr(merging, "EXTENTS_MAX", 4)
    monkeypatch.setattr(merging, "HOLE_BYTES_MIN", 64)
    monkeypatch.setattr(merging, "WASTE_BYTES_MIN", 512)
    rng = random.Random(seed)
    async with cluster(block_size=4 * KiB, page_size=512) as made:
        clients = [await made.client(), await made.client()]
        file = await write_file(clients[0], b"f", b"")
        await file.flush()
        expected = bytearray()
        for step in range(200):
            volume = rng.choice(clients)
            other = await volume.open_file(file.inode, flags=os.O_RDWR | (os.O_APPEND if step % 7 == 0 else 0))
            if step % 7 == 0:
                piece = rng.randbytes(rng.randrange(1, 3000))
                await other.write(piece, 0)
                expected += piece
            elif step % 11 == 0:
                size = rng.randrange(len(expected) + 2000)
                await volume.set_attributes(file.inode, size=size)
                expected[size:] = bytes(max(0, size - len(expected)))
            else:
                for _ in range(rng.randrange(1, 12)):
                    piece = rng.randbytes(rng.randrange(1, 200))
                    at = rng.randrange(len(expected) + 300)
                    await other.write(piece, at)
                    expected += bytes(max(0, at + len(piece) - len(expected)))
                    expected[at : at + len(piece)] = piece
            await other.release()
            if step % 3 == 0:
                await asyncio.sleep(rng.random() * 0.02)
            assert await contents(rng.choice(clients), file.inode) == expected, f"seed {seed}, step {step}"
        await asyncio.sleep(0.05)
        assert await contents(await made.client(), file.inode) == expected
        assert sum(merges(volume) for volume in clients) > 10, "else this shows nothing"


async def test_a_block_that_no_replica_can_give_is_not_merged_away(at_once: None) -> None:
    """A merge verifies what it reads: rot must not become good bytes with a fresh checksum."""
    async with cluster() as made:
        volume = await made.client()
        stop_merging(volume)
        file, data = await crowded_file(volume, slots=1)
        held = [(store, name, store.blocks[name]) for store in made.stores for name in store.blocks]
        largest = max(held, key=lambda each: len(each[2]))[1]
        for store, name, _ in held:
            if name == largest:
                store.corrupt(*name)  # type: ignore[arg-type]
        before = names(made)
        second = await made.client()
        other = await second.open_file(file.inode, flags=os.O_RDONLY)
        gets = sum(store.gets for store in made.stores)
        await until(lambda: sum(store.gets for store in made.stores) > gets + 3)
        assert merges(second) == 0
        assert names(made) == before
        for store, name, good in held:
            store.blocks[name] = good
            store._checksums.clear()
        await until(lambda: merges(second) == 1)
        assert await read_all(other) == data


async def test_small_appends_do_not_pile_up(at_once: None) -> None:
    """A log: its tail is merged as it grows, and no append is lost or torn."""
    async with cluster(block_size=1 << 20) as made:
        volume = await made.client()
        file = await write_file(volume, b"f", b"")
        await file.flush()
        log = await volume.open_file(file.inode, flags=os.O_WRONLY | os.O_APPEND)
        expected = b""
        most = 0
        for number in range(800):
            line = b"line %d\n" % number
            await log.write(line, 0)
            expected += line
            if number % 50 == 0:
                most = max(most, *await counts(volume, file.inode))
        assert most < 4 * merging.EXTENTS_MAX
        assert await contents(await made.client(), file.inode) == expected
