"""The kernel's numbers: operations, and the flags they carry. Names and values are those of Linux' uapi/linux/fuse.h.

The protocol is negotiated down to the kernel's minor version; version 7.36 (Linux 5.17) is the oldest that is spoken,
because from there on INIT has its second word of flags.
"""

from typing import Final

PROTOCOL_MAJOR: Final = 7
PROTOCOL_MINOR: Final = 40
PROTOCOL_MINOR_MIN: Final = 36

ROOT_NODE: Final = 1
"""The kernel's id of the root; our inode numbers are the kernel's ids, and the root is 1 in both."""

MAX_WRITE: Final = 1 << 20
"""Bytes of one READ or WRITE: 256 pages, the most the kernel allows without a change of its settings."""
MAX_PAGES: Final = MAX_WRITE >> 12
NAME_BYTES_MAX: Final = 4096
"""The longest name the kernel could send (newer ones allow PATH_MAX - 1). The volume refuses those above 255."""

# Operations.
LOOKUP: Final = 1
FORGET: Final = 2
GETATTR: Final = 3
SETATTR: Final = 4
READLINK: Final = 5
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
STATFS: Final = 17
RELEASE: Final = 18
FSYNC: Final = 20
SETXATTR: Final = 21
GETXATTR: Final = 22
LISTXATTR: Final = 23
REMOVEXATTR: Final = 24
FLUSH: Final = 25
INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
FSYNCDIR: Final = 30
ACCESS: Final = 34
CREATE: Final = 35
INTERRUPT: Final = 36
DESTROY: Final = 38
BATCH_FORGET: Final = 42
FALLOCATE: Final = 43
READDIRPLUS: Final = 44
RENAME2: Final = 45
LSEEK: Final = 46
SYNCFS: Final = 50
# GETLK 31, SETLK 32, SETLKW 33, BMAP 37, IOCTL 39, POLL 40, COPY_FILE_RANGE 47, TMPFILE 51 and STATX 52 are answered
# with ENOSYS: the kernel remembers that and does what it can by itself.

# INIT: what the kernel offers and what is taken.
INIT_ASYNC_READ: Final = 1 << 0
INIT_ATOMIC_O_TRUNC: Final = 1 << 3
INIT_EXPORT_SUPPORT: Final = 1 << 4
INIT_BIG_WRITES: Final = 1 << 5
INIT_DO_READDIRPLUS: Final = 1 << 13
INIT_READDIRPLUS_AUTO: Final = 1 << 14
INIT_PARALLEL_DIROPS: Final = 1 << 18
INIT_MAX_PAGES: Final = 1 << 22
INIT_CACHE_SYMLINKS: Final = 1 << 23
INIT_EXPLICIT_INVAL_DATA: Final = 1 << 25
INIT_HANDLE_KILLPRIV_V2: Final = 1 << 28
INIT_EXT: Final = 1 << 30
INIT_DIRECT_IO_ALLOW_MMAP: Final = 1 << 36

# SETATTR: which fields count.
SET_MODE: Final = 1 << 0
SET_UID: Final = 1 << 1
SET_GID: Final = 1 << 2
SET_SIZE: Final = 1 << 3
SET_ATIME: Final = 1 << 4
SET_MTIME: Final = 1 << 5
SET_FH: Final = 1 << 6
SET_ATIME_NOW: Final = 1 << 7
SET_MTIME_NOW: Final = 1 << 8
SET_KILL_SUIDGID: Final = 1 << 11

# Flags of requests.
GETATTR_FH: Final = 1 << 0
OPEN_KILL_SUIDGID: Final = 1 << 0
WRITE_CACHE: Final = 1 << 0
WRITE_KILL_SUIDGID: Final = 1 << 2
FSYNC_FDATASYNC: Final = 1 << 0

# The answer to OPEN and CREATE.
FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_NOFLUSH: Final = 1 << 5

# Notifications.
NOTIFY_INVAL_INODE: Final = 2
NOTIFY_INVAL_ENTRY: Final = 3

VOLUME_ID = b"system.mendfs.volume"
"""Asked of a mount, it says which volume that is; no listing of attributes shows it. With it a command knows that a
path below a mount is one of its own volume, and not another's of the same name."""
