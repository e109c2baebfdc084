"""Who is at the other end: protocol version, volume, and proof that both know the cluster's secret. Sans-I/O.

Challenge and response: each side proves that it can compute an HMAC over both sides' fresh nonces. The listening side
proves first, so that a caller with a wrong secret learns so itself and can name the address. The secret never travels.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field

from mendfs.errors import BadFrame, NotAuthentic
from mendfs.wire.frame import VERSION
from mendfs.wire.messages import Message
from mendfs.wire.messages.session import Done, Hello, Proof, Welcome

NONCE_BYTES = 32
TEXT_LENGTH_MAX = 64
"""Of a role and of a volume's id: they are logged and compared."""


@dataclass
class Credentials:
    """What a side knows of its cluster. Read at each handshake, so a server may learn its volume later."""

    secret: bytes = field(repr=False)
    volume: str = ""
    """The volume's id; empty: not known yet, any will do."""


def _prove(secret: bytes, label: str, hello: Hello, *, version: int, role: str, volume: str, nonce: bytes) -> bytes:
    # Every part has a fixed length or its length before it, so no two different handshakes give the same text. Both
    # roles are in it: who may order deletions is decided by the role.
    parts = [label.encode().ljust(8, b"\0"), bytes((version,))]
    for text in (volume, hello.role, role):
        raw = text.encode()
        parts += [bytes((len(raw),)), raw]
    return hmac.new(secret, b"".join((*parts, hello.nonce, nonce)), hashlib.sha256).digest()


def _check_text(role: str, volume: str, nonce: bytes) -> None:
    if len(nonce) != NONCE_BYTES or len(role.encode()) > TEXT_LENGTH_MAX or len(volume.encode()) > TEXT_LENGTH_MAX:
        raise BadFrame("a handshake with a field out of range")


class Connecting:
    """The handshake of the side that connects: `hello`, then `take` each answer until it returns None."""

    def __init__(self, credentials: Credentials, *, role: str, address: str) -> None:
        self._credentials = credentials
        self._address = address
        self.hello = Hello(
            versions=(VERSION,), role=role, volume=credentials.volume, nonce=secrets.token_bytes(NONCE_BYTES)
        )
        self.remote_role = ""
        self.remote_volume = ""

    def take(self, message: Message) -> Proof | None:
        """Check `Welcome` and answer it, or see that it is `Done`. Raises NotAuthentic, BadFrame."""
        match message:
            case Welcome() if not self.remote_role:
                return self._take_welcome(message)
            case Done() if self.remote_role:
                return None
            case _:
                raise BadFrame(f"{type(message).__name__} is out of place in a handshake")

    def _take_welcome(self, welcome: Welcome) -> Proof:
        _check_text(welcome.role, welcome.volume, welcome.nonce)
        credentials = self._credentials
        if welcome.version not in self.hello.versions or not welcome.role:
            raise BadFrame(f"a welcome to version {welcome.version}, which was not offered")

        def prove(label: str) -> bytes:
            return _prove(
                credentials.secret,
                label,
                self.hello,
                version=welcome.version,
                role=welcome.role,
                volume=welcome.volume,
                nonce=welcome.nonce,
            )

        if not hmac.compare_digest(prove("server"), welcome.proof):
            raise NotAuthentic(
                f"{self._address} does not accept the secret of this cluster: copy the file from where the cluster "
                "was made, or name the right address"
            )
        if credentials.volume and welcome.volume != credentials.volume:
            raise NotAuthentic(f"{self._address} serves volume {welcome.volume}, not {credentials.volume}")
        self.remote_role, self.remote_volume = welcome.role, welcome.volume
        return Proof(prove("client"))


class Accepting:
    """The handshake of the side that listens: `take` each message; `is_done` after the one that `Done` answers."""

    def __init__(self, credentials: Credentials, *, role: str) -> None:
        self._credentials = credentials
        self._role = role
        self._hello: Hello | None = None
        self._welcome: Welcome | None = None
        self.is_done = False
        self.remote_role = ""
        self.remote_volume = ""

    def take(self, message: Message) -> Welcome | Done:
        """The answer to `Hello` or `Proof`. Raises NotAuthentic, BadFrame."""
        match message:
            case Hello() if self._hello is None:
                return self._take_hello(message)
            case Proof() if self._hello is not None and self._welcome is not None:
                return self._take_proof(message, self._hello, self._welcome)
            case _:
                raise BadFrame(f"{type(message).__name__} is out of place in a handshake")

    def _take_hello(self, hello: Hello) -> Welcome:
        _check_text(hello.role, hello.volume, hello.nonce)
        if VERSION not in hello.versions:
            raise BadFrame(f"this side speaks version {VERSION} only")
        self._hello = hello
        volume = self._credentials.volume or hello.volume
        nonce = secrets.token_bytes(NONCE_BYTES)
        proof = _prove(
            self._credentials.secret,
            "server",
            hello,
            version=VERSION,
            role=self._role,
            volume=volume,
            nonce=nonce,
        )
        self._welcome = Welcome(version=VERSION, role=self._role, volume=volume, nonce=nonce, proof=proof)
        return self._welcome

    def _take_proof(self, proof: Proof, hello: Hello, welcome: Welcome) -> Done:
        expected = _prove(
            self._credentials.secret,
            "client",
            hello,
            version=welcome.version,
            role=welcome.role,
            volume=welcome.volume,
            nonce=welcome.nonce,
        )
        if self.is_done or not hmac.compare_digest(expected, proof.proof):
            raise NotAuthentic("the caller does not know the secret of this cluster")
        if hello.volume and hello.volume != welcome.volume:
            raise NotAuthentic(f"this is a server of volume {welcome.volume}, not of {hello.volume}")
        self.remote_role, self.remote_volume = hello.role, hello.volume
        self.is_done = True
        return Done()
