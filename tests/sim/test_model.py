"""The model of a file: what may stand where."""

import pytest

from mendfs.sim.model import COMPARED_BYTES, Content, Event


@pytest.mark.parametrize(
    "place", [0, COMPARED_BYTES - 1, COMPARED_BYTES, 3 * COMPARED_BYTES + 7, 5 * COMPARED_BYTES - 1]
)
def test_a_byte_that_nothing_explains_is_named_wherever_it_is(place: int) -> None:
    content = Content()
    content.apply(Event("a", 0, b"x" * 5 * COMPARED_BYTES), is_certain=True)
    data = bytearray(b"x" * 5 * COMPARED_BYTES)
    assert content.problem_with(bytes(data), 0) is None
    data[place] = ord("y")
    assert content.problem_with(bytes(data), 0) == f"byte {place} is 121, not 120"
    assert content.problem_with(bytes(data[place:]), place) == f"byte {place} is 121, not 120"


def test_what_may_have_been_written_may_stand_there_in_part_and_nothing_else() -> None:
    content = Content()
    content.apply(Event("a", 0, b"x" * 4 * COMPARED_BYTES), is_certain=True)
    begin = 2 * COMPARED_BYTES - 2
    content.apply(Event("b", begin, b"abcd"), is_certain=False)
    data = bytearray(b"x" * 4 * COMPARED_BYTES)
    data[begin + 1 : begin + 3] = b"bc"
    assert content.problem_with(bytes(data), 0) is None
    data[begin + 2] = ord("d")
    assert content.problem_with(bytes(data), 0) == f"byte {begin + 2} is 100, not 120 or any of [99]"


def test_a_copy_changes_nothing_of_its_original() -> None:
    content = Content()
    other = content.copy()
    other.apply(Event("a", 3, b"x"), is_certain=True)
    other.apply(Event("a", 5, b"y"), is_certain=False)
    assert content.problem_with(bytes(10), 0) is None
    assert (content.size_min, content.size_max, content.alternatives) == (0, 0, [])
    assert (other.size_min, other.size_max) == (4, 6)
