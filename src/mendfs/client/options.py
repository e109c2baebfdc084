"""How a client behaves: one frozen struct, validated where a volume is opened."""

import msgspec

from mendfs.errors import UsageError
from mendfs.model import MiB


class VolumeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Every figure has its reason; the defaults suit a mount on a workstation or a server."""

    meta: str
    """Address of the meta server."""
    name: str = "client"
    """Host, process and mount, for people: shown where sessions are listed."""
    read_only: bool = False
    open_timeout_s: float = 10.0
    """How long opening tries before it tells the user that the meta server does not answer."""
    prepares: bool = False
    """Connect to the data servers and fetch ids before anybody needs them: for what lives longer than one command."""
    wait_until_ready: bool = False
    """Opening waits as long as it takes for a meta server that answers, but has not yet seen all its data servers."""
    meta_timeout_s: float = 60.0
    """How long a metadata call goes on through reconnects and restarts before the application sees ETIMEDOUT."""
    write_timeout_s: float | None = None
    """How long a write waits for W servers and the meta server; None for ever, as a local disk would."""
    read_timeout_s: float = 30.0
    """How long a read waits while no replica of a block answers."""
    put_timeout_s: float = 20.0
    """How long one server may take to store one block before it is gone round."""
    get_timeout_s: float = 10.0
    """How long one server may take to send one range; a hedged read does not wait for it."""
    dirty_bytes_max: int = 96 * MiB
    """Written bytes held for upload, over all files: writers wait above it. 24 full default blocks."""
    cache_bytes_max: int = 64 * MiB
    """Verified pages kept: eight sequential readers with their read-ahead."""
    read_ahead_bytes_max: int = 8 * MiB
    """Two default blocks: the next one arrives while the current one is used."""
    flush_after_s: float = 1.0
    """A file is committed when it has been dirty this long: what a crash of the client may lose."""

    def check(self) -> None:
        """Raise UsageError for figures that cannot work."""
        if self.dirty_bytes_max < MiB or self.cache_bytes_max < MiB:
            raise UsageError("dirty_bytes_max and cache_bytes_max must be at least 1 MiB")
        for value in (self.meta_timeout_s, self.read_timeout_s, self.put_timeout_s, self.get_timeout_s):
            if value <= 0:
                raise UsageError("timeouts must be above 0 s")
