"""What `up` writes down in a cluster's folder, and what commands find there."""

import os
import stat
from pathlib import Path

import pytest

from mendfs.cluster.folder import ChildRecord, ClusterFolder, ClusterRecord, StopWish, read_secret
from mendfs.cluster.launch import check_ports
from mendfs.cluster.parameters import VolumeWishes, check_same, new_volume
from mendfs.errors import StoreDamaged, UsageError
from mendfs.model import MiB, Volume
from mendfs.world.local_disk import LocalDisk
from mendfs.world.processes import LocalProcesses, ProcessIdentity


def volume(**wishes: object) -> Volume:
    return new_volume(VolumeWishes(**wishes), volume_id="0" * 32, now_ns=1)  # type: ignore[arg-type] # any field


@pytest.fixture
def folder(tmp_path: Path) -> ClusterFolder:
    made = ClusterFolder(LocalDisk(), str(tmp_path / "cluster"))
    made.make()
    return made


def record() -> ClusterRecord:
    child = ChildRecord("data-0", ProcessIdentity(12, "boot-34"), "127.0.0.1:7001")
    return ClusterRecord(volume=volume(), base_port=7000, meta="127.0.0.1:7000", mount="/mnt/ä b", children=(child,))


def test_what_is_written_down_is_read_back(folder: ClusterFolder) -> None:
    assert folder.read() is None
    folder.write(record())
    assert folder.read() == record()


def test_a_damaged_record_is_one_line_that_says_what_to_do(folder: ClusterFolder) -> None:
    Path(folder.inside("cluster.json")).write_text('{"volume": 1}')
    with pytest.raises(StoreDamaged, match="move it away") as caught:
        folder.read()
    assert "\n" not in str(caught.value)


def test_a_second_supervisor_is_refused_while_the_first_one_lives(folder: ClusterFolder) -> None:
    lock = folder.lock()
    with pytest.raises(UsageError, match=r"already running .*mendfs down"):
        folder.lock()
    lock.close()
    folder.lock().close()


def test_the_secret_is_readable_by_its_owner_only_and_never_short(folder: ClusterFolder) -> None:
    folder.write_secret(os.urandom(32))
    assert stat.S_IMODE(os.stat(folder.secret_path).st_mode) == 0o600
    assert len(read_secret(LocalDisk(), folder.secret_path)) == 64
    Path(folder.secret_path).write_text("short\n")
    with pytest.raises(UsageError, match="shorter than 16 bytes"):
        read_secret(LocalDisk(), folder.secret_path)
    with pytest.raises(UsageError, match="cannot read the cluster's secret"):
        read_secret(LocalDisk(), folder.inside("nothing"))


def test_a_secret_that_others_can_read_is_refused_as_ssh_refuses_its_keys(folder: ClusterFolder) -> None:
    folder.write_secret(os.urandom(32))
    for mode in (0o640, 0o604, 0o620):
        os.chmod(folder.secret_path, mode)
        with pytest.raises(UsageError, match=f"mode {mode:04o}.: chmod 600"):
            read_secret(LocalDisk(), folder.secret_path)
    os.chmod(folder.secret_path, 0o400)
    assert read_secret(LocalDisk(), folder.secret_path)


def test_a_long_log_is_set_aside_once(folder: ClusterFolder) -> None:
    path = Path(folder.inside("logs", "meta.log"))
    with path.open("wb") as file:
        file.truncate(9 * MiB)
    assert folder.log_path("meta") == str(path)
    assert not path.exists()
    assert Path(f"{path}.1").exists()


def test_a_stop_wish_lasts_until_it_is_forgotten(folder: ClusterFolder) -> None:
    folder.write_stop(StopWish(2.5))
    folder.write_unflushed(("inode 7: not flushed",))
    assert folder.read_stop() == StopWish(2.5)
    assert folder.read_unflushed() == ("inode 7: not flushed",)
    folder.forget("stop.json", "unflushed.json", "stopped.json")
    assert folder.read_stop() is None
    assert folder.read_unflushed() == ()


def test_this_process_is_known_by_pid_boot_and_start_time() -> None:
    processes = LocalProcesses()
    me = processes.identity(os.getpid())
    assert me is not None and me.pid == os.getpid()
    assert processes.identity(os.getpid()) == me
    assert processes.identity(2**22 + 1) is None


# Parameters


def test_the_defaults_are_those_of_the_design() -> None:
    made = volume()
    assert (made.server_count, made.replicas, made.block_size, made.page_size) == (4, 3, 4 * MiB, 16384)
    assert (made.partitions, made.layout, made.checksum) == (1024, "ring", "xxh3")
    assert (made.write_quorum, made.read_quorum) == (2, 1)


@pytest.mark.seed("C2")
def test_blocks_of_eight_bytes_have_pages_of_eight_bytes() -> None:
    assert (volume(block_size=8).block_size, volume(block_size=8).page_size) == (8, 8)


@pytest.mark.parametrize(
    ("block_size", "page_size"),
    [
        (8, 8),
        (3000, 3000),
        (16384, 16384),
        (20000, 10000),
        (65536, 16384),
        (1000, 1000),
        (16 * MiB, 16384),
        (99990, 11110),
    ],
)
def test_pages_divide_blocks_of_any_size_without_being_told(block_size: int, page_size: int) -> None:
    assert volume(block_size=block_size).page_size == page_size


@pytest.mark.parametrize(("servers", "replicas"), [(1, 1), (2, 2), (3, 3), (32, 3)])
def test_there_are_three_replicas_or_as_many_as_servers(servers: int, replicas: int) -> None:
    assert volume(servers=servers).replicas == replicas


@pytest.mark.parametrize("base_port", [65533, 70000])
def test_ports_past_the_last_one_are_refused(base_port: int) -> None:
    check_ports(65531, 5)
    with pytest.raises(UsageError, match=f"--base-port {base_port} is too high.*choose 65531 or lower"):
        check_ports(base_port, 5)


@pytest.mark.seed("B1")
def test_pairs_have_two_replicas_without_being_told() -> None:
    assert volume(layout="pairs").replicas == 2


@pytest.mark.parametrize(
    ("wishes", "complaint"),
    [
        ({"servers": 2, "replicas": 3}, "3 replicas need at least 3 servers"),
        ({"replicas": 0}, "--replicas 0 .* from 1 to 16"),
        ({"servers": 20, "replicas": 17}, "--replicas 17"),
        ({"block_size": 8, "page_size": 16384}, "--page-size 16KiB .* from 1 to 8"),
        ({"block_size": 16 * MiB, "page_size": 512}, "--page-size 512 is too small .* at least 1KiB"),
        ({"block_size": 1000003}, "--page-size 1 is too small for blocks of 1000003"),
        ({"partitions": 1 << 17}, "--partitions 131072 .* from 1 to 65536"),
        ({"servers": 2, "write_quorum": 3}, "--write-quorum 3 .* from 1 to 2"),
        ({"layout": "pairs", "replicas": 3}, "needs --replicas 2"),
        ({"servers": 0}, "--servers 0"),
        ({"block_size": 4}, "--block-size 4 .* from 8 to 16MiB"),
        ({"block_size": 32 * MiB}, "--block-size 32MiB"),
        ({"page_size": 3000}, "--page-size 3000 does not divide the block size, 4MiB"),
        ({"page_size": 8 * MiB}, "--page-size 8MiB"),
        ({"page_size": 64}, "--page-size 64 is too small"),
        ({"partitions": 1023}, "1023 partitions are not a multiple of 4 servers; use --partitions 1024"),
        ({"write_quorum": 4}, "--write-quorum 4 .* from 1 to 3"),
        ({"read_quorum": 0}, "--read-quorum 0"),
        ({"layout": "pairs", "servers": 5, "partitions": 1025}, "even number of servers"),
    ],
)
def test_impossible_parameters_are_refused_with_what_is_possible(wishes: dict[str, object], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        volume(**wishes)


@pytest.mark.parametrize(
    ("wishes", "complaint"),
    [
        (VolumeWishes(replicas=2), "--replicas 2 was asked for, .* formatted with --replicas 3"),
        (VolumeWishes(block_size=8 * MiB), "--block-size 8MiB was asked for, .* --block-size 4MiB"),
        (VolumeWishes(layout="spread"), "--layout spread .* --layout ring"),
        (VolumeWishes(servers=5), "--servers 5 .* --servers 4"),
        (VolumeWishes(page_size=4096), "--page-size 4KiB .* --page-size 16KiB"),
        (VolumeWishes(partitions=2048), "--partitions 2048 .* --partitions 1024"),
        (VolumeWishes(checksum="blake3"), "--checksum blake3 .* --checksum xxh3"),
        (VolumeWishes(write_quorum=1), "--write-quorum 1 .* --write-quorum 2"),
        (VolumeWishes(read_quorum=2), "--read-quorum 2 .* --read-quorum 1"),
    ],
)
def test_other_parameters_than_the_volumes_are_named_with_both_values(wishes: VolumeWishes, complaint: str) -> None:
    check_same(VolumeWishes(replicas=3, block_size=4 * MiB), volume(), where="/data")
    with pytest.raises(UsageError, match=complaint):
        check_same(wishes, volume(), where="/data")
