"""Paths inside a volume: links, dots and slashes."""

import errno
import stat

import pytest

from mendfs.client import paths
from mendfs.client.volume import Volume
from mendfs.errors import OperationError, UsageError
from mendfs.model import Inode
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
