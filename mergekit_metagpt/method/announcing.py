"""Logs the coefficients of a merge, and warnings about them, once each."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mergekit_metagpt.method.settings import Settings

LOG = logging.getLogger("mergekit_metagpt")
QUIET = "MERGEKIT_METAGPT_QUIET"


def log(level: int, message: str, *values: object) -> None:
    """Log a line without breaking mergekit's progress bar."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        LOG.log(level, message, *values)


def estimates(
    values: Sequence[float | None],
    errors: Sequence[float | None],
    exact: Callable[[float], str] = "{:.4g}".format,
    *,
    least: int = 0,
    most: int = 99,
    sign: str = "",
) -> list[str]:
    """Write a column of values with their standard errors, all with the same decimals.

    Args:
        values: estimates; None becomes a dash.
        errors: their standard errors; None or 0 where a value is exact.
        exact: writes exact values.
        least: decimals of estimates, at least.
        most: decimals of estimates, at most.
        sign: of the numbers, as in a format.

    Returns:
        a text for each value, with the decimals that the first digits of the errors
        take. An error below a hundredth of the largest one takes decimals of its own.

    Example:
        >>> estimates([0.65612, 0.34388], [0.0041, 0.00099])
        ['0.6561 ± 0.0041', '0.3439 ± 0.0010']
        >>> estimates([0.65612, 0.5], [0.0041, None])
        ['0.656 ± 0.004', '0.5']
    """
    known = [error for error in errors if error]
    if not known:
        return ["-" if value is None else exact(value) for value in values]

    def decimals(error: float) -> int:
        return min(max(least, -math.floor(math.log10(error))), most)

    common = max(decimals(error) for error in known if 100 * error >= max(known))
    cells = []
    for value, error in zip(values, errors, strict=True):
        if value is None or not error:
            cells.append("-" if value is None else exact(value))
            continue
        digits = max(common, decimals(error))
        # Plus 0.0, which makes -0.0 positive.
        cell = f"{round(value, digits) + 0.0:{sign}.{digits}f}"
        cells.append(f"{cell} ± {error:.{digits}f}")
    return cells


class Announcer:
    """Logs each kind of message once per merge.

    Args:
        warned: whether all warnings were given before the merge; if so, only the
            coefficients are logged.
    """

    def __init__(self, *, warned: bool = False) -> None:
        self.warned = warned
        self._lock = threading.Lock()
        self._logged: set[Hashable] = set()

    def first_of(self, *kind: Hashable) -> bool:
        with self._lock:
            new = kind not in self._logged
            self._logged.add(kind)
        return new

    def warn(self, kind: Hashable, message: str | None) -> None:
        """Log a warning, unless there is none or one of this kind was logged."""
        if message and not self.warned and self.first_of("warning", kind):
            log(logging.WARNING, "%s", message)

    def coefficients(
        self,
        base: Hashable,
        models: Sequence[Hashable],
        shares: Sequence[float],
        sq_norms: Sequence[float] | None,
        where: str,
        *,
        settings: Settings,
        scale: float,
        errors: Sequence[float] | None,
        weight: Sequence[float],
        varying: bool,
        visible: bool,
    ) -> None:
        """Log the coefficients: one line for each set of models, and a table at INFO.

        `shares` sum to 1: `scale` is the factor on their sum. `sq_norms` is None if
        nothing was measured, `errors` if shares are exact. `where` is the pool, in
        words. The line is at WARNING, if `visible` (in merges from files).
        """
        if visible and self.first_of("coefficients", base, tuple(models)):
            figures = estimates(shares, errors or [None] * len(shares))
            line = ", ".join(
                f"{figure} {model}" + (f" (weight {w:g})" if w != 1 else "")
                for figure, model, w in zip(figures, models, weight, strict=True)
            )
            if settings.keeps_length:
                about = "" if errors is None else "about "
                line += f", their sum scaled by lambda {about}{scale:.4g} (keep)"
            elif scale != 1:
                line += f", their sum scaled by lambda {scale:g}"
            how = f"power {settings.power:g}"
            if settings.exclude:
                how += f", without {', '.join(settings.exclude)}"
            if errors is not None:
                how += f", estimated from a sample of {settings.sample:g}"
            elif settings.sample < 1 and sq_norms is not None:
                how += f", exact: no sample of {settings.sample:g} was needed"
            more = "; -v lists all pools" if settings.granularity != "model" else ""
            if varying:
                more += (
                    "; maybe others elsewhere, as the YAML sets parameters tensor by "
                    "tensor: see their range by mergekit-metagpt inspect"
                )
            if os.environ.get(QUIET, "0") in ("", "0"):
                text = f"coefficients of {where} ({how}): {line} (base {base}{more})"
                log(logging.WARNING, "%s", text)
        if LOG.isEnabledFor(logging.INFO) and self.first_of(
            "table", base, where, tuple(models), tuple(shares)
        ):
            norms = sq_norms or [float("nan")] * len(shares)
            rows = [
                f"  {share:>11.6f} {norm**0.5:>12.6g}  {model}"
                for share, norm, model in zip(shares, norms, models, strict=True)
            ]
            table = "\n".join([f"  {'coefficient':>11} {'||tau||':>12}  model", *rows])
            log(logging.INFO, "task vectors of %s against %s:\n%s", where, base, table)
