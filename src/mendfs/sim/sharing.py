"""What several clients do at once with one name or file, where nobody can know the order: each actor has its own rule.

Appends are whole and none is lost; of several who make a name with O_EXCL one wins; what is renamed over a file is
there in one version or another, never in none; a file that is unlinked while it is open stays until it is closed.
"""

import asyncio
import errno
import os
import stat
from functools import partial
from typing import Any

from mendfs.client.volume import OpenFile, Volume
from mendfs.errors import MendfsError, OperationError
from mendfs.model import ROOT_INODE, Inode
from mendfs.sim.driver import Outcome
from mendfs.sim.machines import ClientMachine
from mendfs.sim.workload import Workload

APPENDED_BYTES_MAX = 60_000
"""A new file is begun above this: looking at all of it at the end must not take long."""
READ_STEP = 4096


async def _append(opened: OpenFile, record: bytes, _: Volume) -> int:
    return await opened.write(record, 0)


async def read_all(volume: Volume, opened: OpenFile, size: int) -> list[tuple[int, bytes | None]]:
    """All of a file in pieces; None for one that cannot be read."""
    pieces: list[tuple[int, bytes | None]] = []
    for offset in range(0, size, READ_STEP):
        buffer = bytearray(b"\xaa" * min(READ_STEP, size - offset))  # what is not filled is seen
        try:
            count = await opened.read_into(memoryview(buffer), offset)
            pieces.append((offset, bytes(buffer[:count])))
        except MendfsError:
            pieces.append((offset, None))
    return pieces


class Appends:
    """Several clients append records to one file."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._rng = workload.rng
        self._inode = 0
        self._file_number = 0
        self._last = 0
        self._bytes = 0
        self._acknowledged: dict[int, tuple[int, int]] = {}
        """Record -> (times the meta server had lost something, data servers had)."""
        self._sent: set[int] = set()
        self._writing = 0

    def _losses(self) -> tuple[int, int]:
        return self._workload.meta_losses, self._workload.server_losses

    async def actor(self) -> None:
        """One appender: open, a few records, close."""
        workload = self._workload
        while not workload.is_over:
            await asyncio.sleep(self._rng.expovariate(0.11))
            if not self._inode or self._bytes > APPENDED_BYTES_MAX:
                if self._writing:
                    continue
                await self._turn_over()
                continue
            self._writing += 1
            try:
                await self._session(workload.client())
            finally:
                self._writing -= 1

    async def _turn_over(self) -> None:
        """Look at the file that is full, and begin another."""
        self._writing += 1
        try:
            if self._inode:
                await self.check(self._workload.client())
            self._inode = 0
            self._file_number += 1
            name = b"log%d" % self._file_number

            async def make(volume: Volume) -> int:
                made = await volume.make(ROOT_INODE, name, stat.S_IFREG | 0o644, uid=0, gid=0)
                await volume.sync()
                return made.inode

            losses = self._workload.meta_losses
            outcome = await self._workload.call(self._workload.client(), f"make {name.decode()}", make)
            if outcome.is_ok and losses == self._workload.meta_losses:
                self._inode, self._bytes = outcome.value, 0
                self._acknowledged.clear()
                self._sent.clear()
        finally:
            self._writing -= 1

    async def _session(self, client: ClientMachine) -> None:
        workload, inode = self._workload, self._inode
        await workload.driver.ready(client)
        life = client.process
        flags = os.O_WRONLY | os.O_APPEND
        outcome = await workload.call(
            client, "open the log", lambda volume: volume.open_file(Inode(inode), flags=flags), life
        )
        if not outcome.is_ok:
            return
        opened: OpenFile = outcome.value
        for _ in range(self._rng.randrange(1, 5)):
            self._last += 1
            number = self._last
            record = self._record(number)
            self._sent.add(number)
            losses = self._losses()
            outcome = await workload.call(client, f"append record {number}", partial(_append, opened, record), life)
            if not outcome.is_ok:
                break
            self._bytes += len(record)
            self._acknowledged[number] = losses
        if not outcome.has_died:
            await workload.call(client, "close the log", lambda _: opened.release(), life)

    def _record(self, number: int) -> bytes:
        length = self._rng.choice([40, 64, 200, 1000, 5000])
        return (b"<%08d:%05d:" % (number, length)).ljust(length - 1, b"%d" % (number % 10)) + b">"

    async def check(self, client: ClientMachine) -> None:
        """Read the whole file: records that are whole, each once, and all that were acknowledged."""
        workload, inode = self._workload, self._inode
        if not inode:
            return

        async def read(volume: Volume) -> list[tuple[int, bytes | None]]:
            opened = await volume.open_file(Inode(inode), flags=os.O_RDONLY)
            try:
                return await read_all(volume, opened, opened.attributes.size)
            finally:
                await opened.release()

        before = self._losses()
        outcome = await workload.call(client, "check the log", read)
        if not outcome.is_ok or before != self._losses():
            return
        pieces: list[tuple[int, bytes | None]] = outcome.value
        if any(piece is None for _, piece in pieces):
            return  # looked at again, or excused by what was lost
        found = self._parse(b"".join(piece for _, piece in pieces if piece is not None))
        for number, losses in self._acknowledged.items():
            if number not in found and losses == before:
                workload.driver.violation(f"record {number} was appended and is not there")

    def _parse(self, content: bytes) -> set[int]:
        violation = self._workload.driver.violation
        found: set[int] = set()
        at = 0
        while at < len(content):
            head = content[at : at + 16]
            if len(head) < 16 or head[:1] != b"<" or not head[1:9].isdigit() or not head[10:15].isdigit():
                violation(f"the log has {head!r} at {at}, which is no record")
                return found
            number, length = int(head[1:9]), int(head[10:15])
            body = content[at : at + length]
            filling = b"%d" % (number % 10) * (length - 17)
            if body[16:] != filling + b">" or number not in self._sent:
                violation(f"record {number} of the log is torn, or nobody's")
                return found
            if number in found:
                violation(f"record {number} is there twice")
            found.add(number)
            at += length
        return found


class Replaced:
    """One name, a new version renamed over it again and again, or written over after O_TRUNC; readers all the while."""

    def __init__(self, workload: Workload, name: bytes, *, by_rename: bool) -> None:
        self._workload = workload
        self._rng = workload.rng
        self._name = name
        self._by_rename = by_rename
        self._attempted = 0
        self._certain = 0
        """The newest version that is there for certain."""
        self._durable = 0
        self._lock = asyncio.Lock()

    def meta_lost(self) -> None:
        """What was not durable may be gone."""
        self._certain = self._durable

    def _content(self, version: int) -> bytes:
        return b"v%08d;" % version * (1 + version % 977)

    async def writer(self) -> None:
        """New versions, one after the other."""
        workload = self._workload
        while not workload.is_over:
            await asyncio.sleep(self._rng.expovariate(0.11))
            async with self._lock:
                self._attempted += 1
                version = self._attempted
                durable = version == 1 or self._rng.random() < 0.2
                losses = workload.meta_losses
                work = self._rename_over if self._by_rename else self._write_over
                what = f"version {version} of {self._name.decode()}"
                outcome = await workload.call(workload.client(), what, partial(work, version=version, durable=durable))
                if outcome.is_ok and losses == workload.meta_losses:
                    self._certain = version
                    if durable:
                        self._durable = version
                elif outcome.is_unknown:
                    await asyncio.sleep(45.0)  # until it is settled, lest an older version come after a newer one

    async def _rename_over(self, volume: Volume, *, version: int, durable: bool) -> None:
        beside = b"%s.new" % self._name
        try:
            await volume.unlink(ROOT_INODE, beside)
        except OperationError as error:
            if error.errno != errno.ENOENT:
                raise
        made = await volume.make(ROOT_INODE, beside, stat.S_IFREG | 0o644, uid=0, gid=0, open=True)
        opened = await volume.open_made(made, flags=os.O_RDWR)
        try:
            await opened.write(self._content(version), 0)
            await opened.flush()
        finally:
            await opened.release()
        await volume.rename(ROOT_INODE, beside, ROOT_INODE, self._name)
        if durable:
            await volume.sync()

    async def _write_over(self, volume: Volume, *, version: int, durable: bool) -> None:
        if version == 1:
            made = await volume.make(ROOT_INODE, self._name, stat.S_IFREG | 0o644, uid=0, gid=0, open=True)
            opened = await volume.open_made(made, flags=os.O_RDWR)
        else:
            found = await volume.lookup(ROOT_INODE, self._name)
            opened = await volume.open_file(found.inode, flags=os.O_RDWR | os.O_TRUNC)
        try:
            await opened.write(self._content(version), 0)
            if durable:
                await opened.fsync()
            await opened.flush()
        finally:
            await opened.release()

    async def reader(self) -> None:
        """Looks at it now and then."""
        while not self._workload.is_over:
            await asyncio.sleep(self._rng.expovariate(0.11))
            await self.check(self._workload.client(), final=False)

    async def check(self, client: ClientMachine, *, final: bool) -> None:
        """One whole version is there, and not an older one than is certain."""
        workload = self._workload
        if not self._durable:
            return

        async def read(volume: Volume) -> list[tuple[int, bytes | None]]:
            found = await volume.lookup(ROOT_INODE, self._name)
            opened = await volume.open_file(found.inode, flags=os.O_RDONLY)
            try:
                return await read_all(volume, opened, opened.attributes.size)
            finally:
                await opened.release()

        if not self._by_rename:
            async with self._lock:
                await self._check_written(client, read, final=final)
            return
        certain, losses = self._certain, workload.meta_losses
        outcome = await workload.call(client, f"check {self._name.decode()}", read)
        if losses != workload.meta_losses:
            return
        self._judge(outcome, certain, final=final)

    async def _check_written(self, client: ClientMachine, read: Any, *, final: bool) -> None:
        """Between two versions written in place, and if the last one is there for certain, it is there whole."""
        version, losses, violation = self._attempted, self._workload.meta_losses, self._workload.driver.violation
        outcome = await self._workload.call(client, f"check {self._name.decode()}", read)
        if version != self._certain or losses != self._workload.meta_losses:
            return
        if not outcome.is_ok or any(piece is None for _, piece in outcome.value):
            if final or outcome.errno:
                violation(f"{self._name.decode()}, closed, cannot be read: {outcome}")
        elif b"".join(piece for _, piece in outcome.value) != self._content(version):
            violation(f"{self._name.decode()}, closed, is not version {version}")

    def _judge(self, outcome: Outcome, certain: int, *, final: bool) -> None:
        violation, name = self._workload.driver.violation, self._name.decode()
        if not outcome.is_ok:
            # A path may lead to an inode that was replaced a moment ago: the kernel would walk it once more.
            if final or outcome.errno not in (0, errno.ENOENT, errno.ESTALE):
                violation(f"{name} cannot be read: {outcome}")
            return
        pieces: list[tuple[int, bytes | None]] = outcome.value
        if any(piece is None for _, piece in pieces):
            if final:
                violation(f"{name} has bytes that cannot be read, though it was durable before it took the name")
            return
        content = b"".join(piece for _, piece in pieces if piece is not None)
        version = int(content[1:9]) if content[1:9].isdigit() else 0
        if content != self._content(version):
            violation(f"{name} is no whole version: {len(content)} bytes that begin with {content[:30]!r}")
        elif not certain <= version <= self._attempted:
            violation(f"{name} is version {version}, not {certain} to {self._attempted}")


async def race_for_names(workload: Workload) -> None:
    """Several clients make one name with O_EXCL at once: one wins."""
    number = 0
    while not workload.is_over:
        await asyncio.sleep(workload.rng.expovariate(0.1))
        number += 1
        name = b"lock%d" % number

        async def make(volume: Volume, name: bytes = name) -> Any:
            return await volume.make(ROOT_INODE, name, stat.S_IFREG | 0o600, uid=0, gid=0)

        losses = workload.meta_losses
        clients = [workload.client() for _ in range(4)]
        outcomes = await asyncio.gather(
            *(workload.call(client, f"race for {name.decode()}", make) for client in clients)
        )
        winners = sum(outcome.is_ok for outcome in outcomes)
        unsure = any(outcome.is_unknown for outcome in outcomes)
        if losses == workload.meta_losses and (winners > 1 or (winners == 0 and not unsure)):
            workload.driver.violation(f"{winners} of 4 have made {name.decode()}: {[str(each) for each in outcomes]}")


async def use_unlinked_files(workload: Workload) -> None:
    """Write, unlink while it is open, read later."""
    number = 0
    while not workload.is_over:
        await asyncio.sleep(workload.rng.expovariate(0.1))
        number += 1
        name, data = b"temporary%d" % number, workload.data(workload.rng.randrange(1, 20_000))
        wait_s = workload.rng.expovariate(0.1)

        async def use(volume: Volume, name: bytes = name, data: bytes = data, wait_s: float = wait_s) -> bytes:
            session = volume._shared.session
            life = session._life
            made = await volume.make(ROOT_INODE, name, stat.S_IFREG | 0o600, uid=0, gid=0, open=True)
            opened = await volume.open_made(made, flags=os.O_RDWR)
            try:
                await opened.write(data, 0)
                await volume.unlink(ROOT_INODE, name)
                await opened.flush()
                await asyncio.sleep(wait_s)
                buffer = bytearray(len(data))
                count = await opened.read_into(memoryview(buffer), 0)
                return bytes(buffer[:count])
            except OperationError as error:
                if session._life != life:
                    # Its lease ran out: then nobody had the file open any more.
                    raise MendfsError("the session was lost meanwhile") from error
                raise
            finally:
                await opened.release()

        losses = workload.meta_losses, workload.server_losses
        outcome = await workload.call(workload.client(), f"use {name.decode()}", use)
        if losses != (workload.meta_losses, workload.server_losses):
            continue
        if outcome.is_ok and outcome.value != data:
            workload.driver.violation(f"{name.decode()}, open and unlinked, has other contents than were written")
        elif outcome.errno:
            workload.driver.violation(f"{name.decode()}, open and unlinked: {outcome}")
