"""Files without a mount on a real cluster: whole trees in and out, compared with what went in, and with the mount."""

import json
import os
import signal
import stat
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.real_cluster import RealCluster, needs_mounts, until
from tests.terminal import terminal

pytestmark = [needs_mounts, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCluster]:
    """Three servers and a mount, for all tests of this module."""
    cluster = RealCluster(tmp_path_factory.mktemp("files"))
    try:
        cluster.up("--servers", 3)
        yield cluster
    finally:
        cluster.clean_up()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Everything that a tree may have: kinds, names, modes, times, holes, several names for one file."""
    made = tmp_path / "tree"
    made.mkdir()
    source = Path(sysconfig.get_path("stdlib")) / "json"
    for path in [path for path in source.iterdir() if path.is_file()]:
        (made / path.name).write_bytes(path.read_bytes())
    os.link(made / "decoder.py", made / "hard link")
    (made / "sub" / "deeper").mkdir(parents=True)
    os.link(made / "decoder.py", made / "sub" / "another")
    (made / "link").symlink_to("sub/../decoder.py")
    (made / "dangling").symlink_to("nowhere")
    (made / "to directory").symlink_to("sub")
    (made / "empty").touch()
    (made / "empty directory").mkdir(mode=0o700)
    for name in (b"new\nline", b"\xff\xfe bytes", b"\x1b[31mred", "ünï".encode(), b"-l", b".hidden"):
        (made / os.fsdecode(name)).write_bytes(name)
    (made / "read only").write_text("x")
    (made / "read only").chmod(0o444)
    (made / "sticky").mkdir()
    (made / "sticky").chmod(0o1777)
    os.setxattr(made / "empty", "user.colour", b"red")
    os.setxattr(made / "sub", "user.kind", b"directory")
    (made / "big").write_bytes(os.urandom((5 << 20) + 7))
    with (made / "sparse").open("wb") as file:
        file.seek(9 << 20)
        file.write(b"in the middle")
        file.truncate(20 << 20)
    for number, path in enumerate(sorted(made.rglob("*"), reverse=True)):
        os.utime(path, ns=(10**18, 10**18 + 12345 * number), follow_symlinks=False)
    return made


def snapshot(root: Path) -> dict[bytes, Any]:
    """What is kept of a tree: type and mode, times, contents, targets, attributes, which names are one file."""
    found: dict[bytes, Any] = {}
    first: dict[int, bytes] = {}
    for folder, folders, files in os.walk(os.fsencode(root)):
        for name in [b".", *folders, *files]:
            path = os.path.join(folder, name)
            status = os.lstat(path)
            relative = os.path.relpath(path, os.fsencode(root))
            content: object = None
            if stat.S_ISREG(status.st_mode):
                content = Path(os.fsdecode(path)).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                content = os.readlink(path)
            xattrs = {
                each: os.getxattr(path, each, follow_symlinks=False)
                for each in os.listxattr(path, follow_symlinks=False)
            }
            found[relative] = (status.st_mode, status.st_mtime_ns, content, xattrs, status.st_ino)
    for relative in sorted(found):
        *rest, inode = found[relative]
        same = first.setdefault(inode, relative) if stat.S_ISREG(rest[0]) else relative
        found[relative] = (*rest, same)
    return found


def check_refused(cluster: RealCluster, lines: dict[str, str]) -> None:
    """Each of the commands fails, saying one line with these words. In one shell: a process each takes its time."""
    code, out, err = cluster.command("shell", stdin="\n".join(lines).encode())
    said = err.splitlines()
    assert code == 1 and not out and len(said) == len(lines), err
    for number, (line, words) in enumerate(lines.items(), 1):
        assert said[number - 1].startswith(f"mendfs: line {number}: ") and words in said[number - 1], (line, said)


def names(path: Path) -> list[str]:
    return sorted(os.listdir(path))


def test_a_tree_put_and_got_is_the_same_and_so_it_is_on_the_mount(
    three: RealCluster, tree: Path, tmp_path: Path
) -> None:
    expected = snapshot(tree)
    three.mendfs("mkdir", "/round")
    counts = three.json("put", "-r", tree, "/round/copy")
    assert counts["skipped"] == 0 and counts["directories"] == 5
    assert snapshot(three.mnt / "round" / "copy") == expected
    assert three.json("stat", "/round/copy/sparse")["stored"] < 5 << 20  # holes stay holes
    three.mendfs("get", "-r", "/round/copy", tmp_path / "back")
    assert snapshot(tmp_path / "back") == expected
    assert (tmp_path / "back" / "sparse").stat().st_blocks * 512 < 5 << 20

    # Once more, over what is there: the same again, with nothing left beside it.
    (tree / "decoder.py").write_text("changed")
    (tree / "link").unlink()
    (tree / "link").symlink_to("empty")
    expected = snapshot(tree)
    three.mendfs("put", "-r", f"{tree}/", "/round/copy/..")  # into a directory: under its own name
    assert snapshot(three.mnt / "round" / "tree") == expected
    three.mendfs("mv", "/round/copy", "/round/old")
    three.mendfs("put", "-r", tree, three.mnt / "round" / "tree" / ".." / ".." / "round")
    assert snapshot(three.mnt / "round" / "tree") == expected
    three.mendfs("get", "-r", "/round/tree", tmp_path / "back")
    assert snapshot(tmp_path / "back" / "tree") == expected
    three.mendfs("rm", "-r", "/round")
    assert "round" not in names(three.mnt)


def test_what_is_left_out_is_said_and_the_command_fails(three: RealCluster, tmp_path: Path) -> None:
    source = tmp_path / "odd"
    (source / "clash").mkdir(parents=True)
    (source / "clash" / "inside").touch()
    (source / "other").write_text("file")
    (source / "good").write_text("good")
    os.mkfifo(source / "fifo")
    three.mendfs("shell", stdin=b"mkdir -p /odd/odd/other\ncreate /odd/odd/clash")
    code, out, err = three.command("put", "-r", source, "/odd")
    lines = err.splitlines()
    assert code == 1 and not out and len(lines) == 3, err
    for path in ("fifo", "clash", "other"):
        assert any(f"odd/{path}" in line for line in lines), (path, lines)
    assert names(three.mnt / "odd" / "odd") == ["clash", "good", "other"]

    os.mkfifo(three.mnt / "odd" / "odd" / "pipe")
    target = tmp_path / "target"
    (target / "odd" / "good").mkdir(parents=True)
    code, out, err = three.command("get", "-r", "/odd/odd", target, "--json")
    assert code == 1 and json.loads(out)["skipped"] == 2, err
    assert "/odd/odd/pipe is a fifo: not copied" in err and "/odd/odd/good" in err
    assert names(target / "odd") == ["clash", "good", "other"]

    refused: dict[str, str] = {
        f"put {source} /odd": "put -r",
        f"get /odd {target}": "get -r",
        f"put {source}/good /nowhere/x": "/nowhere/x: No such file or directory",
        f"put {source}/good /odd/none/": "/odd/none",
        f"put {source}/none /odd": "none: No such file or directory",
        f"get /odd/none {target}": "/odd/none: No such file or directory",
        f"get /odd/odd/good {target}/none/x": "No such file or directory",
        f"get -r /odd {three.mnt}/odd/into": "into itself",
        f"put -r {three.mnt}/odd /odd/into": "into itself",
        f"put {source}/fifo /odd": "no regular file",
    }
    check_refused(three, refused)
    assert "into" not in names(three.mnt / "odd")
    three.mendfs("rm", "-r", "/odd")


def test_a_path_below_a_mount_of_another_volume_is_refused(three: RealCluster, tmp_path: Path) -> None:
    """`rm` of a file below a mount once removed the file of that name in the volume that --dir named."""
    (tmp_path / "other").mkdir()
    other = RealCluster(tmp_path / "other")
    try:
        other.up("--servers", 1)
        for cluster in (three, other):
            cluster.mendfs("write", "/same", str(cluster.dir))
        code, out, err = three.command("rm", other.mnt / "same")
        assert (code, out) == (2, "") and "another volume" in err and err.count("\n") == 1
        assert (three.mnt / "same").read_text() == str(three.dir)
        three.mendfs("put", other.mnt / "same", three.mnt / "copy")
        assert (three.mnt / "copy").read_text() == str(other.dir)
        assert b"mendfs" not in b"".join(map(os.fsencode, os.listxattr(three.mnt)))
        three.mendfs("rm", three.mnt / "same", "/copy")
        assert sorted(os.listdir(three.mnt)) == [] and os.listdir(other.mnt) == ["same"]
    finally:
        other.clean_up()


def test_a_full_disk_here_ends_the_copy_with_one_line_and_no_half_file(three: RealCluster, tmp_path: Path) -> None:
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    three.mendfs("write", "/too big", stdin=bytes(range(256)) * 8192)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tiny)], check=True)
    try:
        code, out, err = three.command("get", "/too big", tiny)
        assert (code, out, err) == (1, "", f"mendfs: {tiny}/too big: No space left on device\n")
        assert names(tiny) == []
    finally:
        subprocess.run(["umount", str(tiny)], check=True)
    three.mendfs("rm", "/too big")


def test_one_file_goes_where_cp_would_put_it(three: RealCluster, tmp_path: Path) -> None:
    source = tmp_path / "one"
    source.write_text("one")
    source.chmod(0o4750)
    os.chown(source, 12345, 12345)  # a copy that is ours must not run as us because somebody else's did
    script = f"mkdir /single\nput {source} /single\nput {source} {source} /single/"
    three.mendfs("shell", stdin=script.encode())
    assert (three.mnt / "single" / "one").stat().st_mode == stat.S_IFREG | 0o750
    assert (three.mnt / "single" / "one").stat().st_uid == os.getuid()
    (three.mnt / "single" / "link").symlink_to("one")
    source.write_text("two")
    three.mendfs("put", source, "/single/link")
    assert (three.mnt / "single" / "link").is_symlink() and (three.mnt / "single" / "one").read_text() == "two"
    three.mendfs("get", "/single/link", tmp_path / "got")
    assert (tmp_path / "got").read_text() == "two" and not (tmp_path / "got").is_symlink()
    (tmp_path / "local link").symlink_to("got")
    three.mendfs("write", "/single/one", "three")
    three.mendfs("get", "/single/one", tmp_path / "local link")
    assert (tmp_path / "got").read_text() == "three" and (tmp_path / "local link").is_symlink()
    three.mendfs("get", "/single/one", "/dev/null")  # a device stays a device
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert three.mendfs("get", "/single/one", "/dev/stdout") == "three"
    three.mendfs("rm", "-r", "/single")


@pytest.mark.seed("B5")
def test_small_commands_say_what_they_found(three: RealCluster) -> None:
    three.mendfs("shell", stdin=b"mkdir -p /small/dir/deep\ncreate /small/made --size 5MiB --mode 0640")
    three.mendfs("write", "/small/.dot", stdin=b"from standard input")
    assert three.mendfs("cat", "/small/.dot", three.mnt / "small" / ".dot") == 2 * "from standard input"
    script = b"""cd small
read .dot --offset 5 --length 8
ls
ls -a .
tree -L 1
du -sh
ls -l made
df -h
status
servers
contents 1
where .dot"""
    text = three.mendfs("shell", stdin=script)
    assert text.startswith("standarddir\nmade\n.dot\ndir\nmade\n.\n├── .dot\n")
    assert "1 directory, 2 files\n19B\t.\n-rw-r----- 1 " in text
    for words in ("5242880", "each byte is stored 3 times", "health whole", "partition", "/small/.dot: inode"):
        assert words in text, words
    assert [entry["name"] for entry in three.json("ls", "/small")] == [".dot", "dir", "made"]
    assert {each["path"] for each in three.json("du", "/small")} == {"/small", "/small/dir", "/small/dir/deep"}
    space = three.json("df")
    assert space["replicas"] == 3 and len(space["servers"]) == 3
    assert space["total"] == space["used"] + space["available"] and space["available"] > 0
    check_refused(
        three,
        {
            "create /small/made": "/small/made: File exists",
            "create /small/x --mode 999": "no mode",
            "create /small/x --size much": "no size",
            "write /small/x t --offset 1 --append": "exclude",
            "ls ''": "empty path",
            "ls /" + "x/" * 3000: "too long",
            "mkdir /" + "n" * 300: "too long",
            "stat /small/made/": "Not a directory",
            "rm /small/dir": "rm -r",
            "rm -r /": "--whole-volume",
            "rm -r .": "--whole-volume",
            "cat /small/new\x1b[31m": "/small/new\\x1b[31m: No such file",
            "du --nosuch": '"du --help"',
        },
    )
    for arguments, exit_code, words in (
        (("ls", "small"), 2, "not below a mount"),
        (("cat", "/small/new\nline\x1b[31m"), 1, "/small/new\\x0aline\\x1b[31m: No such file"),
        (("du", "--nosuch"), 2, '"mendfs du --help"'),
    ):
        code, out, err = three.command(*arguments)
        assert (code, out) == (exit_code, "") and words in err and err.count("\n") == 1, (arguments, err)
    three.mendfs("rm", "-r", "/small")


def test_an_interrupted_put_leaves_nothing_half_done_and_ends_soon(three: RealCluster, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    piece = os.urandom(1 << 20)
    for number in range(4):
        with (source / f"big{number}").open("wb") as file:
            for _ in range(48):
                file.write(piece)
    environment = {**os.environ, "MENDFS_DIR": str(three.dir)}
    command = [sys.executable, "-m", "mendfs.cli.main", "put", "-r", str(source), "/interrupted"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)
    there = three.mnt / "interrupted"
    until(lambda: there.exists() and any(name.startswith(".mendfs-put-") for name in os.listdir(there)), within_s=60)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in err
    for name in names(there):
        assert (there / name).read_bytes() == (source / name).read_bytes(), name
    three.mendfs("rm", "-r", "/interrupted")


def test_a_long_transfer_shows_how_far_it_is_and_only_on_a_terminal(three: RealCluster, tmp_path: Path) -> None:
    with (tmp_path / "long").open("wb") as file:
        file.truncate(1 << 30)
        for at in range(0, 1 << 30, 4 << 20):
            file.seek(at)
            file.write(b"data in every block keeps it from being one hole")
    environment = {**os.environ, "MENDFS_DIR": str(three.dir)}
    program = ("-m", "mendfs.cli.main", "put", tmp_path / "long", "/long")
    with terminal(*program, env=environment, cwd=tmp_path) as screen:
        screen.expect("%")
        screen.expect(" of 1.0GiB")
        screen.expect("iB/s")
        screen.type("\x03")
        assert screen.wait(60) == 130
        assert "Traceback" not in screen.text
    assert not (three.mnt / "long").exists()
