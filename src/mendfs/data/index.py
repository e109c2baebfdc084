"""The index of a store: which block lies where. Thin functions over `kv.engine`; every batch also keeps the inventory.

Commits of the embedded engines await nothing, so between the check of an entry and its change nothing else runs; with
another engine `run` would see the conflict.
"""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from mendfs.data import inventory, schema
from mendfs.data.record import align, head_length
from mendfs.data.schema import Entry, Fence, Name, Place
from mendfs.data.usage import BEGIN, Usage
from mendfs.kv.engine import Engine, Transaction, run
from mendfs.model import BlockId, CommitSequence, Generation, Partition, Volume

BLOCKS_A_BATCH = 30
"""A block takes up to three keys in a batch of at most 100: its entry, its journal key, its range's sum."""
_PAGE = 1000
COUNT_PAUSE_S = 0.002
"""Between two steps of the count: a million entries in ten seconds, with a third of one core."""
_STEP = 250
"""Entries decoded between two turns of the event loop: half a millisecond."""


class Journalled(NamedTuple):
    """An index entry made past the checkpoint."""

    place: Place
    name: Name


class Move(NamedTuple):
    """A block's record was copied: it lay at `old`, and `entry` says where it lies now."""

    name: Name
    old: Place
    entry: Entry


class Index:
    """One store's index. It does not know what is in the files."""

    def __init__(self, engine: Engine, volume: Volume) -> None:
        self.engine = engine
        self.usage = Usage()
        self._volume = volume

    def record_bytes(self, entry: Entry) -> int:
        """Bytes of the entry's record in its segment."""
        return align(head_length(entry.length, self._volume.page_size, self._volume.checksum) + entry.length)

    async def find(self, partition: Partition, block: BlockId) -> Entry | None:
        """A block's entry."""
        raw = await self.engine.begin_reading().get(schema.block_key(partition, block))
        return None if raw is None else schema.decode_entry(raw)

    async def list_blocks(
        self, partition: Partition, block: BlockId, limit: int, *, only: Partition | None = None
    ) -> list[tuple[Name, Entry]]:
        """The blocks after (partition, id), in order; with `only`, of that partition."""
        begin = schema.block_key(partition, block) + b"\0"
        end = schema.after(schema.KIND_BLOCK)
        if only is not None:
            begin = max(begin, schema.block_key(only, BlockId(0)))
            end = schema.block_key(Partition(only + 1), BlockId(0))
        pairs = await self.engine.begin_reading().range(begin, end, limit=limit)
        return [(schema.block_of(key), schema.decode_entry(raw)) for key, raw in pairs]

    async def add(self, name: Name, entry: Entry, *, is_synced: bool = False) -> Entry | None:
        """Enter a block; returns the entry it had. Not synced: a start does not believe it unchecked."""
        old, _ = await run(self.engine, self._add, name, entry, is_synced)
        # No await since the commit: the usage is as the index is.
        if old is not None:
            self.usage.left(name, old, self.record_bytes(old))
        self.usage.entered(name, entry, self.record_bytes(entry))
        return old

    async def _add(self, tx: Transaction, name: Name, entry: Entry, is_synced: bool) -> Entry | None:
        old = await self._take(tx, name)
        await self._enter(tx, name, entry)
        if not is_synced:
            tx.put(schema.journal_key(entry.place), schema.encode_name(*name))
        return old

    async def _enter(self, tx: Transaction, name: Name, entry: Entry) -> None:
        tx.put(schema.block_key(*name), schema.encode_entry(entry))
        if entry.is_good:
            await inventory.count(tx, self._volume.id, *name, entry.root, self.record_bytes(entry))

    async def _take(self, tx: Transaction, name: Name) -> Entry | None:
        """The entry of a block, counted out if it was counted, and out of the journal."""
        raw = await tx.get(schema.block_key(*name))
        if raw is None:
            return None
        old = schema.decode_entry(raw)
        tx.delete(schema.block_key(*name))
        tx.delete(schema.journal_key(old.place))
        if old.is_good:
            await inventory.count(tx, self._volume.id, *name, old.root, self.record_bytes(old), sign=-1)
        return old

    async def remove(self, names: Sequence[Name]) -> list[Entry]:
        """Forget blocks; returns the entries of those that were there."""
        gone: list[Entry] = []
        for start in range(0, len(names), BLOCKS_A_BATCH):
            part, _ = await run(self.engine, self._remove, names[start : start + BLOCKS_A_BATCH])
            gone += self._left(part)
        return gone

    def _left(self, pairs: Sequence[tuple[Name, Entry]]) -> list[Entry]:
        for name, entry in pairs:
            self.usage.left(name, entry, self.record_bytes(entry))
        return [entry for _, entry in pairs]

    async def _remove(self, tx: Transaction, names: Sequence[Name]) -> list[tuple[Name, Entry]]:
        gone = []
        for name in names:
            old = await self._take(tx, name)
            if old is not None:
                gone.append((name, old))
        return gone

    async def drop(self, records: Sequence[Journalled]) -> list[Entry]:
        """Forget records that are not to be believed. Returns the entries that still pointed there."""
        dropped: list[Entry] = []
        for start in range(0, len(records), BLOCKS_A_BATCH):
            part, _ = await run(self.engine, self._drop, records[start : start + BLOCKS_A_BATCH])
            dropped += self._left(part)
        return dropped

    async def _drop(self, tx: Transaction, records: Sequence[Journalled]) -> list[tuple[Name, Entry]]:
        dropped = []
        for place, name in records:
            tx.delete(schema.journal_key(place))
            raw = await tx.get(schema.block_key(*name))
            if raw is not None and schema.decode_entry(raw).place == place:
                dropped.append((name, schema.decode_entry(raw)))
                await self._take(tx, name)
        return dropped

    async def mark_bad(self, records: Sequence[tuple[Name, Place]]) -> list[Entry]:
        """These records' data is bad or gone: the blocks do not count as held any more. Returns those that did."""
        marked: list[Entry] = []
        for start in range(0, len(records), BLOCKS_A_BATCH):
            part, _ = await run(self.engine, self._mark_bad, records[start : start + BLOCKS_A_BATCH])
            marked += part
        return marked

    async def _mark_bad(self, tx: Transaction, records: Sequence[tuple[Name, Place]]) -> list[Entry]:
        marked = []
        for name, place in records:
            raw = await tx.get(schema.block_key(*name))
            entry = None if raw is None else schema.decode_entry(raw)
            if entry is None or entry.place != place or not entry.is_good:
                continue
            await self._take(tx, name)
            bad = msgspec.structs.replace(entry, flags=entry.flags | schema.FLAG_BAD)
            await self._enter(tx, name, bad)
            marked.append(entry)
        return marked

    async def move(self, moves: Sequence[Move]) -> list[tuple[Move, Entry]]:
        """Point blocks to synced copies of their records, all in one batch; each with the entry it had.

        A block that is not where it was any more, deleted or stored anew meanwhile, is left as it is.
        """
        assert len(moves) <= BLOCKS_A_BATCH, "the switch is one batch"
        moved, _ = await run(self.engine, self._move, moves)
        for move, old in moved:
            self.usage.left(move.name, old, self.record_bytes(old))
            self.usage.entered(move.name, move.entry, self.record_bytes(move.entry))
        return moved

    async def _move(self, tx: Transaction, moves: Sequence[Move]) -> list[tuple[Move, Entry]]:
        moved = []
        for move in moves:
            raw = await tx.get(schema.block_key(*move.name))
            if raw is None or schema.decode_entry(raw).place != move.old:
                continue
            old = await self._take(tx, move.name)
            assert old is not None, "it was there above"
            await self._enter(tx, move.name, move.entry)
            moved.append((move, old))
        return moved

    async def in_segment(self, number: int) -> list[tuple[Name, Entry]]:
        """Everything that lies in one segment. Reads the whole index: for when a file has gone, not for every day."""
        found: list[tuple[Name, Entry]] = []
        at = BEGIN
        while part := await self.list_blocks(*at, _STEP):
            found += [pair for pair in part if pair[1].segment == number]
            at = part[-1][0]
            await asyncio.sleep(0)
        return found

    async def count_usage(self) -> None:
        """Count what each segment holds that is needed; in steps, while the store is used."""
        while part := await self.list_blocks(*self.usage.counted_to, _STEP):
            for name, entry in part:
                self.usage.counted(name, entry, self.record_bytes(entry))
            await asyncio.sleep(COUNT_PAUSE_S)
        self.usage.is_complete = True

    async def journal(self, begin: Place) -> list[Journalled]:
        """The entries made at or past a place."""
        found: list[Journalled] = []
        key, end = schema.journal_key(begin), schema.after(schema.KIND_JOURNAL)
        while pairs := await self.engine.begin().range(key, end, limit=_PAGE):
            found += [Journalled(schema.journal_place(key), schema.decode_name(raw)) for key, raw in pairs]
            key = pairs[-1][0] + b"\0"
        return found

    async def checkpoint(self) -> Place | None:
        """Everything before it is on the disk and in the index."""
        raw = await self.engine.begin().get(schema.CHECKPOINT_KEY)
        return None if raw is None else schema.decode_place(raw)

    async def set_checkpoint(self, old: Place, new: Place) -> None:
        """Move the checkpoint on and forget the journal before it."""
        # From the old one on: a range from the first key would walk over the tombstones of all earlier ones.
        await self.forget_journal(old, new)
        tx = self.engine.begin()
        tx.put(schema.CHECKPOINT_KEY, schema.encode_place(new))
        await self.engine.commit(tx)

    async def forget_journal(self, begin: Place, end: Place) -> None:
        """Believe what was entered between two places. Journal keys before the checkpoint are only superfluous."""
        key: bytes | None = schema.journal_key(begin)
        while key is not None:
            key, _ = await run(self.engine, self._forget_journal, key, schema.journal_key(end))

    async def _forget_journal(self, tx: Transaction, begin: bytes, end: bytes) -> bytes | None:
        """Forget some; returns where to go on, past the tombstones of these."""
        limit = 3 * BLOCKS_A_BATCH
        keys = await tx.range(begin, end, limit=limit)
        for key, _ in keys:
            tx.delete(key)
        return keys[-1][0] if len(keys) == limit else None

    async def segments(self) -> dict[int, tuple[bytes, bool]]:
        """Number -> random id, and whether it is closed, of every segment the index knows."""
        found = {}
        key = schema.KIND_SEGMENT
        while pairs := await self.engine.begin().range(key, schema.after(schema.KIND_SEGMENT), limit=_PAGE):
            found.update({schema.segment_number(key): schema.decode_segment(raw) for key, raw in pairs})
            key = pairs[-1][0] + b"\0"
        return found

    async def set_segment(self, number: int, segment_id: bytes | None, *, is_closed: bool = False) -> None:
        """Note a segment, or with None forget it."""
        tx = self.engine.begin()
        if segment_id is None:
            tx.delete(schema.segment_key(number))
        else:
            tx.put(schema.segment_key(number), schema.encode_segment(segment_id, is_closed=is_closed))
        await self.engine.commit(tx)

    async def fence(self) -> Fence:
        """The highest order to delete that was obeyed."""
        raw = await self.engine.begin().get(schema.FENCE_KEY)
        return Fence(Generation(0), CommitSequence(0)) if raw is None else schema.decode_fence(raw)

    async def set_fence(self, fence: Fence) -> None:
        """Note the highest order; durable only after a sync of the engine."""
        tx = self.engine.begin()
        tx.put(schema.FENCE_KEY, schema.encode_fence(fence))
        await self.engine.commit(tx)

    async def mark(self) -> bytes | None:
        """Whose index this is; None: it was not finished."""
        return await self.engine.begin().get(schema.MARK_KEY)

    async def set_mark(self, server: bytes, volume: bytes) -> None:
        """The index is whole from now on."""
        tx = self.engine.begin()
        tx.put(schema.MARK_KEY, schema.encode_mark(server, volume))
        await self.engine.commit(tx)
