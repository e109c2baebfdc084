"""Mounting and unmounting by an ordinary user, through fusermount3: a small set-user-id program of Debian's fuse3.

It mounts if the user may do so, and passes the device's descriptor back over the socket whose number is in
_FUSE_COMMFD. What it complains of on standard error becomes one line that says what to do.
"""

import errno
import os
import shutil
import socket
import subprocess

from mendfs.errors import MendfsError, OperationError, UsageError

PROGRAM = "fusermount3"
MORE_FOLDERS = "/bin:/usr/bin:/usr/local/bin"
"""Searched after PATH, which services often set to next to nothing."""
TIMEOUT_S = 30.0
"""It does a few system calls; longer means that the mount point's own file system hangs."""

_REMEDIES = (
    (
        "user_allow_other",
        "-o allow_other is for root, unless root has put a line user_allow_other into /etc/fuse.conf",
    ),
    ("no write access to mountpoint", "the mount point is not yours: mount at a directory that you own"),
    ("not owned by user", "the mount point is not yours: mount at a directory that you own"),
    ("too many FUSE filesystems", "there are more FUSE mounts than mount_max in /etc/fuse.conf allows"),
    (
        "mount failed: Operation not permitted",
        f"{PROGRAM} may not mount: it must be set-user-id root (reinstall fuse3), and nothing may forbid that here "
        "(a container, or no_new_privs)",
    ),
)
"""What it says -> what we say."""


def find_program() -> str:
    """The path of fusermount3. Raises UsageError, naming the package."""
    path = shutil.which(PROGRAM) or shutil.which(PROGRAM, path=MORE_FOLDERS)
    if path is None:
        raise UsageError(
            f"{PROGRAM} is not installed, and only root can mount without it: install it as root "
            f"(apt-get install fuse3), or mount as root"
        )
    return path


def _start(arguments: list[str], ours: socket.socket | None = None) -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LC_")} | {"LC_ALL": "C"}
    if ours is not None:
        environment["_FUSE_COMMFD"] = str(ours.fileno())
    try:
        return subprocess.Popen(
            [find_program(), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            cwd="/",
            pass_fds=() if ours is None else (ours.fileno(),),
        )
    except OSError as error:
        raise UsageError(f"{PROGRAM} cannot be run ({error.strerror}): reinstall fuse3, or mount as root") from None


def _complaint(process: "subprocess.Popen[str]") -> str:
    """Wait for its end; what it said, without its name."""
    try:
        _, text = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return f"{PROGRAM} did not end within {TIMEOUT_S:.0f} s"
    return "; ".join(line.removeprefix(f"{PROGRAM}: ") for line in text.splitlines())


def mount(mountpoint: str, words: str) -> int:
    """Mount with these options; returns the device's descriptor, non-blocking. Raises UsageError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    fds: list[int] = []
    with ours, theirs:
        process = _start(["-o", words, "--", mountpoint], theirs)
        # Ours is the last end but its own: when it ends without a descriptor, reading ends too.
        theirs.close()
        ours.settimeout(TIMEOUT_S)
        try:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
        except TimeoutError:
            process.kill()
        finally:
            complaint = _complaint(process)
    if not fds:
        remedy = next((said for part, said in _REMEDIES if part in complaint), complaint or "it said nothing")
        raise UsageError(f"cannot mount at {mountpoint}: {remedy}")
    os.set_blocking(fds[0], False)
    os.set_inheritable(fds[0], False)
    return fds[0]


def unmount(mountpoint: str, *, detach: bool = False) -> None:
    """Unmount what this user has mounted. Raises OperationError (EBUSY) when it is in use, EPERM when it is not theirs.

    With `detach` the name is gone at once, even if files are still open below it.
    """
    process = _start(["-u", *(["-z"] if detach else []), "--", mountpoint])
    complaint = _complaint(process)
    if process.returncode == 0:
        return
    if "busy" in complaint:
        raise OperationError(errno.EBUSY, f"cannot unmount {mountpoint}")
    if "not found in" in complaint:
        raise OperationError(errno.EINVAL, f"cannot unmount {mountpoint}")
    raise MendfsError(f"cannot unmount {mountpoint}: {complaint or 'fusermount3 did not say why'}")
