"""What a mount may answer without asking: directories, the newest version of each, for a short time."""

import asyncio
import os
import stat

import msgspec

from mendfs.client.recent import RECENT_MAX, Recent
from mendfs.model import Attributes, CommitSequence, Inode
from tests.unit.client_tools import Proxy, cluster, read_all

DIRECTORY = Attributes(
    inode=Inode(5),
    generation=1,
    mode=stat.S_IFDIR | 0o755,
    uid=0,
    gid=0,
    nlink=2,
    size=0,
    stored=0,
    rdev=0,
    atime_ns=0,
    mtime_ns=0,
    ctime_ns=0,
    version=CommitSequence(7),
)


async def test_an_older_version_never_replaces_a_newer_one() -> None:
    recent = Recent()
    newer = msgspec.structs.replace(DIRECTORY, version=CommitSequence(9))
    recent.note(newer)
    recent.note(DIRECTORY)
    found = recent.find(Inode(5), within_s=60)
    assert found is not None and found[0] is newer


async def test_nothing_is_known_longer_than_it_may_be_believed_or_after_changes_were_lost() -> None:
    recent = Recent()
    recent.note(DIRECTORY)
    async with asyncio.timeout(10):
        while recent.find(Inode(5), within_s=0.01) is not None:
            await asyncio.sleep(0.001)
    assert recent.find(Inode(5), within_s=60) is not None
    recent.clear()
    assert recent.find(Inode(5), within_s=60) is None


async def test_files_are_not_noted_and_directories_within_bounds() -> None:
    recent = Recent()
    recent.note(msgspec.structs.replace(DIRECTORY, mode=stat.S_IFREG | 0o644), None)
    assert recent.find(Inode(5), within_s=60) is None
    for number in range(RECENT_MAX + 1):
        recent.note(msgspec.structs.replace(DIRECTORY, inode=Inode(number)))
    assert recent.find(Inode(0), within_s=60) is None
    assert recent.find(Inode(1), within_s=60) is not None


async def test_every_change_of_a_client_is_in_what_it_knows_of_a_directory() -> None:
    async with cluster() as c:
        volume = await c.client()

        async def fresh(*inodes: Inode) -> None:
            for inode in inodes:
                found = volume.recent_attributes(inode, 60)
                assert found is not None and found[0] == await volume.attributes(inode)

        root = Inode(1)
        folder = await volume.make(root, b"folder", stat.S_IFDIR | 0o755, uid=0, gid=0)
        await fresh(root, folder.inode)
        file = await volume.make(folder.inode, b"file", stat.S_IFREG | 0o644, uid=0, gid=0)
        await fresh(folder.inode)
        await volume.link(file.inode, root, b"link")
        await fresh(root)
        inner = await volume.make(folder.inode, b"inner", stat.S_IFDIR | 0o755, uid=0, gid=0)
        await volume.rename(folder.inode, b"inner", root, b"moved")
        await fresh(root, folder.inode, inner.inode)
        await volume.rename(root, b"moved", root, b"folder", 2)
        await fresh(root, folder.inode, inner.inode)
        await volume.unlink(folder.inode, b"file")
        await fresh(folder.inode)
        await volume.set_attributes(folder.inode, mode=0o700)
        await fresh(folder.inode)
        await volume.set_xattr(folder.inode, b"user.a", b"b")
        await fresh(folder.inode)
        await volume.rmdir(root, b"moved")
        await fresh(root)


async def test_a_listing_tells_of_its_directory_which_the_kernel_asks_for_before_it_looks_up_the_names() -> None:
    async with cluster() as c:
        volume, root = await c.client(), Inode(1)
        volume._names.recent.clear()
        await volume.list_directory(root, b"", 10, False)
        found = volume.recent_attributes(root, 60)
        assert found is not None and found[0] == await volume.attributes(root)


async def test_a_file_being_written_here_is_known_with_what_was_written_and_changed() -> None:
    """As an assembler writes: it asks for its place after each piece, and each question was a round trip."""
    async with cluster() as c:
        volume = await c.client(flush_after_s=60)
        made = await volume.make(Inode(1), b"file", stat.S_IFREG | 0o644, uid=0, gid=0, open=True)
        file = await volume.open_made(made, flags=os.O_RDWR)
        volume._names.recent.clear()
        await file.write(b"x" * 100, 0)
        assert (await volume.attributes(made.inode)).size == 100

        def known() -> Attributes:
            found = volume.recent_attributes(made.inode, 60)
            assert found is not None
            return found[0]

        await file.write(b"x" * 100, 100)
        assert known().size == 200
        await volume.set_attributes(made.inode, mode=0o600)
        assert known().mode == stat.S_IFREG | 0o600
        await file.flush()
        assert known().size == 200 and not file._file.is_dirty
        await volume.set_attributes(made.inode, size=50)
        assert known().size == 50
        await volume.unlink(Inode(1), b"file")
        assert known().nlink == 0
        volume._names.recent.clear()
        await volume.attributes(made.inode)
        assert volume.recent_attributes(made.inode, 60) is None  # nothing unflushed: asked for each time


async def test_what_is_read_of_a_file_made_here_is_known_without_asking() -> None:
    async with cluster() as c:
        proxy = Proxy(c.meta.address)
        await proxy.start()
        volume = await c.client(proxy.address, flush_after_s=60)
        made = await volume.make(Inode(1), b"file", stat.S_IFREG | 0o644, uid=0, gid=0, open=True)
        file = await volume.open_made(made, flags=os.O_RDWR)
        await file.write(b"written", 5)
        proxy.is_swallowing = True
        async with asyncio.timeout(30):  # no question would be answered
            assert await read_all(file) == bytes(5) + b"written"
        proxy.is_swallowing = False
        await volume.close(timeout_s=1)
        await proxy.close()
