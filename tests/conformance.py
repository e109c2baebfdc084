"""One suite for every engine: a subclass says how to open it, pytest collects the subclass."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mendfs.errors import Conflict, TooBig
from mendfs.kv.engine import BYTES_MAX, KEYS_MAX, Engine, Transaction, run
from mendfs.model import CommitSequence


class EngineConformance(ABC):
    """What `kv.engine` promises, whatever the engine."""

    @abstractmethod
    async def open(self, path: Path) -> Engine:
        """Open the engine stored at `path`, made if missing."""

    @asynccontextmanager
    async def opened(self, path: Path) -> AsyncIterator[Engine]:
        engine = await self.open(path / "engine")
        try:
            yield engine
        finally:
            await engine.close()

    async def test_a_commit_is_seen_by_later_transactions_only_whole(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            assert await put(engine, {b"a": b"1", b"b": b"2", b"c": b""}) == 1
            reader = engine.begin()
            assert [await reader.get(key) for key in (b"a", b"b", b"c", b"d")] == [b"1", b"2", b"", None]
            await put(engine, {b"a": None, b"b": b"3"})
            reader = engine.begin()
            assert [await reader.get(key) for key in (b"a", b"b")] == [None, b"3"]

    async def test_nothing_of_an_abandoned_transaction_is_seen(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            engine.begin().put(b"a", b"1")
            assert await engine.begin().get(b"a") is None
            assert engine.last_sequence == 0

    async def test_own_writes_are_read_back(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            await put(engine, {b"a": b"old", b"b": b"old"})
            transaction = engine.begin()
            transaction.put(b"a", b"new")
            transaction.delete(b"b")
            assert [await transaction.get(key) for key in (b"a", b"b")] == [b"new", None]

    async def test_a_key_read_and_then_changed_makes_the_commit_conflict(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            transaction = engine.begin()
            await transaction.get(b"a")
            transaction.put(b"b", b"1")
            await put(engine, {b"a": b"2"})
            with pytest.raises(Conflict):
                await engine.commit(transaction)
            assert await engine.begin().get(b"b") is None

    async def test_a_key_changed_since_the_beginning_makes_the_read_conflict(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            transaction = engine.begin()
            await put(engine, {b"a": b"2"})
            await put(engine, {b"b": b"2"})
            for key in (b"a", b"b"):
                with pytest.raises(Conflict):
                    await transaction.get(key)
            assert await transaction.get(b"c") is None

    async def test_two_reads_are_never_of_two_states(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            await put(engine, {b"a": b"1", b"b": b"1"})
            transaction = engine.begin()
            assert await transaction.get(b"a") == b"1"
            await put(engine, {b"a": b"2", b"b": b"2"})
            with pytest.raises(Conflict):
                await transaction.get(b"b")

    async def test_blind_writes_do_not_conflict(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            first, second = engine.begin(), engine.begin()
            first.put(b"a", b"1")
            second.put(b"a", b"2")
            assert [await engine.commit(first), await engine.commit(second)] == [1, 2]
            assert await engine.begin().get(b"a") == b"2"

    @pytest.mark.parametrize("change", [{b"b2": b"new"}, {b"b1": None}, {b"b1": b"other"}])
    async def test_a_change_in_a_range_that_was_read_conflicts(
        self, tmp_path: Path, change: dict[bytes, bytes | None]
    ) -> None:
        async with self.opened(tmp_path) as engine:
            await put(engine, {b"b1": b"", b"b3": b""})
            transaction = engine.begin()
            assert len(await transaction.range(b"b", b"c", limit=10)) == 2
            transaction.put(b"z", b"")
            await put(engine, change)
            with pytest.raises(Conflict):
                await engine.commit(transaction)
            late = engine.begin()
            await put(engine, change)
            with pytest.raises(Conflict):
                await late.range(b"b", b"c", limit=10)

    async def test_a_change_past_what_a_limit_let_through_does_not_conflict(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            await put(engine, {b"q1": b"", b"q2": b"", b"q3": b""})
            first, last = engine.begin(), engine.begin()
            assert await first.range(b"q", b"r", limit=1) == [(b"q1", b"")]
            assert await last.range(b"q", b"r", limit=1, reverse=True) == [(b"q3", b"")]
            first.delete(b"q1")
            last.delete(b"q3")
            await put(engine, {b"q2": b"changed"})
            await engine.commit(first)
            await engine.commit(last)
            assert await engine.begin().range(b"q", b"r", limit=9) == [(b"q2", b"changed")]

    @pytest.mark.parametrize("reverse", [False, True])
    async def test_ranges_show_own_writes_in_their_place(self, tmp_path: Path, reverse: bool) -> None:
        async with self.opened(tmp_path) as engine:
            await put(engine, {b"k%d" % i: b"old" for i in range(0, 10, 2)})
            transaction = engine.begin()
            transaction.put(b"k3", b"new")
            transaction.put(b"k4", b"new")
            transaction.delete(b"k6")
            transaction.delete(b"k7")
            expected = [(b"k2", b"old"), (b"k3", b"new"), (b"k4", b"new"), (b"k8", b"old")]
            if reverse:
                expected.reverse()
            for limit in range(6):
                assert await transaction.range(b"k1", b"k9", limit=limit, reverse=reverse) == expected[:limit]

    async def test_ranges_are_half_open_and_ordered_by_bytes(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            keys = [b"a", b"a\x00", b"a\xff", b"b", b"b\x00"]
            await put(engine, dict.fromkeys(keys, b""))
            reader = engine.begin()
            assert [key for key, _ in await reader.range(b"a", b"b", limit=9)] == keys[:3]
            assert [key for key, _ in await reader.range(b"a\x00", b"c", limit=9, reverse=True)] == keys[:0:-1]
            assert await reader.range(b"b", b"a", limit=9) == []
            assert await reader.range(b"x", b"y", limit=9, reverse=True) == []

    async def test_a_transaction_that_asked_for_its_sequence_conflicts_with_any_other(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            await put(engine, {b"a": b""})
            asked, other = engine.begin(), engine.begin()
            assert asked.sequence() == 2
            asked.put(b"x", b"")
            other.put(b"y", b"")
            await engine.commit(other)
            with pytest.raises(Conflict):
                await engine.commit(asked)
            alone = engine.begin()
            sequence = alone.sequence()
            alone.put(b"x", b"")
            assert await engine.commit(alone) == sequence == engine.last_sequence == 3

    async def test_reading_only_raises_no_sequence(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            await put(engine, {b"a": b"1"})
            reader = engine.begin()
            await reader.get(b"a")
            assert await engine.commit(reader) == 1 == engine.last_sequence

    async def test_more_than_the_limits_is_refused_whole(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            await put(engine, {b"k%03d" % i: b"" for i in range(KEYS_MAX)})
            with pytest.raises(TooBig):
                await put(engine, {b"m%03d" % i: b"" for i in range(KEYS_MAX + 1)})
            await put(engine, {b"n": bytes(BYTES_MAX - 1)})
            with pytest.raises(TooBig):
                await put(engine, {b"o": bytes(BYTES_MAX)})
            assert await engine.begin().range(b"m", b"n", limit=1) == []
            assert await engine.begin().get(b"o") is None

    async def test_run_repeats_after_a_conflict(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            tries = 0

            async def operation(transaction: Transaction) -> int:
                nonlocal tries
                tries += 1
                value = int(await transaction.get(b"n") or b"0")
                if tries == 1:
                    await put(engine, {b"n": b"41"})
                transaction.put(b"n", b"%d" % (value + 1))
                return value + 1

            assert await run(engine, operation) == (42, 2)
            assert tries == 2

    async def test_a_sync_covers_what_was_committed_before_it(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            await put(engine, {b"a": b""})
            assert engine.synced_sequence == 0
            first = asyncio.create_task(engine.sync())
            await asyncio.sleep(0)
            await put(engine, {b"b": b""})
            second, third = await asyncio.gather(engine.sync(), engine.sync())
            assert await first >= 1
            assert second == third == 2 == engine.synced_sequence
            assert await engine.sync() == 2

    async def test_a_cancelled_waiter_takes_nobody_with_it(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            await put(engine, {b"a": b""})
            waiters = [asyncio.create_task(engine.sync()) for _ in range(3)]
            await asyncio.sleep(0)
            waiters[0].cancel()
            results = await asyncio.gather(*waiters, return_exceptions=True)
            assert isinstance(results[0], asyncio.CancelledError)
            assert results[1:] == [1, 1]

    async def test_everything_is_there_after_reopening(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            await put(engine, {b"a": b"1", b"b": b"2"})
            await put(engine, {b"a": None, b"c": b"3"})
        async with self.opened(tmp_path) as engine:
            assert (engine.last_sequence, engine.synced_sequence) == (2, 2)
            assert await everything(engine) == {b"b": b"2", b"c": b"3"}
            assert await put(engine, {b"d": b""}) == 3

    async def test_ten_thousand_commits_during_one_transaction_are_let_go_again(self, tmp_path: Path) -> None:
        async with self.opened(tmp_path) as engine:
            transaction = engine.begin()
            for number in range(10_000):
                await put(engine, {b"%d" % number: b""})
            assert await transaction.get(b"x") is None
            with pytest.raises(Conflict):
                await transaction.get(b"9999")
            del transaction


async def put(engine: Engine, writes: dict[bytes, bytes | None] | dict[bytes, bytes]) -> CommitSequence:
    """One transaction that writes without reading."""
    transaction = engine.begin()
    for key, value in writes.items():
        if value is None:
            transaction.delete(key)
        else:
            transaction.put(key, value)
    return await engine.commit(transaction)


async def everything(engine: Engine) -> dict[bytes, bytes]:
    """All that ranges show."""
    return dict(await engine.begin().range(b"", b"\xff" * 16, limit=1 << 30))
