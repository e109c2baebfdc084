"""What is mounted on this machine, and taking dead mounts away. Mounting itself is `fuse.device`."""

import ctypes
import errno
import os
import re

import msgspec

from mendfs.model import PATH_BYTES_MAX

MNT_DETACH = 2
FSTYPE = "fuse.mendfs"

_libc = ctypes.CDLL(None, use_errno=True)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


class MountEntry(msgspec.Struct, frozen=True):
    """One line of the kernel's table of mounts."""

    path: str
    fstype: str
    source: str


def _plain(field: str) -> str:
    """The kernel writes blanks and backslashes in paths as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), field)


def parse_mountinfo(text: str) -> list[MountEntry]:
    """The entries of /proc/self/mountinfo, oldest first: a later one on the same path lies over an earlier one."""
    entries = []
    for line in text.splitlines():
        front, _, back = line.partition(" - ")
        fields, rest = front.split(" "), back.split(" ")
        if len(fields) > 4 and len(rest) > 1:
            entries.append(MountEntry(_plain(fields[4]), rest[0], _plain(rest[1])))
    return entries


def mounted() -> list[MountEntry]:
    """What is mounted now."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return parse_mountinfo(file.read())


def mount_at(path: str) -> MountEntry | None:
    """The topmost mount at exactly this absolute path; None if it is no mount point."""
    found = [entry for entry in mounted() if entry.path == path]
    return found[-1] if found else None


def is_dead(path: str) -> bool:
    """Whether the process behind the mount at `path` has ended. May block if it hangs: call it on a thread."""
    try:
        os.stat(path)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def detach(path: str) -> None:
    """Take a mount away at once; open files keep their connection, if there is one. Raises OSError."""
    _unmount(path, MNT_DETACH)


def unmount(path: str) -> None:
    """umount(2): raises OSError, EBUSY while files are open below it."""
    _unmount(path, 0)


def _unmount(path: str, flags: int) -> None:
    assert len(path) < PATH_BYTES_MAX, "it was found among the mounts"
    if _libc.umount2(os.fsencode(path), flags) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)


def is_directory(path: str) -> bool:
    """Whether there is a directory at `path`."""
    return os.path.isdir(path)
