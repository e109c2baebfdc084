"""The parameters of a volume: what a user asked for, defaults for the rest, and every reason for a refusal.

Pure: a new volume's id and time come in as arguments.
"""

from typing import Any

import msgspec

from mendfs import placement
from mendfs.cluster.sizes import exact_size
from mendfs.errors import UsageError
from mendfs.model import (
    BLOCK_SIZE_MAX,
    BLOCK_SIZE_MIN,
    PARTITIONS_MAX,
    REPLICAS_MAX,
    SERVERS_MAX,
    ChecksumKind,
    KiB,
    Layout,
    MiB,
    Volume,
)

PAGES_PER_BLOCK_MAX = 16384
"""All page checksums of a block travel in one message of at most 2 MiB; with blake3 they take 32 bytes each."""
PAGE_SIZE_DEFAULT = 16 * KiB
"""A 4 KiB read verifies 16 KiB (2 us); smaller pages make a 4 MiB block carry more than 2 KiB of checksums."""
BLOCK_SIZE_DEFAULT = 4 * MiB
REPLICAS_DEFAULT = 3
"""Or as many as there are servers, if they are fewer."""


class VolumeWishes(msgspec.Struct, frozen=True, kw_only=True):
    """What was said on the command line; None: not said."""

    servers: int | None = None
    replicas: int | None = None
    block_size: int | None = None
    page_size: int | None = None
    partitions: int | None = None
    layout: Layout | None = None
    checksum: ChecksumKind | None = None
    write_quorum: int | None = None
    read_quorum: int | None = None


def _said(value: int | None, default: int) -> int:
    return default if value is None else value


def _within(option: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        show = exact_size if option.endswith("size") else str
        raise UsageError(f"--{option} {show(value)} is not possible: it must be from {show(least)} to {show(most)}")


def new_volume(wishes: VolumeWishes, *, volume_id: str, now_ns: int) -> Volume:
    """The volume that is asked for. Raises UsageError if there can be none."""
    layout: Layout = wishes.layout or "ring"
    servers = _said(wishes.servers, 4)
    replicas = _said(wishes.replicas, 2 if layout == "pairs" else max(1, min(REPLICAS_DEFAULT, servers)))
    block_size = _said(wishes.block_size, BLOCK_SIZE_DEFAULT)
    _within("servers", servers, 1, SERVERS_MAX)
    _within("replicas", replicas, 1, REPLICAS_MAX)
    _within("block-size", block_size, BLOCK_SIZE_MIN, BLOCK_SIZE_MAX)
    partitions = _said(wishes.partitions, placement.default_partitions(servers))
    _within("partitions", partitions, 1, PARTITIONS_MAX)
    page_size = _said(wishes.page_size, default_page_size(block_size))
    _check_page_size(page_size, block_size)
    write_quorum = _said(wishes.write_quorum, replicas // 2 + 1)
    read_quorum = _said(wishes.read_quorum, 1)
    _within("write-quorum", write_quorum, 1, replicas)
    _within("read-quorum", read_quorum, 1, replicas)
    placement.check_parameters(layout=layout, servers=servers, replicas=replicas, partitions=partitions)
    return Volume(
        id=volume_id,
        block_size=block_size,
        page_size=page_size,
        replicas=replicas,
        partitions=partitions,
        checksum=wishes.checksum or "xxh3",
        layout=layout,
        write_quorum=write_quorum,
        read_quorum=read_quorum,
        server_count=servers,
        created_ns=now_ns,
    )


def default_page_size(block_size: int) -> int:
    """The largest divisor of the block size that is no more than PAGE_SIZE_DEFAULT; any block size has one."""
    most = min(PAGE_SIZE_DEFAULT, block_size)
    return next(page for page in range(most, 0, -1) if block_size % page == 0)


def _check_page_size(page_size: int, block_size: int) -> None:
    _within("page-size", page_size, 1, block_size)
    said = f"--page-size {exact_size(page_size)}"
    if block_size % page_size:
        raise UsageError(f"{said} does not divide the block size, {exact_size(block_size)}: choose one that does")
    if block_size // page_size > PAGES_PER_BLOCK_MAX:
        least = exact_size(-(-block_size // PAGES_PER_BLOCK_MAX))
        raise UsageError(f"{said} is too small for blocks of {exact_size(block_size)}: at least {least}")


def check_same(wishes: VolumeWishes, volume: Volume, *, where: str) -> None:
    """Raise UsageError if something was asked for that the volume is not."""
    has: dict[str, Any] = {
        "servers": volume.server_count,
        "replicas": volume.replicas,
        "block_size": volume.block_size,
        "page_size": volume.page_size,
        "partitions": volume.partitions,
        "layout": volume.layout,
        "checksum": volume.checksum,
        "write_quorum": volume.write_quorum,
        "read_quorum": volume.read_quorum,
    }
    for name, value in has.items():
        wanted = getattr(wishes, name)
        if wanted is not None and wanted != value:
            option = "--" + name.replace("_", "-")
            show = exact_size if name.endswith("_size") else str
            raise UsageError(
                f"{option} {show(wanted)} was asked for, but the volume in {where} was formatted with {option} "
                f"{show(value)}: "
                f"leave the option out, or choose another folder with --dir"
            )
