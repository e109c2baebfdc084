"""The main job on real processes and real input: trees copied in, compared, and still there after whatever happens.

MENDFS_WHOLE_TREE=1 takes all of the machine's Python and a file of 1 GiB instead of a part of each.
"""

import contextlib
import hashlib
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from tests.real_cluster import RealCluster, needs_mounts, until

pytestmark = [needs_mounts, pytest.mark.timeout(1200)]

IS_WHOLE = bool(os.environ.get("MENDFS_WHOLE_TREE"))
FILE_MIB = 1024 if IS_WHOLE else 64
PACKAGES = ["asyncio", "json", "logging"]


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A part of the machine's own Python, which nobody changes meanwhile, with a few things it does not have."""
    # The machine's own Python; one that runs in a virtual environment may have gigabytes of packages below it.
    library = next(iter(sorted(Path("/usr/lib").glob("python3.[0-9]*"))), Path(sysconfig.get_path("stdlib")))
    made = tmp_path / "tree"
    made.mkdir()
    everything = sorted(set(os.listdir(library)) - {"site-packages", "dist-packages"})
    for name in everything if IS_WHOLE else PACKAGES:
        run("cp", "-a", library / name, made / name)
    (made / "link").symlink_to("asyncio/base_events.py")
    (made / "dangling").symlink_to("nowhere")
    os.link(made / "asyncio" / "events.py", made / "hard link")
    (made / "empty").touch()
    (made / "ünïcode \n name").write_text("x")
    (made / "read only").write_text("x")
    (made / "read only").chmod(0o444)
    return made


def digests(root: Path) -> dict[str, tuple[int, int, str]]:
    """Mode, modification time and checksum of every regular file."""
    found = {}
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            name = str(path.relative_to(root))
            found[name] = (status.st_mode, status.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
    return found


@pytest.mark.seed("A2", "C6", "D1")
def test_a_tree_copied_in_is_the_same_after_a_restart_and_after_everything_was_killed(
    cluster: RealCluster, tree: Path
) -> None:
    cluster.up()
    copy = cluster.mnt / "copy"
    run("cp", "-a", tree, copy)
    expected = digests(tree)
    run("diff", "-r", "--no-dereference", tree, copy)
    assert digests(copy) == expected
    os.mkfifo(cluster.mnt / "fifo")

    cluster.down()
    assert not cluster.is_mounted()
    cluster.up()
    run("diff", "-r", "--no-dereference", tree, copy)

    run("sync")
    cluster.kill_everything()
    cluster.up()  # over the dead mount that is left
    cluster.drop_caches()
    assert digests(copy) == expected
    assert (copy / "hard link").stat().st_ino == (copy / "asyncio" / "events.py").stat().st_ino
    assert os.readlink(copy / "dangling") == "nowhere"
    assert (cluster.mnt / "fifo").is_fifo()


def test_a_file_written_with_dd_reads_back_equal_from_a_second_mount(cluster: RealCluster, tmp_path: Path) -> None:
    cluster.up()
    source, second = tmp_path / "random", tmp_path / "second"
    second.mkdir()
    run("dd", "if=/dev/urandom", f"of={source}", "bs=1M", f"count={FILE_MIB}")
    run("dd", f"if={source}", f"of={cluster.mnt}/file", "bs=1M", "conv=fsync")
    cluster.mendfs("mount", second)
    try:
        cluster.drop_caches()
        run("cmp", source, second / "file")
        run("cmp", source, cluster.mnt / "file")
    finally:
        cluster.mendfs("umount", second)
    assert not os.path.ismount(second)


@pytest.mark.seed("C3", "C5", "C10.3", "C11")
def test_every_block_is_on_three_servers_in_a_ring_and_reads_with_any_two_dead(cluster: RealCluster) -> None:
    cluster.up("--block-size", "64KiB")
    content = os.urandom(8 * 65536 + 1000)
    (cluster.mnt / "file").write_bytes(content)
    os.sync()
    where = cluster.json("where", cluster.mnt / "file")
    assert where["size"] == len(content) and where["block_size"] == 65536
    firsts = []
    for slot in where["slots"]:
        (extent,) = slot["extents"]
        servers = [replica["server"] for replica in extent["replicas"]]
        assert servers == [(servers[0] + k) % 4 for k in range(3)]
        assert {replica["state"] for replica in extent["replicas"]} == {"ok"}
        firsts.append(servers[0])
    assert firsts == [(firsts[0] + at) % 4 for at in range(9)]
    blocks = [block for server in range(4) for block in cluster.json("contents", server)]
    assert len(blocks) == 27 and all(block["ok"] for block in blocks)
    assert {block["replica"] for block in blocks} == {0, 1, 2}

    # Stopped, not killed: nobody starts them again, and they answer nothing.
    supervisor = cluster.pid("supervisor")
    os.kill(supervisor, 19)
    try:
        cluster.kill("data-0")
        cluster.drop_caches()
        assert (cluster.mnt / "file").read_bytes() == content
        cluster.kill("data-2")
        cluster.drop_caches()
        assert (cluster.mnt / "file").read_bytes() == content
    finally:
        os.kill(supervisor, 18)
    cluster.wait_all_up()


def test_a_killed_mount_comes_back_by_itself(cluster: RealCluster) -> None:
    cluster.up()
    (cluster.mnt / "file").write_text("before")
    cluster.kill("mount")
    until(cluster.is_mounted, within_s=60)
    assert (cluster.mnt / "file").read_text() == "before"


def test_an_unmounted_mount_stays_unmounted_while_the_servers_go_on(cluster: RealCluster) -> None:
    cluster.up()
    (cluster.mnt / "file").write_text("before")
    cluster.mendfs("umount", cluster.mnt)
    until(lambda: not cluster.record().mount, within_s=60)
    assert not cluster.is_mounted()
    assert cluster.mendfs("cat", "/file") == "before"
    assert set(cluster.server_states()) == {"up"}


def test_a_killed_supervisor_leaves_nothing_that_the_next_up_stumbles_over(cluster: RealCluster) -> None:
    cluster.up()
    (cluster.mnt / "file").write_text("before")
    old = {child.process.pid for child in cluster.record().children}
    cluster.kill_supervisor()
    assert (cluster.mnt / "file").read_text() == "before"  # people go on working
    cluster.up()
    assert (cluster.mnt / "file").read_text() == "before"
    assert not old & {child.process.pid for child in cluster.record().children}
    cluster.kill_supervisor()
    cluster.down()
    assert not cluster.is_mounted()


@pytest.mark.seed("B4", "C12")
def test_files_without_a_mount(cluster: RealCluster, tmp_path: Path) -> None:
    cluster.mendfs("up", "--detach")
    cluster.mendfs("mkdir", "-p", "/a/b")
    cluster.mendfs("write", "/a/b/text", "hello")
    cluster.mendfs("write", "/a/b/text", "--append", stdin=b" world")
    cluster.mendfs("write", "/a/b/text", "--offset", "0", "J")
    assert cluster.mendfs("cat", "/a/b/text") == "Jello world"
    cluster.mendfs("write", "/a/b/text", "--offset", "13", "end")
    assert cluster.mendfs("cat", "/a/b/text") == "Jello world\0\0end"
    source, back = tmp_path / "source", tmp_path / "back"
    source.write_bytes(os.urandom(5_000_000))
    cluster.mendfs("put", source, "/a")
    cluster.mendfs("get", "/a/source", back)
    assert back.read_bytes() == source.read_bytes()
    cluster.mendfs("mv", "/a/source", "/a/b/moved")
    assert cluster.mendfs("ls", "/a/b").split() == ["moved", "text"]
    assert cluster.json("stat", "/a/b/moved")["size"] == 5_000_000
    assert "-rw-r--r--" in cluster.mendfs("ls", "-l", "/a/b")
    code, _, err = cluster.command("rm", "/a")
    assert code == 1 and "-r" in err
    cluster.mendfs("rm", "-r", "/a")
    assert cluster.mendfs("ls", "/") == ""


def test_down_flushes_and_ends_the_mounts_session(cluster: RealCluster) -> None:
    """A child that thought it was not ready yet gave up at once when it was asked to stop."""
    cluster.up("--servers", "3")
    fd = os.open(cluster.mnt / "file", os.O_WRONLY | os.O_CREAT)
    os.write(fd, b"not closed, not synced")
    cluster.down()
    with contextlib.suppress(OSError):
        os.close(fd)  # its mount is gone
    lines = (cluster.dir / "logs" / "meta.log").read_text().splitlines()
    for event in ("session opened", "session ended"):
        assert sum(event in line and str(cluster.mnt) in line for line in lines) == 1, event
    cluster.up()
    assert (cluster.mnt / "file").read_bytes() == b"not closed, not synced"
