"""Which inodes this client has open, counted per descriptor, and telling the meta server of the last close.

An inode that is open is not freed when its last name goes. Closes are told with the next renewal, at once if the inode
has no name any more: its space is waiting.
"""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any

from mendfs.client.files import File, Files
from mendfs.client.session import Session
from mendfs.client.tasks import Tasks
from mendfs.errors import CommitRefused, MendfsError, OperationError
from mendfs.model import Inode
from mendfs.wire.messages.meta import Opened, OpenInode
from mendfs.wire.messages.session import CloseInodes, Done

CLOSED_MAX = 512
"""Closes collected before they are told without waiting for a renewal."""


class Opens:
    """Opens of one client."""

    def __init__(self, session: Session, files: Files, tasks: Tasks) -> None:
        self._session = session
        self._files = files
        self._tasks = tasks
        self._closed: set[Inode] = set()
        self._telling: set[Inode] = set()
        self._told = asyncio.Event()
        self._open: set[Inode] = set()
        self._making: set[Inode] = set()
        self._opening: Counter[Inode] = Counter()

    @property
    def inodes(self) -> tuple[Inode, ...]:
        """Every inode that a descriptor has open, or will when the answer to its making comes."""
        return tuple(self._open | self._making)

    def making(self, inode: Inode) -> None:
        """It is being made and opened at once. Its answer may be lost, and it unlinked by another client meanwhile: a
        session that resumed without it would let it go. `opened` or `not_made` follows.
        """
        self._making.add(inode)

    def not_made(self, inode: Inode, error: BaseException) -> None:
        """Nobody here has it open; unless the server has refused to make it, it may believe so."""
        self._making.discard(inode)
        if not isinstance(error, OperationError | CommitRefused):
            self._closed.add(inode)

    async def open(self, inode: Inode) -> tuple[File, bool]:
        """Open an inode: fresh attributes and extents. Returns the file, and whether the kernel may keep its pages."""
        await self._wait_until_told(inode)
        self._opening[inode] += 1
        try:
            opened = await self._session.query(OpenInode(inode), Opened)
        except BaseException:
            if inode not in self._open:
                self._closed.add(inode)  # the server may have it open although nobody here knows
            raise
        finally:
            self._opening[inode] -= 1
            if not self._opening[inode]:
                del self._opening[inode]
        file = self._files.get(inode)
        keep = file.learn_opened(opened)
        self.opened(file)
        return file, keep

    def in_background(self, work: Coroutine[Any, Any, None]) -> None:
        """Let a release go on that nobody waits for."""
        self._tasks.spawn(work)

    async def _wait_until_told(self, inode: Inode) -> None:
        # A close that is under way would take the new open with it.
        while inode in self._telling:
            await self._told.wait()

    def opened(self, file: File) -> None:
        """One more descriptor of an inode that the meta server knows to be open."""
        file.opens += 1
        self._open.add(file.inode)
        self._making.discard(file.inode)
        self._closed.discard(file.inode)

    def closed(self, file: File) -> None:
        """One descriptor less."""
        file.opens -= 1
        if file.opens > 0:
            return
        self._open.discard(file.inode)
        self._closed.add(file.inode)
        self._files.settle(file)
        if len(self._closed) >= CLOSED_MAX or (file.attributes is not None and file.attributes.nlink == 0):
            self._tasks.spawn(self._tell())

    async def _tell(self) -> None:
        closed = self.take_closed()
        if not closed:
            return
        try:
            await self._session.query(CloseInodes(closed), Done)
        except MendfsError:
            self.closed_again(closed)
            raise
        self.told(closed)

    def take_closed(self) -> tuple[Inode, ...]:
        """Inodes closed since the last call. Say `told` or `closed_again` about them afterwards."""
        # Not those that are being opened again just now: the close could arrive after the open.
        closed = tuple(self._closed.difference(self._opening))
        self._closed.difference_update(closed)
        self._telling.update(closed)
        return closed

    def told(self, inodes: tuple[Inode, ...]) -> None:
        """The meta server knows that these are closed."""
        self._telling.difference_update(inodes)
        told, self._told = self._told, asyncio.Event()
        told.set()

    def closed_again(self, inodes: tuple[Inode, ...]) -> None:
        """The meta server may not know that these are closed."""
        self.told(inodes)
        self._closed.update(inode for inode in inodes if inode not in self._open)

    async def open_again(self) -> None:
        """A new session has begun: it must have open what the old one had. What is gone stays gone."""
        for inode in self.inodes:
            try:
                opened = await self._session.query(OpenInode(inode), Opened)
            except MendfsError as error:
                file = self._files.find(inode)
                if file is not None:
                    file.errors.append(error)
                continue
            file = self._files.find(inode)
            if file is not None:
                file.learn_opened(opened)
