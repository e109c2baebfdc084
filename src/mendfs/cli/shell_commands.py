"""The shell's commands: those it shares with the command line, and its own, on one open volume."""

import asyncio
import inspect
import os
from collections.abc import Callable
from typing import Annotated, Any, Protocol

import typer

from mendfs.cli import files, look
from mendfs.cli.command import At, Command, in_shell, register
from mendfs.cli.complaints import FAILED, complain, explain
from mendfs.cli.options import Located
from mendfs.cli.shell_words import split
from mendfs.client.paths import canonical_directory
from mendfs.client.volume import Volume
from mendfs.errors import OperationError, UsageError

INTERRUPTED = 130
"""What shells report for a command ended by Ctrl-C."""


class Parameter(Protocol):
    """A command's option or argument, as the option parser has it."""

    param_type_name: str
    opts: list[str]
    secondary_opts: list[str]
    nargs: int
    metavar: str | None
    name: str | None


class Shell:
    """An open volume, a folder in it, and the commands."""

    def __init__(self, located: Located, volume: Volume) -> None:
        self.located = located
        self.volume = volume
        self.folder = "/"
        self.is_over = False
        self._prefix = ""
        self._running: asyncio.Task[int] | None = None
        self._last: At | None = None
        app = typer.Typer(
            add_completion=False,
            rich_markup_mode=None,
            pretty_exceptions_enable=False,
            context_settings={"help_option_names": ["-h", "--help"]},
        )
        for command in (*files.COMMANDS, *look.COMMANDS, *self._own_commands()):
            register(app, command, in_shell(command, self._at))
        self._parser: Any = typer.main.get_command(app)
        for each in self.commands.values():
            for parameter in each.params:
                # A mount's paths are for programs that know nothing of the shell's folder.
                parameter.help = (parameter.help or "").replace(files.IN_VOLUME, "In the volume.") or None

    def _at(self) -> At:
        self._last = At(self.located, self.volume, folder=self.folder, prefix=self._prefix, input=None)
        return self._last

    @property
    def is_mid_line(self) -> bool:
        """Whether the last command's output did not end its line."""
        return self._last is not None and self._last.is_mid_line

    # --- the shell's own commands ------------------------------------------------------------------------------------

    def _own_commands(self) -> tuple[Command, ...]:
        async def cd(at: At, path: Annotated[str, typer.Argument(metavar="PATH")] = "/") -> None:
            """Go to another directory of the volume; without a path to its root."""
            inside = at.path(path)
            try:
                self.folder = await canonical_directory(at.volume, inside)
            except OperationError as error:
                raise OperationError(error.errno, path) from None

        async def pwd(at: At) -> None:
            """Say which directory of the volume this is."""
            await at.write(at.name(os.fsencode(self.folder)) + "\n")

        async def lcd(at: At, local: Annotated[str, typer.Argument(metavar="LOCAL")] = "~") -> None:
            """Go to another directory of this machine, for put and get; without one to your home."""
            os.chdir(os.path.expanduser(local))

        async def lpwd(at: At) -> None:
            """Say which directory of this machine put and get begin in."""
            await at.write(at.name(os.fsencode(os.getcwd())) + "\n")

        async def show_help(at: At, command: Annotated[str, typer.Argument(metavar="COMMAND")] = "") -> None:
            """List the commands, or explain one of them."""
            await at.write(self._help(command))

        async def leave(at: At) -> None:
            """Leave the shell; so does Ctrl-D."""
            self.is_over = True

        return (
            Command(cd),
            Command(pwd),
            Command(lcd),
            Command(lpwd),
            Command(show_help, "help"),
            Command(leave, "exit"),
            Command(leave, "quit"),
        )

    def _help(self, name: str) -> str:
        commands = self.commands
        if name:
            if name not in commands:
                raise UsageError(f'there is no command {name!r}: "help" lists them')
            command = commands[name]
            return str(command.get_help(command.make_context(name, [], resilient_parsing=True))) + "\n"
        width = max(map(len, commands))
        lines = [f"  {each.ljust(width)}  {commands[each].get_short_help_str(limit=90)}" for each in sorted(commands)]
        return (
            "\n".join(lines)
            + '\n\n"help COMMAND" explains one. Paths begin at the root of the volume (/a/b) or in the '
            "directory\nof the prompt (a/b); quotes and backslashes are as in other shells.\n"
        )

    # --- running -----------------------------------------------------------------------------------------------------

    @property
    def commands(self) -> dict[str, Any]:
        """The option parser's commands, by name."""
        return dict(self._parser.commands)

    def parameters(self, name: str) -> list[Parameter]:
        """The options and arguments of a command."""
        command = self._parser.commands.get(name)
        return [] if command is None else list(command.params)

    async def execute(self, line: str, prefix: str = "") -> int:
        """Run one line; what goes wrong is said, after `prefix`. Returns the exit code."""
        self._prefix = prefix
        self._running = asyncio.ensure_future(self._run(line))
        try:
            return await self._running
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            return INTERRUPTED
        except BrokenPipeError:
            raise
        except Exception as error:
            text, exit_code = explain(error)
            complain(prefix + text)
            return exit_code
        finally:
            self._running = None

    def interrupt(self) -> bool:
        """End the running command, as Ctrl-C does. Returns whether there was one."""
        if self._running is None:
            return False
        self._running.cancel()
        return True

    async def _run(self, line: str) -> int:
        try:
            words = split(line)
        except ValueError as error:
            raise UsageError(f"{str(error).lower()}: close it, or put a backslash before it") from None
        if not words:
            return 0
        if words[0] not in self._parser.commands:
            raise UsageError(f'there is no command {words[0]!r}: "help" lists them')
        result = self._parser.main(words, prog_name="", standalone_mode=False)
        code = await result if inspect.iscoroutine(result) else result
        return code if isinstance(code, int) else 0


async def run_script(shell: Shell, read: Callable[[], Any], *, stop_at_failure: bool) -> int:
    """Run the lines that `read` gives, b"" at the end. Returns 1 if a command failed.

    A `cd` that fails ends it: what follows would be done in the wrong place.
    """
    rest = b""
    number = 0
    failed = False
    while not shell.is_over:
        piece = await read()
        *lines, rest = (rest + piece).split(b"\n")
        if not piece and rest:
            lines, rest = [rest], b""
        for raw in lines:
            number += 1
            line = os.fsdecode(raw.rstrip(b"\r"))
            code = await shell.execute(line, f"line {number}: ")
            failed = failed or code != 0
            if code and (stop_at_failure or line.split()[:1] in (["cd"], ["lcd"])):
                complain(f"line {number}: stopped here, the lines after it were not run")
                return FAILED
            if code == INTERRUPTED:
                return INTERRUPTED
            if shell.is_over:
                break
        if not piece:
            break
    return FAILED if failed else 0
