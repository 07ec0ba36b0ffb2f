"""Runs merges by mergekit, mending what it would lose."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from mergekit import merge_methods
from mergekit.graph import Task
from mergekit.multigpu_executor import MultiGPUExecutor
from mergekit.plan import MergePlanner

from mergekit_metagpt.merge_config import plan

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions


def versions() -> dict[str, str]:
    """Return the versions of the packages on which the bits of a merge depend."""
    packages = ("mergekit-metagpt", "mergekit", "torch", "transformers")
    return {package: version(package) for package in packages}


def already_warned(
    config: MergeConfiguration, *, warned: bool
) -> AbstractContextManager[None]:
    """Return a context in which our method logs no warnings if `warned` is true."""
    if not warned:
        return nullcontext()
    watch = merge_methods.get(config.merge_method).watch
    return watch.already_warned()


class _DoneEvent(threading.Event):
    """Is set only once a queue is empty, too."""

    def __init__(self, queue: Any) -> None:
        super().__init__()
        self._queue = queue

    def is_set(self) -> bool:
        return super().is_set() and self._queue.empty()


class _KeepingAllResults(MultiGPUExecutor):
    """mergekit's executor for several devices, without its loss of results.

    Its thread that collects results stops when all devices are done, even if some of
    their results still wait in its queue. Their tensors are then merged again, but
    without inputs that were used up: most such merges fail ("No value for required
    tensor"), some leave models out.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.done_event = _DoneEvent(self.task_completion_queue)


def run(
    config: MergeConfiguration,
    out: str,
    options: MergeOptions,
    *,
    source: str,
    warned: bool,
) -> None:
    """Run mergekit's merge into the folder `out`, with the YAML for the model card.

    `warned` says whether all warnings on the coefficients were logged already.
    """
    patched = patch("mergekit.merge.MultiGPUExecutor", _KeepingAllResults)
    with already_warned(config, warned=warned), patched:
        _run(config, out, options, source)


def _run(
    config: MergeConfiguration, out: str, options: MergeOptions, source: str
) -> None:
    from mergekit.merge import run_merge

    with plan.mergekits_errors(), plan.without_its_own_noise(), _tokenizer_copied():
        run_merge(config, out, options, config_source=source)


@contextmanager
def _tokenizer_copied() -> Iterator[None]:
    """Raise what mergekit only logs where it cannot copy the tokenizer."""

    def raising(record: logging.LogRecord) -> bool:
        failed = record.exc_info and record.exc_info[1]
        if failed and "copy tokenizer" in record.getMessage():
            raise failed
        return True

    log = logging.getLogger("mergekit.merge")
    log.addFilter(raising)
    try:
        yield
    finally:
        log.removeFilter(raising)


class _WithoutTensors(MergePlanner):
    """mergekit's planner for a merge whose tensors have been written already."""

    def plan_to_disk(self, out_path: str) -> list[Task[Any]]:
        return [self._tokenizer_task] if self._tokenizer_task else []


def run_without_tensors(
    config: MergeConfiguration, out: str, options: MergeOptions, *, source: str
) -> None:
    """Let mergekit write configuration, tokenizer and card of a merge, but no tensors.

    Raises a ValueError if mergekit cannot make them; an OSError if a file cannot be
    written.
    """
    with patch("mergekit.merge.MergePlanner", _WithoutTensors):
        _run(config, out, options, source)
