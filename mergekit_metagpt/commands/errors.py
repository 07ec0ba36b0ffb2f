"""Turns bad input and wrong usage into one line on stderr and exit status 2."""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any, ParamSpec, TypeVar

import click

from mergekit_metagpt.report.parts import printable

P = ParamSpec("P")
T = TypeVar("T")
# In the `meta` of a context: a function that says what is left after Ctrl-C.
LEFT = "mergekit_metagpt.left"
# Longest message: some quote the content of a file.
MOST_CHARACTERS = 2000


class Refusal(click.ClickException):
    """Bad input: one line on stderr, exit status 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class Differs(Refusal):
    """A model is not the merge that it says it is."""

    exit_code = 1


class Unverified(Refusal):
    """A model could not be checked."""

    exit_code = 3


class OneLineGroup(click.Group):
    """Commands that answer wrong usage with one line, without click's usage above."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the options of the group."""
        with _usage_in_one_line(), _signals_as_statuses({}):
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Parse the arguments of a command, and run it."""
        with _usage_in_one_line(), _signals_as_statuses(ctx.meta):
            return super().invoke(ctx)


@contextmanager
def _usage_in_one_line() -> Iterator[None]:
    try:
        yield
    except click.UsageError as error:
        if error.ctx is None or error.message == error.ctx.get_help():
            raise  # the group alone shows its help
        said = " ".join(error.format_message().split()).rstrip(".")
        raise Refusal(f"{said} (see {error.ctx.command_path} --help)") from error


@contextmanager
def _signals_as_statuses(meta: Mapping[str, Any]) -> Iterator[None]:
    """End as shells report signals: status 1 is the result of a check."""
    try:
        yield
    except (KeyboardInterrupt, click.Abort):
        click.echo(f"\nAborted!{meta.get(LEFT, str)()}", err=True)
        raise click.exceptions.Exit(128 + signal.SIGINT) from None
    except BrokenPipeError:  # whoever read stdout has ended
        # Python flushes stdout once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # SIGPIPE is 13; Windows does not name it.
        raise click.exceptions.Exit(128 + 13) from None


def one_line_errors(command: Callable[P, T]) -> Callable[P, T]:
    """Make a command answer bad input with one line and exit status 2."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        with interrupts_kept():
            try:
                return command(*args, **kwargs)
            except (BrokenPipeError, click.Abort, click.exceptions.Exit):
                raise  # click handles these
            except Exception as error:
                if not isinstance(error, expected_errors()):
                    raise
                raise Refusal(in_one_line(error)) from error

    return wrapper


def expected_errors() -> tuple[type[Exception], ...]:
    """Errors that mean bad input; all others are defects and show a traceback."""
    from safetensors import SafetensorError  # raised by mergekit's writer
    from torch import OutOfMemoryError

    memory = MemoryError, OutOfMemoryError  # of the machine, and of a GPU
    return ValueError, OSError, *memory, ImportError, SafetensorError


def in_one_line(error: Exception) -> str:
    """Return an error's message as one line, shortened if it is long."""
    said = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        # str() would add a number, and double the backslashes of a path.
        said = f"{error.filename}: {error.strerror}"
    line = " ".join(said.split())
    if isinstance(error, MemoryError):
        line = f"not enough memory. {line}".strip()
    if isinstance(error, ImportError) and (error.name or "").startswith("mergekit"):
        line = f"{line}. Install mergekit 0.1.5 or a later 0.1"
    if len(line) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        line = f"{line[:half]} ... {line[-half:]}"
    return line


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Raise KeyboardInterrupt in place of any error after Ctrl-C was pressed.

    Python raises it wherever the main thread is, even inside a library's C code, which
    may turn it into another error. torch, for example, then reports a shape that it
    could not determine, as if the file were damaged.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, and an error followed.
    """
    pressed = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        pressed = True
        signal.default_int_handler(number, frame)

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    except Exception as error:
        if pressed:
            raise KeyboardInterrupt from error
        raise
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
