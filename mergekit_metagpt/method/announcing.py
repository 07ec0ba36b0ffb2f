"""Logs the coefficients of a merge, and warnings about them, once each."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Hashable, Sequence

LOG = logging.getLogger("mergekit_metagpt")
QUIET = "MERGEKIT_METAGPT_QUIET"


def log(level: int, message: str, *values: object) -> None:
    """Log a line above the progress bar that mergekit may be drawing."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        LOG.log(level, message, *values)


class Announcer:
    """Logs each kind of message of one merge once.

    Args:
        warned: whether all warnings were given before the merge began; then only the
            coefficients are logged.
    """

    def __init__(self, *, warned: bool = False) -> None:
        self.warned = warned
        self._lock = threading.Lock()
        self._logged: set[Hashable] = set()

    def _first(self, *kind: Hashable) -> bool:
        with self._lock:
            new = kind not in self._logged
            self._logged.add(kind)
        return new

    def warn(self, kind: Hashable, message: str | None) -> None:
        """Log a warning, the first of its kind.

        Args:
            kind: what the message is about.
            message: of `advice`; None says nothing.
        """
        if message and not self.warned and self._first("warning", kind):
            log(logging.WARNING, "%s", message)

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
                log(logging.WARNING, "%s", text)
        if LOG.isEnabledFor(logging.INFO) and self._first(
            "table", base, where, tuple(models), tuple(shares)
        ):
            norms = sq_norms or [float("nan")] * len(shares)
            rows = [
                f"  {share:>10.6f} {norm**0.5:>12.6g}  {model}"
                for share, norm, model in zip(shares, norms, models, strict=True)
            ]
            table = "\n".join([f"  {'lambda':>10} {'||tau||':>12}  model", *rows])
            log(logging.INFO, "task vectors of %s against %s:\n%s", where, base, table)
