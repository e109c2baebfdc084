"""The largest things people may make, against the limits of a transaction (100 keys, 1 MiB) and of a message."""

import errno
import os
import stat

import msgspec
import pytest

from mendfs.errors import OperationError
from mendfs.kv.engine import BYTES_MAX, KEYS_MAX
from mendfs.meta import attributes, freeing, namespace
from mendfs.meta.attributes import XATTR_BYTES_MAX, XATTRS_MAX
from mendfs.meta.namespace import LISTING_MAX
from mendfs.model import ROOT_INODE, Inode
from mendfs.wire.frame import MESSAGE_BYTES_MAX
from mendfs.wire.messages import meta as messages
from tests.unit.meta_tools import MetaVolume


def longest_name(number: int) -> bytes:
    return b"%08d" % number + b"\xff" * 247


async def full_directory(volume: MetaVolume, count: int) -> Inode:
    """A directory with so many entries, made as clients make them."""
    directory = await volume.mkdir(b"d")
    made = 0
    while made < count:
        for inode in (await volume.granted("inode"))[: count - made]:
            request = messages.Make(
                volume.at(), directory, longest_name(made), Inode(inode), stat.S_IFREG | 0o644, 7, 8, 10
            )
            await volume.do(namespace.make, request, 1)
            made += 1
    return directory


async def test_a_listing_of_the_longest_names_with_attributes_fits_a_message_and_is_complete() -> None:
    volume = await MetaVolume.make()
    count = LISTING_MAX + 500
    directory = await full_directory(volume, count)
    names: list[bytes] = []
    after, complete = b"", False
    while not complete:
        request = messages.ListDirectory(directory, after, 1 << 30, with_attributes=True)
        listing = await volume.do(namespace.list_directory, request)
        assert len(msgspec.msgpack.encode(listing)) < MESSAGE_BYTES_MAX
        names += [entry.name for entry in listing.entries]
        after, complete = names[-1], listing.complete
    assert names == [longest_name(number) for number in range(count)]


async def test_renaming_and_entering_a_directory_costs_the_same_however_full_it_is() -> None:
    volume = await MetaVolume.make()
    directory = await full_directory(volume, 1000)
    empty = await volume.mkdir(b"empty")
    other = await volume.mkdir(b"other")
    written = []
    for name, inode in ((b"d", directory), (b"empty", empty)):
        transaction = volume.engine.begin()
        request = messages.Rename(volume.at(), ROOT_INODE, name, other, name, 0, 30)
        await namespace.rename(transaction, request, volume.sessions)
        written.append(len(transaction.writes))
        await volume.engine.commit(transaction)
        assert (await volume.lookup(name, other)).inode == inode
    assert written[0] == written[1] < 10
    assert (await volume.lookup(longest_name(999), directory)).nlink == 1


async def test_the_largest_attributes_are_kept_and_larger_ones_are_refused() -> None:
    volume = await MetaVolume.make()
    inode = (await volume.create(b"f")).inode

    def request(name: bytes, value: bytes) -> messages.SetXattr:
        return messages.SetXattr(volume.at(), inode, name, value, 0, 10)

    value = os.urandom(XATTR_BYTES_MAX)
    await volume.do(attributes.set_xattr, request(b"user.big", value))
    assert await volume.do(attributes.get_xattr, inode, b"user.big") == value
    with pytest.raises(OperationError) as refused:
        await volume.do(attributes.set_xattr, request(b"user.big", value + b"x"))
    assert refused.value.errno == errno.E2BIG
    assert await volume.do(attributes.get_xattr, inode, b"user.big") == value
    for number in range(XATTRS_MAX - 1):
        await volume.do(attributes.set_xattr, request(b"user.%d" % number, b""))
    with pytest.raises(OperationError) as refused:
        await volume.do(attributes.set_xattr, request(b"user.one too many", b""))
    assert refused.value.errno == errno.ENOSPC
    # A thousand attributes go in several steps, each within a transaction.
    await volume.unlink(b"f")
    while not await volume.do(freeing.free_inode, inode):
        pass
    with pytest.raises(OperationError):
        await volume.do(attributes.get_xattr, inode, b"user.big")
    assert KEYS_MAX == 100 and BYTES_MAX == 1 << 20
