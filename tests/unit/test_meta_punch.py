"""Holes in files: what they take away, in steps that a transaction can hold, and what stays."""

import errno
import random

import pytest

from mendfs.errors import OperationError
from mendfs.extents import plan
from mendfs.meta import commit, punch, schema
from mendfs.meta.attributes import set_attributes
from mendfs.model import Inode, Slot
from mendfs.wire.messages import meta as messages
from tests.unit.meta_tools import BLOCK_SIZE, PARAMETERS, MetaVolume

SLOTS = 50


async def punch_all(volume: MetaVolume, inode: Inode, begin: int, end: int) -> int:
    """As a client does; returns the number of transactions."""
    steps = 0
    while begin < end:
        answer = await volume.do(punch.punch_range, messages.Punch(volume.at(), inode, begin, end, 60), PARAMETERS)
        assert begin < answer.next <= end
        begin = answer.next
        steps += 1
    return steps


async def shown(volume: MetaVolume, inode: Inode, size: int) -> list[int]:
    """For each byte the number of the block that holds it, 0 in a hole."""
    _, slots, _ = await volume.do(commit.read_extents, inode, Slot(0), SLOTS + 1, PARAMETERS)
    extents = {each.slot: each.extents for each in slots}
    found: list[int] = []
    for slot in range(-(-size // BLOCK_SIZE)):
        for piece in plan(extents.get(Slot(slot), ()), 0, BLOCK_SIZE):
            found += [piece.extent.block if piece.extent else 0] * piece.length
    return found[:size]


async def test_a_hole_over_many_slots_is_punched_in_steps() -> None:
    volume = await MetaVolume.make()
    inode = (await volume.create(b"f")).inode
    for slot in range(SLOTS):
        await volume.write(inode, slot * BLOCK_SIZE, BLOCK_SIZE)
    size = SLOTS * BLOCK_SIZE
    before = await shown(volume, inode, size)
    begin, end = 3, size - 5
    assert await punch_all(volume, inode, begin, end) == -(-SLOTS // punch.SLOTS_A_STEP)
    assert await shown(volume, inode, size) == before[:begin] + [0] * (end - begin) + before[end:]
    attributes = await volume.lookup(b"f")
    assert (attributes.size, attributes.stored, attributes.mtime_ns) == (size, 8, 60)
    # Two slots are left, with an edge each; every other block waits for its reference to be taken.
    assert len(await volume.keys(schema.Kind.SLOT)) == 2
    dropped = [block for _, raw in await volume.keys(schema.Kind.DROP) for block in schema.DROP.decode(raw).blocks]
    assert len(set(dropped)) == len(dropped) == SLOTS - 2


async def test_holes_in_sparse_files_cost_what_is_stored() -> None:
    volume = await MetaVolume.make()
    inode = (await volume.create(b"f")).inode
    await volume.write(inode, 40 * BLOCK_SIZE, 10)
    assert await punch_all(volume, inode, 0, 1 << 50) == 1
    assert (await volume.lookup(b"f")).stored == 0


async def test_what_a_truncation_hid_stays_hidden() -> None:
    volume = await MetaVolume.make()
    inode = (await volume.create(b"f")).inode
    await volume.write(inode, 0, BLOCK_SIZE)
    await volume.resize(inode, 10)
    await volume.resize(inode, BLOCK_SIZE)
    await punch_all(volume, inode, 2, 4)
    assert [bool(block) for block in await shown(volume, inode, 16)] == [True] * 2 + [False] * 2 + [True] * 6 + [
        False
    ] * 6


async def test_random_holes_and_writes_show_what_was_last() -> None:
    volume = await MetaVolume.make()
    inode = (await volume.create(b"f")).inode
    rng = random.Random(3)
    size = 6 * BLOCK_SIZE
    expected = [0] * size
    for _ in range(200):
        begin = rng.randrange(size)
        if rng.random() < 0.5:
            length = rng.randrange(1, BLOCK_SIZE - begin % BLOCK_SIZE + 1)
            done = await volume.write(inode, begin, length)
            new = max(extent.block for each in done.slots for extent in each.extents)
            expected[begin : begin + length] = [new] * length
        else:
            end = rng.randrange(begin, size) + 1
            await punch_all(volume, inode, begin, end)
            expected[begin:end] = [0] * (end - begin)
        assert await shown(volume, inode, size) == expected
        assert (await volume.lookup(b"f")).stored == sum(map(bool, expected))


async def test_only_files_have_holes() -> None:
    volume = await MetaVolume.make()
    inode = await volume.mkdir(b"d")
    with pytest.raises(OperationError) as caught:
        await punch_all(volume, inode, 0, 1)
    assert caught.value.errno == errno.EINVAL


async def test_set_id_bits_go_in_the_same_change() -> None:
    """As the kernel asks for truncations by ordinary users and for changes of owner: unless the mode is set too."""
    volume = await MetaVolume.make()
    inode = (await volume.create(b"f", mode=0o106755)).inode

    async def change(**fields: int) -> int:
        request = messages.SetAttributes(volume.at(), inode, 40, clear_set_id=True, **fields)
        return (await volume.do(set_attributes, request)).mode

    assert await change(uid=5) == 0o100755
    assert await change(mode=0o6755) == 0o106755
    assert await change(size=3) == 0o100755
    assert await change(mode=0o2644) == 0o102644
    assert await change() == 0o102644, "without group execution the bit means mandatory locking"
