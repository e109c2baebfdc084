"""Mounting and unmounting through the kernel's calls, and what belongs to a mount in /proc and /sys.

Everything here blocks and is called from a thread: a path below our own mount that is touched from the event loop that
serves it would wait for itself. What is mounted is read from /proc/self/mountinfo, which asks no file system.
"""

import ctypes
import errno
import os
import re
import stat
from typing import NamedTuple

import msgspec
import structlog

from mendfs.errors import MendfsError, OperationError, UsageError

log = structlog.get_logger("mendfs.fuse")

DEVICE = "/dev/fuse"
FILE_SYSTEM = "fuse.mendfs"
"""What the mount table shows: type `fuse`, subtype `mendfs`."""

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
PR_SET_IO_FLUSHER = 57
DEAD_MOUNT_ERRORS = {errno.ENOTCONN, errno.ECONNABORTED, errno.ESTALE}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


class MountFlags(msgspec.Struct, frozen=True, kw_only=True):
    """How the kernel treats the mount."""

    is_read_only: bool = False
    allow_other: bool = True
    """Other users than root may use it; the kernel checks permissions by the files' modes."""
    allow_suid: bool = False
    """Honour set-user-id bits. Off: whoever can write to a data server's disk must not become root here."""
    allow_devices: bool = False
    """Let device files be opened. Off for the same reason; they can be made and kept all the same."""
    allow_nonempty: bool = False
    """Mount over a directory with files in it, which are hidden then."""


class MountEntry(NamedTuple):
    """A line of the mount table."""

    mountpoint: str
    device: str
    """`major:minor`, as /sys/class/bdi calls it."""
    file_system: str


def _unescaped(field: bytes) -> str:
    # The kernel writes space, tab, newline and backslash as three octal digits.
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda match: bytes((int(match[1], 8),)), field))


def mount_entries() -> list[MountEntry]:
    """The mount table of this process, in the order in which things were mounted."""
    with open("/proc/self/mountinfo", "rb") as file:
        lines = file.read().splitlines()
    entries = []
    for line in lines:
        before, _, after = line.partition(b" - ")
        fields = before.split(b" ")
        entries.append(MountEntry(_unescaped(fields[4]), fields[2].decode(), after.split(b" ")[0].decode()))
    return entries


def find_mount(mountpoint: str) -> MountEntry | None:
    """What is mounted at this absolute path, the topmost if several are."""
    found = [entry for entry in mount_entries() if entry.mountpoint == mountpoint]
    return found[-1] if found else None


def absolute(path: str) -> str:
    """The path that the mount table shows: links resolved in all but the last component, which may be a dead mount."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def check_mountpoint(path: str, *, allow_nonempty: bool = False) -> str:
    """The absolute path to mount at; a dead mount of ours that lies there is taken away. Raises UsageError."""
    mountpoint = absolute(path)
    entry = find_mount(mountpoint)
    if entry is not None:
        if not _is_dead(mountpoint) or entry.file_system != FILE_SYSTEM:
            raise UsageError(f"{path} is already a mount point: mendfs umount {path}")
        log.warning("taking away a mount whose process is gone", mountpoint=mountpoint)
        unmount(mountpoint, detach=True)
    try:
        status = os.stat(mountpoint)
        names = os.listdir(mountpoint) if stat.S_ISDIR(status.st_mode) else []
    except FileNotFoundError:
        raise UsageError(f"mount point {path} does not exist: mkdir {path}") from None
    except OSError as error:
        raise UsageError(f"cannot mount at {path}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise UsageError(f"mount point {path} is not a directory")
    if names and not allow_nonempty:
        raise UsageError(f"mount point {path} is not empty: its files would be hidden; mount at an empty directory")
    return mountpoint


def _is_dead(mountpoint: str) -> bool:
    """Whether the process that served this mount is gone."""
    try:
        os.stat(mountpoint)
    except OSError as error:
        return error.errno in DEAD_MOUNT_ERRORS
    return False


def mount(mountpoint: str, flags: MountFlags) -> int:
    """Mount at a checked mount point and return the device's descriptor, non-blocking. Needs root."""
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"cannot open {DEVICE}: {error.strerror}. Load the module: modprobe fuse") from None
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions"
    if flags.allow_other:
        options += ",allow_other"
    bits = MS_RDONLY if flags.is_read_only else 0
    bits |= 0 if flags.allow_suid else MS_NOSUID
    bits |= 0 if flags.allow_devices else MS_NODEV
    if _libc.mount(b"mendfs", os.fsencode(mountpoint), FILE_SYSTEM.encode(), bits, options.encode()) != 0:
        code = ctypes.get_errno()
        os.close(fd)
        remedy = ": mounting needs root" if code == errno.EPERM else f": {os.strerror(code)}"
        raise UsageError(f"cannot mount at {mountpoint}{remedy}")
    return fd


def unmount(mountpoint: str, *, detach: bool = False) -> None:
    """umount2. With `detach` the name is gone at once, even if files are still open below it.

    Raises OperationError (EBUSY) when it is in use, EINVAL when nothing is mounted there.
    """
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if detach else 0)
    if _libc.umount2(os.fsencode(mountpoint), flags) != 0:
        raise OperationError(ctypes.get_errno(), f"cannot unmount {mountpoint}")


def unmount_command(path: str) -> None:
    """What `mendfs umount` does: a living mount in order, a dead one by force. One clear line when it cannot."""
    mountpoint = absolute(path)
    entry = find_mount(mountpoint)
    if entry is None or entry.file_system != FILE_SYSTEM:
        raise UsageError(f"{path} is not a mendfs mount")
    if _is_dead(mountpoint):
        # FORCE as well: somebody may still wait in it for an answer that never comes.
        _libc.umount2(os.fsencode(mountpoint), UMOUNT_NOFOLLOW | MNT_FORCE)
        if find_mount(mountpoint) is not None:
            unmount(mountpoint, detach=True)
        return
    try:
        unmount(mountpoint)
    except OperationError as error:
        if error.errno != errno.EBUSY:
            raise
        raise MendfsError(
            f"{path} is in use: leave it and close its files (fuser -vm {path}), then try again"
        ) from None


def raise_read_ahead(mountpoint: str, read_ahead_bytes: int) -> None:
    """Let sequential readers be read ahead of by this much: INIT can only lower the device's default of 128 KiB."""
    entry = find_mount(mountpoint)
    if entry is None:
        return
    path = f"/sys/class/bdi/{entry.device}/read_ahead_kb"
    try:
        with open(path, "w") as file:
            file.write(str(read_ahead_bytes >> 10))
    except OSError as error:
        log.warning("cannot raise the read-ahead: sequential reads are slower", path=path, error=error.strerror)


def set_io_flusher() -> None:
    """Tell the kernel that this thread writes back dirty pages: its own allocations must not wait for that.

    Without it a machine short of memory can deadlock: the kernel waits for us to write pages, we for free memory.
    """
    if _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0 and ctypes.get_errno() not in (errno.EPERM, errno.EINVAL):
        raise OperationError(ctypes.get_errno(), "prctl(PR_SET_IO_FLUSHER)")
