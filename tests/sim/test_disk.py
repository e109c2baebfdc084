"""The simulated disk: what a power cut takes, and what it must not."""

import errno
import random

import pytest

from mendfs.sim.disk import SimDisk
from mendfs.sim.loop import Process, SimLoop


def make(seed: int) -> SimDisk:
    loop = SimLoop()  # type: ignore[abstract] # what nobody calls is not there
    return SimDisk(loop, random.Random(seed), "d", lambda text: None)


@pytest.mark.parametrize("seed", range(30))
def test_what_was_synced_survives_a_power_cut(seed: int) -> None:
    disk = make(seed)
    view = disk.at(Process("p"))
    file = view.open("/a/f", create=True)
    file.write((b"synced",), 0)
    file.datasync()
    view.sync_directory("/a")
    file.write((b"more",), 6)
    disk.lose_power()
    content = disk.at(Process("q")).read_file("/a/f")
    assert content[:6] == b"synced"
    assert content[6:] in (b"", b"more")


def test_what_was_not_synced_is_lost_now_and_then_and_so_are_names() -> None:
    contents, missing = set(), 0
    for seed in range(300):
        disk = make(seed)
        view = disk.at(Process("p"))
        file = view.open("/a/f", create=True)
        file.write((b"x" * 512, b"y" * 512), 0)
        disk.lose_power()
        if view.exists("/a/f"):
            contents.add(view.read_file("/a/f"))
        else:
            missing += 1
    assert missing
    assert b"" in contents
    assert b"x" * 512 + b"y" * 512 in contents
    assert bytes(512) + b"y" * 512 in contents, "zeros in the middle of what was not synced"


def test_a_removal_that_was_not_synced_may_come_undone() -> None:
    found = set()
    for seed in range(20):
        disk = make(seed)
        view = disk.at(Process("p"))
        view.open("/a/f", create=True).datasync()
        view.sync_directory("/a")
        view.unlink("/a/f")
        disk.lose_power()
        found.add(view.exists("/a/f"))
    assert found == {True, False}


def test_a_failed_sync_drops_what_was_not_durable() -> None:
    disk = make(1)
    view = disk.at(Process("p"))
    file = view.open("/a/f", create=True)
    file.datasync()
    view.sync_directory("/a")
    file.write((b"data",), 0)
    disk.rules.sync_error_chance = 1.0
    with pytest.raises(OSError) as failed:
        file.datasync()
    assert failed.value.errno == errno.EIO
    disk.rules.sync_error_chance = 0.0
    file.datasync()  # as Linux: the second one succeeds and has written nothing
    disk.lose_power()
    assert view.read_file("/a/f") == b""


def test_a_full_disk_takes_no_writes_and_a_lock_dies_with_its_process() -> None:
    disk = make(1)
    first = Process("p")
    disk.at(first).lock("/a/lock")
    with pytest.raises(BlockingIOError):
        disk.at(Process("q")).lock("/a/lock")
    first.is_alive = False
    held = disk.at(Process("q")).lock("/a/lock")
    disk.rules.is_full = True
    with pytest.raises(OSError) as failed:
        held.write((b"x",), 0)
    assert failed.value.errno == errno.ENOSPC


@pytest.mark.parametrize("last", [0, 1, 4095])
def test_holes_take_no_room(last: int) -> None:
    file = make(0).at(Process("p")).open("/f", create=True)
    file.write((b"x" * (3 * 4096 + last),), 0)
    blocks = 3 + (last > 0)
    assert file.allocated() == blocks * 4096
    file.punch(4096, 4096)
    assert file.allocated() == (blocks - 1) * 4096
    file.write((b"y",), 5000)
    assert file.allocated() == blocks * 4096
    file.punch(0, file.size())
    assert file.allocated() == 0
