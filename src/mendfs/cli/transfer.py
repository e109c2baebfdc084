"""What `put` and `get` have in common: counts, kept modes, and the words for what is left out."""

import os
import stat

import msgspec

from mendfs.cli.command import At
from mendfs.cli.complaints import FAILED
from mendfs.model import MiB

SET_IDS = stat.S_ISUID | stat.S_ISGID
PIECE_BYTES = 4 * MiB
"""A piece of a file, and what one worker holds of it in memory: a default block."""

KIND_WORDS = {
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


class Counts(msgspec.Struct):
    """What was copied; `skipped` is what was left out, each said in a line."""

    files: int = 0
    directories: int = 0
    links: int = 0
    bytes: int = 0
    skipped: int = 0


class Copying:
    """One `put` or `get`."""

    def __init__(self, at: At) -> None:
        self.at = at
        self.counts = Counts()

    def skip(self, error: Exception, what: str = "") -> None:
        """Leave one thing out. Raises what would befall all others too."""
        self.at.skip(error, what)
        self.counts.skipped += 1

    def skip_special(self, path: str, mode: int) -> None:
        """Leave out what has no contents to copy."""
        self.leave_out(f"{path} is {KIND_WORDS.get(stat.S_IFMT(mode), 'no file')}: not copied")

    def leave_out(self, line: str) -> None:
        """Leave one thing out, for the reason that `line` says."""
        self.at.trouble(line, FAILED)
        self.counts.skipped += 1


def kept_mode(mode: int, *, uid: int, gid: int) -> int:
    """The permissions of a copy that belongs to us.

    Set-user-id and set-group-id stay only if the original is ours too: otherwise a copy would run with rights of ours
    that nobody gave it.
    """
    permissions = stat.S_IMODE(mode)
    if uid != os.getuid() or gid != os.getgid():
        permissions &= ~SET_IDS
    return permissions
