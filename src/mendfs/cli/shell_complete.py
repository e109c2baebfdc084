"""What the word before the cursor may become: commands, options, names in the volume, names on this machine."""

import asyncio
import os
import posixpath
import stat
from collections.abc import Iterable

import msgspec

from mendfs.cli.shell_commands import Parameter, Shell
from mendfs.cli.shell_words import Typed, arguments_before, can_be_typed, quoted, typed
from mendfs.client.paths import resolve
from mendfs.model import NAME_BYTES_MAX

CANDIDATES_MAX = 200
"""Names shown at once; nobody reads more, and a directory may have a million."""


class Candidate(msgspec.Struct, frozen=True):
    """What may stand in place of the last `replaces` characters."""

    text: str
    display: str
    replaces: int


async def candidates(shell: Shell, line: str) -> list[Candidate]:
    """Completions of what stands before the cursor. Raises what listing a directory raises."""
    at = typed(line)
    if not at.before:
        return _words(at, sorted(shell.commands))
    command, *rest = at.before
    parameters = shell.parameters(command)
    with_value = {name for each in parameters if _takes_value(each) for name in each.opts}
    count, awaiting = arguments_before(rest, with_value)
    if awaiting:
        return []
    if at.word.startswith("-") and "--" not in rest:
        return _words(at, sorted(name for each in parameters if _is_option(each) for name in each.opts))
    match _kind_of_argument([each for each in parameters if not _is_option(each)], count):
        case "command":
            return _words(at, sorted(shell.commands))
        case "server":
            return _words(at, [str(server.number) for server in shell.volume.servers])
        case "local":
            return await asyncio.get_running_loop().run_in_executor(None, _local, at)
        case "remote":
            return await _remote(shell, at)
    return []


def _is_option(parameter: Parameter) -> bool:
    return parameter.param_type_name == "option"


def _takes_value(parameter: Parameter) -> bool:
    return _is_option(parameter) and not getattr(parameter, "is_flag", False)


def _kind_of_argument(arguments: list[Parameter], count: int) -> str:
    """What the argument after `count` others names. One that may come several times takes all but the last."""
    if not arguments:
        return ""
    several = next((place for place, each in enumerate(arguments) if each.nargs == -1), None)
    place = count
    if several is not None and count >= several:
        # "put a b c": the last may be the target. A word that is being typed may be either; sources come first.
        place = several if count == several else len(arguments) - 1
    if place >= len(arguments):
        return ""
    metavar = (arguments[place].metavar or "").strip("[].").rstrip(".")
    return {"LOCAL": "local", "SERVER": "server", "COMMAND": "command"}.get(
        metavar.rstrip("."), "remote" if metavar in ("PATH", "FROM", "TO") else ""
    )


def _words(at: Typed, words: Iterable[str]) -> list[Candidate]:
    return [Candidate(f"{word} ", word, at.raw_length) for word in words if word.startswith(at.word)]


def _names(at: Typed, found: Iterable[tuple[str, bool]]) -> list[Candidate]:
    """Candidates of names in the directory that the word ends in; a directory goes on, anything else is complete."""
    folder = at.word[: at.word.rfind("/") + 1]
    result = []
    for name, is_directory in found:
        if can_be_typed(name):
            end = "/" if is_directory else " "
            result.append(Candidate(quoted(folder + name) + end, name + end.strip(), at.raw_length))
    return result


def _local(at: Typed) -> list[Candidate]:
    folder, _, begin = at.word.rpartition("/")
    where = f"{folder}/" if "/" in at.word else "."
    found: list[tuple[str, bool]] = []
    with os.scandir(os.path.expanduser(where)) as entries:
        for entry in entries:
            if entry.name.startswith(begin) and (begin or not entry.name.startswith(".")):
                found.append((entry.name, entry.is_dir()))
                if len(found) >= CANDIDATES_MAX:
                    break
    return _names(at, sorted(found))


async def _remote(shell: Shell, at: Typed) -> list[Candidate]:
    folder, slash, begin = at.word.rpartition("/")
    directory = await resolve(shell.volume, posixpath.join(shell.folder, folder + slash) or "/")
    prefix = os.fsencode(begin)
    listing = await shell.volume.list_directory(directory.inode, before(prefix), CANDIDATES_MAX, with_attributes=False)
    found = []
    for entry in listing.entries:
        if not entry.name.startswith(prefix):
            break
        if prefix or not entry.name.startswith(b"."):
            found.append((os.fsdecode(entry.name), stat.S_ISDIR(entry.kind)))
    return _names(at, found)


def before(prefix: bytes) -> bytes:
    """A name before which everything sorts that is less than all names with this prefix: where a listing begins."""
    if not prefix:
        return b""
    if prefix[-1] == 0:
        return prefix[:-1]
    return (prefix[:-1] + bytes([prefix[-1] - 1])).ljust(NAME_BYTES_MAX, b"\xff")
