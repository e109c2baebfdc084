"""Paths inside a volume: links, dots and slashes."""

import errno
import stat

import pytest

from mendfs.client import paths
from mendfs.client.volume import Volume
from mendfs.errors import OperationError, UsageError
from mendfs.model import Inode
from mendfs.wire.messages.meta import WALK_NAMES_MAX
from tests.unit.client_tools import cluster


async def directory(volume: Volume, parent: int, name: bytes) -> Inode:
    return (await volume.make(Inode(parent), name, stat.S_IFDIR | 0o755, uid=0, gid=0)).inode


async def link(volume: Volume, parent: int, name: bytes, target: bytes) -> Inode:
    made = await volume.make(Inode(parent), name, stat.S_IFLNK | 0o777, uid=0, gid=0, target=target)
    return made.inode


async def test_paths_lead_where_the_kernel_would_go() -> None:
    async with cluster() as c:
        volume = await c.client()
        a = await directory(volume, 1, b"a")
        b = await directory(volume, a, b"b")
        to_b = await link(volume, 1, b"to-b", b"a/b")
        await link(volume, b, b"up", b"../..")
        await link(volume, 1, b"abs", b"/a/b")
        await link(volume, 1, b"loop", b"loop")
        expected = {
            "/": 1,
            "//a/./b/": b,
            "/a/b/..": a,
            "/../..": 1,
            "/to-b": b,
            "/to-b/..": a,
            "/abs/up/a": a,
            "/a/b/up": 1,
        }
        for path, inode in expected.items():
            assert (await paths.resolve(volume, path)).inode == inode, path
        assert (await paths.resolve(volume, "/to-b", follow=False)).inode == to_b
        assert (await paths.resolve(volume, "/to-b/", follow=False)).inode == b
        for path, code in {"/loop": errno.ELOOP, "/none": errno.ENOENT, "/" + "x" * 256: errno.ENAMETOOLONG}.items():
            with pytest.raises(OperationError) as raised:
                await paths.resolve(volume, path)
            assert raised.value.errno == code, path
        with pytest.raises(UsageError):
            await paths.resolve(volume, "relative")


async def test_a_path_is_split_at_its_last_name_and_directories_are_listed_whole() -> None:
    async with cluster() as c:
        volume = await c.client()
        a = await directory(volume, 1, b"a")
        for number in range(5):
            await directory(volume, a, b"d%d" % number)
        parent, name = await paths.resolve_parent(volume, "/a/./new")
        assert (parent.inode, name) == (a, b"new")
        for path in ("/", "/a/.."):
            with pytest.raises(UsageError):
                await paths.resolve_parent(volume, path)
        found = [entry async for entry in paths.list_directory(volume, a)]
        assert [entry.name for entry in found] == [b"d0", b"d1", b"d2", b"d3", b"d4"]
        assert all(entry.attributes is not None for entry in found)


async def test_a_path_may_be_deeper_than_one_walk_and_end_anywhere() -> None:
    async with cluster() as c:
        volume = await c.client()
        at, names = Inode(1), [f"d{number}" for number in range(WALK_NAMES_MAX + 6)]
        for name in names:
            at = await directory(volume, at, name.encode())
        path = "/" + "/".join(names)
        assert (await paths.resolve(volume, path)).inode == at
        assert await paths.canonical_directory(volume, f"{path}/../{names[-1]}/.") == path
        await link(volume, at, b"back", path.encode())
        assert (await paths.resolve(volume, f"{path}/back/back/back/..")).inode == (
            await paths.resolve(volume, "/" + "/".join(names[:-1]))
        ).inode
        for missing in (f"{path}/nothing", f"{path}/nothing/at/all", f"/{names[0]}/nothing"):
            with pytest.raises(OperationError) as caught:
                await paths.resolve(volume, missing)
            assert caught.value.errno == errno.ENOENT and missing in str(caught.value)
        made = await volume.make(at, b"file", stat.S_IFREG | 0o644, uid=0, gid=0)
        assert (await paths.resolve(volume, f"{path}/file")).inode == made.inode
        for through in (f"{path}/file/below", f"{path}/file/.."):
            with pytest.raises(OperationError) as caught:
                await paths.resolve(volume, through)
            assert caught.value.errno == errno.ENOTDIR
