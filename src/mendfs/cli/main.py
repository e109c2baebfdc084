"""The command line's frame: commands, one-line errors, exit codes (0 done, 1 failed, 2 wrong usage).

A user never sees a traceback: what we did not foresee is one line too, with the way to see more. Commands import what
they need when they run, so that `mendfs --help` and small commands answer at once.
"""

import asyncio
import io
import os
import sys
from typing import Annotated

import typer

from mendfs import __version__
from mendfs.cli import bench, cluster, files, look, machines, shell
from mendfs.cli.complaints import complain, explain
from mendfs.errors import UsageError
from mendfs.world.streams import fill_closed_streams

INTERRUPTED = 130
"""What shells report for a command ended by Ctrl-C."""

app = typer.Typer(
    name="mendfs",
    help="A fault-tolerant distributed file system that you mount, and that mends itself.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Show the version.", is_eager=True)) -> None:
    """A fault-tolerant distributed file system that you mount, and that mends itself."""
    if show:
        print(f"mendfs {__version__}")
        raise typer.Exit


for group in (cluster, machines, bench):
    group.register(app)
for shared in (look, files, shell):
    shared.add_to(app)


@app.command()
def simulate(
    seeds: Annotated[
        int, typer.Option("--seeds", metavar="N", help="How many seeds [default: 20, or 1 with --seed].")
    ] = 0,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="S", help="This one only; with --seeds the first.")
    ] = None,
    minutes: Annotated[float, typer.Option("--minutes", metavar="M", help="Simulated minutes of each.")] = 10.0,
    profile: Annotated[
        str, typer.Option("--profile", metavar="NAME", help="Which faults: mixed, crashes, ...")
    ] = "mixed",
    trace: Annotated[bool, typer.Option("--trace", help="Print what happens, line by line.")] = False,
    jobs: Annotated[int, typer.Option("--jobs", metavar="N", help="Processes [default: one a core].")] = 0,
    faults: Annotated[str, typer.Option("--faults", metavar="I,J", help="Only these faults of the seed's plan.")] = "",
    planted: Annotated[str, typer.Option("--planted", metavar="NAME", help="With a bug planted on purpose.")] = "",
    shrink: Annotated[bool, typer.Option("--shrink/--no-shrink", help="Shorten the plan of a seed that fails.")] = True,
) -> None:
    """Run whole clusters in one process on simulated time, network and disks, and check the promises."""
    from mendfs.sim.command import Wishes, run_command

    try:
        numbers = tuple(int(number) for number in faults.split(",")) if faults else None
    except ValueError:
        raise UsageError(f"--faults takes numbers with commas between them, not {faults!r}") from None
    wishes = Wishes(
        seeds=seeds or (20 if seed is None else 1),
        first=seed,
        minutes=minutes,
        profile=profile,
        trace=trace,
        jobs=jobs,
        faults=numbers,
        planted=planted,
        shrink=shrink,
    )
    if asyncio.run(run_command(wishes)):
        raise typer.Exit(1)


def run(arguments: list[str]) -> int:
    """Run one command; returns the exit code."""
    command = typer.main.get_command(app)
    try:
        code = command.main(arguments or ["--help"], prog_name="mendfs", standalone_mode=False)
        if sys.stdout is not None:  # ">&-" closes it
            sys.stdout.flush()
    except (KeyboardInterrupt, typer.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has what it wanted ("mendfs ls | head"). Python would try to flush once more and complain.
        os._exit(1)
    except Exception as error:
        text, exit_code = explain(error)
        complain(text)
        return exit_code
    return code if isinstance(code, int) else 0


def _write_whole() -> None:
    """With PYTHONUNBUFFERED, Python drops what a pipe does not take in one write: a long document would end early."""
    raw = getattr(sys.stdout, "buffer", None)
    if isinstance(raw, io.RawIOBase):
        whole = io.BufferedWriter(raw)
        sys.stdout = io.TextIOWrapper(
            whole, encoding=sys.stdout.encoding, errors=sys.stdout.errors, line_buffering=True
        )


def main() -> None:
    """The entry point of the `mendfs` command."""
    fill_closed_streams()
    _write_whole()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
