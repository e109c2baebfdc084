"""Both engines against the one conformance suite; a model; failing disks; kill -9 in the middle of writes."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mendfs.errors import Conflict, EngineFailed, UsageError
from mendfs.kv.engine import Engine
from mendfs.kv.memory import MemoryEngine
from mendfs.kv.rocks import RocksEngine
from mendfs.world.local_disk import LocalDisk
from tests.conformance import EngineConformance, everything, put


class TestMemoryEngine(EngineConformance):
    async def open(self, path: Path) -> Engine:
        return await MemoryEngine.open(LocalDisk(), str(path))


class TestRocksEngine(EngineConformance):
    async def open(self, path: Path) -> Engine:
        return await RocksEngine.open(str(path))


KEYS = st.sampled_from([b"a", b"b", b"b\0", b"c", b"d"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.integers(0, 2)),
        st.tuples(st.just("commit"), st.integers(0, 2)),
        st.tuples(st.just("get"), st.integers(0, 2), KEYS),
        st.tuples(st.just("put"), st.integers(0, 2), KEYS, st.binary(max_size=3)),
        st.tuples(st.just("delete"), st.integers(0, 2), KEYS),
        st.tuples(st.just("range"), st.integers(0, 2), KEYS, KEYS, st.integers(0, 4), st.booleans()),
    ),
    max_size=60,
)


class Model:
    """A transaction as a copy of everything: slow, and plainly right."""

    def __init__(self, state: dict[bytes, bytes]) -> None:
        self.begun = dict(state)
        self.own = dict(state)
        self.read: set[bytes] = set()
        self.changes: dict[bytes, bytes | None] = {}

    def write(self, key: bytes, value: bytes | None) -> None:
        self.changes[key] = value
        self.own.pop(key, None)
        if value is not None:
            self.own[key] = value

    def shown(self, begin: bytes, end: bytes, limit: int, reverse: bool) -> list[tuple[bytes, bytes]]:
        pairs = sorted(((k, v) for k, v in self.own.items() if begin <= k < end), reverse=reverse)
        return pairs[:limit]


@settings(max_examples=300)
@given(STEPS)
def test_interleaved_transactions_behave_as_if_each_ran_alone(steps: list[tuple[Any, ...]]) -> None:
    """What a transaction reads is the state at its beginning and its own writes, or a Conflict; commits are atomic."""
    asyncio.run(_follow(steps))


async def _follow(steps: list[tuple[Any, ...]]) -> None:
    engine = await MemoryEngine.open()
    state: dict[bytes, bytes] = {}
    models = [Model(state) for _ in range(3)]
    transactions = [engine.begin() for _ in range(3)]
    for action, number, *arguments in steps:
        model, transaction = models[number], transactions[number]
        if action == "put":
            transaction.put(*arguments)
            model.write(*arguments)
        elif action == "delete":
            transaction.delete(*arguments)
            model.write(arguments[0], None)
        elif action == "get":
            with suppress(Conflict):
                assert await transaction.get(arguments[0]) == model.own.get(arguments[0])
        elif action == "range":
            begin, end, limit, reverse = arguments
            with suppress(Conflict):
                pairs = await transaction.range(begin, end, limit=limit, reverse=reverse)
                assert pairs == model.shown(begin, end, limit, reverse)
        else:
            if action == "commit":
                with suppress(Conflict):
                    await engine.commit(transaction)
                    # Serializable: what was read is still so at the moment of the commit.
                    assert all(model.begun.get(key) == state.get(key) for key in model.read)
                    state.update(model.changes)
                    state = {key: value for key, value in state.items() if value is not None}
            models[number], transactions[number] = Model(state), engine.begin()
        if action == "get" and arguments[0] not in model.changes:
            model.read.add(arguments[0])
        assert await everything(engine) == state


class BrokenDisk(LocalDisk):
    """Its files cannot be synced."""

    def open(self, path: str, *, create: bool = False, read_only: bool = False) -> Any:
        file = super().open(path, create=create, read_only=read_only)
        calls = 0
        real = file.datasync

        def datasync() -> None:
            nonlocal calls
            calls += 1
            if calls > 1:  # the first belongs to opening
                raise OSError(5, "Input/output error")
            real()

        file.datasync = datasync  # type: ignore[method-assign]  # a broken disk is what is tested
        return file


async def test_after_a_failed_sync_everybody_is_told_and_nothing_more_is_accepted(tmp_path: Path) -> None:
    engine = await MemoryEngine.open(BrokenDisk(), str(tmp_path / "log"))
    before = engine.begin()
    await put(engine, {b"a": b""})
    results = await asyncio.gather(engine.sync(), engine.sync(), return_exceptions=True)
    assert [type(result) for result in results] == [EngineFailed, EngineFailed]
    with pytest.raises(EngineFailed, match="cannot be synced"):
        await engine.sync()
    with pytest.raises(EngineFailed):
        await engine.commit(before)
    with pytest.raises(EngineFailed):
        engine.begin()
    assert engine.synced_sequence == 0
    await engine.close()


@pytest.mark.parametrize("cut", [1, 7, 8, 15, 30])
async def test_a_torn_tail_of_the_log_is_cut_off(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "log"
    engine = await MemoryEngine.open(LocalDisk(), str(path))
    await put(engine, {b"a": b"1"})
    whole = path.stat().st_size
    await put(engine, {b"b": b"x" * 30})
    await engine.close()
    os.truncate(path, path.stat().st_size - cut)
    engine = await MemoryEngine.open(LocalDisk(), str(path))
    assert await everything(engine) == {b"a": b"1"}
    assert path.stat().st_size == whole
    await put(engine, {b"c": b"3"})
    await engine.close()
    engine = await MemoryEngine.open(LocalDisk(), str(path))
    assert await everything(engine) == {b"a": b"1", b"c": b"3"}
    await engine.close()


async def test_a_folder_in_use_is_a_clear_error(tmp_path: Path) -> None:
    engine = await RocksEngine.open(str(tmp_path / "db"))
    with pytest.raises(UsageError, match="is another process running on it"):
        await RocksEngine.open(str(tmp_path / "db"))
    await engine.close()
    await (await RocksEngine.open(str(tmp_path / "db"))).close()


async def test_a_torn_log_of_rocksdb_still_opens(tmp_path: Path) -> None:
    """A power cut can leave a hole in the unsynced middle of the log: the store opens with what lies before it."""
    path = tmp_path / "db"
    _write_and_kill("rocks", path, lines=200)
    log = max(path.glob("*.log"), key=lambda file: file.stat().st_size)
    content = bytearray(log.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 50] = bytes(50)
    log.write_bytes(content)
    engine = await RocksEngine.open(str(path))
    found = await everything(engine)
    assert 0 < len(found) == engine.last_sequence
    assert found == {b"%08d" % i: b"%08d" % i for i in range(1, len(found) + 1)}
    await engine.close()


WRITER = """
import asyncio, sys
from mendfs.kv.memory import MemoryEngine
from mendfs.kv.rocks import RocksEngine
from mendfs.world.local_disk import LocalDisk

async def main(kind, path):
    engine = await (RocksEngine.open(path) if kind == "rocks" else MemoryEngine.open(LocalDisk(), path))
    number = engine.last_sequence
    while True:
        number += 1
        transaction = engine.begin()
        transaction.put(b"%08d" % number, b"%08d" % number)
        await engine.commit(transaction)
        print(number, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


def _write_and_kill(kind: str, path: Path, *, lines: int) -> int:
    """Kill a writer (-9) once `lines` commits were answered; returns the last one that was."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, kind, str(path)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    for _ in range(lines):
        assert writer.stdout.readline(), "the writer ended by itself"
    writer.send_signal(signal.SIGKILL)
    rest = writer.stdout.read().split(b"\n")
    writer.wait()
    writer.stdout.close()
    # The last line may be torn; before it, every number was answered.
    return int(rest[-2]) if len(rest) > 1 else lines


@pytest.mark.parametrize("kind", ["rocks", "memory"])
async def test_kill_9_in_the_middle_of_writes_loses_nothing_answered(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "engine"
    answered = 0
    for run in range(3):
        answered = max(answered, _write_and_kill(kind, path, lines=100 + 77 * run))
        engine = await (RocksEngine.open(str(path)) if kind == "rocks" else MemoryEngine.open(LocalDisk(), str(path)))
        found = await everything(engine)
        assert len(found) == engine.last_sequence >= answered
        assert found == {b"%08d" % i: b"%08d" % i for i in range(1, len(found) + 1)}
        await engine.close()
