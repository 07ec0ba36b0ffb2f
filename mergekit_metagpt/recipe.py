"""Reads a merge YAML and checks, without touching a weight, that it can be merged."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before our own modules: importing it makes our hook import them, and it would find
# them half imported if one of them were the first to import mergekit's methods.
import mergekit.merge_methods  # noqa: F401
import yaml

from mergekit_metagpt.composed import COMPOSED
from mergekit_metagpt.parameters import all_zero, no_base, only_base, own_parameters

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration

Settings = Mapping[str, Any]

METHODS = ("metagpt", *(f"metagpt_{name}" for name in COMPOSED))

# More than any merge has; a few aliases of aliases, or `<<`, stand for billions.
MOST_VALUES = 1_000_000
# Beyond it Python reads no decimal; of 1:1:1... the time grows with the square.
MOST_DIGITS = 4300
_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")

# Keys of a merge YAML whose values name a model or a tokenizer.
_MODEL_KEYS = ("model", "base_model", "path", "source", "tokenizer_source")


@dataclass(frozen=True)
class Inputs:
    """The models of one slice (or of a whole module): those merged with each other.

    Attributes:
        place: where the configuration names them, for messages.
        base: theta_0, or None.
        models: all of them, the base too where it is listed.
        settings: for each model its parameters, from highest to lowest precedence.
        shared: parameters that hold for all models, likewise.
        moves_layers: whether a layer of an input comes out at another index.
        module: where the configuration names one, else empty.
        ranges: for each model its layers, from the first to before the last; None
            where all are merged.
    """

    place: str
    base: ModelReference | None
    models: tuple[ModelReference, ...]
    settings: tuple[tuple[Settings, ...], ...]
    shared: tuple[Settings, ...]
    moves_layers: bool
    module: str = ""
    ranges: tuple[tuple[int, int], ...] | None = None


def read(text: str) -> MergeConfiguration:
    """Parse a merge YAML; local models in it are marked as such (`./out/base`).

    mergekit's model card asks the hub for every path with exactly one slash, so that
    an offline merge of `out/base` would fail at its very end.

    Args:
        text: the YAML.

    Returns:
        mergekit's configuration.

    Raises:
        ValueError: the text is no YAML mapping, or mergekit refuses it.
    """
    from mergekit.config import MergeConfiguration

    try:
        data = _loaded(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"not readable as YAML: {_one_line(error)}") from error
    if not isinstance(data, dict):
        holds = "is empty" if data is None else f"holds {type(data).__name__}"
        raise ValueError(
            f"{holds}; expected a mapping with merge_method, base_model and models"
        )
    # mergekit ignores keys that it does not know.
    known = MergeConfiguration.model_fields
    for key in sorted(map(str, data.keys() - known.keys())):
        if meant := _meant(key, known):
            raise ValueError(f"{key} is no key of a merge; did you mean {meant}?")
    try:
        return MergeConfiguration.model_validate(_local(data))
    except (ValueError, RuntimeError, RecursionError) as error:
        raise ValueError(f"no merge configuration: {_one_line(error)}") from error


def _loaded(text: str) -> Any:
    """What `yaml.safe_load` returns, if it is not far more than what is written."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _values(node, {}) > MOST_VALUES:
            raise ValueError(
                f"its aliases stand for over {MOST_VALUES:,} values; expected a merge. "
                "Write out what is meant"
            )
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a YAML, those behind an alias or `<<` wherever it stands."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag in _NUMBERS and len(node.value) > MOST_DIGITS:
            raise ValueError(
                f"it has a number of {len(node.value):,} characters; expected at most "
                f"{MOST_DIGITS:,}. Put it in quotes if it is a word"
            )
        return 1
    if id(node) not in known:
        known[id(node)] = MOST_VALUES  # should it hold itself
        parts = (
            [part for pair in node.value for part in pair]
            if isinstance(node, yaml.MappingNode)
            else node.value
        )
        known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _local(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _local(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_local(item, key) for item in value]
    if key in ("source", "tokenizer_source") and value in ("base", "union"):
        return value
    if isinstance(value, str) and key in _MODEL_KEYS:
        return "+".join(map(_marked, value.split("+")))
    return value


def _marked(path: str) -> str:
    if not path or path.startswith(("/", ".", "~")) or not Path(path).exists():
        return path
    return f"./{path}"


def inputs(config: MergeConfiguration) -> Iterator[Inputs]:
    """Yield the models of each slice, or of each module that has no slices.

    Args:
        config: mergekit's configuration.

    Yields:
        what is merged with each other.
    """
    modules = config.modules or {"": config}
    for module_name, module in modules.items():
        within = f"modules.{module_name}." if module_name else ""
        shared = [module.parameters] if module_name else []
        shared.append(config.parameters)
        if module.models:
            yield Inputs(
                place=f"{within}models",
                base=config.base_model,
                models=tuple(entry.model for entry in module.models),
                settings=tuple(
                    _given(entry.parameters, *shared) for entry in module.models
                ),
                shared=_given(*shared),
                moves_layers=False,
                module=module_name,
            )
        first_layer = 0
        for number, entry in enumerate(module.slices or ()):
            if not entry.sources:
                raise ValueError(f"{within}slices[{number}] has no sources")
            ranges = [source.layer_range for source in entry.sources]
            yield Inputs(
                place=f"{within}slices[{number}]",
                base=entry.base_model or config.base_model,
                models=tuple(source.model for source in entry.sources),
                settings=tuple(
                    _given(source.parameters, entry.parameters, *shared)
                    for source in entry.sources
                ),
                shared=_given(entry.parameters, *shared),
                moves_layers=any(start != first_layer for start, _ in ranges),
                module=module_name,
                ranges=tuple(ranges),
            )
            first_layer += ranges[0][1] - ranges[0][0]


def models(config: MergeConfiguration) -> list[ModelReference]:
    """Return every base and model of a configuration once, in its order."""
    named = {
        model: None
        for part in inputs(config)
        for model in (part.base, *part.models)
        if model is not None
    }
    return list(named)


def _given(*settings: Settings | None) -> tuple[Settings, ...]:
    return tuple(found for found in settings if found)


def check(config: MergeConfiguration) -> None:
    """Check all that a YAML alone can tell of a merge by MetaGPT.

    Args:
        config: mergekit's configuration.

    Raises:
        ValueError: another method; no base, or only the base; the base is missing
            among the sources of a slice; an illegal parameter; every weight 0;
            `granularity: layer` with slices that move layers.
    """
    if config.merge_method not in METHODS:
        raise ValueError(
            f"merge_method is {config.merge_method!r}; this command takes "
            f"{', '.join(METHODS)}. {_hint(config.merge_method, METHODS)}Use "
            "mergekit-yaml for other methods"
        )
    found = list(inputs(config))
    for part in found:
        if twice := [m for m in part.models if part.models.count(m) > 1]:
            raise ValueError(f"{twice[0]} is given twice in {part.place}. Once is all")
        if part.base is None:
            raise ValueError(no_base(config.merge_method, part.place))
        if not part.place.endswith("models") and part.base not in part.models:
            raise ValueError(
                f"the base {part.base} is not among the sources of {part.place}. Add "
                "it there: task vectors are measured against it"
            )
    if all(model == part.base for part in found for model in part.models):
        raise ValueError(only_base(found[0].base))
    _check_parameters(found)


def _check_parameters(found: Sequence[Inputs]) -> None:
    legal = {parameter.name: parameter for parameter in own_parameters()}
    for part in found:
        for settings in part.settings:
            for name, value in _leaves(settings):
                if name in legal:
                    legal[name].validate(value)
            for exclude in (level.get("exclude") for level in settings):
                if isinstance(exclude, list) and not _is_conditional(exclude):
                    raise ValueError(
                        f"exclude is the list {exclude!r}, of which mergekit would "
                        "pick one entry; expected one string, comma-separated"
                    )
            if part.moves_layers and ("granularity", "layer") in _leaves(settings):
                raise ValueError(
                    f"granularity 'layer': {part.place} moves layers to other "
                    "indices, which have no layer-wise norms; use granularity: model "
                    "or granularity: tensor"
                )
    weights = [
        next((level["weight"] for level in settings if "weight" in level), 1.0)
        for part in found
        for model, settings in zip(part.models, part.settings, strict=True)
        if model != part.base
    ]
    if all(_is_always_zero(weight) for weight in weights):
        raise ValueError(all_zero())


def _leaves(settings: Sequence[Settings]) -> list[tuple[str, Any]]:
    """All single values that parameters take anywhere in their settings."""

    def values(setting: Any) -> Iterator[Any]:
        if isinstance(setting, list):
            for item in setting:
                yield from values(item)
        elif hasattr(setting, "value"):
            yield from values(setting.value)
        else:
            yield setting

    return [
        (name, value)
        for level in settings
        for name, setting in level.items()
        for value in values(setting)
    ]


def _is_conditional(setting: list[Any]) -> bool:
    return any(hasattr(item, "value") for item in setting)


def _is_always_zero(setting: Any) -> bool:
    """Whether a weight is 0 on every tensor; filters leave some to the default."""
    return _is_always(setting, lambda value: float(value) == 0)


def _is_always(setting: Any, wanted: Callable[[Any], bool]) -> bool:
    if hasattr(setting, "value"):
        setting = [setting]
    if not isinstance(setting, list):
        return wanted(setting)
    if not setting:
        return False
    if not _is_conditional(setting):
        return all(wanted(value) for value in setting)
    reaches_all = any(item.filter in (None, "*") for item in setting)
    return reaches_all and all(_is_always(item.value, wanted) for item in setting)


def ignored(config: MergeConfiguration, known: Collection[str]) -> list[str]:
    """Find parameters that mergekit would ignore without a word.

    Args:
        config: mergekit's configuration.
        known: the parameters of its method.

    Returns:
        names that mean nothing to the method, sorted.

    Raises:
        ValueError: one of them looks like a known one misspelt.
    """
    given = {
        name
        for part in inputs(config)
        for settings in part.settings
        for level in settings
        for name in level
    }
    unknown = sorted(given - set(known))
    for name in unknown:
        if meant := _meant(name, known):
            raise ValueError(
                f"{name} is no parameter of {config.merge_method}; did you mean "
                f"{meant}?"
            )
    return unknown


def _meant(name: str, known: Collection[str]) -> str | None:
    """The known name that looks most like a misspelt one."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    return close[0] if close else None


def _hint(name: str, known: Collection[str]) -> str:
    meant = _meant(name, known)
    return f"Did you mean {meant}? " if meant else ""


def check_method(config: MergeConfiguration, known: Collection[str]) -> None:
    """Refuse a merge method that there is not.

    Args:
        config: mergekit's configuration.
        known: names of all methods.

    Raises:
        ValueError: the method is none of them.
    """
    if config.merge_method not in known:
        raise ValueError(
            f"merge_method is {config.merge_method!r}, which mergekit does not have. "
            f"{_hint(config.merge_method, known)}Expected one of "
            f"{', '.join(sorted(known))}"
        )


def check_levels(config: MergeConfiguration, shared: Collection[str]) -> None:
    """Refuse a parameter of all models under a single one, where mergekit ignores it.

    Args:
        config: mergekit's configuration.
        shared: parameters that have one value for all models.

    Raises:
        ValueError: one of them stands under a model.
    """
    for part in inputs(config):
        for model, levels in zip(part.models, part.settings, strict=True):
            own = levels[: len(levels) - len(part.shared)]
            for name in (name for level in own for name in level if name in shared):
                raise ValueError(
                    f"{name} stands under {model} in {part.place}, but is one for all "
                    "models, and mergekit would ignore it there. Move it to the "
                    "`parameters:` at the end of the YAML"
                )
