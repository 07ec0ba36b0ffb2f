"""Settings of the closed form, which turn squared norms to shares."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter

from mergekit_metagpt.arithmetic.closed_form import (
    coefficients,
    contributes,
    restoring,
)
from mergekit_metagpt.arithmetic.standard_errors import of_coefficients
from mergekit_metagpt.scanning.pools import is_excluded, pool_key

Granularity = Literal["model", "layer", "tensor"]
Scale = FiniteFloat | Literal["keep"]
Share = Annotated[float, Field(gt=0, le=1)]
_LEGAL: dict[str, TypeAdapter[Any]] = {
    "weight": TypeAdapter(Annotated[FiniteFloat, Field(ge=0)]),
    "power": TypeAdapter(FiniteFloat),
    "lambda": TypeAdapter(Scale),
    "sample": TypeAdapter(Share),
    "density": TypeAdapter(Annotated[float, Field(ge=0, le=1)]),
    "gamma": TypeAdapter(Annotated[float, Field(ge=0, le=1)]),
}


def require_legal(name: str, value: Any) -> None:
    """Raise a ValidationError for an illegal value, of the type of its parameter."""
    if name in _LEGAL:
        _LEGAL[name].validate_python(value)


def split_exclude(text: str) -> tuple[str, ...]:
    """Return the parts of names in a comma-separated `exclude`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


class Settings(BaseModel):
    """Settings of the closed form for one tensor group, or for a whole model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    granularity: Granularity = "model"
    power: FiniteFloat = 2.0
    exclude: tuple[str, ...] = ()
    scale: Scale = Field(default=1.0, description="`lambda` of the YAML")
    sample: Share = Field(
        default=1.0, description="share of the weights that was asked for"
    )

    @classmethod
    def of(cls, bound: Any) -> Settings:
        """Make settings from parameters resolved by mergekit, by their YAML names."""
        return cls(
            granularity=bound["granularity"],
            power=bound["power"],
            exclude=split_exclude(bound["exclude"]),
            scale=bound["lambda"],
            sample=bound["sample"],
        )

    def shares(
        self, sq_norms: torch.Tensor | None, weight: torch.Tensor
    ) -> torch.Tensor:
        """Return the coefficients before `lambda` scales them.

        Args:
            sq_norms: n_t of the pool, shape `(K,)`, float64, or None if nothing was
                measured and only the weights count.
            weight: w_t, shape `(K,)`, float64.

        Returns:
            shape `(K,)`, float64, summing to 1, or to 0 if the base is kept.
        """
        power = self.power
        if sq_norms is None:
            power, sq_norms = 0.0, torch.zeros_like(weight)
        if not bool(contributes(sq_norms, weight, power).any()):
            return torch.zeros_like(weight)
        return coefficients(sq_norms, weight, power)

    @property
    def keeps_length(self) -> bool:
        """Whether `lambda` is `keep`, and needs inner products."""
        return self.scale == "keep"

    @property
    def needs_norms(self) -> bool:
        """Whether any squared norm matters."""
        return self.power != 0 or self.keeps_length

    def factor(self, shares: torch.Tensor, gram: torch.Tensor | None) -> torch.Tensor:
        """Return the factor on the merged task vector.

        Args:
            shares: lambda_t, shape `(K,)`, float64.
            gram: inner products of the pool, shape `(K, K)`, float64. If None, nothing
                was measured: there is no length to keep, and the factor is 1.

        Returns:
            `lambda`, or the value of `lambda: keep`, shape `()`, float64.

        Raises:
            ValueError: the task vectors cancel each other.
        """
        if self.scale != "keep":
            return torch.tensor(self.scale, dtype=torch.float64, device="cpu")
        if gram is None:
            return torch.ones((), dtype=torch.float64, device="cpu")
        return restoring(shares, gram)

    def share_errors(
        self, sq_norms: torch.Tensor, covariance: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """Return standard errors of shares, shape `(K,)`, from estimates of n_t.

        `covariance` of the estimates has shape `(K, K)`; `sq_norms` and `weight` are as
        in `shares`.
        """
        shares = self.shares(sq_norms, weight)
        return of_coefficients(sq_norms, covariance, shares, self.power)

    def counts(self, name: str | None) -> bool:
        """Whether a tensor counts in squared norms."""
        return not is_excluded(name or "", self.exclude)

    def pool(self, name: str | None) -> str:
        """Name the pool of a tensor, for messages."""
        if self.granularity == "model":
            return "the whole model"
        return "this tensor" if name is None else pool_key(name, self.granularity)
