"""Measures families of models without merging them, and reports what it measured."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.pairs import check_distinct, check_pair
from mergekit_metagpt.checkpoints.unwritten import left_out
from mergekit_metagpt.merge_config.families import Family
from mergekit_metagpt.merge_config.plan import Coefficients, Planned, names_in
from mergekit_metagpt.method import advice
from mergekit_metagpt.method.lengths import Lengths, Spread
from mergekit_metagpt.method.parameters import require_named
from mergekit_metagpt.report import schema
from mergekit_metagpt.report.inventory import describe, unshared
from mergekit_metagpt.report.parts import PARTS, natural, part_of
from mergekit_metagpt.scanning.once import measure
from mergekit_metagpt.scanning.results import Pooled, ScanResult
from mergekit_metagpt.scanning.sampling import Sample

if TYPE_CHECKING:
    from mergekit.common import ModelReference

WHOLE = "the whole model"


def inspect(
    families: Sequence[Family],
    opened: Mapping[ModelReference, Checkpoint],
    *,
    method: str = "metagpt",
    planned: Sequence[Planned] | None = None,
    refused: str | None = None,
    gram: bool | None = True,
    sample: Sample | None = None,
) -> schema.Report:
    """Scan the checkpoints of all families, one pass for each base, and report.

    Args:
        families: who is merged with whom.
        opened: every base and model of the families.
        method: merge_method of the YAML.
        planned: every tensor that mergekit would write, where it can plan the merge.
        refused: why the merge cannot be made as it is, or None.
        gram: whether inner products are needed; None takes them from the cache, and
            reports no cosines where it has none, unless `lambda: keep` needs them.
        sample: how much to read; as the settings of the families say if None.

    Returns:
        the report.

    Raises:
        ValueError: a model does not fit its base, is quantised, or holds NaN.
        OSError: a file cannot be read.
    """
    if any(family.keeps_length for family in families):
        gram = True
    of_base: dict[ModelReference, list[ModelReference]] = {}
    if sample is None:
        # One number for the whole merge.
        sample = Sample(share=min((f.settings.sample for f in families), default=1.0))
    for family in families:
        models = of_base.setdefault(family.base, [])
        models += [model for model in family.models if model not in models]
        check_distinct(opened[family.base], [opened[m] for m in family.models])
        for model in family.models:
            check_pair(opened[family.base], opened[model])
        names = [n for m in (family.base, *family.models) for n in opened[m].names]
        require_named(family.settings.exclude, names)
    scans = {
        base: measure(
            opened[base],
            [opened[model] for model in models],
            gram=gram,
            sample=sample,
        )
        for base, models in of_base.items()
    }
    return schema.Report(
        versions=versions(),
        method=method,
        refused=refused,
        families=tuple(
            _family(
                family,
                opened,
                planned,
                scans[family.base].select(
                    [of_base[family.base].index(model) for model in family.models]
                ),
            )
            for family in families
        ),
    )


def versions() -> dict[str, str]:
    """Return the versions of this package and of what computes beside it.

    Returns:
        versions by package.
    """
    packages = ("mergekit-metagpt", "mergekit", "torch", "transformers")
    return {package: version(package) for package in packages}


def require_near(report: schema.Report) -> None:
    """Refuse models that are as far from their base as models trained apart.

    Args:
        report: of the families.

    Raises:
        ValueError: a model is no fine-tune of its base by what was measured.
    """
    for family in report.families:
        for model in family.models:
            if model.distance is not None and model.distance >= advice.APART:
                text = advice.far(family.base.name, model.name, model.distance)
                raise ValueError(
                    f"{text} Name the base that it was trained from, or give "
                    "--allow-crimes to merge it all the same"
                )


def with_ranges(
    report: schema.Report,
    families: Sequence[Family],
    coefficients: Sequence[Coefficients],
) -> schema.Report:
    """Replace coefficients for defaults where the YAML sets parameters by tensor.

    Args:
        report: of the families.
        families: who is merged with whom.
        coefficients: of every output tensor.

    Returns:
        the report, with the smallest and largest coefficient of any tensor.
    """
    reported = []
    for family, old in zip(families, report.families, strict=True):
        of_family = [
            tensor.shares
            for tensor in coefficients
            if tensor.planned.task.base_model == family.base
            and {*tensor.planned.task.model_order} == {family.base, *family.models}
        ]
        models = []
        for model, entry in zip(family.models, old.models, strict=True):
            values = [shares[model] for shares in of_family if model in shares]
            if family.varying and values:
                span = min(values), max(values)
                entry = entry.model_copy(update={"coefficient_range": span})
            models.append(entry)
        reported.append(old.model_copy(update={"models": tuple(models)}))
    return report.model_copy(update={"families": tuple(reported)})


@dataclass(frozen=True)
class _Pool:
    """A pool as reported, and the weights of the models; 0 for those not in it."""

    reported: schema.Pool
    weights: tuple[float, ...]
    counts: bool
    lengths: Lengths


def _family(
    family: Family,
    opened: Mapping[ModelReference, Checkpoint],
    planned: Sequence[Planned] | None,
    result: ScanResult,
) -> schema.Family:
    base, settings = opened[family.base], family.settings
    whole = result.pool("model", settings.exclude)
    pools = _pools(family, result, settings.granularity)
    angles = whole.cosines
    cosines = None if angles is None else angles.tolist()
    weights = torch.tensor(family.weights, dtype=torch.float64, device="cpu")
    alone = settings.shares(None, weights).tolist()  # where `exclude` leaves no pool
    one_pool = settings.granularity == "model" and not family.varying
    cosine_errors = whole.cosine_errors
    coefficient_errors = pools[0].reported.coefficients_se if one_pool else None
    written = {
        model: None
        if planned is None or opened[model].adapter
        else names_in(planned, model)
        for model in (family.base, *family.models)
    }
    adapted = any(opened[model].adapter for model in family.models)
    read = not adapted or bool(whole.base_sq_norms.any())
    models = []
    for k, reference in enumerate(family.models):
        model = opened[reference]
        coefficients = [pool.reported.coefficients[k] for pool in pools] or [alone[k]]
        sq_norm = float(whole.sq_norms[k])
        sq_norms = dict(zip(result.names, result.sq_norms[:, k].tolist(), strict=True))
        models.append(
            schema.Model(
                **describe(model, written[reference], sq_norms).model_dump(),
                sq_norm=sq_norm,
                norm=math.sqrt(sq_norm),
                distance=advice.distance(result, k, whole.members["model"])
                if read
                else None,
                relative_norm=_ratio(sq_norm, float(whole.base_sq_norms[k])),
                coefficient=coefficients[0] if one_pool else None,
                coefficient_range=(min(coefficients), max(coefficients)),
                weight=family.weights[k],
                weight_by_hand=family.by_hand[k],
                parts=_parts(sq_norms, whole.members["model"]),
                not_in_base=unshared(model, base, result.counted_as[k]),
                only_in_base=unshared(base, model, result.counted_as[k]),
                norm_se=_at(whole.norm_errors, k),
                sq_norm_se=_at(whole.sq_norm_errors, k),
                relative_norm_se=_at(whole.relative_norm_errors, k),
                coefficient_se=coefficient_errors[k] if coefficient_errors else None,
                parts_se=_part_errors(result, k, whole.members["model"]),
                adapter=_adapter(reference, model),
            )
        )
    lengths = None if family.varying else _lengths(family, pools, whole)
    of_base = written[family.base]
    left = () if of_base is None else left_out(base, of_base)
    own = [result.names.index(name) for name in whole.members["model"]]
    base_sq_norm = result.base_sq_norms[own].amax(dim=1).tolist() if own else []
    return schema.Family(
        places=family.places,
        settings=schema.Settings(**settings.model_dump(), varying=family.varying),
        base=schema.Base(
            **describe(base, written[family.base], {}).model_dump(),
            norm=math.sqrt(sum(base_sq_norm)) if read else None,
        ),
        models=tuple(models),
        cosines=None
        if cosines is None
        else tuple(tuple(None if math.isnan(v) else v for v in row) for row in cosines),
        cosines_se=None
        if cosine_errors is None
        else tuple(map(tuple, cosine_errors.tolist())),
        sample=None
        if result.sampled is None
        else schema.Sample(
            share=result.sampled.share,
            seed=result.sampled.seed,
            bytes_read=result.sampled.bytes_read,
            bytes_stored=result.sampled.bytes_stored,
        ),
        reading=advice.cosine_reading(family.models, cosines),
        lengths=lengths,
        advice=None
        if lengths is None
        else advice.which_weights(lengths.disparity, family.weights, settings.power),
        note=advice.base_listed(family.base, family.base_weight)
        if family.base_listed
        else None,
        pools=tuple(pool.reported for pool in pools),
        layers=tuple(pool.reported for pool in _pools(family, result, "layer")),
        warnings=(
            *_adapter_warnings(base, [opened[model] for model in family.models]),
            *_warnings(family, result, models, pools, left, base.warning),
        ),
    )


def _lengths(
    family: Family, pools: Sequence[_Pool], whole: Pooled
) -> schema.Lengths | None:
    """How long the merged task vector is, and how far apart its inputs are."""
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


def _adapter(reference: ModelReference, model: Checkpoint) -> schema.Adapter | None:
    """What PEFT needs to know of an adapter."""
    if model.adapter is None:
        return None
    place, config = reference.lora or reference.model, model.adapter.config
    return schema.Adapter(
        path=place.path,
        revision=place.revision,
        base=config.get("base_model_name_or_path") or None,
        factors=len(model.adapter.factors),
        experts=any(".experts." in name for name in model.adapter.factors),
        config={key: config.get(key) for key in schema.ADAPTER_KEYS},
    )


def _adapter_warnings(base: Checkpoint, models: Sequence[Checkpoint]) -> Iterator[str]:
    """Say what is assumed of adapters whose base is not at hand."""
    if base.tensors:
        return
    adapters = {model.label: model.adapter for model in models if model.adapter}
    bases = {
        str(adapter.config.get("base_model_name_or_path"))
        for adapter in adapters.values()
    }
    if len(bases) > 1:
        yield advice.other_bases(sorted(bases))
    for label, adapter in adapters.items():
        if any(factors.copy for factors in adapter.factors.values()):
            yield advice.copied_embeddings(label)


@dataclass(frozen=True)
class _PoolErrors:
    """Of G pools: Cov(n_s, n_t), shape `(G, K, K)`, and `(G, K)` standard errors."""

    covariances: torch.Tensor
    sq_norms: list[list[float]]
    relative_norms: list[list[float]]

    @classmethod
    def of(cls, pooled: Pooled, shape: tuple[int, int]) -> _PoolErrors | None:
        own, of_ratios = pooled.sq_norm_errors, pooled.relative_norm_errors
        if pooled.covariances is None or own is None or of_ratios is None:
            return None
        return cls(
            pooled.covariances.sq_norms.reshape(*shape, shape[1]),
            own.reshape(shape).tolist(),
            of_ratios.reshape(shape).tolist(),
        )


def _pools(family: Family, result: ScanResult, granularity: str) -> list[_Pool]:
    settings, count = family.settings, len(family.models)
    pooled = result.pool(granularity, settings.exclude)
    shape = len(pooled.keys), count
    sq_norms, base_sq_norms = (
        values.reshape(shape).tolist()
        for values in (pooled.sq_norms, pooled.base_sq_norms)
    )
    grams = None if pooled.gram is None else pooled.gram.reshape(-1, count, count)
    sampled = _PoolErrors.of(pooled, shape)
    counted = [set(names.values()) for names in result.counted_as]
    pools = []
    for key in sorted(pooled.keys, key=_from_input_to_output):
        members, row = pooled.members[key], pooled.rows[key]
        present = [not own.isdisjoint(members) for own in counted]
        merged = present if members else [True] * count
        weight = torch.tensor(family.weights, dtype=torch.float64, device="cpu")
        weight *= torch.tensor(merged, device="cpu")
        measured = torch.tensor(sq_norms[row], dtype=torch.float64, device="cpu")
        norms_count = bool(members) and settings.power != 0
        lambdas = settings.shares(measured if norms_count else None, weight)
        shares = lambdas.tolist()
        lengths = Lengths.of(lambdas, measured, None if grams is None else grams[row])
        errors: dict[str, tuple[float, ...]] = {}
        if sampled is not None:
            found = [0.0] * count
            if norms_count:
                covariance = sampled.covariances[row]
                found = settings.share_errors(measured, covariance, weight).tolist()
            errors["coefficients_se"] = tuple(found)
            errors["sq_norms_se"] = tuple(sampled.sq_norms[row])
            errors["relative_norms_se"] = tuple(sampled.relative_norms[row])
        reported = schema.Pool(
            key=key,
            sq_norms=tuple(sq_norms[row]),
            relative_norms=tuple(map(_ratio, sq_norms[row], base_sq_norms[row])),
            coefficients=tuple(shares),
            keep=lengths.keep,
            **errors,
        )
        weights = (w * here for w, here in zip(family.weights, present, strict=True))
        pools.append(_Pool(reported, tuple(weights), norms_count, lengths))
    return pools


def _from_input_to_output(key: str) -> tuple[object, ...]:
    """Sort key of pools: embeddings, layers in their order, final norm, head."""
    alone = ("embeddings", "", "norms", "head")
    part = "" if any(at.isdecimal() for at in key.split(".")) else part_of(key)
    return alone.index(part if part in alone else ""), natural(key)


def _ratio(sq_norm: float, base_sq_norm: float) -> float | None:
    return math.sqrt(sq_norm / base_sq_norm) if base_sq_norm else None


def _at(errors: torch.Tensor | None, model: int) -> float | None:
    return None if errors is None else float(errors[model])


def _parts(sq_norms: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    parts = dict.fromkeys(PARTS, 0.0)
    for name in names:
        parts[part_of(name)] += sq_norms[name]
    total = sum(parts.values())
    return {part: value / total if total else 0.0 for part, value in parts.items()}


def _part_errors(
    result: ScanResult, model: int, names: Sequence[str]
) -> dict[str, float] | None:
    """Standard errors of `_parts`: of p = n_part / n by the delta method."""
    if result.sampled is None:
        return None
    variances = dict(
        zip(
            result.names,
            result.sampled.covariances.sq_norms[:, model, model].tolist(),
            strict=True,
        )
    )
    sq_norms = dict(zip(result.names, result.sq_norms[:, model].tolist(), strict=True))
    total = sum(sq_norms[name] for name in names)
    inside, varying = dict.fromkeys(PARTS, 0.0), sum(variances[n] for n in names)
    for name in names:
        inside[part_of(name)] += variances[name]
    errors = {}
    for part, share in _parts(sq_norms, names).items():
        rest = varying - inside[part]
        variance = (1 - share) ** 2 * inside[part] + share**2 * max(rest, 0.0)
        errors[part] = math.sqrt(variance) / total if total else 0.0
    return errors


def _warnings(
    family: Family,
    result: ScanResult,
    models: Sequence[schema.Model],
    pools: Sequence[_Pool],
    left: Collection[str],
    base_warning: str | None,
) -> list[str]:
    base, settings = family.base, family.settings
    whole = result.pool("model", settings.exclude)
    warnings: list[str | None] = [base_warning]
    if family.varying:
        warnings.append(
            f"the YAML sets {', '.join(family.varying)} tensor by tensor: of the "
            "coefficients this shows the smallest and the largest, of pools the "
            "figures for defaults. `export` writes each tensor's coefficients"
        )
    moved = [k for k, model in enumerate(models) if model.sq_norm > 0]
    if not moved:
        warnings.append(
            advice.nothing_moved(base, WHOLE)
            if whole.members["model"]
            else advice.nothing_counts(settings.exclude)
        )
        return [warning for warning in warnings if warning]
    if settings.power < 0:
        unmoved = [m for k, m in enumerate(family.models) if k not in moved]
        warnings.append(advice.left_out(base, unmoved, settings.power, WHOLE))
    warnings.append(_degenerate(family, pools, result))
    warnings += advice.whole_model(base, family.models, result, settings.exclude, left)
    angles = whole.cosines
    if angles is not None:
        between = [float(angles[i, j]) for i in moved for j in moved if j < i]
        warnings.append(advice.siblings(base, between))
    return [warning for warning in warnings if warning]


def _degenerate(
    family: Family, pools: Sequence[_Pool], result: ScanResult
) -> str | None:
    """Warn of the first pool of which one model takes almost all or next to nothing."""
    settings = family.settings

    def warning(pool: _Pool, where: str) -> str | None:
        return advice.degenerate(
            family.base,
            family.models,
            pool.reported.coefficients,
            pool.weights,
            where,
            sq_norms=pool.reported.sq_norms if pool.counts else None,
            power=settings.power,
            whole=result if settings.granularity == "model" else None,
            exclude=settings.exclude,
        )

    degenerate = [pool for pool in pools if warning(pool, "")]
    if not degenerate:
        return None
    key = degenerate[0].reported.key
    where = WHOLE if key == "model" else key
    if len(degenerate) > 1:
        where += f", and {len(degenerate) - 1} more of {len(pools)} pools"
    return warning(degenerate[0], where)
