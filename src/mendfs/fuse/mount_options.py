"""What may be said about a mount: the words after `-o`, and what they mean to mount(2) and to fusermount3. Pure.

The words are those of mount(8), so that a line of /etc/fstab or of a habit means here what it means elsewhere. An
unknown one is refused: a mount that silently lacks what was asked for (`noexec` misspelt) is worse than none.
"""

import msgspec

from mendfs.errors import UsageError

SOURCE = "mendfs"
"""What `df` shows unless `fsname` says something else."""
SUBTYPE = "mendfs"

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_SYNCHRONOUS = 16
MS_DIRSYNC = 128
MS_NOATIME = 1024


class MountFlags(msgspec.Struct, frozen=True, kw_only=True):
    """How the kernel treats the mount. Permissions are always checked by it, by the files' modes and owners."""

    is_read_only: bool = False
    allow_other: bool | None = None
    """Other users than the one who mounts may use it. None: yes if root mounts, for a disk is everybody's; no if an
    ordinary user does, whom the system lets do that only where /etc/fuse.conf says so."""
    allow_suid: bool = False
    """Honour set-user-id bits. Off: whoever can write to a data server's disk must not become root here."""
    allow_devices: bool = False
    """Let device files be opened. Off for the same reason; they can be made and kept all the same."""
    allow_programs: bool = True
    is_synchronous: bool = False
    """Each write(2) returns when its bytes are durable, as if its file were opened with O_SYNC."""
    is_directory_synchronous: bool = False
    with_noatime: bool = False
    """Times of access are never kept up to date; the word only makes the mount table say so."""
    source: str = SOURCE
    allow_nonempty: bool = False
    """Mount over a directory with files in it, which are hidden then."""


_CHANGES: dict[str, dict[str, bool]] = {
    "ro": {"is_read_only": True},
    "rw": {"is_read_only": False},
    "allow_other": {"allow_other": True},
    "suid": {"allow_suid": True},
    "nosuid": {"allow_suid": False},
    "dev": {"allow_devices": True},
    "nodev": {"allow_devices": False},
    "exec": {"allow_programs": True},
    "noexec": {"allow_programs": False},
    "sync": {"is_synchronous": True},
    "async": {"is_synchronous": False},
    "dirsync": {"is_directory_synchronous": True},
    "atime": {"with_noatime": False},
    "noatime": {"with_noatime": True},
    "nonempty": {"allow_nonempty": True},
}
_IGNORED = frozenset(
    {
        "auto",
        "default_permissions",  # always on
        "defaults",
        "diratime",
        "group",
        "lazytime",
        "nodiratime",
        "nofail",
        "nolazytime",
        "norelatime",
        "nostrictatime",
        "nouser",
        "owner",
        "relatime",
        "strictatime",
        "user",
        "users",
        "_netdev",
        "noauto",
    }
)
"""True anyway, meant for who starts mounts, or about times of access, which are not kept up to date by reading."""
_FOR_ROOT = {"suid": "set-user-id programs", "dev": "device files"}
"""Words by which an ordinary user could become root."""


def known_words() -> list[str]:
    """Every word that is understood, sorted."""
    return sorted([*_CHANGES, *_IGNORED, "fsname=NAME", f"subtype={SUBTYPE}", "x-*"])


def parse_mount_options(text: str, flags: MountFlags | None = None, *, is_root: bool) -> MountFlags:
    """`flags` changed by comma-separated words, of which later ones win. Raises UsageError, naming the word."""
    flags = flags or MountFlags()
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = word.partition("=")
        if word in _FOR_ROOT and not is_root:
            raise UsageError(f"mount option {word!r} is for root: {_FOR_ROOT[word]} stay without effect for you")
        if word in _CHANGES:
            flags = msgspec.structs.replace(flags, **_CHANGES[word])
        elif name == "fsname" and value:
            flags = msgspec.structs.replace(flags, source=value)
        elif name == "subtype" and value != SUBTYPE:
            raise UsageError(
                f"mount option {word!r} is not possible: mounts are found again by the subtype {SUBTYPE}; to name it, "
                f"use fsname=NAME"
            )
        elif word not in _IGNORED and not (name == "subtype" and equals) and not word.startswith("x-"):
            raise UsageError(f"mount option {word!r} is unknown; those that are known: {', '.join(known_words())}")
    return flags


def mount_bits(flags: MountFlags) -> int:
    """The flags of mount(2)."""
    bits = {
        MS_RDONLY: flags.is_read_only,
        MS_NOSUID: not flags.allow_suid,
        MS_NODEV: not flags.allow_devices,
        MS_NOEXEC: not flags.allow_programs,
        MS_SYNCHRONOUS: flags.is_synchronous,
        MS_DIRSYNC: flags.is_directory_synchronous,
        MS_NOATIME: flags.with_noatime,
    }
    return sum(bit for bit, is_set in bits.items() if is_set)


def mount_data(flags: MountFlags, fd: int) -> str:
    """The last argument of mount(2), by which root mounts."""
    allow_other = "" if flags.allow_other is False else ",allow_other"
    return f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions{allow_other}"


def fusermount_words(flags: MountFlags) -> str:
    """What fusermount3 gets after -o. It adds nosuid and nodev by itself."""
    source = flags.source.replace("\\", "\\\\").replace(",", "\\,")
    words = [f"fsname={source}", f"subtype={SUBTYPE}", "default_permissions"]
    said = {
        "ro": flags.is_read_only,
        "allow_other": flags.allow_other,
        "noexec": not flags.allow_programs,
        "sync": flags.is_synchronous,
        "dirsync": flags.is_directory_synchronous,
        "noatime": flags.with_noatime,
    }
    return ",".join(words + [word for word, is_said in said.items() if is_said])
