"""Programs that work a file system hard on the mount: shared mappings, fio with verification, dbench."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from tests.mount.programs import PYTHON, Place, as_both_users, as_ordinary_user, need
from tests.real_cluster import needs_mounts

pytestmark = [needs_mounts, pytest.mark.timeout(600)]


# --- mmap ---------------------------------------------------------------------------------------------------------

# Two processes write turn by turn into one shared mapping; each sees the other's bytes at once, and read() sees both's.
MAPPERS = """
import mmap, multiprocessing, os, sys
path, MIB, PAGE = sys.argv[1], 1 << 20, 4096
fd = os.open(path, os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, MIB)
ours = mmap.mmap(fd, MIB)
to, back = multiprocessing.Pipe()

def other():
    theirs = mmap.mmap(os.open(path, os.O_RDWR), MIB)
    for number in range(back.recv()):
        back.recv()
        assert theirs[number * PAGE : number * PAGE + 4] == b"ping", number
        theirs[number * PAGE + 100 : number * PAGE + 104] = b"pong"
        back.send(number)
    theirs.flush()
    theirs.close()

child = multiprocessing.get_context("fork").Process(target=other)
child.start()
to.send(64)
for number in range(64):
    ours[number * PAGE : number * PAGE + 4] = b"ping"
    to.send(None)
    assert to.recv() == number
    assert ours[number * PAGE + 100 : number * PAGE + 104] == b"pong"
    assert os.pread(fd, 4, number * PAGE) == b"ping" and os.pread(fd, 4, number * PAGE + 100) == b"pong"
    os.pwrite(fd, b"file", number * PAGE + 200)  # and what is written is in the mapping
    assert ours[number * PAGE + 200 : number * PAGE + 204] == b"file"
child.join()
assert child.exitcode == 0
ours.flush()  # msync

# Grown under the mapping, mapped again, written where nothing was.
os.ftruncate(fd, 9 * MIB)
grown = mmap.mmap(fd, 9 * MIB)
assert grown[MIB : 2 * MIB] == bytes(MIB)
for at in range(0, 9 * MIB, PAGE):
    grown[at + 8 : at + 16] = at.to_bytes(8, "little")
grown.close()
ours.close()
private = mmap.mmap(fd, MIB, flags=mmap.MAP_PRIVATE)
private[0:4] = b"mine"
assert os.pread(fd, 4, 0) == b"ping"
os.close(fd)
"""


def expected_mapping() -> bytes:
    """What the file holds when the mappers are done."""
    content = bytearray(9 << 20)
    for number in range(64):
        page = number * 4096
        content[page : page + 4], content[page + 100 : page + 104] = b"ping", b"pong"
        content[page + 200 : page + 204] = b"file"
    for at in range(0, 9 << 20, 4096):
        content[at + 8 : at + 16] = at.to_bytes(8, "little")
    return bytes(content)


@as_both_users
def test_processes_share_a_writable_mapping(place: Place) -> None:
    need("python3")
    path = place.path / "mapped"
    place.python(MAPPERS, path)
    expected = hashlib.sha256(expected_mapping()).hexdigest()
    assert hashlib.sha256(path.read_bytes()).hexdigest() == expected
    with place.second_mount() as second:
        assert hashlib.sha256((second / "mapped").read_bytes()).hexdigest() == expected


def test_what_was_synced_of_a_mapping_outlives_its_process(place: Place) -> None:
    script = """
import mmap, os, signal, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1 << 20)
mapped = mmap.mmap(fd, 1 << 20)
mapped[:5] = b"first"
mapped.flush()
mapped[4096:4102] = b"second"
os.kill(os.getpid(), signal.SIGKILL)
"""
    place.run(PYTHON, "-c", script, place.path / "mapped", code=-9)
    with place.second_mount() as second:
        content = (second / "mapped").read_bytes()
        # The kernel writes the rest of a dead process' mapping too: nothing here died but the process.
        assert content[:5] == b"first" and content[4096:4102] == b"second" and len(content) == 1 << 20


def test_programs_run_from_the_mount(place: Place) -> None:
    """A program's pages are mapped from its file, and a file that is being executed is busy."""
    program = place.path / "program"
    place.run("cp", "/bin/sleep", program)
    running = place.start(program, "60")
    out = place.run("bash", "-c", f"echo x >> {program}", code=1)
    assert "Text file busy" in out
    assert running.poll() is None
    with place.second_mount() as second:
        place.run(second / "program", "0")


# --- fio ----------------------------------------------------------------------------------------------------------


def fio(place: Place, *options: str) -> None:
    """Written in one pattern, read back and verified by fio; an error of any kind fails."""
    need("fio")
    out = place.run(
        "fio", "--name=job", f"--directory={place.path}", "--size=8m", "--verify=crc32c", "--verify_fatal=1",
        "--do_verify=1", "--randrepeat=0", "--group_reporting", "--output-format=json", *options
    )  # fmt: skip
    report = json.loads(out[out.index("{") :])
    (job,) = report["jobs"]
    assert job["error"] == 0, out
    assert job["write"]["total_ios"] > 0 and job["read"]["total_ios"] > 0


@pytest.mark.parametrize("engine", ["psync", "libaio", "mmap", "io_uring"])
@pytest.mark.parametrize("pattern", ["randwrite", "randrw"])
def test_fio_verifies_what_it_wrote(place: Place, engine: str, pattern: str) -> None:
    deep = ["--iodepth=8"] if engine in ("libaio", "io_uring") else []
    sizes = "4k-64k" if engine == "mmap" else "512-64k"
    fio(place, f"--ioengine={engine}", f"--rw={pattern}", f"--bsrange={sizes}", "--fsync=100", *deep)


@pytest.mark.parametrize("engine", ["psync", "libaio"])
def test_fio_verifies_what_it_wrote_past_the_page_cache(place: Place, engine: str) -> None:
    deep = ["--iodepth=8"] if engine == "libaio" else []
    fio(place, f"--ioengine={engine}", "--rw=randrw", "--bs=4k", "--direct=1", *deep)


@as_ordinary_user
def test_fio_jobs_share_one_file(place: Place) -> None:
    """Two processes, each in its half of one file, half a page apart."""
    fio(place, "--filename=shared", "--numjobs=2", "--size=3m", "--offset_increment=3m", "--bs=6k", "--rw=randwrite")


# --- dbench -------------------------------------------------------------------------------------------------------


def test_dbench_runs_four_clients(place: Place) -> None:
    need("dbench")
    load = next(iter(sorted(Path("/usr/share").glob("dbench/client.txt"))), None)
    if load is None:
        pytest.skip("dbench's load is not installed: apt-get install dbench")
    out = place.run("dbench", "-c", load, "-t", "6", "-D", place.path, "4")
    found = re.search(r"Throughput ([0-9.]+) MB/sec +4 clients", out)
    assert found and float(found[1]) > 0, out
    assert "failed" not in out and "ERROR" not in out
    print(found[0])
    assert [path for path in place.path.rglob("*") if not path.is_dir()] == []
