"""What bad input gets: every row of the table, from our commands and mergekit's.

Ours answer with one line and status 2, and create nothing; `mergekit-yaml` raises with
the same text, or mergekit itself is first with its own.
"""

from __future__ import annotations

import re
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError

from mergekit_metagpt.merge_config import merge_yaml
from tests import broken
from tests.broken import SHARD, TENSOR, Config, Spoil, snapshot, write_good
from tests.conftest import Cli
from tests.families import read_model, run_mergekit
from tests.oracle import assert_same_states
from tests.processes import environment, run_process, script

# What may have happened when the answer comes. Nothing of it: the YAML or headers told.
SCAN = "our scan read a weight"
LOAD = "mergekit loaded a weight"
MERGE = "mergekit's merge was called"
Events = frozenset[str]
HEADERS: Events = frozenset()
LATE: Events = frozenset({SCAN, LOAD, MERGE})


@dataclass(frozen=True)
class Row:
    """One kind of bad input, and what each front end answers.

    In the messages `{dir}` is the folder of all models, `{ours}` the text of the other
    front end, and `…` anything (what safetensors, torch or a parser says).

    Attributes:
        name: for the test's id.
        spoil: makes it from good models and a good configuration.
        ours: what `mergekit-metagpt merge` says after `Error: `.
        mergekit: the message of the exception that `mergekit-yaml` raises, or None
            where nothing is wrong for it.
        error: type of that exception.
        ours_after: what may have happened before ours answers.
        mergekit_after: the same for mergekit.
    """

    name: str
    spoil: Spoil
    ours: str
    mergekit: str | None = "{ours}"
    error: type[Exception] = ValueError
    ours_after: Events = HEADERS
    mergekit_after: Events = HEADERS


QUIET = ("--no-copy-tokenizer", "--quiet")
TWO = ("tuned0", "tuned1")
THREE = ("base", *TWO)
FOUR_LAYERS = {"num_hidden_layers": 4}
# Where pydantic wraps what a validator of mergekit says.
WRAPPED = "1 validation error for ExecuteMergeMethodTask\n  Value error, {ours} […"
NO_BASE = "metagpt measures … against a base, and none is given for {}. Add `base_m…"
ONLY_BASE = "only the base {dir}/base is given: … Add the fine-tuned models …"

BASES = [
    Row(
        "no-base-model",
        broken.without("base_model"),
        ours=NO_BASE.format("models"),
        mergekit=NO_BASE.format("default.slices[0]"),
    ),
    Row(
        "base-not-among-the-sources",
        broken.slices(TWO, (0, 3)),
        ours="the base {dir}/base is not among the sources of slices[0]. Add it there…",
        mergekit="the base {dir}/base is not among the inputs for default.slices[0]. "
        "Add it to the sources…",
    ),
    Row("only-the-base", broken.models("base"), ours=ONLY_BASE, mergekit=WRAPPED),
]


def poisoned_row(
    name: str, model: str, value: str, given: Mapping[str, Any], *, scanned: bool
) -> Row:
    """NaN or infinity: our command scans, mergekit may find it when it is reached."""
    found = f"{TENSOR} of {{dir}}/{model} holds NaN or infinity"
    return Row(
        f"{value}-in-{model}-{name}",
        broken.each(broken.poisoned(model, float(value)), broken.settings(**given)),
        ours=f"{found} (in {{dir}}/{model}/model.safetensors); … Repair or replace it",
        mergekit="{ours}" if scanned else f"{found}; … Repair or replace this model",
        ours_after=frozenset({SCAN}),
        mergekit_after=frozenset({SCAN, LOAD} if scanned else {LOAD}),
    )


NOT_FINITE = [
    poisoned_row(name, model, value, {"parameters": parameters}, scanned=scanned)
    for model, value in (("base", "inf"), ("tuned1", "nan"))
    for name, parameters, scanned in (
        ("by-model", {"granularity": "model"}, True),
        ("by-layer", {"granularity": "layer"}, True),
        ("by-tensor", {"granularity": "tensor"}, False),
        ("power-0", {"power": 0}, False),
        # A filter leaves the other tensors to the default, measured by a scan.
        ("some", {"granularity": [{"filter": "norm", "value": "tensor"}]}, True),
        ("excluded", {"granularity": "tensor", "exclude": "mlp"}, False),
    )
]
NOT_FINITE.append(
    poisoned_row(
        "composed", "base", "nan", {"merge_method": "metagpt_dare_linear"}, scanned=True
    )
)

QUANTISED = "{{dir}}/tuned1 is quantised ({}); … Dequantise it first, or name the …"
BARE_ADAPTER = (
    "{dir}/adapter is a bare LoRA adapter; write it as base+adapter "
    "({dir}/base+{dir}/adapter) …"
)
NO_FINE_TUNE = (
    "{{dir}}/tuned1 is not a fine-tune of {{dir}}/base: {}% of the parameters match; "
    "first differences: {}…. Give the base that it was trained from"
)

KINDS_OF_MODEL = [
    *(
        Row(
            f"stored-as-{kind}",
            broken.rewritten("tuned1", change),
            ours=QUANTISED.format(f"model.layers.…proj.weight is stored as {kind}"),
        )
        for kind, change in (("F8_E4M3", broken.to_fp8), ("I8", broken.to_int8))
    ),
    Row(
        "bare-adapter",
        broken.adapter(),
        ours=BARE_ADAPTER,
        mergekit="Unrecognized model in {dir}/adapter. …",
    ),
    Row(
        "adapter-without-a-cache",
        broken.adapter(spelling="{dir}/base+{dir}/adapter"),
        ours="{dir}/base+{dir}/adapter has a LoRA adapter; give --lora-merge-cache …",
        mergekit="Need to specify cache dir to merge adapters",
        error=RuntimeError,
    ),
    Row(
        "other-architecture",
        broken.gpt2,
        ours=NO_FINE_TUNE.format("0.0", "transformer.….weight is not in …"),
        mergekit="Must specify --allow-crimes …",
        error=RuntimeError,
    ),
    Row(
        "other-width",
        broken.llama(hidden_size=64),
        ours=NO_FINE_TUNE.format(
            "28.7", "model.layers.…proj.weight is […]. By config.json, hidden_size is …"
        ),
    ),
]


def unreadable(
    name: str, change: Callable[[bytes], bytes], file: str = "model.safetensors"
) -> Row:
    """Bytes that are no safetensors; of a single file mergekit's own reader says so."""
    whole = file != SHARD
    return Row(
        name,
        broken.in_file(f"tuned1/{file}", change, shards=1 if whole else 3),
        ours=f"{{dir}}/tuned1/{file} cannot be read: …: fetch or make it again",
        mergekit="Error while deserializing header: …" if whole else "{ours}",
        error=SafetensorError if whole else OSError,
    )


def index(
    name: str,
    change: Callable[[bytes], bytes],
    ours: str,
    mergekit: str = "{ours}",
    error: type[Exception] = ValueError,
) -> Row:
    """A model in three shards whose index was changed."""
    spoil = broken.in_file(f"tuned1/{broken.INDEX}", change, shards=3)
    return Row(f"index-{name}", spoil, ours, mergekit, error)


OUTSIDE = "the index of {{dir}}/tuned1 points outside its folder: '{}'; …"
NO_WEIGHTS = "{dir}/tuned1 holds no weights; expected model.safetensors or …"

FILES = [
    unreadable("truncated", broken.truncated),
    unreadable("truncated-shard", broken.truncated, SHARD),
    unreadable("corrupt-header", broken.garbled_header),
    unreadable("git-lfs-pointer", broken.git_lfs_pointer),
    Row(
        "missing-shard",
        broken.missing_file(f"tuned1/{SHARD}", shards=3),
        ours=f"{{dir}}/tuned1/{SHARD} is missing; … Fetch or make it again",
        error=FileNotFoundError,
    ),
    *(
        index(
            f"leaves-the-folder-{number}",
            broken.with_shard(TENSOR, place),
            ours=OUTSIDE.format(place),
        )
        for number, place in enumerate(("../tuned0/model.safetensors", "/etc/passwd"))
    ),
    index(
        "is-not-json",
        lambda content: b"<html>",
        ours=f"{{dir}}/tuned1/{broken.INDEX}…Expecting value: line 1 column 1 …",
        mergekit="Expecting value: line 1 column 1 (char 0)",
    ),
    index(
        "names-another-shard",
        broken.with_shard("lm_head.weight", SHARD),
        ours=f"lm_head.weight is not in {{dir}}/tuned1/{SHARD}, where the index of "
        "{dir}/tuned1 has it. Fetch or save the model again",
        error=OSError,
    ),
    Row(
        "pickle-with-short-records",
        broken.pickled(broken.short_records),
        ours="{dir}/tuned1/pytorch_model.bin cannot be read: its record data/… has … "
        "bytes; its pickle says …: fetch or make it again",
        error=OSError,
    ),
    Row(
        "truncated-pickle",
        broken.pickled(broken.truncated),
        ours="{dir}/tuned1/pytorch_model.bin cannot be read: …",
        mergekit="PytorchStreamReader failed reading zip archive: …",
        error=RuntimeError,
    ),
    Row(
        "no-weights",
        broken.missing_file("tuned1/model.safetensors"),
        ours=NO_WEIGHTS,
        mergekit="Unable to find model files at {dir}/tuned1",
        error=RuntimeError,
    ),
    Row(
        "a-file-for-a-model",
        broken.models("tuned0", "./tuned1/model.safetensors"),
        ours="…tuned1/model.safetensors …; expected a model's folder",
        mergekit="It looks like the config file at './tuned1/model.safetensors' …",
        error=OSError,
    ),
    Row(
        "no-config-json",
        broken.missing_file("tuned1/config.json"),
        ours="…{dir}/tuned1…config.json…",
        mergekit="Unrecognized model in {dir}/tuned1. …",
    ),
]


def config(name: str, said: str, mergekit: str = "…", **keys: Any) -> Row:
    """A key of config.json; by default mergekit or transformers are first."""
    return Row(
        f"config-{name}",
        broken.in_file("tuned1/config.json", broken.with_json(**keys)),
        ours=f"{{dir}}/tuned1/config.json of {{dir}}/tuned1 {said}. Repair it, or …",
        mergekit=mergekit,
        error=ValueError if mergekit == "{ours}" else Exception,
    )


# More of them in test_model_config.py.
CONFIGS = [
    config(
        "architectures-none",
        "has architectures []; expected a list of one name",
        mergekit="More than one architecture in config?",
        architectures=[],
    ),
    config("width-as-a-word", "cannot be used: …hidden_size…", hidden_size="32"),
]

MOVED = (
    "granularity 'layer': {}… layers to other indices… use granularity: model or "
    "granularity: tensor"
)

# More of them in test_parameters.py.
PARAMETERS = [
    Row(
        "granularity-unknown",
        broken.parameters(granularity=[{"filter": "mlp", "value": 3}, {"value": "x"}]),
        ours="granularity is …; expected 'model', 'layer' or 'tensor'",
    ),
    Row(
        "weight-negative",
        broken.weights(1, [1, -1]),
        ours="weight of {dir}/tuned1 is -1; expected a finite number >= 0",
        mergekit="weight is -1; expected a finite number >= 0",
    ),
    Row(
        "density-in-per-cent",
        broken.settings(merge_method="metagpt_ties", parameters={"density": 50}),
        ours="density is 50; expected a number from 0 to 1…",
    ),
    Row(
        "density-of-nothing",
        broken.settings(merge_method="metagpt_ties", parameters={"density": 0}),
        ours="density of {dir}/tuned0 is 0, which drops its whole task vector; …",
        mergekit=None,
    ),
    Row(
        "density-in-words",
        broken.settings(merge_method="metagpt_ties", parameters={"density": "1.2.3%"}),
        ours="density is '1.2.3%'; expected a number from 0 to 1…",
    ),
    Row(
        "gamma-in-per-cent",
        broken.settings(
            merge_method="metagpt_breadcrumbs",
            parameters={"density": 0.9, "gamma": 5},
        ),
        ours="gamma is 5; expected a number from 0 to 1…",
    ),
    Row(
        "power-true",
        broken.parameters(power=True),
        ours="power is True; expected a finite number",
    ),
    Row(
        "power-empty",
        broken.parameters(power=[]),
        ours="power is an empty list, which mergekit would ignore; expected a value",
        mergekit=None,
    ),
    Row(
        "normalize-neither",
        broken.settings(merge_method="metagpt_ties", parameters={"normalize": "maybe"}),
        ours="normalize is 'maybe'; expected true or false",
    ),
    Row(
        "epsilon-negative",
        broken.settings(
            merge_method="metagpt_della", parameters={"density": 0.9, "epsilon": -0.2}
        ),
        ours="epsilon of {dir}/tuned0 is -0.2 at density 0.9; expected a number…",
        mergekit="Expected p_in >= 0…",
        mergekit_after=LATE,
        error=RuntimeError,
    ),
    Row(
        "epsilon-wider-than-density",
        broken.settings(
            merge_method="metagpt_della", parameters={"density": 0.9, "epsilon": 0.15}
        ),
        ours="epsilon of {dir}/tuned0 is 0.15 at density 0.9; expected a number…",
        mergekit="Epsilon must be chosen…",
        mergekit_after=LATE,
    ),
    Row(
        "power-infinite",
        broken.parameters(power=float("inf")),
        ours="power is inf; expected a finite number",
    ),
    Row(
        "exclude-list",
        broken.parameters(exclude=["embed_tokens", "lm_head"]),
        ours="exclude is the list ['embed_tokens', 'lm_head'], …; expected one string…",
        mergekit=None,
    ),
    Row(
        "misspelt",
        broken.parameters(granularty="layer"),
        ours="…granularty, under `parameters:`, is no parameter of metagpt; did you "
        "mean granularity?",
        mergekit=None,
    ),
    Row(
        "one-for-all-models-under-one",
        broken.beside_a_model(parameters={"power": 1}),
        ours="power stands under {dir}/tuned0 …. Move it to the `parameters:` at the …",
        mergekit=None,
    ),
    Row(
        "exclude-number",
        broken.parameters(exclude=3),
        ours="exclude is 3; expected a string of comma-separated parts of tensor names",
    ),
    *(
        Row(
            f"weights-all-0-{name}",
            spoil,
            ours="weight is 0 for every model: … Give at least one model a weight > 0…",
            # The planner shows one weight after the other: the first tensor is the
            # first that can know. The scan has no part in it.
            mergekit_after=frozenset({LOAD}),
        )
        for name, spoil in (
            ("constant", broken.parameters(weight=0)),
            ("gradient", broken.weights([0, 0], 0.0)),
            (
                "filters",
                broken.weights(0, [{"filter": "mlp", "value": 0}, {"value": 0}]),
            ),
        )
    ),
    Row(
        "layers-moved",
        broken.each(
            broken.slices(THREE, (0, 1), (2, 3)),
            broken.parameters(
                granularity=[{"filter": "mlp", "value": "layer"}, {"value": "model"}]
            ),
        ),
        ours=MOVED.format("slices[1]"),
        mergekit=MOVED.format("model.layers.1.….weight of the output is not "),
        mergekit_after=frozenset({SCAN, LOAD}),
    ),
]


AT_THE_END = "mergekit ignores it. Move it to `parameters:` at the end of the YAML"
# mergekit ignores all of these.
KEYS = [
    Row(name, spoil, f"{{dir}}/merge.yml: {ours}", mergekit=None)
    for name, spoil, ours in (
        *(
            (
                f"{name}-at-the-top",
                broken.settings(**{name: value}),
                f"{name} stands in the YAML, where {AT_THE_END}",
            )
            for name, value in {
                "power": 1.0,
                "granularity": "layer",
                "lambda": 0.5,
                "exclude": "mlp",
                "normalize": False,
                "density": 0.5,
            }.items()
        ),
        (
            "weight-beside-a-model",
            broken.beside_a_model(weight=2.0),
            "weight stands in models[0], where … `parameters:` there",
        ),
        (
            "power-beside-a-model",
            broken.beside_a_model(power=2.0),
            f"power stands in models[0], where {AT_THE_END}",
        ),
        (
            "parameters-misspelt",
            broken.beside_a_model(paramters={"weight": 2.0}),
            "paramters is no key … models[0]; … mean parameters?",
        ),
        (
            "filter-misspelt",
            broken.weights([{"fliter": "mlp", "value": 2}, {"value": 1}], 1.0),
            "fliter is no key … models[0].parameters.…; … filter?",
        ),
        (
            "key-with-swapped-letters",
            broken.settings(modles=[]),
            "modles is no key of a merge in the YAML; did you mean models?",
        ),
        (
            "key-of-another-name",
            broken.settings(base="./base"),
            "base is no key of a merge in the YAML; did you mean base_model?",
        ),
        (
            "key-misspelt",
            broken.settings(dtyp="bfloat16"),
            "dtyp is no key of a merge in the YAML; did you mean dtype?",
        ),
        (
            "a-key-that-means-nothing",
            broken.settings(unheard="of"),
            "unheard is no key of a merge in the YAML; … Remove it",
        ),
    )
]
KEYS.append(
    Row(
        "weight-empty",
        broken.weights(None, 1.0),
        ours="{dir}/merge.yml: weight in models[0].parameters is empty; give …",
        mergekit="…validation error… for MergeConfiguration…",
    )
)


def text(name: str, content: str | bytes, ours: str, mergekit: str, **more: Any) -> Row:
    """Something that is no merge YAML."""
    return Row(
        f"yaml-{name}",
        broken.text(content),
        f"{{dir}}/merge.yml{ours}",
        mergekit,
        **more,
    )


INVALID = "1 validation error for MergeConfiguration\n"
ONE_OF = "Exactly one of 'models', 'slices', or 'modules' must be present"

YAML = [
    text(
        "open-list",
        "models: [a, b\nmerge_method: metagpt\n",
        ": not readable as YAML: while parsing a flow sequence…line 1, column 9…",
        "while parsing a flow sequence\n…line 1, column 9…",
        error=yaml.YAMLError,
    ),
    text(
        "indentation",
        "merge_method: metagpt\nmodels:\n  - model: a\n - model: b\n",
        ": line 4 … `- model: b`. Indent items and keys of one level alike, …",
        "while parsing a block mapping\n…line 4, column 2…",
        error=yaml.YAMLError,
    ),
    text(
        "item-without-model",
        "merge_method: metagpt\nbase_model: a\nmodels:\n  - model: b\n  - ./code\n",
        ": models[1] is './code'; expected a line `- model: ./code` …",
        f"{INVALID}models.1\n  Input should be a valid dictionary …",
    ),
    text(
        "two-documents",
        "merge_method: metagpt\n---\nmerge_method: ties\n",
        ": holds several YAML documents; … mergekit-multi",
        "expected a single document in the stream\n…",
        error=yaml.YAMLError,
    ),
    text(
        "key-given-twice",
        "merge_method: metagpt\nbase_model: a\nbase_model: b\n",
        ": not readable as YAML: base_model is given twice in … (line 2, …3)",
        f"…{ONE_OF}",
        error=RuntimeError,
    ),
    text(
        "list",
        "- merge_method: metagpt\n",
        ": holds list; expected a mapping with merge_method, …",
        f"{INVALID}  Input should be a valid dictionary …",
    ),
    text(
        "empty",
        "",
        "…; expected a mapping with merge_method, …",
        f"{INVALID}  Input should be a valid dictionary …",
    ),
    text(
        "not-utf-8",
        "merge_method: metagpt # é\n".encode("latin-1"),
        " is not text in UTF-8; expected a merge YAML",
        "'utf-8' codec can't decode byte 0xe9 in position 24: …",
    ),
    Row(
        "models-and-slices",
        broken.slices(THREE, (0, 3), keep_models=True),
        ours="{dir}/merge.yml: no merge configuration: expected one of `models:`…",
        mergekit=ONE_OF,
        error=RuntimeError,
    ),
    Row(
        "no-method",
        broken.without("merge_method"),
        ours="{dir}/merge.yml: no merge configuration: …merge_method…",
        mergekit=f"{INVALID}merge_method\n  Field required […",
    ),
    Row(
        "other-method",
        broken.each(
            broken.settings(merge_method="task_arithmetic"), broken.weights(1, 1)
        ),
        ours="merge_method is 'task_arithmetic'; this command takes metagpt…. To "
        "convert it: mergekit-metagpt convert {dir}/merge.yml NEW.yml (gives "
        "metagpt). To …",
        mergekit=None,
    ),
    Row(
        "method-that-is-not-converted",
        broken.settings(merge_method="slerp"),
        ours="merge_method is 'slerp'; … Use mergekit-yaml for other methods",
        mergekit="…",
        error=Exception,
        mergekit_after=LATE,
    ),
]

PATHS = [
    Row(f"no-such-{name}", spoil, ours=ours, mergekit=mergekit, error=OSError)
    for name, spoil, ours, mergekit in (
        (
            "folder",
            broken.models("tuned0", "missing"),
            "{dir}/missing does not exist; expected a model's folder",
            "Repo id must …: '{dir}/missing'. …",
        ),
        (
            "relative-folder",
            broken.models("tuned0", "./missing"),
            "./missing does not exist; expected a model's folder",
            "Repo id must …: './missing'.",
        ),
        (
            "model-on-the-hub",
            broken.models("tuned0", "some-org/missing"),
            "some-org/missing …",
            "We couldn't connect to 'https://huggingface.co' …",
        ),
    )
]

# Answered by mergekit while it plans or merges.
MERGEKIT_FIRST = [
    Row(
        "one-model-twice",
        broken.models("tuned0", "tuned0"),
        ours="…tuned0…",
        mergekit="Duplicate merge inputs for default.slices[0]",
        ours_after=LATE,
    ),
    Row(
        "fewer-layers",
        broken.llama(num_hidden_layers=2),
        ours="{dir}/tuned1 has 2 layers by its config.json; expected 3, as in the base "
        "{dir}/base. Name the layers that both have under `slices:`",
        mergekit="All inputs to a slice must contain the same number of layers",
        error=RuntimeError,
    ),
    Row(
        "fewer-layers-than-config-json-says",
        broken.each(
            *(
                broken.in_file(f"{name}/config.json", broken.with_json(**FOUR_LAYERS))
                for name in THREE
            )
        ),
        ours="{dir}/… stores nothing of model.layers.3, which its config.json counts …",
        mergekit="Tensor model.layers.3.… required but not present in …",
        error=RuntimeError,
        mergekit_after=LATE,
    ),
    *(
        Row(
            f"tensor-missing-in-{model}",
            broken.rewritten(model, broken.lose_tensor),
            ours=f"{{dir}}/{model} does not store {TENSOR}, which mergekit needs …",
            mergekit=f"Tensor {TENSOR} required but not present in … {{dir}}/{model}",
            error=RuntimeError,
            mergekit_after=LATE,
        )
        for model in ("base", "tuned1")
    ),
    *(
        Row(
            f"names-begin-with-{prefix[:-1]}",
            broken.rewritten(
                "tuned1", broken.with_names(lambda name, p=prefix: p + name)
            ),
            ours=f"{{dir}}/tuned1 stores {prefix}model.layers.…, where mergekit's "
            f"definition … expects model.layers.… All names begin with '{prefix}': …",
        )
        for prefix in ("module.", "_orig_mod.", "base_model.model.")
    ),
    Row(
        "adapter-not-merged",
        broken.rewritten(
            "tuned1",
            broken.with_names(lambda n: n.replace("v_proj.", "v_proj.base_layer.")),
        ),
        ours="…v_proj.weight (stored is ….base_layer.weight), … merge it into … first",
        mergekit="Tensor ….v_proj.weight required but not present in …",
        error=RuntimeError,
        mergekit_after=LATE,
    ),
    Row(
        "norms-without-elements",
        broken.rewritten("tuned1", broken.without_norms),
        ours="…norm.weight is [0] in {dir}/tuned1, in the base [32]. …save it whole",
        mergekit="Tensor size mismatch for …norm.weight…",
        mergekit_after=LATE,
    ),
    *(
        Row(
            f"{key}-{value}",
            broken.settings(**{key: value}),
            ours=f"{key} is '{value}'; expected float32, bfloat16, float16 or float64",
            mergekit=f'Unimplemented dtype "{value}"',
            error=RuntimeError,
            mergekit_after=LATE,
        )
        for key, value in (("dtype", "bfloat"), ("out_dtype", "int8"))
    ),
    Row(
        "no-tokenizer-to-be-had",
        broken.settings(tokenizer_source="base"),
        ours="mergekit cannot make the tokenizer …: … tokenizer_source or …",
        mergekit="…",
        error=Exception,
        mergekit_after=LATE,
    ),
    Row(
        "no-such-chat-template",
        broken.settings(chat_template="qwen2.5"),
        ours="chat_template is 'qwen2.5'; expected auto, … one of …, chatml, …",
        mergekit=None,
    ),
    Row(
        "vocabulary-resized",
        broken.llama(vocab_size=100),
        ours="….weight is [100, 32] in …, in the base [96, 32]. …tokenizer_source: …",
        mergekit="Tensor size mismatch for ….weight: […]. Align vocabulary axes …",
        mergekit_after=LATE,
    ),
]

ROWS = [
    *BASES,
    *NOT_FINITE,
    *KINDS_OF_MODEL,
    *FILES,
    *CONFIGS,
    *KEYS,
    *PARAMETERS,
    *YAML,
    *PATHS,
    *MERGEKIT_FIRST,
]

BY_NAME = {row.name: row for row in ROWS}
each_row = pytest.mark.parametrize("row", ROWS, ids=BY_NAME)

SHARED = """
    no-base-model only-the-base granularity-unknown weight-negative misspelt
    weights-all-0-constant nan-in-tuned1-by-model inf-in-base-by-model bare-adapter
    stored-as-F8_E4M3 other-architecture other-width truncated missing-shard
    yaml-open-list yaml-not-utf-8
""".split()
# Rows that other commands answer as `merge` does, and what these would write.
ALSO_REFUSED = {
    "inspect": """
        power-infinite exclude-list stored-as-I8 corrupt-header git-lfs-pointer
        no-such-relative-folder key-misspelt yaml-list yaml-empty
    """.split(),
    "export": """
        one-for-all-models-under-one other-method method-that-is-not-converted
        adapter-without-a-cache layers-moved
    """.split(),
}
OUTPUTS = {
    "merge": ["out"],
    "inspect": ["--json", "r.json", "--csv", "r.csv", "--plot", "r.png"],
    "export": ["new.yml"],
    "convert": ["new.yml"],
}


@dataclass
class Job:
    """A folder with models and a YAML, the place for the result, and who did what."""

    folder: Path
    out: Path
    happened: set[str] = field(default_factory=set)

    @property
    def config_file(self) -> Path:
        return self.folder / "merge.yml"

    def prepare(self, spoil: Spoil) -> Config:
        """Write good models, spoil them or the configuration, and write the YAML."""
        config = write_good(self.folder)
        content = spoil(self.folder, config)
        if content is None:
            content = yaml.safe_dump(config, sort_keys=False)
        if isinstance(content, str):
            content = content.encode()
        self.config_file.write_bytes(content)
        return config

    def fill(self, message: str, **known: str) -> str:
        """A row's message, of this folder."""
        for name, value in {"dir": str(self.folder), **known}.items():
            message = message.replace(f"{{{name}}}", value)
        return message

    @property
    def command(self) -> tuple[str | Path, ...]:
        """The arguments of `mergekit-metagpt` that merge."""
        return ("merge", self.config_file, self.out, *QUIET)


def _spy(
    patch: pytest.MonkeyPatch, owner: Any, name: str, note: Callable[[], None]
) -> None:
    original = getattr(owner, name)

    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return original(*args, **kwargs)

    patch.setattr(owner, name, noted)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """A job in the current folder, spied on; nothing may look for a network."""
    import huggingface_hub.constants
    import mergekit.merge
    import mergekit.scripts.run_yaml  # takes run_merge before that is spied on
    from mergekit.io import LazyTensorLoader

    from mergekit_metagpt.checkpoints.files import Readers
    from mergekit_metagpt.scanning.pieces import Streams

    folder = tmp_path / "work"
    folder.mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    looked_up: list[Any] = []

    def no_network(*args: Any, **kwargs: Any) -> None:
        looked_up.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(socket.socket, "connect", no_network)

    made = Job(folder, folder / "out")
    note = made.happened.add
    _spy(monkeypatch, Readers, "read", lambda: note(SCAN))
    _spy(monkeypatch, Streams, "read", lambda: note(SCAN))
    _spy(monkeypatch, LazyTensorLoader, "get_tensor", lambda: note(LOAD))
    _spy(monkeypatch, mergekit.merge, "run_merge", lambda: note(MERGE))
    yield made
    assert not looked_up


def assert_says(said: str, wanted: str) -> None:
    """Check a whole message; `…` in what is wanted stands for anything."""
    pattern = ".*?".join(re.escape(part) for part in wanted.split("…"))
    matches = bool(re.fullmatch(pattern, said, re.DOTALL))
    assert matches, f"\nwanted: {wanted}\nsaid:   {said}"


def assert_only_new(
    before: Mapping[str, bytes | None], folder: Path, *allowed: str
) -> None:
    """Check that nothing below a folder changed, or came but these empty folders."""
    after = dict(snapshot(folder))
    for name in allowed:
        assert after.pop(name, None) is None, f"{name} is not a folder"
    assert after.keys() == before.keys(), sorted(after.keys() ^ before.keys())
    changed = [name for name in before if after[name] != before[name]]
    assert not changed, changed


@each_row
def test_our_command_answers_in_one_line_and_creates_nothing(
    row: Row, job: Job, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    job.prepare(row.spoil)
    before = snapshot(job.folder.parent)
    job.happened.clear()
    assert_says(cli.refused(*job.command), f"Error: {job.fill(row.ours)}")
    assert job.happened <= row.ours_after, job.happened
    assert_only_new(before, job.folder.parent)
    if MERGE not in row.ours_after:
        # In a process of its own, logging would write to stderr too.
        assert not [r for r in caplog.records if r.levelname != "INFO"]


@pytest.mark.parametrize(
    ("command", "name"),
    [(command, n) for command, names in ALSO_REFUSED.items() for n in SHARED + names],
)
def test_other_commands_answer_the_same(
    command: str, name: str, job: Job, cli: Cli
) -> None:
    job.prepare(BY_NAME[name].spoil)
    before = snapshot(job.folder.parent)
    said = cli.refused(command, job.config_file, *OUTPUTS[command])
    assert_says(said, f"Error: {job.fill(BY_NAME[name].ours)}")
    assert_only_new(before, job.folder.parent)


def test_inspect_needs_a_base_whatever_the_method(job: Job, cli: Cli) -> None:
    without_base = broken.without("base_model")
    job.prepare(broken.each(without_base, broken.settings(merge_method="ties")))
    said = cli.refused("inspect", job.config_file)
    assert "no base_model is given" in said and "inspect --base" in said


@each_row
def test_mergekit_yaml_raises_and_leaves_at_most_an_empty_folder(
    row: Row, job: Job
) -> None:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    job.prepare(row.spoil)
    before = snapshot(job.folder.parent)
    job.happened.clear()
    arguments = [str(job.config_file), str(job.out), *QUIET]

    if row.mergekit is None:
        mergekit_yaml.main(arguments, standalone_mode=False)
        assert read_model(job.out)
        return
    with pytest.raises(row.error) as raised:
        mergekit_yaml.main(arguments, standalone_mode=False)

    assert_says(str(raised.value), job.fill(row.mergekit, ours=job.fill(row.ours)))
    assert job.happened <= row.mergekit_after, job.happened
    assert_only_new(before, job.folder.parent, "work/out")


def test_without_a_fault_there_is_no_error(job: Job, cli: Cli) -> None:
    """What all rows are made from merges: so it is the fault that they show."""
    job.prepare(broken.as_given)
    cli(*job.command)
    assert job.happened == {SCAN, LOAD, MERGE}
    assert read_model(job.out).keys() == read_model(job.folder / "base").keys()


# --- no configuration to read ---------------------------------------------------------


@pytest.mark.parametrize("command", OUTPUTS)
@pytest.mark.parametrize(
    ("name", "problem"), [("missing.yml", "does not exist"), ("base", "is a folder")]
)
def test_a_configuration_that_is_no_file(
    command: str, name: str, problem: str, job: Job, cli: Cli
) -> None:
    job.prepare(broken.as_given)
    before = snapshot(job.folder.parent)
    said = cli.refused(command, name, *OUTPUTS[command])
    assert f"{name} {problem}; expected a merge YAML" in said
    assert not job.happened
    assert_only_new(before, job.folder.parent)


# --- lines and items of a YAML --------------------------------------------------------


def assert_unreadable(text: str, says: str) -> None:
    """Check how the error of a YAML begins."""
    with pytest.raises(ValueError) as raised:
        merge_yaml.read(text)
    assert_says(str(raised.value), f"{says}…")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("models:\n  - model: a\n    - model: b\n", "line 3 … `- model: b`"),
        ("models:\n  - model: a\n      parameters:\n", "line 3 … `parameters:`"),
        ("models:\n  - model: a\n   parameters:\n", "line 3 … `parameters:`"),
        ("models:\n  - model: a\n  weight: 1\n", "line 3 … `weight: 1`"),
        ("exclude: 'a', 'b'\n", "not readable as YAML: …found ','…"),
        ("models:\n\t- model: a\n", "line 2 … `- model: a`… not tabs"),
        ("dtype: float32\n  merge_method: a\n", "line 2 … `merge_method: a`"),
        ("  dtype: float32\nmerge_method: a\n", "line 2 … `merge_method: a`"),
        ("dtype: float32\nbase_model a\nmodels:\n", "line 2 … `base_model a`… a colon"),
    ],
)
def test_a_line_that_does_not_fit_is_quoted(text: str, line: str) -> None:
    assert_unreadable(text, line)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("models: [{model: 7}]", "model in models[0] is 7; expected a folder…"),
        ("tokenizer: {source: 3}", "source in tokenizer is 3; expected a folder…"),
        ("modules: 3", "modules in the YAML is 3; expected keys"),
        (
            "tokenizer: {sorce: base}",
            "sorce is no key … tokenizer; did you mean source?",
        ),
        ("Models: []", "Models is no key of a merge in the YAML; did you mean models?"),
        ("models: [{Model: a}]", "Model is no key of a merge in models[0]; did you"),
        ("slices: [3]", "no merge configuration: 0 in slices: "),
        ("dtype: 16", "dtype in the YAML is 16; expected text"),
        ("models: []", "no merge configuration: expected one of `models:`"),
        ("weights: [1]", "weights is no key …; did you mean weight, under `param"),
        (
            "models: [{model: a, parameters: {weight: {b: 2}}}]",
            "b is no key of weight in models[0].parameters; expected a value",
        ),
        (
            "slices: [{sources: [{model: a, layer_range: 2}]}]",
            "layer_range in slices[0].sources[0] is 2; expected two numbers",
        ),
    ],
)
def test_values_of_another_kind(line: str, says: str) -> None:
    assert_unreadable(f"merge_method: metagpt\n{line}\n", says)


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ("[model:./code]", "models[0] is 'model:./code'; … `- model: ./code`"),
        ("[models/code]", "models[0] is 'models/code'; … `- model: models/code`"),
        ("[{model: a}, null]", "models[1] is None; … `- model: FOLDER`"),
        ("{model: a}", "models is {'model': 'a'}; … `- model: FOLDER`"),
        ("./code", "models is './code'; … `- model: ./code`"),
    ],
)
def test_models_that_are_no_list_of_models(models: str, says: str) -> None:
    assert_unreadable(f"merge_method: metagpt\nmodels: {models}\n", says)


# --- names of methods ----------------------------------------------------------------


@pytest.mark.parametrize("command", OUTPUTS)
@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("metagtp", "metagpt"),
        ("metagpt-dare-ties", "metagpt_dare_ties"),
        ("MetaGPT", "metagpt"),
        ("Metagpt_ties", "metagpt_ties"),
        ("dare", "…metagpt_dare_linear or metagpt_dare_ties"),
    ],
)
def test_a_method_in_another_spelling(
    command: str, name: str, meant: str, job: Job, cli: Cli
) -> None:
    job.prepare(broken.settings(merge_method=name))
    said = cli.refused(command, job.config_file, *OUTPUTS[command])
    assert_says(said, f"Error: …Did you mean {meant}? …")


# --- layers of slices -----------------------------------------------------------------


@pytest.mark.parametrize("layers", [(0, 4), (3, 1)])
def test_layers_that_a_model_does_not_have_are_refused(
    layers: tuple[int, int], job: Job, cli: Cli
) -> None:
    job.prepare(broken.slices(THREE, (0, 3), layers))
    said = cli.refused(*job.command)
    assert f"layer_range of {job.folder}/base in slices[1] is {list(layers)}; " in said
    assert not job.happened


def test_layers_of_different_number_are_refused(job: Job, cli: Cli) -> None:
    def spoil(folder: Path, config: broken.Config) -> None:
        broken.slices(THREE, (0, 3))(folder, config)
        config["slices"][0]["sources"][0]["layer_range"] = [0, 2]

    job.prepare(spoil)
    said = cli.refused(*job.command)
    assert "in slices[0] spans 2 layers and that of another 3" in said
    assert not job.happened


# --- the merge itself -----------------------------------------------------------------


@pytest.mark.filterwarnings(
    # mergekit 0.1.5: merging an adapter calls peft, which reads what is deprecated
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
def test_merge_takes_adapters_as_mergekit_yaml_does(job: Job, cli: Cli) -> None:
    from mergekit.io.tasks import LoaderCache
    from mergekit.options import MergeOptions

    config = job.prepare(broken.adapter(spelling="{dir}/base+{dir}/adapter"))
    options = ["--lora-merge-dtype", "bfloat16", "--lora-merge-cache"]
    cache = job.folder.parent / "their-cache"
    theirs = job.folder.parent / "plain" / "out"
    merged = run_mergekit(config, theirs, *options, str(cache))
    assert all(t.dtype == torch.bfloat16 for t in read_model(*cache.iterdir()).values())

    LoaderCache().setup(MergeOptions())  # as in a new process
    cli(*job.command, *options, job.folder.parent / "our-cache")
    assert_same_states(read_model(job.out), merged)


@pytest.mark.parametrize(
    ("out", "options"),
    [
        ("full", ()),
        ("merge.yml", ()),
        ("merge.yml", ("--force",)),
        ("base", ("--force",)),  # holds an input
        (".", ("--force",)),  # holds the inputs
        ("base/new", ()),  # lies in an input
        ("base/a/b", ("--force",)),
    ],
)
def test_output_that_cannot_be_replaced_is_refused(
    out: str, options: tuple[str, ...], job: Job, cli: Cli
) -> None:
    job.prepare(broken.as_given)
    (job.folder / "full").mkdir()
    (job.folder / "full" / "precious").write_text("kept")
    before = snapshot(job.folder.parent)
    job.out = job.folder / out
    said = cli.refused(*job.command, *options)
    assert str(job.out) in said
    if out == "merge.yml":
        assert "is a file; expected a folder" in said
    assert (" lies in " in said) == out.startswith("base/")
    assert not job.happened
    assert_only_new(before, job.folder.parent)


def test_parameters_of_other_methods_are_said_to_be_ignored(
    job: Job, cli: Cli, caplog: pytest.LogCaptureFixture
) -> None:
    job.prepare(broken.parameters(normalize=True, int8_mask=True))
    cli(*job.command)
    assert "ignored, as metagpt has none: int8_mask, normalize" in caplog.text


# --- local models by relative paths ---------------------------------------------------


def test_relative_paths_of_one_slash_make_mergekit_ask_the_hub(job: Job) -> None:
    """The fact about mergekit that our command works around, after hours of merging."""
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    def with_one_slash(folder: Path, config: Config) -> None:
        (folder / "m").mkdir()
        for name in THREE:
            (folder / name).rename(folder / "m" / name)
        config["base_model"] = "m/base"
        config["models"] = [{"model": "m/tuned0"}, {"model": "m/tuned1"}]

    job.prepare(with_one_slash)
    arguments = [str(job.config_file), str(job.out), *QUIET]
    with pytest.raises(OSError, match=r"models/m/.*: offline mode is enabled"):
        mergekit_yaml.main(arguments, standalone_mode=False)
    assert read_model(job.out)


def test_only_models_are_taken_for_paths(job: Job) -> None:
    """`base` and `union` of tokenizers are mergekit's words, whatever folders exist."""
    for name in ("base", "union", "linear", "m"):
        (job.folder / name).mkdir()
    for source in ("base", "union"):
        given = {
            "merge_method": "linear",
            "base_model": "base",
            "models": [{"model": "m"}, {"model": "./missing"}, {"model": "a/missing"}],
            "tokenizer_source": source,
            "dtype": "float32",
        }
        config = merge_yaml.read(yaml.safe_dump(given))
        assert str(config.base_model) == "./base"
        models = [str(entry.model) for entry in config.models or ()]
        assert models == ["./m", "./missing", "a/missing"]
        assert config.merge_method == "linear"
        assert config.tokenizer_source == source


# --- a sample through the real commands -----------------------------------------------


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("mergekit-metagpt", "nan-in-tuned1-by-layer"),
        ("mergekit-metagpt", "other-architecture"),
        ("mergekit-yaml", "only-the-base"),
    ],
)
def test_console_scripts_answer_the_same(
    command: str, name: str, tmp_path: Path
) -> None:
    row, folder = BY_NAME[name], tmp_path / "work"
    folder.mkdir()
    job = Job(folder, folder / "out")
    job.prepare(row.spoil)
    before = snapshot(tmp_path)
    ours = job.fill(row.ours)
    words = ["merge"] * (command == "mergekit-metagpt")
    done = run_process(
        [script(command), *words, job.config_file, job.out, *QUIET],
        environment(TMPDIR=str(tmp_path)),
    )
    if words:
        assert (done.returncode, done.stdout) == (2, "")
        assert_says(done.stderr, f"Error: {ours}\n")
        assert_only_new(before, tmp_path)
        return
    assert done.returncode == 1
    assert row.mergekit is not None
    assert "Traceback (most recent call last):" in done.stderr.splitlines()
    assert_says(done.stderr, f"…{job.fill(row.mergekit, ours=ours)}…")
    assert_only_new(before, tmp_path, "work/out")
