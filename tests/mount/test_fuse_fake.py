"""Row C12 through the kernel: every file operation on a mounted volume in memory."""

import contextlib
import ctypes
import errno
import os
import random
import shlex
import signal
import socket
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mendfs.fuse.server import MountOptions
from mendfs.model import ROOT_INODE, Inode
from tests.mount.conftest import Mounted, Mounting

pytestmark = pytest.mark.seed("C12")


@contextlib.contextmanager
def fails(code: int) -> Iterator[None]:
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno == code, f"{errno.errorcode[caught.value.errno or 0]}, not {errno.errorcode[code]}"


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


# --- files --------------------------------------------------------------------------------------------------------


def test_written_bytes_are_read_back(fake: Mounted) -> None:
    content = random.Random(1).randbytes(3_000_001)
    path = fake.path / "file"
    path.write_bytes(content)
    assert path.read_bytes() == content
    assert path.stat().st_size == len(content)
    # 512-byte units, rounded up.
    assert path.stat().st_blocks == -(-len(content) // 512)
    assert path.stat().st_blksize == 128 << 10


@pytest.mark.parametrize("waits", [False, True])
def test_random_writes_equal_those_on_a_local_file(fake: Mounted, tmp_path: Path, waits: bool) -> None:
    """Overwrites, holes, appends and truncations, also when the volume makes writers wait for room."""
    rng = random.Random(2)
    fake.volume.writes_wait = waits
    paths = (fake.path / "file", tmp_path / "file")
    fds = [os.open(path, os.O_RDWR | os.O_CREAT) for path in paths]
    for _ in range(150):
        offset, length = rng.randrange(3 << 20), rng.choice((1, 100, 4096, 70_000, 1 << 20, 3 << 20))
        match rng.choice(("write", "write", "truncate", "read", "append")):
            case "write":
                data = rng.randbytes(length)
                assert {os.pwrite(fd, data, offset) for fd in fds} == {length}
            case "append":
                data = rng.randbytes(1000)
                ends = {os.lseek(fd, 0, os.SEEK_END) for fd in fds}
                assert len(ends) == 1
                assert {os.write(fd, data) for fd in fds} == {1000}
            case "truncate":
                for fd in fds:
                    os.ftruncate(fd, offset)
            case "read":
                assert os.pread(fds[0], length, offset) == os.pread(fds[1], length, offset)
        assert os.fstat(fds[0]).st_size == os.fstat(fds[1]).st_size
    for fd in fds:
        os.close(fd)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_past_the_end_is_filled_with_zeros(fake: Mounted) -> None:
    with opened(fake.path / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.pwrite(fd, b"end", 1_000_000)
        assert os.pread(fd, 2_000_000, 0) == bytes(1_000_000) + b"end"
        os.truncate(fake.path / "file", 5)
        os.truncate(fake.path / "file", 10)
        assert os.pread(fd, 100, 0) == bytes(10)


def test_exclusive_creation_has_one_winner(fake: Mounted) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    with opened(fake.path / "file", flags):
        pass
    with fails(errno.EEXIST):
        os.open(fake.path / "file", flags)


def test_a_file_made_by_another_mount_meanwhile_is_opened(fake: Mounted) -> None:
    """The kernel looks, finds nothing and creates; another mount was faster: as on a local disk, the file is opened."""
    fake.volume.made_meanwhile |= {b"shared", b"mine"}
    with opened(fake.path / "shared", os.O_WRONLY | os.O_CREAT) as fd:
        os.write(fd, b"x")
    assert (fake.path / "shared").read_bytes() == b"x"
    with fails(errno.EEXIST):
        os.open(fake.path / "mine", os.O_WRONLY | os.O_CREAT | os.O_EXCL)


def test_truncating_open_empties_the_file(fake: Mounted) -> None:
    path = fake.path / "file"
    path.write_bytes(b"long content")
    with opened(path, os.O_WRONLY | os.O_TRUNC) as fd:
        assert os.fstat(fd).st_size == 0
        os.write(fd, b"new")
    assert path.read_bytes() == b"new"


def test_appends_of_several_descriptors_go_to_the_end(fake: Mounted) -> None:
    path = fake.path / "log"
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    with opened(path, flags) as one, opened(path, flags) as two, opened(path, os.O_RDONLY) as reader:
        for number in range(50):
            os.write(one, b"one%03d\n" % number)
            os.write(two, b"two%03d\n" % number)
        assert os.read(reader, 10_000) == b"".join(b"one%03d\ntwo%03d\n" % (each, each) for each in range(50))
        # The kernel's offset means nothing: the volume knows the end, which another mount may have moved.
        fake.volume.nodes[fake.volume.nodes[ROOT_INODE].names[b"log"]].data.extend(b"other\n")
        os.write(one, b"last\n")
    assert path.read_bytes().endswith(b"other\nlast\n")


def test_an_open_file_outlives_its_name(fake: Mounted) -> None:
    path = fake.path / "file"
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


def test_a_rename_over_an_open_file_leaves_it_readable(fake: Mounted) -> None:
    old, new = fake.path / "old", fake.path / "new"
    old.write_bytes(b"old")
    new.write_bytes(b"new")
    with opened(old, os.O_RDONLY) as fd:
        os.rename(new, old)
        assert os.read(fd, 10) == b"old"
    assert old.read_bytes() == b"new"
    assert os.listdir(fake.path) == ["old"]


def test_fsync_reaches_the_volume(fake: Mounted) -> None:
    with opened(fake.path / "file", os.O_WRONLY | os.O_CREAT) as fd:
        os.fsync(fd)
        os.fdatasync(fd)
        inode = Inode(os.fstat(fd).st_ino)
    with opened(fake.path, os.O_RDONLY | os.O_DIRECTORY) as fd:
        os.fsync(fd)
    assert fake.volume.calls.count(("fsync", inode)) == 2
    assert ("sync", ROOT_INODE) in fake.volume.calls


def test_close_tells_what_went_wrong(fake: Mounted) -> None:
    fd = os.open(fake.path / "file", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"x")
    fake.volume.flush_error = errno.ENOSPC
    with fails(errno.ENOSPC):
        os.close(fd)
    fake.volume.flush_error = 0


def test_a_shared_mapping_is_written_and_read(fake: Mounted) -> None:
    for flags in ("os.O_RDWR", "os.O_RDWR | os.O_APPEND"):
        fake.check(f"""
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


def test_programs_run_from_the_mount(fake: Mounted) -> None:
    program = fake.path / "program"
    program.write_bytes(Path("/bin/true").read_bytes())
    with fails(errno.EACCES):
        subprocess.run([program], check=True)
    program.chmod(0o755)
    subprocess.run([program], check=True)


def test_direct_io_and_a_database_work(fake: Mounted) -> None:
    fake.check("""
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


# --- names --------------------------------------------------------------------------------------------------------


def test_directories_have_right_link_counts(fake: Mounted) -> None:
    (fake.path / "a" / "b").mkdir(parents=True)
    (fake.path / "a" / "c").mkdir()
    assert (fake.path / "a").stat().st_nlink == 4
    with fails(errno.ENOTEMPTY):
        os.rmdir(fake.path / "a")
    os.rename(fake.path / "a" / "c", fake.path / "c")
    assert (fake.path / "a").stat().st_nlink == 3
    assert (fake.path / "a").stat().st_blocks == 0
    (fake.path / "a" / "b").rmdir()
    (fake.path / "a").rmdir()
    with fails(errno.ENOENT):
        os.rmdir(fake.path / "a")


def test_renames_follow_posix(fake: Mounted) -> None:
    for name in ("tree/x/y", "empty", "full/z"):
        (fake.path / name).mkdir(parents=True)
    (fake.path / "tree" / "x" / "file").write_bytes(b"1")
    (fake.path / "file").write_bytes(b"2")
    os.rename(fake.path / "tree", fake.path / "empty")
    assert (fake.path / "empty" / "x" / "file").read_bytes() == b"1"
    with fails(errno.ENOTEMPTY):
        os.rename(fake.path / "empty", fake.path / "full")
    with fails(errno.EINVAL):
        os.rename(fake.path / "empty", fake.path / "empty" / "x" / "y" / "in_itself")
    with fails(errno.EISDIR):
        os.rename(fake.path / "file", fake.path / "full")
    with fails(errno.ENOTDIR):
        os.rename(fake.path / "full", fake.path / "file")


def test_renameat2_exchanges_and_refuses(fake: Mounted) -> None:
    (fake.path / "a").write_bytes(b"a")
    (fake.path / "b").write_bytes(b"b")
    out = fake.check("""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def rename(flags, new):
    a, b = (root + "/a").encode(), (root + "/" + new).encode()
    return libc.renameat2(-100, a, -100, b, flags) and errno.errorcode[ctypes.get_errno()]
print(rename(1, "b"), rename(2, "b"), rename(2, "none"), rename(4, "b"))
""")
    assert out.split() == ["EEXIST", "0", "ENOENT", "EINVAL"]
    assert (fake.path / "a").read_bytes() == b"b"


def test_hard_links_share_everything(fake: Mounted) -> None:
    one, two = fake.path / "one", fake.path / "two"
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


def test_symbolic_links_say_what_they_were_told(fake: Mounted) -> None:
    link = fake.path / "link"
    link.symlink_to("x" * 4000)
    assert os.readlink(link) == "x" * 4000
    assert link.lstat().st_size == 4000
    link.unlink()
    (fake.path / "target").write_bytes(b"t")
    link.symlink_to("target")
    assert link.read_bytes() == b"t"
    assert stat.S_ISLNK(link.lstat().st_mode)
    os.chown(link, 5, 6, follow_symlinks=False)
    assert (link.lstat().st_uid, link.lstat().st_gid) == (5, 6)


def test_fifos_sockets_and_devices_exist(fake: Mounted) -> None:
    os.mkfifo(fake.path / "fifo", 0o640)
    assert stat.S_ISFIFO((fake.path / "fifo").stat().st_mode)
    writer = threading.Thread(target=(fake.path / "fifo").write_bytes, args=(b"through",))
    writer.start()
    assert (fake.path / "fifo").read_bytes() == b"through"
    writer.join()
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind(str(fake.path / "socket"))
        server.listen()
        client.connect(str(fake.path / "socket"))
    os.mknod(fake.path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(fake.path / "big", stat.S_IFBLK | 0o666, os.makedev(300, 70_000))
    assert (fake.path / "null").stat().st_rdev == os.makedev(1, 3)
    assert (fake.path / "big").stat().st_rdev == os.makedev(300, 70_000)
    with fails(errno.EACCES):
        os.open(fake.path / "null", os.O_RDONLY)  # devices are not honoured unless asked for
    os.mknod(fake.path / "plain", stat.S_IFREG | 0o600)
    assert (fake.path / "plain").read_bytes() == b""


def test_long_and_strange_names(fake: Mounted) -> None:
    names = ["n" * 255, "with space", "new\nline", "ü", os.fsdecode(b"\xff\xfe"), "-", "..."]
    for name in names:
        (fake.path / name).write_bytes(name.encode(errors="surrogateescape"))
    assert sorted(os.listdir(fake.path)) == sorted(names)
    with fails(errno.ENAMETOOLONG):
        (fake.path / ("n" * 256)).write_bytes(b"")
    with fails(errno.ENOENT):
        (fake.path / "none").stat()


# --- attributes ---------------------------------------------------------------------------------------------------


def test_times_have_nanoseconds(fake: Mounted) -> None:
    path = fake.path / "file"
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
    before = fake.path.stat().st_mtime_ns
    path.unlink()
    assert fake.path.stat().st_mtime_ns > before


def test_mode_and_owner_change(fake: Mounted) -> None:
    path = fake.path / "file"
    path.touch()
    path.chmod(0o1640)
    assert stat.S_IMODE(path.stat().st_mode) == 0o1640
    os.chown(path, 123, 456)
    os.chown(path, -1, 789)
    assert (path.stat().st_uid, path.stat().st_gid) == (123, 789)


def test_set_id_bits_end_with_a_change_of_owner_or_contents(fake: Mounted) -> None:
    path = fake.path / "file"
    path.touch()

    def mode() -> int:
        return stat.S_IMODE(path.stat().st_mode)

    path.chmod(0o6775)
    os.chown(path, 1000, 1000)
    assert mode() == 0o775
    for change in ("os.write(fd, b'x')", "os.ftruncate(fd, 0)", "os.open(root + '/file', os.O_WRONLY | os.O_TRUNC)"):
        path.chmod(0o6775)
        fake.check(f"fd = os.open(root + '/file', os.O_RDWR)\n{change}", user=1000)
        assert mode() == 0o775, change
    # Set while the file is already open for writing.
    fake.check(
        "fd = os.open(root + '/file', os.O_RDWR)\nos.chmod(root + '/file', 0o4755)\nos.write(fd, b'x')", user=1000
    )
    assert mode() == 0o755
    path.chmod(0o4755)
    with opened(path, os.O_WRONLY) as fd:
        os.ftruncate(fd, 1)
    assert mode() == 0o4755  # root keeps them


def test_umask_and_setgid_directories(fake: Mounted) -> None:
    fake.path.chmod(0o777)
    fake.check(
        "os.umask(0o027)\nos.mkdir(root + '/d', 0o777)\nos.close(os.open(root + '/f', os.O_CREAT, 0o666))", user=1000
    )
    assert stat.S_IMODE((fake.path / "d").stat().st_mode) == 0o750
    assert stat.S_IMODE((fake.path / "f").stat().st_mode) == 0o640
    assert ((fake.path / "f").stat().st_uid, (fake.path / "f").stat().st_gid) == (1000, 1000)


def test_permissions_hold_for_ordinary_users(fake: Mounted) -> None:
    """The kernel checks them, by the attributes it gets from us: as they are now, not as they were."""
    path = fake.path / "secret"
    path.write_bytes(b"secret")
    path.chmod(0o600)
    attempt = """
try:
    print({call})
except OSError as error:
    print(errno.errorcode[error.errno])
"""

    def as_user(call: str) -> str:
        return fake.check(attempt.format(call=call), user=1000).strip()

    assert as_user("open(root + '/secret').read()") == "EACCES"
    assert as_user("os.unlink(root + '/secret')") == "EACCES"
    assert as_user("os.mkdir(root + '/new')") == "EACCES"
    assert as_user("os.chmod(root + '/secret', 0o777)") == "EPERM"
    assert as_user("os.access(root + '/secret', os.R_OK)") == "False"
    path.chmod(0o604)
    assert as_user("open(root + '/secret').read()") == "secret"
    (fake.path / "sticky").mkdir()
    (fake.path / "sticky").chmod(0o1777)
    (fake.path / "sticky" / "roots").touch()
    assert as_user("os.unlink(root + '/sticky/roots')") == "EPERM"
    fake.path.chmod(0o700)
    assert as_user("os.stat(root + '/secret')") == "EACCES"


def test_extended_attributes(fake: Mounted) -> None:
    path = fake.path / "file"
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
    subprocess.run(["cp", "-a", path, fake.path / "copy"], check=True)
    assert os.getxattr(fake.path / "copy", "user.b") == b"x" * 60_000


def test_statfs_shows_room(fake: Mounted) -> None:
    room = os.statvfs(fake.path)
    assert room.f_blocks * room.f_frsize == 100 << 30
    assert room.f_bavail * room.f_frsize == 60 << 30
    assert room.f_namemax == 255


def test_what_is_not_offered_is_refused_or_done_by_the_kernel(fake: Mounted) -> None:
    path = fake.path / "file"
    path.write_bytes(b"x" * 200_000)
    with opened(path, os.O_RDWR) as fd, opened(fake.path / "copy", os.O_RDWR | os.O_CREAT) as copy:
        with fails(errno.EOPNOTSUPP):
            fallocate(fd)
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 200_000
        os.lseek(fd, 0, os.SEEK_SET)
        copied = 0
        while copied < 200_000:
            copied += os.copy_file_range(fd, copy, 200_000 - copied)
    assert (fake.path / "copy").read_bytes() == b"x" * 200_000


def fallocate(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.fallocate(fd, 0, ctypes.c_long(0), ctypes.c_long(10)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")


def test_a_tree_copied_in_is_the_same(fake: Mounted) -> None:
    source = Path(os.__file__).parent / "asyncio"
    subprocess.run(["cp", "-a", source, fake.path / "tree"], check=True)
    subprocess.run(["diff", "-r", source, fake.path / "tree"], check=True)
    subprocess.run(["tar", "-C", fake.path, "-cf", fake.path / "tree.tar", "tree"], check=True)
    (fake.path / "again").mkdir()
    subprocess.run(["tar", "-C", fake.path / "again", "-xf", fake.path / "tree.tar"], check=True)
    subprocess.run(["diff", "-r", source, fake.path / "again" / "tree"], check=True)
    subprocess.run(["rm", "-r", fake.path / "tree", fake.path / "again"], check=True)
    assert os.listdir(fake.path) == ["tree.tar"]


# --- waiting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["cat {}", "dd if=/dev/zero of={} bs=1M count=1", "sh -c 'echo x >> {}'"])
def test_who_waits_for_dead_servers_can_be_killed(mounting: Mounting, command: str) -> None:
    """Ctrl-C and kill end a program that waits for servers which do not answer; others go on meanwhile."""
    fake = mounting(MountOptions(interrupt_after_s=0.05))
    path = fake.path / "file"
    path.write_bytes(b"x" * 100)
    fake.volume.writes_wait = True
    fake.volume.is_open_gate.clear()
    waiting = subprocess.Popen(
        shlex.split(command.format(path)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    while not fake.volume.waiting_at_gate:
        path.stat()
    os.killpg(waiting.pid, signal.SIGINT)
    assert waiting.wait(10) != 0
    assert path.stat().st_size in (0, 100)


def test_many_waiting_writes_do_not_fill_the_memory(fake: Mounted) -> None:
    """Past a bound the writers' data stays with the kernel; all of it arrives in the end."""
    fake.volume.writes_wait = True
    fake.volume.is_open_gate.clear()

    def write(number: int) -> None:
        (fake.path / str(number)).write_bytes(bytes([number]) * (1 << 20))

    writers = [threading.Thread(target=write, args=(number,)) for number in range(150)]
    for writer in writers:
        writer.start()
    while fake.volume.waiting_at_gate < 128:
        os.sched_yield()
    assert fake.volume.waiting_at_gate == 128
    fake.thread.loop.call_soon_threadsafe(fake.volume.is_open_gate.set)
    for writer in writers:
        writer.join()
    for number in range(150):
        assert (fake.path / str(number)).read_bytes() == bytes([number]) * (1 << 20)
