"""Granting inode and block ids to sessions in ranges, as functions over a transaction (design section 5, Numbers).

A grant is synced before it is answered: a range that a power cut made the server forget would be granted twice, and two
sessions would write different blocks under one id.
"""

import msgspec

from mendfs.errors import CommitRefused, SessionLost, UsageError
from mendfs.kv.engine import Transaction
from mendfs.meta import schema
from mendfs.meta.schema import RANGE_BITS, RANGE_IDS
from mendfs.model import COUNTER_BITS, BlockId, Generation, SessionId
from mendfs.wire.messages import session as messages

RANGES_MAX = 32
"""Ranges of one kind a session may hold: ending it must fit one transaction."""


async def find_session(tx: Transaction, session: SessionId) -> schema.SessionRecord:
    """A living session's record. Raises SessionLost."""
    raw = await tx.get(schema.session_key(session))
    if raw is None:
        raise SessionLost(f"session {session} has ended")
    return schema.SESSION.decode(raw)


async def check_owned(tx: Transaction, kind: str, number: int, session: SessionId) -> None:
    """Raise CommitRefused unless `number` lies in a range of the session."""
    raw = await tx.get(schema.range_key(kind, number >> RANGE_BITS))
    if raw is None or int.from_bytes(raw, "big") != session:
        raise CommitRefused(f"{kind} id {number:#x} was not granted to session {session}")


async def grant(
    tx: Transaction, session: SessionId, request: messages.GrantIds, generation: Generation
) -> messages.IdsGranted:
    """One more range. Ranges that lie below the lowest id in flight are given back. Sync before answering."""
    if request.kind not in ("block", "inode"):
        raise UsageError(f"there are no ids of kind {request.kind!r}")
    record = await find_session(tx, session)
    held = record.block_ranges if request.kind == "block" else record.inode_ranges
    kept = []
    for index in held:
        if (index + 1) << RANGE_BITS <= request.lowest_in_flight:
            tx.delete(schema.range_key(request.kind, index))
        else:
            kept.append(index)
    if len(kept) >= RANGES_MAX:
        raise CommitRefused(f"session {session} holds {len(kept)} {request.kind} ranges; use their ids first")
    raw = await tx.get(schema.counter_key(request.kind))
    counter = RANGE_IDS if raw is None else schema.NUMBER.decode(raw)
    first = (generation << COUNTER_BITS) + counter if request.kind == "block" else counter
    tx.put(schema.counter_key(request.kind), schema.NUMBER.encode(counter + RANGE_IDS))
    tx.put(schema.range_key(request.kind, first >> RANGE_BITS), session.to_bytes(8, "big"))
    kept.append(first >> RANGE_BITS)
    if request.kind == "block":
        lowest = BlockId(max(record.lowest_block, request.lowest_in_flight))
        record = msgspec.structs.replace(record, block_ranges=tuple(kept), lowest_block=lowest)
    else:
        record = msgspec.structs.replace(record, inode_ranges=tuple(kept))
    tx.put(schema.session_key(session), schema.SESSION.encode(record))
    return messages.IdsGranted(first, RANGE_IDS)


async def end(tx: Transaction, session: SessionId, now_ns: int) -> None:
    """End a session: its ranges go in this one transaction, so no commit of it can come after."""
    raw = await tx.get(schema.session_key(session))
    if raw is None:
        return
    record = schema.SESSION.decode(raw)
    for index in record.block_ranges:
        tx.delete(schema.range_key("block", index))
    for index in record.inode_ranges:
        tx.delete(schema.range_key("inode", index))
    tx.delete(schema.session_key(session))
    tx.put(schema.ended_key(session), schema.NUMBER.encode(now_ns))
