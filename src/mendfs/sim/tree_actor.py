"""A tree of its own, every operation on names and attributes, one after the other from any client: wholly known.

As nobody else works there, each answer is certain, and so is what a meta server may have lost: the log loses its end
and nothing else, so after a power cut the whole tree is as it was after one of the operations since the last sync.
"""

import asyncio
import errno
import stat
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from mendfs.client.volume import Volume
from mendfs.errors import OperationError
from mendfs.model import ROOT_INODE, Inode
from mendfs.sim.driver import Outcome
from mendfs.sim.loop import Process
from mendfs.sim.machines import ClientMachine
from mendfs.sim.tree_model import (
    RENAME_EXCHANGE,
    RENAME_NOREPLACE,
    ROOT,
    XATTR_CREATE,
    XATTR_REPLACE,
    Change,
    Refused,
    Shown,
    Tree,
    differences,
)
from mendfs.sim.workload import SETTLE_S, Workload

TOP = b"tree"
NAMES = [b"a", b"a!", b"b", b"c", b"long-" + b"e" * 60]
"""Some begin alike: a listing goes on behind a name, not behind what begins with it."""
XATTRS = [b"user.one", b"user.two"]
DEPTH_MAX = 3
STATES_MAX = 25
"""Operations since the last sync: each is a state that a power cut may leave."""
KINDS = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK}

Work = Callable[[Volume], Awaitable[Any]]


class TreeActor:
    """One actor, one tree."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._rng = workload.rng
        self._tree = Tree()
        self._states: list[Tree] = [self._tree]
        """What it may be after a power cut: the last durable one first, the present one last."""
        self._inodes: dict[int, int] = {}
        self._last_key = 0
        self._is_unsure = False
        self._changed_by: Process | None = None
        """The process whose sync covers the newest change."""

    def meta_lost(self) -> None:
        """What was not durable may be gone."""
        self._is_unsure = True

    def _violation(self, text: str) -> None:
        self._workload.driver.violation(f"tree: {text}")

    async def actor(self) -> None:
        """Operations until the run is over."""
        workload = self._workload
        while not workload.is_over and not await self._begin():
            await asyncio.sleep(5.0)
        while not workload.is_over:
            await asyncio.sleep(self._rng.expovariate(0.45))
            client = workload.client()
            await workload.driver.ready(client)
            if self._is_unsure:
                await self._look(client)
            elif len(self._states) > STATES_MAX or self._rng.random() < 0.05:
                await self._sync(client)
            elif self._rng.random() < 0.06:
                await self._look(client)
            else:
                await self._operation(client)

    async def _begin(self) -> bool:
        """Make the top directory, durably."""

        async def make(volume: Volume) -> int:
            try:
                made = await volume.make(ROOT_INODE, TOP, stat.S_IFDIR | 0o755, uid=0, gid=0)
            except OperationError as error:
                if error.errno != errno.EEXIST:
                    raise
                made = await volume.lookup(ROOT_INODE, TOP)
            await volume.sync()
            return made.inode

        losses = self._workload.meta_losses
        outcome = await self._workload.call(self._workload.client(), "make the tree", make)
        if outcome.is_ok and losses == self._workload.meta_losses:
            self._inodes[ROOT] = outcome.value
            self._is_unsure = False
            return True
        await asyncio.sleep(SETTLE_S)
        return False

    # --- looking at all of it ------------------------------------------------------------------------------------

    async def _look(self, client: ClientMachine) -> None:
        """See which of the states it is in."""
        self._is_unsure = False
        losses = self._workload.meta_losses
        outcome = await self._workload.call(client, "look at the tree", self._walk)
        if losses != self._workload.meta_losses or not outcome.is_ok:
            self._is_unsure = True
            if outcome.errno and losses == self._workload.meta_losses:
                self._violation(f"it cannot be looked at: {outcome}")
            return
        shown, inodes = outcome.value
        self._judge(shown, inodes)

    def _judge(self, shown: Shown, inodes: dict[str, int]) -> None:
        states = self._states
        for number in range(len(states) - 1, -1, -1):
            if not differences(shown, states[number].shown()):
                self._states = states[: number + 1]
                self._tree = states[number]
                self._learn(inodes)
                return
        lines = differences(shown, self._tree.shown())
        self._violation(f"it is in none of {len(states)} states: {'; '.join(lines[:3])}")
        self._workload.is_over = True  # what follows would follow from that

    def _learn(self, inodes: dict[str, int]) -> None:
        """The inode numbers of what somebody made without learning whether it was."""
        waiting = [(ROOT, "")]
        while waiting:
            directory, path = waiting.pop()
            for name, key in self._tree.nodes[directory].children.items():
                here = f"{path}/{name.decode()}"
                self._inodes[key] = inodes[here]
                if self._tree.nodes[key].kind == "directory":
                    waiting.append((key, here))

    async def _walk(self, volume: Volume) -> tuple[Shown, dict[str, int]]:
        first: dict[int, str] = {}
        shown: Shown = {}
        inodes: dict[str, int] = {}
        waiting = [(Inode(self._inodes[ROOT]), "")]
        while waiting:
            directory, path = waiting.pop(0)
            for name, found in sorted(await self._list(volume, directory)):
                here = f"{path}/{name.decode()}"
                kind = next(kind for kind, bits in KINDS.items() if stat.S_IFMT(found.mode) == bits)
                target = await volume.readlink(found.inode) if kind == "symlink" else b""
                xattrs = [
                    (xattr, await volume.get_xattr(found.inode, xattr))
                    for xattr in await volume.list_xattr(found.inode)
                ]
                size = 0 if kind == "directory" else found.size
                shown[here] = (
                    *(kind, stat.S_IMODE(found.mode), found.uid, size, target, found.nlink, tuple(sorted(xattrs))),
                    *(first.setdefault(found.inode, here), found.mtime_ns),
                )
                inodes[here] = found.inode
                if kind == "directory":
                    waiting.append((found.inode, here))
        return shown, inodes

    async def _list(self, volume: Volume, directory: Inode) -> list[tuple[bytes, Any]]:
        """All names, in pieces of any length."""
        names: list[tuple[bytes, Any]] = []
        limit = self._rng.choice([1, 2, 100])
        after = b""
        while True:
            listing = await volume.list_directory(directory, after, limit, True)
            names += [(entry.name, entry.attributes) for entry in listing.entries]
            if listing.complete:
                return names
            after = listing.entries[-1].name

    # --- changing ------------------------------------------------------------------------------------------------

    async def _sync(self, client: ClientMachine) -> None:
        """Durable, if it is the process that has made the newest change."""
        is_cover = client.process is self._changed_by
        life, losses, states = client.process, self._workload.meta_losses, len(self._states)
        outcome = await self._workload.call(client, "sync the tree", lambda volume: volume.sync(), life)
        if outcome.is_ok and is_cover and losses == self._workload.meta_losses and states == len(self._states):
            self._states = [self._tree]

    async def _operation(self, client: ClientMachine) -> None:
        plan = self._draw()
        if plan is None:
            return
        what, change, work, key = plan
        wanted: frozenset[int] = frozenset()
        following = self._tree.copy()
        try:
            change(following)
        except Refused as refused:
            wanted = refused.codes
        losses, life = self._workload.meta_losses, client.process
        outcome = await self._workload.call(client, f"tree: {what}", work, life)
        if losses != self._workload.meta_losses:
            await self._interrupted(outcome, change)
        elif outcome.is_unknown:
            if not wanted:
                self._states.append(following)
            self._is_unsure = True
            await asyncio.sleep(SETTLE_S)
        elif outcome.errno:
            if outcome.errno not in wanted:
                names = " or ".join(errno.errorcode[code] for code in wanted) or "success"
                self._violation(f"{what} on {client.name}: {outcome} instead of {names}")
        elif wanted:
            names = " or ".join(errno.errorcode[code] for code in wanted)
            self._violation(f"{what} on {client.name} was done instead of {names}")
        else:
            self._tree = following
            self._states.append(following)
            self._changed_by = life
            if key is not None:
                self._inodes[key] = outcome.value

    async def _interrupted(self, outcome: Outcome, change: Change) -> None:
        """The meta server lost something meanwhile: it may have been done before, or after, or on something older."""
        if not outcome.errno:
            self._states += [after for state in self._states if (after := state.after(change)) is not None]
        self._changed_by = None
        self._is_unsure = True
        await asyncio.sleep(SETTLE_S)

    def _draw(self) -> "tuple[str, Change, Work, int | None] | None":
        rng, tree = self._rng, self._tree
        directory, other = (rng.choice(tree.directories()) for _ in range(2))
        name, new = rng.choice(NAMES), rng.choice(NAMES)
        at, to = Inode(self._inodes[directory]), Inode(self._inodes[other])
        path, new_path = tree.path(directory, name), tree.path(other, new)
        match rng.choices(["make", "unlink", "rmdir", "rename", "link", "attributes", "xattr"], [9, 3, 3, 7, 2, 6, 4])[
            0
        ]:
            case "make":
                return self._draw_make(directory, name)
            case "unlink":
                change: Change = partial(Tree.remove, directory=directory, name=name, is_rmdir=False)
                return f"unlink {path}", change, lambda volume: volume.unlink(at, name), None
            case "rmdir":
                change = partial(Tree.remove, directory=directory, name=name, is_rmdir=True)
                return f"rmdir {path}", change, lambda volume: volume.rmdir(at, name), None
            case "rename":
                flags = rng.choice([0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE])
                change = partial(Tree.rename, old=(directory, name), new=(other, new), flags=flags)
                what = f"rename {path} to {new_path} with flags {flags}"
                return what, change, lambda volume: volume.rename(at, name, to, new, flags), None
            case "link":
                key = tree.find(directory, name)
                if key is None:
                    return None
                inode = Inode(self._inodes[key])
                change = partial(Tree.link, key=key, directory=other, name=new)
                return f"link {path} to {new_path}", change, lambda volume: volume.link(inode, to, new), None
            case kind:
                key = tree.find(directory, name)
                if key is None:
                    return None
                return self._draw_attributes(key, path) if kind == "attributes" else self._draw_xattr(key, path)

    def _draw_make(self, directory: int, name: bytes) -> "tuple[str, Change, Work, int | None] | None":
        kind = self._rng.choices(list(KINDS), [4, 5, 2])[0]
        if kind == "directory" and self._tree.depth(directory) >= DEPTH_MAX:
            return None
        target = b"to/%d" % self._rng.randrange(1000) if kind == "symlink" else b""
        mode = self._rng.choice([0o644, 0o600, 0o755])
        self._last_key += 1
        key, parent = self._last_key, Inode(self._inodes[directory])

        async def work(volume: Volume) -> int:
            made = await volume.make(parent, name, KINDS[kind] | mode, uid=0, gid=0, target=target)
            return made.inode

        def change(tree: Tree) -> None:
            tree.make(key, directory, name, kind, target, mode)

        return f"make {kind} {self._tree.path(directory, name)}", change, work, key

    def _draw_attributes(self, key: int, path: str) -> tuple[str, Change, Work, int | None]:
        rng = self._rng
        field = rng.choice(["mode", "uid", "size", "mtime_ns"])
        value = {
            "mode": rng.choice([0o644, 0o400, 0o777]),
            "uid": rng.randrange(5),
            "size": rng.choice([0, 1, 5000, 100_000, 1 << 40]),
            "mtime_ns": rng.randrange(1 << 60),
        }[field]
        inode = Inode(self._inodes[key])

        def change(tree: Tree) -> None:
            tree.set_attributes(key, **{field: value})

        async def work(volume: Volume) -> None:
            fields: dict[str, Any] = {field: value}
            await volume.set_attributes(inode, **fields)

        return f"set {field} of {path} to {value}", change, work, None

    def _draw_xattr(self, key: int, path: str) -> tuple[str, Change, Work, int | None]:
        rng = self._rng
        name, value = rng.choice(XATTRS), b"%d" % rng.randrange(1000)
        inode = Inode(self._inodes[key])
        if rng.random() < 0.3:
            change: Change = partial(Tree.remove_xattr, key=key, name=name)
            what = f"remove {name.decode()} of {path}"
            return what, change, lambda volume: volume.remove_xattr(inode, name), None
        flags = rng.choice([0, XATTR_CREATE, XATTR_REPLACE])
        change = partial(Tree.set_xattr, key=key, name=name, value=value, flags=flags)
        what = f"set {name.decode()} of {path} with flags {flags}"
        return what, change, lambda volume: volume.set_xattr(inode, name, value, flags), None

    async def check(self, client: ClientMachine) -> None:
        """At the end of the run."""
        if ROOT in self._inodes:
            await self._look(client)
