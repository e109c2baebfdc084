"""Where log lines go: to standard error, one line an event, in a server's log file or on a terminal.

A line that cannot be written (the disk of the logs is full) is dropped: an OSError from a log call would end
whatever was being done, and there is nowhere left to say so.
"""

import logging
import os
import sys
from typing import TextIO, cast

import structlog

NOTHING = logging.CRITICAL
"""As good as: nothing of ours is logged at this level."""


class LogFile:
    """A text file as far as logging uses one, over a descriptor, without a buffer that could keep what was refused."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, text: str) -> int:
        """Write it, or drop it."""
        try:
            os.write(self._descriptor, text.encode(errors="replace"))
        except OSError:
            return 0
        return len(text)

    def flush(self) -> None:
        """Nothing is kept back."""


def say(text: str) -> None:
    """One line to standard error, outside the log."""
    _standard_error().write(f"{text}\n")


def _standard_error() -> LogFile:
    # Without one (2>&-) its number may be anybody's.
    return LogFile(-1 if sys.stderr is None else sys.stderr.fileno())


def configure(level: int = logging.INFO) -> None:
    """Set up logging for this process; events below `level` cost next to nothing."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer(
                colors=False, pad_event_to=0, exception_formatter=structlog.dev.plain_traceback
            ),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _standard_error())),
        cache_logger_on_first_use=True,
    )
