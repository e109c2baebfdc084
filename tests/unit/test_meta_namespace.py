"""Names: what POSIX says, and that the namespace stays a tree with right link counts (promises 4 and 5)."""

import errno
import stat

import pytest

from mendfs.errors import OperationError
from mendfs.meta import attributes, namespace, schema
from mendfs.model import ROOT_INODE, Inode, SessionId
from mendfs.wire.messages import meta as messages
from tests.unit.meta_tools import MetaVolume


async def expect(code: int, awaitable: object) -> None:
    with pytest.raises(OperationError) as caught:
        await awaitable  # type: ignore[misc]
    assert caught.value.errno == code


async def test_a_made_file_is_found_and_listed() -> None:
    volume = await MetaVolume.make()
    made = await volume.create(b"a")
    assert await volume.lookup(b"a") == made
    assert (made.uid, made.gid, made.nlink, made.size) == (7, 8, 1, 0)
    listing = await volume.do(namespace.list_directory, messages.ListDirectory(ROOT_INODE, b"", 10, True))
    assert [(entry.name, entry.attributes) for entry in listing.entries] == [(b"a", made)]
    assert listing.complete


async def test_make_refuses_what_exists_and_names_that_cannot_be() -> None:
    volume = await MetaVolume.make()
    await volume.create(b"a")
    await expect(errno.EEXIST, volume.create(b"a"))
    await expect(errno.ENAMETOOLONG, volume.create(b"x" * 256))
    for name in (b"", b".", b"..", b"a/b", b"a\0b"):
        await expect(errno.EINVAL, volume.create(name))
    await expect(errno.ENOENT, volume.create(b"b", Inode(999_999)))
    await expect(errno.ENOTDIR, volume.create(b"b", (await volume.lookup(b"a")).inode))


async def test_directories_count_their_links_and_go_only_when_empty() -> None:
    volume = await MetaVolume.make()
    directory = await volume.mkdir(b"d")
    await volume.mkdir(b"e", directory)
    assert (await volume.lookup(b"d")).nlink == 3
    assert (await volume.lookup(b".")).nlink == 3
    await expect(errno.ENOTEMPTY, volume.unlink(b"d", directory=True))
    await expect(errno.EISDIR, volume.unlink(b"d"))
    await volume.unlink(b"e", directory, directory=True)
    assert (await volume.lookup(b"d")).nlink == 2
    await volume.unlink(b"d", directory=True)
    assert (await volume.lookup(b".")).nlink == 2
    await expect(errno.ENOENT, volume.create(b"late", directory))


async def test_hard_links_count_and_the_last_one_queues_the_inode() -> None:
    volume = await MetaVolume.make()
    made = await volume.create(b"a")
    await volume.do(namespace.link, messages.Link(volume.at(), made.inode, ROOT_INODE, b"b", 11))
    assert (await volume.lookup(b"a")).nlink == 2
    assert (await volume.unlink(b"a")).nlink == 1
    assert not await volume.keys(schema.Kind.UNLINKED)
    assert (await volume.unlink(b"b")).nlink == 0
    assert [schema.number_in(key) for key, _ in await volume.keys(schema.Kind.UNLINKED)] == [made.inode]
    await expect(errno.ENOENT, volume.do(namespace.link, messages.Link(volume.at(), made.inode, ROOT_INODE, b"c", 1)))


async def test_unlinking_an_open_file_notes_who_has_it_open() -> None:
    volume = await MetaVolume.make()
    made = await volume.create(b"a")
    from mendfs.meta.sessions import Session

    session = Session(SessionId(5), "c", 0.0)
    volume.sessions.add(session)
    volume.sessions.opened(session, [made.inode])
    await volume.unlink(b"a")
    assert [key for key, _ in await volume.keys(schema.Kind.OPEN_UNLINKED)] == [
        schema.open_unlinked_key(made.inode, SessionId(5))
    ]


async def test_rename_replaces_files_and_empty_directories_only() -> None:
    volume = await MetaVolume.make()
    first, second = await volume.create(b"a"), await volume.create(b"b")
    replaced = await volume.rename(b"a", b"b")
    assert replaced is not None
    assert (replaced.inode, replaced.nlink) == (second.inode, 0)
    assert (await volume.lookup(b"b")).inode == first.inode
    await expect(errno.ENOENT, volume.lookup(b"a"))
    full, empty = await volume.mkdir(b"full"), await volume.mkdir(b"empty")
    await volume.create(b"f", full)
    await expect(errno.ENOTEMPTY, volume.rename(b"empty", b"full"))
    await expect(errno.ENOTDIR, volume.rename(b"full", b"b"))
    await expect(errno.EISDIR, volume.rename(b"b", b"empty"))
    await volume.rename(b"full", b"empty")
    assert (await volume.lookup(b"empty")).inode == full
    assert (await volume.lookup(b".")).nlink == 3
    assert empty != full


async def test_rename_keeps_the_namespace_a_tree() -> None:
    volume = await MetaVolume.make()
    a = await volume.mkdir(b"a")
    b = await volume.mkdir(b"b", a)
    c = await volume.mkdir(b"c", b)
    await expect(errno.EINVAL, volume.rename(b"a", b"loop", to=c))
    await expect(errno.EINVAL, volume.rename(b"a", b"loop", to=a))
    await volume.rename(b"c", b"c", parent=b, to=ROOT_INODE)
    assert (await volume.lookup(b"..", c)).inode == ROOT_INODE
    assert (await volume.lookup(b"b", a)).nlink == 2
    assert (await volume.lookup(b".")).nlink == 4


async def test_rename_flags() -> None:
    volume = await MetaVolume.make()
    file, directory = await volume.create(b"f"), await volume.mkdir(b"d")
    inner = await volume.mkdir(b"i", directory)
    await expect(errno.EEXIST, volume.rename(b"f", b"d", flags=1))
    await volume.rename(b"f", b"i", to=directory, flags=2)
    assert (await volume.lookup(b"i", directory)).inode == file.inode
    assert (await volume.lookup(b"f")).inode == inner
    assert (await volume.lookup(b"..", inner)).inode == ROOT_INODE
    assert (await volume.lookup(b"d")).nlink == 2
    assert (await volume.lookup(b".")).nlink == 4
    await expect(errno.EINVAL, volume.rename(b"d", b"f", flags=2 | 1))


async def test_two_names_of_one_file_renamed_over_each_other_both_stay() -> None:
    volume = await MetaVolume.make()
    made = await volume.create(b"a")
    await volume.do(namespace.link, messages.Link(volume.at(), made.inode, ROOT_INODE, b"b", 11))
    assert await volume.rename(b"a", b"b") is None
    assert (await volume.lookup(b"a")).nlink == 2


async def test_a_setgid_directory_hands_its_group_down() -> None:
    volume = await MetaVolume.make()
    directory = await volume.create(b"d", mode=stat.S_IFDIR | stat.S_ISGID | 0o775)
    file = await volume.create(b"f", directory.inode)
    below = await volume.create(b"s", directory.inode, stat.S_IFDIR | 0o755)
    assert file.gid == directory.gid
    assert below.mode & stat.S_ISGID


async def test_listings_go_on_after_a_name_though_names_come_and_go() -> None:
    volume = await MetaVolume.make()
    for number in range(25):
        await volume.create(b"%02d" % number)
    seen: list[bytes] = []
    after = b""
    while True:
        page = await volume.do(namespace.list_directory, messages.ListDirectory(ROOT_INODE, after, 7, False))
        seen += [entry.name for entry in page.entries]
        if page.complete:
            break
        after = seen[-1]
        await volume.unlink(seen[0])
        seen = seen[1:]
    assert seen == [b"%02d" % number for number in range(3, 25)]


async def test_extended_attributes() -> None:
    volume = await MetaVolume.make()
    inode = (await volume.create(b"a")).inode

    async def put(name: bytes, value: bytes, flags: int = 0) -> None:
        await volume.do(attributes.set_xattr, messages.SetXattr(volume.at(), inode, name, value, flags, 60))

    await put(b"user.b", b"1", 1)
    await put(b"user.a", b"")
    await expect(errno.EEXIST, put(b"user.b", b"2", 1))
    await expect(errno.ENODATA, put(b"user.c", b"2", 2))
    await expect(errno.E2BIG, put(b"user.c", bytes(65537)))
    assert await volume.do(attributes.list_xattr, inode) == (b"user.a", b"user.b")
    assert await volume.do(attributes.get_xattr, inode, b"user.b") == b"1"
    await volume.do(attributes.remove_xattr, messages.RemoveXattr(volume.at(), inode, b"user.b", 61))
    await expect(errno.ENODATA, volume.do(attributes.get_xattr, inode, b"user.b"))
