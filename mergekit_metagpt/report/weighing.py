"""Weighs the models on each pool of tensors that a scan measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_metagpt.merge_config.families import Family
from mergekit_metagpt.method import advice
from mergekit_metagpt.method.lengths import Lengths, Spread
from mergekit_metagpt.report import schema
from mergekit_metagpt.report.parts import natural, part_of
from mergekit_metagpt.scanning.results import Pooled, ScanResult

WHOLE = "the whole model"


@dataclass(frozen=True)
class Pool:
    """A pool of tensors, as reported and as the advice on it needs it.

    Attributes:
        reported: its norms and coefficients.
        weights: w_t of the K models; 0 for those that share no tensor of the pool.
        norms_count: whether the coefficients depend on squared norms.
        lengths: of its task vectors, and of their sum.
    """

    reported: schema.Pool
    weights: tuple[float, ...]
    norms_count: bool
    lengths: Lengths


def pools_of(family: Family, result: ScanResult, granularity: str) -> list[Pool]:
    """Weigh the models on each pool, from the embeddings to the head."""
    settings, count = family.settings, len(family.models)
    pooled = result.pool(granularity, settings.exclude)
    counted = [set(names.values()) for names in result.counted_as]

    def by_pool(values: torch.Tensor | None, *shape: int) -> list[Any]:
        """Split values by pool; None for each pool if there are none."""
        groups = len(pooled.keys)
        return [None] * groups if values is None else [*values.reshape(groups, *shape)]

    sq_norms = by_pool(pooled.sq_norms, count)
    base_sq_norms = by_pool(pooled.base_sq_norms, count)
    grams = by_pool(pooled.gram, count, count)
    sampled = pooled.covariances
    covariances = by_pool(None if sampled is None else sampled.sq_norms, count, count)
    sq_norm_errors = by_pool(pooled.sq_norm_errors, count)
    relative_norm_errors = by_pool(pooled.relative_norm_errors, count)
    pools = []
    for key in sorted(pooled.keys, key=_from_input_to_output):
        members, row = pooled.members[key], pooled.rows[key]
        weights = [
            0.0 if own.isdisjoint(members) else weight
            for weight, own in zip(family.weights, counted, strict=True)
        ]
        weight = torch.tensor(
            weights if members else family.weights, dtype=torch.float64, device="cpu"
        )
        norms_count = bool(members) and settings.power != 0
        measured, covariance = sq_norms[row], covariances[row]
        shares = settings.shares(measured if norms_count else None, weight)
        lengths = Lengths.of(shares, measured, grams[row])
        errors: dict[str, Any] = {}
        if covariance is not None:
            of_shares = settings.share_errors(measured, covariance, weight)
            errors = {
                "coefficients_se": of_shares.tolist(),
                "sq_norms_se": sq_norm_errors[row].tolist(),
                "relative_norms_se": relative_norm_errors[row].tolist(),
            }
        reported = schema.Pool(
            key=key,
            sq_norms=measured.tolist(),
            relative_norms=tuple(
                map(relative, measured.tolist(), base_sq_norms[row].tolist())
            ),
            coefficients=tuple(shares.tolist()),
            keep=lengths.keep,
            **errors,
        )
        pools.append(Pool(reported, tuple(weights), norms_count, lengths))
    return pools


def _from_input_to_output(key: str) -> tuple[object, ...]:
    """Sort key of pools: embeddings, layers in their order, final norm, head."""
    alone = ("embeddings", "", "norms", "head")
    part = "" if any(at.isdecimal() for at in key.split(".")) else part_of(key)
    return alone.index(part if part in alone else ""), natural(key)


def relative(sq_norm: float, base_sq_norm: float) -> float | None:
    """Return ||tau|| / ||theta_0||, or None where the base is zero."""
    return math.sqrt(sq_norm / base_sq_norm) if base_sq_norm else None


def lengths_of(
    family: Family, pools: Sequence[Pool], whole: Pooled
) -> schema.Lengths | None:
    """Compare the lengths of the task vectors and of their sum, over all pools."""
    spread = Spread.of(whole.sq_norms, torch.tensor(family.weights, device="cpu"))
    if spread is None or len(family.models) < 2:
        return None
    merged = [at.lengths.merged for at in pools if at.lengths.merged is not None]
    return schema.Lengths(
        inputs=math.hypot(*(pool.lengths.inputs for pool in pools)),
        merged=math.hypot(*merged) if whole.gram is not None else None,
        disparity=spread.disparity,
        gamma=spread.gamma,
    )


def degenerate(family: Family, pools: Sequence[Pool], result: ScanResult) -> str | None:
    """Warn of the first pool where a model takes almost all, or next to nothing."""
    settings = family.settings
    moved = [*map(any, zip(*(at.reported.sq_norms for at in pools), strict=True))]

    def warning(pool: Pool, where: str) -> str | None:
        # A LoRA adapts some layers: that it moved no other is no news.
        weights = [
            weight if sq_norm or not elsewhere else 0.0
            for weight, sq_norm, elsewhere in zip(
                pool.weights, pool.reported.sq_norms, moved, strict=True
            )
        ]
        return advice.degenerate(
            family.base,
            family.models,
            pool.reported.coefficients or (),
            weights,
            where,
            sq_norms=pool.reported.sq_norms if pool.norms_count else None,
            power=settings.power,
            whole=result if settings.granularity == "model" else None,
            exclude=settings.exclude,
            by_pool=settings.granularity != "model",
        )

    warned = [pool for pool in pools if warning(pool, "")]
    if not warned:
        return None
    key = warned[0].reported.key
    where = WHOLE if key == "model" else key
    if len(warned) > 1:
        where += f", and {len(warned) - 1} more of {len(pools)} pools"
    return warning(warned[0], where)
