"""The bar that `cli.progress` shows, drawn by rich. Lines that are printed meanwhile appear above it."""

import sys

from rich import progress
from rich.console import Console
from rich.text import Text

from mendfs.cluster.sizes import short_size


class _Bytes(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        total = "?" if task.total is None else short_size(task.total)
        return Text(f"{short_size(task.completed)} of {total}")


class _Rate(progress.ProgressColumn):
    def render(self, task: progress.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{short_size(speed)}/s")


class Bar:
    """A bar, shown until `stop`."""

    def __init__(self, what: str) -> None:
        self._progress = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.TaskProgressColumn(),
            _Bytes(),
            _Rate(),
            progress.TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._task = self._progress.add_task(what, total=None)
        self._progress.start()

    def show(self, done: int, total: int) -> None:
        """`done` bytes of `total` are copied."""
        self._progress.update(self._task, completed=done, total=total)

    def stop(self) -> None:
        """Take it away."""
        self._progress.stop()
