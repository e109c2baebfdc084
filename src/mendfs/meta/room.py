"""Room on the meta server's disk: who may still change what when it runs out.

A database that meets a full disk in the middle of a write stops the server, and one that cannot be opened frees
nothing. So a part of the disk is kept back: when only that is left, what makes the metadata grow is refused with
ENOSPC; when little of that is left, everything but removals is. Removals go on, and so does what frees blocks.
"""

import errno
from typing import Literal

from mendfs.errors import OperationError
from mendfs.model import MiB

KEPT_BACK_MAX = 256 * MiB
"""Room for the log, two buffers that are written as tables, and a compaction beside them."""
KEPT_BACK_SHARE = 8
"""Of a small disk, this part of it: 4 MiB of 32."""
LAST_SHARE = 4
"""Of what is kept back: the part that only removals may use."""
BUFFER_SHARE = 64
BUFFER_MIN = MiB // 2
BUFFER_MAX = 16 * MiB

Kind = Literal["grow", "keep", "remove"]
"""What a change does to the metadata: make it grow, leave it about as big as it was, make it smaller in the end."""


def write_buffer_bytes(total_bytes: int) -> int:
    """The database's buffer on a disk of this size: two of them, and their logs, must fit in what is kept back."""
    return min(BUFFER_MAX, max(BUFFER_MIN, total_bytes // BUFFER_SHARE))


class Room:
    """What `measure` found last, and what that means for changes."""

    def __init__(self) -> None:
        self._free = self._kept_back = 0
        self._is_known = False

    def measure(self, free_bytes: int, total_bytes: int) -> None:
        """Note what the disk has."""
        self._free = free_bytes
        self._kept_back = min(KEPT_BACK_MAX, total_bytes // KEPT_BACK_SHARE)
        self._is_known = True

    @property
    def is_short(self) -> bool:
        """Whether only what is kept back is left."""
        return self._is_known and self._free < self._kept_back

    def trouble(self, path: str) -> str | None:
        """A line for `status`, or None."""
        if not self.is_short:
            return None
        return (
            f"the meta server's disk has {self._free // 1024} KiB left, and less than {self._kept_back // 1024} KiB is "
            f"kept back: nothing new is taken until there is room below {path}"
        )

    def check(self, kind: Kind) -> None:
        """Raise ENOSPC if such a change must wait for room."""
        if not self.is_short or kind == "remove":
            return
        if kind == "grow" or self._free < self._kept_back // LAST_SHARE:
            raise OperationError(errno.ENOSPC, "the meta server's disk is full")
