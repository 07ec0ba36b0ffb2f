"""Runs a command as one of several ranks; if one fails, it says why and all end."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import click

from mergekit_metagpt.commands.errors import expected_errors, in_one_line
from mergekit_metagpt.report.parts import printable
from mergekit_metagpt.scanning import ranks, sharing

LOG = logging.getLogger("mergekit_metagpt")


@contextmanager
def as_rank(*, resumable: bool = False) -> Iterator[ranks.Group | None]:
    """Take part in the job that `torchrun` or the like has started, if any.

    Ranks share scans meanwhile. If this rank fails, the others are told why, and end.

    Args:
        resumable: without such a job, become the only rank of one.

    Yields:
        the group; None in a process that is not a rank.

    Raises:
        ValueError: a rank failed; the message names it and the cause.
    """
    group = ranks.join() or (ranks.alone() if resumable else None)
    if group is None:
        yield None
        return
    if not group.leads:
        LOG.setLevel(logging.ERROR)  # rank 0 logs warnings
    with _termination_told(group), sharing.among(group):
        try:
            yield group
        except (click.Abort, click.exceptions.Exit):
            raise
        except KeyboardInterrupt:
            group.fail(f"{group.me} was interrupted (Ctrl-C)")
            raise
        except Exception as error:
            if group.size == 1:
                raise
            cause = group.fail(f"{group.me}: {in_one_line(error)}")
            if isinstance(error, expected_errors()):
                raise ValueError(cause) from error
            raise
        finally:
            group.leave()


def only_leader(group: ranks.Group | None) -> None:
    """End all ranks but rank 0 with status 0; rank 0 goes on alone."""
    if group is not None and not group.leads:
        raise click.exceptions.Exit(0)
    sharing.stop_sharing()


@contextmanager
def _termination_told(group: ranks.Group) -> Iterator[None]:
    """Say why, if the launcher ends this rank because another one has failed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        click.echo(f"Error: {printable(group.terminated())}", err=True)
        os._exit(2)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
