"""Data servers and the clocks that decide about them (design section 5). Events in, decisions out; no I/O, no clock.

*suspect*: the connection ended; clients go round it at once. *down*: no heartbeat for DOWN_AFTER_S; the epoch rises and
writes no longer wait for it. Time counts only while the meta server itself ran: `tick` is called every TICK_S, and
after a pause of its own every server's clock begins anew.
"""

from collections.abc import Iterable, Iterator

import msgspec

from mendfs.model import Incarnation, ServerNumber, ServerState, ServerView, StoreHealth
from mendfs.wire.messages import data as messages

TICK_S = 0.25
DOWN_AFTER_S = 3.0
OWN_PAUSE_S = 1.0
"""A tick that comes this much late says that we were paused, not that the servers were silent."""
DISK_STUCK_S = 3.0
"""A disk operation unfinished for so long: the server counts as down though its loop still answers."""


class Member(msgspec.Struct):
    """What is known of one data server. `heard_s` is loop time."""

    number: ServerNumber
    id: str
    address: str
    zone: str
    draining: bool = False
    connected: bool = False
    down: bool = True
    heard_s: float = 0.0
    incarnation: Incarnation = Incarnation(0)
    pid: int = 0
    health: StoreHealth | None = None

    def state(self) -> ServerState:
        """The state as clients and `status` see it."""
        if self.down:
            return "down"
        if not self.connected:
            return "suspect"
        return "draining" if self.draining else "up"

    def view(self) -> ServerView:
        """What clients are told."""
        return ServerView(
            number=self.number,
            id=self.id,
            address=self.address,
            zone=self.zone,
            state=self.state(),
            incarnation=self.incarnation,
        )


class Decision(msgspec.Struct, frozen=True):
    """What the meta server has to do after an event."""

    publish: bool = False
    """Tell every session the servers' states."""
    raise_epoch: bool = False


NOTHING = Decision()


class Members:
    """All data servers of the volume, by number."""

    def __init__(self, members: Iterable[Member] = ()) -> None:
        self._members = {member.number: member for member in members}
        self._ticked_s: float | None = None

    def __iter__(self) -> Iterator[Member]:
        return iter([self._members[number] for number in sorted(self._members)])

    def __len__(self) -> int:
        return len(self._members)

    def get(self, number: ServerNumber) -> Member | None:
        """One server, or None."""
        return self._members.get(number)

    def find(self, server_id: str) -> Member | None:
        """The server with this id."""
        return next((member for member in self._members.values() if member.id == server_id), None)

    def free_number(self, wanted: ServerNumber | None) -> ServerNumber:
        """A number for a new server: the one it wants, if nobody has it."""
        if wanted is not None and wanted not in self._members:
            return wanted
        return ServerNumber(next(n for n in range(len(self._members) + 1) if ServerNumber(n) not in self._members))

    def add(self, member: Member) -> None:
        """A server that the metadata knows."""
        self._members[member.number] = member

    def views(self) -> tuple[ServerView, ...]:
        """What clients are told of all of them."""
        return tuple(self._members[number].view() for number in sorted(self._members))

    def registered(self, number: ServerNumber, request: messages.RegisterServer, at_s: float) -> Decision:
        """The server connected and told of itself."""
        member = self._members[number]
        came_back = member.down
        member.connected, member.down, member.heard_s = True, False, at_s
        member.address, member.zone, member.incarnation = request.address, request.zone, request.incarnation
        member.pid, member.health = request.pid, request.health
        return Decision(publish=True, raise_epoch=came_back)

    def heard(self, number: ServerNumber, beat: messages.Heartbeat, at_s: float) -> Decision:
        """A heartbeat. One that tells of a stuck disk is as good as none for as long: down at once."""
        member = self._members[number]
        renewed = member.incarnation != beat.incarnation
        member.health, member.incarnation = beat.health, beat.incarnation
        if beat.health.oldest_disk_operation_s > DISK_STUCK_S:
            fell, member.down = not member.down, True
            return Decision(publish=renewed or fell, raise_epoch=fell)
        came_back = member.down
        member.heard_s, member.down = at_s, False
        return Decision(publish=came_back or renewed, raise_epoch=came_back)

    def disconnected(self, number: ServerNumber) -> Decision:
        """Its connection ended: suspect at once."""
        member = self._members[number]
        member.connected = False
        return Decision(publish=not member.down)

    def tick(self, at_s: float) -> Decision:
        """Time has passed. Marks servers down that were silent for DOWN_AFTER_S of our own running time."""
        before, self._ticked_s = self._ticked_s, at_s
        if before is None or at_s - before > TICK_S + OWN_PAUSE_S:
            for member in self._members.values():
                member.heard_s = at_s
            return NOTHING
        gone = [m for m in self._members.values() if not m.down and at_s - m.heard_s > DOWN_AFTER_S]
        for member in gone:
            member.down = True
        return Decision(publish=bool(gone), raise_epoch=bool(gone))
