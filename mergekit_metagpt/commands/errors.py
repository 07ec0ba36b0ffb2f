"""Turns bad input into one line on stderr and exit status 2."""

from __future__ import annotations

import functools
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import click

from mergekit_metagpt.commands import errors
from mergekit_metagpt.report.parts import printable

if TYPE_CHECKING:
    pass


P = ParamSpec("P")


T = TypeVar("T")


# Characters of an error; some quote what they found.
MOST_SAID = 2000


class Refusal(click.ClickException):
    """Bad input: one line on stderr, exit status 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


def one_line_errors(command: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        with errors.kept():
            try:
                return command(*args, **kwargs)
            except (BrokenPipeError, click.Abort, click.exceptions.Exit):
                raise  # whoever read our output has seen enough; click ends quietly
            except Exception as error:
                if not isinstance(error, _expected_errors()):
                    raise
                raise Refusal(told_in_one_line(error)) from error

    return wrapper


def _expected_errors() -> tuple[type[Exception], ...]:
    from safetensors import SafetensorError  # what mergekit's writer raises

    return ValueError, OSError, RuntimeError, MemoryError, ImportError, SafetensorError


def told_in_one_line(error: Exception) -> str:
    """An error in one line of a length that can be read."""
    line = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        line = f"not enough memory. {line}".strip()
    if isinstance(error, ImportError):
        line = f"{line}. {_versions()}"
    if len(line) > MOST_SAID:
        line = f"{line[: MOST_SAID // 2]} ... {line[-MOST_SAID // 2 :]}"
    return line


def _mergekit() -> str:
    """The version of the installed mergekit."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mergekit")
    except PackageNotFoundError:
        return "none"


def _versions() -> str:
    return f"mergekit 0.1.5 or a later 0.1 is needed; found: {_mergekit()}"


def with_mergekit(command: Callable[P, T]) -> Callable[P, T]:
    """Refuse another version by its number: what it says on import may be anything."""

    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        found = re.match(r"(\d+)\.(\d+)\.(\d+)", _mergekit())
        if found and not (0, 1, 5) <= tuple(map(int, found.groups())) < (0, 2):
            raise ValueError(_versions())
        return command(*args, **kwargs)

    return wrapper


@contextmanager
def kept() -> Iterator[None]:
    """Raise KeyboardInterrupt for any error after Ctrl-C was pressed.

    Python raises it wherever the main thread is, also in calls from a library's C code,
    which may take it for another failure: torch, asked for a tensor of a mapped file,
    then says that it could not determine a shape, and the file seems damaged.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed, and an error came of it.
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
