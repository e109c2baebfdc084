"""Bugs planted on purpose, one at a time: what the simulation is worth is which of them it finds.

Each replaces one function of production code by one that lacks a safety rule of design sections 4 to 6. Only tests and
`mendfs simulate --planted` use this; production code knows nothing of it.
"""

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mendfs import transfer
from mendfs.client import uploader
from mendfs.data import index as data_index
from mendfs.data import server as data_server
from mendfs.data import syncing
from mendfs.kv.engine import run
from mendfs.meta import background, blocks, commit, freeing, ranges, registry, server, sessions
from mendfs.meta import truncate as truncation
from mendfs.sim.planted_edits import EDITS, edited

Patch = tuple[Any, str, Any]
"""Object, attribute, replacement."""


def _delete_before_the_log_is_synced() -> list[Patch]:
    async def free_round(state: Any) -> bool:
        noted = state.engine.last_sequence
        dead, _ = await run(state.engine, freeing.dead_blocks, noted, background.DEAD_A_ROUND)
        if not dead:
            return False
        orders, _ = await run(state.engine, freeing.holders, dead)
        synced = state.engine.synced_sequence
        await asyncio.gather(*(background._delete_on(state, number, names, synced) for number, names in orders.items()))
        step = freeing.BLOCKS_FORGOTTEN_A_STEP
        for start in range(0, len(dead), step):
            await run(state.engine, freeing.forget, dead[start : start + step], state.volume.id)
        return True

    return [(background, "free_round", free_round)]


def _sync_counts_although_the_server_restarted() -> list[Patch]:
    def draw_incarnation(rng: Any) -> Any:
        return 1

    return [(syncing, "draw_incarnation", draw_incarnation), (data_server, "draw_incarnation", draw_incarnation)]


def _datasync_is_tried_again() -> list[Patch]:
    async def give_up(self: Any, segment: Any, taken: Any, error: OSError) -> None:
        return

    return [(syncing.Syncing, "give_up", give_up)]


def _range_granted_unsynced() -> list[Patch]:
    async def grant_ids(self: Any, peer: Any, request: Any) -> Any:
        session = self.session_of(peer)
        return (await run(self._state.engine, ranges.grant, session.id, request, self._state.generation))[0]

    return [(registry.Registry, "_grant_ids", grant_ids)]


def _commit_of_an_ended_session() -> list[Patch]:
    async def find_session(tx: Any, session: Any) -> Any:
        return None

    async def check_owned(tx: Any, kind: str, number: int, session: Any) -> None:
        return

    def session_of(self: Any, peer: Any) -> Any:
        return peer.context

    return [
        (sessions, "find_session", find_session),
        (commit, "check_owned", check_owned),
        (registry.Registry, "session_of", session_of),
    ]


def _commit_before_quorum() -> list[Patch]:
    def has_quorum(self: Any, upload: Any) -> bool:
        return bool(upload.acknowledged)

    async def wait_for_others(self: Any, upload: Any, quorum_took_s: float) -> None:
        return

    real = blocks.add_block

    async def add_block(tx: Any, new: Any, **how: Any) -> None:
        await real(tx, new, **{**how, "write_quorum": 1})

    return [
        (uploader.Uploader, "_has_quorum", has_quorum),
        (uploader.Uploader, "_wait_for_others", wait_for_others),
        (commit, "add_block", add_block),
    ]


def _cut_ignored() -> list[Patch]:
    def clip(extents: Any, cuts: Any, *, slot_start: int) -> Any:
        return extents

    return [(commit, "clip", clip), (truncation, "clip", clip)]


def _verification_skipped() -> list[Patch]:
    def bad_pages(*_: Any, **__: Any) -> list[int]:
        return []

    def check_root(*_: Any, **__: Any) -> None:
        return

    return [(transfer, "bad_pages", bad_pages), (transfer, "check_root", check_root)]


def _request_done_twice() -> list[Patch]:
    async def answered_once(tx: Any, session: Any, at: Any, operation: Any) -> Any:
        await ranges.find_session(tx, session)
        return await operation(tx)

    return [(server, "answered_once", answered_once)]


def _index_believed_past_the_checkpoint() -> list[Patch]:
    async def journal(self: Any, begin: Any) -> list[Any]:
        return []

    return [(data_index.Index, "journal", journal)]


PLANTED: dict[str, Callable[[], list[Patch]]] = {
    "delete-before-log-synced": _delete_before_the_log_is_synced,
    "sync-counts-after-restart": _sync_counts_although_the_server_restarted,
    "datasync-retried": _datasync_is_tried_again,
    "range-granted-unsynced": _range_granted_unsynced,
    "commit-of-ended-session": _commit_of_an_ended_session,
    "commit-before-quorum": _commit_before_quorum,
    "cut-ignored": _cut_ignored,
    "verification-skipped": _verification_skipped,
    "request-done-twice": _request_done_twice,
    "index-believed-past-checkpoint": _index_believed_past_the_checkpoint,
    **{name: edited(name) for name in EDITS},
}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """While in here production code has this bug."""
    patches = PLANTED[name]()
    before = [(thing, attribute, inspect.getattr_static(thing, attribute)) for thing, attribute, _ in patches]
    for thing, attribute, replacement in patches:
        setattr(thing, attribute, replacement)
    try:
        yield
    finally:
        for thing, attribute, original in before:
            setattr(thing, attribute, original)
