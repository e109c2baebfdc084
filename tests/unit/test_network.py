"""Addresses, Unix sockets that somebody left behind, and the pool of buffers."""

import asyncio
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mendfs.errors import Unreachable, UsageError
from mendfs.model import KiB, MiB
from mendfs.world.buffers import POOLED_BYTES_MAX, POOLED_BYTES_MIN, BufferPool
from mendfs.world.tcp import KEEPALIVE_IDLE_S, UNACKNOWLEDGED_MS, TcpNetwork, format_address, is_local, parse_address
from tests.unit.wire_tools import until


@pytest.mark.parametrize(
    ("address", "where"),
    [
        ("127.0.0.1:7001", ("127.0.0.1", 7001)),
        ("host.example:0", ("host.example", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("/run/mendfs/0", None),
    ],
)
def test_addresses_are_read_and_written_alike(address: str, where: tuple[str, int] | None) -> None:
    assert parse_address(address) == where
    if where is not None:
        assert format_address(*where) == address


@pytest.mark.parametrize(
    "address",
    ["", "7001", ":7001", "host", "host:", "host:x", "host:65536", "host:-1", "::1:7001", "run/0", "h:\u0667"],
)
def test_what_is_no_address_is_refused_with_what_would_be(address: str) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_address(address)


async def test_a_name_left_behind_is_taken_over_but_never_a_living_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    network = TcpNetwork()
    first = await network.listen(str(path), asyncio.Protocol)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(UsageError, match="stop what listens there"):
        await network.listen(str(path), asyncio.Protocol)
    await first.close()
    assert not path.exists()
    path.write_text("a file of somebody's")
    with pytest.raises(UsageError):
        await network.listen(str(path), asyncio.Protocol)
    assert path.read_text() == "a file of somebody's"


async def test_closing_leaves_the_name_of_a_later_listener(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    network = TcpNetwork()
    first = await network.listen(str(path), asyncio.Protocol)
    path.unlink()
    second = await network.listen(str(path), asyncio.Protocol)
    await first.close()
    assert path.exists()
    await second.close()


async def test_both_sides_of_a_connection_notice_a_vanished_host_and_delay_nothing() -> None:
    made: list[asyncio.BaseTransport] = []

    class Protocol(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            made.append(transport)

    network = TcpNetwork()
    listener = await network.listen("127.0.0.1:0", Protocol)
    await network.connect(listener.address, Protocol)
    await until(lambda: len(made) == 2)
    for transport in made:
        sock = transport.get_extra_info("socket")
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == KEEPALIVE_IDLE_S
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == UNACKNOWLEDGED_MS
        transport.close()
    await listener.close()


@pytest.mark.parametrize("address", ["192.0.2.7:0", "no-such-host.invalid:7001", "/nonexistent/socket"])
async def test_an_address_that_is_not_ours_is_named_on_one_line(address: str) -> None:
    with pytest.raises(UsageError) as caught:
        await TcpNetwork().listen(address, asyncio.Protocol)
    assert address in str(caught.value) and "\n" not in str(caught.value)
    if address.startswith("/"):
        with pytest.raises(Unreachable, match=f"{address} does not answer"):
            await TcpNetwork().connect(address, asyncio.Protocol)


@given(st.lists(st.integers(0, POOLED_BYTES_MAX), max_size=12))
def test_the_pool_gives_enough_and_keeps_no_more_than_its_bound(lengths: list[int]) -> None:
    pool = BufferPool(kept_bytes_max=24 * MiB)
    taken = [pool.take(length) for length in lengths]
    for buffer, length in zip(taken, lengths, strict=True):
        assert length <= len(buffer) <= max(length, POOLED_BYTES_MIN, 2 * length)
        pool.give(buffer)
        assert pool.kept_bytes <= 24 * MiB


def test_a_buffer_given_back_is_the_next_one_of_its_size() -> None:
    pool = BufferPool()
    buffer = pool.take(4 * MiB)
    assert len(buffer) == 4 * MiB
    pool.give(buffer)
    assert pool.take(3 * MiB) is buffer
    assert pool.take(4 * MiB) is not buffer
    pool.give(bytearray(100 * KiB))
    assert pool.kept_bytes == 0


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("127.0.0.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("0.0.0.0:1", True),
        ("[::]:1", True),
        ("/run/socket", True),
        ("10.0.0.1:1", False),
        ("[fd00::1]:1", False),
        ("host.example:1", False),
    ],
)
def test_addresses_that_only_the_same_machine_can_reach_are_known(address: str, expected: bool) -> None:
    assert is_local(address) is expected
