"""A cluster over machines, as somebody sets it up who has read docs/operations.md: hosts with 10 ms between them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mendfs.fuse import device
from tests.hosts import Hosts, Program, needs_hosts
from tests.real_cluster import until

pytestmark = needs_hosts

DELAY_S = 0.01
DATA = ("d0", "d1", "d2")
BROKEN_S = 2.5
"""How long a cable is cut: renewals and heartbeats are missed, the data server counts as lost or nearly so."""


class Machines(Hosts):
    """A meta server, three data servers in zones of their own, and a client that mounts."""

    meta: Program
    data: dict[str, Program]
    mount: Program

    def __init__(self, path: Path) -> None:
        super().__init__(path, ("meta", *DATA, "client", "other"))
        self.data = {}
        self.at = self.address("meta", 7000)
        self.mnt = path / "client" / "mnt"

    def give_secret(self, *names: str) -> None:
        """Copy the secret to these hosts, as a user would."""
        for name in names:
            shutil.copy(self.folder("meta") / "m" / "secret", self.folder(name) / "secret")
            (self.folder(name) / "secret").chmod(0o600)

    @property
    def named(self) -> tuple[str, ...]:
        """How a command on any host finds the cluster."""
        return ("--meta", self.at, "--secret-file", "secret")

    def begin_meta(self) -> None:
        """Start the meta server."""
        self.meta = self.begin("meta", "meta", "--dir", "m", "--listen", self.at)
        self.meta.wait_for("ready on")

    def begin_data(self, name: str, *options: str, port: int = 7001) -> Program:
        """Start a data server on its host."""
        options = options or ("--listen", self.address(name, port))
        self.data[name] = self.begin(name, "data", "--dir", "d", *self.named, "--zone", f"zone-{name}", *options)
        return self.data[name]

    def begin_mount(self, *options: str) -> Program:
        """Mount on the client, in the foreground."""
        self.mnt.mkdir(exist_ok=True)
        self.mount = self.begin("client", "mount", "mnt", "--foreground", *self.named, *options)
        return self.mount

    def servers(self) -> dict[int, dict[str, object]]:
        """What `mendfs servers` shows on a host that is none of them."""
        shown = json.loads(self.must("other", "servers", *self.named, "--json"))
        return {server["number"]: server for server in shown}

    def wait_all_up(self) -> None:
        """Until every data server answers."""
        until(lambda: [server["state"] for server in self.servers().values()] == ["up"] * len(DATA), 60)

    def close(self) -> None:
        """Stop all of it; a mount left over is taken away."""
        self.cut()
        super().close()
        for entry in device.mount_entries():
            if entry.mountpoint.startswith(str(self.path)):
                device.unmount(entry.mountpoint, detach=True)


@pytest.fixture(scope="module")
def machines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    """A running cluster that all tests of this module share, in order."""
    made = Machines(tmp_path_factory.mktemp("machines"))
    try:
        made.start()
        made.delay(DELAY_S)
        made.must("meta", "format", "--dir", "m", "--servers", len(DATA))
        made.begin_meta()
        made.give_secret(*DATA, "client", "other")
        yield made
    finally:
        made.close()


def test_a_mount_waits_for_the_data_servers_of_a_new_volume_and_says_so(machines: Machines) -> None:
    machines.begin_data("d0").wait_for("registered with the meta server")
    mount = machines.begin_mount()
    mount.wait_for("waiting: the volume waits for its data servers: 1 of 3 have registered")
    assert "1 of 3 have registered" in machines.must("other", "status", *machines.named)
    # Listening everywhere, it is known by the address that the meta server sees; a name or IPv6 is as good as a number.
    machines.begin_data("d1", "--listen", "0.0.0.0:7001", "--capacity", "1GiB").wait_for("registered with the meta")
    mount.wait_for("2 of 3 have registered")
    v6 = "[fd6d:66::4]:7001"
    machines.begin_data("d2", "--listen", "[::]:7001", "--advertise", v6).wait_for("registered with the meta")
    mount.wait_for(f"ready on {machines.mnt}")
    assert mount.said().count("waiting:") == 2, "one line each time that something has changed"
    machines.wait_all_up()
    addresses = [server["address"] for server in machines.servers().values()]
    assert addresses == [machines.address("d0", 7001), machines.address("d1", 7001), v6]
    free = machines.servers()[1]["bytes_free"]
    assert isinstance(free, int) and free <= 1 << 30


def test_files_are_spread_over_the_hosts_and_seen_from_everywhere(machines: Machines) -> None:
    content = os.urandom(5 << 20)
    (machines.mnt / "file").write_bytes(content)
    assert machines.must("other", "ls", "/", *machines.named).split() == ["file"]
    got = machines.folder("other") / "got"
    machines.must("other", "get", "/file", got, *machines.named)
    assert got.read_bytes() == content
    for slot in json.loads(machines.must("other", "where", "/file", *machines.named, "--json"))["slots"]:
        for extent in slot["extents"]:
            assert {replica["server"] for replica in extent["replicas"]} == {0, 1, 2}
            assert {replica["state"] for replica in extent["replicas"]} == {"ok"}


def test_a_detached_mount_and_a_second_client(machines: Machines) -> None:
    second = machines.folder("other") / "mnt"
    second.mkdir()
    machines.must("other", "mount", "mnt", *machines.named, "--read-only")
    assert (second / "file").read_bytes() == (machines.mnt / "file").read_bytes()
    with pytest.raises(OSError, match="Read-only"):
        (second / "new").write_bytes(b"")
    (machines.mnt / "later").write_bytes(b"seen at once")
    assert (second / "later").read_bytes() == b"seen at once"
    machines.must("other", "umount", "mnt")
    assert not os.path.ismount(second)


def test_the_secret_is_looked_after_as_ssh_does_with_its_keys(machines: Machines) -> None:
    folder = machines.folder("other")
    (folder / "loose").write_bytes((folder / "secret").read_bytes())
    (folder / "loose").chmod(0o644)
    (folder / "wrong").write_text("0" * 64)
    (folder / "wrong").chmod(0o600)
    at = ("--meta", machines.at)
    data = ("data", "--dir", "new", *at, "--listen", machines.address("other", 7001))
    for command in (("status", *at), data):
        code, _, said = machines.mendfs("other", *command)
        assert code == 2 and "name its file with --secret-file or MENDFS_SECRET_FILE" in said
        code, _, said = machines.mendfs("other", *command, "--secret-file", "nowhere")
        assert code == 2 and "No such file or directory" in said and "copy it from where the cluster was made" in said
        code, _, said = machines.mendfs("other", *command, "--secret-file", "loose")
        assert code == 2 and "can be read by others (mode 0644): chmod 600" in said
        code, _, said = machines.mendfs("other", *command, "--secret-file", "wrong")
        assert code == 1 and f"{machines.at} does not accept the secret of this cluster" in said
    environment = {"MENDFS_META": machines.at, "MENDFS_SECRET_FILE": str(folder / "secret")}
    assert machines.mendfs("other", "status", env=environment)[0] == 0


def test_data_servers_that_are_not_what_they_say_are_refused_in_one_line(machines: Machines) -> None:
    listen = ("--listen", machines.address("other", 7001))
    named = machines.named
    code, _, said = machines.mendfs("other", "data", "--dir", "new", *named, *listen)
    assert code == 2 and "the volume has its 3 data servers, and 10.213.0.6:7001 is none of them" in said
    code, _, said = machines.mendfs("other", "data", "--dir", "new", *named, "--listen", "127.0.0.1:7001")
    assert code == 2 and "says that it is reached at 127.0.0.1:7001" in said and "--advertise" in said
    # The folder of a server that runs, copied to another host: two with one identity would push each other out.
    shutil.copytree(machines.folder("d0") / "d", machines.folder("other") / "d")
    code, _, said = machines.mendfs("other", "data", "--dir", "d", *named, *listen)
    assert code == 2 and "data server 0 runs already, at 10.213.0.2:7001" in said and "use an empty one" in said
    code, _, said = machines.mendfs("d0", "data", "--dir", "d", *named, "--listen", machines.address("d0", 7009))
    assert code == 2 and "is in use by another data server" in said
    code, _, said = machines.mendfs("other", "data", "--dir", "n", *named, "--listen", machines.address("d0", 7001))
    assert code == 2 and "name an address of this machine" in said
    assert [server["state"] for server in machines.servers().values()] == ["up"] * 3


def test_a_meta_server_without_a_volume_leaves_nothing_behind(machines: Machines) -> None:
    listen = ("--listen", machines.address("other", 7000))
    code, _, said = machines.mendfs("other", "meta", "--dir", "nothing", *listen, "--secret-file", "secret")
    assert code == 2 and 'make one with "mendfs format"' in said
    assert not (machines.folder("other") / "nothing").exists()
    code, _, said = machines.mendfs("meta", "meta", "--dir", "m", "--listen", machines.address("meta", 7009))
    assert code != 0 and "is in use" in said


def test_a_data_server_that_comes_back_under_another_address_is_used_there(machines: Machines) -> None:
    content = (machines.mnt / "file").read_bytes()
    assert machines.data["d0"].end(signal.SIGINT) == 0
    machines.begin_data("d0", port=7005).wait_for("registered with the meta server")
    until(lambda: machines.servers()[0]["address"] == machines.address("d0", 7005), 60)
    # The other two go: what is read now comes from the new address.
    for name in ("d1", "d2"):
        assert machines.data[name].end() == 0
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    assert (machines.mnt / "file").read_bytes() == content
    machines.begin_data("d1").wait_for("registered with the meta server")
    machines.begin_data("d2").wait_for("registered with the meta server")
    # The meta server remembers addresses: it may be started again while a data server is away.
    assert machines.meta.end() == 0
    assert machines.data["d0"].end() == 0
    machines.begin_meta()
    assert machines.servers()[0]["address"] == machines.address("d0", 7005)
    machines.begin_data("d0")
    machines.wait_all_up()


COPY = """
import os, sys
with open(sys.argv[1], "rb") as source, open(sys.argv[2], "wb", buffering=0) as target:
    while piece := source.read(1 << 20):
        target.write(piece)
        os.fsync(target.fileno())
        print(target.tell() >> 20, flush=True)
"""


@pytest.mark.seed("D3")
def test_a_copy_goes_on_over_seconds_without_a_connection(machines: Machines) -> None:
    """No application error, and every byte as it was. Nobody is told of the cut but the host whose link goes down."""
    content = os.urandom(20 << 20)
    source, target = machines.path / "source", machines.mnt / "copy"
    source.write_bytes(content)
    breaks: dict[int, Callable[[], None]] = {
        4: lambda: machines.cut("client"),
        9: lambda: machines.cut("meta"),
        14: lambda: machines.link("d1", "down"),
    }
    broken: list[int] = []
    over_s: list[float] = []
    with subprocess.Popen([sys.executable, "-c", COPY, source, target], stdout=subprocess.PIPE) as copy:
        assert copy.stdout is not None
        for line in copy.stdout:
            if (act := breaks.get(int(line))) is not None:
                broken.append(int(line))
                act()
                over_s.append(time.monotonic() + BROKEN_S)
                until(lambda: time.monotonic() > over_s[-1], 60)
                machines.cut()
                machines.link("d1", "up")
        assert copy.wait(60) == 0, machines.logs()
    assert broken == list(breaks)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    assert target.read_bytes() == content
    machines.wait_all_up()


def test_everything_stops_in_order_and_starts_again(machines: Machines) -> None:
    machines.must("client", "umount", "mnt")
    assert machines.mount.process.wait(60) == 0
    machines.begin_mount().wait_for("ready on")
    (machines.mnt / "last").write_bytes(b"flushed by the stop")
    assert machines.mount.end(signal.SIGTERM) == 0
    assert not os.path.ismount(machines.mnt)
    for program in (*machines.data.values(), machines.meta):
        assert program.end(signal.SIGINT) == 0, program.said()
    machines.begin_meta()
    for name in DATA:
        machines.begin_data(name)
    machines.begin_mount().wait_for("ready on")
    assert (machines.mnt / "last").read_bytes() == b"flushed by the stop"
