"""Only who knows the secret gets in, and whoever does not costs little."""

import asyncio

import msgspec
import pytest

from mendfs.errors import BadFrame, NotAuthentic
from mendfs.wire import peer as peer_module
from mendfs.wire.frame import Kind
from mendfs.wire.handshake import Accepting, Connecting, Credentials
from mendfs.wire.messages.session import Done, Failure, Hello, Ping, Proof, Welcome
from tests.unit.wire_tools import CREDENTIALS, RawSide, connected, raw, serving, until


def sides(*, server: Credentials = CREDENTIALS, client: Credentials = CREDENTIALS) -> tuple[Accepting, Connecting]:
    return Accepting(server, role="data"), Connecting(client, role="client", address="host:1")


def welcomed(accepting: Accepting, hello: Hello) -> Welcome:
    welcome = accepting.take(hello)
    assert isinstance(welcome, Welcome)
    return welcome


def test_both_sides_learn_who_the_other_is() -> None:
    accepting, connecting = sides(server=Credentials(CREDENTIALS.secret, "aa"))
    proof = connecting.take(welcomed(accepting, connecting.hello))
    assert isinstance(proof, Proof)
    assert accepting.take(proof) == Done() and accepting.is_done
    assert connecting.take(Done()) is None
    assert (connecting.remote_role, connecting.remote_volume, accepting.remote_role) == ("data", "aa", "client")


def test_what_was_overheard_once_opens_nothing_again() -> None:
    accepting, connecting = sides()
    proof = connecting.take(welcomed(accepting, connecting.hello))
    again, _ = sides()
    welcomed(again, connecting.hello)
    assert proof is not None
    with pytest.raises(NotAuthentic):
        again.take(proof)


def test_the_servers_own_proof_sent_back_to_it_proves_nothing() -> None:
    accepting, connecting = sides()
    welcome = welcomed(accepting, connecting.hello)
    with pytest.raises(NotAuthentic):
        accepting.take(Proof(welcome.proof))


def test_a_role_that_was_changed_on_the_way_is_refused() -> None:
    """Deletions are obeyed by role: nobody in between may turn a client into a meta server."""
    accepting, connecting = sides()
    welcome = welcomed(accepting, msgspec.structs.replace(connecting.hello, role="meta"))
    with pytest.raises(NotAuthentic):
        connecting.take(welcome)


def test_every_part_of_a_welcome_is_proved() -> None:
    for change in ({"volume": "other"}, {"role": "meta"}, {"nonce": bytes(32)}, {"proof": bytes(32)}, {"proof": b""}):
        accepting, connecting = sides()
        welcome = welcomed(accepting, connecting.hello)
        with pytest.raises(NotAuthentic):
            connecting.take(msgspec.structs.replace(welcome, **change))


def test_nothing_is_taken_out_of_turn_or_range() -> None:
    accepting, connecting = sides()
    hello = connecting.hello
    for message in (Proof(bytes(32)), Done(), Ping(), Failure("x", "y", 1)):
        with pytest.raises(BadFrame):
            accepting.take(message)
    with pytest.raises(BadFrame):
        connecting.take(Done())
    for change in ({"versions": ()}, {"versions": (2,)}, {"nonce": b"x"}, {"role": "r" * 65}, {"volume": "v" * 65}):
        with pytest.raises(BadFrame):
            accepting.take(msgspec.structs.replace(hello, **change))
    welcome = welcomed(accepting, hello)
    with pytest.raises(BadFrame):
        accepting.take(hello)
    with pytest.raises(BadFrame):
        connecting.take(msgspec.structs.replace(welcome, version=2))


def test_the_secret_is_not_shown() -> None:
    assert "secret" not in repr(Credentials(b"secret", "aa"))


async def test_a_stranger_gets_one_try_and_only_the_handshake() -> None:
    async with serving("127.0.0.1:0") as server:
        for message in (Ping(), Proof(bytes(32))):
            async with raw(server.address, is_stranger=True) as side:
                side.send(Kind.REQUEST, 1, message)
                # Perhaps a failure that says why; then the end.
                with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                    while True:
                        assert isinstance((await side.receive())[1], Failure)
        assert not server.peers


async def test_silent_strangers_are_few_and_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "STRANGERS_MAX", 5)
    monkeypatch.setattr(peer_module, "HANDSHAKE_S", 0.2)
    async with serving("127.0.0.1:0") as server:
        silent = [await RawSide.open(server.address) for _ in range(9)]
        async with asyncio.timeout(5):
            await asyncio.gather(*(side.reader.read() for side in silent))
        await until(lambda: not server._strangers)
        async with connected(server.address) as peer:
            assert await peer.call(Ping(), deadline_s=5) == (Done(), None)
        for side in silent:
            await side.close()


async def test_a_server_stops_in_the_middle_of_handshakes() -> None:
    async with serving("127.0.0.1:0") as server:
        silent = [await RawSide.open(server.address) for _ in range(3)]
    for side in silent:
        assert await side.reader.read() == b""
        await side.close()
