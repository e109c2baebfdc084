"""What one data server answers, held against what its disk would still have if its power went at that moment.

A broken rule of a store does harm only when several things coincide: the right power cut on enough servers before the
next sync. Whoever sees disk and answers sees it at once: a sync that answered for a block that is not durable, an
opening that lost what had been answered, an index that points to something else than the block, a deletion of what a
power cut could bring back. Everything is computed here anew; nothing of the store's own checks is trusted.
"""

from collections.abc import Callable, Sequence
from typing import Any

from mendfs.blocks import block_digest, page_checksums, root_of
from mendfs.data import schema
from mendfs.data.record import decode_record, head_length
from mendfs.data.schema import Entry, Fence, Name
from mendfs.data.store import Store
from mendfs.errors import Fenced
from mendfs.kv.memory import MemoryEngine
from mendfs.model import Incarnation, Volume
from mendfs.sim.disk import SimDisk
from mendfs.wire.messages.data import PutBlock

Deletable = Callable[[str, Sequence[Name]], None]


class StoreAudit:
    """The audit of one machine's store, over all lives of its server."""

    def __init__(self, name: str, disk: SimDisk, violation: Callable[[str], None]) -> None:
        self.name = name
        self.is_excused = False
        """The disk returns errors or wrong bits: nothing is expected of it any more."""
        self.deletable: Deletable = lambda server, names: None
        """Asked before a deletion; says so itself if one must not be."""
        self._disk = disk
        self._failed_syncs = 0
        self.violation = violation
        self._stored: dict[Name, Incarnation] = {}
        """Answered as stored and not known as durable, and under which incarnation."""
        self._durable: set[Name] = set()
        """Answered as durable."""
        self._answered: set[Name] = set()
        """Ever answered as stored, whatever became of it."""
        self._deleted: set[Name] = set()
        """Ordered to be deleted: ids are not used again, but a put of one may still be under way."""
        self._store: Store | None = None

    # --- what happens to the machine -------------------------------------------------------------

    def power_lost(self) -> None:
        """What was not durable may be gone."""
        self._stored.clear()
        self._store = None

    def process_ended(self) -> None:
        """Until the next one opens the store nobody can say where a block lies."""
        self._close()

    def _close(self) -> None:
        if self._store is not None:
            # A failed sync has taken what was stored under another incarnation, and said so with a new one.
            last = self._store.incarnation
            self._stored = {name: under for name, under in self._stored.items() if under == last}
        self._store = None

    def opened(self, store: Store) -> None:
        """A process has opened the store: all that was answered must be there, and nothing that is not."""
        self._close()
        if self._failed_syncs != self._disk.failed_syncs:
            # It may have died before it could say what that has taken.
            self._stored.clear()
            self._failed_syncs = self._disk.failed_syncs
        self._store = store
        if not self.is_excused:
            for name in sorted(self._durable | self._stored.keys()):
                entry = self._find(name)
                if entry is None or not entry.is_good:
                    kind = "durable" if name in self._durable else "stored"
                    self._say(f"answered for block {name[1]:#x} as {kind} and does not hold it after a start")
            for name, entry in self._entries():
                if entry.is_good and not self._is_right(name, entry):
                    self._say(f"its index has block {name[1]:#x} after a start where there is none")
        self._listen(store)

    # --- questions -------------------------------------------------------------------------------

    def holds(self, name: Name) -> bool:
        """Whether the store believes to hold a block."""
        entry = self._find(name)
        return entry is not None and entry.is_good

    def has_answered(self, name: Name) -> bool:
        """Whether a put of this block was ever answered: else the metadata owes the server a copy."""
        return name in self._answered

    def is_durable(self, name: Name) -> bool:
        """Whether a block would be there after a power cut; what cannot be said now counts as durable."""
        if self.is_excused or self._store is None:
            return True
        entry = self._find(name)
        if entry is None:
            return False
        node = self._disk.nodes.get(self._path(entry))
        if node is None or not node.is_named:
            return False
        end = entry.offset + self._record_bytes(entry)
        return node.durable[entry.offset : end] == node.content[entry.offset : end]

    def check_inventory(self) -> None:
        """The sums that mending compares by are those of what the index holds."""
        if self._store is None:
            return
        sums: dict[tuple[int, int], tuple[int, int]] = {}
        for (partition, block), entry in self._entries():
            if entry.is_good:
                at = (partition, schema.id_range_of(block))
                count, digest = sums.get(at, (0, 0))
                digest += block_digest(self._volume.id, partition, block, entry.root)
                sums[at] = (count + 1, digest % (1 << 128))
        begin, end = schema.KIND_INVENTORY, schema.after(schema.KIND_INVENTORY)
        stored = {
            schema.inventory_of(key): (total.blocks, total.digest)
            for key, raw in self._engine().read_range(begin, end, 1 << 30, False)
            if (total := schema.decode_sum(raw)).blocks or total.digest
        }
        if sums != stored:
            wrong = sorted(sums.items() ^ stored.items())[0][0]
            self._say(f"has an inventory of partition {wrong[0]}, id range {wrong[1]} that is not what it holds")

    # --- listening -------------------------------------------------------------------------------

    def _listen(self, store: Store) -> None:
        """Put ourselves between the store and whoever calls it."""
        put, sync, delete = store.put, store.sync, store.delete

        async def put_and_note(message: PutBlock, data: Any) -> Incarnation:
            incarnation = await put(message, data)
            self._put_answered(store, (message.partition, message.block), incarnation)
            return incarnation

        async def sync_and_check() -> Incarnation:
            before = dict(self._stored)
            incarnation = await sync()
            self._sync_answered(store, before, incarnation)
            return incarnation

        async def check_and_delete(order: Fence, names: Sequence[Name]) -> int:
            self.deletable(self.name, names)
            self._deleted.update(names)
            before = {name: self._stored[name] for name in names if name in self._stored}
            durable = self._durable.intersection(names)
            for name in names:
                self._stored.pop(name, None)
            self._durable.difference_update(names)
            try:
                return await delete(order, names)
            except Fenced:
                self._deleted.difference_update(names)
                self._stored.update(before)
                self._durable |= durable
                raise

        for attribute, audited in (("put", put_and_note), ("sync", sync_and_check), ("delete", check_and_delete)):
            setattr(store, attribute, audited)

    def _put_answered(self, store: Store, name: Name, incarnation: Incarnation) -> None:
        self._answered.add(name)
        if store is not self._store or self.is_excused or name in self._deleted:
            return
        if not self.holds(name):
            self._say(f"answered a put of block {name[1]:#x} that it does not hold")
        elif name not in self._durable:
            self._stored[name] = incarnation

    def _sync_answered(self, store: Store, before: dict[Name, Incarnation], incarnation: Incarnation) -> None:
        if store is not self._store or self.is_excused:
            return
        for name, put_under in before.items():
            if put_under != incarnation or self._stored.get(name) != incarnation:
                continue
            del self._stored[name]
            if self.is_durable(name):
                self._durable.add(name)
            else:
                self._say(f"answered a sync that counts for block {name[1]:#x}, which is not durable")

    # --- what is there ---------------------------------------------------------------------------

    def _say(self, text: str) -> None:
        self.violation(f"{self.name} {text}")

    def _engine(self) -> MemoryEngine:
        assert self._store is not None, "asked while a process has it open"
        engine = self._store._index.engine
        assert isinstance(engine, MemoryEngine), "machines are given one"
        return engine

    def _find(self, name: Name) -> Entry | None:
        if self._store is None:
            return None
        raw = self._engine().read(schema.block_key(*name))
        return None if raw is None else schema.decode_entry(raw)

    def _entries(self) -> list[tuple[Name, Entry]]:
        pairs = self._engine().read_range(schema.KIND_BLOCK, schema.after(schema.KIND_BLOCK), 1 << 30, False)
        return [(schema.block_of(key), schema.decode_entry(raw)) for key, raw in pairs]

    @property
    def _volume(self) -> Volume:
        assert self._store is not None, "asked while a process has it open"
        return self._store.volume

    def _path(self, entry: Entry) -> str:
        assert self._store is not None, "asked while a process has it open"
        return self._store._segments.path(entry.segment)

    def _record_bytes(self, entry: Entry) -> int:
        """Without what fills it up to the next one."""
        return head_length(entry.length, self._volume.page_size, self._volume.checksum) + entry.length

    def _is_right(self, name: Name, entry: Entry) -> bool:
        assert self._store is not None, "asked while a process has it open"
        segment, node = self._store._segments.get(entry.segment), self._disk.nodes.get(self._path(entry))
        if segment is None or node is None:
            return False
        raw = bytes(node.content[entry.offset : entry.offset + self._record_bytes(entry)])
        header = decode_record(raw, seed=segment.seed, offset=entry.offset)
        if header is None or (header.partition, header.block) != name or header.root != entry.root:
            return False
        data = raw[header.head_bytes : header.head_bytes + entry.length]
        rule = {"page_size": self._volume.page_size, "kind": self._volume.checksum}
        checksums = page_checksums(data, **rule)  # type: ignore[arg-type] # page size and kind, as they are named
        return root_of(checksums, length=entry.length, **rule) == entry.root  # type: ignore[arg-type] # as above
