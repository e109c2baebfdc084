"""The real network: TCP and Unix sockets, tuned for many small calls and a few big payloads.

Errors say which address and what to do; what the system said stays in brackets behind it.
"""

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket
import stat
from collections.abc import Callable

from mendfs.errors import Unreachable, UsageError
from mendfs.model import MiB
from mendfs.world.network import Address, Listener

BACKLOG = 1024
"""Connections the kernel holds before they are accepted: every client of a restarted server comes at once."""
UNIX_BUFFER_BYTES = 1 * MiB
"""A Unix socket's send buffer is all the flow control it has; with the default of 208 KiB a block takes 20 switches."""
KEEPALIVE_IDLE_S = 10
KEEPALIVE_INTERVAL_S = 5
KEEPALIVE_PROBES = 3
"""A host that vanished without a word is noticed 25 s later even where nobody waits for an answer."""
UNACKNOWLEDGED_MS = 1000 * (KEEPALIVE_IDLE_S + KEEPALIVE_INTERVAL_S * KEEPALIVE_PROBES)
"""The same where something was sent: the kernel's own limit is a quarter of an hour of repeats."""

Factory = Callable[[], asyncio.BaseProtocol]


def parse_address(address: Address) -> tuple[str, int] | None:
    """(host, port) of `HOST:PORT` or `[IPV6]:PORT`; None for the path of a Unix socket. Raises UsageError."""
    if address.startswith("/"):
        return None
    host, colon, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(
            f"{address!r} is no address: write HOST:PORT, [IPV6]:PORT or the absolute path of a Unix socket"
        )
    return host, int(port)


def format_address(host: str, port: int) -> Address:
    """The address of a host and port, with the brackets that IPv6 needs."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _tune(sock: socket.socket) -> None:
    """Options that Linux hands on from a listening socket to those accepted from it."""
    if sock.family == socket.AF_UNIX:
        return
    # Small calls must not wait for the acknowledgement of the frame before (Nagle): that costs 40 ms a call.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
    # SO_SNDBUF and SO_RCVBUF are left alone: setting them ends the kernel's autotuning (up to 4 and 6 MiB) and
    # caps them at net.core.[rw]mem_max, which is 208 KiB by default.


def widen(transport: asyncio.BaseTransport) -> None:
    """Give a Unix socket a bigger send buffer; beyond wmem_max only root may, others get what there is.

    Called by each side when its connection is made, for an accepted Unix socket inherits nothing.
    """
    sock = transport.get_extra_info("socket")
    if sock is None or sock.family != socket.AF_UNIX:
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
        # 32 is SO_SNDBUFFORCE, which Python does not name.
        sock.setsockopt(socket.SOL_SOCKET, 32, UNIX_BUFFER_BYTES)


def name_of(transport: asyncio.BaseTransport) -> str:
    """Who is at the other end, for people."""
    name = transport.get_extra_info("peername")
    return format_address(*name[:2]) if isinstance(name, tuple) else "a process of this machine"


def local_host(transport: asyncio.BaseTransport) -> str:
    """This end's host, as the other one sees it unless something translates addresses; empty on a Unix socket."""
    name = transport.get_extra_info("sockname")
    return str(name[0]) if isinstance(name, tuple) else ""


def is_wildcard(address: Address) -> bool:
    """Whether `address` is one to listen on, `0.0.0.0:PORT` or `[::]:PORT`, which nobody can connect to from afar."""
    where = parse_address(address)
    return where is not None and where[0] in ("0.0.0.0", "::")


def is_local(address: Address) -> bool:
    """Whether only programs of the same machine can reach `address`, by what it says."""
    where = parse_address(address)
    return where is None or is_wildcard(address) or is_loopback(where[0])


def is_loopback(host: str) -> bool:
    """Whether `host` means the same machine; "" is what a Unix socket has for one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host in ("", "localhost")


def _reason(error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return "no such host"
    return os.strerror(error.errno) if error.errno else str(error)


class TcpListener:
    """A `Listener` on this machine."""

    def __init__(self, server: asyncio.AbstractServer, address: Address, inode: int | None) -> None:
        self._server = server
        self._address = address
        self._inode = inode

    @property
    def address(self) -> Address:
        """Where it listens: with the port that the system chose, if 0 was asked for."""
        return self._address

    async def close(self) -> None:
        """Accept no more; connections go on. The name of a Unix socket goes, if it is still ours."""
        self._server.close()
        if self._inode is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._address).st_ino == self._inode:
                    os.unlink(self._address)


class TcpNetwork:
    """The machine's network."""

    async def connect(self, address: Address, factory: Factory) -> None:
        """Connect and hand the transport to a new protocol. Raises Unreachable, naming the address."""
        loop = asyncio.get_running_loop()
        where = parse_address(address)
        try:
            if where is None:
                await loop.create_unix_connection(factory, address)
            else:
                transport, _ = await loop.create_connection(factory, *where)
                sock = transport.get_extra_info("socket")
                if sock is not None:
                    _tune(sock)
        except OSError as error:
            raise Unreachable(f"{address} does not answer ({_reason(error)})") from error
        except ValueError as error:
            # uvloop's socket of a connection that ended at once has the descriptor -1. Found by 150 kills of the meta
            # server (tests/chaos/test_kills.py): the client's task that connects again died of it.
            raise Unreachable(f"{address} does not answer (the connection ended at once)") from error

    async def listen(self, address: Address, factory: Factory) -> Listener:
        """Accept connections. Raises UsageError, naming the address, if it is in use or not ours."""
        loop = asyncio.get_running_loop()
        where = parse_address(address)
        try:
            if where is None:
                return await self._listen_unix(address, factory)
            found = await loop.getaddrinfo(*where, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            family, kind, protocol, _, target = found[0]
            sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
            try:
                # A restarted server must get its port back although connections of its last life are in TIME_WAIT.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                _tune(sock)
                sock.bind(target)
                server = await loop.create_server(factory, sock=sock, backlog=BACKLOG)
            except BaseException:
                sock.close()
                raise
            host, port = sock.getsockname()[:2]
            return TcpListener(server, format_address(host, port), None)
        except OSError as error:
            remedy = (
                "stop what listens there, or name another address"
                if error.errno == errno.EADDRINUSE
                else "name an address of this machine"
            )
            raise UsageError(f"cannot listen on {address} ({_reason(error)}): {remedy}") from error

    async def _listen_unix(self, path: Address, factory: Factory) -> Listener:
        """Bind a Unix socket, over a name whose owner died but never over a living one."""
        loop = asyncio.get_running_loop()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            if _is_stale(path):
                os.unlink(path)
            sock.bind(path)
            os.chmod(path, 0o600)
            server = await loop.create_unix_server(factory, sock=sock, backlog=BACKLOG)
        except BaseException:
            sock.close()
            raise
        return TcpListener(server, path, os.stat(path).st_ino)


def _is_stale(path: Address) -> bool:
    """Whether `path` is a Unix socket that nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
    except FileNotFoundError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED
