"""Mounts of ordinary users, through fusermount3: everything that root can do with a cluster of their own."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mendfs.fuse import device
from tests.ordinary_user import OrdinaryUser, UsersCluster, ordinary_user
from tests.real_cluster import PROCESSES, RealCluster, until


@pytest.fixture(scope="module")
def user() -> Iterator[OrdinaryUser]:
    """An ordinary user."""
    with ordinary_user() as made:
        yield made


@pytest.fixture(scope="module")
def theirs(user: OrdinaryUser) -> Iterator[UsersCluster]:
    """A cluster of theirs that stays up; what a test mounts it unmounts."""
    cluster = UsersCluster(user.folder("shared"), user)
    try:
        cluster.up("--servers", 3)
        yield cluster
    finally:
        cluster.clean_up()


@contextlib.contextmanager
def mounted(cluster: UsersCluster, path: Path, *options: str) -> Iterator[Path]:
    """One more mount of the same volume."""
    cluster.mendfs("mount", path, *options)
    try:
        yield path
    finally:
        cluster.mendfs("umount", path)
        assert device.find_mount(str(path)) is None


def refused(cluster: UsersCluster, *arguments: object) -> str:
    """The one line of a command that must fail."""
    code, _, err = cluster.command(*arguments)
    assert code == 2, err
    assert str(err).count("\n") == 1, err
    return str(err)


def mount_process(cluster: UsersCluster, path: Path) -> int:
    """The process that serves a mount: of all of the user's the one that has this path in its options."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"mendfs.cluster.child" in words and os.stat(f"/proc/{pid}").st_uid == cluster.user.uid:
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    log = os.readlink(f"/proc/{pid}/fd/{fd}")
                    if log.endswith(f"mount-{str(path).strip('/').replace('/', '-')}.log"):
                        return int(pid)
    raise AssertionError(f"no process serves {path}")


def test_up_mounts_and_down_leaves_nothing(user: OrdinaryUser) -> None:
    """The root directory is theirs, so is what they make; nobody else, not even root, looks into their mount."""
    cluster = UsersCluster(user.folder("own"), user)
    try:
        cluster.up("--servers", 3)
        entry = device.find_mount(str(cluster.mnt))
        assert entry is not None
        assert entry.owner == user.uid
        user.check(
            "sh", "-c", f"mkdir {cluster.mnt}/d && echo hello > {cluster.mnt}/d/file && sync {cluster.mnt}/d/file"
        )
        assert user.check("stat", "-c", "%u %g %a", cluster.mnt, f"{cluster.mnt}/d/file").splitlines() == [
            f"{user.uid} {user.gid} 755",
            f"{user.uid} {user.gid} 644",
        ]
        if user.is_switched:
            with pytest.raises(PermissionError):
                os.listdir(cluster.mnt)
        cluster.down()
        assert device.find_mount(str(cluster.mnt)) is None
        assert os.listdir(cluster.mnt) == []
        cluster.up()
        assert user.check("cat", f"{cluster.mnt}/d/file") == "hello\n"
        cluster.down()
        secrets = [path for path in cluster.dir.rglob("*") if path.stat().st_mode & 0o077]
        assert not secrets or not cluster.dir.stat().st_mode & 0o077
    finally:
        cluster.clean_up()


def test_a_second_mount_sees_the_same_files(theirs: UsersCluster, user: OrdinaryUser) -> None:
    user.check("sh", "-c", f"echo one > {theirs.mnt}/seen")
    with mounted(theirs, user.folder("second")) as second:
        assert user.check("cat", second / "seen") == "one\n"
        user.check("sh", "-c", f"echo two >> {second}/seen")
    assert user.check("cat", theirs.mnt / "seen") == "one\ntwo\n"


def test_a_busy_mount_is_not_taken_from_its_user(theirs: UsersCluster, user: OrdinaryUser) -> None:
    path = user.folder("busy")
    with mounted(theirs, path):
        holder = subprocess.Popen(
            ["sh", "-c", f"cd {path} && echo here && read line"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            user=user.uid if user.is_switched else None,
            group=user.gid if user.is_switched else None,
        )
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"here\n"
            code, _, err = theirs.command("umount", path)
            assert (code, "is in use" in err) == (1, True), err
        finally:
            holder.communicate()


def test_a_mount_whose_process_died_is_cleaned(theirs: UsersCluster, user: OrdinaryUser) -> None:
    """By `umount`, also while somebody stands in it, and by the next `mount`."""
    path = user.folder("dies")
    for way in ("umount", "umount while in use", "mount"):
        theirs.mendfs("mount", path)
        holder = subprocess.Popen(
            ["sh", "-c", f"{'cd ' + str(path) + ' &&' if 'use' in way else ''} echo here && read line"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            user=user.uid if user.is_switched else None,
            group=user.gid if user.is_switched else None,
        )
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"here\n"
        os.kill(mount_process(theirs, path), signal.SIGKILL)
        until(lambda: b"not connected" in user.run(["ls", path]).stderr, within_s=60)
        if way == "mount":
            theirs.mendfs("mount", path)
            user.check("ls", path)
            theirs.mendfs("umount", path)
        else:
            theirs.mendfs("umount", path)
        assert device.find_mount(str(path)) is None, way
        holder.communicate()


def test_the_supervisor_mounts_again_what_was_killed(theirs: UsersCluster, user: OrdinaryUser) -> None:
    before = theirs.pid("mount")
    theirs.kill("mount")
    until(lambda: theirs.pid("mount") != before and theirs.process("mount"), within_s=60)
    # The bare folder can be listed too, for the moment between the dead mount and the new one.
    until(lambda: user.run(["ls", theirs.mnt]).returncode == 0 and device.find_mount(str(theirs.mnt)), within_s=60)
    process = theirs.process("mount")
    assert process is not None
    assert PROCESSES.identity(process.pid) == process


def test_read_only_mounts_refuse_every_change(theirs: UsersCluster, user: OrdinaryUser) -> None:
    user.check("sh", "-c", f"cd {theirs.mnt} && mkdir -p ro/d && echo x > ro/file")
    script = """
import errno, os, sys
os.chdir(sys.argv[1] + "/ro")
changes = {
    "create": lambda: os.open("new", os.O_WRONLY | os.O_CREAT),
    "open": lambda: os.open("file", os.O_RDWR),
    "truncate": lambda: os.truncate("file", 0),
    "mkdir": lambda: os.mkdir("new"),
    "mknod": lambda: os.mkfifo("new"),
    "symlink": lambda: os.symlink("file", "new"),
    "link": lambda: os.link("file", "new"),
    "rename": lambda: os.rename("file", "new"),
    "unlink": lambda: os.unlink("file"),
    "rmdir": lambda: os.rmdir("d"),
    "chmod": lambda: os.chmod("file", 0o600),
    "chown": lambda: os.chown("file", -1, os.getgid()),
    "utime": lambda: os.utime("file"),
    "setxattr": lambda: os.setxattr("file", "user.a", b"1"),
    "removexattr": lambda: os.removexattr("file", "user.a"),
}
for name, change in changes.items():
    try:
        change()
        print(name, "was done")
    except OSError as error:
        if error.errno != errno.EROFS:
            print(name, errno.errorcode[error.errno])
print(open("file").read(), sorted(os.listdir(".")), os.access("file", os.W_OK))
"""
    path = user.folder("read-only")
    for options in (("-o", "ro"), ("-o", "rw", "--read-only")):
        with mounted(theirs, path, *options):
            assert user.check(user.python, "-c", script, path) == "x\n ['d', 'file'] False\n"


def test_options_reach_the_kernel(theirs: UsersCluster, user: OrdinaryUser) -> None:
    path = user.folder("options")
    user.check("sh", "-c", f"cp /bin/true {theirs.mnt}/program && {theirs.mnt}/program")
    with mounted(theirs, path, "-o", "noexec,noatime", "-o", "fsname=a name"):
        assert b"Permission denied" in user.run(["sh", "-c", path / "program"]).stderr
        line = next(line for line in Path("/proc/mounts").read_text().splitlines() if str(path) in line)
        assert line.startswith(f"a\\040name {path} fuse.mendfs rw,nosuid,nodev,noexec,noatime,user_id={user.uid}")


def test_what_cannot_be_mounted_is_said_in_one_line(theirs: UsersCluster, user: OrdinaryUser) -> None:
    path = user.folder("refused")
    assert "mount option 'bogus' is unknown" in refused(theirs, "mount", path, "-o", "ro,bogus")
    assert "mount option 'suid' is for root" in refused(theirs, "mount", path, "-o", "suid")
    assert "mount option 'bogus' is unknown" in refused(theirs, "up", "--mount", path, "-o", "bogus", "--detach")
    assert "does not exist" in refused(theirs, "mount", path / "none")
    assert "is not a mendfs mount" in refused(theirs, "umount", path)
    if user.is_switched:
        foreign = user.home / "foreign"
        foreign.mkdir()
        assert f"mount point {foreign} is not yours" in refused(theirs, "mount", foreign)
        assert "mount point /tmp is not" in refused(theirs, "mount", "/tmp")
        secret = user.home / "secret"
        secret.write_text("0" * 32)
        secret.chmod(0o600)
        record = theirs.record()
        assert "only its owner may" in refused(theirs, "mount", path, "--meta", record.meta, "--secret-file", secret)
    if "\nuser_allow_other" not in Path("/etc/fuse.conf").read_text():
        assert "user_allow_other into /etc/fuse.conf" in refused(theirs, "mount", path, "-o", "allow_other")
    assert device.find_mount(str(path)) is None


def test_a_mount_of_another_user_is_left_to_them(theirs: UsersCluster, user: OrdinaryUser) -> None:
    if not user.is_switched:
        pytest.skip("only root can be two ordinary users")
    done = subprocess.run(
        [user.home / "bin" / "mendfs", "umount", theirs.mnt],
        user=4242,
        group=4242,
        extra_groups=[],
        env=user.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == f"mendfs: {theirs.mnt} was mounted by user {user.uid}: only they and root may unmount it\n"
    done = subprocess.run(
        [user.home / "bin" / "mendfs", "status", "--dir", theirs.dir],
        user=4242,
        group=4242,
        extra_groups=[],
        env=user.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "the cluster is another user's" in done.stderr


def test_other_users_are_let_in_where_the_system_allows_it(theirs: UsersCluster, user: OrdinaryUser) -> None:
    """In a mount namespace of its own, where /etc/fuse.conf says so: this machine's stays as it is."""
    if not user.is_switched:
        pytest.skip("needs root to write an /etc/fuse.conf for the test")
    conf = user.home / "fuse.conf"
    conf.write_text("user_allow_other\n")
    path = user.folder("for-all")
    become = f"setpriv --clear-groups --reuid {user.uid} --regid {user.gid}"
    other = "setpriv --clear-groups --reuid 4242 --regid 4242"
    script = f"""
set -e
mount --bind {conf} /etc/fuse.conf
{become} {user.home}/bin/mendfs mount {path} --dir {theirs.dir} -o allow_other
{become} sh -c 'umask 077; echo open > {path}/open; chmod 644 {path}/open; echo closed > {path}/closed'
{other} cat {path}/open
{other} cat {path}/closed 2>&1 || true
{other} touch {path}/new 2>&1 || true
cat {path}/closed
{become} {user.home}/bin/mendfs umount {path}
"""
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script], capture_output=True, text=True, env=user.environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert (lines[0], lines[3]) == ("open", "closed")  # root may read everything, once it is let in
    assert "Permission denied" in lines[1]
    assert "Permission denied" in lines[2]


def test_root_may_stop_and_clean_up_what_a_user_runs(user: OrdinaryUser) -> None:
    """And leaves them their files: they go on with the next `up`. Not even root may look into their mount."""
    if not user.is_switched:
        pytest.skip("needs root")
    cluster = UsersCluster(user.folder("stopped"), user)
    try:
        cluster.up("--servers", 3)
        user.check("sh", "-c", f"echo kept > {cluster.mnt}/file")
        for is_killed in (False, True):
            if is_killed:
                cluster.kill_everything()
            code, _, err = RealCluster.command(cluster, "down")
            assert (code, err) == (0, "")
            assert device.find_mount(str(cluster.mnt)) is None
            cluster.up()
            assert user.check("cat", f"{cluster.mnt}/file") == "kept\n"
    finally:
        cluster.clean_up()
