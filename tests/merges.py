"""Checks whole merges by metagpt against float64: n_t, lambda and every element."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_metagpt
from tests.support import (
    State,
    assert_within_bound,
    bits,
    cast,
    naive_coefficients,
    naive_sq_norm,
    run_mergekit,
    solved_coefficients,
)

GRANULARITIES = ("model", "layer", "tensor")


def layer_of(name: str) -> str:
    """The pool of a tensor under `granularity: layer`."""
    found = re.match(r"(?:[^.]+\.)*?\d+(?=\.|$)", name)
    return found.group() if found else name


def common_part(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What two tensors of different lengths along one axis have in common."""
    cut = tuple(slice(min(s)) for s in zip(first.shape, second.shape, strict=True))
    return first[cut], second[cut]


def same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    alike = (first.dtype, first.shape) == (second.dtype, second.shape)
    return alike and torch.equal(bits(first), bits(second))


class Oracle:
    """n_t and lambda of design section 2, from whole state dicts in memory.

    Attributes:
        base: what the base stores, by output names.
        models: what the K models store.
        heads: for each head the embedding that it is, where it is absent or has the
            embedding's bits.
    """

    def __init__(
        self,
        base: State,
        models: Sequence[State],
        heads: Mapping[str, str] | None = None,
    ) -> None:
        self.base = base
        self.models = list(models)
        self.heads = dict(heads or {})
        self._measured = [self._measure(model) for model in self.models]

    def _root(self, state: State, name: str) -> str | None:
        embedding = self.heads.get(name)
        if embedding in state and (
            name not in state or same_bits(state[name], state[embedding])
        ):
            return embedding
        return name if name in state else None

    def _measure(self, model: State) -> tuple[dict[str, float], dict[str, str]]:
        """n of each tensor that counts, and under which name each one counts."""
        sq_norms: dict[str, float] = {}
        counted_as: dict[str, str] = {}
        met: dict[tuple[str, str], str] = {}
        names = {*self.base, *model, *self.heads}
        for name in sorted(names, key=lambda n: (n in self.heads, n)):
            first, second = self._root(self.base, name), self._root(model, name)
            if first is None or second is None:
                continue
            if (first, second) not in met:
                met[first, second] = name
                pair = common_part(self.base[first], model[second])
                sq_norms[name] = naive_sq_norm(*pair)
            counted_as[name] = met[first, second]
        return sq_norms, counted_as

    @property
    def names(self) -> set[str]:
        """All tensors that are stored anywhere."""
        return {*self.base}.union(*self.models)

    @property
    def sq_norms(self) -> torch.Tensor:
        """n_t over the whole model, shape `(K,)`."""
        sums = [sum(sq_norms.values()) for sq_norms, _ in self._measured]
        return torch.tensor(sums, dtype=torch.float64)

    def base_tensor(self, name: str) -> torch.Tensor:
        root = self._root(self.base, name)
        assert root is not None, f"the base has no {name}"
        return self.base[root]

    def tensors(self, name: str) -> list[torch.Tensor]:
        """What the models that have a tensor store of it."""
        roots = [self._root(model, name) for model in self.models]
        return [m[r] for m, r in zip(self.models, roots, strict=True) if r is not None]

    def as_dtype(self, dtype: torch.dtype) -> Oracle:
        """The same checkpoints in another precision."""
        models = [cast(model, dtype) for model in self.models]
        return Oracle(cast(self.base, dtype), models, self.heads)

    def lambdas(self, name: str, granularity: str = "model") -> torch.Tensor:
        """Coefficients of the models that have a tensor, in their order.

        Of all models, for a name that none has, as of layers that slices move.
        """
        pooled = []
        for model, (sq_norms, counted_as) in zip(
            self.models, self._measured, strict=True
        ):
            root = self._root(model, name)
            if root is None and name in self.names:
                continue
            if granularity == "tensor":
                assert root is not None
                pair = common_part(self.base_tensor(name), model[root])
                pooled.append(naive_sq_norm(*pair))
            elif granularity == "layer":
                layer = layer_of(counted_as[name])
                of_layer = (n for k, n in sq_norms.items() if layer_of(k) == layer)
                pooled.append(sum(of_layer))
            else:
                pooled.append(sum(sq_norms.values()))
        return naive_coefficients(torch.tensor(pooled, dtype=torch.float64))


def assert_sq_norms(
    oracle: Oracle, base: Path | str, models: Sequence[Path | str], **options: Any
) -> None:
    """Check n_t of the stored checkpoints, as `scan` finds it, to 1e-12 (relative)."""
    found = mergekit_metagpt.scan(base, models, **options).pool("model").sq_norms
    torch.testing.assert_close(found, oracle.sq_norms, rtol=1e-12, atol=0)


def assert_merged(
    merged: State,
    oracle: Oracle,
    granularity: str = "model",
    handed_over: Oracle | None = None,
) -> None:
    """Check every element against the bound of design section 2.

    `handed_over` holds the tensors that mergekit merges, where these are not the
    stored ones of `oracle`, whose coefficients apply.
    """
    given = handed_over or oracle
    assert merged.keys() == given.names
    for name, tensor in merged.items():
        lambdas = oracle.lambdas(name, granularity)
        base, models = given.base_tensor(name), given.tensors(name)
        dtype = base.dtype
        for model in models:
            dtype = torch.promote_types(dtype, model.dtype)
        assert tensor.dtype == dtype, (name, tensor.dtype, dtype)
        assert_within_bound(tensor, base, models, lambdas)


def assert_lambdas(merged: State, oracle: Oracle, granularity: str = "model") -> None:
    """Check to 1e-7 (relative) the coefficients that a float64 merge used."""
    pools: dict[tuple[float, ...], list[str]] = {}
    for name in merged:
        if len(oracle.tensors(name)) == len(oracle.models):
            lambdas = tuple(oracle.lambdas(name, granularity).tolist())
            pools.setdefault(lambdas, []).append(name)
    assert pools
    for lambdas, names in pools.items():
        base = {name: oracle.base_tensor(name) for name in names}
        rows = zip(*(oracle.tensors(name) for name in names), strict=True)
        models = [dict(zip(names, row, strict=True)) for row in rows]
        found = solved_coefficients(merged, base, models, names)
        expected = torch.tensor(lambdas, dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)


def with_granularity(config: Mapping[str, Any], granularity: str) -> dict[str, Any]:
    settings = {**config.get("parameters", {}), "granularity": granularity}
    return {**config, "parameters": settings}


def assert_merges(
    config: Mapping[str, Any],
    out: Path,
    oracle: Oracle,
    *options: str,
    granularity: str = "model",
) -> State:
    """Merge in the stored precision and check every element; return the result."""
    config = with_granularity(config, granularity)
    merged = run_mergekit(config, out / granularity, *options)
    assert_merged(merged, oracle, granularity)
    return merged


def assert_merges_exactly(
    config: Mapping[str, Any],
    out: Path,
    oracle: Oracle,
    *options: str,
    granularity: str = "model",
) -> State:
    """Merge in float64 and check every element and every lambda; return the result."""
    config = {**with_granularity(config, granularity), "dtype": "float64"}
    merged = run_mergekit(config, out / f"{granularity}64", *options)
    assert_lambdas(merged, oracle, granularity)
    exact = oracle.as_dtype(torch.float64)
    assert_merged(merged, oracle, granularity, handed_over=exact)
    return merged


def task_arithmetic(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same merge by mergekit's own method, with weights."""
    settings = {**config.get("parameters", {}), "weight": 0.5}
    return {**config, "merge_method": "task_arithmetic", "parameters": settings}


def assert_task_arithmetic_fails(
    config: Mapping[str, Any], folder: Path, message: str, *options: str
) -> None:
    """Check that mergekit's own method fails on these inputs, with that message."""
    with pytest.raises(Exception, match=re.escape(message)):
        run_mergekit(task_arithmetic(config), folder / "theirs", *options)
