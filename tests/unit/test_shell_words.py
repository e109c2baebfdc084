"""Lines of the shell: quoting, and what stands before the cursor."""

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mendfs.cli.shell_complete import before
from mendfs.cli.shell_words import Typed, arguments_before, can_be_typed, quoted, split, typed

WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"], include_characters=" \"'\\$#"), min_size=1
)


@given(st.lists(WORDS))
def test_what_completion_writes_is_read_back_as_it_was(words: list[str]) -> None:
    line = " ".join(map(quoted, words))
    if not line.startswith("#"):
        assert split(line) == words
    assert typed(line + " ") == Typed(tuple(words), "", 0)


@given(st.lists(WORDS), st.sampled_from([shlex.quote, quoted]))
def test_a_line_is_taken_apart_as_the_shell_will_split_it(words: list[str], quote: object) -> None:
    assert callable(quote)
    line = " ".join(quote(word) for word in words)
    found = typed(line)
    assert [*found.before, *([found.word] if found.raw_length else [])] == words


@pytest.mark.parametrize(
    ("line", "before_it", "word", "raw_length"),
    [
        ("", (), "", 0),
        ("l", (), "l", 1),
        ("ls ", ("ls",), "", 0),
        ("ls /a\\ b", ("ls",), "/a b", 5),
        ("ls '/a b", ("ls",), "/a b", 5),
        ('ls "/a b', ("ls",), "/a b", 5),
        ("ls '/a'\"b", ("ls",), "/ab", 6),
        ("ls /a\\", ("ls",), "/a", 3),
        ("put 'x y' /t", ("put", "x y"), "/t", 2),
        ("  cat   a  b", ("cat", "a"), "b", 1),
        ("ls ''", ("ls",), "", 2),
    ],
)
def test_the_word_before_the_cursor(line: str, before_it: tuple[str, ...], word: str, raw_length: int) -> None:
    assert typed(line) == Typed(before_it, word, raw_length)


def test_empty_lines_and_comments_are_no_commands() -> None:
    assert split("") == split("   ") == split("# rm -r /") == split("  # x 'y") == []
    assert split("cat a#b '#c'") == ["cat", "a#b", "#c"]
    with pytest.raises(ValueError, match="quotation"):
        split("cat 'a")


def test_arguments_are_told_from_options_and_their_values() -> None:
    assert arguments_before([], {"-L"}) == (0, "")
    assert arguments_before(["-l", "/a"], {"-L"}) == (1, "")
    assert arguments_before(["-L", "2", "/a"], {"-L"}) == (1, "")
    assert arguments_before(["/a", "-L"], {"-L"}) == (1, "-L")
    assert arguments_before(["--", "-L", "/a"], {"-L"}) == (2, "")
    assert arguments_before(["-"], set()) == (1, "")


def test_names_that_cannot_be_typed_are_not_offered() -> None:
    assert can_be_typed("ünï code")
    assert not any(map(can_be_typed, ("a\nb", "a\x1b[31mb", "a\udcffb", "a\x7f")))


@given(st.binary(min_size=1, max_size=20), st.lists(st.binary(min_size=1, max_size=20), max_size=30))
def test_a_listing_for_completion_begins_right_before_the_first_match(prefix: bytes, names: list[bytes]) -> None:
    begin = before(prefix)
    assert all(name > begin for name in names if name.startswith(prefix))
    skipped = [name for name in names if name <= begin]
    assert not any(name.startswith(prefix) for name in skipped)
    # Nothing else comes before the first match, so 200 names of a directory of a million are enough.
    between = [name for name in sorted(names) if begin < name < prefix]
    assert all(name.startswith(begin.rstrip(b"\xff")) for name in between) or prefix[-1] == 0
