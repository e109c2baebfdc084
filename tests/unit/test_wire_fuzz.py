"""Hostile bytes: no crash, no memory by an unchecked length, no other connection disturbed.

100,000 frames each time; `MENDFS_FUZZ_FRAMES=10000000 ./dev test tests/unit/test_wire_fuzz.py` for more, and
`MENDFS_FUZZ_SEED=N` for others: the seed is in the message of a failure.
"""

import asyncio
import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import uvloop
from xxhash import xxh3_64_intdigest

from mendfs.errors import BadFrame, BadMessage
from mendfs.model import BlockId, Epoch, Incarnation, Inode, KiB, MiB, Partition, Slot
from mendfs.wire import frame
from mendfs.wire.connection import Peer
from mendfs.wire.frame import HEADER_BYTES, MESSAGE_BYTES_MAX, PAYLOAD_BYTES_MAX, Kind
from mendfs.wire.messages import Message
from mendfs.wire.messages.data import BlockPages, GetBlock, HaveBlocks, PutBlock, Stored
from mendfs.wire.messages.meta import Lookup
from mendfs.wire.messages.session import Done, Failure, Hello, Ping, Proof, Renew, Welcome
from mendfs.wire.peer import Received
from mendfs.wire.requests import UNPROCESSED_BYTES_MAX
from mendfs.world.buffers import BufferPool
from tests.unit.wire_tools import RawSide, Result, connected, feed, raw, serving, unconnected, until

FRAMES = int(os.environ.get("MENDFS_FUZZ_FRAMES", "100000"))
SEED = int(os.environ.get("MENDFS_FUZZ_SEED", "1"))
SOCKET_FRAMES = min(FRAMES // 25, 40_000)
"""Those that go over real sockets: each costs system calls and a new connection after most."""

MESSAGES: tuple[Message, ...] = (
    Ping(),
    Done(),
    Failure("append_moved", "no number", -1),
    Failure("no such code", "x" * 300, 2**40),
    Hello(versions=(1,), role="client", volume="", nonce=bytes(32)),
    Welcome(version=1, role="data", volume="", nonce=bytes(32), proof=bytes(32)),
    Proof(bytes(32)),
    PutBlock(Partition(1), BlockId(2), Inode(3), Slot(4), b"r" * 16),
    GetBlock(Partition(-1), BlockId(2**64 - 1), -5, 2**60),
    BlockPages(5, b"c" * 100, Epoch(1)),
    Stored(Incarnation(2**64 - 1), Epoch(0)),
    HaveBlocks(tuple((Partition(p), BlockId(p)) for p in range(50))),
    Lookup(Inode(0), b"../\0" * 64),
    Renew(BlockId(0), (Inode(1),)),
)
LENGTHS = (0, 1, 31, 32, 4096, 4097, 64 * KiB, 256 * KiB, MESSAGE_BYTES_MAX, MESSAGE_BYTES_MAX + 1, 2**31, 2**32 - 1)


class Attacker:
    """Makes frames that are random, truncated, too long, bit-flipped, or right in everything but their meaning."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.ways: tuple[Callable[[], bytes], ...] = (
            self.noise,
            self.sound,
            self.sound,
            self.truncated,
            self.flipped,
            self.any_lengths,
            self.sealed_nonsense,
            self.nested,
        )

    def frame(self) -> bytes:
        return self.rng.choice(self.ways)()

    def sealed(self, kind: int, message: bytes, payload_bytes: int, flags: int = 0) -> bytes:
        """A header whose checksum is right."""
        rng = self.rng
        request_id = rng.choice((0, 1, 2, 3, 2**64 - 1, rng.getrandbits(64)))
        deadline_ms = rng.choice((0, 1, 2**32 - 1))
        checked = (
            struct.pack(">BBHIQII", 1, kind, flags, len(message), request_id, payload_bytes, deadline_ms) + message
        )
        return struct.pack(">4sI", b"MFS1", xxh3_64_intdigest(checked) & 0xFFFFFFFF) + checked

    def noise(self) -> bytes:
        start = self.rng.choice((b"", b"MFS1", b"GET / HTTP/1.1\r\n", b"\x16\x03\x01"))
        return start + self.rng.randbytes(self.rng.randrange(200))

    def sound(self) -> bytes:
        """A frame of ours, out of place more often than not; its payload may be missing in part."""
        rng = self.rng
        message = msgspec.msgpack.encode(rng.choice(MESSAGES))
        kind = rng.choice((1, 1, 2, 3, 4, 5))
        if kind == Kind.CANCEL:
            return self.sealed(kind, b"", 0)
        payload_bytes = rng.choice((0, 0, 0, 5, 1000, 70_000 if rng.random() < 0.05 else 3))
        return self.sealed(kind, message, payload_bytes) + bytes(payload_bytes)

    def truncated(self) -> bytes:
        whole = self.sound()
        return whole[: self.rng.randrange(len(whole))]

    def flipped(self) -> bytes:
        whole = bytearray(self.sound()[:400])
        for _ in range(self.rng.randrange(1, 4)):
            whole[self.rng.randrange(len(whole))] ^= 1 << self.rng.randrange(8)
        return bytes(whole)

    def any_lengths(self) -> bytes:
        """A plausible header that promises anything."""
        rng = self.rng
        return struct.pack(
            ">4sIBBHIQII",
            b"MFS1",
            rng.getrandbits(32),
            rng.choice((1, 1, 1, 0, 2)),
            rng.randrange(8),
            rng.choice((0, 0, 0, 1)),
            rng.choice(LENGTHS),
            rng.getrandbits(64),
            rng.choice((*LENGTHS, PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MAX + 1)),
            rng.getrandbits(32),
        ) + rng.randbytes(rng.randrange(100))

    def sealed_nonsense(self) -> bytes:
        """Nothing is wrong with it but the message."""
        rng = self.rng
        message = bytearray(msgspec.msgpack.encode(rng.choice(MESSAGES)))
        for _ in range(rng.randrange(1, 5)):
            message[rng.randrange(len(message))] = rng.randrange(256)
        payload_bytes = rng.choice((0, 0, 10))
        return self.sealed(rng.randrange(1, 5), bytes(message), payload_bytes) + bytes(payload_bytes)

    def nested(self) -> bytes:
        """Lengths inside the message that promise more than there is, and nesting deeper than a stack."""
        rng = self.rng
        inner = rng.choice(
            (
                b"\xdd\xff\xff\xff\xff",
                b"\xdf\x7f\xff\xff\xff",
                b"\xc6\xff\xff\xff\xff",
                b"\x91",
                b"\xdb\x00\x10\x00\x00",
            )
        )
        head = rng.choice(
            (b"\x82\xa4type\xadstatus_report\xa8document\x81\xa1x", b"\x82\xa4type\xa5hello\xa8versions", b"")
        )
        return self.sealed(1, head + inner * rng.choice((1, 10, 700)), 0)


class Limited(BufferPool):
    """Says how much was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def take(self, length: int) -> bytearray:
        assert length <= PAYLOAD_BYTES_MAX
        self.taken += length
        return super().take(length)


async def answer(peer: Peer, message: Message, received: Received | None) -> Result:
    """Does a little of everything a server does."""
    if isinstance(message, PutBlock):
        await asyncio.sleep(0)
        return Done() if received is None else BlockPages(len(received.view), b"", Epoch(0))
    if isinstance(message, Lookup):
        raise BadMessage("names have no slashes")
    if isinstance(message, GetBlock):
        await asyncio.sleep(10)
    return Done()


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A logged line a frame is right in production, and too much here."""
    monkeypatch.setattr("mendfs.wire.connection.log.warning", lambda *args, **facts: None, raising=False)
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    yield
    asyncio.set_event_loop_policy(None)


async def attack(attacker: Attacker, left: int, pools: dict[bool, Limited]) -> None:
    """Feed `left` frames to one connection after the other, strangers' among them."""
    rng = attacker.rng
    while left:
        is_stranger = rng.random() < 0.2
        peer, transport = unconnected(answer, is_stranger=is_stranger, pool=pools[is_stranger])
        sent = 0
        try:
            while left and not transport.is_aborted and sent < 1000:
                data = attacker.frame()
                left -= 1
                sent += 1
                feed(peer, data, 1 << 16 if len(data) > 1000 or rng.random() < 0.9 else rng.choice((33, 1)))
                if not sent % 10:
                    await asyncio.sleep(0)
        except BaseException as error:
            error.add_note(f"seed {SEED}, {left} frames before the end, {data.hex()}")
            raise
        assert not (is_stranger and peer.ready.done()), f"seed {SEED}: a stranger was let in"
        peer.connection_lost(None)
        await peer._requests.wait()
        assert len(peer._requests) == len(peer._calls) == 0


async def test_hostile_frames_fed_by_hand_end_the_connection_or_are_answered() -> None:
    pools = {False: Limited(), True: Limited()}
    await attack(Attacker(SEED), FRAMES - SOCKET_FRAMES, pools)
    assert pools[False].taken > 0 == pools[True].taken


async def test_hostile_frames_take_little_memory() -> None:
    """Lengths up to 2**32 - 1 are promised many times; what is held is one frame and the requests being handled."""
    pools = {False: Limited(), True: Limited()}
    tracemalloc.start()
    await attack(Attacker(SEED + 3), min(FRAMES // 40, 100_000), pools)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * MiB, f"seed {SEED}: {peak} bytes"


def test_no_bytes_make_the_functions_raise_anything_else() -> None:
    attacker = Attacker(SEED + 1)
    for _ in range(min(FRAMES // 10, 200_000)):
        data = attacker.frame().ljust(HEADER_BYTES, b"\0")
        with suppress(BadFrame, BadMessage):
            header = frame.parse_header(data)
            frame.decode_message(header, memoryview(data)[: HEADER_BYTES + header.message_bytes])


async def attack_once(side: RawSide, attacker: Attacker, left: int) -> int:
    """Send up to ten of `left` frames over a connection, as long as it is there; returns how many are left."""
    rng = attacker.rng
    reading = asyncio.create_task(side.reader.read())
    with suppress(ConnectionError):
        for _ in range(min(left, rng.randrange(1, 10))):
            left -= 1
            side.writer.write(attacker.frame())
            await side.writer.drain()
            if reading.done():
                break
    if rng.random() < 0.5:
        # Reset rather than close: what the server still writes finds nobody.
        side.writer.transport.abort()
    reading.cancel()
    with suppress(asyncio.CancelledError, ConnectionError):
        await reading
    return left


async def work_calmly(peer: Peer, rng: random.Random, done: list[int]) -> None:
    """What somebody else does on another connection meanwhile."""
    put = PutBlock(Partition(1), BlockId(2), Inode(3), Slot(4), b"root")
    while True:
        size = rng.choice((1, 100, 100_000))
        assert (await peer.call(put, [bytes(size)], deadline_s=10))[0] == BlockPages(size, b"", Epoch(0))
        assert (await peer.call(Ping(), deadline_s=10))[0] == Done()
        done.append(size)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_hostile_frames_over_sockets_disturb_nobody_else(kind: str, tmp_path: Path) -> None:
    address = "127.0.0.1:0" if kind == "tcp" else f"{tmp_path}/socket"
    attacker = Attacker(SEED + 2)
    done: list[int] = []
    crashes: list[dict[str, object]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: crashes.append(context))
    async with serving(address, answer) as server, connected(server.address) as calm:
        worker = asyncio.create_task(work_calmly(calm, random.Random(SEED), done))
        left = SOCKET_FRAMES // 2
        while left:
            async with raw(server.address, is_stranger=attacker.rng.random() < 0.3) as side:
                left = await attack_once(side, attacker, left)
            assert not worker.done(), f"seed {SEED}: {worker}"
        before = len(done)
        while len(done) < before + 10:
            await asyncio.sleep(0)
            assert not worker.done(), f"seed {SEED}: {worker}"
        worker.cancel()
        with suppress(asyncio.CancelledError):
            await worker
        await until(lambda: len(server.peers) == 1)
    assert crashes == [], f"seed {SEED}"


async def test_memory_is_reserved_for_what_has_come_not_for_what_is_promised() -> None:
    """A hundred connections that each promise 16 MiB behind an unproved header reserve nothing."""
    pool = Limited()
    header = struct.pack(">4sIBBHIQII", b"MFS1", 0, 1, 1, 0, 11, 1, PAYLOAD_BYTES_MAX, 0)
    peers = [unconnected(answer, pool=pool)[0] for _ in range(100)]
    tracemalloc.start()
    for peer in peers:
        feed(peer, header + b"\x81\xa4type\xa4pin")
    assert tracemalloc.get_traced_memory()[0] < MiB
    for peer in peers:
        feed(peer, b"g")
        assert peer._transport is not None and peer._transport.is_aborted  # type: ignore[attr-defined]
    assert pool.taken == 0
    tracemalloc.stop()


async def test_a_proved_side_makes_us_hold_no_more_than_the_limit() -> None:
    pool = Limited()
    peer, transport = unconnected(answer, pool=pool)
    size = 4 * MiB
    for number in range(100):
        if not transport.is_reading:
            break
        feed(peer, frame.encode(Kind.REQUEST, number, MESSAGES[8], size) + bytes(size))
        await asyncio.sleep(0)
    assert not transport.is_aborted
    assert pool.taken <= UNPROCESSED_BYTES_MAX + size
    peer.connection_lost(None)
    await peer._requests.wait()
