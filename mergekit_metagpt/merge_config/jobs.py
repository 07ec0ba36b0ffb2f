"""Refuses what cannot be merged, from headers and mergekit's plan."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from mergekit import merge_methods
from mergekit.io.tasks import GatherTensors
from mergekit.tokenizer import PermutedVocabulary

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.layouts import stored_as
from mergekit_metagpt.checkpoints.opening import (
    hand_to_mergekit,
    open_checkpoints,
    planned_as_bases,
)
from mergekit_metagpt.checkpoints.pairs import check_distinct, check_pair
from mergekit_metagpt.checkpoints.stored import FLOATS, layer_key
from mergekit_metagpt.checkpoints.unwritten import lost, share_of
from mergekit_metagpt.merge_config import merge_yaml
from mergekit_metagpt.merge_config.checks import (
    METHODS,
    check_method,
    check_names,
    check_yaml,
)
from mergekit_metagpt.merge_config.merge_yaml import closest, slices_of
from mergekit_metagpt.merge_config.plan import Planned, names_in, plan_merge
from mergekit_metagpt.method import advice
from mergekit_metagpt.method.parameters import all_zero, require_named

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions


@dataclass(frozen=True)
class Job:
    """A merge that has been checked: nothing but headers was read.

    Attributes:
        config: mergekit's configuration.
        opened: base and models.
        planned: every output tensor, as mergekit's planner resolves it.
    """

    config: MergeConfiguration
    opened: Mapping[ModelReference, Checkpoint]
    planned: Sequence[Planned]

    @property
    def expected(self) -> list[str]:
        """Names of the output tensors that the base has, all of which are written."""
        return [
            tensor.name
            for tensor in self.planned
            if (base := tensor.task.base_model) is not None
            and (
                stored_as(self.opened[base], tensor.input_names[base])
                or tensor.input_names[base] in self.opened[base].others
            )
        ]


def check(
    config: MergeConfiguration, options: MergeOptions, file: Path | None = None
) -> Job:
    """Check that a merge by one of our methods can be done; register the methods.

    Args:
        config: mergekit's configuration.
        options: mergekit's own.
        file: where the configuration stands, for messages.

    Returns:
        the models as they were when they were checked, and mergekit's plan.

    Raises:
        ValueError: the configuration or a model is refused.
        OSError: a file cannot be read.
    """
    check_yaml(config, file or "OLD.yml")
    check_names(config, file)
    slices = list(slices_of(config))
    opened = open_checkpoints(merge_yaml.models(config), options)
    for checkpoint in opened.values():
        if checkpoint.refused:
            raise ValueError(checkpoint.refused)
    for part in slices:
        if part.base is not None:
            tuned = [opened[model] for model in part.models if model != part.base]
            check_distinct(opened[part.base], tuned)
            for checkpoint in tuned:
                check_pair(opened[part.base], checkpoint)
    planned = check_plan(config, opened, options)
    return Job(config, opened, planned)


def reopen(config: MergeConfiguration, options: MergeOptions) -> Job:
    """Open and plan a merge that was made earlier, without judging it.

    Args:
        config: mergekit's configuration, of one of our methods.
        options: mergekit's own.

    Returns:
        the models as they are now, and mergekit's plan.

    Raises:
        ValueError: a model is not there any more, or mergekit refuses the merge.
        OSError: a file cannot be read.
    """
    check_method(config)
    opened = open_checkpoints(merge_yaml.models(config), options)
    hand_to_mergekit(opened, options)
    return Job(config, opened, plan_merge(config, options))


def check_any(
    config: MergeConfiguration, options: MergeOptions
) -> Mapping[ModelReference, Checkpoint]:
    """Check that a merge by any method can be done, with the tokenizer it is to have.

    Args:
        config: mergekit's configuration.
        options: mergekit's own.

    Returns:
        the models as they were when they were checked.

    Raises:
        ValueError: the configuration or a model is refused.
        OSError: a file cannot be read.
    """
    check_method(config)
    if config.merge_method in METHODS:
        opened = check(config, options).opened
    else:
        check_names(config)
        opened = open_checkpoints(merge_yaml.models(config), options)
        check_plan(config, opened, options)
    check_copied_tokenizer(config, options)
    return opened


def check_plan(
    config: MergeConfiguration,
    opened: Mapping[ModelReference, Checkpoint],
    options: MergeOptions,
) -> list[Planned]:
    """Check that mergekit can write every tensor of a merge by any method.

    Args:
        config: mergekit's configuration.
        opened: base and models; adapters, which mergekit merges into the base first,
            are planned as the base.
        options: mergekit's own.

    Returns:
        mergekit's plan.

    Raises:
        ValueError: an input lacks a tensor or has it in another shape; weights would be
            lost; a precision is unknown; mergekit refuses the merge.
    """
    adapted = {
        model: part.base
        for part in slices_of(config)
        for model in part.models
        if part.base is not None and opened[model].adapter
    }
    if adapted:
        with planned_as_bases(adapted, opened, options) as headers:
            return check_plan(config, headers, options)
    for checkpoint in opened.values():
        if checkpoint.refused:
            raise ValueError(checkpoint.refused)
    for part in slices_of(config):
        models = [opened[model] for model in part.models]
        if part.ranges is None and part.base is not None:
            _check_depth(part, opened[part.base], models)
        for checkpoint, layers in zip(models, part.ranges or (), strict=False):
            _check_range(part, checkpoint, layers)
    for key in ("dtype", "out_dtype"):
        _check_precision(key, getattr(config, key))
    hand_to_mergekit(opened, options)
    planned = plan_merge(config, options)
    for tensor in planned:
        _check_inputs(tensor, planned, opened)
    bases = {tensor.task.base_model for tensor in planned} or {config.base_model}
    for base in bases - {None}:
        checkpoint, read = opened[base], names_in(planned, base)
        if planned and not read:
            continue  # slices of another method need not have their base as a source
        names = lost(checkpoint, read, trust_remote_code=options.trust_remote_code)
        count, share = len(checkpoint.tensors), share_of(checkpoint, names)
        if message := advice.lost(base, list(names), count, share):
            raise ValueError(message)
    if config.merge_method in METHODS:
        _check_parameters(planned, opened)
    _check_tokenizer(planned, config, opened)
    return planned


def _check_tokenizer(
    planned: Sequence[Planned],
    config: MergeConfiguration,
    opened: Mapping[ModelReference, Checkpoint],
) -> None:
    """Let mergekit do beforehand what it would do with a tokenizer after the merge."""
    from importlib.resources import files

    from mergekit._data import chat_templates
    from mergekit.merge import _set_chat_template

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
        said = str(error)
        if not isinstance(error, RuntimeError | ValueError | AssertionError):
            said = f"{type(error).__name__}: {said}"
        raise ValueError(
            f"mergekit cannot make the tokenizer of this merge: {said}. Change "
            "tokenizer_source or tokenizer in the YAML"
        ) from error


def _narrow(
    vocabulary: PermutedVocabulary, opened: Mapping[ModelReference, Checkpoint]
) -> dict[ModelReference, torch.Tensor]:
    """Tensors with the tokens of a vocabulary, and one element for each."""
    narrow = {}
    for model, weight in vocabulary.gather_tensors.weight_info.items():
        stored = stored_as(opened[model], weight.name)
        if stored is not None:
            shape = [1] * len(stored.shape)
            shape[vocabulary.vocabulary_axis] = stored.shape[vocabulary.vocabulary_axis]
            narrow[model] = torch.zeros(shape, device="cpu")
    return narrow


def check_copied_tokenizer(config: MergeConfiguration, options: MergeOptions) -> None:
    """Refuse a merge that mergekit would end without the tokenizer it is to copy.

    Args:
        config: mergekit's configuration.
        options: mergekit's own.

    Raises:
        ValueError: the base has no tokenizer that can be loaded.
    """
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


def _check_precision(key: str, name: str | None) -> None:
    """Refuse a precision in which no weights can be merged."""
    from mergekit.common import dtype_from_name

    dtype = None
    with suppress(RuntimeError):
        dtype = dtype_from_name(name)
    if name is not None and dtype not in FLOATS:
        raise ValueError(
            f"{key} is {name!r}; expected float32, bfloat16, float16 or float64"
        )


def _check_inputs(
    tensor: Planned,
    planned: Sequence[Planned],
    opened: Mapping[ModelReference, Checkpoint],
) -> None:
    """Refuse a tensor that an input lacks, or has in another shape than the base."""
    weight, shapes = tensor.task.output_weight, {}
    for model, name in tensor.input_names.items():
        checkpoint = opened[model]
        if name in checkpoint.others:
            return  # mergekit copies what is not of floating point
        stored = stored_as(checkpoint, name)
        if stored is not None:
            shapes[model] = stored.shape
        elif not weight.optional:
            raise ValueError(_absent(checkpoint, name, names_in(planned, model)))
    base = tensor.task.base_model
    if 0 < len(shapes) < len(tensor.input_names):
        present = [model for model in tensor.task.model_order if model in shapes]
        method = merge_methods.get(tensor.task.method_name)
        method.validate_inputs(present, base, group_name=tensor.name)
    if base is None or base not in shapes:
        return
    expected = shapes[base]
    free = None
    if not isinstance(tensor.task.gather_tensors, GatherTensors):  # vocabularies do
        free = weight.vocabulary_axis
    for model, shape in shapes.items():
        differing = [
            axis
            for axis, sizes in enumerate(zip(expected, shape, strict=False))
            if len(set(sizes)) > 1
        ]
        if len(shape) != len(expected) or differing not in ([], [free]):
            raise ValueError(_misshapen(tensor, opened[model], shape, expected))


def _absent(checkpoint: Checkpoint, name: str, read: Collection[str]) -> str:
    """What to say of an input without a tensor that mergekit needs."""
    names = [n for n in checkpoint.tensors if layer_key(n) == layer_key(name)]
    if not names and layer_key(name) != name:
        return (
            f"{checkpoint.label} stores nothing of {layer_key(name)}, which its "
            "config.json counts among its layers. Fetch or save the model again, or "
            "repair its config.json"
        )
    meant = closest(name, [n for n in names if n not in read])
    stored = f" (stored is {meant})" if meant else ""
    hint = (
        "Fetch or save the model again, or merge copies that store the expected names"
    )
    if meant and ".base_layer." in meant:
        hint = "It holds an adapter that is not merged: merge it into the model first"
    return (
        f"{checkpoint.label} does not store {name}{stored}, which mergekit needs for "
        f"this architecture. {hint}"
    )


def _misshapen(
    tensor: Planned,
    model: Checkpoint,
    shape: tuple[int, ...],
    expected: tuple[int, ...],
) -> str:
    """What to say of a tensor whose shape is not the base's."""
    hint = "Only models of the base's own shapes can be merged with it: leave it out"
    if 0 in shape:
        hint = "It was saved without values, as sharded training may do: save it whole"
    elif _differ_only_in(shape, expected, tensor.task.output_weight.vocabulary_axis):
        hint = (
            "The vocabularies differ in size: give tokenizer_source: base (or union), "
            "so that mergekit matches their tokens"
        )
    return (
        f"{tensor.name} is {list(shape)} in {model.label}, in the base "
        f"{list(expected)}. {hint}"
    )


def _differ_only_in(
    one: tuple[int, ...], other: tuple[int, ...], axis: int | None
) -> bool:
    if axis is None:
        return False
    return one[:axis] + one[axis + 1 :] == other[:axis] + other[axis + 1 :]


def _check_parameters(
    planned: Sequence[Planned], opened: Mapping[ModelReference, Checkpoint]
) -> None:
    """Refuse what only the parameters of single tensors show."""
    weights = [weight for tensor in planned for weight in tensor.weights.values()]
    if weights and not any(weights):
        raise ValueError(all_zero())
    names = {name for model in opened.values() for name in model.names}
    for exclude in {tensor.settings.exclude for tensor in planned}:
        require_named(exclude, names)


def _layers(part: merge_yaml.Inputs, model: Checkpoint) -> Mapping[str, int]:
    """Numbers of layers of the modules that are merged here."""
    if not part.module:
        return model.layers
    return {n: count for n, count in model.layers.items() if n == part.module}


def _check_depth(
    part: merge_yaml.Inputs, base: Checkpoint, models: Sequence[Checkpoint]
) -> None:
    """Refuse models of more or fewer layers than the base where all are merged."""
    expected = _layers(part, base)
    for model in models:
        for module, count in _layers(part, model).items():
            if count != expected.get(module, count):
                raise ValueError(
                    f"{model.label} has {count} layers by its config.json, the base "
                    f"{base.label} has {expected[module]}; expected as many. Name the "
                    "layers that both have under `slices:`"
                )


def _check_range(
    part: merge_yaml.Inputs, model: Checkpoint, layers: tuple[int, int]
) -> None:
    """Refuse layers that a model does not have."""
    most = max(_layers(part, model).values(), default=layers[1])
    if not 0 <= layers[0] <= layers[1] <= most:
        raise ValueError(
            f"layer_range of {model.label} in {part.place} is {list(layers)}; expected "
            f"two numbers from 0 to {most}, the smaller one first"
        )
