"""How many round trips each operation takes, over hosts with 10 ms of delay: the table of docs/performance.md."""

import ctypes
import json
import os
import stat
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mendfs.client.paths import resolve
from mendfs.client.volume import Volume, VolumeOptions
from mendfs.cluster.folder import read_secret
from mendfs.fuse.server import MountOptions
from mendfs.model import ROOT_INODE, Attributes, Inode, KiB
from mendfs.world import real_world
from tests.hosts import Sent, needs_hosts, rounds
from tests.mount.conftest import LoopThread
from tests.mount.test_machines import DATA, DELAY_S, Machines

pytestmark = [needs_hosts, pytest.mark.seed("D6", "D8")]

DELAYS = (1, 1, 1, 2, 2, 4, 4, 8)
"""Delays of the tries, times DELAY_S: what goes on in the background is counted too, and a busy machine sends late what
could leave together. The longer a trip takes, the more is certain to have left together."""
BELIEVED_S = MountOptions().walk_timeout_s
BLOCK = 16 * KiB
SEQUENTIAL_TRIPS_MAX = 10
"""For 100 blocks; one after the other they would take 100."""
SMALL = b"x" * 4096
PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
IN_BACKGROUND = ("sync_store", "acknowledge_late")
"""Synced after some seconds, told afterwards."""
CLONE_NEWNET = 0x40000000
FILE = stat.S_IFREG | 0o644
DIRECTORY = stat.S_IFDIR | 0o755


class Trips:
    """A mounted cluster, and the same volume opened by the library on the client's host, twice."""

    def __init__(self, machines: Machines, thread: LoopThread, volume: Volume, writer: Volume) -> None:
        self.machines = machines
        self.thread = thread
        self.volume = volume
        self.writer = writer
        """Another client, of whose files neither the mount nor `volume` knows anything."""
        self.mnt = str(machines.mnt)
        self.delay_s = DELAY_S
        """Of every packet, in each direction."""

    @property
    def trip_s(self) -> float:
        """What waiting for an answer takes at least."""
        return 2 * self.delay_s

    def delay(self, times: int | None = None) -> None:
        """From now on packets take their time, as they do but where something is prepared: so many times DELAY_S."""
        if times is not None:
            self.delay_s = times * DELAY_S
        self.machines.delay(self.delay_s)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.thread.run(work)


@pytest.fixture
def trips(everything: Trips) -> Trips:
    """For one test."""
    everything.delay(1)
    return everything


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trips]:
    machines = Machines(tmp_path_factory.mktemp("trips"))
    thread = LoopThread()
    try:
        machines.start()
        machines.must("meta", "format", "--dir", "m", "--servers", len(DATA), "--block-size", BLOCK)
        machines.begin_meta()
        machines.give_secret(*DATA, "client", "other")
        for name in DATA:
            machines.begin_data(name)
        machines.begin_mount().wait_for("ready on")
        machines.wait_all_up()
        opened = [thread.run(_open_on_client(machines)) for _ in range(2)]
        machines.delay(DELAY_S)
        try:
            yield Trips(machines, thread, *opened)
        finally:
            machines.delay(0)
            for volume in opened:
                thread.run(volume.close())
    finally:
        thread.close()
        machines.close()


async def _open_on_client(machines: Machines) -> Volume:
    """In the thread of the event loop, which moves to the client's network for that: its sockets stay there."""
    space = os.open(machines.network("client"), os.O_RDONLY)
    try:
        assert ctypes.CDLL(None, use_errno=True).setns(space, CLONE_NEWNET) == 0
    finally:
        os.close(space)
    secret = read_secret(real_world().disk, str(machines.folder("client") / "secret"))
    return await Volume.open(real_world(), VolumeOptions(meta=machines.at, prepares=True), secret)


Prepare = Callable[[Trips, str], Any]
Operation = Callable[[Trips, str, Any], Any]


class Row:
    """One operation: how it is prepared, off the clock, and done, through the mount and by the library."""

    def __init__(
        self,
        prepare: Prepare,
        mounted: Operation | None,
        library: Callable[[Trips, str, Any], Coroutine[Any, Any, Any]],
    ) -> None:
        self.prepare = prepare
        self.mounted = mounted
        self.library = library


def _path(trips: Trips, name: str) -> str:
    return f"{trips.mnt}/{name}"


def _write(path: str, flags: int, data: bytes = b"", offset: int = 0, *, sync: bool = False) -> None:
    fd = os.open(path, flags, 0o644)
    if data:
        os.pwrite(fd, data, offset)
    if sync:
        os.fsync(fd)
    os.close(fd)


async def _make(
    trips: Trips, name: str, data: bytes = b"", *, sync: bool = False, volume: Volume | None = None
) -> None:
    volume = volume or trips.volume
    made = await volume.make(ROOT_INODE, name.encode(), FILE, uid=0, gid=0, open=True)
    await _finish(trips, await volume.open_made(made, flags=os.O_RDWR), data, sync=sync)


async def _rewrite(trips: Trips, inode: Inode, flags: int, data: bytes, *, sync: bool = False) -> None:
    await _finish(trips, await trips.volume.open_file(inode, flags=flags), data, sync=sync)


async def _finish(trips: Trips, file: Any, data: bytes, *, sync: bool) -> None:
    if data:
        await file.write(data, 0)
    if sync:
        await file.fsync()
    await file.flush()
    await file.release()


async def _read(trips: Trips, inode: Inode, size: int) -> None:
    file = await trips.volume.open_file(inode, flags=os.O_RDONLY)
    memory = bytearray(size)
    assert await file.read_into(memoryview(memory), 0) == size
    await file.release()


def _read_mounted(path: str, size: int) -> None:
    fd = os.open(path, os.O_RDONLY)
    assert len(os.read(fd, size)) == size
    os.close(fd)


def _nothing(trips: Trips, name: str) -> None:
    """There is nothing to prepare."""


def _file(size: int = len(SMALL), *, written_by: str = "nobody here") -> Prepare:
    """A file of this size: written by the mount, the library, or by another client, so that nothing of it is cached."""

    def prepare(trips: Trips, name: str) -> Inode:
        data = os.urandom(size)
        if written_by == "us":
            trips.run(_make(trips, f"{name}-library", data))
            _write(_path(trips, name), os.O_CREAT | os.O_WRONLY, data)
        else:
            trips.machines.delay(0)
            trips.run(_make(trips, name, data, volume=trips.writer))
            trips.delay()
        found: Attributes = trips.run(trips.volume.lookup(ROOT_INODE, name.encode()))
        return found.inode

    return prepare


def _prepare_synced(trips: Trips, name: str) -> None:
    """Nothing that either client has written is unsynced: a rename need not be careful then."""
    _file()(trips, name)
    trips.run(trips.volume.sync())
    folder = os.open(trips.mnt, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(folder)
    os.close(folder)


def _directory(count: int) -> Prepare:
    def prepare(trips: Trips, name: str) -> Inode:
        trips.machines.delay(0)
        made: Attributes = trips.run(trips.volume.make(ROOT_INODE, name.encode(), DIRECTORY, uid=0, gid=0))

        async def fill() -> None:
            for number in range(count):
                await trips.volume.make(made.inode, b"%04d" % number, FILE, uid=0, gid=0)

        trips.run(fill())
        trips.delay()
        return made.inode

    return prepare


def _prepare_twice(trips: Trips, name: str) -> None:
    """Two files, synced long ago as far as anybody knows, that a new one of ours is to be renamed over."""
    trips.machines.delay(0)
    for target in (f"{name}-target", f"{name}-library-target"):
        _write(_path(trips, target), os.O_CREAT | os.O_WRONLY, SMALL, sync=True)
    trips.delay()
    _file(written_by="us")(trips, name)


def _list_mounted(trips: Trips, name: str, count: int) -> None:
    assert len(os.listdir(_path(trips, name))) == count


def _stat_each(trips: Trips, name: str, count: int) -> None:
    folder = os.open(_path(trips, name), os.O_RDONLY | os.O_DIRECTORY)
    names = os.listdir(folder)
    assert len(names) == count
    for each in names:
        os.stat(each, dir_fd=folder)
    os.close(folder)


async def _list(trips: Trips, inode: Inode, count: int) -> None:
    listing = await trips.volume.list_directory(inode, b"", 2000, with_attributes=True)
    assert len(listing.entries) == count and all(entry.attributes is not None for entry in listing.entries)


async def _rename(trips: Trips, name: str, target: str) -> None:
    await trips.volume.rename(ROOT_INODE, name.encode(), ROOT_INODE, target.encode())


async def _attributes(trips: Trips, inode: Inode) -> None:
    await trips.volume.attributes(inode)


async def _make_directory(trips: Trips, name: str) -> None:
    await trips.volume.make(ROOT_INODE, name.encode() + b"-library", DIRECTORY, uid=0, gid=0)


async def _unlink(trips: Trips, name: str) -> None:
    await trips.volume.unlink(ROOT_INODE, name.encode() + b"-library")


NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY
DEEP = "/a/b/c/d"


def _prepare_deep(trips: Trips, name: str) -> None:
    os.makedirs(_path(trips, name + DEEP))


async def _resolve(trips: Trips, path: str) -> None:
    await resolve(trips.volume, path)


ROWS: dict[str, Row] = {
    "stat of a path of 5 names": Row(
        _prepare_deep, lambda t, n, _: os.stat(_path(t, n + DEEP)), lambda t, n, _: _resolve(t, f"/{n}{DEEP}")
    ),
    "stat": Row(_file(), lambda t, n, _: os.stat(_path(t, n)), lambda t, n, inode: _attributes(t, inode)),
    "mkdir": Row(_nothing, lambda t, n, _: os.mkdir(_path(t, n)), lambda t, n, _: _make_directory(t, n)),
    "create an empty file": Row(
        _nothing, lambda t, n, _: _write(_path(t, n), NEW), lambda t, n, _: _make(t, f"{n}-library")
    ),
    "create, write 4 KiB, close": Row(
        _nothing, lambda t, n, _: _write(_path(t, n), NEW, SMALL), lambda t, n, _: _make(t, f"{n}-library", SMALL)
    ),
    "create, write 4 KiB, fsync, close": Row(
        _nothing,
        lambda t, n, _: _write(_path(t, n), NEW, SMALL, sync=True),
        lambda t, n, _: _make(t, f"{n}-library", SMALL, sync=True),
    ),
    "write 4 KiB into a file again (O_TRUNC), close": Row(
        _file(),
        lambda t, n, _: _write(_path(t, n), os.O_WRONLY | os.O_TRUNC, SMALL),
        lambda t, n, inode: _rewrite(t, inode, os.O_WRONLY | os.O_TRUNC, SMALL),
    ),
    "write at an offset, fsync, close": Row(
        _file(),
        lambda t, n, _: _write(_path(t, n), os.O_WRONLY, b"middle", 1000, sync=True),
        lambda t, n, inode: _rewrite(t, inode, os.O_WRONLY, b"middle", sync=True),
    ),
    "append 100 bytes, close": Row(
        _file(),
        lambda t, n, _: _write(_path(t, n), os.O_WRONLY | os.O_APPEND, b"a" * 100),
        lambda t, n, inode: _rewrite(t, inode, os.O_WRONLY | os.O_APPEND, b"a" * 100),
    ),
    "open and read 4 KiB, cold": Row(
        _file(), lambda t, n, _: _read_mounted(_path(t, n), 4096), lambda t, n, inode: _read(t, inode, 4096)
    ),
    "open and read 4 blocks, cold": Row(
        _file(4 * BLOCK),
        lambda t, n, _: _read_mounted(_path(t, n), 4 * BLOCK),
        lambda t, n, inode: _read(t, inode, 4 * BLOCK),
    ),
    "open and read 100 blocks, cold": Row(_file(100 * BLOCK), None, lambda t, n, inode: _read(t, inode, 100 * BLOCK)),
    "unlink": Row(_file(written_by="us"), lambda t, n, _: os.unlink(_path(t, n)), lambda t, n, _: _unlink(t, n)),
    "rename": Row(
        _prepare_synced,
        lambda t, n, _: os.rename(_path(t, n), _path(t, f"{n}-to")),
        lambda t, n, _: _rename(t, f"{n}-to", f"{n}-again"),
    ),
    "rename after a write, to a new name": Row(
        _file(written_by="us"),
        lambda t, n, _: os.rename(_path(t, n), _path(t, f"{n}-to")),
        lambda t, n, _: _rename(t, f"{n}-library", f"{n}-again"),
    ),
    "rename after a write, over a file": Row(
        _prepare_twice,
        lambda t, n, _: os.rename(_path(t, n), _path(t, f"{n}-target")),
        lambda t, n, _: _rename(t, f"{n}-library", f"{n}-library-target"),
    ),
    "list 1,000 names": Row(
        _directory(1000), lambda t, n, _: _list_mounted(t, n, 1000), lambda t, n, inode: _list(t, inode, 1000)
    ),
    "list 5 names, stat each": Row(
        _directory(5), lambda t, n, _: _stat_each(t, n, 5), lambda t, n, inode: _list(t, inode, 5)
    ),
}


def _promised() -> dict[str, tuple[int | None, int]]:
    """The table of docs/performance.md: operation -> trips through a mount and by the library."""
    rows = [line.split("|")[1:5] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return {
        name.strip(): (int(mounted) if mounted.strip() != "-" else None, int(library))
        for name, mounted, library, _ in rows
        if library.strip().isdigit()
    }


def test_the_table_has_every_row_that_is_counted_and_no_other() -> None:
    assert list(_promised()) == list(ROWS)


class Try(NamedTuple):
    """One try of an operation."""

    counted: int
    sent: list[Sent]
    began_s: float

    def __str__(self) -> str:
        """What was sent, with the milliseconds since the operation began."""
        names = (f"{each.name} +{1000 * (each.at_s - self.began_s):.0f}" for each in self.sent)
        return f"{self.counted} trips: {', '.join(names)}"


def _try(trips: Trips, name: str, prepare: Prepare, act: Operation, *, warm: bool) -> Try:
    prepared = prepare(trips, name)
    with trips.machines.trace("client") as sent:
        if warm:
            os.stat(trips.mnt)  # the attributes of the root
        began_s = time.monotonic()
        act(trips, name, prepared)
        took_s = time.monotonic() - began_s
    counted = rounds(_without_excused(sent, trips.trip_s, began_s) if warm else sent, trips.trip_s)
    assert took_s >= counted * trips.trip_s, "nobody waited for an answer"
    return Try(counted, sent, began_s)


def _without_excused(sent: list[Sent], trip_s: float, began_s: float) -> list[Sent]:
    """What an operation sent that began then, without the questions that only a slow machine asks.

    Attributes of a directory are believed for 20 ms after they came. Where nothing can have come for longer, the kernel
    was too slow to use them. If somebody asks for them again sooner, that is a trip as any other.
    """
    found, came_s = [], float("-inf")
    for each in sent:
        is_late = each.name == "get_attributes" and each.at_s - came_s >= BELIEVED_S
        if each.at_s >= began_s and not is_late:
            found.append(each)
        came_s = max(came_s, each.at_s + trip_s)
    return found


def _tries(trips: Trips, promised: int, label: str, prepare: Prepare, act: Operation, *, warm: bool) -> list[Try]:
    """Up to the first that is as promised. Fewer trips than that may be luck: what is to be saved was saved already."""
    made: list[Try] = []
    for number, times in enumerate(DELAYS):
        trips.delay(times)
        made.append(_try(trips, f"{label.replace(' ', '-').replace(',', '')}-{number}", prepare, act, warm=warm))
        if made[-1].counted == promised:
            break
    return made


@pytest.mark.parametrize("operation", ROWS)
def test_round_trips_are_as_promised(trips: Trips, operation: str) -> None:
    row, (mounted, library) = ROWS[operation], _promised()[operation]
    if row.mounted is not None and mounted is not None:
        tries = _tries(trips, mounted, f"m {operation}", row.prepare, row.mounted, warm=True)
        assert tries[-1].counted == mounted, "through the mount\n" + "\n".join(map(str, tries))

    def act(trips: Trips, name: str, prepared: Any) -> None:
        trips.run(row.library(trips, name, prepared))

    prepare = row.prepare
    if operation == "rename":  # the mount's part has left a file under this name

        def prepare(trips: Trips, name: str) -> Any:
            return row.prepare(trips, f"{name}-to")

    tries = _tries(trips, library, f"l {operation}", prepare, act, warm=False)
    assert tries[-1].counted == library, "by the library\n" + "\n".join(map(str, tries))


def test_a_cold_sequential_read_has_many_blocks_under_way(trips: Trips) -> None:
    """In small pieces, through the mount: reading ahead overlaps the blocks and the questions where they are."""
    size, least, asked = 100 * BLOCK, 1 << 30, [""]
    for number, times in enumerate(DELAYS):
        trips.delay(times)
        _file(size)(trips, f"sequential-{number}")
        with (
            trips.machines.trace("client") as sent,
            open(f"{trips.mnt}/sequential-{number}", "rb", buffering=0) as file,
        ):
            assert sum(map(len, iter(lambda: file.read(64 * KiB), b""))) == size
        asked = [each.name for each in sent]
        least = min(least, rounds(sent, trips.trip_s))
        if least <= SEQUENTIAL_TRIPS_MAX:
            break
    assert least <= SEQUENTIAL_TRIPS_MAX, asked
    assert asked.count("get_extents") <= 3, asked


def test_what_is_sent_for_a_new_file_is_what_is_needed(trips: Trips) -> None:
    with trips.machines.trace("client") as sent:
        os.stat(trips.mnt)
        began_s = time.monotonic()
        _write(f"{trips.mnt}/sent", NEW, SMALL)
    needed = ["lookup", "make", *["put_block"] * 3, "commit"]
    found = [each.name for each in _without_excused(sent, trips.trip_s, began_s)]
    assert [name for name in found if name not in IN_BACKGROUND] == needed


def test_a_thousand_names_come_in_one_answer(trips: Trips) -> None:
    folder = _directory(1000)(trips, "thousand")
    with trips.machines.trace("client") as sent:
        assert len(os.listdir(f"{trips.mnt}/thousand")) == 1000
        trips.run(_list(trips, folder, 1000))
    assert [each.name for each in sent].count("list_directory") == 2, "one of the mount, one of the library"


def test_the_benchmark_measures_these_trips(trips: Trips) -> None:
    """What `mendfs bench latency` shows on a host that is far away is what the table says, in milliseconds."""
    for times in (1, 5):  # on a busy machine work takes longer than trips, unless these are long
        trips.delay(times)
        share = _measured_shares(trips)
        assert min(share.values()) >= 1, "nobody waited for an answer"
        if max(share.values()) < 3:
            break
    assert max(share.values()) < 3, share


def _measured_shares(trips: Trips) -> dict[str, float]:
    """The medians that are shown, each divided by what its trips take."""
    named = trips.machines.named
    found = json.loads(trips.machines.must("other", "bench", "latency", *named, "--count", 7, "--json"))["latency"]
    medians_ms = {each["operation"]: each["median_ms"] for each in found}
    promised = _promised()
    return {
        shown: medians_ms[shown] / (1000 * trips.trip_s * promised[counted][1])
        for shown, counted in (
            ("mkdir", "mkdir"),
            ("create, write 4KiB, close", "create, write 4 KiB, close"),
            ("the same with fsync", "create, write 4 KiB, fsync, close"),
            ("stat", "stat"),
            ("open, read 4KiB, close", "open and read 4 KiB, cold"),
            ("rename", "rename after a write, to a new name"),
            ("unlink", "unlink"),
        )
    }
