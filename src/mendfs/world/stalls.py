"""Says so when an event loop stands still: a thread that watches it, for the loop itself cannot tell.

A database that writes its log within the loop stands still when its disk hangs. Nobody is answered then, and without
this the log would not say why.
"""

import asyncio
import sys
import threading
import time
from datetime import UTC, datetime
from types import TracebackType

STALLED_S = 3.0
"""A loop that has not turned for so long hangs; a busy machine delays it by tenths of a second."""
_TURN_S = 0.5


class StallWatch:
    """Within `with`, prints `text` to standard error when the running event loop stands still, and when it goes on."""

    def __init__(self, text: str, *, stalled_s: float = STALLED_S) -> None:
        self._text = text
        self._stalled_s = stalled_s
        self._turned_s = 0.0
        self._ended = threading.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(target=self._watch, name="stalls", daemon=True)

    def __enter__(self) -> "StallWatch":
        self._turn()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._timer is not None:
            self._timer.cancel()

    def _turn(self) -> None:
        self._turned_s = time.monotonic()
        self._timer = asyncio.get_running_loop().call_later(_TURN_S, self._turn)

    def _watch(self) -> None:
        stood_since_s: float | None = None
        while not self._ended.wait(_TURN_S):
            turned_s = self._turned_s
            if stood_since_s is None and time.monotonic() - turned_s > self._stalled_s:
                stood_since_s = turned_s
                self._say(self._text)
            elif stood_since_s is not None and turned_s > stood_since_s:
                self._say(f"it answers again, after {turned_s - stood_since_s:.1f} s")
                stood_since_s = None

    @staticmethod
    def _say(text: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds").removesuffix("+00:00")
        print(f"{now}Z [error    ] {text}", file=sys.stderr, flush=True)
