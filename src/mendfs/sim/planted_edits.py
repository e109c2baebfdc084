"""More planted bugs, each an edit of production source: which function, what stands there, what the bug makes of it.

What is edited is compiled anew in its own module. An edit whose text is not found (the code has moved on) is an error,
and `tests/sim/test_planted.py` plants each once: a bug that is not planted would count as found by nobody.
"""

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from mendfs import extents
from mendfs.client import append, commits, durability, files, merge, names, open_file, opens, reader, space, writer
from mendfs.client import session as client_session
from mendfs.data import append as data_append
from mendfs.data import copying, index, recovery, scanning, store
from mendfs.kv import optimistic
from mendfs.meta import (
    attributes,
    background,
    blocks,
    commit,
    freeing,
    members,
    namespace,
    punch,
    ranges,
    registry,
    server,
    sessions,
    state,
    truncate,
    volume,
)
from mendfs.meta import (
    merge as meta_merge,
)

Patch = tuple[Any, str, Any]


class Edit(NamedTuple):
    """In the source of `thing.attribute`, `new` in the place of `old`."""

    thing: Any
    attribute: str
    old: str
    new: str

    def patches(self) -> list[Patch]:
        """What is replaced by what."""
        original = inspect.getattr_static(self.thing, self.attribute)
        function: Any = original.__func__ if isinstance(original, staticmethod | classmethod) else original
        function = function.fget if isinstance(function, property) else function
        source = textwrap.dedent(inspect.getsource(function))
        if self.old not in source:
            raise LookupError(f"{self.attribute} has no {self.old!r} any more: plant this bug anew")
        made: dict[str, Any] = {}
        # Annotations of classes that are being made are strings in no module but this one's copy.
        exec("from __future__ import annotations\n" + source.replace(self.old, self.new), function.__globals__, made)
        edited = made[self.attribute]
        patches: list[Patch] = [(self.thing, self.attribute, edited)]
        if inspect.ismodule(self.thing):
            # Whoever has imported the function has it under a name of their own.
            ours = (name for name in sorted(sys.modules) if name.startswith("mendfs.") and ".sim." not in name)
            modules = [sys.modules[name] for name in ours if name != "mendfs.promises"]
            found = [(module, name) for module in modules for name, value in vars(module).items() if value is original]
            patches += [(module, name, edited) for module, name in found if module is not self.thing]
        return patches


EDITS: dict[str, list[Edit]] = {
    # Data servers (design section 4).
    "fence-not-checked": [Edit(store.Store, "delete", "if order < fence:", "if False:")],
    "fence-without-generation": [
        Edit(store.Store, "delete", "if order < fence:", "if order.sequence < fence.sequence:")
    ],
    "fence-not-remembered": [Edit(store.Store, "delete", "if order > fence:", "if False:")],
    "fence-not-durable": [
        Edit(store.Store, "delete", "await self._guarded(self._index.engine.sync())", "pass"),
    ],
    "conflict-stored": [
        Edit(store.Store, "_put", "raise _conflict(message)", "return self.incarnation"),
    ],
    "conflict-overwrites": [Edit(store.Store, "_put", "if old is not None and old.is_good:", "if False:")],
    "put-acknowledged-unwritten": [
        Edit(store, "_write", "segment.file.write(", "header.block % 50 and segment.file.write(")
    ],
    "torn-record-believed": [
        Edit(
            scanning,
            "_is_good",
            "if page_checksums(data, header.page_size, header.kind) != stored:\n        return False",
            "return True",
        )
    ],
    "recovery-ends-at-first-hole": [
        Edit(scanning, "_headers", "after = window.search(offset + ALIGNMENT_BYTES)", "after = None")
    ],
    "recovery-cuts-synced": [
        Edit(recovery.Recovery, "_cut", "if is_known and size > end:", "end = max(0, end - 8192)\n    if size > end:")
    ],
    "checkpoint-past-writes-in-flight": [
        Edit(data_append.AppendLog, "end", "if segment.is_busy and not segment.is_failed:", "if False:")
    ],
    "copy-unlinks-unsynced": [
        Edit(copying.Copier, "_copy_batch", "synced = await self._syncing.sync()", "synced = incarnation"),
    ],
    "copy-overtakes-delete": [
        Edit(
            index.Index,
            "_move",
            "if raw is None or schema.decode_entry(raw).place != move.old:\n            continue",
            "pass",
        ),
        Edit(index.Index, "_move", 'assert old is not None, "it was there above"', "old = old or move.entry"),
    ],
    "copy-loses-some": [
        Edit(copying.Copier, "_empty", "for start in range(0,", "for start in range(BLOCKS_A_BATCH,"),
    ],
    "index-not-moved": [
        Edit(
            index.Index,
            "_move",
            "await self._enter(tx, move.name, move.entry)",
            "await self._enter(tx, move.name, old)",
        )
    ],
    "inventory-not-counted-out": [Edit(index.Index, "_take", "if old.is_good:", "if False:")],
    "store-never-syncs-by-itself": [Edit(store.Store, "_tend", "await self.sync()", "pass")],
    "delete-leaves-index": [
        Edit(
            store.Store,
            "delete",
            "gone = await self._guarded(self._index.remove(names))",
            "gone = [e for e in [await self._index.find(*n) for n in names] if e]",
        )
    ],
    # The meta server (design section 5).
    "generation-not-raised": [
        Edit(volume, "raise_generation", "schema.NUMBER.decode(raw) + 1", "max(1, schema.NUMBER.decode(raw))")
    ],
    "generation-not-synced": [Edit(volume, "raise_generation", "await engine.sync()", "pass")],
    "answer-not-stored": [
        Edit(sessions, "answered_once", "tx.put(key, schema.ANSWER", "(lambda *_: None)(key, schema.ANSWER")
    ],
    "old-request-done-again": [Edit(sessions, "answered_once", "if at.number < last.number:", "if False:")],
    "session-number-not-synced": [Edit(registry.Registry, "_open_session", "await self._state.sync_log()", "pass")],
    "late-ack-ignored": [Edit(blocks, "acknowledge_late", "tx.delete(schema", "(schema")],
    "late-ack-clears-all": [
        Edit(
            blocks,
            "acknowledge_late",
            "tx.delete(schema.owed_key(server, partition, block))",
            "[tx.delete(schema.owed_key(ServerNumber(n), partition, block)) for n in range(8)]",
        )
    ],
    "owed-not-written": [Edit(blocks, "add_block", "if entry.server not in acknowledged:", "if False:")],
    "quorum-of-any-servers": [
        Edit(
            blocks,
            "add_block",
            "len(acknowledged.intersection(entry.server for entry in row))",
            "len(acknowledged)",
        )
    ],
    "quorum-not-checked": [Edit(blocks, "add_block", "< write_quorum:", "< write_quorum - 1:")],
    "id-not-checked": [Edit(ranges, "check_owned", "if raw is None or", "if raw is not None and")],
    "extent-without-cut": [Edit(commit._Slots, "change", "cut=self._record.cut_number", "cut=0")],
    "size-set-by-commit": [
        Edit(
            commit,
            "commit",
            "size=max(record.attributes.size, request.end)",
            "size=request.end or record.attributes.size",
        )
    ],
    "cut-finished-early": [Edit(background, "_apply_cuts", "slot: Slot | None = Slot(0)", "slot: Slot | None = None")],
    "cuts-never-applied": [Edit(truncate, "next_cutting", "limit=1)", "limit=0)")],
    "cut-applied-to-newer": [
        Edit(extents, "visible_end", "if cut.number > number", "if cut.number >= number and number")
    ],
    "append-not-moved": [Edit(commit, "_moved_append", "if size == request.append_at:", "if True:")],
    "append-leaves-slot": [Edit(commit, "_moved_append", "or (end - 1) // block_size != size // block_size", "")],
    "exclusive-make-has-two-winners": [
        Edit(namespace, "make", "if await _entry(tx, request.parent, request.name) is not None:", "if False:")
    ],
    "replaced-inode-leaks": [
        Edit(
            namespace,
            "rename",
            "replaced = _lose_name(tx, await find(tx, target.inode), request.now_ns, openers.of(target.inode))",
            "pass",
        )
    ],
    "noreplace-replaces": [Edit(namespace, "rename", "if request.flags == RENAME_NOREPLACE:", "if False:")],
    "exchange-forgets-parent": [
        Edit(namespace, "_exchange", "await _hand_over(tx, target.inode, request.parent, request.now_ns)", "pass")
    ],
    "rmdir-of-full-directory": [Edit(namespace, "_check_empty", "raise OperationError(errno.ENOTEMPTY)", "return")],
    "rename-into-itself": [Edit(namespace, "_check_no_loop", "if at == moved:", "if False:")],
    "link-not-counted": [Edit(namespace, "link", "nlink=record.attributes.nlink + 1, ", "")],
    "listing-skips": [
        Edit(
            namespace,
            "list_directory",
            'begin = schema.name_key(request.inode, request.after) + b"\\0"',
            'begin = schema.name_key(request.inode, request.after) + b"1"',
        )
    ],
    "listing-ends-early": [Edit(namespace, "list_directory", "len(found) <= limit,", "True,")],
    "unlinked-while-open-freed": [Edit(namespace, "_lose_name", "for session in openers:", "for session in ():")],
    "open-not-asked-when-freeing": [Edit(freeing, "is_open", "return bool(", "return False and bool(")],
    "reclaims-not-awaited": [Edit(state.State, "in_grace", "return at_s < self.grace_until_s", "return False")],
    "reclaimed-opens-forgotten": [
        Edit(registry.Registry, "_resume_session", "self._state.sessions.opened(session, request.opens)", "pass")
    ],
    "sessions-never-end": [Edit(sessions.Sessions, "due", "if session.deadline_s < at_s]", "if False]")],
    "lease-counts-own-pause": [Edit(sessions.Sessions, "due", "at_s - before > OWN_PAUSE_S", "False")],
    "ended-session-keeps-ranges": [Edit(ranges, "end", 'tx.delete(schema.range_key("block", index))', "pass")],
    "ended-session-keeps-opens": [Edit(freeing, "forget_opens", "stale[:OPENS_FORGOTTEN_A_STEP]", "stale[:0]")],
    "log-not-synced-by-itself": [Edit(background, "sync_forever", "await state.sync_log()", "pass")],
    "failed-log-sync-ignored": [
        Edit(optimistic.OptimisticEngine, "_sync_all", "self._failure = str(error)\n        raise", "pass")
    ],
    "log-sync-not-awaited": [Edit(server.MetaServer, "_sync_log", "await self.state.sync_log()", "pass")],
    "counter-not-moved": [
        Edit(
            ranges,
            "grant",
            "schema.NUMBER.encode(counter + RANGE_IDS)",
            "schema.NUMBER.encode(counter + RANGE_IDS // 2)",
        )
    ],
    "dead-blocks-forgotten-undeleted": [
        Edit(
            background,
            "_delete",
            "results = await asyncio.gather(*(_delete_on(state, server, names, synced) "
            "for server, names in asked.items()))",
            "results = [True] * len(asked)",
        )
    ],
    "freeing-without-data-sync": [Edit(background, "free_round", "if not await state.sync_data():", "if False:")],
    "freed-before-named": [
        Edit(
            background,
            "free_round",
            "fresh, _ = await run(state.engine, freeing.dead_blocks, noted,",
            "fresh, _ = await run(state.engine, freeing.dead_blocks, state.engine.last_sequence,",
        )
    ],
    "drop-forgotten": [
        Edit(
            blocks,
            "store_slot",
            "if dropped:",
            "if dropped and len(dropped) > 1:",
        )
    ],
    "dropped-though-named": [
        Edit(
            blocks,
            "store_slot",
            "dropped = blocks_in(stored) - blocks_in(kept)",
            "dropped = blocks_in(stored) - blocks_in(kept[:1])",
        )
    ],
    "merge-over-newer": [
        Edit(
            meta_merge,
            "merge",
            "result = substitute(current, seen, newer)",
            "from mendfs.extents import overlay; result = overlay(current, newer)",
        )
    ],
    "tally-not-counted-out": [
        Edit(blocks, "forget_block", "tallies.add(partition, block, record.root, sign=-1)", "pass")
    ],
    "server-never-down": [Edit(members.Members, "tick", "at_s - m.heard_s > DOWN_AFTER_S", "False")],
    "conflict-not-detected": [
        Edit(optimistic.OptimisticTransaction, "check", "if not changed.isdisjoint(self._keys):", "if False:")
    ],
    "range-conflict-not-detected": [
        Edit(optimistic.OptimisticTransaction, "range", "self._ranges.append((begin, end))", "pass")
    ],
    "own-writes-not-in-range": [
        Edit(
            optimistic.OptimisticTransaction,
            "range",
            "own = [key for key in self.writes if begin <= key < end] if self.writes else []",
            "own = []",
        )
    ],
    "punched-too-far": [Edit(punch, "punch_range", "request.end - start)", "request.end - start + 1)")],
    "mode-not-set": [Edit(attributes, "set_attributes", "if request.mode is not None:", "if False:")],
    "xattr-create-replaces": [
        Edit(attributes, "set_xattr", "if exists and request.flags == XATTR_CREATE:", "if False:")
    ],
    # Clients (design section 6).
    "rename-over-unsynced": [
        Edit(names.Names, "_secure", "if file is not None and (file.is_dirty or file.unsynced):", "if False:")
    ],
    "close-does-not-commit": [
        Edit(
            open_file.OpenFile,
            "flush",
            "await self._writer.flush(self._file, synced=emptied)",
            "self._file.take_error()",
        ),
        Edit(open_file.OpenFile, "release", "await self._writer.drain(self._file)", "pass"),
    ],
    "close-after-emptying-unsynced": [
        Edit(open_file.OpenFile, "flush", "emptied = self._file.was_emptied", "emptied = False")
    ],
    "fsync-skips-log": [
        Edit(
            open_file.OpenFile, "fsync", "await self._durability.sync_log_to(max(changed, self._file.version))", "pass"
        ),
        Edit(commits.Committer, "_may_sync", "return synced and", "return False and"),
    ],
    "fsync-skips-data": [Edit(open_file.OpenFile, "fsync", "await self._durability.sync_data([self._file])", "pass")],
    "fsync-of-old-writes-only": [
        Edit(
            open_file.OpenFile,
            "fsync",
            "group.create_task(self._writer.drain(self._file, synced=True, logged=True))",
            "pass",
        )
    ],
    "upload-error-dropped": [Edit(commits.Committer, "lost", "file.errors.append(error)", "pass")],
    "error-not-told-by-fsync": [
        Edit(open_file.OpenFile, "fsync", "self._file.take_error()", "self._file.errors.clear()")
    ],
    "open-does-not-revalidate": [
        Edit(
            files.File,
            "learn_opened",
            "self.learn(opened.attributes)",
            "if self.attributes is not None: return True\n    self.learn(opened.attributes)",
        )
    ],
    "size-not-refreshed": [
        Edit(
            files.File,
            "learn",
            "self.attributes = attributes",
            "size = max(attributes.size, self.attributes.size if self.attributes else 0)\n"
            "        self.attributes = msgspec.structs.replace(attributes, size=size)",
        )
    ],
    "extents-of-older-version": [Edit(files.File, "_at_version", "self.slots.clear()", "pass")],
    "hole-not-zeroed": [Edit(reader.Reader, "_plan_stored", "_fill_with_zeros(view)", "pass")],
    "frozen-bytes-not-read": [
        Edit(reader.Reader, "_copy_dirty", "(file.collecting, file.frozen)", "(file.collecting,)")
    ],
    "two-generations-on-their-way": [Edit(writer.Writer, "_may_freeze", "slot not in file.frozen and", "")],
    "truncate-passes-commits": [Edit(names.Names, "_truncate", "await self._writer.wait_for_commits(file)", "pass")],
    "truncate-keeps-dirty": [Edit(names.Names, "_truncate", "self._writer.clip(file, size)", "pass")],
    "change-not-repeated": [
        Edit(client_session.Session, "_send", "await self._pause(peer, error, deadline_s)", "raise")
    ],
    "changes-renumbered-on-repeat": [
        Edit(
            client_session.Session,
            "_send",
            "return await self._call(peer, message, deadline_s)",
            "self._numbers[message.at.slot] += 1\n"
            "            at = RequestId(message.at.slot, self._numbers[message.at.slot])\n"
            "            message = __import__('msgspec').structs.replace(message, at=at)\n"
            "            return await self._call(peer, message, deadline_s)",
        )
    ],
    "lost-changes-not-noticed": [
        Edit(client_session.Session, "_begin", "if survived < self.sequence_seen:", "if False:")
    ],
    "append-end-unconditional": [Edit(append.Appender, "_message", "append_at=size", "append_at=None")],
    "allocate-does-not-grow": [Edit(space.Space, "_grow", "(), (), size,", "(), (), 0,")],
    "bytes-of-another-place": [
        Edit(
            reader.Reader,
            "_plan_stored",
            "piece.offset_in_block, view)",
            "min(piece.offset_in_slot, piece.extent.block_length - piece.length), view)",
        )
    ],
    "merge-durability-assumed": [Edit(merge.Merger, "_stored", "upload.is_synced = True", "pass")],
    "merge-in-wrong-order": [Edit(meta_merge, "merge", "_with_cut(extent, record.cut_number)", "_with_cut(extent, 0)")],
    "unlinked-file-not-open-again": [Edit(opens.Opens, "open_again", "for inode in self.inodes:", "for inode in ():")],
    "close-told-while-open": [Edit(opens.Opens, "closed", "if file.opens > 0:\n        return", "pass")],
    "unsynced-forgotten": [
        Edit(
            durability.Durability,
            "_give_again",
            "await self._put_again(file, name, left)",
            "file.unsynced.pop(name, None)",
        )
    ],
}


def edited(name: str) -> Callable[[], list[Patch]]:
    """The patches of a bug, made when it is planted."""
    return lambda: [patch for edit in EDITS[name] for patch in edit.patches()]
