"""Measuring a cluster from here: how long operations take, how many bytes and files a second it takes.

By the library, not through a mount, in a directory of its own that is removed at the end, also when it is interrupted.
What is read is read by a second client, so that nothing comes from a cache of the first.
"""

import asyncio
import os
import stat
import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from mendfs.cli.options import Located
from mendfs.cli.volumes import open_volume
from mendfs.client.volume import OpenFile, Volume
from mendfs.errors import MendfsError
from mendfs.model import ROOT_INODE, Inode, KiB, MiB
from mendfs.world import real_world

SMALL_BYTES = 4 * KiB
CHUNK_BYTES = MiB
FILES_AT_ONCE = 16
"""As many programs as make small files at the same time."""
WARM_UP_FACTOR = 2
"""Files for each server before anything is measured: then both clients have met all of them, or nearly so."""
LIST_LIMIT = 1000
DIRECTORY = stat.S_IFDIR | 0o755
FILE = stat.S_IFREG | 0o644

Sample = Callable[[int], Awaitable[object]]


# Not the loop's time, which goes in steps of a millisecond.
_now = time.perf_counter


class Bench:
    """A directory of a volume, and two clients of it."""

    def __init__(self, writer: Volume, reader: Volume, directory: Inode, data: bytes) -> None:
        self.writer = writer
        self.reader = reader
        self.directory = directory
        self.data = data

    # --- single steps -----------------------------------------------------------------------------------------

    async def _create(self, name: bytes, data: bytes, *, sync: bool = False) -> Inode:
        made = await self.writer.make(self.directory, name, FILE, uid=os.geteuid(), gid=os.getegid(), open=True)
        file = await self.writer.open_made(made, flags=os.O_WRONLY)
        try:
            await _write(file, data, sync=sync)
        finally:
            await file.release()
        return made.inode

    async def _read(self, inode: Inode, length: int) -> None:
        file = await self.reader.open_file(inode, flags=os.O_RDONLY)
        try:
            memory = memoryview(bytearray(min(length, CHUNK_BYTES)))
            position = 0
            while position < length:
                count = await file.read_into(memory[: length - position], position)
                if not count or memory[:count] != _expected(self.data, position, count):
                    raise MendfsError(f"inode {inode} reads back other bytes than were written, from {position} on")
                position += count
        finally:
            await file.release()

    # --- what is measured -------------------------------------------------------------------------------------

    async def latency(self, count: int) -> list[dict[str, Any]]:
        """Seconds of each operation, one after the other."""
        small = self.data[:SMALL_BYTES]
        inodes: dict[int, Inode] = {}

        async def create(number: int) -> None:
            inodes[number] = await self._create(b"f%d" % number, small)

        steps: list[tuple[str, Sample]] = [
            ("mkdir", lambda n: self._make_directory(b"d%d" % n)),
            ("create, write 4KiB, close", create),
            ("the same with fsync", lambda n: self._create(b"s%d" % n, small, sync=True)),
            ("stat", lambda n: self.reader.lookup(self.directory, b"f%d" % n)),
            ("open, read 4KiB, close", lambda n: self._read(inodes[n], SMALL_BYTES)),
            ("rename", lambda n: self.writer.rename(self.directory, b"f%d" % n, self.directory, b"r%d" % n)),
            ("unlink", lambda n: self.writer.unlink(self.directory, b"r%d" % n)),
            ("rmdir", lambda n: self.writer.rmdir(self.directory, b"d%d" % n)),
        ]
        # What is needed once, connections and ids, is there from here on.
        for number in range(WARM_UP_FACTOR * len(self.writer.servers)):
            await self._read(await self._create(b"w%d" % number, small), SMALL_BYTES)
        return [await _measure(name, step, count) for name, step in steps]

    async def throughput(self, size: int) -> list[dict[str, Any]]:
        """Bytes a second of one big file."""
        data = self.data
        made = await self.writer.make(self.directory, b"big", FILE, uid=os.geteuid(), gid=os.getegid(), open=True)
        file = await self.writer.open_made(made, flags=os.O_WRONLY)
        try:
            began_s = _now()
            for position in range(0, size, CHUNK_BYTES):
                await file.write(data[: min(CHUNK_BYTES, size - position)], position)
            await file.fsync()
            written_s = _now() - began_s
        finally:
            await file.release()
        began_s = _now()
        await self._read(made.inode, size)
        return [
            {"operation": "write, fsync", "bytes": size, "bytes_per_second": size / written_s},
            {"operation": "read", "bytes": size, "bytes_per_second": size / (_now() - began_s)},
        ]

    async def files(self, count: int) -> list[dict[str, Any]]:
        """Files a second, several at a time."""
        inodes: list[Inode] = []

        async def create(number: int) -> None:
            inodes.append(await self._create(b"n%d" % number, self.data[:SMALL_BYTES]))

        async def read(number: int) -> None:
            await self._read(inodes[number], SMALL_BYTES)

        async def unlink(number: int) -> None:
            await self.writer.unlink(self.directory, b"n%d" % number)

        results = []
        for name, step in (("create, write 4KiB, close", create), ("open, read 4KiB, close", read), ("unlink", unlink)):
            began_s = _now()
            await _several(step, count)
            results.append({"operation": name, "count": count, "files_per_second": count / (_now() - began_s)})
        return results

    async def _make_directory(self, name: bytes) -> Inode:
        made = await self.writer.make(self.directory, name, DIRECTORY, uid=os.geteuid(), gid=os.getegid())
        return made.inode


async def _write(file: OpenFile, data: bytes, *, sync: bool) -> None:
    await file.write(data, 0)
    if sync:
        await file.fsync()
    await file.flush()


def _expected(data: bytes, position: int, count: int) -> bytes:
    """What a file that is written in chunks of `data` holds."""
    at = position % CHUNK_BYTES
    return data[at : at + count]


async def _measure(name: str, step: Sample, count: int) -> dict[str, Any]:
    samples = []
    for number in range(count):
        began_s = _now()
        await step(number)
        samples.append(1000 * (_now() - began_s))
    samples.sort()
    return {
        "operation": name,
        "count": count,
        "median_ms": statistics.median(samples),
        "p90_ms": samples[min(int(0.9 * count), count - 1)],
        "max_ms": samples[-1],
    }


async def _several(step: Sample, count: int) -> None:
    """Do a step for each number, FILES_AT_ONCE at a time; the first error ends the others and is raised."""
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await step(number)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(FILES_AT_ONCE, count)):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


@asynccontextmanager
async def _bench(located: Located) -> AsyncIterator[Bench]:
    rng = real_world().rng
    async with AsyncExitStack() as stack:
        writer = await stack.enter_async_context(open_volume(located, prepares=True))
        reader = await stack.enter_async_context(open_volume(located, read_only=True, prepares=True))
        name = f".mendfs-bench-{rng.randbytes(6).hex()}".encode()
        made = await writer.make(ROOT_INODE, name, DIRECTORY, uid=os.geteuid(), gid=os.getegid())
        try:
            yield Bench(writer, reader, made.inode, rng.randbytes(CHUNK_BYTES))
        finally:
            await _remove(writer, name, made.inode)


async def _remove(volume: Volume, name: bytes, directory: Inode) -> None:
    while (listing := await volume.list_directory(directory, b"", LIST_LIMIT, with_attributes=False)).entries:
        for entry in listing.entries:
            remove = volume.rmdir if entry.kind == stat.S_IFDIR else volume.unlink
            await remove(directory, entry.name)
    await volume.rmdir(ROOT_INODE, name)


async def measure(located: Located, what: tuple[str, ...], *, count: int, size: int) -> dict[str, Any]:
    """The document of `mendfs bench`: a list of results for each kind that is asked for."""
    found: dict[str, Any] = {}
    async with _bench(located) as bench:
        for kind in what:
            match kind:
                case "latency":
                    found[kind] = await bench.latency(count)
                case "throughput":
                    found[kind] = await bench.throughput(size)
                case _:
                    found[kind] = await bench.files(count)
    return found
