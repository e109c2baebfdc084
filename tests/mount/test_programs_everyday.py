"""Small programs of every day on the mount, and the ways in which they save, wait, lock and look."""

import os
import shutil
import stat
import subprocess
import threading

import pytest

from tests.mount.programs import PYTHON, Place, as_both_users, as_ordinary_user, lines, need
from tests.real_cluster import needs_mounts, needs_root, until

pytestmark = [needs_mounts, pytest.mark.timeout(600)]


@as_both_users
def test_editors_save_without_leaving_anything_half_done(place: Place) -> None:
    """As vim (a new file, synced, renamed over), as nano (in place), as sed -i, and with a backup."""
    path = place.path / "text"
    place.python(
        """
import os, sys
path = sys.argv[1]
def new_and_rename(content):
    fd = os.open(path + ".swp", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    os.write(fd, content)
    os.fsync(fd)
    os.close(fd)
    os.rename(path + ".swp", path)
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)
def in_place(content):
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
def backup_and_write(content):
    os.link(path, path + "~")
    os.unlink(path)
    with open(path, "wb") as file:
        file.write(content)
    os.unlink(path + "~")
for number in range(20):
    for save in (new_and_rename, in_place, backup_and_write):
        content = (save.__name__ + str(number)).encode() * (number + 1)
        save(content)
        with open(path, "rb") as file:
            assert file.read() == content, (save, number)
        assert os.stat(path).st_size == len(content)
        assert os.listdir(os.path.dirname(path)) == ["text"]
""",
        path,
    )
    place.shell("printf 'one\\ntwo\\nthree\\n' > text; sed -i 's/two/2/' text; sed -i.orig '/three/d' text")
    assert path.read_text() == "one\n2\n" and (place.path / "text.orig").read_text() == "one\n2\nthree\n"


@as_ordinary_user
def test_the_shells_small_programs(place: Place) -> None:
    need("sort", "dd", "install", "truncate")
    out = place.shell(
        """
        seq 60000 | shuf > numbers
        sort -n -S 1M -T . --parallel=2 numbers | cmp - <(seq 60000)      # sorts in pieces in temporary files
        dd if=/dev/zero of=sparse bs=1 count=1 seek=100M status=none
        cp --sparse=always sparse copy
        cmp sparse copy
        test "$(stat -c %s copy)" = 104857601
        test "$(du -k copy | cut -f1)" -lt 1000
        truncate -s 5000 numbers; truncate -s +5000 numbers
        test "$(tail -c 5000 numbers | tr -d '\\0' | wc -c)" = 0
        install -D -m 750 numbers a/b/c/installed
        test "$(stat -c %a a/b/c/installed)" = 750
        f=$(mktemp -p .); d=$(mktemp -d -p .); test "$(stat -c %a $f)$(stat -c %a $d)" = 600700
        mkfifo pipe; (seq 1000 > pipe &) ; test "$(wc -l < pipe)" = 1000
        ln -s a link; test -e link/b/c/installed; readlink -f link
        split -n 7 numbers part.; cat part.* | cmp - numbers
        find . -name 'part.*' -newer a -delete; test -z "$(ls part.* 2>/dev/null)"
        ls -lR . > listing; test "$(grep -c installed listing)" = 1
        for i in $(seq 50); do echo "line $i" >> log; done; test "$(wc -l < log)" = 50
        tee -a log < listing > /dev/null; tail -n 1 log
        touch -d '2001-02-03 04:05:06.789' old; test "$(stat -c %y old | cut -c1-23)" = '2001-02-03 04:05:06.789'
        cp -p old kept; test ! old -nt kept -a ! kept -nt old
        mv kept a/; test ! -e kept; rm -r a link
        """
    )
    assert str(place.path / "a") in out
    assert place.run("df", "--output=fstype,target", place.path).split()[-1] == str(place.cluster.mnt)
    assert int(place.run("stat", "-f", "-c", "%a", place.path)) > 0


def test_tail_follows_a_growing_file(place: Place) -> None:
    log = place.path / "log"
    log.write_text("before\n")
    tail = place.start("tail", "-n", "+1", "-s", "0.1", "-F", log)
    heard: list[str] = []
    assert tail.stdout is not None
    out = tail.stdout
    reader = threading.Thread(target=lambda: heard.extend(iter(out.readline, "")), daemon=True)
    reader.start()
    until(lambda: heard == ["before\n"], within_s=60)
    for number in range(5):
        with log.open("a") as file:
            file.write(f"{number}\n")
        until(lambda: heard[-1] == f"{number}\n", within_s=60)  # noqa: B023
    log.rename(place.path / "log.1")
    log.write_text("after the rotation\n")
    until(lambda: "after the rotation\n" in heard, within_s=60)
    tail.kill()
    reader.join(30)


@as_both_users
def test_locks_keep_processes_of_one_mount_apart(place: Place) -> None:
    need("flock")
    place.shell(
        """
        echo 0 > counter
        add() { for i in $(seq 10); do flock lock sh -c 'echo $(($(cat counter) + 1)) > new; cat new > counter'; done; }
        add & one=$!; add & two=$!; wait $one; wait $two
        test "$(cat counter)" = 20
        (flock 9; exec sleep 60 > /dev/null 2>&1) 9> lock & holder=$!
        while flock -n lock true; do :; done
        flock -w 0.2 lock true && exit 1
        kill $holder; wait $holder || true
        flock -w 30 lock true
        """
    )
    place.python(
        """
import fcntl, os, sys
path = sys.argv[1]
def worker():
    fd = os.open(path, os.O_RDWR)
    for _ in range(50):
        fcntl.lockf(fd, fcntl.LOCK_EX, 8, 0)  # POSIX locks, of a range
        value = int(os.pread(fd, 8, 0))
        os.pwrite(fd, b"%08d" % (value + 1), 0)
        fcntl.lockf(fd, fcntl.LOCK_UN, 8, 0)
with open(path, "wb") as file:
    file.write(b"00000000")
children = []
for _ in range(3):
    if (child := os.fork()) == 0:
        worker()
        os._exit(0)
    children.append(child)
assert all(os.waitpid(child, 0)[1] == 0 for child in children)
with open(path, "rb") as file:
    assert int(file.read()) == 150
""",
        place.path / "ranges",
    )


@as_ordinary_user
def test_pythons_small_databases_keep_what_they_were_given(place: Place) -> None:
    place.python(
        """
import dbm.dumb, os, shelve, sys
folder = sys.argv[1]
for number in range(3):
    with shelve.open(os.path.join(folder, "shelf")) as shelf:
        for key in range(40):
            shelf[str(key)] = {"number": number, "list": list(range(key))}
    with shelve.open(os.path.join(folder, "shelf"), flag="r") as shelf:
        assert len(shelf) == 40 and shelf["39"] == {"number": number, "list": list(range(39))}
    with dbm.dumb.open(os.path.join(folder, "dumb"), "c") as database:
        database[str(number)] = b"x" * 10_000
        assert len(database) == number + 1
""",
        place.path,
    )


def test_files_outlive_their_names_and_directories_their_moves(place: Place) -> None:
    place.python(
        """
import os, subprocess, sys, tempfile
os.chdir(sys.argv[1])
with tempfile.TemporaryFile(dir=".") as file:  # no name at all
    file.write(b"x" * 100_000)
    file.seek(0)
    assert len(file.read()) == 100_000
os.mkdir("a")
os.chdir("a")
with open("kept", "w+") as file:
    os.unlink("kept")
    os.rename("../a", "../b")
    file.write("still here")
    file.flush()
    assert os.pread(file.fileno(), 99, 0) == b"still here"
    assert os.fstat(file.fileno()).st_nlink == 0
    with open("new", "w") as other:  # the working directory has another name now
        other.write("x")
    assert os.listdir("../b") == ["new"] and os.getcwd().endswith("/b")
""",
        place.path,
    )
    assert (place.path / "b" / "new").read_text() == "x"


def test_umount_of_a_mount_in_use_says_so_and_harms_nothing(place: Place) -> None:
    with place.second_mount() as second:
        mountpoint = place.local / "second"
        (second / "file").write_text("x")
        user = place.start("sleep", "60", cwd=second)
        until(lambda: os.readlink(f"/proc/{user.pid}/cwd") == str(second), within_s=60)
        code, _, error = place.cluster.command("umount", mountpoint)
        assert code == 1 and "is in use" in error and len(lines(error)) == 1
        assert (second / "file").read_text() == "x"
        user.kill()
        user.wait()
    assert not os.path.ismount(mountpoint)
    assert (place.path / "file").read_text() == "x"


def test_a_tree_is_watched_through_inotify(place: Place) -> None:
    """Changes made on this mount are told; those of other mounts are not, as on every network file system."""
    script = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.inotify_init1(0)
assert libc.inotify_add_watch(fd, os.fsencode(sys.argv[1]), 0x00000FFF) > 0
path = os.path.join(sys.argv[1], "file")
with open(path, "w") as file:
    file.write("x")
os.rename(path, path + "2")
os.unlink(path + "2")
masks = 0
data = os.read(fd, 1 << 16)
while data:
    _, mask, _, length = struct.unpack_from("iIII", data)
    masks |= mask
    data = data[16 + length :]
# create, modify, closed after writing, moved from and to, deleted
assert masks & 0x100 and masks & 0x2 and masks & 0x8 and masks & 0x40 and masks & 0x80 and masks & 0x200, hex(masks)
"""
    place.python(script, place.path)


@needs_root
def test_set_id_and_special_files_keep_their_kind(place: Place) -> None:
    place.shell("mknod null c 1 3; mkfifo fifo; install -m 4755 /bin/true suid; install -m 2755 -d setgid")
    kinds = {path.name: path.lstat().st_mode for path in place.path.iterdir()}
    assert stat.S_ISCHR(kinds["null"]) and stat.S_ISFIFO(kinds["fifo"])
    assert kinds["suid"] & stat.S_ISUID and kinds["setgid"] & stat.S_ISGID
    copy = place.local / "copy"
    subprocess.run(["cp", "-a", place.path, copy], check=True)
    assert {path.name: path.lstat().st_mode for path in copy.iterdir()} == kinds
    shutil.rmtree(copy)


def test_python_writes_a_million_small_lines(place: Place) -> None:
    """Buffered output of a chatty program, with a reader behind it."""
    place.run(
        PYTHON,
        "-c",
        "import sys\nwith open(sys.argv[1], 'w') as file:\n  for n in range(1000000): file.write(f'{n}\\n')\n"
        "with open(sys.argv[1]) as file: assert sum(map(int, file)) == 499999500000",
        place.path / "lines",
    )
