"""The methods' YAML parameters: their schema, legal values and bound form."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from mergekit.merge_methods.base import ParameterScope, ParameterSpec, TensorGroup
from pydantic import ValidationError

from mergekit_metagpt.arithmetic.closed_form import coefficients, contributes
from mergekit_metagpt.scanning.pools import pool_key


@dataclass(frozen=True)
class CheckedParameter(ParameterSpec):
    """A parameter whose error names it and its legal values (pydantic's names neither).

    `seen` is told every legal value.
    """

    legal: str = ""
    accepts: Callable[[Any], bool] = lambda value: True
    seen: Callable[[Any], None] = lambda value: None

    def validate(self, value: Any) -> Any:
        """Return the value in its type.

        Args:
            value: as the YAML has it.

        Returns:
            the value, converted.

        Raises:
            ValueError: it is of another type or not among the legal values.
        """
        try:
            checked = super().validate(value)
        except ValidationError:
            legal = False
        else:
            legal = self.accepts(checked)
        if not legal:
            raise ValueError(f"{self.name} is {value!r}; expected {self.legal}")
        self.seen(checked)
        return checked


def own_parameters(
    saw_weight: Callable[[float], None] = lambda value: None,
) -> tuple[CheckedParameter, ...]:
    """Return the parameters of `metagpt`; every weight read is told to `saw_weight`."""
    return (
        CheckedParameter(
            "granularity",
            str,
            ParameterScope.SHARED,
            default="model",
            description="tensors over which squared norms are pooled",
            legal="'model', 'layer' or 'tensor'",
            accepts=("model", "layer", "tensor").__contains__,
        ),
        CheckedParameter(
            "weight",
            float,
            ParameterScope.NON_BASE,
            default=1.0,
            description="importance of a model, before norms are taken into account",
            legal="a finite number >= 0",
            accepts=lambda value: 0 <= value < math.inf,
            seen=saw_weight,
        ),
        CheckedParameter(
            "power",
            float,
            ParameterScope.SHARED,
            default=2.0,
            description="exponent of the norms: 2 is MetaGPT, 0 the plain average",
            legal="a finite number",
            accepts=math.isfinite,
        ),
        CheckedParameter(
            "lambda",
            float,
            ParameterScope.SHARED,
            default=1.0,
            description="scale of the merged task vector",
            legal="a finite number",
            accepts=math.isfinite,
        ),
        CheckedParameter(
            "exclude",
            str,
            ParameterScope.SHARED,
            default="",
            description="comma-separated parts of tensor names that do not count",
            legal="a string of comma-separated parts of tensor names",
        ),
    )


def no_base(method: str, place: str | None) -> str:
    """Return what to say of a merge without a base."""
    where = f" for {place}" if place else ""
    return (
        f"{method} measures task vectors against a base, and none is given{where}. Add "
        "`base_model:` with the model that all others were fine-tuned from"
    )


def only_base(base: object) -> str:
    """Return what to say of a merge of nothing but its base."""
    return (
        f"only the base {base} is given: there is nothing to merge. Add the fine-tuned "
        "models under `models:`"
    )


def all_zero() -> str:
    """Return what to say of a merge in which no model has a weight."""
    return (
        "weight is 0 for every model: nothing would be merged. Give at least one model "
        "a weight > 0, or leave weight out"
    )


@dataclass(frozen=True)
class Settings:
    """What shapes the coefficients of one tensor group: its bound parameters.

    `weight` has shape `(K,)`, float64, in the order of the group's non-base entries.
    """

    granularity: str
    power: float
    exclude: tuple[str, ...]
    weight: torch.Tensor
    scale: float

    @classmethod
    def of(cls, group: TensorGroup, bound: dict[str, Any]) -> Settings:
        """Read the parameters that mergekit bound for a group."""
        weights = bound["weight"].values_for(group.non_base)
        parts = (part.strip() for part in bound["exclude"].split(","))
        return cls(
            granularity=bound["granularity"],
            power=bound["power"],
            exclude=tuple(part for part in parts if part),
            weight=torch.tensor(weights, dtype=torch.float64, device="cpu"),
            scale=bound["lambda"],
        )

    def shares(self, sq_norms: torch.Tensor | None) -> torch.Tensor:
        """Return the coefficients before `lambda` scales them.

        Args:
            sq_norms: n_t of the pool, shape `(K,)`, float64, or None where nothing was
                measured and the weights alone count.

        Returns:
            shape `(K,)`, float64, summing to 1; or 0 where the base is to be kept.
        """
        if sq_norms is None:
            power, sq_norms = 0.0, torch.zeros_like(self.weight)
        else:
            power = self.power
        if not bool(contributes(sq_norms, self.weight, power).any()):
            return torch.zeros_like(self.weight)
        return coefficients(sq_norms, self.weight, power)

    def pool(self, name: str | None) -> str:
        """Name the pool of a tensor, for messages."""
        if self.granularity == "model":
            return "the whole model"
        return "this tensor" if name is None else pool_key(name, self.granularity)
