"""The application: commands register here, errors become exit codes, progress is shown.

Exit codes: 0 done, 1 failed, 2 misuse, 128 + signal where one stopped it.
"""

import io
import signal
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any, NoReturn

import typer

from tinyspan import __version__
from tinyspan.errors import InputError, Interrupted, TinyspanError
from tinyspan.extras import EXTRAS, missing_extra

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
    """A signal ended the work; typer would turn the KeyboardInterrupt into an exit without a message."""


def command(work: Callable[..., None]) -> Callable[..., None]:
    """Register a function as the command of its name; `main` reports its interruption."""

    @app.command()
    @wraps(work)
    def interruptible(*arguments: Any, **options: Any) -> None:
        try:
            work(*arguments, **options)
        except KeyboardInterrupt as error:
            advice = (
                error if isinstance(error, Interrupted) else "repeat the command to continue; finished parts are kept"
            )
            raise _Stopped(f"interrupted: {advice}") from error

    return interruptible


def main() -> None:
    """Run the command line."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a folder's name may have letters that the terminal lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    received: signal.Signals | None = None

    def stop(number: int, frame: Any) -> NoReturn:
        nonlocal received
        received = signal.Signals(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as under nohup
        signal.signal(signal.SIGINT, stop)
    try:
        app()
    except _Stopped as stopped:
        _fail(stopped, 128 + (received or signal.SIGINT))
    except Exception as error:
        if received is not None:  # compiled code may turn the interrupt that it meets into an error of its own
            _fail("interrupted: repeat the command to continue; finished parts are kept", 128 + received)
        if isinstance(error, InputError):
            _fail(error, 2)
        if isinstance(error, TinyspanError):
            _fail(error, 1)
        if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
            _fail(missing_extra(error.name), 2)
        if isinstance(error, OSError):  # of files that are not ours, such as the model's
            _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error), 1)
        raise


def _warn(message: Warning | str, *details: Any) -> None:
    print(f"tinyspan: warning: {message}", file=sys.stderr)


def _fail(error: Exception | str, code: int) -> NoReturn:
    print(f"tinyspan: {error}", file=sys.stderr)
    sys.exit(code)


def open_display() -> Any:
    """Quieten the libraries below and return the progress display."""
    warnings.showwarning = _warn  # type: ignore[assignment]
    from tinyspan.workflows.progress import Display, quieten

    quieten()
    return Display()
