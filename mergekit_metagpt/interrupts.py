"""Keeps Ctrl-C an interrupt where a library makes an error of its own of it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


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
