"""How many bytes of each segment are still needed: what tells which segments are worth copying.

Kept in memory, changed with every change of the index. After a start the index is counted in small steps in the
background (a million entries take seconds, which nobody shall wait for): what lies behind the place counted up to is
left to the count, which will come by.
"""

from mendfs.data.schema import Entry, Name
from mendfs.model import BlockId, Partition

BEGIN: Name = (Partition(0), BlockId(0))


class Usage:
    """Bytes of records with an entry, by segment number."""

    def __init__(self) -> None:
        self.is_complete = False
        """Every entry was counted."""
        self.counted_to: Name = BEGIN
        self._bytes: dict[int, int] = {}

    def of(self, segment: int) -> int:
        """Bytes of the segment's records that are needed; too few as long as it is not complete."""
        return self._bytes.get(segment, 0)

    def entered(self, name: Name, entry: Entry, record_bytes: int) -> None:
        """The index has an entry more."""
        if self.is_complete or name <= self.counted_to:
            self._change(entry.segment, record_bytes)

    def left(self, name: Name, entry: Entry, record_bytes: int) -> None:
        """The index has an entry less."""
        if self.is_complete or name <= self.counted_to:
            self._change(entry.segment, -record_bytes)

    def counted(self, name: Name, entry: Entry, record_bytes: int) -> None:
        """The count has come to this entry; names come in order."""
        self.counted_to = name
        self._change(entry.segment, record_bytes)

    def _change(self, segment: int, change: int) -> None:
        left = self._bytes.get(segment, 0) + change
        if left:
            self._bytes[segment] = left
        else:
            self._bytes.pop(segment, None)
