"""What the commands that look at a cluster ask its servers, and the documents they make of the answers."""

import os
from typing import Any

from mendfs.cli.file_text import json_name
from mendfs.cli.options import Located, why_silent
from mendfs.client.paths import resolve
from mendfs.client.volume import Volume
from mendfs.client.where import WhereSlot
from mendfs.cluster.folder import read_secret
from mendfs.cluster.query import ask, connect_as_tool
from mendfs.errors import Unreachable, UsageError
from mendfs.model import BlockId, Partition
from mendfs.wire.messages.data import Contents, HeldBlock, ListContents
from mendfs.wire.messages.meta import BlocksLocated, GetStatus, LocateBlocks, StatusReport
from mendfs.wire.peer import Peer
from mendfs.world import World, real_world

BLOCKS_AT_ONCE = 1000
VERIFY_TIMEOUT_S = 600.0
"""A thousand blocks of 16 MiB, read and checked at 30 MiB/s."""


async def _ask_meta(world: World, located: Located) -> Peer:
    try:
        return await connect_as_tool(world, located.meta, read_secret(world.disk, located.secret_path))
    except Unreachable as error:
        raise why_silent(located, error) from error


async def status_of(located: Located) -> dict[str, Any]:
    """The status document."""
    peer = await _ask_meta(real_world(), located)
    try:
        return (await ask(peer, GetStatus(), StatusReport)).document
    finally:
        await peer.close()


def find_server(servers: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The server with this number or id."""
    for server in servers:
        if name in (str(server["number"]), server["id"]):
            return server
    numbers = ", ".join(str(server["number"]) for server in servers) or "none"
    raise UsageError(f"there is no data server {name!r}: the servers are {numbers}")


async def contents_of(located: Located, name: str, *, verify: bool) -> list[dict[str, Any]]:
    """Every block on one server, with the number of the replica that it is there."""
    world = real_world()
    meta = await _ask_meta(world, located)
    try:
        server = find_server((await ask(meta, GetStatus(), StatusReport)).document["servers"], name)
        data = await connect_as_tool(world, server["address"], read_secret(world.disk, located.secret_path))
        try:
            return await _list_blocks(meta, data, server["number"], verify=verify)
        finally:
            await data.close()
    finally:
        await meta.close()


async def _list_blocks(meta: Peer, data: Peer, number: int, *, verify: bool) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    after = (Partition(0), BlockId(0))
    while True:
        question = ListContents(*after, limit=BLOCKS_AT_ONCE, verify=verify)
        page = await ask(data, question, Contents, deadline_s=VERIFY_TIMEOUT_S)
        held = page.blocks
        rows = await ask(meta, LocateBlocks(tuple((block.partition, block.block) for block in held)), BlocksLocated)
        for block, row in zip(held, rows.rows, strict=True):
            blocks.append(_block_document(block, {int(server): replica for server, replica, _ in row}.get(number)))
        if page.complete or not held:
            return blocks
        after = (held[-1].partition, held[-1].block)


def _block_document(block: HeldBlock, replica: int | None) -> dict[str, Any]:
    return {
        "partition": block.partition,
        "id": block.block,
        "inode": block.inode,
        "slot": block.slot,
        "replica": replica,  # None: the table does not want it here
        "length": block.length,
        "ok": block.ok,
    }


async def where_of(volume: Volume, inside: str, *, verify: bool) -> dict[str, Any]:
    """Where each block of a file is."""
    attributes = await resolve(volume, inside)
    return {
        "path": json_name(os.fsencode(inside))["name"],
        "inode": attributes.inode,
        "size": attributes.size,
        "block_size": volume.parameters.block_size,
        "slots": [_slot_document(slot) for slot in await volume.where(attributes.inode, verify=verify)],
    }


def _slot_document(slot: WhereSlot) -> dict[str, Any]:
    return {
        "slot": slot.slot,
        "extents": [
            {
                "offset": found.extent.offset_in_slot,
                "length": found.extent.length,
                "block": found.extent.block,
                "partition": found.extent.partition,
                "replicas": [
                    {"server": replica.server, "replica": replica.replica, "state": replica.state}
                    for replica in found.replicas
                ],
            }
            for found in slot.extents
        ],
    }
