"""Messages to data servers, and what data servers tell the meta server."""

import msgspec

from mendfs.model import (
    BlockId,
    CommitSequence,
    Epoch,
    Generation,
    Incarnation,
    Inode,
    Partition,
    ServerNumber,
    Slot,
    StoreHealth,
    Volume,
)


class PutBlock(msgspec.Struct, frozen=True, tag="put_block", forbid_unknown_fields=True):
    """Client -> data server, the block's bytes as payload. Answer: `Stored`, after the write or, with `sync`, the sync.

    A block already held with the same root is answered as stored; with another root it is refused (BlockConflict).
    The server computes the page checksums of what arrived: an acknowledged replica has `root`.
    """

    partition: Partition
    block: BlockId
    inode: Inode
    slot: Slot
    root: bytes
    sync: bool = False


class Stored(msgspec.Struct, frozen=True, tag="stored", forbid_unknown_fields=True):
    """The block is written (not yet durable unless `sync` was asked for)."""

    incarnation: Incarnation
    epoch: Epoch


class GetBlock(msgspec.Struct, frozen=True, tag="get_block", forbid_unknown_fields=True):
    """Anyone -> data server. Answer: `BlockPages` with the pages' bytes as payload, or BlockMissing, BlockCorrupt.

    The server checks the record's header, not the pages: the reader verifies them against the root it knows.
    """

    partition: Partition
    block: BlockId
    first_page: int
    page_count: int
    """Fewer pages come where the block ends."""
    with_checksums: bool = True


class BlockPages(msgspec.Struct, frozen=True, tag="block_pages", forbid_unknown_fields=True):
    """`length` is the whole block's; `checksums` are all its page checksums, or empty if not asked for."""

    length: int
    checksums: bytes
    epoch: Epoch


class SyncStore(msgspec.Struct, frozen=True, tag="sync_store", forbid_unknown_fields=True):
    """Anyone -> data server: make everything put before durable. Answer: `Synced`, or StoreFailed."""


class Synced(msgspec.Struct, frozen=True, tag="synced", forbid_unknown_fields=True):
    """Counts for a block only if its put was answered with the same incarnation."""

    incarnation: Incarnation


class HaveBlocks(msgspec.Struct, frozen=True, tag="have_blocks", forbid_unknown_fields=True):
    """Which of these (partition, id) are held? Answer: `BlocksHeld`."""

    blocks: tuple[tuple[Partition, BlockId], ...]


class BlocksHeld(msgspec.Struct, frozen=True, tag="blocks_held", forbid_unknown_fields=True):
    """The root of each block asked for, in order; None where it is not held."""

    roots: tuple[bytes | None, ...]
    incarnation: Incarnation


class DeleteBlocks(msgspec.Struct, frozen=True, tag="delete_blocks", forbid_unknown_fields=True):
    """Meta server -> data server. Answer: `Deleted`, or Fenced if an order with a higher pair was obeyed before."""

    generation: Generation
    sequence: CommitSequence
    """The highest commit sequence known to be synced."""
    blocks: tuple[tuple[Partition, BlockId], ...]


class Deleted(msgspec.Struct, frozen=True, tag="deleted", forbid_unknown_fields=True):
    """They are gone; those never held count as gone."""

    held: int


class ListContents(msgspec.Struct, frozen=True, tag="list_contents", forbid_unknown_fields=True):
    """The blocks after (partition, id), in that order. Answer: `Contents`."""

    after_partition: Partition = Partition(0)
    after_block: BlockId = BlockId(0)
    limit: int = 1000
    verify: bool = False
    """Read every block and check it: else `ok` says only that the index has it."""
    partition: Partition | None = None
    """Only this partition."""


class HeldBlock(msgspec.Struct, frozen=True, array_like=True):
    """One block of a store."""

    partition: Partition
    block: BlockId
    inode: Inode
    slot: Slot
    length: int
    root: bytes
    ok: bool


class Contents(msgspec.Struct, frozen=True, tag="contents", forbid_unknown_fields=True):
    """`complete` when nothing follows the last block."""

    blocks: tuple[HeldBlock, ...]
    complete: bool


class GetInventory(msgspec.Struct, frozen=True, tag="get_inventory", forbid_unknown_fields=True):
    """Count and sum of each id range of some partitions. Answer: `InventorySums`."""

    partitions: tuple[Partition, ...]


class InventorySum(msgspec.Struct, frozen=True, array_like=True):
    """One (partition, id range): how many blocks, and the sum of their keyed 128-bit hashes."""

    partition: Partition
    id_range: int
    count: int
    digest: bytes


class InventorySums(msgspec.Struct, frozen=True, tag="inventory_sums", forbid_unknown_fields=True):
    """Only ranges that hold something."""

    sums: tuple[InventorySum, ...]
    incarnation: Incarnation


class GetHealth(msgspec.Struct, frozen=True, tag="get_health", forbid_unknown_fields=True):
    """Anyone -> data server. Answer: `HealthReport`."""


class HealthReport(msgspec.Struct, frozen=True, tag="health_report", forbid_unknown_fields=True):
    """A data server's account of itself."""

    incarnation: Incarnation
    health: StoreHealth
    pid: int


class RegisterServer(msgspec.Struct, frozen=True, tag="register_server", forbid_unknown_fields=True):
    """Data server -> meta server, first on each connection. Answer: `Registered`.

    The meta server calls it over this connection from then on.
    """

    id: str
    address: str
    zone: str
    incarnation: Incarnation
    pid: int
    capacity: int
    """Bytes it may use; 0 for what its disk has."""
    wanted_number: ServerNumber | None
    """The number it has, or would like to have on a new volume."""
    highest_generation: Generation
    """The highest generation it ever obeyed or stored: a restored meta server must start above it."""
    health: StoreHealth


class Registered(msgspec.Struct, frozen=True, tag="registered", forbid_unknown_fields=True):
    """The server's number and the volume's parameters."""

    number: ServerNumber
    volume: Volume
    epoch: Epoch
    generation: Generation


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat", forbid_unknown_fields=True):
    """Data server -> meta server twice a second. Answer: `HeartbeatSeen`."""

    incarnation: Incarnation
    health: StoreHealth


class HeartbeatSeen(msgspec.Struct, frozen=True, tag="heartbeat_seen", forbid_unknown_fields=True):
    """What a data server puts into its answers."""

    epoch: Epoch
    generation: Generation


DataMessage = (
    PutBlock
    | Stored
    | GetBlock
    | BlockPages
    | SyncStore
    | Synced
    | HaveBlocks
    | BlocksHeld
    | DeleteBlocks
    | Deleted
    | ListContents
    | Contents
    | GetInventory
    | InventorySums
    | GetHealth
    | HealthReport
    | RegisterServer
    | Registered
    | Heartbeat
    | HeartbeatSeen
)
