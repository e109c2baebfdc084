"""A disk in memory for tests: it forgets at a power cut what was not synced, tears, and fails on demand."""

import asyncio
import errno
import os
import posixpath
import random
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from mendfs.sim.content import Node, apply_by_chance
from mendfs.world.disk import Buffer, File

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

PAGE = 4096


class MemoryNode(Node):
    """A file's content; tests damage it in place, and a sync makes that durable too."""

    def copy(self) -> "MemoryNode":
        copied = MemoryNode()
        copied.content, copied.durable = bytearray(self.content), bytearray(self.durable)
        copied.changes, copied.is_named = list(self.changes), self.is_named
        return copied

    def sync(self) -> None:
        self.durable = bytearray(self.content)
        self.changes.clear()

    def cut(self, rng: random.Random) -> None:
        """Of what was not synced, some sectors reached the disk, in no order."""
        survivor = bytearray(self.durable)
        apply_by_chance(survivor, self.changes, rng, 0.5)
        self.content, self.durable = survivor, bytearray(survivor)
        self.changes.clear()


class MemoryFile:
    """An open file."""

    def __init__(self, disk: "MemoryDisk", path: str, node: MemoryNode) -> None:
        self._disk = disk
        self._path = path
        self._node = node
        self._age = disk.age

    def _check(self, operation: str) -> None:
        if self._age != self._disk.age:
            raise OSError(errno.EIO, "the machine this file was open on has lost power", self._path)
        self._disk.check(operation, self._path)

    def read_into(self, buffer: memoryview | bytearray, offset: int) -> int:
        self._check("read")
        bad = self._disk.unreadable
        if bad.start < offset + len(buffer) and offset < bad.stop and self._path.endswith(".seg"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), self._path)
        part = self._node.content[offset : offset + len(buffer)]
        memoryview(buffer)[: len(part)] = part
        return len(part)

    def read_cached_into(self, buffer: memoryview | bytearray, offset: int) -> bool:
        return self._disk.is_cached and self.read_into(buffer, offset) == len(buffer)

    def write(self, buffers: Sequence[Buffer], offset: int) -> None:
        data = b"".join(bytes(buffer) for buffer in buffers)
        try:
            self._check("write")
        except OSError:
            # As a short write does: part of it is there, and the caller must act as if nothing were.
            self._node.apply((offset, data[: len(data) // 2]))
            raise
        self._node.apply((offset, data))

    def datasync(self) -> None:
        try:
            self._check("sync")
        except OSError:
            # The kernel drops what it could not write and forgets that it was dirty: reads still show it.
            self._node.changes.clear()
            raise
        self._node.sync()

    def truncate(self, length: int) -> None:
        self._check("write")
        self._node.apply(length)

    def punch(self, offset: int, length: int) -> None:
        self._check("punch")
        length = min(length, len(self._node.content) - offset)
        self._node.apply((offset, bytes(max(0, length))))

    def forget_cached(self, offset: int, length: int) -> None:
        self._check("forget")

    def size(self) -> int:
        return len(self._node.content)

    def allocated(self) -> int:
        """Pages that hold something: what is all zeros counts as punched."""
        content = self._node.content
        return sum(
            PAGE
            for at in range(0, len(content), PAGE)
            if content.count(0, at, at + PAGE) < len(content[at : at + PAGE])
        )

    def is_linked(self) -> bool:
        return self._node.is_linked

    def close(self) -> None:
        self._disk.locked.discard(self._path)


class MemoryDisk:
    """A machine's files. `fault(operation, path)` may raise OSError: read write sync punch open unlink names room."""

    def __init__(self) -> None:
        self.nodes: dict[str, MemoryNode] = {}
        self.removed: dict[str, MemoryNode] = {}
        """Removed, but the directory is not synced since: a power cut may bring them back."""
        self.age = 0
        self.is_cached = True
        self.free = 1 << 40
        self.total = 1 << 41
        self.locked: set[str] = set()
        self.fault: Callable[[str, str], None] = lambda operation, path: None
        self.counts: dict[str, int] = {}
        self.unreadable = range(0)
        """Offsets that no segment file can be read at."""
        self.yields = False
        """Whether others may run while a thread would work."""

    def check(self, operation: str, path: str) -> None:
        self.counts[operation] = self.counts.get(operation, 0) + 1
        self.fault(operation, path)

    def cut(self, seed: int) -> None:
        """Lose power: what is open is dead, what was not synced is lost, torn or by chance there."""
        rng = random.Random(seed)
        self.age += 1
        self.locked.clear()
        for path, node in self.removed.items():
            if node.is_named and path not in self.nodes and rng.random() < 0.5:
                self.nodes[path] = node
        self.removed.clear()
        for path, node in list(self.nodes.items()):
            if not node.is_named and rng.random() < 0.5:
                del self.nodes[path]
                continue
            node.is_named = True
            node.cut(rng)
        self._detach()

    def kill(self) -> None:
        """Kill the process: what is open is dead, what was written is there."""
        self.age += 1
        self.locked.clear()
        self._detach()

    def _detach(self) -> None:
        """Whoever does not know yet that it is dead writes into nothing."""
        self.nodes = {path: node.copy() for path, node in self.nodes.items()}
        self.removed = {path: node.copy() for path, node in self.removed.items()}

    def open(self, path: str, *, create: bool = False, read_only: bool = False) -> File:
        self.check("open", path)
        if create and path in self.nodes:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        if not create and path not in self.nodes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        if create:
            self.nodes[path] = MemoryNode()
        return MemoryFile(self, path, self.nodes[path])

    def exists(self, path: str) -> bool:
        return path in self.nodes or any(name.startswith(path + "/") for name in self.nodes)

    def names(self, path: str) -> list[str]:
        if path in self.nodes:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        return sorted({name[len(path) + 1 :].split("/")[0] for name in self.nodes if name.startswith(path + "/")})

    def make_directories(self, path: str) -> None:
        self.check("names", path)

    def sync_directory(self, path: str) -> None:
        self.check("names", path)
        for name, node in self.nodes.items():
            if posixpath.dirname(name) == path:
                node.is_named = True
        for name in [name for name in self.removed if posixpath.dirname(name) == path]:
            del self.removed[name]

    def unlink(self, path: str) -> None:
        self.check("unlink", path)
        if path not in self.nodes:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        node = self.removed[path] = self.nodes.pop(path)
        node.is_linked = False

    def read_file(self, path: str) -> bytes:
        self.check("read", path)
        return bytes(self.nodes[path].content)

    def replace_file(self, path: str, content: bytes, *, mode: int = 0o600) -> None:
        self.check("write", path)
        node = self.nodes[path] = MemoryNode()
        node.apply((0, content))
        node.sync()
        node.is_named = True

    def free_bytes(self, path: str) -> int:
        self.check("room", path)
        return self.free

    def total_bytes(self, path: str) -> int:
        return self.total

    def lock(self, path: str) -> File:
        if path in self.locked:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), path)
        self.nodes.setdefault(path, MemoryNode())
        self.locked.add(path)
        return MemoryFile(self, path, self.nodes[path])

    async def run(
        self, function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Result:
        if self.yields:
            await asyncio.sleep(0)
        result = function(*args, **kwargs)
        if self.yields:
            await asyncio.sleep(0)
        return result
