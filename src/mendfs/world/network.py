"""The network as the wire sees it: connect, listen, and asyncio transports. `world.tcp` is the real one."""

import asyncio
from collections.abc import Callable
from typing import Protocol

Address = str
"""`HOST:PORT`, `[IPV6]:PORT`, or the absolute path of a Unix socket."""


class Listener(Protocol):
    """Something that accepts connections."""

    @property
    def address(self) -> Address:
        """Where it listens: with the port that the system chose, if 0 was asked for."""
        ...

    async def close(self) -> None:
        """Accept no more; connections go on."""
        ...


class Network(Protocol):
    """How connections come to be. Protocols may be `asyncio.BufferedProtocol`s."""

    async def connect(self, address: Address, factory: Callable[[], asyncio.BaseProtocol]) -> None:
        """Connect and hand the transport to a new protocol. Raises Unreachable, naming the address."""
        ...

    async def listen(self, address: Address, factory: Callable[[], asyncio.BaseProtocol]) -> Listener:
        """Accept connections. Raises UsageError, naming the address, if it is in use or not ours."""
        ...
