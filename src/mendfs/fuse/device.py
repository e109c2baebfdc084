"""Mounting and unmounting, and what belongs to a mount in /proc and /sys.

Root does it by the kernel's calls, an ordinary user through fusermount3 (`fuse.fusermount`).

Everything here blocks and is called from a thread: a path below our own mount that is touched from the event loop that
serves it would wait for itself. What is mounted is read from /proc/self/mountinfo, which asks no file system.
"""

import ctypes
import errno
import os
import re
import stat
import subprocess
import threading
from typing import NamedTuple

import structlog

from mendfs.errors import MendfsError, OperationError, UsageError
from mendfs.fuse import fusermount
from mendfs.fuse.mount_options import SUBTYPE, MountFlags, fusermount_words, mount_bits, mount_data

log = structlog.get_logger("mendfs.fuse")

DEVICE = "/dev/fuse"
FILE_SYSTEM = f"fuse.{SUBTYPE}"
"""What the mount table shows: type `fuse`, subtype `mendfs`."""

MNT_FORCE = 1
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
PR_SET_IO_FLUSHER = 57
ANSWER_S = 2.0
"""A mount whose process has died is said to be so at once; one that lives may wait for its servers for a minute."""
DEAD_MOUNT_ERRORS = {errno.ENOTCONN, errno.ECONNABORTED, errno.ESTALE}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_ulong, ctypes.c_char_p)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)


class MountEntry(NamedTuple):
    """A line of the mount table."""

    mountpoint: str
    device: str
    """`major:minor`, as /sys/class/bdi calls it."""
    file_system: str
    owner: int | None = None
    """Who has mounted it, if it is a FUSE mount."""
    group: int | None = None


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
        kind, _, options = after.split(b" ", 2)
        owner = re.search(rb"\buser_id=(\d+),group_id=(\d+)", options)
        user, group = (None, None) if owner is None else (int(owner[1]), int(owner[2]))
        entries.append(MountEntry(_unescaped(fields[4]), fields[2].decode(), kind.decode(), user, group))
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
        if entry.file_system != FILE_SYSTEM or not is_dead(mountpoint):
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
    if not is_root() and (
        not os.access(mountpoint, os.W_OK) or (status.st_mode & stat.S_ISVTX and status.st_uid != os.geteuid())
    ):
        # As fusermount3 has it: nobody may hide another user's files.
        raise UsageError(f"mount point {path} is not yours: mount at a directory that you own")
    return mountpoint


def is_root() -> bool:
    """Whether this process mounts by itself."""
    return os.geteuid() == 0


def is_dead(mountpoint: str) -> bool:
    """Whether the process that served this mount is gone.

    A living one may not be able to answer, if its servers are away: then no answer is an answer too.
    """
    errors: list[int | None] = []

    def look() -> None:
        try:
            os.stat(mountpoint)
        except OSError as error:
            entry = find_mount(mountpoint)
            if error.errno == errno.EACCES and is_root() and entry is not None and entry.owner:
                # Even root is not let into an ordinary user's mount: the user is told what became of it.
                errors.append(errno.ENOTCONN if _is_dead_for(mountpoint, entry) else None)
            else:
                errors.append(error.errno)

    looking = threading.Thread(target=look, name="look-at-mount", daemon=True)
    looking.start()
    looking.join(ANSWER_S)
    return bool(errors) and errors[0] in DEAD_MOUNT_ERRORS


def _is_dead_for(mountpoint: str, entry: MountEntry) -> bool:
    try:
        done = subprocess.run(
            ["stat", "--", mountpoint],
            user=entry.owner,
            group=entry.group,
            extra_groups=[],
            env={"LC_ALL": "C", "PATH": os.environ.get("PATH", os.defpath)},
            cwd="/",
            capture_output=True,
            timeout=ANSWER_S,
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("cannot tell whether a user's mount still lives", mountpoint=mountpoint, error=str(error))
        return False
    return any(os.strerror(code).encode() in done.stderr for code in DEAD_MOUNT_ERRORS)


def mount(mountpoint: str, flags: MountFlags) -> int:
    """Mount at a checked mount point and return the device's descriptor, non-blocking. Raises UsageError."""
    if not os.path.exists(DEVICE):
        raise UsageError(f"there is no {DEVICE}: load the kernel's module (modprobe fuse), or give it to the container")
    if is_root():
        return _mount_as_root(mountpoint, flags)
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        raise UsageError(f"only root may open {DEVICE} here: let root run chmod 666 {DEVICE}, as most systems have it")
    return fusermount.mount(mountpoint, fusermount_words(flags))


def _mount_as_root(mountpoint: str, flags: MountFlags) -> int:
    try:
        fd = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"cannot open {DEVICE}: {error.strerror}. Load the module: modprobe fuse") from None
    source, target = os.fsencode(flags.source), os.fsencode(mountpoint)
    if _libc.mount(source, target, FILE_SYSTEM.encode(), mount_bits(flags), mount_data(flags, fd).encode()) != 0:
        code = ctypes.get_errno()
        os.close(fd)
        remedy = "this root may not mount, as in many containers" if code == errno.EPERM else os.strerror(code)
        raise UsageError(f"cannot mount at {mountpoint}: {remedy}")
    return fd


def unmount(mountpoint: str, *, detach: bool = False) -> None:
    """Unmount. With `detach` the name is gone at once, even if files are still open below it.

    Raises OperationError (EBUSY) when it is in use, EINVAL when nothing of this user's is mounted there.
    """
    if not is_root():
        fusermount.unmount(mountpoint, detach=detach)
        return
    flags = UMOUNT_NOFOLLOW | (MNT_DETACH if detach else 0)
    if _libc.umount2(os.fsencode(mountpoint), flags) != 0:
        raise OperationError(ctypes.get_errno(), f"cannot unmount {mountpoint}")


def unmount_command(path: str) -> None:
    """What `mendfs umount` does: a living mount in order, a dead one by force. One clear line when it cannot."""
    mountpoint = absolute(path)
    entry = find_mount(mountpoint)
    if entry is None or entry.file_system != FILE_SYSTEM:
        raise UsageError(f"{path} is not a mendfs mount")
    if not is_root() and entry.owner != os.geteuid():
        raise UsageError(f"{path} was mounted by user {entry.owner}: only they and root may unmount it")
    try:
        unmount(mountpoint)
    except OperationError as error:
        if error.errno != errno.EBUSY:
            raise
        if not is_dead(mountpoint):
            raise MendfsError(
                f"{path} is in use: leave it and close its files (fuser -vm {path}), then try again"
            ) from None
        if is_root():
            # FORCE: somebody may still wait in it for an answer that never comes.
            _libc.umount2(os.fsencode(mountpoint), UMOUNT_NOFOLLOW | MNT_FORCE)
        if find_mount(mountpoint) is not None:
            unmount(mountpoint, detach=True)


def raise_read_ahead(mountpoint: str, read_ahead_bytes: int) -> None:
    """Let sequential readers be read ahead of by this much: INIT can only lower the device's default of 128 KiB."""
    entry = find_mount(mountpoint)
    if entry is None:
        return
    path = f"/sys/class/bdi/{entry.device}/read_ahead_kb"
    try:
        with open(path, "w") as file:
            file.write(str(read_ahead_bytes >> 10))
    except PermissionError:
        # An ordinary user's mount: the kernel asks for 128 KiB at a time, and our own read-ahead does the rest.
        return
    except OSError as error:
        log.warning("cannot raise the read-ahead: sequential reads are slower", path=path, error=error.strerror)


def set_io_flusher() -> None:
    """Tell the kernel that this thread writes back dirty pages: its own allocations must not wait for that.

    Without it a machine short of memory can deadlock: the kernel waits for us to write pages, we for free memory.
    """
    if _libc.prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0 and ctypes.get_errno() not in (errno.EPERM, errno.EINVAL):
        raise OperationError(ctypes.get_errno(), "prctl(PR_SET_IO_FLUSHER)")
