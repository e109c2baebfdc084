"""Verified bytes of blocks, bounded: runs of pages as they were fetched, and page checksums. Blocks never change.

A run is kept whole and forgotten whole, the one longest unused first. Looking up and copying are plain calls: nothing
is awaited between them, so a run is never given back to the pool while somebody reads from it.
"""

from collections import OrderedDict

import msgspec

from mendfs.model import BlockId, MiB, Partition
from mendfs.world.buffers import BufferPool

CHECKSUMS_BYTES_MAX = 4 * MiB
"""Page checksums of about 2,000 blocks of the default size: 8 GiB of random reads without asking for them again."""

RUN_BYTES = 512
"""What a run costs besides its memory: blocks may be as small as 8 bytes."""

BlockName = tuple[Partition, BlockId]


class Run(msgspec.Struct, eq=False):
    """Consecutive pages of a block, from `first_page` on."""

    block: BlockName
    first_page: int
    memory: bytearray
    length: int


class PageCache:
    """Runs of verified pages, by block and page."""

    def __init__(self, limit: int, page_size: int, pool: BufferPool) -> None:
        self._limit = limit
        self._page_size = page_size
        self._pool = pool
        self._runs: OrderedDict[int, Run] = OrderedDict()
        self._pages: dict[tuple[BlockName, int], Run] = {}
        self._used = 0

    @property
    def used(self) -> int:
        """Bytes of memory held."""
        return self._used

    def add(self, run: Run) -> None:
        """Keep a run. Its memory is the cache's from now on."""
        if len(run.memory) > self._limit:
            return
        self._runs[id(run)] = run
        self._used += RUN_BYTES + len(run.memory)
        for page in self._page_numbers(run):
            self._pages[run.block, page] = run
        while self._used > self._limit:
            self._forget_oldest()

    def _page_numbers(self, run: Run) -> range:
        return range(run.first_page, run.first_page - (-run.length // self._page_size))

    def _forget_oldest(self) -> None:
        _, run = self._runs.popitem(last=False)
        self._used -= RUN_BYTES + len(run.memory)
        for page in self._page_numbers(run):
            if self._pages.get((run.block, page)) is run:
                del self._pages[run.block, page]
        self._pool.give(run.memory)

    def holds(self, block: BlockName, page: int) -> bool:
        """Whether a page is held."""
        return (block, page) in self._pages

    def copy(self, block: BlockName, offset_in_block: int, target: memoryview) -> int:
        """Copy bytes from `offset_in_block` on; returns how many were there, up to the first page not held."""
        copied = 0
        while copied < len(target):
            at = offset_in_block + copied
            run = self._pages.get((block, at // self._page_size))
            if run is None:
                break
            begin = at - run.first_page * self._page_size
            count = min(run.length - begin, len(target) - copied)
            if count <= 0:
                break
            with memoryview(run.memory) as memory:
                target[copied : copied + count] = memory[begin : begin + count]
            self._runs.move_to_end(id(run))
            copied += count
        return copied


class ChecksumCache:
    """Page checksums of blocks, already checked against their roots."""

    def __init__(self, limit: int = CHECKSUMS_BYTES_MAX) -> None:
        self._limit = limit
        self._kept: OrderedDict[BlockName, bytes] = OrderedDict()
        self._used = 0

    def get(self, block: BlockName) -> bytes | None:
        """The checksums, if they are known."""
        found = self._kept.get(block)
        if found is not None:
            self._kept.move_to_end(block)
        return found

    def add(self, block: BlockName, checksums: bytes) -> None:
        """Keep them."""
        if block in self._kept or len(checksums) > self._limit:
            return
        self._kept[block] = checksums
        self._used += len(checksums)
        while self._used > self._limit:
            _, gone = self._kept.popitem(last=False)
            self._used -= len(gone)
