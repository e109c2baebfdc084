"""SQLite on the mount: transactions acknowledged before a kill -9 are there, whatever the journal mode."""

import json
import os
import signal

import pytest

from tests.mount.programs import ORDINARY, PYTHON, Place, kill_tree, need
from tests.real_cluster import needs_mounts

pytestmark = [needs_mounts, pytest.mark.timeout(600)]

TRANSACTIONS, FEWER_TRANSACTIONS = 1000, 300
KILLED_AT_PERCENT = (14, 50, 86)

# Says each transaction only after its COMMIT has returned. Two rows change in each, so half of one would be seen.
WRITER = """
import sqlite3, sys
path, mode, begin, end = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
db = sqlite3.connect(path, isolation_level=None)
assert db.execute(f"PRAGMA journal_mode={mode}").fetchone()[0] == mode
db.execute("PRAGMA synchronous=FULL")
db.execute("CREATE TABLE IF NOT EXISTS items(id INTEGER PRIMARY KEY, body TEXT)")
db.execute("CREATE TABLE IF NOT EXISTS total(count INTEGER)")
if db.execute("SELECT count(*) FROM total").fetchone()[0] == 0:
    db.execute("INSERT INTO total VALUES (0)")
for number in range(begin, end):
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO items VALUES (?, ?)", (number, str(number) * 60))
    db.execute("UPDATE total SET count = count + 1")
    db.execute("COMMIT")
    print(number, flush=True)
"""

CHECKER = """
import json, sqlite3, sys
db = sqlite3.connect(sys.argv[1])
json.dump({
    "integrity": db.execute("PRAGMA integrity_check").fetchall(),
    "ids": [row[0] for row in db.execute("SELECT id FROM items ORDER BY id")],
    "wrong": db.execute("SELECT count(*) FROM items WHERE length(body) != 60 * length(id)").fetchone()[0],
    "total": db.execute("SELECT count FROM total").fetchone()[0],
}, sys.stdout)
"""


def write(place: Place, database: object, mode: str, begin: int, end: int, *, killed_at: int | None) -> int:
    """The number of the last transaction that was acknowledged."""
    writer = place.start(PYTHON, "-c", WRITER, database, mode, begin, end)
    assert writer.stdout is not None
    last = begin - 1
    for line in writer.stdout:
        assert line.strip().isdigit(), line + writer.stdout.read()
        last = int(line)
        if last == killed_at:
            # Mostly in the middle of the next ones: it does not wait for us.
            os.kill(writer.pid, signal.SIGKILL)
    kill_tree(writer)
    assert writer.wait() == (-signal.SIGKILL if killed_at is not None else 0)
    return last


def check(place: Place, database: object, acknowledged: int) -> int:
    """Nothing acknowledged is missing, and no transaction is there by half; returns how many there are."""
    found = json.loads(place.python(CHECKER, database))
    assert found["integrity"] == [["ok"]] and found["wrong"] == 0
    # One more may have been committed without our hearing of it.
    assert found["ids"] in [list(range(acknowledged + 1)), list(range(acknowledged + 2))]
    assert found["total"] == len(found["ids"])
    return len(found["ids"])


@pytest.mark.parametrize(
    ("place", "mode"), [("root", "delete"), (ORDINARY, "wal")], indirect=["place"], ids=["delete", "wal"]
)
def test_sqlite_keeps_every_acknowledged_transaction_through_kills(place: Place, mode: str) -> None:
    need("python3", "sqlite3")
    database = place.path / "database"
    done, end = 0, TRANSACTIONS if place.is_long else FEWER_TRANSACTIONS
    for killed_at in (end * percent // 100 for percent in KILLED_AT_PERCENT):
        acknowledged = write(place, database, mode, done, end, killed_at=killed_at)
        assert acknowledged >= killed_at
        done = check(place, database, acknowledged)
    assert write(place, database, mode, done, end, killed_at=None) == end - 1
    assert check(place, database, end - 1) == end
    with place.second_mount() as second:
        shell = place.run("sqlite3", second / "database", "PRAGMA integrity_check; SELECT count(*) FROM items")
        assert shell.split() == ["ok", str(end)]
    assert place.run("sqlite3", database, "VACUUM; PRAGMA integrity_check").split() == ["ok"]


def test_two_processes_write_one_sqlite_database_at_once(place: Place) -> None:
    need("python3")
    script = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
for number in range(50):
    db.execute("BEGIN IMMEDIATE")
    db.execute("UPDATE counter SET value = value + 1")
    db.execute("INSERT INTO log VALUES (?, ?)", (sys.argv[2], number))
    db.execute("COMMIT")
"""
    database = place.path / "shared"
    place.python(
        "import sqlite3, sys; sqlite3.connect(sys.argv[1]).executescript('''PRAGMA journal_mode=WAL; "
        "CREATE TABLE counter(value); INSERT INTO counter VALUES (0); CREATE TABLE log(who, number)''')",
        database,
    )
    writers = [place.start(PYTHON, "-c", script, database, who) for who in ("a", "b")]
    for writer in writers:
        out, _ = writer.communicate(timeout=120)
        assert writer.returncode == 0, out
    found = place.run(
        "sqlite3", database, "SELECT value, (SELECT count(*) FROM log) FROM counter; PRAGMA integrity_check"
    )
    assert found.split() == ["100|100", "ok"]
