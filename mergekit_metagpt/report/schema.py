"""The schema of what `inspect --json` and `metagpt.json` hold."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from mergekit_metagpt.method import settings


def as_json(found: BaseModel) -> str:
    """Write a report as JSON in ASCII, which every locale reads alike.

    Args:
        found: a report.

    Returns:
        the text, indented, with a newline at its end.
    """
    return json.dumps(json.loads(found.model_dump_json()), indent=2) + "\n"


def _error_of(field: str) -> Any:
    return Field(
        default=None, description=f"standard error of {field}; null where exact"
    )


class Record(BaseModel):
    """What `--json` writes: plain data that never changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensors(Record):
    """Some tensors of a checkpoint."""

    count: int
    parameters: int
    bytes: int
    examples: tuple[str, ...] = Field(description="the first three names")
    share: float | None = Field(
        default=None, description="their share of ||tau||^2, where they count in it"
    )


class File(Record):
    """A file of a checkpoint."""

    name: str
    bytes: int
    digest: str = Field(description="the hub's hash, or SHA-256 of size and samples")
    whole: bool = Field(description="whether the digest is of the whole content")


class Source(Record):
    """Which version of a model was read."""

    revision: str | None = Field(description="commit of a hub snapshot")
    digest: str = Field(description="SHA-256 over the digests of all files")
    files: tuple[File, ...]


class Stored(Record):
    """A checkpoint as it lies on disk."""

    name: str
    source: Source
    parameters: int = Field(description="elements of all floating-point tensors")
    bytes: int
    precisions: dict[str, int] = Field(description="elements by stored dtype")
    not_written: Tensors | None = Field(
        description="floating-point tensors that the merge leaves out; null where "
        "mergekit cannot plan one"
    )


class Base(Stored):
    """theta_0."""

    norm: float | None = Field(
        description="||theta_0|| over all tensors that count; null if it was not read"
    )


# Settings of an adapter that PEFT's `add_weighted_adapter` depends on.
ADAPTER_KEYS = (
    "r",
    "lora_alpha",
    "use_rslora",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "target_parameters",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "ensure_weight_tying",
)


class Adapter(Record):
    """A LoRA adapter, measured from its factors."""

    path: str = Field(description="folder or hub repository")
    revision: str | None = Field(description="of the repository, as given")
    base: str | None = Field(description="the base that its configuration names")
    factors: int = Field(description="weights that it adapts")
    experts: bool = Field(description="whether experts are among them")
    config: dict[str, Any] = Field(description="settings that PEFT reads")


class Model(Stored):
    """A fine-tune theta_t and its task vector tau_t = theta_t - theta_0."""

    sq_norm: float = Field(description="n_t = ||tau_t||^2 over all tensors that count")
    norm: float = Field(description="||tau_t||")
    relative_norm: float | None = Field(
        description="||tau_t|| / ||theta_0|| over the tensors of n_t"
    )
    distance: float | None = Field(
        description="median over tensors of ||tau|| / ||theta_0||; null where the base "
        "was not read"
    )
    coefficient: float | None = Field(
        description="its share of the merge, before `lambda` scales the sum; null "
        "where it differs by tensor"
    )
    coefficient_range: tuple[float, float] = Field(
        description="the smallest and the largest of any pool or tensor, without pools "
        "in which no model moved"
    )
    weight: float = Field(
        description="importance w_t; its default where the YAML sets it by tensor"
    )
    weight_by_hand: str | None = Field(
        description="weight in a YAML of another method, or that is set by tensor; "
        "numbers joined by - are a gradient"
    )
    parts: dict[str, float] = Field(description="share of each part in n_t")
    not_in_base: Tensors
    only_in_base: Tensors
    norm_se: float | None = _error_of("`norm`")
    sq_norm_se: float | None = _error_of("`sq_norm`")
    relative_norm_se: float | None = _error_of("`relative_norm`")
    coefficient_se: float | None = _error_of("`coefficient`")
    parts_se: dict[str, float] | None = _error_of("`parts`")
    adapter: Adapter | None = Field(
        default=None, description="where it was measured from LoRA factors"
    )


class Pool(Record):
    """Tensors whose squared norms are summed before the ratio is taken."""

    key: str
    sq_norms: tuple[float, ...] = Field(description="n_t on this pool, per model")
    relative_norms: tuple[float | None, ...]
    coefficients: tuple[float, ...] | None = Field(
        description="share of each model on this pool; null where it differs by tensor"
    )
    keep: float | None = Field(
        default=None,
        description="what `lambda: keep` comes to on this pool; null where inner "
        "products were not measured, or the task vectors cancel each other",
    )
    sq_norms_se: tuple[float, ...] | None = _error_of("`sq_norms`")
    relative_norms_se: tuple[float, ...] | None = _error_of("`relative_norms`")
    coefficients_se: tuple[float, ...] | None = _error_of("`coefficients`")


class Settings(settings.Settings):
    """Settings of the closed form, for the whole model."""

    varying: tuple[str, ...] = Field(
        description="parameters that the YAML sets tensor by tensor; here are their "
        "defaults"
    )


class Sample(Record):
    """How much of the weights the estimates rest on."""

    share: float = Field(description="of each large tensor that was read")
    seed: int = Field(description="of the positions that were read")
    bytes_read: int = Field(description="of base and models")
    bytes_stored: int = Field(description="what an exact scan reads")


class Lengths(Record):
    """Of the task vectors that are merged, over all tensors that count."""

    inputs: float = Field(description="sum_t lambda_t ||tau_t||, their mean length")
    merged: float | None = Field(
        description="||sum_t lambda_t tau_t|| before `lambda`; null where inner "
        "products were not measured"
    )
    disparity: float = Field(description="largest norm over the smallest")
    gamma: float | None = Field(
        description="ACE's Var_t(log n_t) / mean_t(log n_t)^2; null where the mean is 0"
    )


class Family(Record):
    """A base, the models merged with each other, and what was measured."""

    places: tuple[str, ...] = Field(description="where the YAML names them")
    settings: Settings
    base: Base
    models: tuple[Model, ...]
    cosines: tuple[tuple[float | None, ...], ...] | None = Field(
        description="between task vectors, null where one is zero; null as a whole "
        "where inner products were not measured, as by `merge`"
    )
    cosines_se: tuple[tuple[float, ...], ...] | None = _error_of("`cosines`")
    sample: Sample | None = Field(
        default=None, description="how much was read; null where the scan was exact"
    )
    reading: str = Field(description="the cosines in words")
    lengths: Lengths | None = Field(
        default=None,
        description="null where nothing moved, or parameters are set tensor by tensor",
    )
    advice: str | None = Field(
        default=None, description="what the norms say about the weights"
    )
    note: str | None = Field(
        default=None, description="that the base is listed among the models, if it is"
    )
    pools: tuple[Pool, ...] = Field(description="at the granularity of the settings")
    layers: tuple[Pool, ...] = Field(description="at granularity layer, always")
    warnings: tuple[str, ...]

    @property
    def weights(self) -> list[str] | None:
        """The weight of each model in words; None if all are 1."""
        by_hand = [model.weight_by_hand for model in self.models]
        if "weight" in self.settings.varying and all(by_hand):
            return [str(weight) for weight in by_hand]
        if all(model.weight == 1 for model in self.models):
            return None
        return [f"{model.weight:g}" for model in self.models]


class Header(Record):
    """What the configuration and headers of a model tell, without its weights."""

    name: str
    base: str | None = Field(description="its base; null for the base itself")
    commit: str | None = Field(description="of the repository; null for a folder")
    download: int = Field(description="bytes of weights that are not on disk")
    parameters: int = Field(description="elements of all floating-point tensors")
    precisions: dict[str, int] = Field(description="elements by stored dtype")
    quantised: str | None = Field(description="what is quantised in it, or null")
    vocabulary: int | None = Field(description="entries of its embeddings")
    tied: bool | None = Field(
        description="whether the embeddings stand in for a head that is not stored"
    )
    misfit: str | None = Field(description="why it does not fit its base, or null")
    not_written: Tensors | None = Field(
        description="floating-point tensors that mergekit's definition of the "
        "architecture lacks, and a merge leaves out; null where it has none"
    )
    not_in_base: Tensors | None
    only_in_base: Tensors | None


class Options(Record):
    """mergekit's options that may change the bits of a merge."""

    device: str = Field(description="on which tensors were merged")
    multi_gpu: bool
    threads: int = Field(description="torch's threads on the CPU")
    random_seed: int | None
    lora_merge_dtype: str | None
    unsafe_truncate_embeddings: bool
    allow_crimes: bool


class Report(Record):
    """What `mergekit-metagpt inspect` found."""

    schema_version: Literal[3] = 3
    versions: dict[str, str] = Field(description="of this package and its host")
    method: str = Field(description="merge_method of the YAML, or metagpt")
    refused: str | None = Field(
        default=None, description="why this can be measured, but not merged; else null"
    )
    headers: tuple[Header, ...] = Field(
        default=(), description="of base and models, by `inspect --remote`"
    )
    options: Options | None = Field(
        default=None, description="of the merge; null where nothing was merged"
    )
    families: tuple[Family, ...]

    @property
    def estimated(self) -> bool:
        """Whether some figures are estimates from a sample of the weights."""
        return any(family.sample is not None for family in self.families)


Verdict = Literal["verified", "different", "not recorded", "not checked"]


class Check(Record):
    """What one check of `verify` found."""

    name: str
    verdict: Verdict
    details: str
    different: tuple[str, ...] = Field(
        default=(), description="all tensors or models that differ"
    )
    largest_difference: float | None = Field(
        default=None, description="between stored and replayed elements"
    )


class Verification(Record):
    """What `mergekit-metagpt verify` found."""

    schema_version: Literal[1] = 1
    verdict: Verdict
    seed: int = Field(description="by which tensors were sampled")
    checks: tuple[Check, ...]
