"""`mendfs shell`: the file commands at a prompt, or from a pipe, on one open volume."""

from typing import Annotated

import typer

from mendfs.cli import options


def shell(
    stop_at_failure: Annotated[
        bool, typer.Option("-e", help="From a pipe: stop at the first command that fails.")
    ] = False,
    meta: options.Meta = "",
    dir: options.Dir = "",
    secret_file: options.SecretFile = "",
) -> int:
    """Give commands at a prompt: "help" lists them. From a pipe, each line is a command; 1 if one of them failed."""
    from mendfs.cli.shell_session import run_shell

    return options.run(run_shell(options.locate(meta, dir, secret_file), stop_at_failure=stop_at_failure))


def add_to(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(shell)
