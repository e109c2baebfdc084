"""The shell's prompt on a terminal: editing, history, completion. The only place that imports prompt_toolkit."""

import asyncio
import errno
import os
import sys
from collections import deque
from collections.abc import AsyncGenerator, Iterable
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.application import run_in_terminal
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.shortcuts import CompleteStyle

from mendfs.cli.complaints import escaped
from mendfs.cli.shell_commands import INTERRUPTED, Shell
from mendfs.cli.shell_complete import Candidate, candidates
from mendfs.errors import MendfsError
from mendfs.world.local_disk import LocalDisk

HISTORY_BYTES_MAX = 1 << 20
"""A history that is longer when the shell starts loses its older half: about 20,000 lines are kept."""
COMPLETION_TIMEOUT_S = 2.0
"""A directory that takes longer to list is not completed in: the meta server may be away."""


class Prompt:
    """Reads lines and has the shell run them, until Ctrl-D or `exit`."""

    def __init__(self, shell: Shell) -> None:
        self._shell = shell
        self._waiting: deque[str] = deque()
        self._session: PromptSession[str] = PromptSession(
            history=open_history(),
            completer=_ShellCompleter(shell),
            complete_while_typing=False,
            complete_style=CompleteStyle.MULTI_COLUMN,
        )

    async def run(self) -> None:
        """Until the end."""
        while not self._shell.is_over:
            try:
                self._print_waiting()
                line = await self._session.prompt_async(f"mendfs:{escaped(self._shell.folder)}> ", handle_sigint=False)
            except KeyboardInterrupt:
                continue  # Ctrl-C at the prompt: this line is not wanted
            except EOFError:
                return
            self._print_waiting()
            code = await self._shell.execute(line)
            if code == INTERRUPTED or self._shell.is_mid_line:
                print(flush=True)  # the prompt stands at the beginning of a line

    def say(self, line: str) -> None:
        """A message, above the prompt if that is shown."""
        self._waiting.append(line)
        if self._session.app.is_running:
            run_in_terminal(self._print_waiting)
        else:
            self._print_waiting()

    def _print_waiting(self) -> None:
        while self._waiting:
            print(self._waiting.popleft(), file=sys.stderr, flush=True)


class _ShellCompleter(Completer):
    def __init__(self, shell: Shell) -> None:
        self._shell = shell

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        return ()  # the prompt asks the other one

    async def get_completions_async(
        self, document: Document, complete_event: CompleteEvent
    ) -> AsyncGenerator[Completion, None]:
        found: list[Candidate] = []
        try:
            async with asyncio.timeout(COMPLETION_TIMEOUT_S):
                found = await candidates(self._shell, document.text_before_cursor)
        except (MendfsError, OSError, TimeoutError):
            # What cannot be listed has no completions; a message in the middle of typing would help nobody.
            found = []
        for each in found:
            yield Completion(each.text, start_position=-each.replaces, display=each.display)


# --- history ----------------------------------------------------------------------------------------------------------


def history_path() -> str:
    """In the user's state folder, as the XDG base directories say; empty if there is no such place."""
    state = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(state):
        home = os.path.expanduser("~")
        if not os.path.isabs(home):
            return ""
        state = os.path.join(home, ".local", "state")
    return os.path.join(state, "mendfs", "history")


def open_history() -> History:
    """The history of earlier shells; one in memory, and a line that says why, if there is no place to keep it."""
    path = history_path()
    try:
        if not path:
            raise OSError(errno.ENOENT, "there is no home directory")
        _prepare(path)
    except OSError as error:
        print(f"(history is not kept: {escaped(path)}: {error.strerror})", file=sys.stderr)
        return InMemoryHistory()
    return _KeptHistory(path)


def _prepare(path: str) -> None:
    """Make the file, readable by its owner only, and keep it from growing for ever."""
    disk = LocalDisk()
    disk.make_directories(os.path.dirname(path))
    if not disk.exists(path):
        disk.open(path, create=True).close()
    file = disk.open(path)
    try:
        size = file.size()
    finally:
        file.close()
    if size > HISTORY_BYTES_MAX:
        content = disk.read_file(path)[-HISTORY_BYTES_MAX // 2 :]
        # An entry begins with an empty line: what is left begins with a whole one.
        disk.replace_file(path, content[content.find(b"\n\n") + 1 :])


class _KeptHistory(FileHistory):
    """A file, until it cannot be written any more: then the lines are kept in memory, and that is said once."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self._is_broken = False

    def store_string(self, string: str) -> None:
        if self._is_broken:
            return
        try:
            super().store_string(string)
        except (OSError, UnicodeError) as error:
            self._is_broken = True
            print(f"(history is not kept any more: {error})", file=sys.stderr)

    def load_history_strings(self) -> Any:
        try:
            return list(super().load_history_strings())
        except OSError as error:
            print(f"(earlier history cannot be read: {error})", file=sys.stderr)
            return []
