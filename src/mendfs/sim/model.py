"""What a file and a name may be, as far as the promises go: the reference that a run is compared with.

Where an outcome is known there is one value; where it is not (the client died in the middle, the meta server lost what
nobody had synced) there are several, and looking decides. Pure: no I/O, no clock, no event loop.
"""

import re
from collections.abc import Iterator

import msgspec

FILE_BYTES_MAX = 64 << 10
"""No file of a run is longer."""
COMPARED_BYTES = 512
"""Compared at once: a byte at a time only in pieces that differ."""

Client = str


class Event(msgspec.Struct, frozen=True, eq=False):
    """One change of a file's bytes: a write of `data` at `offset`, or, without data, a truncation to `offset`."""

    client: Client
    offset: int
    data: bytes | None

    @property
    def range(self) -> tuple[int, int]:
        """The bytes it says something about."""
        return (self.offset, FILE_BYTES_MAX) if self.data is None else (self.offset, self.offset + len(self.data))


class Content:
    """Bytes that are certain, and others that may be in their place; a size between two bounds."""

    __slots__ = ("alternatives", "certain", "size_max", "size_min")

    def __init__(self) -> None:
        self.certain = bytearray(FILE_BYTES_MAX)
        self.alternatives: list[tuple[int, bytes]] = []
        self.size_min = 0
        self.size_max = 0

    def copy(self) -> "Content":
        """Another one like it."""
        other = Content()
        other.certain = bytearray(self.certain)
        other.alternatives = list(self.alternatives)
        other.size_min, other.size_max = self.size_min, self.size_max
        return other

    def apply(self, event: Event, *, is_certain: bool) -> None:
        """The event happened, or may have happened, wholly or in part."""
        begin, end = event.range
        data = bytes(end - begin) if event.data is None else event.data
        if not is_certain:
            self.alternatives.append((begin, data))
            size = begin if event.data is None else end
            self.size_min = min(self.size_min, size) if event.data is None else self.size_min
            self.size_max = max(self.size_max, size)
            return
        self.certain[begin:end] = data
        self._clip_alternatives(begin, end)
        if event.data is None:
            self.size_min = self.size_max = begin
        else:
            self.size_min, self.size_max = max(self.size_min, end), max(self.size_max, end)

    def _clip_alternatives(self, begin: int, end: int) -> None:
        kept: list[tuple[int, bytes]] = []
        for offset, data in self.alternatives:
            if offset < begin:
                kept.append((offset, data[: begin - offset]))
            if offset + len(data) > end:
                kept.append((max(offset, end), data[max(0, end - offset) :]))
        self.alternatives = kept

    def problem_with(self, data: bytes, offset: int) -> str | None:
        """Why `data` cannot stand at `offset`, or None. Bytes past the file's end are not to be asked about."""
        end = offset + len(data)
        expected = self.certain[offset:end]
        if data == expected:
            return None
        for place in _differences(data, expected, offset):
            has, wants = data[place - offset], expected[place - offset]
            if not any(
                begin <= place < begin + len(other) and other[place - begin] == has
                for begin, other in self.alternatives
            ):
                others = sorted(
                    {other[place - begin] for begin, other in self.alternatives if begin <= place < begin + len(other)}
                )
                return f"byte {place} is {has}, not {wants}{f' or any of {others}' if others else ''}"
        return None

    def problem_with_size(self, size: int) -> str | None:
        """Why the file cannot have `size` bytes, or None."""
        if self.size_min <= size <= self.size_max:
            return None
        wanted = str(self.size_min) if self.size_min == self.size_max else f"{self.size_min} to {self.size_max}"
        return f"the size is {size}, not {wanted}"

    def adopt(self, data: bytes, offset: int) -> None:
        """This is what is there."""
        self.certain[offset : offset + len(data)] = data
        self._clip_alternatives(offset, offset + len(data))

    def adopt_size(self, size: int) -> None:
        """This is how long it is."""
        self.size_min = self.size_max = size
        # What lies past the end is zeros, should the file grow again.
        self.certain[size:] = bytes(FILE_BYTES_MAX - size)
        self._clip_alternatives(size, FILE_BYTES_MAX)


def _differences(data: bytes, expected: bytes | bytearray, offset: int) -> Iterator[int]:
    """Where the two differ, for data that begins at `offset`. Nearly all of them is equal: compared piece by piece."""
    for begin in range(0, len(data), COMPARED_BYTES):
        has, wants = data[begin : begin + COMPARED_BYTES], expected[begin : begin + COMPARED_BYTES]
        if has != wants:
            for place, (one, other) in enumerate(zip(has, wants, strict=True), start=offset + begin):
                if one != other:
                    yield place


class FileState:
    """One file: what it holds now, what it held when it was last made durable, and what came since."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.inode = 0
        """0 while nobody knows: the call that made it was not answered."""
        self.now = Content()
        self.writers = bytearray(FILE_BYTES_MAX)
        """Who was the last to write each byte, as far as that is certain."""
        self._clients: list[Client] = []
        self.durable = Content()
        self.since: list[Event] = []
        self._unsure: list[Event] = []
        """Those of `since` that may not have happened: whoever's they are, no sync says that they have."""
        self.losses: list[tuple[int, frozenset[str]]] = []
        """(how many events of `since` there were, servers that lost what was not synced)."""
        self.unreadable: list[tuple[int, int]] = []
        """Ranges that no server may have any more."""
        self.is_beyond_knowing = False
        """Nothing can be said of its bytes any more: it is left alone."""
        self.is_unsure = False
        """More may be there than is certain: look before it is used."""

    def happened(self, event: Event, *, is_certain: bool) -> None:
        """One change."""
        self.now.apply(event, is_certain=is_certain)
        self.since.append(event)
        if not is_certain:
            self._unsure.append(event)
            self.is_unsure = True
        if is_certain:
            begin, end = event.range
            self.writers[begin:end] = self._mark(event.client) * (end - begin)
            self._is_there(event)

    def _is_there(self, event: Event) -> None:
        """Its bytes are held, whatever was lost before."""
        begin, end = event.range
        self.unreadable = [
            part
            for low, high in self.unreadable
            for part in ((low, min(high, begin)), (max(low, end), high))
            if part[0] < part[1]
        ]

    def synced(self, client: Client) -> None:
        """`client` was told that its changes are durable. What others wrote and nobody synced yet stays as it is."""
        for event in self.since:
            if event.client == client and event not in self._unsure:
                self._is_there(event)
        if all(event.client == client for event in self.since) and not self._unsure:
            self.durable = self.now.copy()
            self.since = []
            self.losses = []
            return
        for begin, end in self._runs_of(client):
            self.durable.adopt(bytes(self.now.certain[begin:end]), begin)
        self.durable.size_min = min(self.durable.size_min, self.now.size_min)
        self.durable.size_max = max(self.durable.size_max, self.now.size_max)
        self.since = [event for event in self.since if event.client != client or event in self._unsure]
        self.losses = [(len(self.since), servers) for _, servers in self.losses]

    def has_unsynced_of_others(self, client: Client) -> bool:
        """Whether somebody else has changed it and nobody made that durable, or nobody knows what has happened."""
        return bool(self._unsure) or self.is_unsure or any(event.client != client for event in self.since)

    def _runs_of(self, client: Client) -> list[tuple[int, int]]:
        """The ranges of bytes that `client` was the last to write."""
        mark = re.escape(self._mark(client))
        return [found.span() for found in re.finditer(mark + b"+", self.writers)]

    def _mark(self, client: Client) -> bytes:
        """A byte that stands for a client; 0 stands for nobody."""
        if client not in self._clients:
            self._clients.append(client)
        return bytes((self._clients.index(client) + 1,))

    def meta_lost(self) -> None:
        """The meta server lost what was not durable, or a part of it."""
        if not self.since:
            return
        self.now = self.durable.copy()
        for event in self.since:
            self.now.apply(event, is_certain=False)
        self._unsure = list(self.since)
        self.is_unsure = True

    def server_lost(self, server: str, quorum: int) -> None:
        """A data server lost what was not durable on it. A block that `quorum` servers lost may be nowhere."""
        if not self.since:
            return
        self.losses.append((len(self.since), frozenset((server,))))
        for number, event in enumerate(self.since):
            lost_by = {name for count, names in self.losses if number < count for name in names}
            if len(lost_by) >= quorum:
                self.unreadable.append(event.range)

    def may_be_unreadable(self, begin: int, end: int) -> bool:
        """Whether an error is an answer that the promises allow for these bytes."""
        return any(low < end and begin < high for low, high in self.unreadable)


class Value(msgspec.Struct, frozen=True, eq=False):
    """What a name may stand for."""

    kind: str
    """none, file, directory, symlink."""
    file: FileState | None = None
    target: bytes = b""
    inode: int = 0
    """Of a directory or symbolic link; 0: not known."""


NONE = Value("none")


class Name:
    """One name: what it stands for, or what it may stand for."""

    def __init__(self, directory: int, name: bytes) -> None:
        self.directory = directory
        self.name = name
        self.value = NONE
        self.candidates: list[Value] = []
        """Not empty: looking decides among these."""
        self.history: list[tuple[int, Value]] = [(0, NONE)]
        """(number of the operation that did it, value), from the last durable one on."""

    def became(self, value: Value, operation: int) -> None:
        """A change that was answered."""
        self.value = value
        self.history.append((operation, value))

    def may_have_become(self, value: Value, operation: int) -> None:
        """A change whose outcome is not known."""
        self.candidates = [*(self.candidates or [self.value]), value]
        self.history.append((operation, value))

    def forget_before(self, durable: int) -> None:
        """What operations up to `durable` did is durable."""
        while len(self.history) > 1 and self.history[1][0] <= durable:
            del self.history[0]

    def meta_lost(self, durable: int) -> None:
        """The meta server lost operations after `durable`, or the last ones of them."""
        self.forget_before(durable)
        if len(self.history) > 1:
            self.candidates = [value for _, value in self.history]

    def adopt(self, value: Value, operation: int) -> None:
        """This is what it stands for."""
        self.value = value
        self.candidates = []
        if self.history[-1][1] is not value:
            self.history.append((operation, value))
