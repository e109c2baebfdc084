"""Programs that copy trees: rsync, tar, cp, zip. What arrives is what was sent, and nothing is sent twice."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.mount.programs import PYTHON, Place, as_both_users, digests, lines, need, system_library
from tests.real_cluster import needs_mounts, needs_root

pytestmark = [needs_mounts, pytest.mark.timeout(600)]

PACKAGES = ("asyncio", "collections", "email", "http", "json", "logging")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of the system's Python, and everything it does not have: links, odd modes, times, names, holes."""
    tree = tmp_path_factory.mktemp("source") / "tree"
    tree.mkdir()
    library = system_library()
    for package in PACKAGES:
        if (library / package).is_dir():
            compiled = shutil.ignore_patterns("__pycache__")  # as many files again, of the same kind
            shutil.copytree(library / package, tree / package, symlinks=True, ignore=compiled)
    (tree / "link").symlink_to("json/decoder.py")
    (tree / "link to a folder").symlink_to("asyncio")
    (tree / "dangling").symlink_to("/nowhere/at/all")
    for number in range(20):
        os.link(tree / "email" / "message.py", tree / f"hard link {number}")
    for mode in (0o400, 0o640, 0o755, 0o4755, 0o2711):
        (tree / f"mode {mode:o}").write_text("x")
        (tree / f"mode {mode:o}").chmod(mode)
    (tree / "private folder").mkdir(mode=0o700)
    (tree / "sticky folder").mkdir()
    (tree / "sticky folder").chmod(0o1777)
    (tree / "empty").touch()
    (tree / "ünïcode \n name").write_text("x")
    (tree / ("n" * 255)).write_text("the longest name")
    with (tree / "sparse").open("wb") as file:
        file.seek(20 << 20)
        file.write(b"end")
    (tree / "big").write_bytes(os.urandom(9 << 20))
    os.utime(tree / "empty", ns=(0, 1))
    os.utime(tree / "big", ns=(2_000_000_000_123_456_789, 1_000_000_000_987_654_321))
    os.utime(tree / "asyncio", ns=(0, 1_500_000_000_000_000_001))
    return tree


@needs_root
def test_rsync_copies_once_and_then_finds_nothing_to_do(place: Place, source: Path) -> None:
    need("rsync")
    copy = place.path / "copy"
    # Without the window rsync takes times for equal that differ by less than a second.
    everything = ("rsync", "-aHAX", "--numeric-ids", "--itemize-changes", "--modify-window=-1")
    sent = lines(place.run(*everything, f"{source}/", f"{copy}/"))
    expected = digests(source)
    assert len(sent) >= len(expected) > 90
    assert digests(copy) == expected
    assert place.run(*everything, f"{source}/", f"{copy}/") == ""
    assert place.run(*everything, "--checksum", f"{source}/", f"{copy}/") == ""
    with place.second_mount() as second:
        assert place.run(*everything, f"{source}/", f"{second}/copy/") == ""
        assert place.run(*everything, f"{second}/copy/", f"{source}/") == ""

    # What changed, and nothing else, changes in place.
    changed = copy / "big"
    inode = changed.stat().st_ino
    with changed.open("r+b") as file:
        file.seek(5 << 20)
        file.write(b"different")
    (copy / "not in the source").write_text("x")
    again = lines(place.run(*everything, "--inplace", "--no-whole-file", "--delete", f"{source}/", f"{copy}/"))
    # The folder itself is listed for its time.
    assert {line.split(maxsplit=1)[1] for line in again} == {"not in the source", "big", "./"}
    assert changed.stat().st_ino == inode
    assert digests(copy) == expected


@needs_root
@as_both_users
def test_tar_out_and_in_keeps_every_file(place: Place, source: Path, tmp_path: Path) -> None:
    need("tar")
    here, there = place.local / "in.tar", place.path / "out.tar"
    subprocess.run(["tar", "--format=posix", "-cf", here, "-C", source, "."], check=True)
    copy = place.path / "copy"
    copy.mkdir()
    os.chown(copy, *place.owner)
    # An ordinary user may not give files away, and keeps no other one's set-id bits.
    how = ("-xpf",) if place.user == "root" else ("-xf",)
    place.run("tar", *how, here, "-C", copy)
    expected = digests(source)
    if place.user == "root":
        assert digests(copy) == expected
    else:
        assert {name: each[3:] for name, each in digests(copy).items()} == {
            name: each[3:] for name, each in expected.items()
        }
    place.run("tar", "--format=posix", "-cSf", there, "-C", copy, ".")
    back = tmp_path / "back"
    back.mkdir()
    subprocess.run(["tar", "-xpf", there, "-C", back], check=True)
    assert digests(back) == digests(copy)
    # tar compares what it has packed with what lies there.
    place.run("tar", "-df", there, "-C", copy)
    with place.second_mount() as second:
        place.run("tar", "-df", here if place.user == "root" else there, "-C", second / "copy")


@needs_root
def test_cp_and_diff_and_removal_of_a_tree(place: Place, source: Path) -> None:
    copy, again = place.path / "copy", place.path / "again"
    place.run("cp", "-a", source, copy)
    place.run("cp", "-a", "--reflink=auto", "--sparse=always", copy, again)
    place.run("diff", "-r", "--no-dereference", copy, again)
    assert digests(again) == digests(source)
    assert len(lines(place.run("find", again, "-type", "f", "-name", "*.py"))) == len(list(source.rglob("*.py")))
    found = place.shell(f"grep -rl 'class .*Error' {again}/json {again}/email | sort")
    assert found == place.shell(f"cd {source}; grep -rl 'class .*Error' json email | sed 's|^|{again}/|' | sort")
    place.run("chmod", "-R", "u+w,go-rwx", again)
    assert {path.stat().st_mode & 0o077 for path in again.rglob("*") if not path.is_symlink()} == {0}
    assert place.run("du", "-s", "--apparent-size", "-B1", again / "json") == place.run(
        "du", "-s", "--apparent-size", "-B1", copy / "json"
    ).replace("/copy/", "/again/")
    place.run("rm", "-r", again)
    assert not again.exists()


def test_zip_archives_are_written_and_read_in_place(place: Place, source: Path) -> None:
    script = """
import os, sys, zipfile
source, path = sys.argv[1:]
names = [os.path.join(f, n) for f, _, ns in os.walk(os.path.join(source, "email")) for n in ns if n.endswith(".py")]
with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
    for name in names:
        archive.write(name, os.path.relpath(name, source))
with zipfile.ZipFile(path, "a") as archive:
    archive.writestr("added", b"later")
with zipfile.ZipFile(path) as archive:
    assert archive.testzip() is None
    assert archive.read("added") == b"later"
    archive.extractall(path + ".out")
for name in names:
    copy = os.path.join(path + ".out", os.path.relpath(name, source))
    assert open(name, "rb").read() == open(copy, "rb").read()
print(len(names))
"""
    assert int(place.run(PYTHON, "-c", script, source, place.path / "archive.zip")) > 10
