"""Files as text: listings and what `stat` shows. Pure, but for the names of users and groups.

How a name is written is up to whoever calls: escaped on a terminal, as it is in a pipe (`cli.command.At.name`).
"""

import grp
import os
import pwd
import stat
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from mendfs.cli.complaints import escaped
from mendfs.model import Attributes, Inode

Entry = tuple[bytes, Attributes]
NANOSECONDS = 1_000_000_000


KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
}

Show = Callable[[bytes], str]


def link_text(target: bytes | None, show: Show) -> str:
    """What follows a symbolic link's name in a listing."""
    return "" if target is None else f" -> {show(target)}"


def _owner(number: int, look: Callable[[int], Any], field: str) -> str:
    try:
        return str(getattr(look(number), field))
    except KeyError:
        return str(number)


def _time(time_ns: int) -> str:
    return datetime.fromtimestamp(time_ns / NANOSECONDS).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def long_listing(entries: Sequence[Entry], targets: Mapping[Inode, bytes], show: Show) -> str:
    """As `ls -l` shows it; `targets` is what the symbolic links say."""
    rows = [
        (
            stat.filemode(attributes.mode),
            str(attributes.nlink),
            _owner(attributes.uid, pwd.getpwuid, "pw_name"),
            _owner(attributes.gid, grp.getgrgid, "gr_name"),
            str(attributes.size),
            _time(attributes.mtime_ns),
            show(name) + link_text(targets.get(attributes.inode), show),
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


def json_name(name: bytes) -> dict[str, str]:
    """A name for `--json`. One that is no UTF-8 is escaped, and given in hexadecimal as well."""
    try:
        return {"name": name.decode()}
    except UnicodeDecodeError:
        return {"name": escaped(os.fsdecode(name)), "name_hex": name.hex()}


def document(name: bytes, attributes: Attributes, target: bytes | None = None) -> dict[str, Any]:
    """One file for `--json`."""
    return {
        **json_name(name),
        "type": KINDS.get(stat.S_IFMT(attributes.mode), "unknown"),
        **({} if target is None else {"target": json_name(target)["name"]}),
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
