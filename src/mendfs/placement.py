"""Which servers hold which partition. Pure functions on plain values (design section 3).

A table has P partitions, each with R distinct servers, replica 0 first. Nothing here does I/O, reads a clock or draws
a random number, so every claim is a property test. `spread` is weighted rendezvous hashing (Thaler and Ravishankar
1998; the weights as in Schindelhauer and Schomaker 2005) over zones first and servers inside a zone second.
"""

import math
import struct
from collections.abc import Mapping, Sequence

import msgspec
from xxhash import xxh3_64_intdigest

from mendfs.errors import UsageError
from mendfs.model import Entry, Inode, Layout, Partition, Row, ServerNumber, Slot

PARTITIONS_AIM = 1024
"""Partitions of a volume unless said otherwise, rounded up to a multiple of the server count."""


class Candidate(msgspec.Struct, frozen=True):
    """A server that may get partitions; `weight` is its capacity in any one unit."""

    number: ServerNumber
    zone: str
    weight: float = 1.0


def hash_of(inode: Inode) -> int:
    """64 bits of an inode number: rename moves no block, for names have no part in it."""
    return xxh3_64_intdigest(struct.pack(">Q", inode))


def partition_of(inode: Inode, slot: Slot, partitions: int) -> Partition:
    """Where a new block of `slot` goes; fixed in the extent from then on, never computed again."""
    return Partition((hash_of(inode) + slot) % partitions)


def default_partitions(server_count: int) -> int:
    """About 1,024, a multiple of the server count so that a ring closes evenly."""
    return server_count * -(-PARTITIONS_AIM // server_count)


def check_parameters(*, layout: Layout, servers: int, replicas: int, partitions: int) -> None:
    """Raise UsageError, saying what to change, if no table can be made with these parameters."""
    if replicas > servers:
        raise UsageError(f"{replicas} replicas need at least {replicas} servers; there are {servers}")
    if partitions % servers:
        raise UsageError(
            f"{partitions} partitions are not a multiple of {servers} servers; "
            f"use --partitions {default_partitions(servers)}"
        )
    if layout == "pairs" and (replicas != 2 or servers % 2):
        raise UsageError("layout pairs mirrors servers two by two: it needs --replicas 2 and an even number of servers")


def _ring(servers: Sequence[Candidate], replicas: int, partitions: int) -> list[list[ServerNumber]]:
    numbers = [server.number for server in servers]
    return [[numbers[(p + k) % len(numbers)] for k in range(replicas)] for p in range(partitions)]


def _pairs(servers: Sequence[Candidate], partitions: int) -> list[list[ServerNumber]]:
    numbers = [server.number for server in servers]
    rows = []
    for p in range(partitions):
        pair, turn = p % (len(numbers) // 2), (p // (len(numbers) // 2)) % 2
        first, second = numbers[2 * pair], numbers[2 * pair + 1]
        rows.append([second, first] if turn else [first, second])
    return rows


def _score(partition: int, name: str, weight: float) -> float:
    draw = xxh3_64_intdigest(f"{partition}/{name}".encode())
    return -weight / math.log((draw + 0.5) / 2.0**64)


def _rendezvous(partition: int, servers: Sequence[Candidate], replicas: int) -> list[ServerNumber]:
    zones: dict[str, list[Candidate]] = {}
    for server in servers:
        zones.setdefault(server.zone, []).append(server)
    weights = {zone: sum(server.weight for server in members) for zone, members in zones.items()}
    for members in zones.values():
        members.sort(key=lambda server: _score(partition, f"server {server.number}", server.weight), reverse=True)
    ranked = sorted(zones, key=lambda zone: _score(partition, f"zone {zone}", weights[zone]), reverse=True)
    row: list[ServerNumber] = []
    # One server from each zone per turn: two replicas share a zone only when every zone already has one.
    turn = 0
    while len(row) < replicas:
        for zone in ranked:
            if turn < len(zones[zone]) and len(row) < replicas:
                row.append(zones[zone][turn].number)
        turn += 1
    return row


def first_table(layout: Layout, servers: Sequence[Candidate], *, replicas: int, partitions: int) -> tuple[Row, ...]:
    """The rows of a new volume. Raises UsageError if the parameters allow none."""
    check_parameters(layout=layout, servers=len(servers), replicas=replicas, partitions=partitions)
    ordered = sorted(servers, key=lambda server: server.number)
    match layout:
        case "ring":
            rows = _ring(ordered, replicas, partitions)
        case "pairs":
            rows = _pairs(ordered, partitions)
        case "spread":
            rows = [_rendezvous(p, ordered, replicas) for p in range(partitions)]
    return tuple(tuple(Entry(number) for number in row) for row in rows)


def load(rows: Sequence[Row]) -> Mapping[ServerNumber, int]:
    """Partitions that each server of the table holds."""
    count: dict[ServerNumber, int] = {}
    for row in rows:
        for entry in row:
            count[entry.server] = count.get(entry.server, 0) + 1
    return count
