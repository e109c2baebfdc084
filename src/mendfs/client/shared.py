"""What the parts of one open volume share: made once, handed to each of them."""

from collections.abc import Iterable

import msgspec

from mendfs.client.files import Files
from mendfs.client.ids import IdSupply
from mendfs.client.options import VolumeOptions
from mendfs.client.servers import Servers
from mendfs.client.session import Session
from mendfs.client.tasks import Changes, Tasks
from mendfs.model import Partition, ServerNumber, Volume
from mendfs.world import World
from mendfs.world.buffers import BufferPool


class Budget:
    """Bytes held, against a limit that may be overshot by one write."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self._freed = Changes()

    @property
    def is_exhausted(self) -> bool:
        """Whether a writer has to wait."""
        return self.used >= self.limit

    def take(self, count: int) -> None:
        """`count` bytes more are held, or fewer if it is negative."""
        self.used += count
        if count < 0:
            self._freed.notify()

    async def wait(self) -> None:
        """Until something was given back; the caller looks again."""
        await self._freed.wait(None)


class Shared(msgspec.Struct, kw_only=True):
    """The parts that reading, writing and naming stand on."""

    world: World
    options: VolumeOptions
    session: Session
    servers: Servers
    tasks: Tasks
    files: Files
    blocks: IdSupply
    inodes: IdSupply
    pool: BufferPool
    dirty: Budget

    @property
    def volume(self) -> Volume:
        """The volume's parameters."""
        return self.session.volume

    def row(self, partition: Partition) -> tuple[ServerNumber, ...]:
        """The servers of a partition in the newest known table, leaving and joining ones included."""
        return tuple(entry.server for entry in self.session.table.rows[partition])

    def known(self, servers: Iterable[ServerNumber]) -> list[ServerNumber]:
        """Those of `servers` that the meta server has told of."""
        return [number for number in servers if self.servers.find(number) is not None]
