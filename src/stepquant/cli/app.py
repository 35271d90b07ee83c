"""The command `stepquant`: its subcommands, its exit codes, and one clear error for everything that goes wrong."""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from stepquant.cli import compare, demo, diff, export, foreign, lists, make, measure, show, study
from stepquant.cli.interrupt import Interrupted, asked, code_of, heeding, keeping
from stepquant.cli.words import check_given, check_values, suit_terminal
from stepquant.errors import StepquantError
from stepquant.version import __version__

DONE, OURS, USER, CLOSED = 0, 1, 2, 141
OF_THE_USER = (
    *(
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.EBUSY,
        errno.EIO,
    ),
    *(
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.ENXIO,
        errno.ENODEV,
        errno.ENOTEMPTY,
    ),
    *(errno.EMFILE, errno.ENFILE, errno.ESTALE),
)

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


def guarded(command: Callable[..., Any]) -> Callable[..., Any]:
    """Checks what every command must not be given, and makes Ctrl-C an error of our own, which typer would swallow."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        check_values(kwargs)
        with keeping("nothing was written; run the same command again"):
            return command(*args, **kwargs)

    return run


for module in (demo, make, foreign, export, measure, compare, diff, show, lists, study):
    for name, command in module.COMMANDS.items():
        app.command(name)(guarded(command))


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    given = list(sys.argv[1:] if words is None else words)
    debug = "--debug" in given
    if not debug:  # what torch and diffusers say to their developers is not for users
        warnings.filterwarnings("ignore", module=r"torch|diffusers|transformers")
    suit_terminal()
    try:
        with heeding():
            return run(given, debug)
    except KeyboardInterrupt as stop:
        return code_of(stop)


def run(given: Sequence[str], debug: bool) -> int:
    try:
        check_given(given)
        app(args=[word for word in given if word != "--debug"], prog_name="stepquant")
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # click and rich end so, with the code of a failure
            return close_output()
        stop = asked()  # while the command line was read: typer makes an exit of its own of it
        if stop is not None:
            say("\nInterrupted: nothing had begun")
            return code_of(stop)
        code = end.code if isinstance(end.code, int) else DONE if end.code is None else OURS
    except Interrupted as interrupted:
        say(f"\nInterrupted: {interrupted}")
        return interrupted.code
    except BrokenPipeError:
        return close_output()
    except Exception as error:  # the border of the program
        code = explain(error, debug)
        for note in getattr(error, "__notes__", ()):
            say(note)
        return code
    else:
        code = DONE
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return close_output()
    return code


def close_output() -> int:
    """Nobody reads on: end as quietly as other tools do."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
        with suppress(OSError, ValueError):
            os.dup2(nowhere, stream.fileno())
    return CLOSED


def explain(error: Exception, debug: bool) -> int:
    """Say what went wrong in a few lines; returns the exit code."""
    if debug:
        traceback.print_exception(error)
    if isinstance(error, StepquantError):
        say(str(error), "error: ")
        return USER
    if isinstance(error, OSError) and error.errno in OF_THE_USER:
        say(f"{error.strerror}: {shortened(error.filename or 'a file')}", "error: ")
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


def shortened(name: object) -> str:
    text = str(name)
    return text if len(text) <= 200 else f"{text[:100]}...{text[-50:]}"


def say(words: str, label: str = "") -> None:
    console = Console(stderr=True, highlight=False)
    console.print(Text(label, style="bold red") + Text(words), soft_wrap=True)
