"""Sizes are read as people write them and written so that they are read back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mendfs.cluster.sizes import exact_size, parse_size, short_size
from mendfs.errors import UsageError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8", 8),
        ("0", 0),
        ("64KiB", 65536),
        ("4MiB", 4 << 20),
        ("4M", 4 << 20),
        ("4mb", 4 << 20),
        ("1.5GiB", 3 << 29),
        (" 2 TiB ", 2 << 40),
        ("100B", 100),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1e3", "4XiB", "4MiBs", "0x10", "1.3", "٤"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="4MiB" if text != "1.3" else "whole number"):
        parse_size(text)


@given(st.integers(min_value=0, max_value=1 << 64))
def test_an_exact_size_is_read_back(size: int) -> None:
    assert parse_size(exact_size(size)) == size


@given(st.integers(min_value=0, max_value=1 << 64))
def test_a_short_size_is_short(size: int) -> None:
    assert len(short_size(size)) <= 8
