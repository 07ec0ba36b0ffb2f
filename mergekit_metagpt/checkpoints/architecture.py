"""What config.json says of a model, checked: its architecture, or why there is none."""

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
    """A model's tensors by its configuration.

    Attributes:
        weights: by mergekit's definition; where it has none, transformers' ties.
        layers: how many there are, by the name of the module, where it has.
        vocabulary: names of the tensors with an entry for each token.
        refused: why mergekit could not plan a merge of this model, or None. Its files
            can be measured all the same.
    """

    weights: tuple[WeightInfo, ...] = ()
    layers: Mapping[str, int] = field(default_factory=dict)
    vocabulary: frozenset[str] = frozenset()
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


def quantisation(config: bytes | None) -> str | None:
    """Say how a model is quantised by its config.json.

    Args:
        config: content of the file, if there is one.

    Returns:
        a sentence, or None.
    """
    with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
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
    if odd is not None:
        return replace(found, refused=f"{file} of {label} {odd}. {REPAIR}")
    if found.refused is not None:
        return replace(found, refused=f"{label} {found.refused}")
    return found


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
    """The architecture, and what is wrong with the names of what is stored."""
    from mergekit.architecture import arch_info_for_config

    known = arch_info_for_config(config)
    if known is None:
        return Architecture(
            weights=_ties(config, stored), vocabulary=_vocabulary(config, stored)
        ), None
    parts = known.modules.items()
    layers = {name: part.architecture.num_layers(config) for name, part in parts}
    refused = _other_names(known, config, stored)
    weights = tuple(known.all_weights(config))
    # The names and ties of what there is hold all the same.
    return Architecture(
        weights=weights,
        layers=layers,
        vocabulary=frozenset(w.name for w in weights if w.vocabulary_axis is not None),
        refused=refused,
    ), None


def _vocabulary(
    config: PretrainedConfig, stored: Mapping[str, StoredTensor]
) -> frozenset[str]:
    """Tensors outside the layers with an entry for each token, where no list says."""
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
    with contextlib.suppress(ImportError):  # of what that architecture needs
        model_class = getattr(transformers, config.architectures[0], None)
        ties = getattr(model_class, "_tied_weights_keys", None)
    return tuple(
        WeightInfo(name=name, tied_names=(source,))
        for name, source in (ties.items() if isinstance(ties, dict) else ())
        if source in stored
    )


def _other_names(
    known: ModelArchitecture,
    config: PretrainedConfig,
    stored: Mapping[str, StoredTensor],
) -> str | None:
    """Say so where no layer of a module is stored under a name of the definition."""
    from mergekit.architecture.conversion import can_convert_checkpoint_keys

    for part in known.modules.values():
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
    """Return what stands before the expected names in all names, if anything does.

    Args:
        names: as a wrapper of a model may have stored them.
        expected: names of the model itself; not all of them need be there.

    Returns:
        such as `module.` or `base_model.model.`.
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
    """Count the last components that two names have in common."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
