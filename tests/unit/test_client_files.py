"""What a client believes of a file: newer answers win, older ones are ignored, own commits keep what is known."""

from mendfs.client.files import EXTENTS_KNOWN_MAX, SLOTS_NEAR, File, Files
from mendfs.model import Attributes, BlockId, CommitSequence, Extent, Inode, Partition, Slot, SlotExtents
from mendfs.wire.messages.meta import Committed, Extents, Opened

INODE = Inode(7)


def attributes(version: int, size: int = 100) -> Attributes:
    return Attributes(INODE, 0, 0o100644, 0, 0, 1, size, size, 0, 1, 2, 3, CommitSequence(version))


def extent(block: int) -> Extent:
    return Extent(0, 10, Partition(0), BlockId(block), 10, 0, b"r")


def opened(version: int, block: int = 1) -> Opened:
    slots = (SlotExtents(Slot(0), (extent(block),)),)
    return Opened(attributes(version), slots, 4, CommitSequence(version))


def committed(previous: int, version: int, block: int = 2) -> Committed:
    slots = (SlotExtents(Slot(1), (extent(block),)),)
    return Committed(attributes(version), CommitSequence(previous), slots, CommitSequence(version))


async def test_own_commits_keep_the_extents_and_the_kernels_pages() -> None:
    file = File(INODE)
    assert not file.learn_opened(opened(5))
    file.learn_committed(committed(5, 6))
    assert file.slots == {0: (extent(1),), 1: (extent(2),), 2: (), 3: ()}
    assert file.learn_opened(opened(6))


async def test_somebody_elses_change_between_drops_them() -> None:
    file = File(INODE)
    file.learn_opened(opened(5))
    file.learn_committed(committed(6, 7))
    assert file.slots == {1: (extent(2),)}
    assert not file.learn_opened(opened(7))


async def test_older_answers_are_ignored() -> None:
    file = File(INODE)
    file.learn_opened(opened(9))
    assert not file.learn_opened(opened(8, block=3))
    assert file.learn(attributes(7, size=1)).size == 100
    assert not file.learn_extents(Extents((), 4, 1, CommitSequence(6), CommitSequence(6)), Slot(0))
    file.learn_committed(committed(7, 8))
    assert file.version == 9 and file.slots[Slot(0)] == (extent(1),)
    assert file.learn_opened(opened(9))


async def test_a_newer_answer_about_extents_brings_the_size() -> None:
    file = File(INODE)
    file.learn_opened(opened(5))
    assert file.learn_extents(Extents((), 2, 55, CommitSequence(6), CommitSequence(6)), Slot(1))
    assert file.size == 55
    assert file.slots == {1: ()}


async def test_appends_go_past_the_kernel() -> None:
    file = File(INODE)
    file.learn_opened(opened(5))
    file.learn_committed(committed(5, 6), by_kernel=False)
    assert not file.learn_opened(opened(6))


async def test_idle_files_are_forgotten_and_busy_ones_kept() -> None:
    files = Files()
    busy = files.get(Inode(1))
    busy.opens = 1
    for number in range(2, 6000):
        files.get(Inode(number))
    assert files.find(Inode(1)) is busy
    assert sum(1 for _ in files) < 4200


async def test_the_extents_of_a_huge_crowded_file_are_bounded_and_what_is_being_read_stays() -> None:
    """64 GiB rewritten in 4 KiB pieces have 16 million: they must not all lie in the client's memory."""
    file = File(INODE)
    file.learn_opened(opened(5))
    many = tuple(extent(block) for block in range(1, 501))
    for first in range(0, 16_384, 16):
        slots = tuple(SlotExtents(Slot(first + n), many) for n in range(16))
        answer = Extents(slots, first + 16, 1 << 36, CommitSequence(5), CommitSequence(5))
        assert file.learn_extents(answer, Slot(first))
        assert all(Slot(first + n) in file.slots for n in range(16))
    known = sum(map(len, file.slots.values()))
    near = 2 * SLOTS_NEAR * len(many)
    assert known <= EXTENTS_KNOWN_MAX + EXTENTS_KNOWN_MAX // 4 + near
    file.learn_committed(committed(5, 6))
    assert file.slots[Slot(1)] == (extent(2),)
