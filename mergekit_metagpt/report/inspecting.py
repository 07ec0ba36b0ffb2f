"""Measures families of models without merging them: checkpoints in, a report out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch

from mergekit_metagpt.arithmetic.closed_form import cosines
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.opening import open_checkpoints
from mergekit_metagpt.checkpoints.pairs import check_pair
from mergekit_metagpt.merge_config.families import Family
from mergekit_metagpt.method import advice
from mergekit_metagpt.method.parameters import Settings
from mergekit_metagpt.report import schema
from mergekit_metagpt.report.inventory import stored, unshared
from mergekit_metagpt.report.parts import PARTS, natural, part_of
from mergekit_metagpt.scanning.once import detailed_norms
from mergekit_metagpt.scanning.pools import (
    idle_parts,
    is_embedding,
    is_excluded,
    pool_key,
)
from mergekit_metagpt.scanning.results import Details, PairNorms

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.options import MergeOptions


def inspect(
    families: Sequence[Family], options: MergeOptions, *, method: str = "metagpt"
) -> schema.Report:
    """Scan the checkpoints of all families, one pass for each base, and report.

    Args:
        families: who is merged with whom.
        options: mergekit's; those that say how to load models.
        method: merge_method of the YAML.

    Returns:
        the report.

    Raises:
        ValueError: a model does not fit its base, is quantised, or holds NaN.
        OSError: a file cannot be read.
    """
    wanted: dict[ModelReference, list[ModelReference]] = {}
    for family in families:
        known = wanted.setdefault(family.base, [])
        known += [model for model in family.models if model not in known]
    opened = open_checkpoints(
        [model for base, models in wanted.items() for model in (base, *models)], options
    )
    for base, models in wanted.items():
        for model in models:
            check_pair(opened[base], opened[model])
    scans = {
        base: _Scanned(
            models,
            *detailed_norms(opened[base], [opened[model] for model in models]),
        )
        for base, models in wanted.items()
    }
    packages = ("mergekit-metagpt", "mergekit", "torch", "transformers")
    return schema.Report(
        versions={package: version(package) for package in packages},
        method=method,
        families=tuple(
            _family(family, opened, scans[family.base].of(family.models))
            for family in families
        ),
    )


class _Scanned:
    """What a scan of one base found, for some of its models."""

    def __init__(
        self,
        models: Sequence[ModelReference],
        pairs: Sequence[PairNorms],
        details: Details,
    ) -> None:
        self.models = list(models)
        self.pairs = list(pairs)
        self.details = details

    def of(self, models: Sequence[ModelReference]) -> _Scanned:
        """Return what was found for some of the models, in their order."""
        rows = [self.models.index(model) for model in models]
        index = torch.tensor(rows, device="cpu")
        return _Scanned(
            models,
            [self.pairs[row] for row in rows],
            Details(
                len(rows),
                {n: g[index[:, None], index] for n, g in self.details.gram.items()},
                {n: norms[index] for n, norms in self.details.base_sq_norms.items()},
                {n: lost[index] for n, lost in self.details.rounding.items()},
            ),
        )

    def names(self, exclude: Sequence[str]) -> list[str]:
        """Return the tensors that count for any model, sorted."""
        found = {name for pair in self.pairs for name in pair.sq_norms}
        return sorted(name for name in found if not is_excluded(name, exclude))

    def sq_norms(self, names: Iterable[str]) -> list[float]:
        """Return n_t over some tensors, shape `(K,)`."""
        chosen = list(names)
        return [sum(pair.sq_norms.get(n, 0.0) for n in chosen) for pair in self.pairs]

    def base_sq_norms(self, names: Iterable[str]) -> list[float]:
        """Return ||theta_0||^2 of what each model shares of some tensors, `(K,)`."""
        zeros = torch.zeros(len(self.models), dtype=torch.float64, device="cpu")
        return sum((self.details.base_sq_norms[n] for n in names), zeros).tolist()


def _family(
    family: Family, opened: Mapping[ModelReference, Checkpoint], scanned: _Scanned
) -> schema.Family:
    base, choice = opened[family.base], family.choice
    names = scanned.names(choice.exclude)
    pools = _pools(scanned, names, choice.granularity, family)
    sq_norms, base_sq_norms = scanned.sq_norms(names), scanned.base_sq_norms(names)
    gram = sum(
        (scanned.details.gram[name] for name in names),
        torch.zeros(len(family.models), len(family.models), dtype=torch.float64),
    )
    angles = cosines(gram)
    lost = [
        math.sqrt(sum(float(scanned.details.rounding[name][k]) for name in names))
        for k in range(len(family.models))
    ]
    models = []
    alone = _shares(None, [], family)  # where `exclude` leaves no pool
    for k, reference in enumerate(family.models):
        model = opened[reference]
        lambdas = [p.found.coefficients[k] for p in pools] or [choice.scale * alone[k]]
        models.append(
            schema.Model(
                **stored(model, base, scanned.pairs[k].sq_norms).model_dump(),
                sq_norm=sq_norms[k],
                norm=math.sqrt(sq_norms[k]),
                relative_norm=_ratio(sq_norms[k], base_sq_norms[k]),
                coefficient=lambdas[0] if choice.granularity == "model" else None,
                coefficient_range=(min(lambdas), max(lambdas)),
                weight=family.weights[k],
                weight_by_hand=family.by_hand[k],
                rounding=lost[k],
                parts=_parts(scanned.pairs[k], names),
                not_in_base=unshared(model, base, scanned.pairs[k]),
                only_in_base=unshared(base, model, scanned.pairs[k]),
            )
        )
    return schema.Family(
        places=family.places,
        settings=schema.Settings(
            granularity=choice.granularity,
            power=choice.power,
            exclude=choice.exclude,
            scale=choice.scale,
            varying=choice.varying,
        ),
        base=schema.Base(
            **stored(base, base, {}).model_dump(),
            norm=math.sqrt(
                sum(float(scanned.details.base_sq_norms[n].max()) for n in names)
            ),
        ),
        models=tuple(models),
        cosines=tuple(
            tuple(None if math.isnan(v) else v for v in row) for row in angles.tolist()
        ),
        reading=advice.cosine_reading(family.models, angles.tolist()),
        pools=tuple(pool.found for pool in pools),
        layers=tuple(pool.found for pool in _pools(scanned, names, "layer", family)),
        warnings=(
            *_refusals([base, *(opened[model] for model in family.models)]),
            *_warnings(family, scanned, names, models, pools, angles),
        ),
    )


@dataclass(frozen=True)
class _Pool:
    """A pool as reported, and the shares of the models that are merged in it."""

    found: schema.Pool
    shares: Mapping[ModelReference, float]


def _pools(
    scanned: _Scanned, names: Sequence[str], granularity: str, family: Family
) -> list[_Pool]:
    members: dict[str, list[str]] = {"model": []} if granularity == "model" else {}
    for name in names:
        members.setdefault(pool_key(name, granularity), []).append(name)
    pools = []
    for key in sorted(members, key=_from_input_to_output):
        sq_norms = scanned.sq_norms(members[key])
        base_sq_norms = scanned.base_sq_norms(members[key])
        present = [any(n in p.sq_norms for n in members[key]) for p in scanned.pairs]
        shares = _shares(sq_norms if members[key] else None, present, family)
        found = schema.Pool(
            key=key,
            sq_norms=tuple(sq_norms),
            relative_norms=tuple(map(_ratio, sq_norms, base_sq_norms)),
            coefficients=tuple(family.choice.scale * share for share in shares),
        )
        merged = zip(family.models, shares, family.weights, present, strict=True)
        pools.append(_Pool(found, {m: s for m, s, w, here in merged if w and here}))
    return pools


def _from_input_to_output(key: str) -> tuple[object, ...]:
    """Sort key of pools: embeddings, layers in their order, final norm, head."""
    alone = ("embeddings", "", "norms", "head")
    part = "" if any(at.isdecimal() for at in key.split(".")) else part_of(key)
    return alone.index(part if part in alone else ""), natural(key)


def _shares(
    sq_norms: Sequence[float] | None, present: Sequence[bool], family: Family
) -> list[float]:
    """Coefficients of a pool before `lambda` scales them; see `Settings.shares`."""
    choice = family.choice
    weight = list(family.weights)
    if sq_norms is not None:
        weight = [w * here for w, here in zip(weight, present, strict=True)]
    settings = Settings(
        granularity=choice.granularity,
        power=choice.power,
        exclude=choice.exclude,
        weight=torch.tensor(weight, dtype=torch.float64),
        scale=choice.scale,
    )
    if sq_norms is None or choice.power == 0:
        return settings.shares(None).tolist()
    return settings.shares(torch.tensor(sq_norms, dtype=torch.float64)).tolist()


def _ratio(sq_norm: float, base_sq_norm: float) -> float | None:
    return math.sqrt(sq_norm / base_sq_norm) if base_sq_norm else None


def _parts(pair: PairNorms, names: Sequence[str]) -> dict[str, float]:
    found = dict.fromkeys(PARTS, 0.0)
    for name in names:
        found[part_of(name)] += pair.sq_norms.get(name, 0.0)
    total = sum(found.values())
    return {part: value / total if total else 0.0 for part, value in found.items()}


def _refusals(models: Sequence[Checkpoint]) -> Iterator[str]:
    """Say of which models mergekit could not plan a merge."""
    for model in dict.fromkeys(models):
        if model.refused:
            yield f"{model.label} can be measured, but not merged: {model.refused}"


def _warnings(
    family: Family,
    scanned: _Scanned,
    names: Sequence[str],
    models: Sequence[schema.Model],
    pools: Sequence[_Pool],
    angles: torch.Tensor,
) -> list[str]:
    base, choice = family.base, family.choice
    said: list[str | None] = [
        f"the YAML sets {', '.join(choice.varying)} tensor by tensor; shown here for "
        "defaults. `export` writes each tensor's coefficients"
        if choice.varying
        else None
    ]
    moved = [k for k, model in enumerate(models) if model.sq_norm > 0]
    if not moved:
        said.append(
            advice.nothing_moved(base, "the whole model")
            if names
            else advice.nothing_counts(choice.exclude)
        )
        return [line for line in said if line]
    if choice.power < 0:
        unmoved = [m for k, m in enumerate(family.models) if k not in moved]
        said.append(advice.left_out(base, unmoved, choice.power, "the whole model"))
    weighted = len({w for w in family.weights if w > 0}) > 1
    said.append(_degenerate(base, pools, weighted=weighted))
    every = (name for pair in scanned.pairs for name in pair.counted_as)
    said.append(advice.names_nothing(sorted(idle_parts(choice.exclude, every))))
    for k in moved:
        model = models[k]
        of_embeddings = scanned.sq_norms(filter(is_embedding, names))[k]
        said.append(advice.embeddings(model.name, of_embeddings / model.sq_norm))
        said.append(advice.far(base, model.name, model.relative_norm or 0.0))
        said.append(advice.rounding(model.name, model.rounding / model.norm))
    between = [float(angles[i, j]) for i in moved for j in moved if j < i]
    said.append(advice.siblings(base, between))
    return [line for line in said if line]


def _degenerate(
    base: ModelReference, pools: Sequence[_Pool], *, weighted: bool
) -> str | None:
    """Warn of the first pool of which one model takes almost all or next to nothing."""

    def said(pool: _Pool, where: str) -> str | None:
        shares = list(pool.shares.values())
        if not any(shares):
            return None
        names = list(pool.shares)
        return advice.degenerate(base, names, shares, where, weighted=weighted)

    found = [pool for pool in pools if said(pool, "")]
    if not found:
        return None
    key = found[0].found.key
    where = "the whole model" if key == "model" else key
    if len(found) > 1:
        where += f", and {len(found) - 1} more of {len(pools)} pools"
    return said(found[0], where)
