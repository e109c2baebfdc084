"""RocksDB's folder damaged in every way we could think of: it opens whole, or says in one line what is wrong.

Before the mark was kept, a flipped byte in the synced middle of the log, a lost log or a manifest cut short opened
without a word, and a range over a damaged table just ended early.
"""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from mendfs.errors import EngineFailed, EngineFull, EngineUnreadable, StoreDamaged, UsageError
from mendfs.kv import rocks_files
from mendfs.kv.rocks import RocksEngine
from tests.conformance import everything

COMMITS = 500
NOISE = random.Random(7)
CONTENT = {b"k%05d" % i: NOISE.randbytes(300) for i in range(COMMITS)}
ROOT = Path(__file__).parents[2]


WRITER = """
import asyncio, sys
from tests.unit.test_kv_damage import CONTENT
from tests.conformance import put
from mendfs.kv.rocks import RocksEngine

async def main(path):
    # Small buffers, so that there are several tables besides the log.
    engine = await RocksEngine.open(path, write_buffer_bytes=65536)
    for key, value in CONTENT.items():
        await put(engine, {key: value})
    await engine.sync()
    await put(engine, {b"z": b"never synced"})
    print("written", flush=True)
    await asyncio.sleep(60)

asyncio.run(main(sys.argv[1]))
"""


def killed(path: Path) -> Path:
    """A database as kill -9 leaves it: tables, and a log that holds the rest and one commit that nobody synced."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"written\n"
    writer.kill()
    writer.wait()
    writer.stdout.close()
    return path


def damages(path: Path) -> Iterator[tuple[str, bytes | None]]:
    """(what was done, the file's new contents, None for deleted) for one file."""
    whole = path.read_bytes()
    yield "removed", None
    yield "emptied", b""
    for at in (len(whole) // 2, len(whole) - 1):
        yield f"cut at {at}", whole[:at]
        flipped = bytearray(whole)
        flipped[at : at + 1] = bytes([flipped[at] ^ 0x41]) if at < len(whole) else b""
        yield f"flipped at {at}", bytes(flipped)
    yield (
        "zeroed in the middle",
        whole[: len(whole) // 2] + bytes(min(512, len(whole))) + whole[len(whole) // 2 + 512 :],
    )


async def outcome(path: Path) -> str:
    """`whole`, or the error of opening or reading. Anything else fails the test."""
    try:
        engine = await RocksEngine.open(str(path))
    except (StoreDamaged, EngineFailed) as error:
        return str(error)
    try:
        found = await everything(engine)
        found.pop(b"z", None)
        assert found == CONTENT, f"opened with {len(found)} of {COMMITS} keys, and nothing was said"
        assert engine.last_sequence >= COMMITS
        return "whole"
    except EngineUnreadable as error:
        return str(error)
    finally:
        try:
            await engine.close()
        except EngineFailed as error:
            assert "Corruption" in str(error)  # a compaction has met the damage too


async def test_damage_of_any_file_is_said_or_does_not_matter(tmp_path: Path) -> None:
    """Never a shorter history than what was synced, never a range with something left out."""
    stored = killed(tmp_path / "stored")
    told = 0
    for name in sorted(os.listdir(stored)):
        if not (stored / name).stat().st_size:
            continue
        for what, content in damages(stored / name):
            copy = tmp_path / "copy"
            shutil.copytree(stored, copy)
            (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
            before = {each: (copy / each).read_bytes() for each in os.listdir(copy)}
            said = await outcome(copy)
            if said != "whole":
                told += 1
                assert "\n" not in said and str(copy) in said, f"{name} {what}: {said}"
                if "was not touched" in said:
                    assert {each: (copy / each).read_bytes() for each in os.listdir(copy)} == before, f"{name} {what}"
            shutil.rmtree(copy)
    assert told > 15


async def test_every_byte_of_the_synced_log_matters(tmp_path: Path) -> None:
    stored = killed(tmp_path / "stored")
    log = max(stored.glob("*.log"))
    whole = log.read_bytes()
    synced = len(whole) - 60  # the last commit is past that
    for at in range(0, synced, synced // 12):
        copy = tmp_path / "copy"
        shutil.copytree(stored, copy)
        (copy / log.name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(StoreDamaged, match=r"had been synced: it is damaged"):
            await RocksEngine.open(str(copy))
        # Whoever has no copy may go on with what is left.
        (copy / rocks_files.MARK_NAME).unlink()
        engine = await RocksEngine.open(str(copy))
        found = await everything(engine)
        assert len(found) == engine.last_sequence < COMMITS
        assert found.items() <= CONTENT.items()
        await engine.close()
        shutil.rmtree(copy)


async def test_tables_that_the_manifest_has_lost_are_missed(tmp_path: Path) -> None:
    """The log alone still reaches the last commit: only that it does not join the tables shows the hole."""
    engine = await RocksEngine.open(str(tmp_path / "new"))
    manifest = next((tmp_path / "new").glob("MANIFEST-*"))
    before = manifest.stat().st_size  # of a database without tables; each later record tells of a new one
    await engine.close()
    stored = killed(tmp_path / "stored")
    assert not (stored / "000004.log").exists(), "the first log was let go: tables hold what was in it"
    os.truncate(stored / manifest.name, before)
    with pytest.raises(StoreDamaged, match="lacks the changes from"):
        await RocksEngine.open(str(stored))


async def test_a_log_after_a_gap_in_what_was_never_synced_is_set_aside(tmp_path: Path) -> None:
    """A power cut tears an unsynced log although its successor had begun: what follows the gap must not be believed."""
    cut = killed(tmp_path / "cut")
    # The log after it begins two commits later.
    log = max(cut.glob("*.log"))
    batch, is_good = next(rocks_files._batches(str(log)))
    assert is_good
    later = batch[:-8] + rocks_files.SEQUENCE.pack(COMMITS + 3)
    header = rocks_files._LOG_HEADER.pack(rocks_files._log_checksum(b"\x01" + later), len(later), 1)
    (cut / f"{int(log.stem) + 1:06}.log").write_bytes(header + later)
    engine = await RocksEngine.open(str(cut))
    assert await everything(engine) == CONTENT | {b"z": b"never synced"}
    assert engine.last_sequence == COMMITS + 1
    await engine.close()
    assert [name.suffix for name in cut.iterdir() if ".log" in name.name].count(".unsynced") == 1


async def test_a_database_in_use_is_not_judged(tmp_path: Path) -> None:
    engine = await RocksEngine.open(str(killed(tmp_path / "db")))
    # What a closed database would be called damaged for. Not a table: RocksDB itself deletes those it has merged.
    (tmp_path / "db" / "CURRENT").unlink()
    with pytest.raises(UsageError, match="in use"):
        await RocksEngine.open(str(tmp_path / "db"))
    with suppress(EngineFailed):
        await engine.close()


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("IO error: No space left on device: While appending to file: x", "make room on that disk"),
        ("IO error: While open a file for appending: x: Too many open files", "more descriptors"),
        ("IO error: While open a file: x: Permission denied", "give the folder"),
        ("IO error: While fsync: x: Input/output error", "look at the system's log"),
    ],
)
def test_what_the_system_said_is_no_damage(said: str, remedy: str) -> None:
    error = rocks_files.cannot_open("/meta", Exception(said))
    assert type(error) in (EngineFailed, EngineFull)
    assert str(error).endswith(remedy) or remedy in str(error)
