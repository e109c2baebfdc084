"""How far a long transfer has come: bytes, rate and time left, on standard error, and only if that is a terminal.

Nothing is shown in the first second: most transfers are over by then.
"""

import asyncio
import sys
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from mendfs.cli.progress_bar import Bar

SHOWN_AFTER_S = 1.0


class Progress:
    """Bytes done of bytes expected. Use it as a context manager: leaving it takes the bar away."""

    def __init__(self, what: str, *, wanted: bool = True) -> None:
        self._what = what
        self.is_shown = wanted and sys.stderr.isatty()
        self._expected = 0
        self._done = 0
        self._began_s = asyncio.get_running_loop().time()
        self._bar: Bar | None = None

    def expect(self, count: int) -> None:
        """`count` bytes more are to be copied."""
        self._expected += count

    def did(self, count: int) -> None:
        """`count` bytes more are copied."""
        self._done += count
        if not self.is_shown:
            return
        if self._bar is None:
            if asyncio.get_running_loop().time() - self._began_s < SHOWN_AFTER_S:
                return
            # Imported here: it takes 50 ms, and most commands never show a bar.
            from mendfs.cli.progress_bar import Bar

            self._bar = Bar(self._what)
        self._bar.show(self._done, max(self._expected, self._done))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
