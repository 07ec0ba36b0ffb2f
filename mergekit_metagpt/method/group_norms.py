"""Finds n_t for one tensor group of a merge from files."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from mergekit.merge_methods.base import TensorGroup

from mergekit_metagpt.arithmetic import squared_norms
from mergekit_metagpt.method.inputs import base_of, is_unchanged, require_finite
from mergekit_metagpt.method.parameters import require_named, require_one_sample

if TYPE_CHECKING:
    from mergekit_metagpt.method.settings import Settings
    from mergekit_metagpt.scanning.results import ScanResult


@dataclass(frozen=True)
class Measured:
    """Squared norms of one pool.

    Attributes:
        sq_norms: n_t, shape `(K,)`, float64, on the CPU.
        whole: the scan of the stored models, if the pool is the whole model.
        gram: inner products, shape `(K, K)`, float64, if `lambda` needs them.
        covariance: Cov(n_s, n_t), shape `(K, K)`, if n_t is estimated.
    """

    sq_norms: torch.Tensor
    whole: ScanResult | None = None
    gram: torch.Tensor | None = None
    covariance: torch.Tensor | None = None


@dataclass(frozen=True)
class Weighed:
    """The coefficients of one tensor group.

    Attributes:
        shares: coefficients before `lambda` scales them, shape `(K,)`, float64.
        scale: `lambda`, or the value of `lambda: keep`, shape `()`, float64.
        errors: standard errors of the shares, shape `(K,)`, if they are estimates.
    """

    shares: torch.Tensor
    scale: torch.Tensor
    errors: torch.Tensor | None


def weigh(
    measured: Measured | None, settings: Settings, weight: torch.Tensor
) -> Weighed:
    """Find the coefficients of a group from what was measured of its pool.

    Args:
        measured: n_t of the pool; None if only the weights count.
        settings: settings for this tensor.
        weight: w_t, shape `(K,)`, float64.

    Returns:
        the coefficients.

    Raises:
        ValueError: `lambda` is `keep`, and the task vectors cancel each other.
    """
    if measured is None:
        shares = settings.shares(None, weight)
        return Weighed(shares, settings.factor(shares, None), None)
    shares = settings.shares(measured.sq_norms, weight)
    errors = None
    if measured.covariance is not None:
        errors = settings.share_errors(measured.sq_norms, measured.covariance, weight)
    return Weighed(shares, settings.factor(shares, measured.gram), errors)


def of_group(group: TensorGroup, settings: Settings) -> Measured | None:
    """Measure n_t for one group of a merge from files.

    It is measured on the stored checkpoints, or under `granularity: tensor` on the
    tensors of the group.

    Args:
        group: the inputs of one output tensor.
        settings: settings for this tensor.

    Returns:
        n_t of the pool, or None if norms do not matter: at power 0, without a model
        beside the base, or if `exclude` leaves nothing of the pool.

    Raises:
        ValueError: a weight is NaN or infinite; the checkpoints are not open, or
            hold nothing of this layer; a part of `exclude` is in no name.
        OSError: a checkpoint cannot be read or has changed.
    """
    if not group.non_base:
        return None
    if not settings.needs_norms:
        require_finite(group)
        return None
    if settings.granularity == "tensor":
        if not settings.counts(group.metadata.name):
            require_finite(group)
            return None
        # PlanWatch has checked this already, except under mergekit-pytorch.
        require_one_sample([settings.sample], [settings.granularity])
        norms = of_tensors(group)
        return Measured(norms, gram=gram_of(group) if settings.keeps_length else None)
    return _of_checkpoints(group, settings)


def of_tensors(group: TensorGroup) -> torch.Tensor:
    """Measure n_t on the tensors of one group: shape `(K,)`, float64, on the CPU.

    Differentiable if an input is. Raises a TypeError if an input is not floating point,
    a ValueError if a weight is NaN or infinite.
    """
    for entry in group.entries:
        if not entry.tensor.is_floating_point():
            raise TypeError(
                f"{group.metadata.name or 'a tensor'} of {entry.id} is "
                f"{entry.tensor.dtype}; MetaGPT merges floating-point tensors"
            )
    tuned = [entry.tensor for entry in group.non_base]
    norms = squared_norms.sq_norms(base_of(group).tensor, tuned)
    if not bool(torch.isfinite(norms).all()):
        if is_unchanged(group):
            return torch.zeros_like(norms)
        require_finite(group)
        raise ValueError(squared_norms.too_far(group.metadata.name or "a tensor"))
    return norms


def gram_of(group: TensorGroup) -> torch.Tensor:
    """Compute <tau_s, tau_t> of one group, which `of_tensors` has checked.

    Shape `(K, K)`, float64, on the CPU; differentiable if an input is.
    """
    tuned = [entry.tensor for entry in group.non_base]
    gram = squared_norms.gram_matrix(base_of(group).tensor, tuned)
    # Only infinities that no model changed give products that are not finite.
    return torch.where(torch.isfinite(gram), gram, 0.0)


def _of_checkpoints(group: TensorGroup, settings: Settings) -> Measured | None:
    # Imported here: they need transformers, which `import mergekit` does not wait for.
    from mergekit_metagpt.checkpoints.opening import already_open
    from mergekit_metagpt.scanning import once
    from mergekit_metagpt.scanning.sampling import Sample

    opened = {entry.id: already_open(entry.id) for entry in group.entries}
    if missing := [str(model) for model, at in opened.items() if at is None]:
        raise ValueError(
            f"granularity {settings.granularity!r} measures stored checkpoints, but "
            f"mergekit has none open for {', '.join(missing)}. Give models as files, "
            "or use granularity: tensor"
        )
    checkpoints = {model: at for model, at in opened.items() if at is not None}
    _check_exclude(settings.exclude, tuple(at.names for at in checkpoints.values()))
    base = checkpoints.pop(base_of(group).id)
    keep, sample = settings.keeps_length, Sample(share=settings.sample)
    result = once.measure(base, list(checkpoints.values()), gram=keep, sample=sample)
    if settings.granularity == "model":
        pooled = result.pool("model", settings.exclude)
        if not pooled.members["model"]:
            return None
        variances = pooled.covariances
        return Measured(
            pooled.sq_norms,
            result,
            gram=pooled.gram if keep else None,
            covariance=None if variances is None else variances.sq_norms,
        )
    name = group.metadata.name or ""
    keys = [result.layer_of(name, at) for at in range(len(checkpoints))]
    stored = result.pool("layer")
    if not all(key in stored.members for key in keys):
        raise ValueError(
            f"granularity 'layer': no stored tensor of {base.label} belongs to "
            f"the layer of {name}. Use granularity: model or granularity: tensor"
        )
    pooled = result.pool("layer", settings.exclude)
    if not any(key in pooled.members for key in keys):
        return None
    columns, covariance = range(len(keys)), None
    if pooled.covariances is not None:
        covariance = torch.zeros(
            len(keys), len(keys), dtype=torch.float64, device="cpu"
        )
        for at, key in enumerate(keys):
            if key in pooled.members:
                # Layers with different names were sampled independently.
                same = torch.tensor([key == other for other in keys], device="cpu")
                own = pooled.covariances.sq_norms[pooled.rows[key], at]
                covariance[at] = own * same
    return Measured(
        pooled.of_models(keys, columns),
        gram=pooled.products(keys, columns) if keep else None,
        covariance=covariance,
    )


# Called for every tensor, so cached for the names of the last few merges.
@functools.lru_cache(maxsize=16)
def _check_exclude(exclude: tuple[str, ...], names: tuple[frozenset[str], ...]) -> None:
    if exclude:
        require_named(exclude, frozenset().union(*names))
