"""The conversation with fusermount3, held with small programs in its place: a real socket, a real descriptor."""

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from mendfs.errors import MendfsError, OperationError, UsageError
from mendfs.fuse import fusermount

PASSES = """
import array, os, socket, sys
assert sys.argv[1:] == ["-o", "ro,fsname=x", "--", "/some where"], sys.argv
assert os.environ["LC_ALL"] == "C" and "LC_MESSAGES" not in os.environ
channel = socket.socket(fileno=int(os.environ["_FUSE_COMMFD"]))
socket.send_fds(channel, [b"\\0"], [os.open("/dev/null", os.O_RDWR)])
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for a fusermount3 of our own, found before the system's."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("LC_MESSAGES", "de_DE.UTF-8")
    return tmp_path / "fusermount3"


def write(program: Path, body: str) -> None:
    program.write_text(f"#!{sys.executable}\n{body}")
    program.chmod(0o755)


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_the_descriptor_comes_back_over_the_socket(program: Path) -> None:
    write(program, PASSES)
    before = open_descriptors()
    fd = fusermount.mount("/some where", "ro,fsname=x")
    try:
        assert stat.S_ISCHR(os.fstat(fd).st_mode)
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
        assert open_descriptors() == before + 1
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("complaint", "said"),
    [
        ("option allow_other only allowed if 'user_allow_other' is set in /etc/fuse.conf", "/etc/fuse.conf"),
        ("user has no write access to mountpoint /m", "not yours"),
        ("mountpoint /m not owned by user", "not yours"),
        ("too many FUSE filesystems mounted; mount_max=N can be set in /etc/fuse.conf", "mount_max"),
        ("mount failed: Operation not permitted", "set-user-id root"),
        ("something new\nin two lines", "something new; in two lines"),
        ("", "it said nothing"),
    ],
)
def test_what_it_complains_of_is_one_line(program: Path, complaint: str, said: str) -> None:
    write(program, f"import sys\nprint('fusermount3: ' + {complaint!r}, file=sys.stderr)\nsys.exit(1)")
    before = open_descriptors()
    with pytest.raises(UsageError) as caught:
        fusermount.mount("/m", "ro")
    assert str(caught.value).startswith("cannot mount at /m: ")
    assert said in str(caught.value) or not complaint
    assert "\n" not in str(caught.value)
    assert open_descriptors() == before


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(fusermount, "MORE_FOLDERS", str(tmp_path))
    with pytest.raises(UsageError, match=r"apt-get install fuse3"):
        fusermount.mount("/m", "ro")


def test_a_program_that_cannot_be_run_is_said(program: Path) -> None:
    program.write_text("#!/no/such/interpreter\n")
    program.chmod(0o755)
    with pytest.raises(UsageError, match="cannot be run"):
        fusermount.mount("/m", "ro")


def test_a_program_that_hangs_is_given_up(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusermount, "TIMEOUT_S", 0.3)
    write(program, "import signal\nsignal.pause()")
    with pytest.raises(UsageError, match="cannot mount"):
        fusermount.mount("/m", "ro")
    with pytest.raises(MendfsError, match="did not end"):
        fusermount.unmount("/m")


@pytest.mark.parametrize(
    ("complaint", "code"),
    [
        ("failed to unmount /m: Device or resource busy", errno.EBUSY),
        ("entry for /m not found in /etc/mtab", errno.EINVAL),
    ],
)
def test_unmounting_says_why_not(program: Path, complaint: str, code: int) -> None:
    write(program, f"import sys\nprint('fusermount3: ' + {complaint!r}, file=sys.stderr)\nsys.exit(1)")
    with pytest.raises(OperationError) as caught:
        fusermount.unmount("/m")
    assert caught.value.errno == code


@pytest.mark.parametrize("detach", [False, True])
def test_unmounting_may_detach(program: Path, detach: bool) -> None:
    write(program, f"import sys\nsys.exit(('-z' in sys.argv) != {detach} or sys.argv[-2:] != ['--', '/m'])")
    fusermount.unmount("/m", detach=detach)
