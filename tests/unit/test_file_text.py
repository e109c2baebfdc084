"""Names for people, terminals and programs; one line for each error."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mendfs.cli import complaints, file_text
from mendfs.cli.complaints import escaped, explain
from mendfs.errors import MendfsError, OperationError, UsageError
from mendfs.model import Attributes, CommitSequence, Inode


def attributes(mode: int = 0o100644, nlink: int = 1) -> Attributes:
    return Attributes(Inode(7), 0, mode, 12345, 54321, nlink, 5, 5, 0, 1, 2, 3, CommitSequence(1))


@given(st.binary(max_size=40))
def test_nothing_that_moves_a_cursor_reaches_a_terminal(name: bytes) -> None:
    text = escaped(os.fsdecode(name))
    assert text.isprintable()
    text.encode()  # and it is UTF-8


def test_escapes_say_which_bytes() -> None:
    assert escaped("ünïcode name") == "ünïcode name"
    assert escaped(os.fsdecode(b"a\nb\x1b[31m\xff")) == "a\\x0ab\\x1b[31m\\xff"
    assert escaped("\u2028\U000e0001") == "\\u2028\\U000e0001"


def test_json_gives_names_without_loss() -> None:
    for name in ("plain", "new\nline", "\x1b[31m", "ünïcode", "\u200b"):
        assert json.loads(json.dumps(file_text.json_name(name.encode()))) == {"name": name}
    assert file_text.json_name(b"\xff!") == {"name": "\\xff!", "name_hex": "ff21"}
    document = file_text.document(b"link", attributes(0o120777), b"../x")
    assert (document["type"], document["target"], document["mode"]) == ("symlink", "../x", "lrwxrwxrwx")


def test_a_long_listing_has_columns_and_says_where_links_lead() -> None:
    entries = [(b"a", attributes()), (b"l", attributes(0o120777, nlink=10))]
    text = file_text.long_listing(entries, {Inode(7): b"there"}, lambda name: name.decode())
    first, second = text.splitlines()
    assert first.startswith("-rw-r--r--  1 12345 54321 5 ") and second.endswith(" l -> there")
    assert file_text.long_listing([], {}, os.fsdecode) == ""


@pytest.mark.parametrize(
    ("error", "text", "exit_code"),
    [
        (UsageError("say it so"), "say it so", 2),
        (OperationError(2, "/a"), "/a: No such file or directory", 1),
        (MendfsError(""), "error", 1),
        (FileNotFoundError(2, "No such file or directory", "x"), "x: No such file or directory", 1),
        (OSError(5, "Input/output error"), "Input/output error", 1),
        (KeyError("a\nb"), "internal error, KeyError: 'a\\nb' (MENDFS_DEBUG=1 shows where)", 1),
    ],
)
def test_every_error_is_one_line_and_an_exit_code(error: Exception, text: str, exit_code: int) -> None:
    assert explain(error) == (text, exit_code)


def test_a_complaint_is_one_line_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    complaints.complain("/two\nlines\x1b[2J: No such file")
    assert capsys.readouterr().err == "mendfs: /two\\x0alines\\x1b[2J: No such file\n"
