"""What the shell says of servers that come and go."""

import pytest

from mendfs.cli.shell_notices import notices
from mendfs.client.watch import Reach
from mendfs.model import ServerNumber

META = "10.0.0.1:7000"


def reach(*up: bool, meta: bool = True) -> Reach:
    servers = {ServerNumber(number): is_up for number, is_up in enumerate(up)}
    return Reach(meta, servers, {number: f"10.0.0.2:{7001 + number}" for number in servers})


@pytest.mark.seed("B3")
def test_each_server_that_is_lost_or_back_is_named_once() -> None:
    whole, without = reach(True, True, True), reach(True, False, True)
    assert notices(None, whole, META) == []
    assert notices(whole, whole, META) == []
    assert notices(whole, without, META) == ["Connection lost to server 1 at 10.0.0.2:7002"]
    assert notices(without, without, META) == []
    assert notices(without, whole, META) == ["Server 1 at 10.0.0.2:7002 is back"]
    assert notices(without, reach(False, True, True), META) == [
        "Connection lost to server 0 at 10.0.0.2:7001",
        "Server 1 at 10.0.0.2:7002 is back",
    ]


def test_what_is_not_there_at_first_is_said_too() -> None:
    assert notices(None, reach(False, True), META) == ["No connection to server 0 at 10.0.0.2:7001"]
    assert notices(reach(False, True), reach(True, True), META) == ["Server 0 at 10.0.0.2:7001 is back"]


def test_a_server_that_was_added_is_no_news_until_it_is_lost() -> None:
    assert notices(reach(True), reach(True, True), META) == []
    assert notices(reach(True), reach(True, False), META) == []


def test_the_meta_server_is_named_by_its_address() -> None:
    assert notices(reach(True), reach(True, meta=False), META) == [
        f"Connection lost to the meta server at {META}: commands wait until it is back"
    ]
    assert notices(reach(True, meta=False), reach(True), META) == [f"The meta server at {META} is back"]
    assert notices(None, reach(meta=False), META) != []
