"""The file commands on a volume whose servers are in this process: what they do, and what they say went wrong."""

import asyncio
import errno
import json
import os
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mendfs.cli import file_actions, trees
from mendfs.cli.command import At
from mendfs.cli.get import get
from mendfs.cli.options import Located
from mendfs.cli.progress import Progress
from mendfs.cli.put import put
from mendfs.cli.remove import remove
from mendfs.cli.shell_commands import Shell
from mendfs.cli.shell_complete import candidates
from mendfs.client.paths import canonical_directory, resolve, resolve_place
from mendfs.client.volume import Volume
from mendfs.errors import OperationError, UsageError
from mendfs.model import Inode
from mendfs.world.streams import read_stream
from tests.unit.client_tools import cluster, contents

Errors = pytest.CaptureFixture[str]


@asynccontextmanager
async def commands() -> AsyncIterator[At]:
    async with cluster() as servers:
        with tempfile.TemporaryFile() as output:
            yield At(Located("", "", ""), await servers.client(), folder="/", output=output.fileno())


def written(at: At) -> str:
    """What came to standard output since the last call."""
    size = os.lseek(at.output, 0, os.SEEK_END)
    text = os.pread(at.output, size, 0).decode()
    os.ftruncate(at.output, 0)
    os.lseek(at.output, 0, os.SEEK_SET)
    return text


async def fill(at: At, *paths: str) -> None:
    """Files, and directories for what ends with a slash; their parents are made."""
    for path in paths:
        await file_actions.make_directories(at, [path.rpartition("/")[0] or "/"], parents=True)
        if not path.endswith("/"):
            await file_actions.create_files(at, [path], size=0, mode=None)
    assert at.exit_code == 0


async def paths_below(volume: Volume, path: str = "/") -> set[str]:
    found = set()
    root = await resolve(volume, path)
    waiting = [(path.rstrip("/"), root.inode)]
    while waiting:
        where, inode = waiting.pop()
        for name, attributes in await file_actions.children_of(volume, inode):
            below = f"{where}/{os.fsdecode(name)}"
            found.add(below)
            if stat.S_ISDIR(attributes.mode):
                waiting.append((below, attributes.inode))
    return found


async def deep(volume: Volume, levels: int) -> None:
    parent = Inode(1)
    for _ in range(levels):
        parent = (await volume.make(parent, b"d", stat.S_IFDIR | 0o755, uid=0, gid=0)).inode


# --- rm -----------------------------------------------------------------------------------------------------


async def test_a_tree_is_removed_and_nothing_beside_it(capsys: Errors) -> None:
    async with commands() as at:
        await fill(at, "/t/a/b/c", "/t/a/x", "/t/e/", "/t/f", "/keep/a/x")
        await at.volume.make(
            (await resolve(at.volume, "/t")).inode, b"l", stat.S_IFLNK | 0o777, uid=0, gid=0, target=b"/keep"
        )
        await remove(at, ["/t"], recursive=True, force=False, whole_volume=False)
        assert await paths_below(at.volume) == {"/keep", "/keep/a", "/keep/a/x"}
        assert at.exit_code == 0 and not capsys.readouterr().err


async def test_what_cannot_be_removed_is_said_and_the_rest_goes(capsys: Errors) -> None:
    async with commands() as at:
        await fill(at, "/dir/x", "/file", "/other")
        await remove(at, ["/none", "/dir", "/file", "/other/"], recursive=False, force=False, whole_volume=False)
        assert at.exit_code == 1
        lines = capsys.readouterr().err.splitlines()
        assert [line.split(":")[1].split()[0] for line in lines] == ["/none", "/dir", "/other/"]
        assert await paths_below(at.volume) == {"/dir", "/dir/x", "/other"}


async def test_a_name_that_is_not_there_is_no_error_with_force(capsys: Errors) -> None:
    async with commands() as at:
        await fill(at, "/file")
        await remove(at, ["/none", "/none/x", "/file/x"], recursive=False, force=True, whole_volume=False)
        assert at.exit_code == 0 and not capsys.readouterr().err


async def test_the_whole_volume_is_not_removed_by_mistake(capsys: Errors) -> None:
    async with commands() as at:
        await fill(at, "/a/b", "/c")
        for path in ("/", "//", "/.", "."):
            await remove(at, [path], recursive=True, force=True, whole_volume=False)
            assert "--whole-volume" in capsys.readouterr().err
        assert at.exit_code == 2
        assert len(await paths_below(at.volume)) == 3
        await remove(at, ["/"], recursive=True, force=False, whole_volume=True)
        assert await paths_below(at.volume) == set()


async def test_removing_goes_on_while_others_put_something_in_and_take_it_out() -> None:
    async with commands() as at:
        await fill(at, *(f"/t/d{number}/f{file}" for number in range(4) for file in range(30)))
        here = await resolve(at.volume, "/t")
        stop = asyncio.Event()

        async def meddle() -> None:
            number = 0
            while not stop.is_set() and number < 200:
                number += 1
                try:
                    await at.volume.make(here.inode, b"new%d" % number, stat.S_IFREG | 0o644, uid=0, gid=0)
                    await at.volume.unlink(here.inode, b"d1/f1")
                except OperationError as error:
                    if error.errno == errno.ENOENT:
                        await asyncio.sleep(0)
                        continue
                    raise

        meddling = asyncio.create_task(meddle())
        await asyncio.sleep(0)
        await remove(at, ["/t"], recursive=True, force=False, whole_volume=False)
        stop.set()
        await meddling
        await remove(at, ["/t"], recursive=True, force=True, whole_volume=False)
        assert await paths_below(at.volume) == set()


async def test_a_tree_deeper_than_a_path_can_say_is_measured_shown_and_removed(
    capsys: Errors,
) -> None:
    async with commands() as at:
        await deep(at.volume, 2200)
        await trees.tree(at, "/", depth_max=None, as_json=True)
        text = written(at)
        assert text.count('"name": "d"') == 2200 and text.count("{") == text.count("}") == 2201
        usages = await trees.usage_of(at, "/")
        assert usages[-1].directories == 2200 and len(usages) == 2201
        await remove(at, ["/d"], recursive=True, force=False, whole_volume=False)
        assert await paths_below(at.volume) == set()


# --- mv, mkdir, create --------------------------------------------------------------------------------------


async def test_moving_follows_the_rules_of_mv(capsys: Errors) -> None:
    async with commands() as at:
        await fill(at, "/a", "/b", "/dir/", "/tree/x")
        await file_actions.move(at, ["/a", "/b"], "/dir")
        await file_actions.move(at, ["/dir/a"], "/dir/c")
        await file_actions.move(at, ["/tree"], "/dir/")
        await file_actions.move(at, ["/dir"], "/renamed/")
        assert at.exit_code == 0, capsys.readouterr().err
        assert await paths_below(at.volume) == {"/renamed"} | {
            f"/renamed/{name}" for name in ("b", "c", "tree", "tree/x")
        }
        await file_actions.move(at, ["/renamed"], "/renamed/tree")
        await file_actions.move(at, ["/renamed/b"], "/nothere/")
        await file_actions.move(at, ["/none"], "/renamed")
        errors = capsys.readouterr().err.splitlines()
        assert ["into itself" in errors[0], "/nothere" in errors[1], "/none" in errors[2]] == [True] * 3
        with pytest.raises(OperationError, match="Not a directory"):
            await file_actions.move(at, ["/renamed/b", "/renamed/c"], "/nothere")


async def test_new_files_and_directories_obey_the_umask_and_belong_to_the_caller(capsys: Errors) -> None:
    async with commands() as at:
        before = os.umask(0o027)
        try:
            await file_actions.make_directories(at, ["/d"], parents=False)
            await file_actions.create_files(at, ["/d/f"], size=1 << 40, mode=None)
            await file_actions.create_files(at, ["/d/exact"], size=0, mode=0o666)
            await file_actions.write_file(at, "/d/w", "x", offset=None, append=False)
        finally:
            os.umask(before)
        modes = {
            name: stat.S_IMODE((await resolve(at.volume, name)).mode) for name in ("/d", "/d/f", "/d/exact", "/d/w")
        }
        assert modes == {"/d": 0o750, "/d/f": 0o640, "/d/exact": 0o666, "/d/w": 0o640}
        made = await resolve(at.volume, "/d/f")
        assert (made.uid, made.gid, made.size, made.stored) == (os.getuid(), os.getgid(), 1 << 40, 0)
        await file_actions.create_files(at, ["/d/f", "/d/new", "/d/dir/"], size=0, mode=None)
        errors = capsys.readouterr().err
        assert "/d/f: File exists" in errors and "/d/dir/: Is a directory" in errors and at.exit_code == 1
        assert "/d/new" in await paths_below(at.volume)


async def test_writing_follows_a_link_also_to_a_file_that_is_not_there_yet() -> None:
    async with commands() as at:
        await fill(at, "/dir/")
        await at.volume.make(Inode(1), b"link", stat.S_IFLNK | 0o777, uid=0, gid=0, target=b"dir/../dir/new")
        await file_actions.write_file(at, "/link", "through", offset=None, append=False)
        place = await resolve_place(at.volume, "/link")
        assert place.name == b"new" and place.found is not None
        assert await contents(at.volume, place.found.inode) == b"through"
        assert await canonical_directory(at.volume, "/dir/./../dir//") == "/dir"
        for path in ("/", "/dir/.."):
            with pytest.raises(UsageError, match="root"):
                await resolve_place(at.volume, path)
        with pytest.raises(OperationError) as raised:
            await resolve_place(at.volume, "/none/x")
        assert raised.value.errno == errno.ENOENT


async def test_parts_of_files_are_read(capsys: Errors) -> None:
    async with commands() as at:
        await file_actions.write_file(at, "/f", "0123456789", offset=None, append=False)
        await file_actions.write_file(at, "/f", "ab", offset=8, append=False)
        await file_actions.write_file(at, "/f", "cd", offset=None, append=True)
        for offset, length in ((0, None), (3, 4), (10, 100), (12, None), (99, 1), (0, 0)):
            await file_actions.copy_out(at, ["/f"], offset=offset, length=length)
            await at.write("|")
        assert written(at) == "01234567abcd|3456|cd||||"
        await file_actions.copy_out(at, ["/none", "/", "/f"])
        assert written(at) == "01234567abcd" and at.exit_code == 1
        assert capsys.readouterr().err.splitlines() == [
            "mendfs: /none: No such file or directory",
            "mendfs: /: Is a directory",
        ]


async def test_waiting_for_input_or_for_a_reader_keeps_nobody_else_waiting() -> None:
    """The lease is 10 s: a loop that waited in read or write would lose its session, and what was written with it."""
    async with cluster() as servers:
        volume = await servers.client()
        incoming, typing = os.pipe()
        reading, outgoing = os.pipe()
        at = At(Located("", "", ""), volume, folder="/", input=incoming, output=outgoing)
        os.write(typing, b"one ")
        writing = asyncio.create_task(file_actions.write_file(at, "/f", None, offset=None, append=False))
        while (await file_actions.find_or_none(volume, "/f")) is None:
            await asyncio.sleep(0)
        assert not writing.done()  # it waits for more, and the loop goes on
        os.write(typing, b"x" * 60_000 + b"two")
        os.close(typing)
        await writing
        await file_actions.write_file(at, "/g", "y" * 300_000, offset=None, append=False)
        copying = asyncio.create_task(file_actions.copy_out(at, ["/g", "/f"]))
        assert await file_actions.list_path(at, "/", follow=True)  # the pipe is full, and the loop goes on
        assert not copying.done()
        found = b""
        while not found.endswith(b"two"):
            found += await read_stream(reading, 1 << 16)
        await copying
        assert found == b"y" * 300_000 + b"one " + b"x" * 60_000 + b"two"
        for fd in (incoming, reading, outgoing):
            os.close(fd)


async def test_an_interrupted_write_does_not_wait_for_servers_that_are_away(capsys: Errors) -> None:
    async with cluster() as servers:
        volume = await servers.client()
        shell = Shell(Located("", "", ""), volume)
        for store in servers.stores:
            store.hold_puts = asyncio.Event()
        running = asyncio.create_task(shell.execute("write /f text"))
        while not any(store.puts for store in servers.stores):
            await asyncio.sleep(0.01)
        assert shell.interrupt()
        async with asyncio.timeout(2):
            assert await running == 130
        assert not shell.interrupt()
        for store in servers.stores:
            assert store.hold_puts is not None
            store.hold_puts.set()
        assert await shell.execute("write /f other") == 0
        assert await contents(volume, (await resolve(volume, "/f")).inode) == b"other"


# --- tree, du -----------------------------------------------------------------------------------------------


async def test_a_file_with_two_names_is_measured_once(capsys: Errors) -> None:
    async with commands() as at:
        await fill(at, "/t/a/", "/t/b/")
        await file_actions.write_file(at, "/t/a/f", "x" * 1000, offset=None, append=False)
        inode = (await resolve(at.volume, "/t/a/f")).inode
        await at.volume.link(inode, (await resolve(at.volume, "/t/b")).inode, b"again")
        await trees.disk_usage(at, ["/t"], summary=False, human=False, as_json=True)
        found = {each["path"]: each for each in json.loads(written(at))}
        assert list(found) == ["/t/a", "/t/b", "/t"]
        assert found["/t"] == {"path": "/t", "stored": 1000, "size": 1000, "files": 1, "directories": 2}
        assert found["/t/a"]["files"] + found["/t/b"]["files"] == 1
        await trees.disk_usage(at, ["/t", "/none"], summary=True, human=True, as_json=False)
        assert written(at) == "1.0KiB\t/t\n"
        assert "/none" in capsys.readouterr().err and at.exit_code == 1


async def test_a_tree_is_drawn_as_deep_as_asked_for(capsys: Errors) -> None:
    async with commands() as at:
        await fill(at, "/t/a/b/c", "/t/z")
        await at.volume.make(
            (await resolve(at.volume, "/t")).inode, b"l", stat.S_IFLNK | 0o777, uid=0, gid=0, target=b"a"
        )
        await trees.tree(at, "/t", depth_max=None, as_json=False)
        drawn = "/t\n├── a\n│   └── b\n│       └── c\n├── l -> a\n└── z\n\n2 directories, 3 files\n"
        assert written(at) == drawn
        await trees.tree(at, "/t", depth_max=1, as_json=True)
        document = json.loads(written(at))
        assert [child["name"] for child in document["children"]] == ["a", "l", "z"]
        assert "children" not in document["children"][0] and document["children"][1]["target"] == "a"


# --- put, get -----------------------------------------------------------------------------------------------


async def test_an_interrupted_copy_leaves_no_half_file_under_any_name(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_bytes(os.urandom(1 << 20))
    async with cluster() as servers:
        volume = await servers.client()
        at = At(Located("", "", ""), volume, folder="/")
        await file_actions.write_file(at, "/f", "old", offset=None, append=False)
        for store in servers.stores:
            store.hold_puts = asyncio.Event()
        copying = asyncio.create_task(
            put(at, [str(source)], "/f", recursive=False, progress=Progress("", wanted=False))
        )
        while not any(path.startswith("/.mendfs-put-") for path in await paths_below(volume)):
            await asyncio.sleep(0.01)
        copying.cancel()
        for store in servers.stores:
            assert store.hold_puts is not None
            store.hold_puts.set()
        with pytest.raises(asyncio.CancelledError):
            await copying
        assert await paths_below(volume) == {"/f"}
        assert await contents(volume, (await resolve(volume, "/f")).inode) == b"old"

        target = tmp_path / "target"
        target.write_text("mine")
        for store in servers.stores:
            store.hold_puts, store.hold_gets = None, None
        await put(at, [str(source)], "/f", recursive=False, progress=Progress("", wanted=False))
        other = await servers.client()  # which has cached nothing
        for store in servers.stores:
            store.hold_gets = asyncio.Event()
        there = At(Located("", "", ""), other, folder="/")
        copying = asyncio.create_task(
            get(there, ["/f"], str(target), recursive=False, progress=Progress("", wanted=False))
        )
        await asyncio.sleep(0.05)
        copying.cancel()
        with pytest.raises(asyncio.CancelledError):
            await copying
        for store in servers.stores:
            assert store.hold_gets is not None
            store.hold_gets.set()
        assert sorted(os.listdir(tmp_path)) == ["source", "target"] and target.read_text() == "mine"


async def test_files_that_vanish_while_a_tree_is_copied_are_named_and_the_rest_is_there(
    tmp_path: Path, capsys: Errors
) -> None:
    for number in range(40):
        (tmp_path / f"f{number}").write_bytes(b"%d" % number)
    (tmp_path / "directory").mkdir()
    async with cluster() as servers:
        at = At(Located("", "", ""), await servers.client(), folder="/")
        for store in servers.stores:
            store.hold_puts = asyncio.Event()
        copying = asyncio.create_task(
            put(at, [str(tmp_path)], "/t", recursive=True, progress=Progress("", wanted=False))
        )
        while not any(store.puts for store in servers.stores):
            await asyncio.sleep(0.01)
        for path in tmp_path.iterdir():  # all are listed, and some are open: those are copied
            path.rmdir() if path.is_dir() else path.unlink()
        for store in servers.stores:
            assert store.hold_puts is not None
            store.hold_puts.set()
        counts = await copying
        copied = {path for path in await paths_below(at.volume) if path.startswith("/t/f")}
        lines = capsys.readouterr().err.splitlines()
        vanished = [line for line in lines if line.endswith("vanished before it was copied")]
        assert counts.files == len(copied) > 0 and len(vanished) + len(copied) == 40 and at.exit_code == 1
        assert counts.skipped == len(lines) >= len(vanished) > 0
        assert {path for path in await paths_below(at.volume) if "mendfs" in path} == set()


async def test_a_full_volume_ends_the_copy_at_once_and_says_so(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"f{number}").write_bytes(b"x" * 1000)
    from mendfs.errors import StoreFull

    async with cluster() as servers:
        at = At(Located("", "", ""), await servers.client(), folder="/")
        for store in servers.stores:
            store.put_error = StoreFull("no room")
        with pytest.raises(OperationError) as raised:
            await put(at, [str(tmp_path)], "/t", recursive=True, progress=Progress("", wanted=False))
        assert raised.value.errno == errno.ENOSPC
        assert {path for path in await paths_below(at.volume) if not path.startswith("/t/.")} == {"/t"}


# --- completion ---------------------------------------------------------------------------------------------


@pytest.mark.seed("B4")
async def test_completion_knows_commands_options_and_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local file").touch()
    (tmp_path / "local dir").mkdir()
    async with cluster() as servers:
        volume = await servers.client()
        shell = Shell(Located("", "", ""), volume)
        assert await shell.execute("mkdir -p '/dir one/sub' /dir2/.hidden") == 0
        assert await shell.execute("create '/dir one/file' /zfile") == 0
        await volume.make(Inode(1), b"\xff\n", stat.S_IFREG | 0o644, uid=0, gid=0)

        async def complete(line: str) -> list[str]:
            return [line[: len(line) - each.replaces] + each.text for each in await candidates(shell, line)]

        assert await complete("mk") == ["mkdir "]
        assert {"ls ", "cd ", "help ", "status "} <= set(await complete(""))
        assert await complete("ls /") == ["ls /dir\\ one/", "ls /dir2/", "ls /zfile "]
        assert await complete("ls '/dir o") == ["ls /dir\\ one/"]
        assert await complete("ls /dir2/") == [] and await complete("ls /dir2/.") == ["ls /dir2/.hidden/"]
        assert await complete("rm --who") == ["rm --whole-volume "]
        assert await complete("tree -L ") == []
        assert await complete("help sta") == ["help stat ", "help status "]
        assert await complete("contents ") == ["contents 0 ", "contents 1 ", "contents 2 ", "contents 3 "]
        assert await complete("put local") == ["put local\\ dir/", "put local\\ file "]
        assert await complete("put x /dir2") == ["put x /dir2/"]
        assert await complete("get /dir2 loc") == ["get /dir2 local\\ dir/", "get /dir2 local\\ file "]
        assert await complete("mv /zfile /dir2") == ["mv /zfile /dir2/"]
        assert await complete("nosuch /") == []
        assert await shell.execute("cd '/dir one'") == 0 and shell.folder == "/dir one"
        assert await complete("cat f") == ["cat file "]
        assert await complete("cat ../z") == ["cat ../zfile "]
        with pytest.raises(OperationError):
            await complete("ls /none/x")
