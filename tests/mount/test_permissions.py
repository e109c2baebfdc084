"""Who may do what: modes, groups, set-id bits, sticky directories, extended attributes, as on any local file system.

The kernel checks, with the attributes that it gets from us: every test is a user doing things on a real cluster.
"""

import errno
import os
import stat
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.mount.calls import fails, opened
from tests.mount.conftest import Tree
from tests.real_cluster import RealCluster, needs_mounts, needs_root

pytestmark = [needs_mounts, needs_root, pytest.mark.seed("C12")]

ANN, BOB, STAFF, OTHERS = 4242, 4343, 5000, 6000

ATTEMPTS = """
def attempt(expression):
    try:
        return eval(expression)
    except OSError as error:
        return errno.errorcode[error.errno]
os.chdir(root)
os.umask({umask})
for expression in {expressions!r}:
    print(attempt(expression))
"""


class Place(Tree):
    """A directory on the cluster that everybody may write to."""

    def tries(self, *expressions: str, user: int = ANN, groups: Iterable[int] = (), umask: int = 0o022) -> list[str]:
        """What each of these comes to for a user: its value, or the name of its error."""
        script = ATTEMPTS.format(umask=umask, expressions=expressions)
        return self.check(script, user=user or None, groups=groups).splitlines()

    def add(self, name: str, mode: int, uid: int = 0, gid: int = 0, *, is_directory: bool = False) -> Path:
        """A file or directory of somebody's."""
        path = self.path / name
        if is_directory:
            path.mkdir()
        else:
            path.write_bytes(b"content")
        os.chown(path, uid, gid)
        path.chmod(mode)
        return path

    def mode(self, name: str) -> int:
        return stat.S_IMODE((self.path / name).lstat().st_mode)

    def owner(self, name: str) -> tuple[int, int]:
        status = (self.path / name).lstat()
        return status.st_uid, status.st_gid


@pytest.fixture
def place(real: RealCluster, request: pytest.FixtureRequest) -> Place:
    path = real.mnt / request.node.name
    path.mkdir()
    path.chmod(0o777)
    return Place(path)


READ = "open('{}').read()"
WRITE = "os.close(os.open('{}', os.O_WRONLY))"


def test_supplementary_groups_count(place: Place) -> None:
    place.add("file", 0o640, gid=STAFF)
    place.add("folder", 0o770, gid=STAFF, is_directory=True)
    expressions = (READ.format("file"), WRITE.format("file"), "os.mkdir('folder/d')", "os.listdir('folder')")
    assert place.tries(*expressions, groups=[STAFF]) == ["content", "EACCES", "None", "['d']"]
    assert place.tries(*expressions, groups=[OTHERS]) == ["EACCES"] * 4
    assert place.owner("folder/d") == (ANN, ANN)


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0, 0o666, 0o777), (0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o777, 0, 0)]
)
def test_umask_is_taken_off_once(place: Place, umask: int, file: int, folder: int) -> None:
    place.tries(
        "os.close(os.open('f', os.O_CREAT | os.O_WRONLY, 0o666))",
        "os.mkdir('d', 0o777)",
        "os.mkfifo('p', 0o666)",
        "os.symlink('f', 's')",
        umask=umask,
    )
    assert [place.mode(name) for name in "fdps"] == [file, folder, file, 0o777]


def test_setgid_directories_hand_their_group_down(place: Place) -> None:
    place.add("d", 0o2777, gid=STAFF, is_directory=True)
    place.tries(
        "os.mkdir('d/sub')",
        "os.mkdir('d/sub/sub')",
        "os.close(os.open('d/f', os.O_CREAT | os.O_WRONLY, 0o666))",
        "os.symlink('f', 'd/s')",
        "os.mkfifo('d/p')",
        "os.rename('d/f', 'f') or os.rename('f', 'd/moved')",
        "os.close(os.open('d/program', os.O_CREAT | os.O_WRONLY, 0o2775))",
    )
    for name in ("d/sub", "d/sub/sub", "d/s", "d/p", "d/moved", "d/program"):
        assert place.owner(name) == (ANN, STAFF), name
    assert place.mode("d/sub") == place.mode("d/sub/sub") == 0o2755
    assert place.mode("d/program") == 0o755, "the bit is not for who is not of the group"


def test_set_group_id_is_for_members(place: Place) -> None:
    place.add("file", 0o755, uid=ANN, gid=STAFF)
    place.tries("os.chmod('file', 0o2755)")
    assert place.mode("file") == 0o755
    place.tries("os.chmod('file', 0o2755)", groups=[STAFF])
    assert place.mode("file") == 0o2755
    place.tries("os.chmod('file', 0o4755)")
    assert place.mode("file") == 0o4755


def test_in_sticky_directories_everybody_removes_their_own(place: Place) -> None:
    place.add("t", 0o1777, uid=BOB, is_directory=True)
    for name in ("root", "bob"):
        place.add(f"t/{name}", 0o666, uid=BOB if name == "bob" else 0)
        place.add(f"t/{name}.d", 0o777, uid=BOB if name == "bob" else 0, is_directory=True)
    place.tries(*(f"os.mkdir('t/{name}')" for name in ("mine", "mine2")))
    assert (
        place.tries(
            "os.unlink('t/root')",
            "os.rmdir('t/root.d')",
            "os.rename('t/root', 't/new')",
            "os.rename('t/root', 'new')",
            "os.rename('t/mine', 't/root.d')",
            "os.rename('t/mine', 't/other')",
            "os.rmdir('t/other')",
            "os.rename('t/mine2', 'mine2')",
        )
        == ["EPERM"] * 5 + ["None"] * 3
    )
    # The directory's owner removes anybody's.
    assert place.tries("os.unlink('t/root')", "os.rmdir('t/root.d')", user=BOB) == ["None"] * 2
    assert place.tries("os.unlink('t/bob')", user=0) == ["None"]


CHANGES = {
    "write": "os.write(os.open('file', os.O_WRONLY), b'x')",
    "append": "os.write(os.open('file', os.O_WRONLY | os.O_APPEND), b'x')",
    "truncate": "os.truncate('file', 3)",
    "open": "os.close(os.open('file', os.O_WRONLY | os.O_TRUNC))",
    "fallocate": "os.posix_fallocate(os.open('file', os.O_WRONLY), 0, 1 << 20)",
    "chgrp": f"os.chown('file', -1, {STAFF})",
}


@pytest.mark.parametrize("change", CHANGES)
def test_set_id_bits_go_with_a_change_by_an_ordinary_user(place: Place, change: str) -> None:
    place.add("file", 0o6775, uid=ANN, gid=ANN)
    before = (place.path / "file").stat().st_ctime_ns
    assert "E" not in place.tries(CHANGES[change], groups=[STAFF])[0]
    assert place.mode("file") == 0o775
    assert (place.path / "file").stat().st_ctime_ns > before


def test_set_user_id_programs_run_as_their_caller(real: RealCluster, place: Place) -> None:
    """Unless root says otherwise: whoever writes to a data server's disk must not become root here."""
    program = place.path / "id"
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    program.chmod(0o4755)
    assert place.tries(f"os.spawnl(os.P_WAIT, {str(program)!r}, 'id', '-u')") == [str(ANN), "0"]
    trusting = Path(tempfile.mkdtemp(prefix="mendfs-test-"))
    trusting.chmod(0o755)
    real.mendfs("mount", trusting, "-o", "suid")
    try:
        other = trusting / program.relative_to(real.mnt)
        done = subprocess.run([other, "-u"], user=ANN, group=ANN, extra_groups=[], capture_output=True, text=True)
        assert done.stdout == "0\n"
    finally:
        real.mendfs("umount", trusting)
        trusting.rmdir()


def test_modes_of_files_and_directories(place: Place) -> None:
    place.add("read-only", 0o444, uid=ANN)
    place.add("none", 0, uid=ANN)
    place.add("unlisted", 0o711, is_directory=True)
    place.add("unlisted/file", 0o644)
    place.add("unentered", 0o744, is_directory=True)
    place.add("unentered/file", 0o644)
    place.add("closed", 0o755, is_directory=True)
    expressions = {
        "os.open('read-only', os.O_RDWR)": "EACCES",
        "os.open('read-only', os.O_RDONLY | os.O_TRUNC)": "EACCES",
        READ.format("read-only"): "content",
        READ.format("none"): "EACCES",
        "os.chmod('none', 0o400)": "None",
        "os.listdir('unlisted')": "EACCES",
        READ.format("unlisted/file"): "content",
        "os.listdir('unentered')": "['file']",
        "os.stat('unentered/file')": "EACCES",
        "os.chdir('unentered')": "EACCES",
        "os.mkdir('closed/new')": "EACCES",
        "os.access('read-only', os.W_OK)": "False",
        "os.access('read-only', os.R_OK)": "True",
        "os.access('unentered', os.X_OK)": "False",
        "os.access('read-only', os.X_OK)": "False",
        "os.truncate('read-only', 0)": "EACCES",
    }
    assert place.tries(*expressions) == list(expressions.values())
    # Root may all of that, but run what nobody may run.
    place.add("program", 0o644).write_bytes(Path("/bin/true").read_bytes())
    assert place.tries(READ.format("none"), WRITE.format("read-only"), "os.execl('program', 'program')", user=0) == [
        "content",
        "None",
        "EACCES",
    ]


def test_owners_and_groups_are_given_away_by_root_alone(place: Place) -> None:
    place.add("mine", 0o644, uid=ANN, gid=ANN)
    place.add("bobs", 0o666, uid=BOB)
    assert place.tries(
        f"os.chown('mine', {BOB}, -1)",
        f"os.chown('mine', -1, {OTHERS})",
        f"os.chown('mine', -1, {STAFF})",
        f"os.chown('mine', {ANN}, {STAFF})",
        f"os.chown('bobs', {ANN}, -1)",
        "os.chmod('bobs', 0o777)",
        groups=[STAFF],
    ) == ["EPERM", "EPERM", "None", "None", "EPERM", "EPERM"]
    assert place.owner("mine") == (ANN, STAFF)


def test_times_are_set_by_owners_and_touched_by_writers(place: Place) -> None:
    place.add("mine", 0o444, uid=ANN)
    place.add("writable", 0o666, uid=BOB)
    place.add("bobs", 0o644, uid=BOB)
    assert place.tries(
        "os.utime('mine', ns=(1, 2))",
        "os.utime('mine')",
        "os.utime('writable')",
        "os.utime('writable', ns=(1, 2))",
        "os.utime('bobs')",
        "os.utime('bobs', ns=(1, 2))",
    ) == ["None", "None", "None", "EPERM", "EACCES", "EPERM"]
    # UTIME_OMIT leaves one of the two as it is.
    before = (place.path / "mine").stat()
    subprocess.run(["touch", "-a", "-d", "@1000000000", place.path / "mine"], check=True)
    after = (place.path / "mine").stat()
    assert (after.st_atime, after.st_mtime_ns) == (1_000_000_000, before.st_mtime_ns)


def test_links_to_other_users_files(place: Place) -> None:
    """The kernel's own rule (fs.protected_hardlinks) holds here too."""
    is_protected = Path("/proc/sys/fs/protected_hardlinks").read_text() == "1\n"
    place.add("bobs", 0o644, uid=BOB)
    place.add("shared", 0o666, uid=BOB)
    assert place.tries("os.link('bobs', 'one')", "os.link('shared', 'two')") == [
        "EPERM" if is_protected else "None",
        "None",
    ]


# --- extended attributes ------------------------------------------------------------------------------------------


def test_attributes_of_users_and_of_root(place: Place) -> None:
    mine = place.add("mine", 0o644, uid=ANN)
    place.add("bobs", 0o644, uid=BOB)
    place.add("hidden", 0o600, uid=BOB)
    (place.path / "link").symlink_to("mine")
    os.setxattr(mine, "trusted.a", b"root's")
    assert place.tries(
        "os.setxattr('mine', 'user.a', b'1')",
        "os.setxattr('bobs', 'user.a', b'1')",
        "os.getxattr('hidden', 'user.a')",
        "os.setxattr('link', 'user.a', b'1', follow_symlinks=False)",
        "os.setxattr('mine', 'trusted.b', b'1')",
        "os.getxattr('mine', 'trusted.a')",
        "os.listxattr('mine')",
        "os.removexattr('mine', 'trusted.a')",
        "os.setxattr('mine', 'nonsense.a', b'1')",
    ) == ["None", "EACCES", "EACCES", "EPERM", "EPERM", "ENODATA", "['user.a']", "EPERM", "ENOTSUP"]
    assert sorted(os.listxattr(mine)) == ["trusted.a", "user.a"]


def test_attributes_have_the_limits_of_linux(place: Place) -> None:
    path = place.add("file", 0o644)
    os.setxattr(path, "user.big", b"x" * 65536)
    assert len(os.getxattr(path, "user.big")) == 65536
    with fails(errno.E2BIG):
        os.setxattr(path, "user.big", b"x" * 65537)
    os.setxattr(path, "user." + "n" * 250, b"")
    with fails(errno.ERANGE):
        os.setxattr(path, "user." + "n" * 251, b"")


def test_acls_and_capabilities_are_refused_quietly(place: Place) -> None:
    """Kept but not enforced would be worse. Programs that copy everything must not complain of what was never there."""
    path = place.add("file", 0o644)
    # User, a named user, group, mask, others: more than a mode could say.
    entries = ((1, 6, -1), (2, 7, BOB), (4, 4, -1), (16, 7, -1), (32, 4, -1))
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    for name in ("system.posix_acl_access", "system.posix_acl_default"):
        for target in (path, place.path)[name.endswith("default") :]:
            with fails(errno.EOPNOTSUPP):
                os.getxattr(target, name)
            with fails(errno.EOPNOTSUPP):
                os.setxattr(target, name, acl)
    assert place.mode("file") == 0o644
    with fails(errno.ENODATA):
        os.getxattr(path, "security.capability")
    with fails(errno.EOPNOTSUPP):
        os.setxattr(path, "security.capability", b"\x00\x00\x00\x02" + bytes(16))
    source = place.add("source", 0o755, uid=ANN, is_directory=True)
    place.add("source/file", 0o640, uid=BOB, gid=STAFF)
    os.setxattr(source / "file", "user.a", b"kept")
    commands: list[list[str | Path]] = [["ls", "-laR", source], ["cp", "-a", source, place.path / "cp"]]
    if Path("/usr/bin/rsync").exists():
        commands.append(["rsync", "-aAX", f"{source}/", place.path / "rsync"])
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), command
    for copy in ("cp", "rsync")[: len(commands) - 1]:
        assert os.getxattr(place.path / copy / "file", "user.a") == b"kept"
        assert (place.owner(f"{copy}/file"), place.mode(f"{copy}/file")) == ((BOB, STAFF), 0o640)


# --- what else programs need --------------------------------------------------------------------------------------


def test_locks_exclude_within_one_mount(place: Place) -> None:
    place.add("file", 0o666)
    out = place.check("""
import fcntl, subprocess
path = root + "/file"
def other(call):
    script = f'''import errno, fcntl
file = open({path!r}, "r+b")
try:
    {call}
    print("got it")
except OSError as error:
    print(errno.errorcode[error.errno])'''
    return subprocess.run(["python3", "-c", script], capture_output=True, text=True, check=True).stdout.strip()
flock = "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)"
posix = "fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 10, {})"
mine = open(path, "r+b")
fcntl.flock(mine, fcntl.LOCK_EX)
print(other(flock))
fcntl.flock(mine, fcntl.LOCK_UN)
print(other(flock))
fcntl.lockf(mine, fcntl.LOCK_EX, 10, 100)
print(other(posix.format(105)), other(posix.format(110)))
mine.close()
print(other(posix.format(105)))
""")
    assert out.split() == ["EAGAIN", "got", "it", "EAGAIN", "got", "it", "got", "it"]


def test_unnamed_files_are_refused_as_programs_expect(place: Place) -> None:
    """They make a named one instead. Any other error would end them."""
    with fails(errno.EOPNOTSUPP):
        os.open(place.path, os.O_TMPFILE | os.O_RDWR)


def test_an_append_only_descriptor_appends_for_an_ordinary_user(place: Place) -> None:
    place.add("log", 0o622, uid=BOB)
    assert place.tries("os.write(os.open('log', os.O_WRONLY | os.O_APPEND), b'!')", READ.format("log")) == [
        "1",
        "EACCES",
    ]
    with opened(place.path / "log", os.O_RDONLY) as fd:
        assert os.read(fd, 100) == b"content!"
