"""Files as text: listings and what `stat` shows. Pure, but for the names of users and groups."""

import grp
import os
import pwd
import stat
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from mendfs.model import Attributes

Entry = tuple[bytes, Attributes]
NANOSECONDS = 1_000_000_000


def shown(name: bytes) -> str:
    """A name for a terminal or for JSON: what is no UTF-8, or would move the cursor, is escaped."""
    text = name.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in text)


def _owner(number: int, look: Callable[[int], Any], field: str) -> str:
    try:
        return str(getattr(look(number), field))
    except KeyError:
        return str(number)


def _time(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / NANOSECONDS).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def long_listing(entries: Sequence[Entry]) -> str:
    """As `ls -l` shows it."""
    rows = [
        (
            stat.filemode(attributes.mode),
            str(attributes.nlink),
            _owner(attributes.uid, pwd.getpwuid, "pw_name"),
            _owner(attributes.gid, grp.getgrgid, "gr_name"),
            str(attributes.size),
            _time(attributes.mtime_ns),
            shown(name),
        )
        for name, attributes in entries
    ]
    widths = [max(len(row[at]) for row in rows) for at in range(6)] if rows else []
    is_right = (False, True, False, False, True, False)
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, is_right, strict=False)
        ]
        lines.append(" ".join([*cells, row[6]]) + "\n")
    return "".join(lines)


def document(name: bytes, attributes: Attributes) -> dict[str, Any]:
    """One file for `--json`."""
    return {
        "name": os.fsdecode(name) if name.isascii() else shown(name),
        "inode": attributes.inode,
        "mode": stat.filemode(attributes.mode),
        "permissions": f"{stat.S_IMODE(attributes.mode):04o}",
        "uid": attributes.uid,
        "gid": attributes.gid,
        "nlink": attributes.nlink,
        "size": attributes.size,
        "stored": attributes.stored,
        "atime_ns": attributes.atime_ns,
        "mtime_ns": attributes.mtime_ns,
        "ctime_ns": attributes.ctime_ns,
    }
