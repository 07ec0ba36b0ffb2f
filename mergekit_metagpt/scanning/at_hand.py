"""Measures the tensors of a base and its models in memory; opens no file."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from mergekit_metagpt.arithmetic import squared_norms
from mergekit_metagpt.scanning.results import ScanResult


def _zero() -> torch.Tensor:
    return torch.zeros((), dtype=torch.float64, device="cpu")


@dataclass(frozen=True)
class Row:
    """One tensor of a base and its models.

    Attributes:
        name: unique among the rows.
        base: theta_0.
        models: theta_t of each model that has the tensor, by its column in the result.
        sq_norms: ||tau_t||^2 of these models, in their order, float64.
        base_sq_norm: ||theta_0||^2, shape `()`, float64.
        gram: <tau_s, tau_t>, in the order of `models`, or None.
        sort_key: key by which rows are ordered.
    """

    name: str
    base: torch.Tensor
    models: Mapping[int, torch.Tensor]
    sq_norms: torch.Tensor
    base_sq_norm: torch.Tensor = field(default_factory=_zero)
    gram: torch.Tensor | None = None
    sort_key: str = ""


def measure_states(
    base: Mapping[str, torch.Tensor],
    models: Sequence[Mapping[str, torch.Tensor]],
    *,
    gram: bool = False,
) -> ScanResult:
    """Measure the floating-point tensors of state dicts with the bits of a merge.

    Raises a ValueError if shapes differ, a tensor is not of floating point where the
    base's is, or a weight is NaN or infinite.
    """
    rows = []
    for name in sorted(base):
        tensor = base[name]
        tuned = {k: state[name] for k, state in enumerate(models) if name in state}
        if not tensor.is_floating_point() or not tuned:
            continue
        for k, other in tuned.items():
            if not other.is_floating_point():
                raise ValueError(
                    f"{name} of model {k} is {other.dtype}; expected floating point, "
                    "as in the base"
                )
            if other.shape != tensor.shape:
                raise ValueError(
                    f"{name} is {list(other.shape)} in model {k}, in the base "
                    f"{list(tensor.shape)}; expected equal shapes"
                )
        flat = [other.to(tensor.device) for other in tuned.values()]
        norms = squared_norms.sq_norms(tensor, flat)
        if not bool(torch.isfinite(norms).all()):
            norms = _unchanged(name, tensor, flat)
        nothing = torch.zeros_like(tensor)
        rows.append(
            Row(
                name=name,
                base=tensor,
                models=tuned,
                sq_norms=norms,
                base_sq_norm=squared_norms.sq_norms(nothing, [tensor])[0].detach(),
                gram=squared_norms.gram_matrix(tensor, flat) if gram else None,
                sort_key=name,
            )
        )
    labels = [f"model {k}" for k in range(len(models))]
    return result_of(rows, labels, base="base", gram=gram)


def _unchanged(
    name: str, base: torch.Tensor, tuned: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Squared norms of 0, if all models equal the base, infinities included."""
    if all(torch.equal(tensor, base) for tensor in tuned):
        return torch.zeros(len(tuned), dtype=torch.float64, device="cpu")
    finite = all(bool(torch.isfinite(t).all()) for t in (base, *tuned))
    raise ValueError(
        squared_norms.too_far(name)
        if finite
        else f"{name} holds NaN or infinity; repair or replace this model"
    )


def result_of(
    rows: Sequence[Row], models: Sequence[str], *, base: str = "", gram: bool = False
) -> ScanResult:
    """Put measured rows together; entries that share storage count once.

    A shared weight counts under one name, whatever the order of the rows; a tied head
    counts under the name of its embedding. Rows with equal keys are ordered by their
    norms, so that the sums do not depend on the order of the rows.

    Args:
        rows: rows with different names.
        models: names of the K models.
        base: name of the base.
        gram: whether rows have inner products.

    Returns:
        the result, differentiable if norms are.
    """
    count = len(models)
    order = sorted(
        range(len(rows)),
        key=lambda at: (rows[at].sort_key, rows[at].sq_norms.tolist(), at),
    )
    place_of = {at: n for n, at in enumerate(order)}
    cells = [[_zero()] * count for _ in rows]
    of_base = torch.zeros(len(rows), count, dtype=torch.float64, device="cpu")
    products = torch.zeros(len(rows), count, count, dtype=torch.float64, device="cpu")
    counted_as: list[dict[str, str]] = [{} for _ in models]
    names: dict[tuple[Hashable, ...], str] = {}
    for at in sorted(order, key=lambda at: ("head" in rows[at].name, place_of[at])):
        row, n = rows[at], place_of[at]
        counted = []
        for k, (column, tensor) in enumerate(row.models.items()):
            place = column, _place(row.base), _place(tensor)
            counted_as[column][row.name] = names.setdefault(place, row.name)
            if names[place] == row.name:
                cells[n][column] = row.sq_norms[k]
                of_base[n, column] = row.base_sq_norm
                counted.append((k, column))
        for k, column in counted if row.gram is not None else ():
            for other, other_column in counted:
                assert row.gram is not None
                products[n, column, other_column] = row.gram[k, other]
    values = [value for cell in cells for value in cell]
    sums = torch.stack(values) if values else torch.zeros(0, device="cpu").double()
    return ScanResult(
        base=base,
        models=tuple(models),
        names=tuple(rows[at].name for at in order),
        sq_norms=sums.reshape(len(rows), count),
        base_sq_norms=of_base,
        counted_as=tuple(counted_as),
        layers=({},) * count,
        gram=products if gram else None,
    )


def _place(tensor: torch.Tensor) -> tuple[Hashable, ...]:
    """Identify the memory of a tensor's elements; an empty tensor has its own."""
    if not tensor.numel():
        return (id(tensor),)
    start = tensor.data_ptr(), tensor.device, tensor.dtype
    return (*start, tensor.shape, tensor.stride())
