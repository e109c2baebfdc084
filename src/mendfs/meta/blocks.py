"""Block keys, the tallies that prove a list of them whole, and debts: functions over a transaction."""

from collections.abc import Iterable

import msgspec

from mendfs.blocks import block_digest
from mendfs.errors import CommitRefused
from mendfs.extents import blocks_in, stored_bytes
from mendfs.kv.engine import Transaction
from mendfs.meta import schema
from mendfs.model import BlockId, Extent, Inode, Partition, Row, ServerNumber, Slot
from mendfs.wire.messages import meta as messages

_DIGEST_BITS = 128


class Tallies:
    """Changes of tallies collected over one transaction: several blocks of a partition are one read and one write."""

    def __init__(self, volume: str) -> None:
        self._volume = volume
        self._changes: dict[Partition, tuple[int, int]] = {}

    def add(self, partition: Partition, block: BlockId, root: bytes, *, sign: int = 1) -> None:
        """Count a block in, or with sign -1 out."""
        count, digest = self._changes.get(partition, (0, 0))
        self._changes[partition] = (count + sign, digest + sign * block_digest(self._volume, partition, block, root))

    async def apply(self, tx: Transaction) -> None:
        """Write the changed tallies."""
        for partition, (count, digest) in self._changes.items():
            raw = await tx.get(schema.tally_key(partition))
            tally = schema.Tally() if raw is None else schema.TALLY.decode(raw)
            total = (int.from_bytes(tally.digest, "big") + digest) % (1 << _DIGEST_BITS)
            changed = schema.Tally(tally.count + count, total.to_bytes(_DIGEST_BITS // 8, "big"))
            tx.put(schema.tally_key(partition), schema.TALLY.encode(changed))


async def find_row(tx: Transaction, partition: Partition) -> Row:
    """The servers of a partition, read in the transaction: a commit must not race with a move."""
    raw = await tx.get(schema.row_key(partition))
    if raw is None:
        raise CommitRefused(f"there is no partition {partition}")
    return schema.ROW.decode(raw)


async def add_block(
    tx: Transaction,
    new: messages.NewBlock,
    *,
    inode: Inode,
    slot: Slot,
    write_quorum: int,
    tallies: Tallies,
) -> None:
    """Enter a new block with one reference. Raises CommitRefused unless W servers of its row acknowledged it.

    Whatever server of the row did not is owed the replica from now on (design section 5).
    """
    row = await find_row(tx, new.partition)
    acknowledged = set(new.servers)
    if len(acknowledged.intersection(entry.server for entry in row)) < write_quorum:
        raise CommitRefused(
            f"block {new.block:#x}: servers {sorted(acknowledged)} acknowledged it, "
            f"but {write_quorum} of partition {new.partition}'s row must"
        )
    key = schema.block_key(new.partition, new.block)
    if await tx.get(key) is not None:
        raise CommitRefused(f"block {new.block:#x} was committed before")
    record = schema.BlockRecord(
        inode=inode, slot=slot, length=new.length, root=new.root, references=1, born=tx.sequence()
    )
    tx.put(key, schema.BLOCK.encode(record))
    tallies.add(new.partition, new.block, new.root)
    for entry in row:
        if entry.server not in acknowledged:
            tx.put(schema.owed_key(entry.server, new.partition, new.block), b"")


async def drop_reference(tx: Transaction, partition: Partition, block: BlockId) -> None:
    """One stored slot names the block no more; without any it dies and queues for a freeing round."""
    key = schema.block_key(partition, block)
    raw = await tx.get(key)
    if raw is None:
        return
    record = schema.BLOCK.decode(raw)
    if record.died:
        return
    record = msgspec.structs.replace(record, references=record.references - 1)
    if record.references <= 0:
        record = msgspec.structs.replace(record, died=tx.sequence())
        tx.put(schema.dead_key(record.died, partition, block), b"")
    tx.put(key, schema.BLOCK.encode(record))


async def acknowledge_late(tx: Transaction, server: ServerNumber, blocks: Iterable[tuple[Partition, BlockId]]) -> None:
    """The server has these now: it is owed them no more."""
    for partition, block in blocks:
        tx.delete(schema.owed_key(server, partition, block))


async def forget_block(
    tx: Transaction, partition: Partition, block: BlockId, record: schema.BlockRecord, tallies: Tallies
) -> None:
    """Remove a dead block's keys, after every server that is up has deleted its replica."""
    tx.delete(schema.block_key(partition, block))
    tx.delete(schema.dead_key(record.died, partition, block))
    tallies.add(partition, block, record.root, sign=-1)
    for entry in await find_row(tx, partition):
        key = schema.owed_key(entry.server, partition, block)
        if await tx.get(key) is not None:
            tx.delete(key)


def store_slot(tx: Transaction, key: bytes, stored: tuple[Extent, ...], kept: tuple[Extent, ...], *, part: int) -> int:
    """Store what a slot holds from now on. Blocks that it names no more go to the freeing queue. Returns bytes gained.

    `part` tells the slots of one transaction apart.
    """
    if kept:
        tx.put(key, schema.SLOT.encode(kept))
    else:
        tx.delete(key)
    dropped = blocks_in(stored) - blocks_in(kept)
    if dropped:
        drop = schema.DropRecord(tuple(sorted(dropped)))
        tx.put(schema.drop_key(tx.sequence(), part), schema.DROP.encode(drop))
    return stored_bytes(kept) - stored_bytes(stored)
