"""What stands before the cursor of the shell, and how a word is completed. Pure; quoting is the Unix shell's."""

import shlex
from collections.abc import Collection, Sequence

import msgspec

PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%+=:,./-_")
"""What stands for itself in a word; anything else that is ASCII gets a backslash."""


class Typed(msgspec.Struct, frozen=True):
    """A line up to the cursor: whole words, and the one being typed."""

    before: tuple[str, ...]
    word: str
    """What the last word means so far, quotes and backslashes taken away; empty after a space."""
    raw_length: int
    """Characters of the line that the last word takes, quotes and all: what a completion replaces."""


def split(line: str) -> list[str]:
    """A line's words. Empty for an empty line and for a comment. Raises ValueError for a quote without its end."""
    if line.lstrip().startswith("#"):
        return []
    return shlex.split(line)


def typed(line: str) -> Typed:
    """Take a line apart that may end in the middle of a word or of a quote."""
    words: list[str] = []
    word = ""
    begin: int | None = None
    quote = ""
    at = 0
    while at < len(line):
        char = line[at]
        if not quote and char.isspace():
            if begin is not None:
                words.append(word)
            word, begin = "", None
            at += 1
            continue
        if begin is None:
            begin = at
        at += 1
        if char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        elif char == "\\" and quote != "'" and at < len(line):
            # Inside double quotes a backslash stands for itself, unless it is before a quote or a backslash.
            following = line[at]
            word += following if not quote or following in '"\\' else char + following
            at += 1
        elif char != "\\" or quote == "'":
            word += char
    return Typed(tuple(words), word, 0 if begin is None else len(line) - begin)


def quoted(word: str) -> str:
    """A word as it is typed, with backslashes: it can be added to, as quotes around it could not."""
    return "".join(char if char in PLAIN or ord(char) > 0x7F else f"\\{char}" for char in word)


def can_be_typed(name: str) -> bool:
    """Whether a name can be written in a line: no newlines, nothing that moves the cursor, and UTF-8."""
    return name.isprintable()


def arguments_before(words: Sequence[str], options_with_value: Collection[str]) -> tuple[int, str]:
    """(arguments that are no options, the option whose value comes next, or "") after a command's name."""
    count = 0
    awaiting = ""
    only_arguments = False
    for word in words:
        if awaiting:
            awaiting = ""
        elif only_arguments or not word.startswith("-") or word == "-":
            count += 1
        elif word == "--":
            only_arguments = True
        elif word in options_with_value:
            awaiting = word
    return count, awaiting
