"""The document that `mendfs status --json` prints (the command line's contract), from what the meta server knows."""

from collections.abc import Sequence
from typing import Any

import msgspec

from mendfs.kv.engine import Transaction, run
from mendfs.meta import schema
from mendfs.meta.members import Member
from mendfs.meta.state import State
from mendfs.model import BlockId, Partition, ServerNumber
from mendfs.wire.messages import meta as messages

OWED_COUNTED_MAX = 1_000_000
"""Debts are counted one by one up to here; a status must not hold up the server for ever."""
_PAGE = 5000


async def _count_owed(tx: Transaction) -> tuple[int, int]:
    """(debts, blocks that are owed at least once)."""
    begin, end = schema.all_of(schema.Kind.OWED)
    debts = 0
    blocks: set[tuple[Partition, BlockId]] = set()
    while debts < OWED_COUNTED_MAX:
        found = await tx.range(begin, end, limit=_PAGE)
        debts += len(found)
        blocks.update(schema.owed_in(key)[1:] for key, _ in found)
        if len(found) < _PAGE:
            break
        begin = found[-1][0] + b"\0"
    return debts, len(blocks)


async def _count_blocks(tx: Transaction) -> tuple[int, int]:
    """(live blocks, dead ones that wait for a freeing round)."""
    begin, end = schema.all_of(schema.Kind.TALLY)
    known = 0
    while found := await tx.range(begin, end, limit=_PAGE):
        known += sum(schema.TALLY.decode(raw).count for _, raw in found)
        begin = found[-1][0] + b"\0"
    begin, end = schema.all_of(schema.Kind.DEAD)
    dead = 0
    while found := await tx.range(begin, end, limit=_PAGE):
        dead += len(found)
        begin = found[-1][0] + b"\0"
    return known - dead, dead


def _server(member: Member) -> dict[str, Any]:
    health = member.health
    # `status` knows four states; a suspect server is one that does not answer right now.
    state = {"suspect": "down"}.get(member.state(), member.state())
    counters = ("blocks", "bytes_used", "bytes_free", "reads", "writes", "mended", "corrupt_found")
    return {
        "number": member.number,
        "id": member.id,
        "address": member.address,
        "zone": member.zone,
        "pid": member.pid,
        "state": state,
        "suspect": member.state() == "suspect",
        **{name: 0 if health is None else getattr(health, name) for name in counters},
        "troubles": [] if health is None else list(health.troubles),
    }


def _health(state: State, servers: list[dict[str, Any]], debts: int) -> str:
    if state.troubles:
        return "at-risk"
    missing = any(server["state"] == "down" or server["troubles"] for server in servers)
    return "degraded" if debts or missing or state.table is None else "whole"


async def status_document(state: State) -> dict[str, Any]:
    """The whole document. Blocks are counted in the metadata; of replicas it says what the last comparison knew."""
    (debts, under), _ = await run(state.engine, _count_owed)
    (live, garbage), _ = await run(state.engine, _count_blocks)
    servers = [_server(member) for member in state.members]
    corrupt = sum(server["corrupt_found"] for server in servers)
    return {
        "volume": msgspec.to_builtins(state.volume),
        "health": _health(state, servers, debts),
        "epoch": state.epoch,
        "generation": state.generation,
        "sequence": state.engine.last_sequence,
        "synced_sequence": state.engine.synced_sequence,
        "sessions": [{"id": s.id, "client": s.client, "connected": s.peer is not None} for s in state.sessions.all()],
        "servers": servers,
        "blocks": {
            "live": live,
            "under_replicated": under,
            "corrupt": corrupt,
            "garbage": garbage,
            "lost": 0,
        },
        "owed": debts,
        "mending": {"blocks_left": under, "bytes_left": 0, "bytes_per_second": 0},
        "troubles": [*([] if state.table is not None else [state.awaited]), *sorted(state.troubles.values())],
    }


async def locate(
    tx: Transaction, blocks: tuple[tuple[Partition, BlockId], ...]
) -> tuple[tuple[tuple[ServerNumber, int, bool], ...], ...]:
    """For each block its row: (server, replica number, owed)."""
    located = []
    for partition, block in blocks:
        raw = await tx.get(schema.row_key(partition))
        row = () if raw is None else schema.ROW.decode(raw)
        entries = []
        for replica, entry in enumerate(row):
            owed = await tx.get(schema.owed_key(entry.server, partition, block)) is not None
            entries.append((entry.server, replica, owed))
        located.append(tuple(entries))
    return tuple(located)


def volume_stat(state: State, files: int) -> messages.VolumeStat:
    """What fits with R copies on the servers that are up, in bytes of user data."""
    healths = [member.health for member in state.members if not member.down and member.health is not None]
    replicas = state.volume.replicas
    free = room_for_copies([health.bytes_free for health in healths], replicas)
    used = sum(health.bytes_used for health in healths) // replicas
    return messages.VolumeStat(bytes_total=free + used, bytes_free=free, files=files)


def room_for_copies(free: Sequence[int], replicas: int) -> int:
    """The bytes of which each can be stored on `replicas` different servers, or on all if there are fewer.

    A server with more room than all others together cannot use it: each byte's other copies lie elsewhere.
    """
    left = sorted(free, reverse=True)
    copies = min(replicas, len(left))
    while copies > 1 and left[0] * copies > sum(left):
        left.pop(0)
        copies -= 1
    return sum(left) // copies if copies else 0
