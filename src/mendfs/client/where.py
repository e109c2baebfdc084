"""Where a file's bytes are: slots, extents, and the state of every replica, for `mendfs where`."""

import asyncio
from typing import Literal

import msgspec

from mendfs.client.fetcher import Fetcher
from mendfs.client.shared import Shared
from mendfs.errors import BlockCorrupt, BlockMissing, MendfsError, ReplicaError
from mendfs.model import Extent, Inode, ServerNumber, Slot
from mendfs.transfer import BlockRef
from mendfs.wire.messages.data import BlocksHeld, HaveBlocks
from mendfs.wire.messages.meta import Extents, GetExtents

SLOTS_AT_ONCE = 1024
CHECKS_MAX = 8
"""Replicas read at once: each takes a block's memory."""
HAVE_TIMEOUT_S = 5.0

ReplicaState = Literal["ok", "missing", "corrupt", "unreachable"]


class WhereReplica(msgspec.Struct, frozen=True):
    """Replica k of a block: the copy on the k-th server of its partition's row."""

    server: ServerNumber
    replica: int
    state: ReplicaState


class WhereExtent(msgspec.Struct, frozen=True):
    """One extent and the replicas of its block."""

    extent: Extent
    replicas: tuple[WhereReplica, ...]


class WhereSlot(msgspec.Struct, frozen=True):
    """One slot that is no hole."""

    slot: Slot
    extents: tuple[WhereExtent, ...]


class Where:
    """Looks up and checks replicas."""

    def __init__(self, shared: Shared, fetcher: Fetcher) -> None:
        self._shared = shared
        self._fetcher = fetcher
        self._places = asyncio.Semaphore(CHECKS_MAX)

    async def of(self, inode: Inode, *, verify: bool) -> tuple[WhereSlot, ...]:
        """Every slot of a file."""
        result: list[WhereSlot] = []
        first = Slot(0)
        while True:
            answer = await self._shared.session.query(GetExtents(inode, first, SLOTS_AT_ONCE), Extents)
            for each in answer.slots:
                result.append(WhereSlot(each.slot, await self._extents(each.extents, verify=verify)))
            first = Slot(answer.slots_complete)
            if first * self._shared.volume.block_size >= answer.size:
                return tuple(result)

    async def _extents(self, extents: tuple[Extent, ...], *, verify: bool) -> tuple[WhereExtent, ...]:
        blocks = {(extent.partition, extent.block): extent for extent in extents}
        checked = await asyncio.gather(*[self._replicas(extent, verify=verify) for extent in blocks.values()])
        states = dict(zip(blocks, checked, strict=True))
        return tuple(WhereExtent(extent, states[extent.partition, extent.block]) for extent in extents)

    async def _replicas(self, extent: Extent, *, verify: bool) -> tuple[WhereReplica, ...]:
        row = self._shared.row(extent.partition)
        states = await asyncio.gather(*[self._state(server, extent, verify=verify) for server in row])
        return tuple(
            WhereReplica(server, number, state) for number, (server, state) in enumerate(zip(row, states, strict=True))
        )

    async def _state(self, server: ServerNumber, extent: Extent, *, verify: bool) -> ReplicaState:
        async with self._places:
            try:
                if verify:
                    ref = BlockRef(extent.partition, extent.block, extent.block_length, extent.root)
                    await self._fetcher.verify(server, ref)
                    return "ok"
                return "ok" if await self._is_held(server, extent) else "missing"
            except BlockMissing:
                return "missing"
            except BlockCorrupt:
                return "corrupt"
            except ReplicaError:
                return "unreachable"
            except MendfsError:
                return "corrupt"

    async def _is_held(self, server: ServerNumber, extent: Extent) -> bool:
        peer = await self._shared.servers.get(server).peer()
        message = HaveBlocks(((extent.partition, extent.block),))
        answer, _ = await peer.call(message, deadline_s=HAVE_TIMEOUT_S)
        return isinstance(answer, BlocksHeld) and answer.roots[0] == extent.root
