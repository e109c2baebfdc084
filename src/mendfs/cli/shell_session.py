"""One run of the shell: the volume open, somebody watching the servers, and commands until the end.

Everything is in one event loop: the volume goes on renewing its session while the prompt waits, and Ctrl-C ends the
command that runs, not the shell.
"""

import asyncio
import functools
import os
import signal
import sys
from collections.abc import Callable

from mendfs.cli.command import STDIN, STDOUT
from mendfs.cli.options import Located
from mendfs.cli.shell_commands import INTERRUPTED, Shell, run_script
from mendfs.cli.shell_notices import notices
from mendfs.cli.volumes import open_volume
from mendfs.client.volume import Volume
from mendfs.client.watch import Reach
from mendfs.world.streams import read_stream

LINES_BYTES = 64 << 10
FIRST_LOOK_S = 1.5
"""Before the first prompt: what is not there is said first."""


async def run_shell(located: Located, *, stop_at_failure: bool) -> int:
    """Run it; returns the exit code."""
    is_terminal = os.isatty(STDIN) and os.isatty(STDOUT)
    loop = asyncio.get_running_loop()
    async with open_volume(located) as volume:
        shell = Shell(located, volume)
        # At the prompt Ctrl-C is a key like others; a script that waits for its next line ends.
        idle = None if is_terminal else asyncio.current_task()
        loop.add_signal_handler(signal.SIGINT, _interrupted, shell, idle)
        try:
            if is_terminal:
                from mendfs.cli.shell_prompt import Prompt

                prompt = Prompt(shell)
                async with _Watcher(volume, located.meta, prompt.say):
                    await prompt.run()
                return 0
            async with _Watcher(volume, located.meta, _say):
                read = functools.partial(read_stream, STDIN, LINES_BYTES)
                return await run_script(shell, read, stop_at_failure=stop_at_failure)
        except asyncio.CancelledError:
            return INTERRUPTED
        finally:
            loop.remove_signal_handler(signal.SIGINT)


def _interrupted(shell: Shell, idle: "asyncio.Task[object] | None") -> None:
    if not shell.interrupt() and idle is not None:
        idle.cancel()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class _Watcher:
    """Says when a server is lost or back, as long as it is entered."""

    def __init__(self, volume: Volume, meta: str, say: Callable[[str], None]) -> None:
        self._volume = volume
        self._meta = meta
        self._say = say
        self._last: Reach | None = None
        self._looked = asyncio.Event()
        self._task: asyncio.Task[None]

    async def __aenter__(self) -> None:
        self._task = asyncio.ensure_future(self._volume.watch(self._tell))
        looked = asyncio.ensure_future(self._looked.wait())
        await asyncio.wait([looked, self._task], timeout=FIRST_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
        looked.cancel()

    async def __aexit__(self, *error: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _tell(self, reach: Reach) -> None:
        for line in notices(self._last, reach, self._meta):
            self._say(line)
        self._last = reach
        self._looked.set()
