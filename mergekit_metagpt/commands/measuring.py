"""Measures the models that a user names, on disk or on the hub, without merging."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.merge_config import (
    checks,
    families,
    merge_yaml,
    plan_checks,
    tensor_coefficients,
)
from mergekit_metagpt.report import headers, inspecting, schema
from mergekit_metagpt.scanning import sharing

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

    from mergekit_metagpt.scanning.sampling import Sample


def config_of(models: Sequence[str], base: str | None) -> MergeConfiguration:
    """Read a merge from a YAML, a merged model's folder, or a base and models."""
    if base is not None:
        for model in models:
            if Path(model).suffix in (".yml", ".yaml") and Path(model).is_file():
                raise ValueError(
                    f"{model} is a YAML, which names its own base; expected models "
                    "beside --base, or the YAML alone"
                )
        return families.config_of(base, models)
    if len(models) != 1:
        raise ValueError(
            f"{len(models)} models are given and no base; expected one CONFIG, or "
            "--base BASE and the models"
        )
    file = _yaml_of(models[0])
    if Path(models[0]).is_dir() and not file.is_file():
        raise ValueError(
            f"{models[0]} is a folder; expected a merge YAML, or --base BASE and the "
            "models"
        )
    config = merge_yaml.read_file(file)[1]
    checks.check_method(config)
    if config.merge_method in checks.METHODS:
        checks.check_names(config, file)
    return config


def _yaml_of(model: str) -> Path:
    """A YAML, or the one in the folder of a merged model."""
    file = Path(model)
    return file / "mergekit_config.yml" if file.is_dir() else file


def next_step(models: Sequence[str], base: str | None, *, adapters: bool) -> str:
    """Say which command finds the best weights, and how to write its YAML."""
    if base is None and not adapters:
        config, first = shlex.quote(str(_yaml_of(models[0]))), ""
    else:
        config, recipe = "merge.yml", "lora-adapters" if adapters else "your-own-models"
        first = (
            "name the models in a merge YAML (a template: mergekit-metagpt recipes "
            f"{recipe} > {config}), then "
        )
    return (
        f"Compare on your own text: {first}mergekit-metagpt compare {config} "
        "--text MODEL=FILE"
    )


def changed_since_merge(config: str, report: schema.Report) -> Iterator[str]:
    """Say which models changed after the merge in whose folder a YAML lies."""
    from mergekit_metagpt.commands import verifying

    file = _yaml_of(config)
    if file.name != verifying.YAML:
        return
    try:
        record = verifying.record_of(file.parent)
    except ValueError:  # of another version
        return
    # Of an adapter, a merge records the merged copy.
    changed = [
        new.name
        for _, new in (verifying.changed(record, report) if record else ())
        if not (isinstance(new, schema.Model) and new.adapter)
    ]
    if changed:
        yield (
            f"{', '.join(changed)} changed after this merge: "
            f"{file.parent}/metagpt.json has the coefficients that it was made with. "
            "Those below are of the files as they are now.\n"
        )


def report_of_adapters(adapters: Sequence[str], **wishes: Any) -> schema.Report:
    """Measure LoRA adapters without their base."""
    family, opened = families.open_adapters(adapters, **wishes)
    return inspecting.inspect([family], opened)


def report_of(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    sample: Sample | None = None,
    **wishes: Any,
) -> schema.Report:
    """Measure the models of a merge; wishes that are not None replace its settings."""
    merged = families.of_config(config, **wishes)
    with sharing.leader_first():
        opened = families.open_models(merged, options)
    planned = refused = None
    try:
        planned = plan_checks.check_plan(config, opened, options)
    except ValueError as error:
        refused = str(error)
    report = inspecting.inspect(
        merged,
        opened,
        method=config.merge_method,
        planned=planned,
        refused=refused,
        sample=sample,
    )
    changed = any(value is not None for value in wishes.values())
    varying = any(family.varying for family in merged)
    if planned and varying and not changed and sample is None:
        return inspecting.with_ranges(
            report, merged, tensor_coefficients.of_plan(planned)
        )
    return report


def remote_report_of(
    config: MergeConfiguration,
    options: MergeOptions,
    *,
    sample: Sample | None,
    **wishes: Any,
) -> schema.Report:
    """Estimate models on the hub from a sample; without one, read headers alone."""
    merged = families.of_config(config, **wishes)
    glimpsed = families.glimpse_models(merged, options)
    found = headers.headers_of(merged, glimpsed)
    opened = {model: at.checkpoint for model, at in glimpsed.items()}
    if sample is None or any(header.misfit for header in found):
        merged = []
    report = inspecting.inspect(
        merged,
        opened,
        method=config.merge_method,
        refused=next((c.refused for c in opened.values() if c.refused), None),
        sample=sample,
    )
    return report.model_copy(update={"headers": found})
