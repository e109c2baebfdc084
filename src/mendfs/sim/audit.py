"""The metadata engine of a simulated meta server: looks at every commit before it is made.

Some broken rules do harm only when mending or another generation meets them much later. Whoever writes the log sees
them at once: a change of a session that has ended, a block that too few servers acknowledged, an id of a range whose
grant a power cut could take back.
"""

from collections.abc import Callable

from mendfs.kv.memory import MemoryEngine
from mendfs.kv.optimistic import Writes
from mendfs.meta import schema
from mendfs.meta.schema import RANGE_BITS, Kind
from mendfs.model import SessionId
from mendfs.world.disk import Disk, File


class AuditedEngine(MemoryEngine):
    """See `kv.engine.Engine`. `violation` is called with a line for each rule that a commit breaks."""

    violation: Callable[[str], None]

    def __init__(self, disk: Disk | None = None, path: str = "", file: File | None = None) -> None:
        super().__init__(disk, path, file)
        self._granted: dict[bytes, int] = {}
        """Range key -> commit that granted it, of this life."""
        self.violation = _nobody

    def write(self, writes: Writes, sequence: int) -> None:
        """Look, then write."""
        self._audit(writes, sequence)
        super().write(writes, sequence)

    def _audit(self, writes: Writes, sequence: int) -> None:
        for key, value in writes.items():
            if value is None:
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
        owed = sum(other[:1] == Kind.OWED and other[5:] == key[1:] for other in writes)
        if volume.replicas - owed < volume.write_quorum:
            self.violation(f"block {key[5:13].hex()} was committed with {volume.replicas - owed} acknowledgements")


def _nobody(text: str) -> None:
    """Until somebody listens."""
