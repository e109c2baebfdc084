"""The highest generation whose order to delete was obeyed, in a file of its own beside the index.

The index holds the whole fence (generation and commit sequence) and is all that is asked; but an index may be damaged
and made again from the segments, and these do not know what was obeyed. Written once in each life of the meta server.
"""

import posixpath

import structlog
from xxhash import xxh3_64_hexdigest

from mendfs.model import Generation
from mendfs.world.disk import Disk

log = structlog.get_logger("data")

NAME = "fence"


class FenceNote:
    """The file `fence` of a store's folder: the generation in decimal, its checksum, a line's end."""

    def __init__(self, disk: Disk, folder: str) -> None:
        self._disk = disk
        self._path = posixpath.join(folder, NAME)

    def read(self) -> Generation:
        """What it says; 0 without one. Blocks. Raises OSError."""
        if not self._disk.exists(self._path):
            return Generation(0)
        raw = self._disk.read_file(self._path)
        digits = raw.split(b" ")[0]
        if not digits.isdigit() or raw != _line(int(digits)):
            log.error("the note of the deletions obeyed is damaged", path=self._path)
            return Generation(0)
        return Generation(int(digits))

    def write(self, generation: Generation) -> None:
        """Say it durably. Blocks. Raises OSError."""
        self._disk.replace_file(self._path, _line(generation))


def _line(generation: int) -> bytes:
    digits = str(generation)
    return f"{digits} {xxh3_64_hexdigest(digits.encode())}\n".encode()
