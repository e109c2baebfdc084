"""The simulated network: order, flow control, cuts, resets, half-open connections."""

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from mendfs.errors import Unreachable
from mendfs.sim.loop import Process, SimLoop
from mendfs.sim.network import UNACKNOWLEDGED_S, WINDOW_BYTES, SimNetwork


class Collector(asyncio.Protocol):
    def __init__(self) -> None:
        self.transport: asyncio.Transport
        self.data = b""
        self.lost: list[Exception | None] = []
        self.pauses = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)

    def pause_writing(self) -> None:
        self.pauses += 1

    def resume_writing(self) -> None:
        self.pauses -= 1


class World:
    """Two hosts and a connection between them."""

    def __init__(self, seed: int = 1) -> None:
        self.loop = SimLoop()  # type: ignore[abstract] # what nobody calls is not there
        self.network = SimNetwork(self.loop, random.Random(seed))
        self.a, self.b = Process("a"), Process("b")
        self.near, self.far = Collector(), Collector()

    async def connect(self) -> None:
        await self.network.at("b", self.b).listen("b:1", lambda: self.far)
        await self.network.at("a", self.a).connect("b:1", lambda: self.near)
        await asyncio.sleep(1)

    def run(self, work: Coroutine[Any, Any, None]) -> None:
        self.loop.run_until_complete(self.loop.create_task(work))


@pytest.mark.parametrize("seed", range(10))
def test_a_stream_keeps_its_order_and_its_writer_is_paused(seed: int) -> None:
    world = World(seed)
    sent = b"".join(bytes((number % 251,)) * 997 for number in range(1000))

    async def main() -> None:
        await world.connect()
        for begin in range(0, len(sent), 7001):
            world.near.transport.write(sent[begin : begin + 7001])
        assert len(sent) > WINDOW_BYTES and world.near.pauses == 1
        await asyncio.sleep(20)

    world.run(main())
    assert world.far.data == sent
    assert world.near.pauses == 0


def test_what_a_cut_link_holds_arrives_when_it_heals() -> None:
    world = World()

    async def main() -> None:
        await world.connect()
        world.network.cut("a", "b")
        world.near.transport.write(b"late")
        world.far.transport.write(b"the other way")
        await asyncio.sleep(10)
        assert world.far.data == b"" and world.near.data == b"the other way"
        world.network.heal("a", "b")
        await asyncio.sleep(2)

    world.run(main())
    assert world.far.data == b"late"
    assert not world.near.lost


def test_a_link_that_stays_cut_ends_the_connection_for_its_sender() -> None:
    world = World()

    async def main() -> None:
        await world.connect()
        world.network.cut("a", "b")
        world.near.transport.write(b"never")
        await asyncio.sleep(UNACKNOWLEDGED_S + 5)

    world.run(main())
    assert isinstance(world.near.lost[0], TimeoutError)
    assert not world.far.lost, "the far end has sent nothing and knows nothing"


def test_a_half_open_connection_ends_when_the_other_side_writes() -> None:
    world = World()

    async def main() -> None:
        await world.connect()
        world.network.reset(world.network.connections[0], told=0)
        await asyncio.sleep(1)
        assert world.near.lost and not world.far.lost
        world.far.transport.write(b"is anybody there?")
        await asyncio.sleep(1)

    world.run(main())
    assert isinstance(world.far.lost[0], ConnectionResetError)


def test_a_killed_process_resets_its_connections_and_refuses_new_ones() -> None:
    world = World()

    async def main() -> None:
        await world.connect()
        world.loop.kill(world.b)
        world.network.process_died(world.b, silent=False)
        await asyncio.sleep(1)
        with pytest.raises(Unreachable, match="refused"):
            await world.network.at("a", world.a).connect("b:1", Collector)

    world.run(main())
    assert isinstance(world.near.lost[0], ConnectionResetError)
    assert not world.far.lost, "the dead are told nothing"


def test_a_host_without_power_says_nothing() -> None:
    world = World()

    async def main() -> None:
        await world.connect()
        world.network.power_off("b")
        world.loop.kill(world.b)
        world.network.process_died(world.b, silent=True)
        await asyncio.sleep(5)
        assert not world.near.lost
        await asyncio.sleep(UNACKNOWLEDGED_S)

    world.run(main())
    assert isinstance(world.near.lost[0], TimeoutError)
