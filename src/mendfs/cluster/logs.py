"""Where log lines go: to standard error, one line an event, in a server's log file or on a terminal."""

import logging
import sys

import structlog

NOTHING = logging.CRITICAL
"""As good as: nothing of ours is logged at this level."""


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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
