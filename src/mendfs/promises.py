"""The promises about metadata (design section 10, numbers 5 and 1) as checks of what is stored.

Pure: keys and values in, one line for each broken promise out. Simulation checks every run with it; `fsck` will.
"""

import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from mendfs.blocks import block_digest
from mendfs.extents import blocks_in, clip
from mendfs.meta import schema
from mendfs.meta.schema import Kind
from mendfs.model import ROOT_INODE, BlockId, Extent, Inode, Partition, Slot, Volume

BlockName = tuple[Partition, BlockId]


class Metadata:
    """All keys, decoded and by kind."""

    def __init__(self, pairs: Iterable[tuple[bytes, bytes]]) -> None:
        self.volume: Volume | None = None
        self.inodes: dict[Inode, schema.InodeRecord] = {}
        self.names: dict[tuple[Inode, bytes], schema.NameRecord] = {}
        self.slots: dict[tuple[Inode, Slot], tuple[Extent, ...]] = {}
        self.blocks: dict[BlockName, schema.BlockRecord] = {}
        self.tallies: dict[Partition, schema.Tally] = {}
        self.drops: Counter[BlockName] = Counter()
        self.dead: dict[BlockName, int] = {}
        self.owed: list[tuple[int, BlockName]] = []
        self.unlinked: set[Inode] = set()
        for key, value in pairs:
            self._add(key, value)

    def _add(self, key: bytes, value: bytes) -> None:
        kind, number = key[:1], schema.number_in(key) if len(key) >= 9 else 0
        match kind:
            case Kind.VOLUME if len(key) == 1:
                self.volume = schema.VOLUME.decode(value)
            case Kind.INODE:
                self.inodes[Inode(number)] = schema.INODE.decode(value)
            case Kind.NAME:
                self.names[Inode(number), schema.name_in(key)] = schema.NAME.decode(value)
            case Kind.SLOT:
                self.slots[Inode(number), schema.slot_in(key)] = schema.SLOT.decode(value)
            case Kind.BLOCK:
                name = Partition(int.from_bytes(key[1:5], "big")), BlockId(int.from_bytes(key[5:13], "big"))
                self.blocks[name] = schema.BLOCK.decode(value)
            case Kind.TALLY:
                self.tallies[Partition(int.from_bytes(key[1:5], "big"))] = schema.TALLY.decode(value)
            case Kind.DROP:
                self.drops.update(schema.DROP.decode(value).blocks)
            case Kind.DEAD:
                died, partition, block = schema.dead_in(key)
                self.dead[partition, block] = died
            case Kind.OWED:
                server, partition, block = schema.owed_in(key)
                self.owed.append((server, (partition, block)))
            case Kind.UNLINKED:
                self.unlinked.add(Inode(number))


def check_metadata(pairs: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """One line for whatever is not as it must be."""
    metadata = Metadata(pairs)
    return [*_check_tree(metadata), *_check_links(metadata), *_check_extents(metadata), *_check_blocks(metadata)]


def _check_tree(metadata: Metadata) -> Iterator[str]:
    """Promise 5: the namespace is a tree, and every inode is reachable or waits to be freed."""
    children: dict[Inode, list[Inode]] = defaultdict(list)
    for (parent, name), record in metadata.names.items():
        directory = metadata.inodes.get(parent)
        if directory is None or not stat.S_ISDIR(directory.attributes.mode):
            yield f"name {name!r} lies in inode {parent}, which is no directory"
        target = metadata.inodes.get(record.inode)
        if target is None:
            yield f"name {name!r} in directory {parent} stands for inode {record.inode}, which there is not"
        elif stat.S_IFMT(target.attributes.mode) != record.kind:
            yield f"name {name!r} in directory {parent} says another kind than inode {record.inode}"
        elif stat.S_ISDIR(target.attributes.mode) and target.parent != parent:
            yield f"directory {record.inode} is in {parent} but says that it is in {target.parent}"
        children[parent].append(record.inode)
    reached: set[Inode] = set()
    waiting = [ROOT_INODE]
    while waiting:
        inode = waiting.pop()
        if inode in reached and children.get(inode):
            yield f"directory {inode} is reached by two paths"
            continue
        reached.add(inode)
        waiting += children.get(inode, [])
    for inode in metadata.inodes:
        if inode not in reached and inode not in metadata.unlinked:
            yield f"inode {inode} has no name and does not wait to be freed"


def _check_links(metadata: Metadata) -> Iterator[str]:
    names = Counter(record.inode for record in metadata.names.values())
    directories = Counter(parent for (parent, _), record in metadata.names.items() if record.kind == stat.S_IFDIR)
    for inode, record in metadata.inodes.items():
        attributes = record.attributes
        if not stat.S_ISDIR(attributes.mode):
            wanted = names[inode]
        elif inode == ROOT_INODE or names[inode]:
            wanted = 2 + directories[inode]
        else:
            wanted = 0
        if attributes.nlink != wanted:
            yield f"inode {inode} has a link count of {attributes.nlink} instead of {wanted}"
        if attributes.nlink == 0 and inode not in metadata.unlinked:
            yield f"inode {inode} has no link and does not wait to be freed"


def _check_extents(metadata: Metadata) -> Iterator[str]:
    assert metadata.volume is not None, "what holds a volume was asked about"
    block_size = metadata.volume.block_size
    for (inode, slot), extents in metadata.slots.items():
        record = metadata.inodes.get(inode)
        if record is None:
            yield f"slot {slot} belongs to inode {inode}, which there is not"
            continue
        end = 0
        for extent in extents:
            if extent.offset_in_slot < end or extent.length <= 0 or extent.end_in_slot > block_size:
                yield f"slot {slot} of inode {inode} has extents that overlap or leave it"
            if extent.offset_in_block + extent.length > extent.block_length:
                yield f"slot {slot} of inode {inode} has an extent beyond its block"
            end = extent.end_in_slot
            block = metadata.blocks.get((extent.partition, extent.block))
            if block is None or block.died:
                yield f"slot {slot} of inode {inode} names block {extent.block:#x}, which is dead or was never there"
            elif (block.root, block.length) != (extent.root, extent.block_length):
                yield f"slot {slot} of inode {inode} and block {extent.block:#x} disagree about what the block is"
        shown = clip(extents, record.cuts, slot_start=slot * block_size)
        if shown and slot * block_size + shown[-1].end_in_slot > record.attributes.size:
            yield f"slot {slot} of inode {inode} has bytes past the file's end"


def _check_blocks(metadata: Metadata) -> Iterator[str]:
    assert metadata.volume is not None, "what holds a volume was asked about"
    references: Counter[BlockName] = Counter(metadata.drops)
    for extents in metadata.slots.values():
        references.update(blocks_in(extents))
    sums: dict[Partition, int] = defaultdict(int)
    counts: Counter[Partition] = Counter()
    for (partition, block), record in metadata.blocks.items():
        name = (partition, block)
        if not record.died and record.references != references[name]:
            yield f"block {block:#x} counts {record.references} references, but {references[name]} slots name it"
        if record.died and metadata.dead.get(name) != record.died:
            yield f"block {block:#x} is dead and does not wait to be freed"
        counts[partition] += 1
        sums[partition] += block_digest(metadata.volume.id, partition, block, record.root)
    for name, died in metadata.dead.items():
        found = metadata.blocks.get(name)
        if found is None or found.died != died:
            yield f"block {name[1]:#x} waits to be freed and is not dead"
    for partition in counts.keys() | metadata.tallies.keys():
        tally = metadata.tallies.get(partition, schema.Tally())
        if (tally.count, int.from_bytes(tally.digest, "big")) != (counts[partition], sums[partition] % (1 << 128)):
            yield f"partition {partition} does not have the blocks that its tally counts"
    for server, name in metadata.owed:
        if name not in metadata.blocks:
            yield f"server {server} is owed block {name[1]:#x}, which there is not"
