"""Commands that the command line and the shell share: written once, as coroutines over `At`.

A command is `async def ls(at: At, path: ..., ...) -> None` with typer's annotations. `on_command_line` makes of it what
a process runs: with --meta, --dir and --secret-file, opening the volume for this one command. `in_shell` makes of it
what the shell runs on the volume that it has open. What goes wrong with one of several files is said with
`At.trouble`, and the command goes on; its exit code is 1 then.
"""

import inspect
import os
import posixpath
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, get_type_hints

import msgspec
import typer

from mendfs.cli import options
from mendfs.cli.complaints import FAILED, complain, escaped, explain
from mendfs.errors import AllReplicasFailed, MendfsError, OperationError, StoreFull, UsageError

if TYPE_CHECKING:
    from mendfs.client.volume import Volume  # a command that shows its help needs no client

Body = Callable[..., Coroutine[Any, Any, None]]
"""A command: its first parameter is an `At`, the others are typer's."""

STDOUT = 1
STDIN = 0
NEWLINE = ord("\n")


class Command(msgspec.Struct, frozen=True):
    """A shared command and how it is registered."""

    body: Body
    name: str = ""
    """Empty: the function's."""
    needs_volume: bool = True
    has_h: bool = False
    """`-h` is an option of its own and not short for --help."""

    @property
    def title(self) -> str:
        """What users type."""
        return self.name or self.body.__name__


class At:
    """What a command works on, and where its words go."""

    def __init__(
        self,
        located: options.Located,
        volume: "Volume | None",
        *,
        folder: str | None = None,
        prefix: str = "",
        input: int | None = STDIN,
        output: int = STDOUT,
    ) -> None:
        self.located = located
        self._volume = volume
        self._folder = folder
        self._prefix = prefix
        self.input = input
        """The descriptor that standard input is; None in the shell, whose input is full of commands."""
        self.exit_code = 0
        self.is_mid_line = False
        """What was written last did not end its line: the shell's prompt must not stand behind it."""
        self.output = output
        """The descriptor that standard output is."""
        self.is_terminal = os.isatty(output)

    @property
    def volume(self) -> "Volume":
        """The open volume."""
        assert self._volume is not None, "registered as a command that needs it"
        return self._volume

    @property
    def here(self) -> str:
        """What a command takes that was given no path."""
        return "/" if self._folder is None else "."

    def path(self, path: str) -> str:
        """The absolute path inside the volume that is meant: from the shell's folder on, or below a mount."""
        if not path:
            raise UsageError("an empty path names nothing: paths in the volume begin with /")
        if self._folder is not None:
            return posixpath.join(self._folder, path)
        from mendfs.cli.volumes import path_in_volume

        return path_in_volume(path, self.volume.parameters.id)

    def name(self, name: bytes) -> str:
        """A name as it is written to standard output: escaped on a terminal, as it is into a pipe or file."""
        text = os.fsdecode(name)
        return escaped(text) if self.is_terminal else text

    async def write(self, text: str) -> None:
        """Text to standard output."""
        await self.write_raw(os.fsencode(text))

    async def write_raw(self, data: bytes | memoryview) -> None:
        """Bytes to standard output; they must stay as they are until this returns."""
        from mendfs.world.streams import write_stream

        if data:
            self.is_mid_line = data[-1] != NEWLINE
            try:
                await write_stream(self.output, data)
            except BrokenPipeError:
                raise
            except OSError as error:
                raise OSError(error.errno, error.strerror, "standard output") from None

    async def write_json(self, document: object) -> None:
        """One JSON document on standard output."""
        import json

        await self.write(json.dumps(document) + "\n")

    def trouble(self, text: str, exit_code: int = FAILED) -> None:
        """Something did not work: said now, and the command fails in the end."""
        complain(self._prefix + text)
        self.exit_code = max(self.exit_code, exit_code)

    def skip(self, error: Exception, what: str = "") -> None:
        """One of several things failed: say it and go on. Raises what would befall all the others too."""
        concerns_one = isinstance(error, OSError | UsageError | OperationError | AllReplicasFailed)
        if not concerns_one or is_full(error) or isinstance(error, BrokenPipeError):
            raise error
        text, exit_code = explain(error)
        self.trouble(f"{what}: {text}" if what else text, exit_code)


def is_full(error: BaseException) -> bool:
    """Whether there is no room, or nothing may be written at all: the next file would fail as well."""
    import errno

    number = error.errno if isinstance(error, OSError | MendfsError) else None
    return isinstance(error, StoreFull) or number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def on_command_line(command: Command) -> Callable[..., int]:
    """The function that typer runs for `mendfs NAME ...`. Returns the exit code."""

    def run(*, meta: str, dir: str, secret_file: str, **given: Any) -> int:
        return options.run(_run_alone(command, options.locate(meta, dir, secret_file), given))

    own = {"meta": options.Meta, "dir": options.Dir, "secret_file": options.SecretFile}
    return _with_parameters(run, command, own)


async def _run_alone(command: Command, located: options.Located, given: Mapping[str, Any]) -> int:
    if not command.needs_volume:
        at = At(located, None)
        await command.body(at, **given)
        return at.exit_code
    from mendfs.cli.volumes import open_volume

    async with open_volume(located) as volume:
        at = At(located, volume)
        await command.body(at, **given)
    return at.exit_code


def in_shell(command: Command, at: Callable[[], At]) -> Callable[..., Coroutine[Any, Any, int]]:
    """The function that the shell's parser calls: it returns what is to be awaited for the exit code."""

    async def run(**given: Any) -> int:
        here = at()
        await command.body(here, **given)
        return here.exit_code

    def begin(**given: Any) -> Coroutine[Any, Any, int]:
        return run(**given)

    return _with_parameters(begin, command, {})


Function = Callable[..., Any]


def _with_parameters(run: Function, command: Command, more: Mapping[str, Any]) -> Function:
    """`run` with the parameters of the command's body, without the first, and `more` options that are empty texts."""
    hints = get_type_hints(command.body, include_extras=True)
    parameters = [
        each.replace(annotation=hints[each.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for each in list(inspect.signature(command.body).parameters.values())[1:]
    ]
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default="", annotation=annotation)
        for name, annotation in more.items()
    ]

    def shown(**given: Any) -> Any:
        return run(**given)

    shown.__name__ = command.title
    shown.__doc__ = command.body.__doc__
    shown.__annotations__ = {each.name: each.annotation for each in parameters}
    shown.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what inspect.signature reads
    return shown


def register(app: typer.Typer, command: Command, function: Function) -> None:
    """Add a command to an app."""
    settings = {"help_option_names": ["--help"]} if command.has_h else None
    app.command(command.title, context_settings=settings)(function)
