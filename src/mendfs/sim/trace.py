"""What happened in a run, line by line: a digest always, the lines if somebody wants them."""

from collections.abc import Callable
from typing import Any

import structlog
from xxhash import xxh3_128


class Trace:
    """Two runs of one seed must have the same digest: else something outside the seed has decided."""

    def __init__(self, now_s: Callable[[], float], *, keep: bool = False) -> None:
        self.lines: list[str] = []
        self.count = 0
        self._now_s = now_s
        self._digest = xxh3_128()
        self._is_kept = keep

    def say(self, text: str) -> None:
        """One more line."""
        line = f"{self._now_s():.6f} {text}"
        self.count += 1
        self._digest.update(line.encode())
        if self._is_kept:
            self.lines.append(line)

    def digest(self) -> str:
        """Of all lines so far."""
        return self._digest.hexdigest()

    def log(self, logger: Any, name: str, event: structlog.typing.EventDict) -> str:
        """A structlog processor: what the servers and clients log is part of the trace."""
        error = event.pop("exc_info", None)
        text = str(event.pop("event", ""))
        facts = " ".join(f"{key}={value}" for key, value in event.items())
        self.say(f"{name}: {text} {facts}{f' {error!r}' if error not in (None, True) else ''}")
        raise structlog.DropEvent
