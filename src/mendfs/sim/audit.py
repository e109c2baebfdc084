"""The metadata engine of a simulated meta server: looks at every commit before it is made.

Some broken rules do harm only when mending or another generation meets them much later. Whoever writes the log sees
them at once: a change of a session that has ended, a block that too few servers acknowledged, an id of a range whose
grant a power cut could take back.
"""

from collections import deque
from collections.abc import Callable, Mapping

from mendfs.extents import blocks_in, clip
from mendfs.kv.memory import MemoryEngine
from mendfs.kv.optimistic import Writes
from mendfs.meta import schema
from mendfs.meta.schema import RANGE_BITS, Kind
from mendfs.model import BlockId, CommitSequence, Inode, Partition, ServerNumber, SessionId, Slot
from mendfs.sim.content import Node
from mendfs.world.disk import Disk, File


class AuditedEngine(MemoryEngine):
    """See `kv.engine.Engine`. `violation` is called with a line for each rule that a commit breaks."""

    violation: Callable[[str], None]

    def __init__(self, disk: Disk | None = None, path: str = "", file: File | None = None) -> None:
        super().__init__(disk, path, file)
        self._granted: dict[bytes, int] = {}
        """Range key -> commit that granted it, of this life."""
        self._pending: deque[tuple[int, int, Writes]] = deque()
        """Commits that may not be durable: where in the log they begin and end, and what they wrote."""
        self.durable: dict[bytes, bytes] = {}
        """What would be there after a power cut, at least: read off the disk, whatever the engine believes."""
        self.has_answered: Callable[[ServerNumber, tuple[Partition, BlockId]], bool] = lambda server, name: True
        """Whether that server ever answered a put of the block."""
        self.nodes: Mapping[str, Node] = {}
        """The files of the disk it is on."""
        self.violation = _nobody

    def write(self, writes: Writes, sequence: int) -> None:
        """Look, then write."""
        self._audit(writes, sequence)
        begin = self._end
        super().write(writes, sequence)
        self._pending.append((begin, self._end, writes))

    async def sync_log(self) -> None:
        """Sync, then see what that made durable."""
        await super().sync_log()
        self._look_at_disk()

    def _replay(self, file: File) -> None:
        super()._replay(file)
        self.durable.update(self._values)

    def _look_at_disk(self) -> None:
        node = self.nodes.get(self._path)
        while node is not None and self._pending:
            begin, end, writes = self._pending[0]
            if node.durable[begin:end] != node.content[begin:end]:
                break
            self._pending.popleft()
            for key, value in writes.items():
                if value is None:
                    self.durable.pop(key, None)
                else:
                    self.durable[key] = value

    # --- questions of other audits ---------------------------------------------------------------

    def lives(self, name: tuple[Partition, BlockId]) -> bool:
        """Whether the metadata names the block now."""
        raw = self.read(schema.block_key(*name))
        return raw is not None and not schema.BLOCK.decode(raw).died

    def lives_durably(self, name: tuple[Partition, BlockId]) -> bool:
        """Whether a power cut of the meta server would leave metadata that names the block."""
        raw = self.durable.get(schema.block_key(*name))
        return raw is not None and not schema.BLOCK.decode(raw).died

    def successors(self, name: tuple[Partition, BlockId]) -> list[tuple[Partition, BlockId]]:
        """The blocks that took a dead block's place, as the durable metadata has it."""
        raw = self.durable.get(schema.block_key(*name))
        if raw is None:
            return []
        dead = schema.BLOCK.decode(raw)
        slot = self.durable.get(schema.slot_key(dead.inode, dead.slot))
        if slot is None:
            return []
        found = []
        for other in sorted(blocks_in(schema.SLOT.decode(slot))):
            stored = self.durable.get(schema.block_key(*other))
            if stored is not None and schema.BLOCK.decode(stored).born <= dead.died:
                found.append(other)
        return found

    def blocks_of(self, inode: Inode, before: CommitSequence) -> list[tuple[Partition, BlockId]]:
        """The blocks an inode's slots name now that were committed at or before `before`."""
        record, volume = self.read(schema.inode_key(inode)), self.read(schema.VOLUME_KEY)
        if record is None or volume is None:
            return []
        cuts, block_size = schema.INODE.decode(record).cuts, schema.VOLUME.decode(volume).block_size
        named = set()
        for key, raw in self.read_range(*schema.slots_of(inode, Slot(0)), 1 << 30, False):
            # What a truncation has cut off is named until the background has been there.
            named |= blocks_in(clip(schema.SLOT.decode(raw), cuts, slot_start=schema.slot_in(key) * block_size))
        born = {name: self.read(schema.block_key(*name)) for name in named}
        return sorted(name for name, raw in born.items() if raw and schema.BLOCK.decode(raw).born <= before)

    # --- each commit -----------------------------------------------------------------------------

    def _audit(self, writes: Writes, sequence: int) -> None:
        for key, value in writes.items():
            if value is None:
                if key[:1] == Kind.OWED:
                    self._check_late(key, writes)
                continue
            match key[:1]:
                case Kind.RANGE:
                    self._granted[key] = sequence
                case Kind.ANSWER:
                    self._check_session(schema.number_in(key))
                case Kind.BLOCK if self.read(key) is None:
                    self._check_id("block", int.from_bytes(key[5:13], "big"))
                    self._check_quorum(key, value, writes)
                case Kind.INODE if self.read(key) is None and schema.number_in(key) > 1:
                    self._check_id("inode", schema.number_in(key))

    def _check_session(self, session: int) -> None:
        if self.read(schema.session_key(SessionId(session))) is None:
            self.violation(f"a change of session {session} was made after it had ended")

    def _check_id(self, kind: str, number: int) -> None:
        key = schema.range_key(kind, number >> RANGE_BITS)
        if self.read(key) is None:
            self.violation(f"{kind} {number:#x} lies in no range that is granted")
        elif self._granted.get(key, 0) > self.synced_sequence:
            self.violation(f"{kind} {number:#x} lies in a range whose grant a power cut could take back")

    def _check_quorum(self, key: bytes, value: bytes, writes: Writes) -> None:
        raw = self.read(schema.VOLUME_KEY)
        assert raw is not None, "blocks come after the volume"
        volume = schema.VOLUME.decode(raw)
        row = self.read(schema.row_key(Partition(int.from_bytes(key[1:5], "big"))))
        assert row is not None, "a commit names partitions that there are"
        name = (Partition(int.from_bytes(key[1:5], "big")), BlockId(int.from_bytes(key[5:13], "big")))
        owed = {schema.owed_in(other)[0] for other in writes if other[:1] == Kind.OWED and other[5:] == key[1:]}
        have = {entry.server for entry in schema.ROW.decode(row)} - owed
        if len(have) < volume.write_quorum:
            self.violation(f"block {name[1]:#x} was committed with {len(have)} acknowledgements")
        for server in sorted(have):
            if not self.has_answered(server, name):
                self.violation(f"block {name[1]:#x} is not owed to server {server}, which never stored it")

    def _check_late(self, key: bytes, writes: Writes) -> None:
        server, partition, block = schema.owed_in(key)
        if schema.block_key(partition, block) in writes or self.read(key) is None:
            return  # the block goes, and its debts with it
        if not self.has_answered(server, (partition, block)):
            self.violation(f"block {block:#x} is owed to server {server} no more, which never stored it")


def _nobody(text: str) -> None:
    """Until somebody listens."""
