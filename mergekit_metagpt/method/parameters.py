"""Defines the methods' YAML parameters and refuses their illegal values."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import torch
from mergekit.merge_methods.base import ParameterScope, ParameterSpec, TensorGroup
from pydantic import ValidationError


@dataclass(frozen=True)
class CheckedParameter(ParameterSpec):
    """A parameter whose errors name it and its legal values, unlike pydantic's.

    `saw` is called with the name and value of each parameter that is read.
    """

    legal: str = ""
    saw: Callable[[str, Any], None] = lambda name, value: None

    def validate(self, value: Any) -> Any:
        """Convert a value of the YAML; a ValueError names what would be legal."""
        # Imported here, so that `import mergekit` does not load pydantic's fields.
        from mergekit_metagpt.method.settings import require_legal

        said = f"{self.name} is {value!r}; expected {self.legal}"
        if isinstance(value, bool) and self.value_type is not bool:
            raise ValueError(said)  # pydantic would take it as 0 or 1
        try:
            checked = super().validate(value)
            require_legal(self.name, checked)
        except ValidationError as error:
            if isinstance(value, str) and re.fullmatch(r"\d+(\.\d+)?%", value):
                share = float(value[:-1]) / 100
                with suppress(ValidationError):
                    require_legal(self.name, super().validate(share))
                    said += f". Write {self.name}: {share:g}"
            raise ValueError(said) from error
        self.saw(self.name, checked)
        return checked


def own_parameters(
    saw: Callable[[str, Any], None] = lambda name, value: None,
) -> tuple[CheckedParameter, ...]:
    """Return the parameters of `metagpt`; see `CheckedParameter` for `saw`."""
    shared = ParameterScope.SHARED
    parameter = functools.partial(CheckedParameter, saw=saw)
    return (
        parameter(
            "granularity",
            Literal["model", "layer", "tensor"],
            shared,
            default="model",
            description="tensors over which squared norms are pooled",
            legal="'model', 'layer' or 'tensor'",
        ),
        parameter(
            "weight",
            float,
            ParameterScope.NON_BASE,
            default=1.0,
            description="importance of a model, before norms are taken into account",
            legal="a finite number >= 0",
        ),
        parameter(
            "power",
            float,
            shared,
            default=2.0,
            description="exponent of the norms: 2 is MetaGPT, 0 the plain average",
            legal="a finite number",
        ),
        parameter(
            "lambda",
            float | Literal["keep"],
            shared,
            default=1.0,
            description="scale of the merged task vector; keep restores its length",
            legal="a finite number or 'keep'",
        ),
        parameter(
            "exclude",
            str,
            shared,
            default="",
            description="comma-separated parts of tensor names that do not count",
            legal="a string of comma-separated parts of tensor names",
        ),
        parameter(
            "sample",
            float,
            shared,
            default=1.0,
            description="share of the weights from which norms are estimated",
            legal="a number above 0 and at most 1",
        ),
    )


def density() -> CheckedParameter:
    """Return mergekit's parameter of sparsifying methods, which refuses 50 for 0.5."""
    return CheckedParameter(
        "density",
        float,
        ParameterScope.NON_BASE,
        default=1.0,
        legal="a number from 0 to 1, the share of elements that are kept",
    )


def named(parameter: ParameterSpec) -> ParameterSpec:
    """Return a parameter of mergekit's whose errors name it."""
    if parameter.name == "density":
        return density()
    legal = {bool: "true or false", float: "a number"}.get(parameter.value_type)
    if parameter.name == "gamma":
        legal = "a number from 0 to 1, the share of largest elements that are dropped"
    if legal is None:
        return parameter
    return CheckedParameter(
        parameter.name,
        parameter.value_type,
        parameter.scope,
        default=parameter.default,
        description=parameter.description,
        legal=legal,
    )


def checked(name: str, value: Any) -> Any:
    """Convert the value of a parameter of our methods; refuse it by a ValueError."""
    (parameter,) = (p for p in (*own_parameters(), density()) if p.name == name)
    return parameter.validate(value)


def checked_of(model: object, name: str, value: Any) -> Any:
    """Convert a parameter of one model; unlike mergekit, name the model in errors."""
    try:
        return checked(name, value)
    except ValueError as error:
        said = str(error).removeprefix(f"{name} ")
        raise ValueError(f"{name} of {model} {said}") from error


def no_base(method: str, place: str | None) -> str:
    """Return the error of a merge without a base."""
    where = f" for {place}" if place else ""
    return (
        f"{method} measures task vectors against a base, and none is given{where}. Add "
        "`base_model:` with the model that all others were fine-tuned from"
    )


def only_base(base: object) -> str:
    """Return the error of a merge with no model but the base."""
    return (
        f"only the base {base} is given: there is nothing to merge. Add the fine-tuned "
        "models under `models:`"
    )


def all_zero() -> str:
    """Return the error of a merge in which every weight is 0."""
    return (
        "weight is 0 for every model: nothing would be merged. Give at least one model "
        "a weight > 0, or leave weight out"
    )


def require_named(exclude: Sequence[str], names: Iterable[str]) -> None:
    """Refuse parts of `exclude` that are in no name, such as misspelt ones.

    Args:
        exclude: parts of names.
        names: output names of all tensors of base and models.

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
    """Refuse a `sample` that differs by tensor, or would have no effect.

    Args:
        shares: values of `sample` on all tensors.
        granularities: values of `granularity` on all tensors.

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
            f"sample is {values[0]:g}, but granularity 'tensor' measures tensors as "
            "they are merged, so that a sample saves nothing. Leave sample out, or "
            "use granularity: model or granularity: layer"
        )


def weights_of(group: TensorGroup, bound: dict[str, Any]) -> torch.Tensor:
    """Return w_t of a group's models, shape `(K,)`, float64, as mergekit bound it."""
    values = bound["weight"].values_for(group.non_base)
    return torch.tensor(values, dtype=torch.float64, device="cpu")
