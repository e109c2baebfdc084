"""What a mount may answer without asking: directories, the newest version of each, for a short time."""

import asyncio
import stat

import msgspec

from mendfs.client.recent import RECENT_MAX, Recent
from mendfs.model import Attributes, CommitSequence, Inode
from tests.unit.client_tools import cluster

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
