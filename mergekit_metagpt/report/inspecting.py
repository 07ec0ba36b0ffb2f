"""Measures families of models without merging them, and reports what it measured."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.pairs import check_family
from mergekit_metagpt.checkpoints.unwritten import left_out
from mergekit_metagpt.merge_config.families import Family
from mergekit_metagpt.merge_config.plan import Planned, names_in
from mergekit_metagpt.merge_config.running import versions
from mergekit_metagpt.merge_config.tensor_coefficients import Coefficients
from mergekit_metagpt.method import advice
from mergekit_metagpt.method.parameters import require_named
from mergekit_metagpt.report import schema, weighing
from mergekit_metagpt.report.inventory import describe, precisions, unshared
from mergekit_metagpt.report.parts import PARTS, part_of
from mergekit_metagpt.scanning.once import measure
from mergekit_metagpt.scanning.pools import pool_key
from mergekit_metagpt.scanning.results import ScanResult
from mergekit_metagpt.scanning.sampling import Sample

if TYPE_CHECKING:
    from mergekit.common import ModelReference


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
        planned: every tensor that mergekit would write; None if it cannot plan.
        refused: why the merge cannot be made as it is, or None.
        gram: whether to measure inner products; None takes them from the cache, and
            measures them only where `lambda: keep` needs them.
        sample: how much to read; None is the smallest `sample` of all settings.

    Returns:
        the report.

    Raises:
        ValueError: a model does not fit its base, is quantised, or holds NaN.
        OSError: a file cannot be read.
    """
    if any(family.keeps_length for family in families):
        gram = True
    if sample is None:
        sample = Sample(share=min((f.settings.sample for f in families), default=1.0))
    of_base: dict[ModelReference, list[ModelReference]] = {}
    for family in families:
        models = of_base.setdefault(family.base, [])
        models += [model for model in family.models if model not in models]
        check_family(opened[family.base], [opened[m] for m in family.models])
        names = [n for m in (family.base, *family.models) for n in opened[m].names]
        require_named(family.settings.exclude, names)
    scans = {
        base: measure(
            opened[base], [opened[m] for m in models], gram=gram, sample=sample
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


def require_near(report: schema.Report) -> None:
    """Refuse models that are as far from their base as unrelated models are.

    Args:
        report: of the families.

    Raises:
        ValueError: the distance of a model is at least `advice.APART`.
    """
    for family in report.families:
        for model in family.models:
            if model.distance is not None and model.distance >= advice.APART:
                text = advice.far(family.base.name, model.name, model.distance)
                raise ValueError(f"{text} Name the base that it was trained from")


def with_ranges(
    report: schema.Report,
    families: Sequence[Family],
    coefficients: Sequence[Coefficients],
) -> schema.Report:
    """Report the coefficients of families whose YAML sets parameters by tensor.

    Args:
        report: of the families, with the coefficients for default parameters.
        families: who is merged with whom.
        coefficients: of every output tensor.

    Returns:
        the report, with the smallest and largest coefficient of any tensor, and those
        of each pool on all of whose tensors they are equal.
    """
    reported = []
    for family, old in zip(families, report.families, strict=True):
        of_family = [
            tensor
            for tensor in coefficients
            if tensor.shares
            and tensor.planned.task.base_model == family.base
            and {*tensor.planned.task.model_order} == {family.base, *family.models}
            and any(_holds(place, tensor.planned) for place in family.places)
        ]
        if family.varying and of_family:
            old = old.model_copy(update=_by_tensor(family, old, of_family))
        reported.append(old)
    return report.model_copy(update={"families": tuple(reported)})


def _holds(place: str, tensor: Planned) -> bool:
    """Whether a tensor belongs to a place of the YAML, such as `slices[0]`."""
    module, _, part = place.rpartition(".")
    of_module = module in ("", f"modules.{tensor.module}")
    return of_module and part in ("models", f"slices[{tensor.slice_number}]")


def _by_tensor(
    family: Family, old: schema.Family, tensors: Sequence[Coefficients]
) -> dict[str, Any]:
    """What changes in a family's report by the coefficients of each tensor."""
    models = []
    for k, (model, entry) in enumerate(zip(family.models, old.models, strict=True)):
        values = [t.shares[model] for t in tensors if model in t.shares]
        changes: dict[str, Any] = {}
        if values:
            changes["coefficient_range"] = min(values), max(values)
        if "weight" in family.varying:
            changes["weight_by_hand"] = family.by_hand[k] or "1"
        models.append(entry.model_copy(update=changes))
    granularity = family.settings.granularity
    of_pool: dict[str, list[Coefficients]] = {}
    for tensor in tensors:
        name = tensor.planned.input_names[family.base]
        of_pool.setdefault(pool_key(name, granularity), []).append(tensor)

    nothing = {"coefficients": None, "coefficients_se": None, "keep": None}

    def known(pool: schema.Pool) -> schema.Pool:
        members = of_pool.get(pool.key, [])
        found = {tuple(t.shares.get(m) for m in family.models): t for t in members}
        shares, tensor = next(iter(found.items()), ((None,), None))
        if tensor is None or len(found) > 1 or None in shares:
            return pool.model_copy(update=nothing)
        errors = tensor.errors and tuple(tensor.errors[m] for m in family.models)
        keeps = {t.scale for t in members if t.planned.settings.keeps_length}
        return pool.model_copy(
            update={
                "coefficients": shares,
                "coefficients_se": errors,
                "keep": keeps.pop() if len(keeps) == 1 else None,
            }
        )

    unknown = advice.for_defaults(family.varying)
    pools = tuple(map(known, old.pools))
    return {
        "models": tuple(models),
        "pools": pools,
        "layers": pools
        if granularity == "layer"
        else tuple(pool.model_copy(update=nothing) for pool in old.layers),
        "warnings": tuple(
            advice.by_tensor(family.varying) if line == unknown else line
            for line in old.warnings
        ),
    }


def _family(
    family: Family,
    opened: Mapping[ModelReference, Checkpoint],
    planned: Sequence[Planned] | None,
    result: ScanResult,
) -> schema.Family:
    base, settings = opened[family.base], family.settings
    whole = result.pool("model", settings.exclude)
    counted = whole.members["model"]
    pools = weighing.pools_of(family, result, settings.granularity)
    cosines = None if whole.cosines is None else whole.cosines.tolist()
    cosine_errors = whole.cosine_errors
    weights = torch.tensor(family.weights, dtype=torch.float64, device="cpu")
    alone = settings.shares(None, weights).tolist()  # where `exclude` leaves no pool
    one_pool = settings.granularity == "model" and not family.varying
    coefficient_errors = pools[0].reported.coefficients_se if one_pool else None
    written = {
        model: None
        if planned is None or opened[model].adapter
        else names_in(planned, model)
        for model in (family.base, *family.models)
    }
    loaded = [opened[model] for model in family.models]
    adapted = any(model.adapter for model in loaded)
    read = not adapted or bool(whole.base_sq_norms.any())
    reported = [pool.reported for pool in pools]
    moved = [pool for pool in reported if any(pool.sq_norms)] or reported
    models = []
    for k, (reference, model) in enumerate(zip(family.models, loaded, strict=True)):
        shares = [pool.coefficients[k] for pool in moved if pool.coefficients]
        shares = shares or [alone[k]]
        sq_norm = float(whole.sq_norms[k])
        sq_norms = _by_name(result, result.sq_norms[:, k])
        models.append(
            schema.Model(
                **describe(model, written[reference], sq_norms).model_dump(),
                sq_norm=sq_norm,
                norm=math.sqrt(sq_norm),
                distance=advice.distance(result, k, counted) if read else None,
                relative_norm=weighing.relative(sq_norm, float(whole.base_sq_norms[k])),
                coefficient=shares[0] if one_pool else None,
                coefficient_range=(min(shares), max(shares)),
                weight=family.weights[k],
                weight_by_hand=None
                if "weight" in family.varying
                else family.by_hand[k],
                parts=_parts(sq_norms, counted),
                not_in_base=unshared(model, base, result.counted_as[k]),
                only_in_base=unshared(base, model, result.counted_as[k]),
                norm_se=_at(whole.norm_errors, k),
                sq_norm_se=_at(whole.sq_norm_errors, k),
                relative_norm_se=_at(whole.relative_norm_errors, k),
                coefficient_se=coefficient_errors[k] if coefficient_errors else None,
                parts_se=_part_errors(result, k, counted),
                adapter=_adapter(reference, model),
            )
        )
    about = "" if result.sampled is None else "about "
    lengths = None if family.varying else weighing.lengths_of(family, pools, whole)
    of_base = written[family.base]
    left = () if of_base is None else left_out(base, of_base)
    own = [result.names.index(name) for name in counted]
    base_sq_norm = result.base_sq_norms[own].amax(dim=1).tolist() if own else []
    return schema.Family(
        places=family.places,
        settings=schema.Settings(**settings.model_dump(), varying=family.varying),
        base=schema.Base(
            **describe(base, of_base, {}).model_dump(),
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
        else schema.Sample.model_validate(result.sampled, from_attributes=True),
        reading=advice.cosine_reading(family.models, cosines, about=about),
        lengths=lengths,
        advice=None
        if lengths is None or int((whole.sq_norms > 0).sum()) < 2
        else advice.which_weights(
            lengths.disparity, family.weights, settings.power, about=about
        ),
        note=advice.base_listed(family.base, family.base_weight)
        if family.base_listed
        else None,
        pools=tuple(reported),
        layers=tuple(
            pool.reported for pool in weighing.pools_of(family, result, "layer")
        ),
        warnings=(
            *_adapter_warnings(base, loaded),
            *_precision_warnings(base, loaded),
            *([base.warning] if base.warning else ()),
            *filter(None, _warnings(family, result, models, pools, left)),
        ),
    )


def _adapter(reference: ModelReference, model: Checkpoint) -> schema.Adapter | None:
    """What PEFT needs to know about an adapter."""
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
    """Warn of what is assumed about adapters whose base was not opened."""
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


def _precision_warnings(
    base: Checkpoint, models: Sequence[Checkpoint]
) -> Iterator[str]:
    """Warn of models that are stored more finely than their base."""
    for model in models:
        if base.tensors and not model.adapter:
            coarse, fine = (next(iter(precisions(each))) for each in (base, model))
            if getattr(torch, coarse).itemsize < getattr(torch, fine).itemsize:
                yield advice.coarser_base(base.label, model.label, coarse, fine)


def _at(errors: torch.Tensor | None, model: int) -> float | None:
    return None if errors is None else float(errors[model])


def _by_name(result: ScanResult, values: torch.Tensor) -> dict[str, float]:
    return dict(zip(result.names, values.tolist(), strict=True))


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
    covariances = result.sampled.covariances.sq_norms
    variances = _by_name(result, covariances[:, model, model])
    sq_norms = _by_name(result, result.sq_norms[:, model])
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
    pools: Sequence[weighing.Pool],
    left: Collection[str],
) -> Iterator[str | None]:
    base, settings = family.base, family.settings
    whole = result.pool("model", settings.exclude)
    if family.varying:
        yield advice.for_defaults(family.varying)
    moved = [k for k, model in enumerate(models) if model.sq_norm > 0]
    if not moved:
        yield (
            advice.nothing_moved(base, weighing.WHOLE)
            if whole.members["model"]
            else advice.nothing_counts(settings.exclude)
        )
        return
    if settings.power < 0:
        unmoved = [m for k, m in enumerate(family.models) if k not in moved]
        yield advice.left_out(base, unmoved, settings.power, weighing.WHOLE)
    unusual = [
        # `lambda` changes no coefficient.
        None
        if {*family.varying} - {"lambda"}
        else weighing.degenerate(family, pools, result),
        *advice.whole_model(base, family.models, result, settings.exclude, left),
    ]
    angles = whole.cosines
    if angles is not None:
        between = [float(angles[i, j]) for i in moved for j in moved if j < i]
        unusual.append(advice.siblings(base, between))
    estimated = "" if result.sampled is None else "by this sample, "
    yield from (f"{estimated}{text}" for text in unusual if text)
