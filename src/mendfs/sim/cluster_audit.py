"""Rules between the servers of a cluster, looked at by somebody who sees all disks at once (design sections 4 to 6).

- A server deletes only what a power cut of the meta server cannot bring back, and not before what took its place is
  durable.
- A client counts a block as durable on a server only if it is.
- What fsync has acknowledged is named by the durable metadata, and durable on W servers.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mendfs.client.files import File, Unsynced, Upload
from mendfs.client.volume import Volume
from mendfs.data import server as data_server
from mendfs.data.schema import Name
from mendfs.data.store import Store
from mendfs.model import CommitSequence, Inode, ServerNumber
from mendfs.sim.audit import AuditedEngine
from mendfs.sim.disk import ProcessDisk
from mendfs.world import World

if TYPE_CHECKING:
    from mendfs.sim.machines import DataMachine, MetaMachine


class ClusterAudit:
    """The audit of one simulated cluster."""

    def __init__(self, meta: "MetaMachine", servers: "Sequence[DataMachine]", write_quorum: int) -> None:
        self.violation: Callable[[str], None] = meta.violation
        self._meta = meta
        self._servers = {ServerNumber(machine.number): machine for machine in servers}
        self._write_quorum = write_quorum
        for machine in servers:
            machine.audit.deletable = self._deletable
            machine.audit.violation = self._say

    def _say(self, text: str) -> None:
        self.violation(text)

    @property
    def _engine(self) -> AuditedEngine:
        assert self._meta.engine is not None, "a meta server has run"
        return self._meta.engine

    @contextmanager
    def watching_stores(self) -> Iterator[None]:
        """While in here every store that a data server opens is audited."""
        real: Callable[..., Awaitable[Store]] = vars(data_server)["open_store"]
        machines = {id(machine.disk): machine for machine in self._servers.values()}

        async def open_store(world: World, *args: Any, **kwargs: Any) -> Store:
            store = await real(world, *args, **kwargs)
            assert isinstance(world.disk, ProcessDisk), "machines are given one"
            if (machine := machines.get(id(world.disk.machine_disk))) is not None:
                machine.audit.opened(store)
            return store

        vars(data_server)["open_store"] = open_store
        try:
            yield
        finally:
            vars(data_server)["open_store"] = real

    def watch_metadata(self, engine: AuditedEngine) -> None:
        """Compare what its commits say of data servers with what these have answered."""
        engine.has_answered = lambda server, name: self._servers[server].audit.has_answered(name)

    def watch_client(self, client: str, volume: Volume) -> None:
        """Look at what a client counts as durable."""
        durability = volume._durability
        committed, clear = durability.committed, durability._clear_if_durable

        def check_and_commit(file: File, upload: Upload) -> None:
            self._claimed(client, upload.name, upload.synced)
            committed(file, upload)

        def check_and_clear(file: File, name: Name, entry: Unsynced) -> None:
            self._claimed(client, name, entry.synced)
            clear(file, name, entry)

        for attribute, audited in (("committed", check_and_commit), ("_clear_if_durable", check_and_clear)):
            setattr(durability, attribute, audited)

    def synced(self, client: str, inode: Inode, before: CommitSequence) -> None:
        """An fsync was acknowledged: it covers what was committed up to `before`, the client's newest change then."""
        for name in self._engine.blocks_of(inode, before):
            if not self._engine.lives_durably(name):
                self._say(f"{client}: fsync of inode {inode} was answered before block {name[1]:#x} was in the log")
            copies = sum(machine.audit.is_durable(name) for machine in self._servers.values())
            if copies < self._write_quorum:
                self._say(f"{client}: fsync of inode {inode} was answered with {copies} copies of block {name[1]:#x}")

    def _claimed(self, client: str, name: Name, servers: Iterable[ServerNumber]) -> None:
        if not self._engine.lives(name):
            return
        for number in sorted(servers):
            machine = self._servers.get(number)
            if machine is not None and not machine.audit.is_durable(name):
                self._say(f"{client} counts block {name[1]:#x} as durable on {machine.name}, which does not have it so")

    def _deletable(self, server: str, names: Sequence[Name]) -> None:
        engine = self._engine
        is_everybody_up = self._is_everybody_up()
        for name in names:
            if engine.lives_durably(name):
                self._say(f"{server} deletes block {name[1]:#x}, which a power cut of the meta server would bring back")
            for other in engine.successors(name) if is_everybody_up else ():
                audits = [machine.audit for machine in self._servers.values()]
                if any(audit.holds(other) for audit in audits) and not any(audit.is_durable(other) for audit in audits):
                    self._say(f"{server} deletes block {name[1]:#x} before block {other[1]:#x} in its place is durable")

    def _is_everybody_up(self) -> bool:
        """Then every server was synced before this round; one that is down is not waited for."""
        server = self._meta.server
        if server is None or not self._meta.is_running:
            return False
        return all(member.state() == "up" for member in server.state.members)
