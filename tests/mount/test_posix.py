"""Row C12: every file operation, on a volume in memory and on a cluster, through the kernel."""

import errno
import os
import random
import socket
import stat
import subprocess
import threading
from pathlib import Path

import pytest

from tests.mount.calls import compare_random_writes, fails, opened
from tests.mount.conftest import Tree
from tests.real_cluster import needs_mounts, needs_root

pytestmark = [needs_mounts, pytest.mark.seed("C12")]


# --- files --------------------------------------------------------------------------------------------------------


def test_written_bytes_are_read_back(tree: Tree) -> None:
    content = random.Random(1).randbytes(3_000_001)
    path = tree.path / "file"
    path.write_bytes(content)
    assert path.read_bytes() == content
    assert path.stat().st_size == len(content)
    # 512-byte units, rounded up.
    assert path.stat().st_blocks == -(-len(content) // 512)
    assert path.stat().st_blksize == 128 << 10


def test_past_the_end_is_filled_with_zeros(tree: Tree) -> None:
    with opened(tree.path / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"end", 1_000_000)
        assert os.pread(fd, 2_000_000, 0) == bytes(1_000_000) + b"end"
        os.truncate(tree.path / "file", 5)
        os.truncate(tree.path / "file", 10)
        assert os.pread(fd, 100, 0) == bytes(10)


def test_exclusive_creation_has_one_winner(tree: Tree) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with opened(tree.path / "file", flags):
        pass
    with fails(errno.EEXIST):
        os.open(tree.path / "file", flags)


def test_truncating_open_empties_the_file(tree: Tree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"long content")
    with opened(path, os.O_WRONLY | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
        os.write(fd, b"new")
    assert path.read_bytes() == b"new"


def test_appends_of_several_descriptors_go_to_the_end(tree: Tree) -> None:
    path = tree.path / "log"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with opened(path, flags) as one, opened(path, flags) as two, opened(path, os.O_RDONLY) as reader:
        for number in range(50):
            os.write(one, b"one%03d\n" % number)
            os.write(two, b"two%03d\n" % number)
        assert os.read(reader, 10_000) == b"".join(b"one%03d\ntwo%03d\n" % (each, each) for each in range(50))
    assert path.stat().st_size == 50 * 14


def test_an_open_file_outlives_its_name(tree: Tree) -> None:
    path = tree.path / "file"
    with opened(path, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"content")
        path.unlink()
        assert not path.exists()
        assert os.fstat(fd).st_nlink == 0
        assert os.pread(fd, 100, 0) == b"content"
        os.ftruncate(fd, 3)
        os.fchmod(fd, 0o600)
        assert os.pread(fd, 100, 0) == b"con"
        with opened(path, os.O_WRONLY | os.O_CREAT) as other:
            assert os.fstat(other).st_ino != os.fstat(fd).st_ino
    assert path.read_bytes() == b""


def test_a_rename_over_an_open_file_leaves_it_readable(tree: Tree) -> None:
    old, new = tree.path / "old", tree.path / "new"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    with opened(old, os.O_RDONLY) as fd:
        os.rename(new, old)
        assert os.read(fd, 10) == b"old"
    assert old.read_bytes() == b"new"
    assert os.listdir(tree.path) == ["old"]


def test_a_shared_mapping_is_written_and_read(tree: Tree) -> None:
    for flags in ("os.O_RDWR", "os.O_RDWR | os.O_APPEND"):
        tree.check(f"""
import mmap
fd = os.open(root + "/mapped", {flags} | os.O_CREAT | os.O_TRUNC)
os.ftruncate(fd, 300_000)
with mmap.mmap(fd, 300_000) as memory:
    memory[100_000:100_005] = b"hello"
    memory[299_999] = 33
    assert memory[:3] == bytes(3)
    memory.flush()
    assert os.pread(fd, 5, 100_000) == b"hello"
os.close(fd)
with open(root + "/mapped", "rb") as file:
    data = file.read()
assert len(data) == 300_000 and data[100_000:100_005] == b"hello" and data[-1] == 33
""")


def test_programs_run_from_the_mount(tree: Tree) -> None:
    program = tree.path / "program"
    program.write_bytes(Path("/bin/true").read_bytes())
    with fails(errno.EACCES):
        subprocess.run([program], check=True)
    program.chmod(0o755)
    subprocess.run([program], check=True)


def test_direct_io_and_a_database_work(tree: Tree) -> None:
    tree.check("""
import sqlite3
for mode in ("WAL", "DELETE"):
    connection = sqlite3.connect(root + "/" + mode)
    connection.execute(f"PRAGMA journal_mode={mode}")
    connection.execute("CREATE TABLE t (x)")
    for number in range(50):
        with connection:
            connection.execute("INSERT INTO t VALUES (?)", (number,))
    assert connection.execute("SELECT sum(x) FROM t").fetchone() == (1225,)
    connection.close()
import mmap
fd = os.open(root + "/direct", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
memory = mmap.mmap(-1, 1 << 21)
memory[:5] = b"hello"
assert os.pwritev(fd, [memory], 4096) == 1 << 21
assert os.preadv(fd, [memory], 4096) == 1 << 21 and memory[:5] == b"hello"
""")


def test_random_writes_equal_those_on_a_local_file(tree: Tree, tmp_path: Path) -> None:
    """Overwrites, holes, appends and truncations."""
    compare_random_writes(tree.path / "file", tmp_path / "file")


# --- names --------------------------------------------------------------------------------------------------------


def test_directories_have_right_link_counts(tree: Tree) -> None:
    (tree.path / "a" / "b").mkdir(parents=True)
    (tree.path / "a" / "c").mkdir()
    assert (tree.path / "a").stat().st_nlink == 4
    with fails(errno.ENOTEMPTY):
        os.rmdir(tree.path / "a")
    os.rename(tree.path / "a" / "c", tree.path / "c")
    assert (tree.path / "a").stat().st_nlink == 3
    assert (tree.path / "a").stat().st_blocks == 0
    (tree.path / "a" / "b").rmdir()
    (tree.path / "a").rmdir()
    with fails(errno.ENOENT):
        os.rmdir(tree.path / "a")


def test_renames_follow_posix(tree: Tree) -> None:
    for name in ("tree/x/y", "empty", "full/z"):
        (tree.path / name).mkdir(parents=True)
    (tree.path / "tree" / "x" / "file").write_bytes(b"1")
    (tree.path / "file").write_bytes(b"2")
    os.rename(tree.path / "tree", tree.path / "empty")
    assert (tree.path / "empty" / "x" / "file").read_bytes() == b"1"
    with fails(errno.ENOTEMPTY):
        os.rename(tree.path / "empty", tree.path / "full")
    with fails(errno.EINVAL):
        os.rename(tree.path / "empty", tree.path / "empty" / "x" / "y" / "in_itself")
    with fails(errno.EISDIR):
        os.rename(tree.path / "file", tree.path / "full")
    with fails(errno.ENOTDIR):
        os.rename(tree.path / "full", tree.path / "file")


def test_renameat2_exchanges_and_refuses(tree: Tree) -> None:
    (tree.path / "a").write_bytes(b"a")
    (tree.path / "b").write_bytes(b"b")
    out = tree.check("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def rename(flags, new):
    a, b = (root + "/a").encode(), (root + "/" + new).encode()
    return libc.renameat2(-100, a, -100, b, flags) and errno.errorcode[ctypes.get_errno()]
print(rename(1, "b"), rename(2, "b"), rename(2, "none"), rename(4, "b"))
""")
    assert out.split() == ["EEXIST", "0", "ENOENT", "EINVAL"]
    assert (tree.path / "a").read_bytes() == b"b"


def test_hard_links_share_everything(tree: Tree) -> None:
    one, two = tree.path / "one", tree.path / "two"
    one.write_bytes(b"x")
    os.link(one, two)
    assert one.stat().st_nlink == 2
    assert os.path.samefile(one, two)
    two.write_bytes(b"changed")
    two.chmod(0o600)
    assert one.read_bytes() == b"changed"
    assert stat.S_IMODE(one.stat().st_mode) == 0o600
    one.unlink()
    assert two.stat().st_nlink == 1
    with fails(errno.EEXIST):
        os.link(two, two)


@needs_root
def test_symbolic_links_say_what_they_were_told(tree: Tree) -> None:
    link = tree.path / "link"
    link.symlink_to("x" * 4000)
    assert os.readlink(link) == "x" * 4000
    assert link.lstat().st_size == 4000
    link.unlink()
    (tree.path / "target").write_bytes(b"t")
    link.symlink_to("target")
    assert link.read_bytes() == b"t"
    assert stat.S_ISLNK(link.lstat().st_mode)
    os.chown(link, 5, 6, follow_symlinks=False)
    assert (link.lstat().st_uid, link.lstat().st_gid) == (5, 6)


@needs_root
def test_fifos_sockets_and_devices_exist(tree: Tree) -> None:
    os.mkfifo(tree.path / "fifo", 0o640)
    assert stat.S_ISFIFO((tree.path / "fifo").stat().st_mode)
    writer = threading.Thread(target=(tree.path / "fifo").write_bytes, args=(b"through",))
    writer.start()
    assert (tree.path / "fifo").read_bytes() == b"through"
    writer.join()
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(tree.path / "socket"))
        server.listen()
        client.connect(str(tree.path / "socket"))
    os.mknod(tree.path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(tree.path / "big", stat.S_IFBLK | 0o666, os.makedev(300, 70_000))
    assert (tree.path / "null").stat().st_rdev == os.makedev(1, 3)
    assert (tree.path / "big").stat().st_rdev == os.makedev(300, 70_000)
    with fails(errno.EACCES):
        os.open(tree.path / "null", os.O_RDONLY)  # devices are not honoured unless asked for
    os.mknod(tree.path / "plain", stat.S_IFREG | 0o600)
    assert (tree.path / "plain").read_bytes() == b""


def test_long_and_strange_names(tree: Tree) -> None:
    names = ["n" * 255, "with space", "new\nline", "ü", os.fsdecode(b"\xff\xfe"), "-", "..."]
    for name in names:
        (tree.path / name).write_bytes(name.encode(errors="surrogateescape"))
    assert sorted(os.listdir(tree.path)) == sorted(names)
    with fails(errno.ENAMETOOLONG):
        (tree.path / ("n" * 256)).write_bytes(b"")
    with fails(errno.ENOENT):
        (tree.path / "none").stat()


@needs_root
def test_a_file_handle_leads_to_the_file_without_a_path(tree: Tree) -> None:
    """What NFS servers and fanotify use: `.` and `..` are looked up by inode number."""
    (tree.path / "d").mkdir()
    (tree.path / "d" / "file").write_bytes(b"content")
    out = tree.check("""
import ctypes, select
class Handle(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint), ("kind", ctypes.c_int), ("raw", ctypes.c_ubyte * 128)]
libc = ctypes.CDLL(None, use_errno=True)
def handle(path):
    made, mount = Handle(128), ctypes.c_int()
    assert libc.name_to_handle_at(-100, path.encode(), ctypes.byref(made), ctypes.byref(mount), 0) == 0
    return made
top = os.open(root, os.O_RDONLY)
file, folder = handle(root + "/d/file"), handle(root + "/d")
with open("/proc/sys/vm/drop_caches", "w") as caches:
    caches.write("2")
fd = libc.open_by_handle_at(top, ctypes.byref(file), os.O_RDONLY)
print(os.read(fd, 100).decode(), os.readlink(f"/proc/self/fd/{fd}"))
os.unlink(root + "/d/file")
os.close(fd)
# The kernel releases a file some time after it was closed; until then the unlinked one can still be opened.
while (fd := libc.open_by_handle_at(top, ctypes.byref(file), os.O_RDONLY)) >= 0:
    os.close(fd)
    select.select([], [], [], 0.02)
print(fd, errno.errorcode[ctypes.get_errno()])
fd = libc.open_by_handle_at(top, ctypes.byref(folder), os.O_RDONLY | os.O_DIRECTORY)
print(os.listdir(fd))
""")
    first, second, third = out.splitlines()
    assert first.startswith("content ")
    assert second == "-1 ESTALE"
    assert third == "[]"


# --- attributes ---------------------------------------------------------------------------------------------------


def test_times_have_nanoseconds(tree: Tree) -> None:
    path = tree.path / "file"
    path.touch()
    for atime_ns, mtime_ns in ((1_234_567_890_123_456_789, 987_654_321_000_000_001), (0, -1_500_000_001)):
        os.utime(path, ns=(atime_ns, mtime_ns))
        status = path.stat()
        assert (status.st_atime_ns, status.st_mtime_ns) == (atime_ns, mtime_ns)
    os.utime(path)
    assert abs(path.stat().st_mtime_ns - path.stat().st_ctime_ns) < 1_000_000_000
    before = path.stat().st_mtime_ns
    path.write_bytes(b"x")
    assert path.stat().st_mtime_ns > before
    before = tree.path.stat().st_mtime_ns
    path.unlink()
    assert tree.path.stat().st_mtime_ns > before


@needs_root
def test_mode_and_owner_change(tree: Tree) -> None:
    path = tree.path / "file"
    path.touch()
    path.chmod(0o1640)
    assert stat.S_IMODE(path.stat().st_mode) == 0o1640
    os.chown(path, 123, 456)
    os.chown(path, -1, 789)
    assert (path.stat().st_uid, path.stat().st_gid) == (123, 789)


@needs_root
def test_set_id_bits_end_with_a_change_of_owner_or_contents(tree: Tree) -> None:
    path = tree.path / "file"
    path.touch()

    def mode() -> int:
        return stat.S_IMODE(path.stat().st_mode)

    path.chmod(0o6775)
    os.chown(path, 1000, 1000)
    assert mode() == 0o775
    for change in ("os.write(fd, b'x')", "os.ftruncate(fd, 0)", "os.open(root + '/file', os.O_WRONLY | os.O_TRUNC)"):
        path.chmod(0o6775)
        tree.check(f"fd = os.open(root + '/file', os.O_RDWR)\n{change}", user=1000)
        assert mode() == 0o775, change
    # Set while the file is already open for writing.
    tree.check(
        "fd = os.open(root + '/file', os.O_RDWR)\nos.chmod(root + '/file', 0o4755)\nos.write(fd, b'x')", user=1000
    )
    assert mode() == 0o755
    path.chmod(0o4755)
    with opened(path, os.O_WRONLY) as fd:
        os.ftruncate(fd, 1)
    assert mode() == 0o4755  # root keeps them


@needs_root
def test_umask_and_setgid_directories(tree: Tree) -> None:
    tree.path.chmod(0o777)
    tree.check(
        "os.umask(0o027)\nos.mkdir(root + '/d', 0o777)\nos.close(os.open(root + '/f', os.O_CREAT, 0o666))", user=1000
    )
    assert stat.S_IMODE((tree.path / "d").stat().st_mode) == 0o750
    assert stat.S_IMODE((tree.path / "f").stat().st_mode) == 0o640
    assert ((tree.path / "f").stat().st_uid, (tree.path / "f").stat().st_gid) == (1000, 1000)


@needs_root
def test_permissions_hold_for_ordinary_users(tree: Tree) -> None:
    """The kernel checks them, by the attributes it gets from us: as they are now, not as they were."""
    path = tree.path / "secret"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    attempt = """
try:
    print({call})
except OSError as error:
    print(errno.errorcode[error.errno])
"""

    def as_user(call: str) -> str:
        return tree.check(attempt.format(call=call), user=1000).strip()

    assert as_user("open(root + '/secret').read()") == "EACCES"
    assert as_user("os.unlink(root + '/secret')") == "EACCES"
    assert as_user("os.mkdir(root + '/new')") == "EACCES"
    assert as_user("os.chmod(root + '/secret', 0o777)") == "EPERM"
    assert as_user("os.access(root + '/secret', os.R_OK)") == "False"
    path.chmod(0o604)
    assert as_user("open(root + '/secret').read()") == "secret"
    (tree.path / "sticky").mkdir()
    (tree.path / "sticky").chmod(0o1777)
    (tree.path / "sticky" / "roots").touch()
    assert as_user("os.unlink(root + '/sticky/roots')") == "EPERM"
    tree.path.chmod(0o700)
    assert as_user("os.stat(root + '/secret')") == "EACCES"


@needs_root
def test_extended_attributes(tree: Tree) -> None:
    path = tree.path / "file"
    path.touch()
    os.setxattr(path, "user.a", b"1", os.XATTR_CREATE)
    with fails(errno.EEXIST):
        os.setxattr(path, "user.a", b"2", os.XATTR_CREATE)
    with fails(errno.ENODATA):
        os.setxattr(path, "user.b", b"2", os.XATTR_REPLACE)
    os.setxattr(path, "user.b", b"x" * 60_000)
    os.setxattr(path, "user.empty", b"")
    assert sorted(os.listxattr(path)) == ["user.a", "user.b", "user.empty"]
    assert os.getxattr(path, "user.b") == b"x" * 60_000
    assert os.getxattr(path, "user.empty") == b""
    os.removexattr(path, "user.a")
    with fails(errno.ENODATA):
        os.getxattr(path, "user.a")
    with fails(errno.ENODATA):
        os.removexattr(path, "user.a")
    # Kept but not enforced would be worse than refused.
    with fails(errno.EOPNOTSUPP):
        os.setxattr(path, "security.capability", b"\x00\x00\x00\x02" + bytes(16))
    subprocess.run(["cp", "-a", path, tree.path / "copy"], check=True)
    assert os.getxattr(tree.path / "copy", "user.b") == b"x" * 60_000


def test_statfs_shows_room(tree: Tree) -> None:
    room = os.statvfs(tree.path)
    assert room.f_blocks >= room.f_bavail > 0
    assert room.f_blocks * room.f_frsize > 1 << 20
    assert room.f_namemax == 255


def test_copies_that_the_kernel_does(tree: Tree) -> None:
    path = tree.path / "file"
    path.write_bytes(b"x" * 200_000)
    with opened(path, os.O_RDWR) as fd, opened(tree.path / "copy", os.O_RDWR | os.O_CREAT) as copy:
        copied = 0
        while copied < 200_000:
            copied += os.copy_file_range(fd, copy, 200_000 - copied)
    assert (tree.path / "copy").read_bytes() == b"x" * 200_000


def test_a_tree_copied_in_is_the_same(tree: Tree) -> None:
    source = Path(os.__file__).parent / "asyncio"
    subprocess.run(["cp", "-a", source, tree.path / "tree"], check=True)
    subprocess.run(["diff", "-r", source, tree.path / "tree"], check=True)
    subprocess.run(["tar", "-C", tree.path, "-cf", tree.path / "tree.tar", "tree"], check=True)
    (tree.path / "again").mkdir()
    subprocess.run(["tar", "-C", tree.path / "again", "-xf", tree.path / "tree.tar"], check=True)
    subprocess.run(["diff", "-r", source, tree.path / "again" / "tree"], check=True)
    subprocess.run(["rm", "-r", tree.path / "tree", tree.path / "again"], check=True)
    assert os.listdir(tree.path) == ["tree.tar"]


# --- waiting ------------------------------------------------------------------------------------------------------
