"""The methods' YAML parameters: their schema, legal values and bound form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from mergekit.merge_methods.base import ParameterScope, ParameterSpec, TensorGroup
from pydantic import ValidationError


@dataclass(frozen=True)
class CheckedParameter(ParameterSpec):
    """A parameter whose error names it and its legal values (pydantic's names neither).

    `saw` is told the name and every legal value.
    """

    legal: str = ""
    saw: Callable[[str, Any], None] = lambda name, value: None

    def validate(self, value: Any) -> Any:
        """Return the value in its type.

        Args:
            value: as the YAML has it.

        Returns:
            the value, converted.

        Raises:
            ValueError: it is of another type or not among the legal values.
        """
        # Imported here: `import mergekit` registers parameters, and reads no values.
        from mergekit_metagpt.method.settings import require_legal

        try:
            checked = super().validate(value)
            require_legal(self.name, checked)
        except ValidationError as error:
            raise ValueError(
                f"{self.name} is {value!r}; expected {self.legal}"
            ) from error
        self.saw(self.name, checked)
        return checked


def own_parameters(
    saw: Callable[[str, Any], None] = lambda name, value: None,
) -> tuple[CheckedParameter, ...]:
    """Return the parameters of `metagpt`; `saw` is told name and value of all read."""
    shared = ParameterScope.SHARED
    return (
        CheckedParameter(
            "granularity",
            str,
            shared,
            default="model",
            description="tensors over which squared norms are pooled",
            legal="'model', 'layer' or 'tensor'",
            saw=saw,
        ),
        CheckedParameter(
            "weight",
            float,
            ParameterScope.NON_BASE,
            default=1.0,
            description="importance of a model, before norms are taken into account",
            legal="a finite number >= 0",
            saw=saw,
        ),
        CheckedParameter(
            "power",
            float,
            shared,
            default=2.0,
            description="exponent of the norms: 2 is MetaGPT, 0 the plain average",
            legal="a finite number",
            saw=saw,
        ),
        CheckedParameter(
            "lambda",
            float | Literal["keep"],
            shared,
            default=1.0,
            description="scale of the merged task vector; keep restores its length",
            legal="a finite number or 'keep'",
            saw=saw,
        ),
        CheckedParameter(
            "exclude",
            str,
            shared,
            default="",
            description="comma-separated parts of tensor names that do not count",
            legal="a string of comma-separated parts of tensor names",
            saw=saw,
        ),
        CheckedParameter(
            "sample",
            float,
            shared,
            default=1.0,
            description="share of the weights from which norms are estimated",
            legal="a number above 0 and at most 1",
            saw=saw,
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


def require_named(exclude: Sequence[str], names: Iterable[str]) -> None:
    """Refuse parts of `exclude` that leave nothing out, such as a misspelt one.

    Args:
        exclude: parts of names.
        names: output names of all tensors that base and models have.

    Raises:
        ValueError: a part is in none of the names.
    """
    names = set(names)
    unused = [part for part in exclude if not any(part in name for name in names)]
    if unused:
        raise ValueError(
            f"exclude: {', '.join(unused)} is in no tensor's name; expected a part of "
            f"a stored name, such as {min(names, default='embed_tokens')}"
        )


def require_one_sample(shares: Iterable[float], granularities: Iterable[str]) -> None:
    """Refuse a `sample` that is not one number, or that nothing is read for.

    Args:
        shares: its values, of all tensors.
        granularities: of all tensors.

    Raises:
        ValueError: the values differ, or norms are pooled by tensor.
    """
    values = sorted(set(shares))
    if len(values) > 1:
        raise ValueError(
            f"sample is {values[0]:g} on some tensors and {values[-1]:g} on others; "
            "expected one number for the whole merge. Give it once, in the "
            "`parameters:` at the end of the YAML"
        )
    if values and values[0] < 1 and "tensor" in granularities:
        raise ValueError(
            f"sample is {values[0]:g}, but granularity 'tensor' measures each tensor "
            "as it is merged, and reads nothing for it. Leave sample out, or use "
            "granularity: model or granularity: layer"
        )


def weights_of(group: TensorGroup, bound: dict[str, Any]) -> torch.Tensor:
    """Return the weights that mergekit bound for the models of a group.

    Args:
        group: the inputs that make one output tensor.
        bound: values by the names of the YAML.

    Returns:
        w_t, shape `(K,)`, float64, in the order of the non-base entries.
    """
    values = bound["weight"].values_for(group.non_base)
    return torch.tensor(values, dtype=torch.float64, device="cpu")
