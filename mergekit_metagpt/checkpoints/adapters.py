"""Reads LoRA adapters: of each adapted weight its factors and scale, from headers."""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.files import read_header
from mergekit_metagpt.checkpoints.identity import FileIdentity
from mergekit_metagpt.checkpoints.layouts import stored_as
from mergekit_metagpt.checkpoints.stored import Adapter, Factors, StoredTensor

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Settings by which the task vector is no product of factors, and what they are.
OTHER_FORMULAS = {
    "use_dora": "DoRA",
    "lora_bias": "biases of its factors",
    "modules_to_save": "whole modules",
    "trainable_token_indices": "trained tokens",
    "layer_replication": "replicated layers",
    "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
}
# Ways to begin that leave the base as it is; others take a part of it into the factors.
PLAIN_BEGINNINGS = (None, True, False, "gaussian", "eva", "orthogonal")
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)(?P<nested>(?:\.base_layer)*)"
    r"\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.weight)?"
)
# Experts that PEFT fuses as it loads them, and what it then scales otherwise.
_EXPERT = re.compile(r"\.experts\.\d+\.")
_UNEVEN = ("use_rslora", "rank_pattern", "alpha_pattern")
_COPY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.base_layer\.weight")


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a LoRA adapter and no model."""
    models = (*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*"))
    return (folder / CONFIG).is_file() and not models


def is_cached(path: str, revision: str | None) -> bool:
    """Whether a repository's adapter lies in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(path, CONFIG, revision=revision)
    except HFValidationError:  # no name of a repository
        return False
    return isinstance(cached, str)


def download(path: str, revision: str | None) -> Path:
    """Return the folder of an adapter of a repository, which is downloaded whole.

    Raises a ValueError if the repository is no adapter, and whatever the client of the
    hub raises.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    folder = None
    for name in (CONFIG, *WEIGHTS):
        try:
            folder = Path(hf_hub_download(path, name, revision=revision)).parent
        except LocalEntryNotFoundError:  # the hub was not asked
            raise
        except EntryNotFoundError as error:
            if folder is None:
                raise ValueError(
                    f"{path} is no LoRA adapter: the repository holds no {CONFIG}"
                ) from error
            continue
        if name != CONFIG:
            break
        revision = folder.name  # the commit, should the branch move meanwhile
    assert folder is not None
    return folder


def _config(label: str, folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{label} is no LoRA adapter: {folder} holds no {CONFIG}"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"{folder / CONFIG} is corrupt: {error}. Fetch it again"
        ) from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} holds no mapping. Fetch it again")
    return config


def _reason_against(config: Mapping[str, Any]) -> str | None:
    """What an adapter has beside factors, or None where there is nothing."""
    kind, beginning = config.get("peft_type"), config.get("init_lora_weights")
    if kind != "LORA":
        return f"is an adapter of another type ({kind})"
    for key, what in OTHER_FORMULAS.items():
        if config.get(key):
            return f"has {what} ({key})"
    if config.get("bias", "none") != "none":
        return f"has trained biases (bias: {config['bias']})"
    if beginning not in PLAIN_BEGINNINGS:
        return f"begins from a changed base (init_lora_weights: {beginning})"
    return None


def read_adapter(label: str, folder: Path) -> Checkpoint:
    """Read the headers of an adapter: a checkpoint that stores factors.

    Raises a ValueError if the task vector is not the product of the factors, or a
    factor does not fit its configuration; an OSError if a file is missing, truncated or
    corrupt.
    """
    config = _config(label, folder)
    if why := _reason_against(config):
        raise _refusal(label, why)
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{label} holds no weights; expected {' or '.join(WEIGHTS)}")
    header = read_header(label, file)
    tensors = {tensor.name: tensor for tensor in header.tensors}
    if other := sorted(header.names.difference(tensors)):
        raise _refusal(label, f"stores {other[0]}, not in floating point")
    factors = dict(_factors(label, tensors, config))
    if not factors:
        raise ValueError(f"{label} holds no factors. Fetch it again")
    return Checkpoint(
        label=label,
        tensors=tensors,
        tied_names={},
        identity=tuple(FileIdentity.of(path) for path in (folder / CONFIG, file)),
        vocabulary=frozenset(name for name, f in factors.items() if f.embedding),
        adapter=Adapter(folder, factors, config),
    )


def _refusal(label: str, why: str) -> ValueError:
    return ValueError(
        f"{label} {why}: its factors alone do not tell how far it moved. Name its base "
        "and give --lora-merge-cache FOLDER to measure a merged copy"
    )


def _factors(
    label: str, tensors: Mapping[str, StoredTensor], config: Mapping[str, Any]
) -> Iterator[tuple[str, Factors]]:
    """Yield the factors of every adapted weight, by its name."""
    sides: dict[tuple[str, int, bool], dict[str, StoredTensor]] = {}
    copies: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if found := _FACTOR.fullmatch(name):
            depth = found["nested"].count(".base_layer")
            key = found["module"], depth, bool(found["embedding"])
            sides.setdefault(key, {})[found["side"]] = tensor
        elif found := _COPY.fullmatch(name):
            copies[found["module"]] = tensor
        else:
            raise _refusal(label, f"stores {name}, which is no factor")
    depths: dict[str, dict[int, bool]] = {}
    for (module, depth, embedding), pair in sides.items():
        if len(pair) != 2:
            (side,) = {"A", "B"}.difference(pair)
            raise OSError(f"{label} lacks lora_{side} of {module}. Fetch it again")
        depths.setdefault(module, {})[depth] = embedding
    if alone := sorted(copies.keys() - depths.keys()):
        raise _refusal(label, f"stores the weight of {alone[0]} itself")
    for module, levels in depths.items():
        if _EXPERT.search(module) and (uneven := [k for k in _UNEVEN if config.get(k)]):
            raise _refusal(
                label,
                f"adapts experts one by one with {uneven[0]}, which PEFT scales by its "
                "version",
            )
        ordered = [sides[module, depth, levels[depth]] for depth in sorted(levels)]
        parameters = _parameters(label, module, ordered, config)
        for parameter, pair in zip(parameters, ordered, strict=True):
            target = f"{module}.{parameter}" if parameter else module
            down, up = pair["A"], pair["B"]
            if len(down.shape) != 2 or len(up.shape) != 2:
                raise _refusal(label, f"adapts {module}, a convolution")
            rank = _of_pattern(config, "rank_pattern", target, config.get("r", 8))
            alpha = _of_pattern(
                config, "alpha_pattern", target, config.get("lora_alpha", 8)
            )
            size, other = down.shape[0], up.shape[1]
            fits = rank > 0 and size == other and size > 0
            # Of experts, the factors are stacked.
            if not fits or (size % rank if parameter else size != rank):
                raise ValueError(
                    f"{label} has factors of rank {size} and {other} for {module}, and "
                    f"rank {rank} in its {CONFIG}. Fetch it again"
                )
            root = math.sqrt(rank) if config.get("use_rslora") else rank
            yield (
                f"{module}.{parameter or 'weight'}",
                Factors(
                    module=module,
                    down=down,
                    up=up,
                    rank=rank,
                    scale=alpha / root,
                    embedding=any(levels.values()),
                    copy=copies.get(module),
                ),
            )


def _parameters(
    label: str,
    module: str,
    levels: Sequence[Mapping[str, StoredTensor]],
    config: Mapping[str, Any],
) -> Sequence[str | None]:
    """Names of the parameters that the wrappers of a module adapt, the outermost first.

    PEFT wraps them in the order in which the module has them, and stores no names. A
    target without a dot may be a parameter of any module that is not a target itself.
    """
    targets = config.get("target_modules") or ()
    if isinstance(targets, str):
        is_module = re.fullmatch(targets, module) is not None
    else:
        is_module = any(f".{module}".endswith(f".{target}") for target in targets)
    names = [] if is_module else config.get("target_parameters") or []
    own = [n for n in names if f".{module}".endswith(f".{n.rpartition('.')[0]}")]
    own = own or [name for name in names if "." not in name]
    wanted = sorted(name.rpartition(".")[2] for name in own)
    if len(levels) == 1 and len(wanted) <= 1:
        return wanted or [None]
    if len(levels) == 2 and wanted == ["down_proj", "gate_up_proj"]:
        # Experts have gate_up_proj first, which reads what down_proj writes.
        outer, inner = levels
        if outer["B"].shape[0] == inner["A"].shape[1]:
            return wanted
    raise _refusal(label, f"adapts parameters of {module} that it does not name")


def _of_pattern(
    config: Mapping[str, Any], name: str, key: str, default: int | float
) -> Any:
    """The value of the first pattern that a module's name ends in, as PEFT matches."""
    patterns: Mapping[str, Any] = config.get(name) or {}
    found = (v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", key))
    return next(found, default)


def check_adapter(base: Checkpoint, model: Checkpoint) -> None:
    """Check from headers that an adapter belongs to a base.

    Raises a ValueError if the base lacks a weight that is adapted, or has it in another
    shape.
    """
    assert model.adapter is not None
    for name, factors in model.adapter.factors.items():
        stored = stored_as(base, name)
        if stored is None:
            raise ValueError(
                f"{model.label} adapts {name}, which {base.label} does not store. "
                "Does it belong to this base?"
            )
        rows, columns = factors.sides
        shapes: list[tuple[int, ...]] = [(rows, columns)]
        if not factors.embedding:
            shapes.append((columns, rows))
        if factors.experts > 1:
            shapes = [(factors.experts, *shape) for shape in shapes]
        if stored.shape not in shapes:
            raise ValueError(
                f"{model.label} adapts {name} as {list(shapes[0])}, which is "
                f"{list(stored.shape)} in {base.label}. Does it belong to this base?"
            )


def is_transposed(base: Checkpoint, name: str, factors: Factors) -> bool:
    """Whether a weight is stored as (B A)', which only its base can tell.

    Args:
        base: that the adapter belongs to.
        name: of the weight.
        factors: what is added to it.

    Returns:
        True for GPT-2's layers and some experts; relative to `Factors.sides`.

    Raises:
        ValueError: the weight is square, and the base's class cannot be asked.
    """
    if factors.embedding:
        return False
    stored = stored_as(base, name)
    assert stored is not None
    rows, columns = factors.sides
    if rows != columns:
        return tuple(stored.shape[-2:]) != (rows, columns)
    try:
        module = _empty_model(str(base.folder)).get_submodule(factors.module)
    except Exception as error:  # whatever the class of a model raises
        raise ValueError(
            f"whether {name} of {base.label} is stored transposed is not known: "
            f"{error}. Give --lora-merge-cache FOLDER to measure merged copies"
        ) from error
    conv1d = type(module).__name__ == "Conv1D"  # of transformers
    return conv1d or bool(getattr(module, "is_transposed", False))


@functools.lru_cache(maxsize=1)
def _empty_model(folder: str) -> Any:
    """A model of a folder's configuration, without memory for its weights."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        return getattr(transformers, config.architectures[0])(config)
