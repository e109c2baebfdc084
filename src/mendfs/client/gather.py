"""Which pages to ask a block for, when many small pieces of it are wanted at once. Pure.

A random writer's block holds its pieces one after the other, so what lies side by side in the file lies scattered over
a few blocks: asking for each piece by itself would be a request for each, and most pages would come several times.
"""

from collections.abc import Iterable

import msgspec

from mendfs.model import BlockId, Extent, KiB, MiB, Partition
from mendfs.transfer import BlockRef

BlockName = tuple[Partition, BlockId]

GAP_BYTES = 64 * KiB
"""Bytes fetched for nothing rather than ask twice: about what a request costs."""
RUN_BYTES_MAX = MiB
"""A longer run is asked for in parts, at once: they come from several replicas."""


class Want(msgspec.Struct, frozen=True):
    """Bytes of a block, and where they go."""

    extent: Extent
    offset_in_block: int
    target: memoryview

    @property
    def end_in_block(self) -> int:
        """The first byte of the block after those wanted."""
        return self.offset_in_block + len(self.target)


def ref_of(extent: Extent) -> BlockRef:
    """The block an extent names."""
    return BlockRef(extent.partition, extent.block, extent.block_length, extent.root)


def by_block(wants: Iterable[Want]) -> list[list[Want]]:
    """The wants of each block, in the block's order."""
    found: dict[BlockName, list[Want]] = {}
    for want in wants:
        found.setdefault((want.extent.partition, want.extent.block), []).append(want)
    return [sorted(each, key=lambda want: want.offset_in_block) for each in found.values()]


def page_runs(spans: Iterable[tuple[int, int]], page_size: int) -> list[tuple[range, int]]:
    """Runs of pages that hold these (begin, end) of one block, and how many of them each run holds, whole.

    `spans` are in the block's order.
    """
    gap = GAP_BYTES // page_size
    most = max(1, RUN_BYTES_MAX // page_size)
    runs: list[tuple[range, int]] = []
    for begin, end in spans:
        first, stop = begin // page_size, -(-end // page_size)
        if runs:
            pages, count = runs[-1]
            joined = range(pages.start, max(pages.stop, stop))
            if first < pages.stop or (first <= pages.stop + gap and len(joined) <= most):
                runs[-1] = joined, count + 1
                continue
        runs.append((range(first, stop), 1))
    return runs
