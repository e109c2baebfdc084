"""Punching holes: a range of a file that reads as zeros and holds nothing, as functions over a transaction.

Unlike a truncation this is no cut: the size stays, and a range has two ends. One transaction does a bounded number of
slots and says where to go on; each is complete in itself, so a client that dies in between leaves a shorter hole.
"""

import errno
import stat

from mendfs.errors import OperationError
from mendfs.extents import clip, punch
from mendfs.kv.engine import Transaction
from mendfs.meta import schema
from mendfs.meta.blocks import store_slot
from mendfs.meta.commit import EXTENTS_MAX
from mendfs.meta.inodes import changed, find, visible, write
from mendfs.model import Slot, Volume
from mendfs.wire.messages import meta as messages

SLOTS_A_STEP = 20
"""Slots changed in one transaction: two keys each, and the inode's."""


async def punch_range(tx: Transaction, request: messages.Punch, volume: Volume) -> messages.Punched:
    """Take [begin, end) out of the next slots that hold something. Raises EINVAL, ENOENT."""
    record = await find(tx, request.inode)
    if not stat.S_ISREG(record.attributes.mode) or not 0 <= request.begin <= request.end:
        raise OperationError(errno.EINVAL, f"inode {request.inode}")
    block_size = volume.block_size
    first, last = Slot(request.begin // block_size), Slot(-(-request.end // block_size))
    found = await tx.range(*schema.slots_of(request.inode, first, last), limit=SLOTS_A_STEP)
    next_byte = request.end
    if len(found) == SLOTS_A_STEP:
        next_byte = min(request.end, (schema.slot_in(found[-1][0]) + 1) * block_size)
    lost = extents = 0
    for part, (key, raw) in enumerate(found):
        stored = schema.SLOT.decode(raw)
        start = schema.slot_in(key) * block_size
        extents += len(stored)
        if part and extents > EXTENTS_MAX:
            # The transaction must stay below the engine's limit: the rest comes with the next one.
            next_byte = start
            break
        kept = punch(clip(stored, record.cuts, slot_start=start), request.begin - start, request.end - start)
        lost -= store_slot(tx, key, stored, kept, part=part)
    record = changed(
        record,
        stored=max(0, record.attributes.stored - lost),
        mtime_ns=request.now_ns,
        ctime_ns=request.now_ns,
        version=tx.sequence(),
    )
    write(tx, record)
    return messages.Punched(visible(record), next_byte, tx.sequence())
