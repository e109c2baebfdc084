"""Asking a server something as a tool: no session, nothing held."""

from typing import TypeVar

from mendfs.errors import MendfsError
from mendfs.wire.messages import Message
from mendfs.wire.messages.session import Done
from mendfs.wire.peer import Credentials, Peer, Received, connect
from mendfs.world import World

ANSWER_TIMEOUT_S = 20.0
"""For a question of a person at a terminal: a busy server may take its time, a hung one must not take ours."""

Answer = TypeVar("Answer")


async def _answer_nothing(peer: Peer, message: Message, received: Received | None) -> Done:
    return Done()  # a server may ping us


async def connect_as_tool(world: World, address: str, secret: bytes, volume: str = "") -> Peer:
    """A connection to a server. Raises Unreachable or NotAuthentic, naming the address."""
    return await connect(world.network, address, Credentials(secret, volume), role="tool", handler=_answer_nothing)


async def ask(peer: Peer, message: Message, answer: type[Answer], *, deadline_s: float = ANSWER_TIMEOUT_S) -> Answer:
    """One question; raises the error it is answered with."""
    found, received = await peer.call(message, deadline_s=deadline_s)
    if received is not None:
        received.release()
    if not isinstance(found, answer):
        raise MendfsError(f"{peer.remote_address} answered with {type(found).__name__}: are the versions the same?")
    return found
