"""Reads a model's architecture from config.json, or says why there is none."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.checkpoints.stored import StoredTensor, layer_key

if TYPE_CHECKING:
    from mergekit.architecture import ModelArchitecture, WeightInfo
    from transformers import PretrainedConfig

FILE = "config.json"
REPAIR = "Repair it, or fetch the model again"
_MOST_SHOWN = 60


@dataclass(frozen=True)
class Architecture:
    """The tensors that a model has by its configuration.

    Attributes:
        weights: those of mergekit's definition; without one, those that transformers
            ties to others.
        layers: number of layers of each module of the definition.
        vocabulary: names of the tensors with an entry for each token.
        refused: why mergekit cannot plan a merge of this model, or None. The model can
            be measured in either case.
    """

    weights: tuple[WeightInfo, ...] = ()
    layers: Mapping[str, int] = field(default_factory=dict)
    vocabulary: frozenset[str] = frozenset()
    refused: str | None = None


def content(folder: Path) -> Mapping[str, Any]:
    """Return the object in a model's config.json; empty if it cannot be read."""
    try:
        config = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def quantisation(config: bytes | None) -> str | None:
    """Say how a model is quantised by its config.json, if it is."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        given = json.loads(config or b"{}").get("quantization_config")
        if given:
            method = given.get("quant_method", "unnamed")
            return f"its config.json has a quantization_config ({_shown(method)})"
    return None


def architecture_of(
    label: str,
    folder: Path,
    stored: Mapping[str, StoredTensor],
    *,
    override: str | None,
    trust_remote_code: bool,
) -> Architecture:
    """Find out which tensors a model has by its configuration; never raise.

    The user may `override` the architecture that config.json names. Problems are
    reported as `refused`.
    """
    file = folder / FILE
    if not file.exists():
        return Architecture(
            refused=f"{folder} has no {FILE}; expected a model's folder"
        )
    try:
        given = json.loads(file.read_bytes())
        if override is not None and isinstance(given, dict):
            given = {**given, "architectures": [override]}
        problem = _problem(given)
        if problem is None:
            config = _config(folder, override, trust_remote_code=trust_remote_code)
            architecture = _architecture(config, stored)
            if architecture.refused is not None:
                refused = f"{label} {architecture.refused}"
                return replace(architecture, refused=refused)
            return architecture
    # Whatever transformers, mergekit and the modules of an architecture raise.
    except Exception as error:
        problem = f"cannot be used: {type(error).__name__}: {error}"
    return Architecture(refused=f"{file} of {label} {problem}. {REPAIR}")


def _problem(given: Any) -> str | None:
    """What makes a config.json useless to everything that reads it."""
    if not isinstance(given, dict):
        return f"holds {_shown(given)}; expected a JSON object"
    names = given.get("architectures")
    if not isinstance(names, list) or [type(name) for name in names] != [str]:
        return f"has architectures {_shown(names)}; expected a list of one name"
    return None


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
    config.to_json_string()  # raises now what it would raise at the end of a merge
    return config


def _architecture(
    config: PretrainedConfig, stored: Mapping[str, StoredTensor]
) -> Architecture:
    from mergekit.architecture import arch_info_for_config

    definition = arch_info_for_config(config)
    if definition is None:
        return Architecture(
            weights=_ties(config, stored), vocabulary=_vocabulary(config, stored)
        )
    parts = definition.modules.items()
    weights = tuple(definition.all_weights(config))
    return Architecture(
        weights=weights,
        layers={name: part.architecture.num_layers(config) for name, part in parts},
        vocabulary=frozenset(w.name for w in weights if w.vocabulary_axis is not None),
        refused=_other_names(definition, config, stored),
    )


def _vocabulary(
    config: PretrainedConfig, stored: Mapping[str, StoredTensor]
) -> frozenset[str]:
    """Tensors outside the layers that, by their shape, have an entry for each token."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    return frozenset(
        name
        for name, tensor in stored.items()
        if layer_key(name) == name and len(tensor.shape) > 1 and size in tensor.shape
    )


def _ties(
    config: PretrainedConfig, stored: Mapping[str, StoredTensor]
) -> tuple[WeightInfo, ...]:
    import transformers
    from mergekit.architecture import WeightInfo

    ties = None
    with contextlib.suppress(ImportError):  # a package that the architecture needs
        model_class = getattr(transformers, config.architectures[0], None)
        ties = getattr(model_class, "_tied_weights_keys", None)
    return tuple(
        WeightInfo(name=name, tied_names=(source,))
        for name, source in (ties.items() if isinstance(ties, dict) else ())
        if source in stored
    )


def _other_names(
    definition: ModelArchitecture,
    config: PretrainedConfig,
    stored: Mapping[str, StoredTensor],
) -> str | None:
    """Report a module whose layers are all stored under names unknown to mergekit."""
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    for part in definition.modules.values():
        module, prefix = part.architecture, part.weight_prefix or ""
        expected = [
            f"{prefix}{name}"
            for at in range(module.num_layers(config))
            for weight in module.layer_weights(at, config) or ()
            if not weight.optional
            for name in (weight.name, *(weight.aliases or ()))
        ]
        if not expected or not stored or any(name in stored for name in expected):
            continue
        if can_convert_checkpoint_keys(config.model_type, set(stored), expected[0]):
            continue
        close = max(stored, key=lambda name: (_common_end(name, expected[0]), name))
        extra = prefix_of(stored, expected)
        return (
            f"stores {close}, where mergekit's definition of "
            f"{config.architectures[0]} expects {expected[0]}. "
            + (
                f"All names begin with {extra!r}: store the tensors without it"
                if extra
                else "Merge copies that store the expected names"
            )
        )
    return None


def prefix_of(names: Collection[str], expected: Collection[str]) -> str | None:
    """Return the prefix that a wrapper has put before all names, such as `module.`.

    `expected` are names of the model's own tensors, of which some may be missing.
    """
    expected = set(expected)
    for name in names:
        parts = name.split(".")
        for at in range(1, len(parts)):
            if ".".join(parts[at:]) in expected:
                prefix = ".".join(parts[:at]) + "."
                return prefix if all(n.startswith(prefix) for n in names) else None
    return None


def _common_end(one: str, other: str) -> int:
    """The number of components at the end that two names have in common."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
