"""Listings through the kernel: positions that hold while names come and go."""

import os
import subprocess
from pathlib import Path

import pytest

from mendfs.fuse.directories import NAMES_PACKED, Positions
from mendfs.fuse.server import MountOptions
from mendfs.model import ROOT_INODE
from tests.mount.conftest import Mounted, Mounting
from tests.real_cluster import needs_mounts

pytestmark = [needs_mounts, pytest.mark.seed("C12")]

# opendir(3) and telldir(3) as C programs use them.
LIBC = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
libc.telldir.restype = ctypes.c_long
libc.readdir.argtypes = libc.telldir.argtypes = libc.rewinddir.argtypes = libc.closedir.argtypes = [ctypes.c_void_p]
libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
class Dirent(ctypes.Structure):
    _fields_ = [("ino", ctypes.c_ulong), ("off", ctypes.c_long), ("length", ctypes.c_ushort),
                ("kind", ctypes.c_ubyte), ("name", ctypes.c_char * 256)]
def read(d):
    raw = libc.readdir(d)
    return Dirent.from_address(raw).name.decode() if raw else None
def rest(d):
    names = []
    while (name := read(d)) is not None:
        names.append(name)
    return names
d = libc.opendir(root.encode())
"""


def fill(fake: Mounted, count: int) -> list[str]:
    names = [f"name{number:06}" for number in range(count)]
    for name in names:
        fake.thread.run(fake.volume.make(ROOT_INODE, name.encode(), 0o100644, uid=0, gid=0))
    return names


@pytest.fixture(params=[False, True], ids=["readdir", "readdirplus"])
def fake(mounting: Mounting, request: pytest.FixtureRequest) -> Mounted:
    return mounting(MountOptions(with_readdirplus=request.param))


def test_dots_kinds_and_inodes_are_right(fake: Mounted) -> None:
    (fake.path / "d" / "e").mkdir(parents=True)
    (fake.path / "file").touch()
    (fake.path / "link").symlink_to("file")
    os.mkfifo(fake.path / "fifo")
    out = fake.check(LIBC + "print(rest(d), rest(libc.opendir((root + '/d/e').encode())))")
    assert out.strip() == "['.', '..', 'd', 'fifo', 'file', 'link'] ['.', '..']"
    with os.scandir(fake.path) as entries:
        for entry in entries:
            assert entry.inode() == entry.stat(follow_symlinks=False).st_ino
            assert entry.is_dir() == (entry.name == "d")
            assert entry.is_symlink() == (entry.name == "link")
    assert subprocess.run(["ls", "-f", fake.path / "d"], capture_output=True, text=True).stdout.split() == [
        ".",
        "..",
        "e",
    ]


def test_five_thousand_names_while_they_are_deleted(fake: Mounted) -> None:
    """Each name that stays the whole time is listed exactly once, whatever is removed and made meanwhile."""
    names = fill(fake, 5000)
    seen: list[str] = []
    with os.scandir(fake.path) as entries:
        for number, entry in enumerate(entries):
            seen.append(entry.name)
            if number % 2:
                os.unlink(fake.path / entry.name)
            if number % 100 == 0:
                (fake.path / f"new{number}").touch()
                (fake.path / f"aaa{number}").touch()
    assert [name for name in seen if name.startswith("name")] == names
    assert len(seen) == len(set(seen))
    left = [name for name in os.listdir(fake.path) if name.startswith("name")]
    assert len(left) >= 2500
    subprocess.run(f"rm {fake.path}/*", shell=True, check=True)
    assert os.listdir(fake.path) == []


def test_rm_r_removes_a_big_directory(fake: Mounted) -> None:
    (fake.path / "d").mkdir()
    inode = fake.volume.nodes[ROOT_INODE].names[b"d"]
    for number in range(3000):
        fake.thread.run(fake.volume.make(inode, b"%d" % number, 0o100644, uid=0, gid=0))
    subprocess.run(["rm", "-r", fake.path / "d"], check=True)
    assert not (fake.path / "d").exists()


def test_seekdir_goes_back_to_where_telldir_was(fake: Mounted) -> None:
    names = fill(fake, 2500)
    out = fake.check(
        LIBC
        + """
places = []
while True:
    place = libc.telldir(d)
    name = read(d)
    if name is None:
        break
    places.append((place, name))
for index in (2499, 3, 1200, 0, 2500, 1, 2, 1024, 1026, 2501):
    libc.seekdir(d, places[index][0])
    assert read(d) == places[index][1], index
libc.seekdir(d, places[100][0])
os.unlink(root + "/" + places[100][1])
os.unlink(root + "/" + places[2000][1])
assert rest(d)[-400:] == [name for _, name in places[-400:]]
# Going back leaves the places further on as they were, also those whose name is gone.
libc.seekdir(d, places[1][0])
assert read(d) == ".."
libc.seekdir(d, places[50][0])
assert read(d) == places[50][1]
libc.seekdir(d, places[2001][0])
assert read(d) == places[2001][1]
libc.rewinddir(d)
open(root + "/aaa", "w").close()
libc.rewinddir(d)
names = rest(d)
assert names[:4] == [".", "..", "aaa", "name000000"], names[:4]
print(len(names))
"""
    )
    assert int(out) == len(names) + 2 - 2 + 1


def test_a_listing_costs_few_calls(mounting: Mounting) -> None:
    fake = mounting()
    fill(fake, 5000)
    fake.volume.calls.clear()
    assert len(os.listdir(fake.path)) == 5000
    assert len(fake.volume.calls) <= 6


def test_positions_are_kept_in_little_memory(tmp_path: Path) -> None:
    positions = Positions()
    names = [b"name%07d" % number for number in range(3 * NAMES_PACKED + 5)]
    for name in names:
        positions.append(name)
    assert len(positions) == len(names)
    assert positions.name(0) == b""
    assert [positions.name(number + 1) for number in range(0, len(names), 97)] == names[::97]
    assert positions.name(len(names)) == names[-1]
    positions.clear()
    assert len(positions) == 0
