"""What goes wrong for users is one clear line that says what to do, with exit code 1 or 2, and nothing is lost."""

import os
import socket
from pathlib import Path

import pytest

from tests.real_cluster import RealCluster, needs_mounts


def fails(
    cluster: RealCluster, code: int, words: list[str], *arguments: object, env: dict[str, str] | None = None
) -> None:
    """The command ends with `code`, says one line with all of `words`, and prints nothing else."""
    got, out, err = cluster.command(*arguments, env=env)
    assert (got, out) == (code, ""), err
    assert err.startswith("mendfs: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


@needs_mounts
def test_mistakes_around_a_running_cluster(cluster: RealCluster, tmp_path: Path) -> None:
    cluster.up()
    (cluster.mnt / "file").write_text("kept")
    fails(cluster, 2, ["already running", "mendfs down"], "up", "--detach")
    fails(cluster, 2, ["already", str(cluster.mnt), "umount"], "mount", cluster.mnt)
    fails(cluster, 2, [str(tmp_path / "nothing"), "not exist"], "mount", tmp_path / "nothing")
    fails(cluster, 2, ["is not a mendfs mount"], "umount", tmp_path)
    fails(cluster, 2, ["no data server '9'"], "contents", "9")
    fails(cluster, 1, ["/nothing", "No such file"], "cat", "/nothing")
    fails(cluster, 2, ["No such option: --bla"], "status", "--bla")

    wrong = tmp_path / "wrong"
    wrong.write_text("this is not the secret of that cluster\n")
    wrong.chmod(0o600)
    meta = cluster.record().meta
    fails(cluster, 1, [meta, "secret"], "status", "--secret-file", wrong)

    # A file below the mount is open: it cannot be unmounted in order.
    with (cluster.mnt / "file").open():
        fails(cluster, 1, ["in use"], "umount", cluster.mnt)
    assert (cluster.mnt / "file").read_text() == "kept"


@needs_mounts
def test_mistakes_when_a_cluster_is_started_again(cluster: RealCluster, tmp_path: Path) -> None:
    cluster.up()
    (cluster.mnt / "file").write_text("kept")
    cluster.down()
    for option, value, has in (
        ("--replicas", "2", "3"),
        ("--servers", "5", "4"),
        ("--block-size", "8MiB", "4MiB"),
        ("--layout", "spread", "ring"),
    ):
        fails(cluster, 2, [f"{option} {value}", f"{option} {has}"], "up", "--detach", option, value)
    port = cluster.record().base_port + 2
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        fails(cluster, 2, [f"port {port} is in use", "--base-port"], "up", "--detach")
    fails(cluster, 2, ["nothing", "not exist"], "up", "--detach", "--mount", tmp_path / "nothing")
    (cluster.mnt / "stray").write_text("x")
    fails(cluster, 2, ["not empty"], "up", "--detach", "--mount", cluster.mnt)
    (cluster.mnt / "stray").unlink()
    secret = cluster.dir / "secret"
    own = secret.read_text()
    secret.unlink()
    fails(cluster, 2, ["secret"], "up", "--detach")
    secret.write_text(own)
    secret.chmod(0o600)
    fails(cluster, 1, ["does not answer", "mendfs up"], "status")
    cluster.up()
    assert (cluster.mnt / "file").read_text() == "kept"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["up", "--detach", "--block-size", "4"], ["--block-size 4"]),
        (["up", "--detach", "--block-size", "many"], ["is no size", "4MiB"]),
        (["up", "--detach", "--servers", "2", "--replicas", "3"], ["3 replicas need at least 3 servers"]),
        (["up", "--detach", "--layout", "star"], ["--layout"]),
        (["up", "--detach", "--base-port", "70000"], ["--base-port 70000"]),
        (["up", "--detach", "-o", "ro"], ["-o is about the mount", "--mount MNT"]),
        (["up", "--detach", "--mount", ".", "-o", "bogus"], ["mount option 'bogus' is unknown"]),
        (["status"], ["no cluster", "mendfs up"]),
        (["down"], ["no cluster"]),
        (["ls", "/"], ["no cluster"]),
        (["bla"], ["bla", "--help"]),
    ],
)
def test_mistakes_without_a_cluster_leave_nothing_behind(
    cluster: RealCluster, arguments: list[str], words: list[str]
) -> None:
    fails(cluster, 2, words, *arguments)
    assert not cluster.dir.exists()


def test_a_meta_server_that_does_not_answer_is_named(cluster: RealCluster, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(16).hex().encode())
    secret.chmod(0o600)
    arguments = ["status", "--meta", "127.0.0.1:1", "--secret-file", secret]
    fails(cluster, 1, ["127.0.0.1:1 does not answer", "--meta"], *arguments, env={})
    fails(cluster, 2, ["secret is needed"], "status", "--meta", "127.0.0.1:1", env={})
