"""Refuses errors that a YAML alone shows: in methods, bases, names, parameters."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_metagpt.merge_config.merge_yaml import (
    Inputs,
    slices_of,
    values_of,
)
from mergekit_metagpt.merge_config.yaml_errors import closest
from mergekit_metagpt.method.composed import COMPOSED, RANDOM
from mergekit_metagpt.method.parameters import (
    checked,
    checked_of,
    no_base,
    only_base,
    require_one_sample,
)
from mergekit_metagpt.method.registration import register

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration

LOG = logging.getLogger("mergekit_metagpt")
METHODS = ("metagpt", *(f"metagpt_{name}" for name in COMPOSED))
# The results of these depend on --random-seed.
RANDOM_METHODS = tuple(f"metagpt_{name}" for name in RANDOM)
# Methods of mergekit that convert to `metagpt` itself, and all that convert.
_ALIKE = ("task_arithmetic", "linear", "model_stock", "sce")
CONVERTIBLE = (*_ALIKE, *COMPOSED)
# Parameters of each model that are checked in the YAML; `metagpt` has no density.
_OF_MODELS = {"weight", "density"}


def recipe_for(method: str) -> str | None:
    """Return which of `METHODS` a method of mergekit converts to, or None."""
    if method in COMPOSED:
        return f"metagpt_{method}"
    return "metagpt" if method in _ALIKE else None


def check_yaml(config: MergeConfiguration, file: str | Path = "OLD.yml") -> None:
    """Check everything about a merge by MetaGPT that follows from the YAML alone.

    Raises a ValueError for another method; no base, or only the base; a base missing
    among the sources of a slice; an illegal weight or density of a model; an empty list
    as a parameter; a model's density of 0; a list as `exclude`; a `sample` that is
    not one number; `granularity: layer` with slices that move layers.
    """
    if config.merge_method not in METHODS:
        raise ValueError(_other_method(config.merge_method, file))
    slices = list(slices_of(config))
    for part in slices:
        if twice := [m for m in part.models if part.models.count(m) > 1]:
            raise ValueError(f"{twice[0]} is given twice in {part.place}. List it once")
        if part.base is None:
            raise ValueError(no_base(config.merge_method, part.place))
        if not part.place.endswith("models") and part.base not in part.models:
            raise ValueError(
                f"the base {part.base} is not among the sources of {part.place}. Add "
                "it there: task vectors are measured against it"
            )
    if all(model == part.base for part in slices for model in part.models):
        raise ValueError(only_base(slices[0].base))
    require_one_sample(
        (value for part in slices for value in _samples(part)),
        (
            granularity
            for part in slices
            for level in part.shared
            for granularity in values_of(level.get("granularity"))
        ),
    )
    of_models = {"weight"} if config.merge_method == "metagpt" else _OF_MODELS
    for part in slices:
        for model, levels in zip(part.models, part.settings, strict=True):
            own = levels[: len(levels) - len(part.shared)]
            for level in own if model != part.base else ():  # the base has no weight
                for name in sorted(of_models & level.keys()):
                    for value in values_of(level[name]):
                        checked_of(model, name, value)
            density = next((v["density"] for v in levels if "density" in v), None)
            if density == 0 and model != part.base:
                raise ValueError(
                    f"density of {model} is 0, which drops its whole task vector; "
                    "expected a number above 0. To leave it out, give it weight: 0"
                )
        for level in (level for levels in part.settings for level in levels):
            for name in (name for name, value in level.items() if value == []):
                raise ValueError(
                    f"{name} is an empty list, which mergekit would ignore; expected a "
                    "value"
                )
            exclude = level.get("exclude")
            if isinstance(exclude, list) and not any(
                hasattr(item, "value") for item in exclude
            ):
                raise ValueError(
                    f"exclude is the list {exclude!r}, of which mergekit would pick "
                    "one entry; expected one string, comma-separated"
                )
            granularities = values_of(level.get("granularity"))
            if part.moves_layers and "layer" in granularities:
                raise ValueError(
                    f"granularity 'layer': {part.place} moves layers to other "
                    "indices, which have no layer-wise norms; use granularity: model "
                    "or granularity: tensor"
                )


def check_method(config: MergeConfiguration) -> None:
    """Raise a ValueError for a method that neither mergekit nor this package has."""
    from mergekit.merge_methods import registry

    register()
    methods = sorted(method.spec.name for method in registry.registered_methods())
    if config.merge_method not in methods:
        raise ValueError(
            f"merge_method is {config.merge_method!r}, which mergekit does not have. "
            f"{_hint(config.merge_method, methods)}Expected one of {', '.join(methods)}"
        )


def _other_method(method: str, file: str | Path) -> str:
    """The error of a YAML of a method that is not ours."""
    if new := recipe_for(method):
        return (
            f"merge_method is {method!r}; this command takes metagpt and metagpt_NAME. "
            f"To convert it: mergekit-metagpt convert {shlex.quote(str(file))} NEW.yml "
            f"(gives {new}). To merge it as it is, use mergekit-yaml"
        )
    return (
        f"merge_method is {method!r}; this command takes {', '.join(METHODS)}. "
        f"{_hint(method, METHODS)}Use mergekit-yaml for other methods"
    )


def _hint(name: str, names: Collection[str]) -> str:
    """Suggest the most similar name, or all names with this part, such as `dare`."""
    name = name.lower().replace("-", "_")
    meant = closest(name, names)
    near = [meant] if meant else [n for n in names if f"_{name}_" in f"_{n}_"]
    return f"Did you mean {' or '.join(near)}? " if near else ""


def _samples(part: Inputs) -> Iterator[float]:
    """Yield every value of `sample` on a slice; the default if filters leave a rest."""
    for level in part.shared:
        if "sample" not in level:
            continue
        setting = level["sample"]
        yield from (checked("sample", value) for value in values_of(setting))
        entries = setting if isinstance(setting, list) else [setting]
        if any(getattr(entry, "filter", None) in (None, "*") for entry in entries):
            return  # this one applies to all remaining tensors
    yield 1.0  # the default


def check_names(config: MergeConfiguration, file: Path | None = None) -> None:
    """Refuse misspelt or misplaced parameters, which mergekit silently ignores.

    Warns of parameters of other methods. Raises a ValueError if a parameter looks
    misspelt, or one for all models is given for one; it names the file, unless the
    caller does.
    """
    from mergekit.merge_methods import registry
    from mergekit.merge_methods.base import ParameterScope

    register()
    spec = registry.get(config.merge_method).spec
    scopes = {parameter.name: parameter.scope for parameter in spec.parameters}
    unknown: dict[str, str] = {}
    shared = "`parameters:`"
    for part in slices_of(config):
        for model, levels in zip(part.models, part.settings, strict=True):
            for number, level in enumerate(levels):
                of_one_model = number < len(levels) - len(part.shared)
                for name in level:
                    if name not in scopes:
                        under = f"{model} in {part.place}"
                        unknown.setdefault(name, under if of_one_model else shared)
                    elif of_one_model and scopes[name] == ParameterScope.SHARED:
                        raise ValueError(
                            f"{name} stands under {model} in {part.place}, but is one "
                            "for all models, and mergekit would ignore it there. Move "
                            "it to the `parameters:` at the end of the YAML"
                        )
    for name in sorted(unknown):
        if meant := closest(name, scopes):
            at = "" if file is None else f"{file}: "
            raise ValueError(
                f"{at}{name}, under {unknown[name]}, is no parameter of "
                f"{spec.name}; did you mean {meant}?"
            )
    if unknown:
        names = ", ".join(sorted(unknown))
        LOG.warning("ignored, as %s has none: %s", spec.name, names)
