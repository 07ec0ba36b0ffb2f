"""Says through logging, once per merge, the coefficients found and their perils."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from mergekit_metagpt.method import advice

LOG = logging.getLogger("mergekit_metagpt")


QUIET = "MERGEKIT_METAGPT_QUIET"


def _log(level: int, message: str, *values: object) -> None:
    """Log on a row of its own, above the progress bar that mergekit may be drawing."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        LOG.log(level, message, *values)


# Whether the perils of the merge that runs were told before it began.
_told = False


@contextmanager
def told(warnings: Iterable[str]) -> Iterator[None]:
    """Warn before a merge, which then does not warn again; the lambda line stays.

    Args:
        warnings: the sentences, of `perils`, on all of the merge.

    Yields:
        while the merge runs.
    """
    global _told
    for warning in dict.fromkeys(warnings):
        _log(logging.WARNING, "%s", warning)
    _told = True
    try:
        yield
    finally:
        _told = False


class Announcer:
    """Logs each kind of message of one merge once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._said: set[Hashable] = set()

    def _first(self, *kind: Hashable) -> bool:
        with self._lock:
            new = kind not in self._said
            self._said.add(kind)
        return new

    def _warn(self, kind: Hashable, message: str | None) -> None:
        if message and not _told and self._first("warning", kind):
            _log(logging.WARNING, "%s", message)

    def nothing_moved(self, base: Hashable, where: str) -> None:
        """Warn that all models equal the base."""
        self._warn("unmoved", advice.nothing_moved(base, where))

    def left_out(
        self, base: Hashable, models: Sequence[Hashable], power: float, where: str
    ) -> None:
        """Warn of models that equal the base, whose norm has no negative power."""
        self._warn("left out", advice.left_out(base, models, power, where))

    def embeddings(self, models: Sequence[Hashable], shares: Sequence[float]) -> None:
        """Warn of models whose embeddings hold most of their squared norm."""
        for model, share in zip(models, shares, strict=True):
            self._warn(("embeddings", model), advice.embeddings(model, share))

    def coefficients(
        self,
        base: Hashable,
        models: Sequence[Hashable],
        shares: Sequence[float],
        sq_norms: Sequence[float] | None,
        where: str,
        *,
        weight: Sequence[float],
        scale: float,
        one_of_many: bool,
        visible: bool,
    ) -> None:
        """Say lambda: one visible line per set of models, a table at INFO.

        Args:
            base: id of the base.
            models: ids of the K models.
            shares: their coefficients before `lambda` scales them, summing to 1.
            sq_norms: their squared norms, or None where none were measured.
            where: the pool of tensors, for the reader.
            weight: of each model, by the configuration; said where it is not 1.
            scale: `lambda`, by which the merged task vector is scaled.
            one_of_many: whether other pools have other coefficients.
            visible: whether to show the line at WARNING (merges from files).
        """
        if visible and self._first("lambda", base, tuple(models)):
            line = ", ".join(
                f"{share:.4g} {model}" + (f" (weight {w:g})" if w != 1 else "")
                for share, model, w in zip(shares, models, weight, strict=True)
            )
            if scale != 1:
                line += f"; all times lambda: {scale:g}"
            more = "; -v lists all pools" if one_of_many else ""
            if os.environ.get(QUIET, "0") in ("", "0"):
                text = f"lambda of {where}: {line} (base {base}{more})"
                _log(logging.WARNING, "%s", text)
        if LOG.isEnabledFor(logging.INFO) and self._first(
            "table", base, where, tuple(models), tuple(shares)
        ):
            norms = sq_norms or [float("nan")] * len(shares)
            rows = [
                f"  {share:>10.6f} {norm**0.5:>12.6g}  {model}"
                for share, norm, model in zip(shares, norms, models, strict=True)
            ]
            table = "\n".join([f"  {'lambda':>10} {'||tau||':>12}  model", *rows])
            _log(logging.INFO, "task vectors of %s against %s:\n%s", where, base, table)

    def degenerate(
        self,
        base: Hashable,
        models: Sequence[Hashable],
        shares: Sequence[float],
        where: str,
        *,
        weighted: bool,
    ) -> None:
        """Warn if one model takes almost all, or gets almost nothing."""
        said = advice.degenerate(base, models, shares, where, weighted=weighted)
        self._warn("degenerate", said)

    def names_nothing(self, parts: Sequence[str]) -> None:
        """Warn of parts of `exclude` that are in no tensor's name."""
        self._warn("exclude", advice.names_nothing(parts))
