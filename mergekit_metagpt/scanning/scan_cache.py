"""Stores scan results in the cache, and reads them back with the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from mergekit_metagpt.arithmetic.standard_errors import Covariances
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.scanning import cache
from mergekit_metagpt.scanning.results import Sampled, ScanResult

SqNorm = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Pair(cache.Content):
    """A `ScanResult` of one model; `counted_as` omits names that map to themselves."""

    sq_norms: dict[str, SqNorm]
    base_sq_norms: dict[str, SqNorm]
    counted_as: dict[str, str]
    layers: dict[str, str]


class _Gram(cache.Content):
    """The upper triangle of each tensor's Gram matrix, row by row."""

    gram: dict[str, list[cache.Finite]]


class _Estimates(cache.Content):
    """A `ScanResult` from a sample, as nested lists by tensor and model."""

    names: list[str]
    sq_norms: list[list[SqNorm]]
    base_sq_norms: list[list[SqNorm]]
    gram: list[list[list[cache.Finite]]] | None
    counted_as: list[dict[str, str]]
    layers: list[dict[str, str]]
    share: float
    seed: int
    bytes_read: int
    bytes_stored: int
    of_models: list[list[list[cache.Finite]]]
    of_pairs: list[list[list[list[cache.Finite]]]]


def read_pair(base: Checkpoint, model: Checkpoint) -> ScanResult | None:
    """Look up the scan of one model.

    Args:
        base: the base.
        model: a fine-tune of it.

    Returns:
        the result, or None if it is not in the cache.
    """
    pair = cache.read_entry("pair", base, [model], _Pair)
    if pair is None or pair.sq_norms.keys() != pair.base_sq_norms.keys():
        return None
    names = tuple(pair.sq_norms)
    sums = [[pair.sq_norms[name], pair.base_sq_norms[name]] for name in names]
    columns = torch.tensor(sums, dtype=torch.float64, device="cpu").reshape(-1, 2)
    return ScanResult(
        base=base.label,
        models=(model.label,),
        names=names,
        sq_norms=columns[:, :1],
        base_sq_norms=columns[:, 1:],
        counted_as=({**dict(zip(names, names, strict=True)), **pair.counted_as},),
        layers=(pair.layers,),
    )


def write_pair(base: Checkpoint, model: Checkpoint, result: ScanResult) -> None:
    """Store the scan of one model.

    Args:
        base: the base.
        model: a fine-tune of it.
        result: the scan of this model alone.
    """
    if not bool(torch.isfinite(result.base_sq_norms).all()):
        return  # weights beyond 1e150: JSON has no infinity
    names = result.names
    (counted_as,), (layers,) = result.counted_as, result.layers
    pair = _Pair(
        sq_norms=dict(zip(names, result.sq_norms[:, 0].tolist(), strict=True)),
        base_sq_norms=dict(
            zip(names, result.base_sq_norms[:, 0].tolist(), strict=True)
        ),
        counted_as={name: other for name, other in counted_as.items() if name != other},
        layers=dict(layers),
    )
    cache.write_entry("pair", base, [model], pair)


def read_gram(
    base: Checkpoint, models: Sequence[Checkpoint], names: Sequence[str]
) -> torch.Tensor | None:
    """Look up the inner products of these models' task vectors.

    Args:
        base: the base.
        models: K fine-tunes of it, in the order of the scan.
        names: names of the N tensors that count.

    Returns:
        shape `(N, K, K)`, float64, or None if they are not in the cache.
    """
    content, count = cache.read_entry("gram", base, models, _Gram), len(models)
    rows, columns = torch.triu_indices(count, count, device="cpu").unbind()
    if content is None or content.gram.keys() != set(names):
        return None
    if any(len(values) != len(rows) for values in content.gram.values()):
        return None
    upper = torch.tensor(
        [content.gram[name] for name in names], dtype=torch.float64, device="cpu"
    )
    gram = upper.new_zeros(len(names), count, count)
    gram[:, rows, columns] = upper
    gram[:, columns, rows] = upper
    return gram


def write_gram(
    base: Checkpoint, models: Sequence[Checkpoint], result: ScanResult
) -> None:
    """Store the inner products of a scan.

    Args:
        base: the base.
        models: K fine-tunes of it, in the order of the scan.
        result: the scan.
    """
    assert result.gram is not None
    rows, columns = torch.triu_indices(len(models), len(models), device="cpu").unbind()
    upper = result.gram[:, rows, columns].tolist()
    content = _Gram(gram=dict(zip(result.names, upper, strict=True)))
    cache.write_entry("gram", base, models, content)


def read_sample(
    base: Checkpoint, models: Sequence[Checkpoint], request: str
) -> ScanResult | None:
    """Look up estimates from a sample of these models.

    Args:
        base: the base.
        models: K fine-tunes of it, in the order of the scan.
        request: share or budget, seed, and whether inner products were asked for.

    Returns:
        the estimates, or None if they are not in the cache.
    """
    content = cache.read_entry("sample", base, models, _Estimates, request)
    if content is None:
        return None
    n, k = len(content.names), len(models)

    def tensor(values: Sequence[object], *shape: int) -> torch.Tensor:
        made = torch.tensor(values, dtype=torch.float64, device="cpu")
        return made.reshape(shape)

    try:
        of_models = tensor(content.of_models, 2, n, k)
        of_pairs = tensor(content.of_pairs, len(content.of_pairs), n, k, k)
        return ScanResult(
            base=base.label,
            models=tuple(model.label for model in models),
            names=tuple(content.names),
            sq_norms=tensor(content.sq_norms, n, k),
            base_sq_norms=tensor(content.base_sq_norms, n, k),
            counted_as=tuple(content.counted_as),
            layers=tuple(content.layers),
            gram=None if content.gram is None else tensor(content.gram, n, k, k),
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
    """Store estimates from a sample.

    Args:
        base: the base.
        models: K fine-tunes of it, in the order of the scan.
        request: as for `read_sample`.
        result: the estimates.
    """
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
    cache.write_entry("sample", base, models, content, request)
