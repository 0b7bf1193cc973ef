"""The command line application: registration of commands, exit codes of errors, progress display.

Exit codes: 0 success, 1 failure, 2 wrong usage, 128 + signal after a signal.
"""

import io
import re
import signal
import sys
import warnings
from collections.abc import Callable, Collection
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer
from typer.models import OptionInfo

from tinyspan import __version__
from tinyspan.errors import InputError, Interrupted, TinyspanError
from tinyspan.extras import EXTRAS, missing_extra

# an argument of Python in a message, which is no part of a path or of a longer word
ARGUMENT = re.compile(
    r"""
    (?<![\w/.'"-]) (?P<name>[a-z][a-z_]*)
    (?: (?P<equals>=) (?P<value> '[^']*' | "[^"]*" | [\w+-]+ (?: [.]\w+ )* )? | (?! [\w/-] | [.]\w ) )
    """,
    re.VERBOSE,
)

app = typer.Typer(
    help="Find the few directions in which a pre-trained model fine-tunes, and train in them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"tinyspan {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


class _Stopped(Exception):
    """A signal stopped the command; typer would turn a KeyboardInterrupt into an exit without a message."""


def as_options(message: str, options: Collection[str]) -> str:
    """Return an error message of the library with the options of a command in place of the arguments of Python.

    Messages write an argument as `name=` or `name=value`; a name with an underscore is recognized by itself, too.

    Args:
        message: the message.
        options: names of the command's options, with underscores.

    Example:
        >>> as_options("give rank= or explained_variance=, or pass overwrite=True", {"rank", "overwrite"})
        'give --rank or explained_variance=, or pass --overwrite'
    """

    def option(match: re.Match[str]) -> str:
        name, equals, value = match["name"], match["equals"], (match["value"] or "").strip("'\"")
        if name not in options or value in ("None", "False") or not (equals or "_" in name):
            return match[0]
        flag = f"--{name.replace('_', '-')}"
        return f"{flag} {value}" if value and value != "True" else flag

    return ARGUMENT.sub(option, message)


def command(work: Callable[..., None]) -> Callable[..., None]:
    """Register a function as the command of its name; `main` reports interruptions and errors, which name options."""
    names = {
        name
        for name, hint in work.__annotations__.items()
        if any(isinstance(part, OptionInfo) for part in getattr(hint, "__metadata__", ()))
    }

    @app.command()
    @wraps(work)
    def interruptible(*arguments: Any, **options: Any) -> None:
        try:
            work(*arguments, **options)
        except KeyboardInterrupt as error:
            advice = error if isinstance(error, Interrupted) else "repeat the command"
            raise _Stopped(f"interrupted: {advice}") from error
        except TinyspanError as error:
            error.args = (as_options(str(error), names),)
            raise

    return interruptible


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a path may have characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    received: signal.Signals | None = None

    def stop(number: int, frame: Any) -> NoReturn:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup, for example, ignores the signal
        signal.signal(signal.SIGINT, stop)
    try:
        app()
    except _Stopped as stopped:
        _fail(stopped, 128 + (received or signal.SIGINT))
    except Exception as error:
        if received is not None:  # compiled code may replace the interrupt by an error of its own
            _fail("interrupted: repeat the command", 128 + received)
        if isinstance(error, InputError):
            _fail(error, 2)
        if isinstance(error, TinyspanError):
            _fail(error, 1)
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            _fail(missing_extra(error.name), 2)
        if isinstance(error, OSError):  # from files of others, such as the model's
            _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
        raise


def _warn(message: Warning | str, *details: Any) -> None:
    print(f"tinyspan: warning: {printable(message)}", file=sys.stderr)


def printable(text: object) -> str:
    """Return a text from a file with its control characters written out, since a terminal would obey them."""
    return "".join(one if one.isprintable() or one == "\n" else repr(one)[1:-1] for one in str(text))


def _fail(error: Exception | str, code: int) -> NoReturn:
    print(f"tinyspan: {printable(error)}", file=sys.stderr)
    sys.exit(code)


def open_display() -> Any:
    """Silence messages and bars of the libraries, and return the progress display."""
    warnings.showwarning = _warn  # type: ignore[assignment]
    from tinyspan.workflows.progress import Display, quieten

    quieten()
    return Display()
