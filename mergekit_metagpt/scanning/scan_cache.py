"""Stores scan results in the cache, and reads them back with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field, FiniteFloat

from mergekit_metagpt.arithmetic.standard_errors import Covariances
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.scanning import cache
from mergekit_metagpt.scanning.results import Sampled, ScanResult

SqNorm = Annotated[FiniteFloat, Field(ge=0)]


class _Pair(cache.Content):
    """A `ScanResult` of one model; `counted_as` omits names that map to themselves."""

    kind = "pair"
    sq_norms: dict[str, SqNorm]
    base_sq_norms: dict[str, SqNorm]
    counted_as: dict[str, str]
    layers: dict[str, str]


class _Gram(cache.Content):
    """The upper triangle of each tensor's Gram matrix, row by row."""

    kind = "gram"
    gram: dict[str, list[FiniteFloat]]


class _Estimates(cache.Content):
    """A `ScanResult` from a sample, as nested lists by tensor and model."""

    kind = "sample"
    names: list[str]
    sq_norms: list[list[SqNorm]]
    base_sq_norms: list[list[SqNorm]]
    gram: list[list[list[FiniteFloat]]] | None
    counted_as: list[dict[str, str]]
    layers: list[dict[str, str]]
    share: float
    seed: int
    bytes_read: int
    bytes_stored: int
    of_models: list[list[list[FiniteFloat]]]
    of_pairs: list[list[list[list[FiniteFloat]]]]


def _tensor(values: Sequence[object], *shape: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device="cpu").reshape(shape)


def read_pair(base: Checkpoint, model: Checkpoint) -> ScanResult | None:
    """Look up the scan of one model; None if it is not in the cache."""
    pair = cache.read_entry(_Pair, [base, model])
    if pair is None or pair.sq_norms.keys() != pair.base_sq_norms.keys():
        return None
    names = tuple(pair.sq_norms)
    return ScanResult(
        base=base.label,
        models=(model.label,),
        names=names,
        sq_norms=_tensor([pair.sq_norms[name] for name in names], -1, 1),
        base_sq_norms=_tensor([pair.base_sq_norms[name] for name in names], -1, 1),
        counted_as=({**dict(zip(names, names, strict=True)), **pair.counted_as},),
        layers=(pair.layers,),
    )


def write_pair(base: Checkpoint, model: Checkpoint, result: ScanResult) -> None:
    """Store the scan of one model."""
    if not bool(torch.isfinite(result.base_sq_norms).all()):
        return  # weights beyond 1e150: JSON has no infinity
    names, norms = result.names, result.sq_norms[:, 0].tolist()
    (counted_as,), (layers,) = result.counted_as, result.layers
    of_base = result.base_sq_norms[:, 0].tolist()
    pair = _Pair(
        sq_norms=dict(zip(names, norms, strict=True)),
        base_sq_norms=dict(zip(names, of_base, strict=True)),
        counted_as={name: other for name, other in counted_as.items() if name != other},
        layers=dict(layers),
    )
    cache.write_entry(pair, [base, model])


def read_gram(
    base: Checkpoint, models: Sequence[Checkpoint], names: Sequence[str]
) -> torch.Tensor | None:
    """Look up <tau_s, tau_t> on the N named tensors, those that count.

    Shape `(N, K, K)`, float64, for models in the order of the scan; None if they are
    not in the cache.
    """
    content, count = cache.read_entry(_Gram, [base, *models]), len(models)
    rows, columns = torch.triu_indices(count, count, device="cpu").unbind()
    if content is None or content.gram.keys() != set(names):
        return None
    if any(len(values) != len(rows) for values in content.gram.values()):
        return None
    upper = _tensor([content.gram[name] for name in names], len(names), len(rows))
    gram = upper.new_zeros(len(names), count, count)
    gram[:, rows, columns] = upper
    gram[:, columns, rows] = upper
    return gram


def write_gram(
    base: Checkpoint, models: Sequence[Checkpoint], result: ScanResult
) -> None:
    """Store the inner products of a scan."""
    assert result.gram is not None
    rows, columns = torch.triu_indices(len(models), len(models), device="cpu").unbind()
    upper = result.gram[:, rows, columns].tolist()
    content = _Gram(gram=dict(zip(result.names, upper, strict=True)))
    cache.write_entry(content, [base, *models])


def read_sample(
    base: Checkpoint, models: Sequence[Checkpoint], request: str
) -> ScanResult | None:
    """Look up estimates from a sample of models; None if they are not in the cache.

    `request` is share or budget, seed, and whether inner products were asked for.
    """
    content = cache.read_entry(_Estimates, [base, *models], request)
    if content is None:
        return None
    n, k = len(content.names), len(models)
    try:
        of_models = _tensor(content.of_models, 2, n, k)
        of_pairs = _tensor(content.of_pairs, len(content.of_pairs), n, k, k)
        return ScanResult(
            base=base.label,
            models=tuple(model.label for model in models),
            names=tuple(content.names),
            sq_norms=_tensor(content.sq_norms, n, k),
            base_sq_norms=_tensor(content.base_sq_norms, n, k),
            counted_as=tuple(content.counted_as),
            layers=tuple(content.layers),
            gram=None if content.gram is None else _tensor(content.gram, n, k, k),
            sampled=Sampled(
                share=content.share,
                seed=content.seed,
                bytes_read=content.bytes_read,
                bytes_stored=content.bytes_stored,
                covariances=Covariances(of_pairs[0], *of_models, *of_pairs[1:]),
            ),
        )
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        cache.LOG.info("cache entry not used: %s", error)
        return None


def write_sample(
    base: Checkpoint, models: Sequence[Checkpoint], request: str, result: ScanResult
) -> None:
    """Store estimates from a sample; `request` is as for `read_sample`."""
    sampled = result.sampled
    if sampled is None or not bool(torch.isfinite(result.base_sq_norms).all()):
        return
    own = sampled.covariances
    of_pairs = [own.sq_norms, own.gram, own.gram_and_sq_norms]
    content = _Estimates(
        names=list(result.names),
        sq_norms=result.sq_norms.tolist(),
        base_sq_norms=result.base_sq_norms.tolist(),
        gram=None if result.gram is None else result.gram.tolist(),
        counted_as=[dict(names) for names in result.counted_as],
        layers=[dict(names) for names in result.layers],
        share=sampled.share,
        seed=sampled.seed,
        bytes_read=sampled.bytes_read,
        bytes_stored=sampled.bytes_stored,
        of_models=[own.base_sq_norms.tolist(), own.sq_norms_and_base.tolist()],
        of_pairs=[values.tolist() for values in of_pairs if values is not None],
    )
    cache.write_entry(content, [base, *models], request)
