"""The clocks that decide about data servers: events in, decisions out, no time but what the test says."""

import msgspec
import pytest

from mendfs.meta.members import DISK_STUCK_S, DOWN_AFTER_S, TICK_S, Decision, Member, Members
from mendfs.meta.status import room_for_copies
from mendfs.model import Generation, Incarnation, ServerNumber, StoreHealth
from mendfs.wire.messages import data as messages

HEALTH = StoreHealth(
    blocks=0,
    bytes_used=0,
    bytes_free=0,
    reads=0,
    writes=0,
    mended=0,
    corrupt_found=0,
    oldest_disk_operation_s=0.0,
)
ZERO = ServerNumber(0)


def registration() -> messages.RegisterServer:
    return messages.RegisterServer("id", "a:1", "z", Incarnation(1), 1, 0, None, Generation(0), HEALTH)


def beat(**health: float) -> messages.Heartbeat:
    return messages.Heartbeat(Incarnation(1), msgspec.structs.replace(HEALTH, **health))


def members_with_one(at_s: float = 0.0) -> Members:
    members = Members([Member(ZERO, "id", "a:1", "z")])
    assert members.registered(ZERO, registration(), at_s) == Decision(publish=True, raise_epoch=True)
    return members


def tick_to(members: Members, begin_s: float, end_s: float) -> list[tuple[float, Decision]]:
    decisions = []
    at_s = begin_s
    while at_s <= end_s:
        decision = members.tick(at_s)
        if decision != Decision():
            decisions.append((at_s, decision))
        at_s += TICK_S
    return decisions


def test_silence_makes_a_server_down_and_raises_the_epoch_once() -> None:
    members = members_with_one()
    ((at_s, decision),) = tick_to(members, 0.0, 10.0)
    assert DOWN_AFTER_S < at_s <= DOWN_AFTER_S + 2 * TICK_S
    assert decision == Decision(publish=True, raise_epoch=True)
    assert [member.state() for member in members] == ["down"]


def test_a_lost_connection_is_suspect_at_once_and_a_return_is_up() -> None:
    members = members_with_one()
    assert members.disconnected(ZERO) == Decision(publish=True)
    assert [member.state() for member in members] == ["suspect"]
    assert members.registered(ZERO, registration(), 1.0) == Decision(publish=True, raise_epoch=False)
    assert [member.state() for member in members] == ["up"]


def test_our_own_pause_does_not_count_against_servers() -> None:
    members = members_with_one()
    members.tick(0.0)
    assert members.tick(60.0) == Decision()
    assert tick_to(members, 60.0 + TICK_S, 62.9) == []
    assert len(tick_to(members, 63.0, 64.0)) == 1


def test_a_stuck_disk_is_down_at_once_and_stays_so_until_it_answers() -> None:
    members = members_with_one()
    stuck = beat(oldest_disk_operation_s=DISK_STUCK_S + 0.1)
    assert members.heard(ZERO, beat(oldest_disk_operation_s=DISK_STUCK_S), 1.0) == Decision()
    assert members.heard(ZERO, stuck, 1.5) == Decision(publish=True, raise_epoch=True)
    assert [member.state() for member in members] == ["down"]
    assert members.heard(ZERO, stuck, 2.0) == Decision()
    assert members.heard(ZERO, beat(), 2.5) == Decision(publish=True, raise_epoch=True)
    assert [member.state() for member in members] == ["up"]


def test_a_number_is_wanted_or_the_lowest_free_one() -> None:
    members = members_with_one()
    assert members.free_number(ServerNumber(3)) == 3
    assert members.free_number(ZERO) == 1
    assert members.free_number(None) == 1


@pytest.mark.parametrize(
    ("free", "replicas", "room"),
    [
        ([100, 100, 100], 3, 100),
        ([100, 100, 100, 100], 2, 200),
        ([1000, 10, 1000], 3, 10),
        ([1000, 10, 10], 2, 20),
        ([1000, 500, 10, 10], 3, 20),
        ([70, 50], 3, 50),
        ([70], 3, 70),
        ([], 3, 0),
        ([0, 0, 5], 2, 0),
    ],
)
def test_room_is_what_fits_with_all_its_copies_on_different_servers(free: list[int], replicas: int, room: int) -> None:
    assert room_for_copies(free, replicas) == room
