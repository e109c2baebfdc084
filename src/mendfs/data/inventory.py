"""What a store holds, as sums: per partition and range of ids a count and a sum of keyed digests (design section 4).

Sums do not depend on the order of changes and are changed in the index's own batch, so comparing a store with the
metadata costs one small read a range, and only ranges that differ need a closer look. Functions over a transaction.
"""

from collections.abc import Iterable

from mendfs.blocks import block_digest
from mendfs.data import schema
from mendfs.data.schema import Sum
from mendfs.kv.engine import Engine, Transaction
from mendfs.model import GENERATION_BITS, BlockId, Generation, Partition
from mendfs.wire.messages.data import InventorySum

_DIGEST_MASK = (1 << 128) - 1
_PAGE = 1000
_GENERATION_SHIFT = 64 - GENERATION_BITS - schema.ID_RANGE_BITS
NOTHING = Sum()


async def count(
    tx: Transaction, volume: str, partition: Partition, block: BlockId, root: bytes, record_bytes: int, *, sign: int = 1
) -> None:
    """Count a block in, or with sign -1 out."""
    key = schema.inventory_key(partition, schema.id_range_of(block))
    raw = await tx.get(key)
    old = NOTHING if raw is None else schema.decode_sum(raw)
    digest = (old.digest + sign * block_digest(volume, partition, block, root)) & _DIGEST_MASK
    new = Sum(old.blocks + sign, old.record_bytes + sign * record_bytes, digest)
    if new.blocks:
        tx.put(key, schema.encode_sum(new))
    else:
        tx.delete(key)


async def totals(engine: Engine) -> tuple[Sum, Generation]:
    """Everything held, and the highest generation of its ids."""
    blocks = record_bytes = highest = 0
    begin, end = schema.KIND_INVENTORY, schema.after(schema.KIND_INVENTORY)
    while pairs := await engine.begin_reading().range(begin, end, limit=_PAGE):
        for key, raw in pairs:
            held = schema.decode_sum(raw)
            blocks += held.blocks
            record_bytes += held.record_bytes
            highest = max(highest, schema.inventory_of(key)[1] >> _GENERATION_SHIFT)
        begin = pairs[-1][0] + b"\0"
    return Sum(blocks, record_bytes), Generation(highest)


async def sums(engine: Engine, partitions: Iterable[Partition]) -> tuple[InventorySum, ...]:
    """The sums of all ranges of some partitions that hold something."""
    found = []
    for partition in partitions:
        begin, end = schema.inventory_range(partition)
        while pairs := await engine.begin_reading().range(begin, end, limit=_PAGE):
            for key, raw in pairs:
                held = schema.decode_sum(raw)
                id_range = schema.inventory_of(key)[1]
                found.append(InventorySum(partition, id_range, held.blocks, held.digest.to_bytes(16, "big")))
            begin = pairs[-1][0] + b"\0"
    return tuple(found)
