"""Inventory sums: independent of order, equal for equal contents, what the metadata's tallies are made of too."""

import asyncio
import random

from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_128_digest

from mendfs.blocks import block_digest
from mendfs.data import inventory
from mendfs.data.schema import Sum
from mendfs.kv.engine import run
from mendfs.kv.memory import MemoryEngine
from mendfs.model import BlockId, Partition
from mendfs.wire.messages.data import InventorySum

PARTITIONS = [Partition(number) for number in range(4)]
BLOCKS = st.lists(
    st.tuples(st.integers(0, 3).map(Partition), st.integers(1, (1 << 64) - 1).map(BlockId)), unique=True, max_size=30
)


async def summed(blocks: list[tuple[Partition, BlockId]], gone: int = 0) -> tuple[InventorySum, ...]:
    engine = await MemoryEngine.open()
    for name in blocks:
        await run(engine, inventory.count, "v", *name, b"root", 128)
    for name in blocks[:gone]:
        await run(engine, inventory.count, "v", *name, b"root", 128, sign=-1)
    return await inventory.sums(engine, PARTITIONS)


@given(BLOCKS, st.randoms(use_true_random=False), st.integers(0, 30))
def test_sums_depend_on_what_is_held_only(
    blocks: list[tuple[Partition, BlockId]], rng: random.Random, gone: int
) -> None:
    kept = blocks[gone:]
    shuffled = rng.sample(kept, len(kept))
    assert asyncio.run(summed(blocks, gone)) == asyncio.run(summed(shuffled))


async def test_a_sum_differs_when_any_block_differs() -> None:
    one, other, twice = BlockId(5), BlockId(6), BlockId(1 << 20)
    assert await summed([(Partition(1), one)]) != await summed([(Partition(1), other)])
    assert await summed([(Partition(1), one)]) != await summed([(Partition(2), one)])
    assert len(await summed([(Partition(1), one), (Partition(1), twice)])) == 2, "one for each range of ids"


async def test_totals_count_everything_and_find_the_highest_generation() -> None:
    engine = await MemoryEngine.open()
    assert await inventory.totals(engine) == (Sum(), 0)
    for generation in (3, 1, 2):
        for number in range(700):
            name = (Partition(number % 16), BlockId((generation << 44) + (number << 16)))
            await run(engine, inventory.count, "v", *name, b"root", 128)
    total, highest = await inventory.totals(engine)
    assert (total.blocks, total.record_bytes, highest) == (2100, 2100 * 128, 3)


def test_the_digest_of_a_block_is_a_format() -> None:
    """Stores and metadata sum the same digests, whoever wrote them: docs/formats/keys.md says how."""
    digest = block_digest("v", Partition(1), BlockId(2), b"root")
    assert digest == int.from_bytes(xxh3_128_digest(b"v/1/2/root"), "big")
