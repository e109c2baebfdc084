"""What clients do in a run: random operations on a shared tree, each compared with the model.

Names and files are worked on by one operation at a time, so that a known outcome is the only right one; what one client
has closed the next must see. Where the order cannot be known the actors of `sharing` have rules of their own.
"""

import asyncio
import errno
import os
import random
import stat
from collections.abc import Awaitable, Callable
from typing import Any

from mendfs.client.volume import Volume
from mendfs.errors import MendfsError
from mendfs.model import ROOT_INODE, Attributes, Inode
from mendfs.sim.driver import Driver, Outcome
from mendfs.sim.loop import Process
from mendfs.sim.machines import ClientMachine
from mendfs.sim.model import NONE, FileState, Name, Value

SETTLE_S = 45.0
"""After this nothing of an operation of unknown outcome is on its way any more: cut links hold for less, leases too."""
NAMES_A_DIRECTORY = 6
READ_STEP = 1024
"""Checked piece by piece, so that one unreadable block hides nothing of another."""


class Workload:
    """The shared tree, its model, and the actors on it."""

    def __init__(self, driver: Driver, rng: random.Random) -> None:
        self.driver = driver
        self.rng = rng
        self.directories: list[Inode] = [ROOT_INODE]
        self.names: list[Name] = []
        self.files: list[FileState] = []
        self.is_over = False
        self.may_lose_all = False
        """Every good copy of a block may be damaged: what is read must be right, but an error is an answer too."""
        self.operations = 0
        """Numbers of operations on names, in the order of their answers."""
        self.durable = 0
        """Operations up to this one are durable."""
        self.meta_losses = 0
        """How often the meta server lost what was not durable."""
        self.server_losses = 0
        """How often a data server did."""
        self.on_meta_lost: list[Callable[[], None]] = []
        self._marks: dict[str, int] = {}
        """Client -> operation that is durable when its newest change is."""
        self._locks: dict[int, asyncio.Lock] = {}
        self._unsettled_until_s: dict[int, float] = {}
        self._last_label = 0

    # --- setting up, and what faults do to the model ---------------------------------------------

    async def begin(self) -> None:
        """Make the directories, durably."""
        client = self.driver.clients[0]

        async def make(volume: Volume) -> list[Inode]:
            first = await volume.make(ROOT_INODE, b"a", stat.S_IFDIR | 0o755, uid=0, gid=0)
            second = await volume.make(first.inode, b"b", stat.S_IFDIR | 0o755, uid=0, gid=0)
            await volume.sync()
            return [first.inode, second.inode]

        outcome = await self.driver.call(client, "make the directories", make)
        assert outcome.is_ok, f"no fault has begun yet: {outcome}"
        self.directories += outcome.value
        self.names = [
            Name(directory, b"n%d" % number)
            for directory in range(len(self.directories))
            for number in range(NAMES_A_DIRECTORY)
        ]

    def meta_lost(self) -> None:
        """The meta server lost power: what was not durable may be gone."""
        self.meta_losses += 1
        for tell in self.on_meta_lost:
            tell()
        for name in self.names:
            name.meta_lost(self.durable)
        for file in self.files:
            file.meta_lost()

    def server_lost(self, server: str, *, quorum: int) -> None:
        """A data server lost what was not durable on it."""
        self.server_losses += 1
        for file in self.files:
            file.server_lost(server, quorum)

    # --- small helpers -----------------------------------------------------------------------------

    def lock(self, thing: object) -> asyncio.Lock:
        """Held by whoever works on a name or a file."""
        return self._locks.setdefault(id(thing), asyncio.Lock())

    def leave_alone(self, *things: object) -> None:
        """What was asked of these may still happen for a while."""
        for thing in things:
            self._unsettled_until_s[id(thing)] = self.driver.sim.loop.time() + SETTLE_S

    def is_settled(self, thing: object) -> bool:
        """Whether nothing can change it any more but what is asked for now."""
        return self._unsettled_until_s.get(id(thing), 0.0) <= self.driver.sim.loop.time()

    def client(self) -> ClientMachine:
        """Any of them."""
        return self.rng.choice(self.driver.clients)

    def data(self, length: int) -> bytes:
        """Bytes that occur nowhere else, and whose place can be told from any few of them."""
        self._last_label += 1
        label = self._last_label
        return b"".join(b"%07x." % ((label << 12 | piece) & 0xFFFFFFF) for piece in range(length // 8 + 1))[:length]

    def parent(self, name: Name) -> Inode:
        """The directory a name is in."""
        return self.directories[name.directory]

    async def call(
        self, client: ClientMachine, what: str, work: Callable[[Volume], Awaitable[Any]], life: Process | None = None
    ) -> Outcome:
        """See `Driver.call`."""
        return await self.driver.call(client, what, work, expect_life=life)

    def changed(self, client: str, operation: int) -> None:
        """A change of this client came after `operation`, and all before it, in the log."""
        self._marks[client] = max(self._marks.get(client, 0), operation)

    def synced(self, client: str) -> None:
        """This client was told that its changes are durable, and with them all that the log has before them."""
        self.durable = max(self.durable, self._marks.get(client, 0))

    # --- looking, where several things are possible ----------------------------------------------------

    async def resolve_name(self, client: ClientMachine, name: Name) -> bool:
        """See what a name stands for. False if that cannot be said now."""
        if not name.candidates:
            return True
        losses = self.meta_losses
        outcome = await self.call(
            client, f"look at {name.name!r}", lambda volume: volume.lookup(self.parent(name), name.name)
        )
        if losses != self.meta_losses or (not outcome.is_ok and outcome.errno != errno.ENOENT):
            return False
        found = self.match(name, outcome.value if outcome.is_ok else None)
        if found is not None:
            self.operations += 1
            name.adopt(found, self.operations)
        return found is not None

    def match(self, name: Name, attributes: Attributes | None) -> Value | None:
        """The candidate that was found; a violation if none was."""
        for value in reversed(name.candidates or [name.value]):
            if attributes is None:
                if value.kind == "none":
                    return value
            elif value.kind == kind_of(attributes) and _inode_of(value) in (0, attributes.inode):
                if value.file is not None:
                    value.file.inode = attributes.inode
                elif not value.inode:
                    return Value(value.kind, None, value.target, attributes.inode)
                return value
        wanted = [f"{value.kind} {_inode_of(value) or ''}" for value in name.candidates or [name.value]]
        found = "nothing" if attributes is None else f"{kind_of(attributes)} {attributes.inode}"
        self.driver.violation(f"name {name.name!r} of directory {name.directory} is {found}, not {wanted}")
        # Go on from what is there, so that one violation does not become hundreds.
        name.candidates = []
        name.adopt(NONE if attributes is None else name.value, self.operations)
        return None

    async def check_content(self, client: ClientMachine, file: FileState, *, adopt: bool, final: bool = False) -> bool:
        """Read all of a file and compare. False if it could not be read, for reasons that are allowed."""
        if file.is_beyond_knowing:
            return False

        async def read(volume: Volume) -> tuple[int, list[tuple[int, bytes | MendfsError]]]:
            opened = await volume.open_file(Inode(file.inode), flags=os.O_RDONLY)
            try:
                size = opened.attributes.size
                pieces: list[tuple[int, bytes | MendfsError]] = []
                for offset in range(0, size, READ_STEP):
                    buffer = bytearray(b"\xaa" * min(READ_STEP, size - offset))  # what is not filled is seen
                    try:
                        count = await opened.read_into(memoryview(buffer), offset)
                        pieces.append((offset, bytes(buffer[:count])))
                    except MendfsError as error:
                        pieces.append((offset, error))
                return size, pieces
            finally:
                await opened.release()

        losses, before = self.meta_losses, len(file.since)
        outcome = await self.call(client, f"check {file.label}", read)
        if losses != self.meta_losses or before != len(file.since):
            return False
        if not outcome.is_ok:
            if final or outcome.errno:
                self.driver.violation(f"{file.label} cannot be opened: {outcome}")
            return False
        size, pieces = outcome.value
        return self._compare(file, size, pieces, adopt=adopt, final=final)

    def _compare(
        self, file: FileState, size: int, pieces: list[tuple[int, bytes | MendfsError]], *, adopt: bool, final: bool
    ) -> bool:
        problem = file.now.problem_with_size(size)
        if problem is not None:
            self.driver.violation(f"{file.label}: {problem}")
            return False
        whole = True
        for offset, piece in pieces:
            if isinstance(piece, MendfsError):
                whole = False
                if final and not file.may_be_unreadable(offset, min(offset + READ_STEP, size)):
                    self.driver.violation(f"{file.label}: bytes from {offset} on cannot be read: {piece}")
                continue
            problem = file.now.problem_with(piece, offset)
            if problem is not None:
                self.driver.violation(f"{file.label} of {size} bytes: {problem}")
                return False
        if adopt and whole:
            for offset, piece in pieces:
                assert isinstance(piece, bytes)
                file.now.adopt(piece, offset)
            file.now.adopt_size(size)
            file.is_unsure = False
        return whole

    # --- names ------------------------------------------------------------------------------------------

    async def names_actor(self) -> None:
        """Operations on names, one after the other."""
        while not self.is_over:
            await asyncio.sleep(self.rng.expovariate(0.45))
            first, second = self.rng.sample(self.names, 2)
            # In one order for everybody, lest two wait for each other.
            ordered = sorted((first, second), key=lambda name: (name.directory, name.name))
            async with self.lock(ordered[0]), self.lock(ordered[1]):
                if self.is_settled(first) and self.is_settled(second):
                    await self._on_names(self.client(), first, second)

    async def _on_names(self, client: ClientMachine, first: Name, second: Name) -> None:
        if not (await self.resolve_name(client, first) and await self.resolve_name(client, second)):
            return
        match self.rng.choices(
            ["create", "unlink", "rename", "link", "mkdir", "rmdir", "symlink", "look"], [8, 4, 5, 2, 2, 2, 1, 3]
        )[0]:
            case "create":
                await self._make(client, first, "file")
            case "mkdir":
                await self._make(client, first, "directory")
            case "symlink":
                await self._make(client, first, "symlink")
            case "unlink":
                await self._remove(client, first, directory=False)
            case "rmdir":
                await self._remove(client, first, directory=True)
            case "rename":
                await self._rename(client, first, second)
            case "link":
                await self._link(client, first, second)
            case _:
                await self._look(client, first)

    async def _change(
        self,
        client: ClientMachine,
        what: str,
        work: Callable[[Volume], Awaitable[Any]],
        changes: list[tuple[Name, Value]],
        refused: set[int],
    ) -> Outcome:
        """Do something that makes `changes`, or, if `refused` is not empty, must be refused with one of these."""
        losses, answered = self.meta_losses, self.operations
        outcome = await self.call(client, what, work)
        names = [name for name, _ in changes]
        self.operations += 1
        if outcome.is_ok and losses == self.meta_losses:
            # Others that were answered meanwhile may lie before it or behind it.
            self.changed(client.name, self.operations if self.operations == answered + 1 else answered)
        if losses != self.meta_losses:
            # What was expected may have been lost in the middle of this, and the rest followed from what was left.
            possible = [value for _, value in changes] + [NONE]
            for name in names:
                possible += [*(name.candidates or [name.value]), *(value for _, value in name.history)]
            for name in names:
                name.candidates = list(dict.fromkeys(possible))
            self.leave_alone(*names)
        elif outcome.is_unknown:
            for name, value in changes if not refused else []:
                name.may_have_become(value, self.operations)
            self.leave_alone(*names)
        elif outcome.is_ok and not refused:
            for name, value in changes:
                name.became(value, self.operations)
        elif outcome.errno not in refused:
            wanted = "success" if not refused else " or ".join(errno.errorcode[code] for code in sorted(refused))
            self.driver.violation(f"{what} on {client.name}: {outcome} instead of {wanted}")
            for name in names:
                name.candidates = [name.value, *(value for name_, value in changes if name_ is name), NONE]
        return outcome

    async def _make(self, client: ClientMachine, name: Name, kind: str) -> None:
        mode = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK}[kind]
        target = b"to/%d" % self.rng.randrange(100) if kind == "symlink" else b""

        async def work(volume: Volume) -> Inode:
            made = await volume.make(self.parent(name), name.name, mode | 0o644, uid=0, gid=0, target=target)
            return made.inode

        file = FileState(f"file {len(self.files)}") if kind == "file" else None
        value = Value(kind, file, target)
        refused = set() if name.value.kind == "none" else {errno.EEXIST}
        what = f"make {kind} {name.directory}/{name.name.decode()}"
        outcome = await self._change(client, what, work, [(name, value)], refused)
        if file is not None and (outcome.is_ok or not refused):
            self.files.append(file)
            if outcome.is_ok:
                file.inode = outcome.value
        elif outcome.is_ok and name.value is value:
            name.value = Value(kind, None, target, outcome.value)
            name.history[-1] = (name.history[-1][0], name.value)

    async def _remove(self, client: ClientMachine, name: Name, *, directory: bool) -> None:
        kind = name.value.kind

        async def work(volume: Volume) -> None:
            if directory:
                await volume.rmdir(self.parent(name), name.name)
            else:
                await volume.unlink(self.parent(name), name.name)

        refused = set()
        if kind == "none":
            refused = {errno.ENOENT}
        elif directory != (kind == "directory"):
            refused = {errno.ENOTDIR} if directory else {errno.EISDIR, errno.EPERM}
        what = f"{'rmdir' if directory else 'unlink'} {name.directory}/{name.name.decode()}"
        await self._change(client, what, work, [(name, NONE)], refused)

    async def _rename(self, client: ClientMachine, old: Name, new: Name) -> None:
        async def work(volume: Volume) -> None:
            await volume.rename(self.parent(old), old.name, self.parent(new), new.name)

        source, target = old.value, new.value
        changes = [(new, source), (old, NONE)]
        refused: set[int] = set()
        if source.kind == "none":
            refused = {errno.ENOENT}
        elif target.kind != "none" and (source.kind == "directory") != (target.kind == "directory"):
            refused = {errno.ENOTDIR} if source.kind == "directory" else {errno.EISDIR}
        elif source.file is not None and source.file is target.file:
            changes = []  # two names of one file: POSIX says that nothing happens
        what = f"rename {old.directory}/{old.name.decode()} to {new.directory}/{new.name.decode()}"
        await self._change(client, what, work, changes, refused)

    async def _link(self, client: ClientMachine, old: Name, new: Name) -> None:
        file = old.value.file
        if file is None or not file.inode:
            return

        async def work(volume: Volume) -> None:
            await volume.link(Inode(file.inode), self.parent(new), new.name)

        refused = set() if new.value.kind == "none" else {errno.EEXIST}
        what = f"link {old.directory}/{old.name.decode()} to {new.directory}/{new.name.decode()}"
        await self._change(client, what, work, [(new, old.value)], refused)

    async def _look(self, client: ClientMachine, name: Name) -> None:
        losses = self.meta_losses
        outcome = await self.call(
            client,
            f"look at {name.directory}/{name.name.decode()}",
            lambda volume: volume.lookup(self.parent(name), name.name),
        )
        if losses != self.meta_losses or outcome.is_unknown:
            return
        if outcome.is_ok or outcome.errno == errno.ENOENT:
            self.match(name, outcome.value if outcome.is_ok else None)


def kind_of(attributes: Attributes) -> str:
    """What `Value.kind` says of it."""
    other = "symlink" if stat.S_ISLNK(attributes.mode) else "file"
    return "directory" if stat.S_ISDIR(attributes.mode) else other


def _inode_of(value: Value) -> int:
    return value.file.inode if value.file is not None else value.inode
