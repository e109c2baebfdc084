"""Checksums of blocks: what was changed is found, page by page, and nothing else is accused."""

from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mendfs.blocks import (
    RULES,
    bad_pages,
    check_root,
    checksums_length,
    page_checksums,
    page_count,
    root_of,
)
from mendfs.errors import BlockCorrupt
from mendfs.model import ChecksumKind

KINDS: tuple[ChecksumKind, ...] = ("xxh3", "blake3")


class Block(NamedTuple):
    data: bytes
    page_size: int
    kind: ChecksumKind
    checksums: bytes
    root: bytes


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    data = draw(st.binary(min_size=1, max_size=300))
    page_size = draw(st.integers(1, 64))
    kind = draw(st.sampled_from(KINDS))
    checksums = page_checksums(data, page_size, kind)
    return Block(data, page_size, kind, checksums, root_of(checksums, length=len(data), page_size=page_size, kind=kind))


@given(blocks(), st.data())
def test_any_range_of_pages_of_an_unchanged_block_is_good(block: Block, data: st.DataObject) -> None:
    count = page_count(len(block.data), block.page_size)
    assert len(block.checksums) == checksums_length(len(block.data), block.page_size, block.kind)
    check_root(block.checksums, block.root, length=len(block.data), page_size=block.page_size, kind=block.kind)
    first = data.draw(st.integers(0, count - 1))
    end = data.draw(st.integers(first + 1, count))
    piece = block.data[first * block.page_size : end * block.page_size]
    assert bad_pages(piece, block.checksums, first_page=first, page_size=block.page_size, kind=block.kind) == []


@given(blocks(), st.data())
def test_exactly_the_changed_pages_are_bad(block: Block, data: st.DataObject) -> None:
    changed = bytearray(block.data)
    places = data.draw(st.sets(st.integers(0, len(changed) - 1), min_size=1, max_size=5))
    for place in places:
        changed[place] ^= data.draw(st.integers(1, 255))
    found = bad_pages(changed, block.checksums, first_page=0, page_size=block.page_size, kind=block.kind)
    assert found == sorted({place // block.page_size for place in places})


@given(blocks(), st.data())
def test_a_root_names_one_content_one_length_and_one_paging(block: Block, data: st.DataObject) -> None:
    def roots(content: bytes, page_size: int) -> bytes:
        checksums = page_checksums(content, page_size, block.kind)
        return root_of(checksums, length=len(content), page_size=page_size, kind=block.kind)

    other = data.draw(st.binary(min_size=1, max_size=300))
    other_size = data.draw(st.integers(1, 64))
    same = (other, other_size) == (block.data, block.page_size)
    assert (roots(other, other_size) == block.root) is same
    # Zeros at the end are the classic way to get the same hash for two lengths.
    assert roots(block.data + b"\0", block.page_size) != block.root


@given(blocks(), st.data())
def test_changed_or_missing_checksums_do_not_match_the_root(block: Block, data: st.DataObject) -> None:
    changed = bytearray(block.checksums)
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= data.draw(st.integers(1, 255))
    for wrong in (bytes(changed), block.checksums[:-1], block.checksums + b"\0", b""):
        with pytest.raises(BlockCorrupt):
            check_root(wrong, block.root, length=len(block.data), page_size=block.page_size, kind=block.kind)


@pytest.mark.parametrize("kind", KINDS)
def test_digests_have_the_lengths_that_formats_count_on(kind: ChecksumKind) -> None:
    rule = RULES[kind]
    assert (len(rule.page(b"x")), len(rule.root(b"x"))) == (rule.page_bytes, rule.root_bytes)


def test_known_values_never_change() -> None:
    """Stored blocks are read by every later version."""
    checksums = page_checksums(b"hello world, these are bytes", 16, "xxh3")
    root = root_of(checksums, length=28, page_size=16, kind="xxh3")
    assert checksums.hex() == "249624cea67d1d900ff3087e3f568340"
    assert root.hex() == "f2fd1e2546d90580dcbdd291997fe17f"
