"""What config.json says of a model, checked: its architecture, or why there is none."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.checkpoints.stored import StoredTensor

if TYPE_CHECKING:
    from mergekit.architecture import ModelArchitecture, WeightInfo
    from transformers import PretrainedConfig

FILE = "config.json"
REPAIR = "Repair it, or fetch the model again"
_MOST_SHOWN = 60


@dataclass(frozen=True)
class Architecture:
    """A model's tensors by its configuration.

    Attributes:
        weights: by mergekit's definition; where it has none, transformers' ties.
        defined: whether mergekit has a definition.
        layers: how many there are, by the name of the module, where it has.
        refused: why mergekit could not plan a merge of this model, or None. Its files
            can be measured all the same.
    """

    weights: tuple[WeightInfo, ...] = ()
    defined: bool = False
    layers: Mapping[str, int] = field(default_factory=dict)
    refused: str | None = None


def content(folder: Path) -> Mapping[str, Any]:
    """Return what a model's config.json holds; nothing if it cannot be read.

    Args:
        folder: of the model.

    Returns:
        the JSON object.
    """
    try:
        found = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def architecture_of(
    label: str,
    folder: Path,
    stored: Mapping[str, StoredTensor],
    *,
    override: str | None = None,
    trust_remote_code: bool = False,
) -> Architecture:
    """Find out which tensors a model has by its configuration.

    Args:
        label: the model as its user wrote it, for messages.
        folder: where its config.json lies.
        stored: the tensors of its files.
        override: the architecture that its user says it is of.
        trust_remote_code: run code that comes with a model.

    Returns:
        the architecture. Never raises: what cannot be used is said in it.
    """
    file = folder / FILE
    if not file.exists():
        return Architecture(
            refused=f"{folder} has no {FILE}; expected a model's folder"
        )
    found = Architecture()
    try:
        given = json.loads(file.read_bytes())
        if override is not None and isinstance(given, dict):
            given = {**given, "architectures": [override]}
        odd = _odd(given)
        if odd is None:
            config = _config(folder, override, trust_remote_code=trust_remote_code)
            found, odd = _found(config, stored)
    # Whatever transformers, mergekit and the modules of an architecture raise.
    except Exception as error:
        odd = f"cannot be used: {type(error).__name__}: {error}"
    if odd is None:
        return found
    return replace(found, refused=f"{file} of {label} {odd}. {REPAIR}")


def _odd(given: Any) -> str | None:
    """What is wrong with the parts of a config.json that everything else rests on."""
    if not isinstance(given, dict):
        return f"holds {_shown(given)}; expected a JSON object"
    if not isinstance(given.get("model_type", ""), str):
        return f"has model_type {_shown(given['model_type'])}; expected a name"
    names = given.get("architectures")
    if not isinstance(names, list) or [type(name) for name in names] != [str]:
        return f"has architectures {_shown(names)}; expected a list of one name"
    if taken := _taken(given):
        return (
            f"has a key {_shown(taken)}, which is a method of transformers' "
            "configurations; expected settings"
        )
    return None


def _taken(given: Mapping[str, Any]) -> str | None:
    """A key that would replace what transformers calls of a configuration."""
    from transformers import PretrainedConfig

    methods = (key for key in given if callable(getattr(PretrainedConfig, key, None)))
    return next(methods, None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _config(
    folder: Path, override: str | None, *, trust_remote_code: bool
) -> PretrainedConfig:
    import transformers

    config = transformers.AutoConfig.from_pretrained(
        str(folder), trust_remote_code=trust_remote_code
    )
    if override is not None:
        config.architectures = [override]
    config.to_json_string()  # as at the end of a merge
    return config


def _found(
    config: PretrainedConfig, stored: Mapping[str, StoredTensor]
) -> tuple[Architecture, str | None]:
    """The architecture, and what is wrong with its number of layers."""
    from mergekit.architecture import arch_info_for_config

    known = arch_info_for_config(config)
    if known is None:
        return Architecture(_ties(config, stored)), None
    odd = _odd_layers(known, config, stored)
    parts = known.modules.items()
    layers = {name: part.architecture.num_layers(config) for name, part in parts}
    # The names and ties of what there is hold all the same.
    return Architecture(tuple(known.all_weights(config)), True, layers), odd


def _ties(
    config: PretrainedConfig, stored: Mapping[str, StoredTensor]
) -> tuple[WeightInfo, ...]:
    import transformers
    from mergekit.architecture import WeightInfo

    ties = None
    with contextlib.suppress(ImportError):  # of what that architecture needs
        model_class = getattr(transformers, config.architectures[0], None)
        ties = getattr(model_class, "_tied_weights_keys", None)
    return tuple(
        WeightInfo(name=name, tied_names=(source,))
        for name, source in (ties.items() if isinstance(ties, dict) else ())
        if source in stored
    )


def _odd_layers(
    known: ModelArchitecture,
    config: PretrainedConfig,
    stored: Mapping[str, StoredTensor],
) -> str | None:
    """Whether the last layer of each module is not stored; without any, the first."""
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    def made(name: str) -> bool:
        return can_convert_checkpoint_keys(config.model_type, set(stored), name)

    for part in known.modules.values():
        module, prefix = part.architecture, part.weight_prefix or ""
        key = module.num_layers_config_key()
        if key is None:
            continue  # a fixed number of them
        count = module.num_layers(config)
        at = max(count - 1, 0)
        weights = module.layer_weights(at, config) or []
        names = [
            f"{prefix}{name}"
            for weight in weights
            for name in (weight.name, *(weight.aliases or ()))
        ]
        if all(weight.optional for weight in weights):
            continue
        there = any(name in stored for name in names) or any(map(made, names))
        if count < 0 or there == (count == 0):
            return (
                f"has {key} {_shown(count)}, but layer {_shown(at)} is "
                f"{'' if there else 'not '}stored ({_shown(names[0])}); expected the "
                "number of layers of the model"
            )
    return None
