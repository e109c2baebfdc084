"""When a process that ended unexpectedly is started again. Pure: times come in as arguments."""

FIRST_DELAY_S = 0.1
DELAY_MAX_S = 5.0
"""A server that cannot start is tried about as often as a person looks."""
READY_DELAY_MAX_S = 1.0
"""One that served before it ended is missed: it is back soon, however often that happens."""
STEADY_S = 3.0
"""A process that ran this long was well: its next end counts as the first one."""


class Backoff:
    """The delays of one process: none after the first end, then doubled while it keeps ending soon."""

    def __init__(self) -> None:
        self._ends = 0

    def delay_s(self, ran_s: float, *, was_ready: bool) -> float:
        """How long to wait before the next start of a process that ran for `ran_s`."""
        self._ends = 1 if ran_s >= STEADY_S else self._ends + 1
        if self._ends == 1:
            return 0.0
        limit_s = READY_DELAY_MAX_S if was_ready else DELAY_MAX_S
        return float(min(limit_s, FIRST_DELAY_S * 2 ** min(self._ends - 2, 16)))
