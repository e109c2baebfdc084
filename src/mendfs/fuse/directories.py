"""Open directories: a listing in pieces, at positions that stay what they are while names come and go.

A position is a number that the kernel and telldir(3) keep: 1 is after `.`, 2 after `..`, and 2 + n after the n-th name
that was handed out. The names are remembered, since they are what the volume continues after; a removed one too.
"""

import asyncio
import stat
import zlib
from collections.abc import Callable

import msgspec

from mendfs.fuse import protocol_replies
from mendfs.fuse.handles import Handles
from mendfs.fuse.protocol_replies import DIRENT_BYTES, ENTRY_BYTES, Replies
from mendfs.fuse.protocol_requests import Fsync, Header, Open, Read, Release
from mendfs.fuse.served import ServedVolume
from mendfs.model import Inode
from mendfs.wire.messages.meta import DirectoryEntry

NAMES_AHEAD = 1000
"""Names fetched at once: a call costs more than a thousand names in its answer."""
NAMES_PACKED = 1024
"""Remembered names are packed in lots of this many: a directory of ten million costs tens of MB, not a GB."""
DOTS = 2


class Positions:
    """The names that were handed out, by number. Append-only, so a number means one name until `clear`."""

    def __init__(self) -> None:
        self._packed: list[bytes] = []
        self._recent: list[bytes] = []

    def __len__(self) -> int:
        return len(self._packed) * NAMES_PACKED + len(self._recent)

    def append(self, name: bytes) -> None:
        """The next number's name."""
        self._recent.append(name)
        if len(self._recent) == NAMES_PACKED:
            self._packed.append(zlib.compress(b"\0".join(self._recent), 1))
            self._recent.clear()

    def name(self, number: int) -> bytes:
        """The `number`-th name, counted from 1; before the first there is the empty one."""
        if number == 0:
            return b""
        lot, index = divmod(number - 1, NAMES_PACKED)
        if lot == len(self._packed):
            return self._recent[index]
        return zlib.decompress(self._packed[lot]).split(b"\0")[index]

    def clear(self) -> None:
        """Begin anew: rewinddir(3) makes earlier positions meaningless."""
        self._packed.clear()
        self._recent.clear()


class OpenDirectory:
    """One opendir(3). `window` holds what the last answer said and what was fetched ahead, in order."""

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.parent = inode
        self.lock = asyncio.Lock()
        self.positions = Positions()
        self.window: list[DirectoryEntry] = []
        self.start = 0
        """The number after which the window begins."""
        self.base = 0
        """The window's i-th name, from 0, has the number base + i + 1: another than start when somebody went back."""
        self.is_complete = False
        """Nothing follows the window."""

    def rewind(self, *, forget: bool) -> None:
        """Begin with the first name, as it is now; `forget` what earlier positions meant."""
        if forget:
            self.positions.clear()
        self._open_window(0)

    def go_to(self, number: int) -> None:
        """Let the window begin after the `number`-th name."""
        if number == self.start:
            return
        if self.base < number <= self.base + len(self.window):
            # The usual case: the kernel continues after an entry of the last answer, often not its last one.
            del self.window[: number - self.base]
            self.start = self.base = number
        else:
            self._open_window(number)

    def _open_window(self, number: int) -> None:
        self.window = []
        self.start = number
        self.base = len(self.positions)
        self.is_complete = False

    def hand_out(self, index: int) -> int:
        """The number of the window's `index`-th name, which is in an answer now."""
        number = self.base + index + 1
        if number > len(self.positions):
            self.positions.append(self.window[index].name)
        return number

    @property
    def last_name(self) -> bytes:
        """The name that the next one fetched comes after."""
        return self.window[-1].name if self.window else self.positions.name(self.start)


class Answer:
    """The entries of one READDIR or READDIRPLUS answer."""

    def __init__(self, room: int, replies: Replies, *, with_attributes: bool) -> None:
        self.parts: list[bytes] = []
        self.room = room
        self.with_attributes = with_attributes
        self._replies = replies

    @property
    def entries_max(self) -> int:
        """About how many more fit: names of eight bytes."""
        return self.room // (DIRENT_BYTES + 8 + (ENTRY_BYTES if self.with_attributes else 0)) + 1

    def append(self, entry: DirectoryEntry, position: int) -> bool:
        """Whether the entry still fitted."""
        raw = protocol_replies.directory_entry(
            inode=entry.inode, position=position, name=entry.name, kind=stat.S_IFMT(entry.kind)
        )
        if self.with_attributes:
            raw = self._replies.directory_entry_plus(raw, entry.attributes)
        if len(raw) > self.room:
            return False
        self.room -= len(raw)
        self.parts.append(raw)
        return True


class Directories:
    """OPENDIR, READDIR, READDIRPLUS, RELEASEDIR, FSYNCDIR."""

    def __init__(self, volume: ServedVolume, replies: Replies, is_open: Callable[[Inode], bool]) -> None:
        self._volume = volume
        self._replies = replies
        self._is_open = is_open
        self._handles: Handles[OpenDirectory] = Handles()

    def open(self, header: Header, request: Open) -> bytes:
        """Nothing is asked of the volume before somebody reads."""
        return protocol_replies.opened(self._handles.add(OpenDirectory(Inode(header.node))), 0)

    def release(self, header: Header, request: Release) -> bytes:
        """Forget the positions."""
        self._handles.remove(request.handle)
        return b""

    async def fsync(self, header: Header, request: Fsync) -> bytes:
        """A name is durable when the metadata log is, and a log must not be durable before the data it speaks of."""
        await self._volume.sync_committed()
        return b""

    async def read(self, header: Header, request: Read) -> bytes:
        """As many entries as fit."""
        return await self._read(request, with_attributes=False)

    async def read_plus(self, header: Header, request: Read) -> bytes:
        """The same with attributes, which counts as a lookup of each name."""
        return await self._read(request, with_attributes=True)

    async def _read(self, request: Read, *, with_attributes: bool) -> bytes:
        directory = self._handles.get(request.handle)
        answer = Answer(request.size, self._replies, with_attributes=with_attributes)
        async with directory.lock:
            if with_attributes:
                # Attributes fetched before this request could undo a size that the kernel learnt since.
                directory.window = [msgspec.structs.replace(each, attributes=None) for each in directory.window]
            if request.offset < DOTS:
                # rewinddir(3) makes positions meaningless; without forgetting them, a program that lists a directory
                # again and again through one descriptor would fill our memory.
                directory.rewind(forget=request.offset == 0)
                await self._fetch(directory, answer)
                self._append_dots(directory, answer, request.offset)
            else:
                await self._go_to(directory, answer, request.offset - DOTS)
            await self._append_names(directory, answer)
        return b"".join(answer.parts)

    def _append_dots(self, directory: OpenDirectory, answer: Answer, position: int) -> None:
        dots = (
            DirectoryEntry(b".", directory.inode, stat.S_IFDIR),
            DirectoryEntry(b"..", directory.parent, stat.S_IFDIR),
        )
        for number, entry in list(enumerate(dots, 1))[position:]:
            answer.append(entry, number)

    async def _go_to(self, directory: OpenDirectory, answer: Answer, number: int) -> None:
        directory.go_to(min(number, len(directory.positions)))
        # A position that this handle never gave out comes from an earlier one (NFS reopens directories): count.
        while number > len(directory.positions):
            if not directory.window:
                if directory.is_complete:
                    return
                await self._fetch(directory, answer)
                continue
            directory.hand_out(0)
            directory.go_to(directory.base + 1)

    async def _append_names(self, directory: OpenDirectory, answer: Answer) -> None:
        index = 0
        while True:
            if index == len(directory.window):
                # One answer, one call: what is missing in it comes with the kernel's next request.
                if directory.is_complete or index:
                    return
                await self._fetch(directory, answer)
                if not directory.window:
                    return
            if not answer.append(directory.window[index], DOTS + directory.base + index + 1):
                return
            directory.hand_out(index)
            index += 1

    async def _fetch(self, directory: OpenDirectory, answer: Answer) -> None:
        limit = answer.entries_max if answer.with_attributes else NAMES_AHEAD
        listing = await self._volume.list_directory(
            directory.inode, directory.last_name, max(limit, 1), answer.with_attributes
        )
        directory.parent = listing.parent
        directory.is_complete = listing.complete
        directory.window.extend(self._without_open(entry) for entry in listing.entries)

    def _without_open(self, entry: DirectoryEntry) -> DirectoryEntry:
        """Attributes of a file that is open here may lack its unflushed writes: let the kernel ask for them."""
        if entry.attributes is not None and self._is_open(entry.inode):
            return msgspec.structs.replace(entry, attributes=None)
        return entry
