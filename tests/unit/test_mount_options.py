"""What may be said after -o, and what becomes of it."""

import pytest

from mendfs.errors import UsageError
from mendfs.fuse.mount_options import (
    MS_DIRSYNC,
    MS_NOATIME,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    MS_SYNCHRONOUS,
    MountFlags,
    fusermount_words,
    known_words,
    mount_bits,
    mount_data,
    parse_mount_options,
)

CAREFUL = MS_NOSUID | MS_NODEV


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("", CAREFUL),
        ("defaults,_netdev,nofail,relatime,x-systemd.automount", CAREFUL),
        ("ro", CAREFUL | MS_RDONLY),
        ("ro,rw", CAREFUL),
        ("rw,ro,", CAREFUL | MS_RDONLY),
        ("suid", MS_NODEV),
        ("suid,dev", 0),
        ("suid,dev,nosuid,nodev", CAREFUL),
        ("noexec,noatime,sync,dirsync", CAREFUL | MS_NOEXEC | MS_NOATIME | MS_SYNCHRONOUS | MS_DIRSYNC),
        ("noexec,exec,noatime,atime,sync,async", CAREFUL),
    ],
)
def test_words_mean_what_they_mean_to_mount(text: str, bits: int) -> None:
    assert mount_bits(parse_mount_options(text, is_root=True)) == bits


def test_other_users_are_let_in_by_default_where_root_mounts() -> None:
    """A disk is everybody's; an ordinary user's mount is theirs until they say otherwise."""
    flags = parse_mount_options("", is_root=True)
    assert mount_data(flags, 7) == "fd=7,rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
    assert fusermount_words(flags) == "fsname=mendfs,subtype=mendfs,default_permissions"
    assert fusermount_words(parse_mount_options("allow_other", is_root=False)).endswith(",allow_other")


def test_fusermount_is_told_only_what_it_knows() -> None:
    """It refuses relatime and the like, and adds nosuid and nodev by itself."""
    words = fusermount_words(parse_mount_options("ro,noexec,noatime,sync,dirsync,relatime,nosuid,user", is_root=False))
    assert words == "fsname=mendfs,subtype=mendfs,default_permissions,ro,noexec,sync,dirsync,noatime"


def test_a_name_may_be_given_and_cannot_smuggle_options_in() -> None:
    assert parse_mount_options("fsname=archive,subtype=mendfs", is_root=True).source == "archive"
    assert fusermount_words(MountFlags(source="a,suid\\")).startswith("fsname=a\\,suid\\\\,subtype=")


@pytest.mark.parametrize(
    ("text", "is_root", "said"),
    [
        ("ro,bogus", True, "'bogus' is unknown; those that are known: _netdev, allow_other"),
        ("noexce", False, "'noexce' is unknown"),
        ("fsname=", True, "'fsname=' is unknown"),
        ("ro=1", True, "'ro=1' is unknown"),
        ("user_id=0", True, "'user_id=0' is unknown"),
        ("subtype=ext4", True, "use fsname=NAME"),
        ("suid", False, "'suid' is for root"),
        ("dev", False, "'dev' is for root"),
    ],
)
def test_what_cannot_be_is_named(text: str, is_root: bool, said: str) -> None:
    with pytest.raises(UsageError, match="mount option") as caught:
        parse_mount_options(text, is_root=is_root)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_word_that_is_told_of_is_understood() -> None:
    for word in known_words():
        parse_mount_options(word.replace("x-*", "x-gvfs-show"), is_root=True)


def test_what_was_chosen_before_stays() -> None:
    flags = parse_mount_options("ro", MountFlags(allow_nonempty=True), is_root=True)
    assert flags.allow_nonempty
    assert flags.is_read_only
