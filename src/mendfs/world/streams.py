"""Standard input and output: a pipe or a person may keep us waiting as long as they like, so never in the event loop.

Each wait has a daemon thread of its own. One of an executor would keep the process from ending after Ctrl-C, for a
read of a terminal or a write to a full pipe does not end before the other side does something.
"""

import asyncio
import os
import select
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from mendfs.world.disk import Buffer

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


async def run_apart(function: Callable[Arguments, Result], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    """Call `function`, which may wait for ever and may raise OSError, in a daemon thread."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def settle(result: Result | None, error: BaseException | None) -> None:
        if done.done():
            return  # cancelled: nobody waits any more
        if error is not None:
            done.set_exception(error)
        else:
            done.set_result(result)  # type: ignore[arg-type]  # a result whenever there is no error

    def work() -> None:
        result: Result | None = None
        failure: BaseException | None = None
        try:
            result = function(*args, **kwargs)
        except OSError as error:
            failure = error
        try:
            loop.call_soon_threadsafe(settle, result, failure)
        except RuntimeError:
            return  # the loop is closed: the command was interrupted while this waited

    threading.Thread(target=work, name="stream", daemon=True).start()
    return await done


def _write_all(fd: int, data: Buffer) -> None:
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            select.select([], [fd], [])  # whoever we share the terminal with has made it non-blocking


def _read(fd: int, count: int) -> bytes:
    while True:
        try:
            return os.read(fd, count)
        except BlockingIOError:
            select.select([fd], [], [])


async def read_stream(fd: int, count: int) -> bytes:
    """Up to `count` bytes as soon as there are any; b"" at the end. Raises OSError."""
    return await run_apart(_read, fd, count)


async def write_stream(fd: int, data: Buffer) -> None:
    """All of `data`, which must stay as it is until this returns. Raises OSError, BrokenPipeError among them."""
    await run_apart(_write_all, fd, data)


def fill_closed_streams() -> None:
    """Take the places of standard streams that the caller has closed (">&-").

    The next file to be opened would get such a place, and with it what is meant for the terminal; the event loop's
    library ends the process when its own are there. Writing to these fails, as it would without them.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # the lowest free number: this one
