"""Refuses a merge whose tokenizer or chat template mergekit could not make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from mergekit.tokenizer import PermutedVocabulary

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.layouts import stored_as
from mergekit_metagpt.checkpoints.nearby import is_local, missing
from mergekit_metagpt.merge_config.plan import Planned
from mergekit_metagpt.merge_config.yaml_errors import closest

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions


def check_tokenizer(
    planned: Sequence[Planned],
    config: MergeConfiguration,
    opened: Mapping[ModelReference, Checkpoint],
) -> None:
    """Let mergekit make the tokenizer now that it would make after the merge.

    Raises a ValueError if it cannot make the tokenizer or its chat template.
    """
    from importlib.resources import files

    from mergekit._data import chat_templates
    from mergekit.merge import _set_chat_template

    key, given = "tokenizer_source", config.tokenizer_source
    if config.tokenizer:
        key, given = "tokenizer.source", config.tokenizer.source
    source = str(given or "")
    meant = closest(source.lower(), ("base", "union"))
    if meant not in (None, source) and "/" not in source:
        raise ValueError(
            f"{key} is {source!r}; expected base, union or a model. Did you mean "
            f"{meant}?"
        )
    path = "" if given is None or isinstance(given, str) else given.model.path
    if is_local(path) and not Path(path).exists():
        what = missing(path, "a model's folder, base or union", folders=True)
        raise ValueError(f"{key}: {what}")
    try:
        if config.chat_template != "auto":
            _set_chat_template(SimpleNamespace(), config)
    except RuntimeError as error:
        templates = (Path(file.name).stem for file in files(chat_templates).iterdir())
        names = sorted(name for name in templates if not name.startswith("_"))
        raise ValueError(
            f"chat_template is {config.chat_template!r}; expected auto, a template in "
            f"Jinja, or one of {', '.join(names)}"
        ) from error
    inputs = [tensor.task.gather_tensors for tensor in planned]
    vocabularies = [at for at in inputs if isinstance(at, PermutedVocabulary)]
    try:
        if vocabularies:
            first = vocabularies[0]
            built = first.tokenizer_task.execute()
            first.execute(built, _narrow(first, opened))
    except Exception as error:  # whatever mergekit and the tokenizers' classes raise
        # transformers lists all kinds of files that it would have read.
        said = str(error).partition(" from one of:")[0]
        if not isinstance(error, RuntimeError | ValueError | AssertionError):
            said = f"{type(error).__name__}: {said}"
        raise ValueError(
            f"mergekit cannot make the tokenizer of this merge: {said}. Change "
            "tokenizer_source or tokenizer in the YAML"
        ) from error


def _narrow(
    vocabulary: PermutedVocabulary, opened: Mapping[ModelReference, Checkpoint]
) -> dict[ModelReference, torch.Tensor]:
    """Stand-ins for vocabulary tensors, with a single element for each token."""
    narrow = {}
    for model, weight in vocabulary.gather_tensors.weight_info.items():
        stored = stored_as(opened[model], weight.name)
        if stored is not None:
            shape = [1] * len(stored.shape)
            shape[vocabulary.vocabulary_axis] = stored.shape[vocabulary.vocabulary_axis]
            narrow[model] = torch.zeros(shape, device="cpu")
    return narrow


def check_copied_tokenizer(config: MergeConfiguration, options: MergeOptions) -> None:
    """Raise a ValueError if the base has no tokenizer for mergekit to copy."""
    from mergekit.merge import _get_donor_model
    from transformers import AutoTokenizer

    if not options.copy_tokenizer or config.tokenizer_source or config.tokenizer:
        return
    donor, folder = _get_donor_model(config, options)
    files = {path.name for path in Path(folder).iterdir()}
    if "tokenizer_config.json" in files and files & {
        "tokenizer.json",
        "tokenizer.model",
    }:
        return
    try:
        AutoTokenizer.from_pretrained(
            donor.model.path,
            revision=donor.model.revision,
            trust_remote_code=options.trust_remote_code,
        )
    except Exception as error:  # whatever the class of a tokenizer raises
        raise ValueError(
            f"the base {donor} has no tokenizer that can be copied. Give "
            "tokenizer_source: MODEL in the YAML, or merge with --no-copy-tokenizer"
        ) from error
