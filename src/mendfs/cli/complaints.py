"""Errors as people see them: one line on standard error, and an exit code (0 done, 1 failed, 2 wrong usage)."""

import os
import sys
import traceback

from mendfs.cli.options import DEBUG
from mendfs.errors import MendfsError

FAILED = 1
WRONG_USAGE = 2


def escaped(text: str) -> str:
    """`text` for a terminal: what is no UTF-8, or would move the cursor or change colours, is escaped."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"  # a byte that is no UTF-8, as os.fsdecode keeps it
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def complain(text: str) -> None:
    """One line on standard error."""
    print(f"mendfs: {escaped(text)}", file=sys.stderr, flush=True)


def explain(error: Exception) -> tuple[str, int]:
    """The line that says what went wrong, and the exit code. What we did not foresee is one line too."""
    if isinstance(error, MendfsError):
        return str(error) or error.code, error.exit_code
    if isinstance(error, OSError):
        return (f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)), FAILED
    # Wrong usage, in the words of the option parser; it has no public base class to be caught by.
    message = getattr(error, "format_message", None)
    if message is not None:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else "mendfs"
        return f'{_one_line(message()).rstrip(".")}: see "{path} --help"', WRONG_USAGE
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    return f"internal error, {type(error).__name__}: {_one_line(error)} ({DEBUG}=1 shows where)", FAILED


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
