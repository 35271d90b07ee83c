"""The command `stepquant`: its subcommands, its exit codes, and one clear error for everything that goes wrong."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from stepquant import __version__
from stepquant.cli import compare, demo, diff, lists, make, measure, show, study
from stepquant.cli.interrupt import Interrupted
from stepquant.errors import StepquantError

DONE, OURS, USER, INTERRUPTED = 0, 1, 2, 130
OF_THE_USER = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)

app = typer.Typer(
    help="Quantize diffusion models after training, and run them in integers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"stepquant {__version__}")
        raise typer.Exit


@app.callback()
def everywhere(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version and exit."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Quantize diffusion models after training, and run them in integers."""


def interruptible(command: Callable[..., Any]) -> Callable[..., Any]:
    """Ctrl-C as an error of our own: typer would swallow it without a word."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            raise Interrupted("nothing was written; run the same command again") from None

    return run


for module in (demo, make, measure, compare, diff, show, lists, study):
    for name, command in module.COMMANDS.items():
        app.command(name)(interruptible(command))


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    given = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in given
    if not debug:  # what torch and diffusers say to their developers is not for users
        warnings.filterwarnings("ignore", module=r"torch|diffusers|transformers")
    try:
        app(args=[word for word in given if word != "--debug"], prog_name="stepquant")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else DONE if end.code is None else OURS
    except Interrupted as stop:
        say(f"\nInterrupted: {stop}")
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception as error:  # the border of the program
        return explain(error, debug)
    return DONE


def explain(error: Exception, debug: bool) -> int:
    """Say what went wrong in a few lines; returns the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, StepquantError):
        say(str(error), "error: ")
        return USER
    if isinstance(error, OSError) and error.errno in OF_THE_USER:
        say(f"{error.strerror}: {error.filename or 'a file'}", "error: ")
        return USER
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        say("out of memory\n  do: use fewer samples or a smaller batch: --set batch=16, --batch 8", "error: ")
        return USER
    say(f"{type(error).__name__}: {error}", "internal error: ")
    again = "" if debug else " Run again with --debug for the traceback, and"
    say(
        f"This is a defect of stepquant, not yours.{again or ' Please'} report it with the command line and stepquant {__version__}."
    )
    return OURS


def say(words: str, label: str = "") -> None:
    console = Console(stderr=True, highlight=False)
    console.print(Text(label, style="bold red") + Text(words), soft_wrap=True)
