"""The simulated disk of one machine: late, forgetful at a power cut, rotten, full, failing or hung, as a run wants it.

What was written is read back at once, by this or a later process; what was synced survives a power cut. Of the rest any
sectors may have reached the disk, in no order: torn writes and zeros in the middle of a file follow from that. Names
are as forgetful as bytes: made or removed, they are durable after `sync_directory` only.
"""

import asyncio
import contextvars
import errno
import os
import posixpath
import random
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import msgspec

from mendfs.sim.content import Node, apply_by_chance, apply_change
from mendfs.sim.loop import Process, SimLoop
from mendfs.world.disk import Buffer, File

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

DISK_BLOCK_BYTES = 4096
"""A disk gives room in such pieces."""
_ZEROS = bytes(DISK_BLOCK_BYTES)


class DiskRules(msgspec.Struct, kw_only=True):
    """How a disk behaves. A run changes them as it goes; chances are per operation."""

    delay_min_s: float = 0.000_02
    delay_max_s: float = 0.001
    slow_chance: float = 0.005
    slow_max_s: float = 0.3
    read_error_chance: float = 0.0
    write_error_chance: float = 0.0
    sync_error_chance: float = 0.0
    is_broken: bool = False
    """Every operation fails with EIO."""
    is_full: bool = False
    """Nothing that needs room is taken."""
    is_cached_chance: float = 0.9
    total_bytes: int = 1 << 40


class SimNode(Node):
    """See `Node`."""

    __slots__ = ()

    def sync(self) -> None:
        """All of it is durable."""
        for change in self.changes:
            apply_change(self.durable, change)
        self.changes.clear()

    def lose_power(self, rng: random.Random) -> None:
        """Of what was not synced, some reached the disk: nothing, a beginning, or any sectors."""
        kind = rng.random()
        kept = self.changes[: rng.randrange(len(self.changes) + 1)] if self.changes else []
        if kind < 0.3:
            kept, chance = [], 0.0
        elif kind < 0.6:
            chance = 1.0
        else:
            kept, chance = self.changes, rng.random()
        apply_by_chance(self.durable, kept, rng, chance)
        self.content = bytearray(self.durable)
        self.changes.clear()


class SimDisk:
    """One machine's disk. `at(process)` is what a process of the machine is given."""

    def __init__(self, loop: SimLoop, rng: random.Random, name: str, told: Callable[[str], None]) -> None:
        self.loop = loop
        self.rng = rng
        self.name = name
        self.rules = DiskRules()
        self.told = told
        """Called with a line for the trace when an operation fails."""
        self.nodes: dict[str, SimNode] = {}
        self.locks: dict[str, Process] = {}
        self.hung: asyncio.Event | None = None
        self.failed_syncs = 0
        """Each has dropped what it could not write."""
        self.when_written: Callable[[], None] | None = None
        """What happens when the next operation that ran in a thread has been done, before anybody knows of it."""
        self._removed: dict[str, SimNode] = {}
        """Names whose removal is not durable."""
        self._directories: set[str] = set()

    def at(self, process: Process) -> "ProcessDisk":
        """The disk as a process sees it."""
        return ProcessDisk(self, process)

    def lose_power(self) -> None:
        """What was not synced is lost, torn, or by chance there. The machine's processes are dead already."""
        for path, node in sorted(self._removed.items()):
            if path not in self.nodes and self.rng.random() < 0.5:
                self.nodes[path] = node
                node.is_linked = True
        self._removed.clear()
        for path, node in sorted(self.nodes.items()):
            if not node.is_named and self.rng.random() < 0.5:
                del self.nodes[path]
                continue
            node.is_named = True
            node.lose_power(self.rng)

    def hang(self) -> None:
        """No operation ends until `unhang`."""
        if self.hung is None:
            self.hung = asyncio.Event()

    def unhang(self) -> None:
        """Go on."""
        if self.hung is not None:
            self.hung.set()
            self.hung = None

    def wipe(self) -> None:
        """A blank disk in its place."""
        for node in self.nodes.values():
            node.is_linked = False
        self.nodes.clear()
        self._removed.clear()

    def flip(self, path: str, bit: int) -> None:
        """Rot: one bit of what is stored is another one now."""
        node = self.nodes[path]
        for content in (node.content, node.durable):
            if bit // 8 < len(content):
                content[bit // 8] ^= 1 << bit % 8

    def bytes_used(self) -> int:
        """Bytes of all files."""
        return sum(len(node.content) for node in self.nodes.values())

    def check(self, operation: str, path: str) -> None:
        """Raise what goes wrong with this operation. read, write, sync, open, names."""
        rules = self.rules
        match operation:
            case "read":
                chance = rules.read_error_chance
            case "write":
                chance = rules.write_error_chance
            case "sync":
                chance = rules.sync_error_chance
            case _:
                chance = 0.0
        if rules.is_broken or (chance and self.rng.random() < chance):
            self.told(f"disk {self.name}: {operation} of {path} fails")
            self.failed_syncs += operation == "sync"
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        if rules.is_full and operation == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def unlink(self, path: str) -> None:
        """Remove a name."""
        node = self.nodes.pop(path, None)
        if node is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        node.is_linked = False
        if node.is_named:
            self._removed[path] = node

    def sync_directory(self, path: str) -> None:
        """The names in `path` are durable."""
        for name, node in self.nodes.items():
            if posixpath.dirname(name) == path:
                node.is_named = True
        for name in [name for name in self._removed if posixpath.dirname(name) == path]:
            del self._removed[name]


class SimFile:
    """An open file. See `File`."""

    def __init__(self, disk: SimDisk, process: Process, path: str, node: SimNode) -> None:
        self._disk = disk
        self._process = process
        self._path = path
        self._node = node

    def _check(self, operation: str) -> None:
        assert self._process.is_alive, "callbacks of dead processes are never run"
        self._disk.check(operation, self._path)

    def read_into(self, buffer: memoryview | bytearray, offset: int) -> int:
        """Fill `buffer` from `offset`; returns the bytes read."""
        self._check("read")
        part = self._node.content[offset : offset + len(buffer)]
        memoryview(buffer)[: len(part)] = part
        return len(part)

    def read_cached_into(self, buffer: memoryview | bytearray, offset: int) -> bool:
        """As read_into, or False by chance."""
        if self._disk.hung is not None or self._disk.rng.random() >= self._disk.rules.is_cached_chance:
            return False
        return self.read_into(buffer, offset) == len(buffer)

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        """Write all of `buffers`; a failing write may have written a part."""
        data = b"".join(buffers)
        try:
            self._check("write")
        except OSError:
            self._node.apply((offset, data[: self._disk.rng.randrange(len(data) + 1)]))
            raise
        self._node.apply((offset, data))

    def datasync(self) -> None:
        """After an error the pages are dropped: reads show what was written until the machine restarts."""
        try:
            self._check("sync")
        except OSError:
            self._node.changes.clear()
            raise
        self._node.sync()

    def truncate(self, length: int) -> None:
        """Cut or extend."""
        self._check("write")
        self._node.apply(length)

    def punch(self, offset: int, length: int) -> None:
        """The range reads as zeros."""
        self._disk.check("punch", self._path)
        length = min(length, len(self._node.content) - offset)
        if length > 0:
            self._node.apply((offset, bytes(length)))

    def forget_cached(self, offset: int, length: int) -> None:
        """What a failed sync left in memory only is seen no more: here of the whole file."""
        self._node.forget_cached()

    def size(self) -> int:
        """The file's length."""
        return len(self._node.content)

    def allocated(self) -> int:
        """Bytes it occupies, holes of whole blocks not counted."""
        content = self._node.content
        holes = sum(
            content.startswith(_ZEROS[: len(content) - start], start)
            for start in range(0, len(content), DISK_BLOCK_BYTES)
        )
        return (-(-len(content) // DISK_BLOCK_BYTES) - holes) * DISK_BLOCK_BYTES

    def is_linked(self) -> bool:
        """Whether it still has a name."""
        return self._node.is_linked

    def close(self) -> None:
        """Give back a lock held through it."""
        if self._disk.locks.get(self._path) is self._process:
            del self._disk.locks[self._path]


class ProcessDisk:
    """See `Disk`: that of one process."""

    def __init__(self, disk: SimDisk, process: Process) -> None:
        self._disk = disk
        self._process = process

    @property
    def machine_disk(self) -> SimDisk:
        """The disk it is a view of."""
        return self._disk

    def open(self, path: str, *, create: bool = False, read_only: bool = False) -> File:
        """Open a file; with `create` it must not exist yet."""
        self._disk.check("open", path)
        nodes = self._disk.nodes
        if create and path in nodes:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        if not create and path not in nodes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if create:
            nodes[path] = SimNode()
        return SimFile(self._disk, self._process, path, nodes[path])

    def exists(self, path: str) -> bool:
        """Whether there is anything at `path`."""
        return path in self._disk.nodes or any(name.startswith(path + "/") for name in self._disk.nodes)

    def names(self, path: str) -> list[str]:
        """The names in a directory, sorted."""
        self._disk.check("names", path)
        begin = len(path) + 1
        return sorted({name[begin:].split("/")[0] for name in self._disk.nodes if name.startswith(path + "/")})

    def make_directories(self, path: str) -> None:
        """Directories are there when something is in them."""
        self._disk.check("names", path)

    def sync_directory(self, path: str) -> None:
        """Make the names in a directory durable."""
        self._disk.check("names", path)
        self._disk.sync_directory(path)

    def unlink(self, path: str) -> None:
        """Remove a file."""
        self._disk.check("names", path)
        self._disk.unlink(path)

    def read_file(self, path: str) -> bytes:
        """A small file, whole."""
        self._disk.check("read", path)
        if path not in self._disk.nodes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return bytes(self._disk.nodes[path].content)

    def replace_file(self, path: str, content: bytes, *, mode: int = 0o600) -> None:
        """All or nothing, and durable."""
        self._disk.check("write", path)
        self._disk.check("sync", path)
        if path in self._disk.nodes:
            self._disk.nodes[path].is_linked = False
        node = self._disk.nodes[path] = SimNode()
        node.apply((0, content))
        node.sync()
        node.is_named = True

    def free_bytes(self, path: str) -> int:
        """Bytes that may still be written."""
        self._disk.check("names", path)
        rules = self._disk.rules
        return 0 if rules.is_full else max(0, rules.total_bytes - self._disk.bytes_used())

    def total_bytes(self, path: str) -> int:
        """Bytes of the disk."""
        return self._disk.rules.total_bytes

    def lock(self, path: str) -> File:
        """Take an exclusive lock; that of a dead process is free."""
        holder = self._disk.locks.get(path)
        if holder is not None and holder.is_alive:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
        node = self._disk.nodes.setdefault(path, SimNode())
        node.is_named = True
        self._disk.locks[path] = self._process
        return SimFile(self._disk, self._process, path, node)

    async def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        """Call `function` after as long as a disk takes, and, now and then, tell of it later."""
        disk, rules, rng = self._disk, self._disk.rules, self._disk.rng
        delay_s = rng.uniform(rules.delay_min_s, rules.delay_max_s)
        if rng.random() < rules.slow_chance:
            delay_s += rng.uniform(0, rules.slow_max_s)
        await asyncio.sleep(delay_s)
        while disk.hung is not None:
            await disk.hung.wait()
        try:
            return function(*args, **kwargs)
        finally:
            # The thread has ended, the event loop does not know yet: a crash here is one after the operation.
            if disk.when_written is not None:
                happens, disk.when_written = disk.when_written, None
                disk.loop.call_soon(happens, context=contextvars.Context())
                await asyncio.sleep(delay_s)
            elif rng.random() < 0.2:
                await asyncio.sleep(delay_s)
