"""One timer for many deadlines. A timer a call would cost a microsecond to set and another to cancel, at every call.

The timer is set for the earliest deadline it was told of. Most are met long before, so it fires rarely, finds out which
are really due, and is set for the earliest of the rest.
"""

import asyncio
from collections.abc import Callable

NEVER = float("inf")
SLACK_S = 0.001
"""uvloop's clock ticks in milliseconds: a deadline this close is due, or the timer would fire again at once."""


class DeadlineTimer:
    """Calls `sweep(now)` when a deadline may be due; that deals with those and returns the earliest of the rest."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sweep: Callable[[float], float]) -> None:
        self._loop = loop
        self._sweep = sweep
        self._handle: asyncio.TimerHandle | None = None
        self.at = NEVER
        """When it fires; a caller in a hurry compares before it calls `include`."""

    def include(self, deadline: float) -> None:
        """Fire no later than at `deadline`, in the event loop's time."""
        if deadline < self.at:
            self.stop()
            self.at = deadline
            self._handle = self._loop.call_at(deadline, self._fire)

    def stop(self) -> None:
        """Forget all deadlines."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self.at = NEVER

    def _fire(self) -> None:
        self._handle = None
        self.at = NEVER
        self.include_if_any(self._sweep(self._loop.time() + SLACK_S))

    def include_if_any(self, deadline: float) -> None:
        """As `include`, unless the deadline is NEVER."""
        if deadline != NEVER:
            self.include(deadline)
