"""Refuses a merge whose tensors mergekit could not write, from its plan and headers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from mergekit import merge_methods
from mergekit.io.tasks import GatherTensors

from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.layouts import stored_as
from mergekit_metagpt.checkpoints.opening import hand_to_mergekit, planned_as_bases
from mergekit_metagpt.checkpoints.stored import FLOATS, layer_key
from mergekit_metagpt.checkpoints.unwritten import lost, share_of
from mergekit_metagpt.merge_config import merge_yaml
from mergekit_metagpt.merge_config.checks import METHODS
from mergekit_metagpt.merge_config.merge_yaml import filters_of, slices_of
from mergekit_metagpt.merge_config.plan import Planned, names_in, plan_merge
from mergekit_metagpt.merge_config.tokenizer_checks import check_tokenizer
from mergekit_metagpt.merge_config.yaml_errors import closest
from mergekit_metagpt.method import advice
from mergekit_metagpt.method.parameters import all_zero, require_named

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions


LOG = logging.getLogger("mergekit_metagpt")


def check_plan(
    config: MergeConfiguration,
    opened: Mapping[ModelReference, Checkpoint],
    options: MergeOptions,
) -> list[Planned]:
    """Check that mergekit can write every tensor of a merge by any method; plan it.

    An adapter, which mergekit would merge into its base first, is planned as the base.
    Raises a ValueError if an input lacks a tensor or has it in another shape; weights
    would be lost; a precision is unknown; mergekit refuses the merge.
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
        counts = {last - first for first, last in part.ranges or ()}
        if len(counts) > 1:
            raise ValueError(
                f"the layer_range of a model in {part.place} spans {min(counts)} "
                f"layers and that of another {max(counts)}; expected as many of each"
            )
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
            continue  # other methods allow slices without their base
        names = lost(checkpoint, read, trust_remote_code=options.trust_remote_code)
        count, share = len(checkpoint.tensors), share_of(checkpoint, names)
        if message := advice.lost(base, list(names), count, share):
            raise ValueError(message)
    if config.merge_method in METHODS:
        _check_parameters(planned, opened)
        _warn_of_filters(config, planned)
    check_tokenizer(planned, config, opened)
    return planned


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
            return  # mergekit copies tensors that are not floating-point
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
    """The error of an input without a tensor that mergekit needs."""
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
    """The error of a tensor whose shape is not the base's."""
    hint = "Models can be merged only with the shapes of their base: leave this one out"
    axis = tensor.task.output_weight.vocabulary_axis
    if 0 in shape:
        hint = "It was saved without values, as sharded training may do: save it whole"
    elif axis is not None and all(
        len({*sizes}) == 1 or at == axis
        for at, sizes in enumerate(itertools.zip_longest(shape, expected))
    ):
        hint = (
            "The vocabularies differ in size: give tokenizer_source: base (or union), "
            "so that mergekit matches their tokens"
        )
    return (
        f"{tensor.name} is {list(shape)} in {model.label}, in the base "
        f"{list(expected)}. {hint}"
    )


def _check_parameters(
    planned: Sequence[Planned], opened: Mapping[ModelReference, Checkpoint]
) -> None:
    """Refuse parameters that are wrong for all tensors together."""
    weights = [weight for tensor in planned for weight in tensor.weights.values()]
    if weights and not any(weights):
        raise ValueError(all_zero())
    for tensor in planned:
        for model in tensor.input_names:
            _check_epsilon(model, tensor.task.input_parameters[model])
    names = {name for model in opened.values() for name in model.names}
    for exclude in {tensor.settings.exclude for tensor in planned}:
        require_named(exclude, names)


def _warn_of_filters(config: MergeConfiguration, planned: Sequence[Planned]) -> None:
    """Warn of values that no tensor gets, as under a misspelt filter."""
    names = [tensor.name for tensor in planned]
    settings = (
        setting
        for part in slices_of(config)
        for levels in part.settings
        for level in levels
        for setting in level.values()
    )
    filters = {part for setting in settings for part in filters_of(setting)}
    for part in sorted(filters):
        if not any(part in name for name in names):
            meant = closest(part, {p for name in names for p in name.split(".")})
            hint = f"; did you mean {meant}?" if meant else ""
            LOG.warning(
                "filter %s is in no tensor's name: its value is never used%s",
                part,
                hint,
            )


def _check_epsilon(model: ModelReference, values: Mapping[str, Any]) -> None:
    """Refuse densities that DELLA cannot vary by `epsilon`; it would say so later."""
    density, epsilon = values.get("density", 1.0), values.get("epsilon", 0.0)
    # The sums are those of mergekit.
    fits = epsilon >= 0 and density + epsilon < 1 and density - epsilon > 0
    if 0 < density < 1 and not fits:
        raise ValueError(
            f"epsilon of {model} is {epsilon:g} at density {density:g}; expected a "
            f"number from 0 to less than {min(density, 1 - density):g}, so that "
            "density + and - epsilon lie between 0 and 1 (by default epsilon is 0.15)"
        )


def _layers(part: merge_yaml.Inputs, model: Checkpoint) -> Mapping[str, int]:
    """The number of layers of each module that is merged here."""
    if not part.module:
        return model.layers
    return {n: count for n, count in model.layers.items() if n == part.module}


def _check_depth(
    part: merge_yaml.Inputs, base: Checkpoint, models: Sequence[Checkpoint]
) -> None:
    """Refuse models with more or fewer layers than the base, if all are merged."""
    expected = _layers(part, base)
    for model in models:
        for module, count in _layers(part, model).items():
            if count != expected.get(module, count):
                raise ValueError(
                    f"{model.label} has {count} layers by its config.json; expected "
                    f"{expected[module]}, as in the base {base.label}. Name the layers "
                    "that both have under `slices:`"
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
