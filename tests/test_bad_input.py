"""What bad input gets: every row of the table, through both front ends.

`mergekit-metagpt merge` answers one line and status 2, and creates nothing;
`mergekit-yaml` raises with the same text, or mergekit itself is first with its own.
"""

from __future__ import annotations

import faulthandler
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import SafetensorError

from mergekit_metagpt.commands.cli import main
from mergekit_metagpt.merge_config import merge_yaml
from tests import broken
from tests.broken import TENSOR, Config, Spoil, snapshot, write_good
from tests.conftest import Family
from tests.processes import environment, run_process, script
from tests.support import assert_same_bits, merge_config, read_model, run_mergekit

# What may have happened when the answer comes. Nothing of it: the YAML or headers told.
SCAN = "our scan read a weight"
LOAD = "mergekit loaded a weight"
MERGE = "mergekit's merge was called"
Events = frozenset[str]
HEADERS: Events = frozenset()


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
        options: command-line options of both.
    """

    name: str
    spoil: Spoil
    ours: str
    mergekit: str | None = "{ours}"
    error: type[Exception] = ValueError
    ours_after: Events = HEADERS
    mergekit_after: Events = HEADERS
    options: tuple[str, ...] = ()


# Where pydantic wraps what a validator of mergekit says.
WRAPPED = "1 validation error for ExecuteMergeMethodTask\n  Value error, {ours} […"

NO_BASE = (
    "metagpt measures task vectors against a base, and none is given for {place}. Add "
    "`base_model:` with the model that all others were fine-tuned from"
)
ONLY_BASE = (
    "only the base {dir}/base is given: there is nothing to merge. Add the fine-tuned "
    "models under `models:`"
)
ALL_ZERO = (
    "weight is 0 for every model: nothing would be merged. Give at least one model a "
    "weight > 0, or leave weight out"
)
TWO = ("tuned0", "tuned1")
THREE = ("base", *TWO)

BASES = [
    Row(
        "no-base-model",
        broken.without("base_model"),
        ours=NO_BASE.replace("{place}", "models"),
        mergekit=NO_BASE.replace("{place}", "default.slices[0]"),
    ),
    Row(
        "no-base-model-with-slices",
        broken.both(broken.slices(TWO, (0, 3)), broken.without("base_model")),
        ours=NO_BASE.replace("{place}", "slices[0]"),
        mergekit=NO_BASE.replace("{place}", "default.slices[0]"),
    ),
    Row(
        "base-not-among-the-sources",
        broken.slices(TWO, (0, 3)),
        ours="the base {dir}/base is not among the sources of slices[0]. Add it there: "
        "task vectors are measured against it",
        mergekit="the base {dir}/base is not among the inputs for default.slices[0]. "
        "Add it to the sources (or to the models): task vectors are measured against "
        "it",
    ),
    Row("only-the-base", broken.models("base"), ours=ONLY_BASE, mergekit=WRAPPED),
    Row(
        "only-the-base-with-slices",
        broken.slices(["base"], (0, 3)),
        ours=ONLY_BASE,
        mergekit=WRAPPED,
    ),
]


def poisoned_row(
    name: str, model: str, value: float, given: Mapping[str, Any], *, scanned: bool
) -> Row:
    """NaN or infinity: our command scans, mergekit may find it when it is reached."""
    found = f"{TENSOR} of {{dir}}/{model} holds NaN or infinity"
    file = f"{{dir}}/{model}/model.safetensors"
    spread = "a merge would spread it. Repair or replace"
    return Row(
        f"{value}-in-{model}-{name}",
        broken.both(broken.poisoned(model, value), broken.settings(**given)),
        ours=f"{found} (in {file}); {spread} it",
        mergekit="{ours}" if scanned else f"{found}; {spread} this model",
        ours_after=frozenset({SCAN}),
        mergekit_after=frozenset({SCAN, LOAD} if scanned else {LOAD}),
    )


NOT_FINITE = [
    poisoned_row(name, model, float(value), {"parameters": parameters}, scanned=scanned)
    for model in ("base", "tuned1")
    for value in ("nan", "inf")
    for name, parameters, scanned in (
        ("by-model", {"granularity": "model"}, True),
        ("by-layer", {"granularity": "layer"}, True),
        ("by-tensor", {"granularity": "tensor"}, False),
        ("power-0", {"power": 0}, False),
    )
]
# A filter leaves the other tensors to the default, which is measured by a scan.
NOT_FINITE += [
    poisoned_row(
        "by-tensor-for-some",
        "tuned1",
        float("nan"),
        {"parameters": {"granularity": [{"filter": "norm", "value": "tensor"}]}},
        scanned=True,
    ),
    poisoned_row(
        "power-0-for-some",
        "tuned1",
        float("nan"),
        {"parameters": {"power": [{"filter": "norm", "value": 0}]}},
        scanned=True,
    ),
    poisoned_row(
        "excluded-by-tensor",
        "tuned1",
        float("nan"),
        {"parameters": {"granularity": "tensor", "exclude": "mlp"}},
        scanned=False,
    ),
    poisoned_row(
        "composed-by-tensor",
        "tuned1",
        float("-inf"),
        {"merge_method": "metagpt_ties", "parameters": {"granularity": "tensor"}},
        scanned=False,
    ),
    poisoned_row(
        "composed-by-model",
        "base",
        float("nan"),
        {"merge_method": "metagpt_dare_linear"},
        scanned=True,
    ),
]


def quantised(model: str, why: str) -> str:
    return (
        f"{{dir}}/{model} is quantised ({why}); MetaGPT measures floating-point "
        "weights. Dequantise it first, or name the unquantised model"
    )


BARE_ADAPTER = (
    "{dir}/adapter is a bare LoRA adapter; write it as base+adapter "
    "(BASE+{dir}/adapter) and give --lora-merge-cache FOLDER"
)

KINDS_OF_MODEL = [
    Row(
        f"fp8-{model}",
        broken.rewritten(model, broken.to_fp8),
        ours=quantised(model, "model.layers.…proj.weight is stored as F8_E4M3"),
    )
    for model in ("base", "tuned1")
] + [
    Row(
        "int8-with-scales",
        broken.rewritten("tuned1", broken.to_int8),
        ours=quantised("tuned1", "model.layers.…proj.weight is stored as I8"),
    ),
    Row(
        "quantization-config",
        broken.in_file(
            "tuned1/config.json",
            broken.with_json(quantization_config={"quant_method": "gptq", "bits": 4}),
        ),
        ours=quantised("tuned1", "{dir}/tuned1/config.json has a quantization_config"),
    ),
    Row(
        "bare-adapter",
        broken.adapter(),
        ours=BARE_ADAPTER,
        mergekit="Unrecognized model in {dir}/adapter. Should have a `model_type` key "
        "in its config.json.",
    ),
    Row(
        "bare-adapter-with-config",
        broken.adapter(config_json=True),
        ours=BARE_ADAPTER,
        mergekit="Unable to find model files at {dir}/adapter",
        error=RuntimeError,
    ),
    Row(
        "adapter-without-a-cache",
        broken.adapter(spelling="{dir}/base+{dir}/adapter"),
        ours="{dir}/base+{dir}/adapter has a LoRA adapter; give --lora-merge-cache "
        "FOLDER",
        mergekit="Need to specify cache dir to merge adapters",
        error=RuntimeError,
    ),
    Row(
        "other-architecture",
        broken.gpt2,
        ours="{dir}/tuned1 is no fine-tune of {dir}/base: 0.0% of the parameters "
        "match; first differences: transformer.….weight is not in {dir}/base…. "
        "Give the base that it was trained from",
        mergekit="Must specify --allow-crimes to attempt to mix different "
        "architectures",
        error=RuntimeError,
    ),
    Row(
        "other-architecture-allowed",
        broken.gpt2,
        ours="{dir}/tuned1 is no fine-tune of {dir}/base: 0.0% of the parameters "
        "match; first differences: transformer.….weight is not in {dir}/base…. "
        "Give the base that it was trained from",
        # Which of the two architectures mergekit takes for that of the result, and
        # so what it says, differs from process to process.
        mergekit="…",
        error=Exception,
        options=("--allow-crimes",),
    ),
    Row(
        "other-width",
        broken.llama(hidden_size=64),
        ours="{dir}/tuned1 is no fine-tune of {dir}/base: 28.7% of the parameters "
        "match; first differences: model.layers.…proj.weight is […], in the base "
        "[…]; …. Give the base that it was trained from",
    ),
]

UNREADABLE = "… cannot be read: …. It is truncated or corrupt: fetch it again"
HEADER = "Error while deserializing header: …"

FILES = [
    Row(
        "truncated",
        broken.in_file("tuned1/model.safetensors", broken.truncated),
        ours=UNREADABLE.replace("…", "{dir}/tuned1/model.safetensors", 1),
        mergekit=HEADER,
        error=SafetensorError,
    ),
    Row(
        "truncated-base",
        broken.in_file("base/model.safetensors", broken.truncated),
        ours=UNREADABLE.replace("…", "{dir}/base/model.safetensors", 1),
        mergekit=HEADER,
        error=SafetensorError,
    ),
    Row(
        "truncated-shard",
        broken.in_file(f"tuned1/{broken.SHARD}", broken.truncated, shards=3),
        ours=UNREADABLE.replace("…", f"{{dir}}/tuned1/{broken.SHARD}", 1),
        error=OSError,
    ),
    Row(
        "empty-file",
        broken.in_file("tuned1/model.safetensors", lambda content: b""),
        ours=UNREADABLE.replace("…", "{dir}/tuned1/model.safetensors", 1),
        mergekit=HEADER,
        error=SafetensorError,
    ),
    Row(
        "corrupt-header",
        broken.in_file("tuned1/model.safetensors", broken.garbled_header),
        ours=UNREADABLE.replace("…", "{dir}/tuned1/model.safetensors", 1),
        mergekit=HEADER,
        error=SafetensorError,
    ),
    Row(
        "corrupt-header-of-a-shard",
        broken.in_file(f"tuned1/{broken.SHARD}", broken.garbled_header, shards=3),
        ours=UNREADABLE.replace("…", f"{{dir}}/tuned1/{broken.SHARD}", 1),
        error=OSError,
    ),
    Row(
        "git-lfs-pointer",
        broken.in_file("tuned1/model.safetensors", broken.git_lfs_pointer),
        ours=UNREADABLE.replace("…", "{dir}/tuned1/model.safetensors", 1),
        mergekit=HEADER,
        error=SafetensorError,
    ),
    Row(
        "missing-shard",
        broken.missing_file(f"tuned1/{broken.SHARD}", shards=3),
        ours=f"{{dir}}/tuned1/{broken.SHARD} is missing; it is part of the model by "
        "its index. Fetch it again",
        error=FileNotFoundError,
    ),
    Row(
        "index-leaves-the-folder",
        broken.in_file(
            f"tuned1/{broken.INDEX}",
            broken.with_shard(TENSOR, "../tuned0/model.safetensors"),
            shards=3,
        ),
        ours="the index of {dir}/tuned1 points outside its folder: "
        "'../tuned0/model.safetensors'; …",
    ),
    Row(
        "index-leaves-the-folder-absolutely",
        broken.in_file(
            f"tuned1/{broken.INDEX}",
            broken.with_shard(TENSOR, "/etc/passwd"),
            shards=3,
        ),
        ours="the index of {dir}/tuned1 points outside its folder: '/etc/passwd'; …",
    ),
    Row(
        "index-is-not-json",
        broken.in_file(f"tuned1/{broken.INDEX}", lambda content: b"<html>", shards=3),
        ours=f"{{dir}}/tuned1/{broken.INDEX}…Expecting value: line 1 column 1 (char "
        "0)…",
        mergekit="Expecting value: line 1 column 1 (char 0)",
    ),
    Row(
        "index-without-a-map",
        broken.in_file(f"tuned1/{broken.INDEX}", lambda content: b"{}", shards=3),
        ours=f"{{dir}}/tuned1/{broken.INDEX}…weight_map…",
        mergekit="'weight_map'",
        error=KeyError,
    ),
    Row(
        "index-names-a-tensor-that-no-shard-holds",
        broken.both(
            broken.rewritten("tuned1", broken.lose_tensor, shards=3),
            broken.in_file(
                f"tuned1/{broken.INDEX}", broken.with_shard(TENSOR, broken.SHARD)
            ),
        ),
        ours=f"…{TENSOR}…{{dir}}/tuned1…",
        mergekit=f"…{TENSOR}…",
        error=Exception,
        mergekit_after=frozenset({SCAN, LOAD}),
    ),
    Row(
        "index-names-another-shard",
        broken.in_file(
            f"tuned1/{broken.INDEX}",
            broken.with_shard("lm_head.weight", broken.SHARD),
            shards=3,
        ),
        ours=f"lm_head.weight is said to be in {{dir}}/tuned1/{broken.SHARD} by the "
        "index of {dir}/tuned1, but is not. Fetch the model again",
        error=OSError,
    ),
    Row(
        "index-with-a-list",
        broken.in_file(
            f"tuned1/{broken.INDEX}", broken.with_json(weight_map=[]), shards=3
        ),
        ours="the index of {dir}/tuned1 holds a list; expected files by the names of "
        "tensors. Fetch the model again",
        error=OSError,
    ),
    Row(
        "pickle-with-short-records",
        broken.pickled(broken.short_records),
        ours="{dir}/tuned1/pytorch_model.bin cannot be read: its record data/… has … "
        "bytes; its pickle says …. It is truncated or corrupt: fetch it again",
        error=OSError,
    ),
    Row(
        "pickle-with-a-state-dict",
        broken.nested_pickle,
        ours="{dir}/tuned1/pytorch_model.bin of {dir}/tuned1 holds tensors under "
        "state_dict, where mergekit does not read them. Store them by their names",
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
        ours="{dir}/tuned1 holds no weights; expected model.safetensors or "
        "pytorch_model.bin, or their .index.json",
        mergekit="Unable to find model files at {dir}/tuned1",
        error=RuntimeError,
    ),
    Row(
        "weights-of-another-name",
        broken.renamed("tuned1/model.safetensors", "tuned1/weights.safetensors"),
        ours="{dir}/tuned1 holds no weights; expected model.safetensors or "
        "pytorch_model.bin, or their .index.json",
        mergekit="Unable to find model files at {dir}/tuned1",
        error=RuntimeError,
    ),
    Row(
        "a-file-for-a-model",
        broken.models("tuned0", "./tuned1/model.safetensors"),
        ours="…tuned1/model.safetensors …; expected a model's folder",
        mergekit="It looks like the config file at './tuned1/model.safetensors' is "
        "not a valid JSON file.",
        error=OSError,
    ),
    Row(
        "no-config-json",
        broken.missing_file("tuned1/config.json"),
        ours="…{dir}/tuned1…config.json…",
        mergekit="Unrecognized model in {dir}/tuned1. Should have a `model_type` key "
        "in its config.json.",
    ),
]


ODD_CONFIG = (
    "{dir}/tuned1/config.json of {dir}/tuned1 …. Repair it, or fetch the model again"
)


def odd_config(name: str, said: str, mergekit: str = "…", **keys: Any) -> Row:
    """A key of config.json; by default mergekit or transformers are first."""
    return Row(
        f"config-{name}",
        broken.in_file("tuned1/config.json", broken.with_json(**keys)),
        ours=ODD_CONFIG.replace("…", said),
        mergekit=mergekit,
        error=ValueError if mergekit == "{ours}" else Exception,
    )


CONFIGS = [
    Row(
        f"config-that-is-{name}",
        broken.in_file("tuned1/config.json", lambda content, text=text: text),
        ours=ODD_CONFIG.replace("…", said),
        mergekit="…",
        error=Exception,
    )
    for name, text, said in (
        ("empty", b"", "cannot be used: JSONDecodeError: Expecting value…"),
        ("null", b"null", "holds None; expected a JSON object"),
        ("a-list", b"[]", "holds []; expected a JSON object"),
        ("deep", b"[" * 100_000, "cannot be used: RecursionError: …"),
    )
]
CONFIGS += [
    odd_config("model-type-number", "has model_type 3; expected a name", model_type=3),
    odd_config(
        "model-type-unknown",
        "cannot be used: ValueError: The checkpoint you are trying to load has model "
        "type `unheard` but Transformers does not recognize this architecture…",
        model_type="unheard",
    ),
    odd_config(
        "architectures-null",
        "has architectures None; expected a list of one name",
        architectures=None,
    ),
    odd_config(
        "architectures-none",
        "has architectures []; expected a list of one name",
        mergekit="More than one architecture in config?",
        architectures=[],
    ),
    odd_config(
        "method",
        "has a key 'to_dict', which is a method of transformers' configurations; "
        "expected settings",
        to_dict=3,
    ),
    odd_config(
        "width-as-a-word",
        "cannot be used: StrictDataclassFieldValidationError: …hidden_size…",
        hidden_size="32",
    ),
    odd_config(
        "heads-none", "cannot be used: ZeroDivisionError: …", num_attention_heads=0
    ),
    odd_config(
        "more-layers",
        "has num_hidden_layers 4, but layer 3 is not stored ('model.layers.3.…'); "
        "expected the number of layers of the model",
        mergekit="{ours}",
        num_hidden_layers=4,
    ),
    odd_config(
        "no-layers",
        "has num_hidden_layers 0, but layer 0 is stored ('model.layers.0.…'); "
        "expected the number of layers of the model",
        mergekit="{ours}",
        num_hidden_layers=0,
    ),
    odd_config(
        "billions-of-layers",
        "has num_hidden_layers 1000000000, and its files … tensors; expected at most "
        "4096",
        mergekit="{ours}",
        num_hidden_layers=10**9,
    ),
]

PARAMETERS = [
    Row(
        "granularity-unknown",
        broken.parameters(granularity="channel"),
        ours="granularity is 'channel'; expected 'model', 'layer' or 'tensor'",
    ),
    Row(
        "granularity-unknown-in-a-filter",
        broken.parameters(granularity=[{"filter": "mlp", "value": 3}, {"value": "x"}]),
        ours="granularity is …; expected 'model', 'layer' or 'tensor'",
    ),
    Row(
        "granularity-unknown-composed",
        broken.both(
            broken.settings(merge_method="metagpt_della"),
            broken.parameters(granularity="block"),
        ),
        ours="granularity is 'block'; expected 'model', 'layer' or 'tensor'",
    ),
    *(
        Row(
            f"weight-{name}",
            broken.weights(1, value),
            ours=f"weight is {shown}; expected a …number >= 0",
        )
        for name, value, shown in (
            ("negative", -0.5, "-0.5"),
            ("nan", float("nan"), "nan"),
            ("string", "heavy", "'heavy'"),
            ("negative-in-a-gradient", [1, -1], "-1"),
            (
                "negative-in-a-filter",
                [{"filter": "mlp", "value": -1}, {"value": 1}],
                "-1",
            ),
        )
    ),
    Row(
        "weight-infinite",
        broken.weights(1, float("inf")),
        ours="weight is inf; expected a finite number >= 0",
    ),
    *(
        Row(
            f"{name}-{shown}",
            broken.parameters(**{name: value}),
            ours=f"{name} is {shown}; expected a finite number",
        )
        for name in ("power", "lambda")
        for value, shown in (
            (float("inf"), "inf"),
            (float("-inf"), "-inf"),
            (float("nan"), "nan"),
            ("two", "'two'"),
        )
    ),
    Row(
        "exclude-list",
        broken.parameters(exclude=["embed_tokens", "lm_head"]),
        ours="exclude is the list ['embed_tokens', 'lm_head'], of which mergekit would "
        "pick one entry; expected one string, comma-separated",
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
            ours=ALL_ZERO,
            # The planner shows one weight after the other: the first tensor is the
            # first that can know. The scan has no part in it.
            mergekit_after=frozenset({LOAD}),
        )
        for name, spoil in (
            ("constant", broken.weights(0, 0)),
            ("constant-of-the-merge", broken.parameters(weight=0)),
            ("gradient", broken.weights([0, 0], 0.0)),
            (
                "filters",
                broken.weights(0, [{"filter": "mlp", "value": 0}, {"value": 0}]),
            ),
        )
    ),
    *(
        Row(
            f"layers-moved-{name}",
            broken.both(
                broken.slices(THREE, (0, 1), (2, 3)),
                broken.parameters(granularity=granularity),
            ),
            ours="granularity 'layer': slices[1] moves layers to other indices, which "
            "have no layer-wise norms; use granularity: model or granularity: tensor",
            mergekit="granularity 'layer': model.layers.1.….weight of the output is "
            "not model.layers.1.….weight of {dir}/…. Slices that move layers to "
            "other indices have no layer-wise norms; use granularity: model or "
            "granularity: tensor",
            mergekit_after=frozenset({SCAN, LOAD}),
        )
        for name, granularity in (
            ("all", "layer"),
            ("some", [{"filter": "mlp", "value": "layer"}, {"value": "model"}]),
        )
    ),
]

NO_MAPPING = "expected a mapping with merge_method, base_model and models"

YAML = [
    Row(
        "not-yaml",
        broken.text("models: [a, b\nmerge_method: metagpt\n"),
        ours="{dir}/merge.yml: not readable as YAML: while parsing a flow "
        "sequence…line 1, column 9…expected ',' or ']', but got ':'…line 2, "
        "column 13…",
        mergekit='while parsing a flow sequence\n  in "<unicode string>", line 1, '
        "column 9:…expected ',' or ']', but got ':'\n  in \"<unicode string>\", "
        "line 2, column 13:…",
        error=yaml.YAMLError,
    ),
    Row(
        "yaml-with-tabs",
        broken.text("models:\n\t- model: a\n"),
        ours="{dir}/merge.yml: not readable as YAML: while scanning for the next "
        "token found character '\\t' that cannot start any token…line 2, column 1…",
        mergekit="while scanning for the next token\nfound character '\\t' that cannot "
        "start any token…",
        error=yaml.YAMLError,
    ),
    Row(
        "yaml-list",
        broken.text("- merge_method: metagpt\n"),
        ours=f"{{dir}}/merge.yml: holds list; {NO_MAPPING}",
        mergekit="1 validation error for MergeConfiguration\n  Input should be a valid "
        "dictionary or instance of MergeConfiguration [type=model_type, "
        "input_value=[{'merge_method': 'metagpt'}], input_type=list]…",
    ),
    Row(
        "yaml-empty",
        broken.text(""),
        ours=f"{{dir}}/merge.yml…; {NO_MAPPING}",
        mergekit="1 validation error for MergeConfiguration\n  Input should be a valid "
        "dictionary or instance of MergeConfiguration [type=model_type, "
        "input_value=None, input_type=NoneType]…",
    ),
    Row(
        "yaml-not-utf-8",
        broken.text("merge_method: metagpt # é\n".encode("latin-1")),
        ours="{dir}/merge.yml: …",
        mergekit="'utf-8' codec can't decode byte 0xe9 in position 24: invalid "
        "continuation byte",
    ),
    Row(
        "models-and-slices",
        broken.slices(THREE, (0, 3), keep_models=True),
        ours="{dir}/merge.yml: no merge configuration: Exactly one of 'models', "
        "'slices', or 'modules' must be present",
        mergekit="Exactly one of 'models', 'slices', or 'modules' must be present",
        error=RuntimeError,
    ),
    Row(
        "no-models",
        broken.without("models"),
        ours="{dir}/merge.yml: no merge configuration: Exactly one of 'models', "
        "'slices', or 'modules' must be present",
        mergekit="Exactly one of 'models', 'slices', or 'modules' must be present",
        error=RuntimeError,
    ),
    Row(
        "no-method",
        broken.without("merge_method"),
        ours="{dir}/merge.yml: no merge configuration: …merge_method…",
        mergekit="1 validation error for MergeConfiguration\nmerge_method\n  Field "
        "required […",
    ),
    Row(
        "other-method",
        broken.both(
            broken.settings(merge_method="task_arithmetic"), broken.weights(1, 1)
        ),
        ours="merge_method is 'task_arithmetic'; this command takes metagpt…. Use "
        "mergekit-yaml for other methods",
        mergekit=None,
    ),
]

OFFLINE = (
    "We couldn't connect to 'https://huggingface.co' to load the files, and couldn't "
    "find them in the cached files.\nCheck your internet connection or see how to run "
    "the library in offline mode at "
    "'https://huggingface.co/docs/transformers/installation#offline-mode'."
)

PATHS = [
    Row(
        "no-such-folder",
        broken.models("tuned0", "missing"),
        ours="{dir}/missing does not exist; expected a model's folder",
        mergekit="Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
        "'{dir}/missing'. Use `repo_type` argument if needed.",
        error=OSError,
    ),
    Row(
        "no-such-relative-folder",
        broken.models("tuned0", "./missing"),
        ours="./missing does not exist; expected a model's folder",
        mergekit="Repo id must use alphanumeric chars, '-', '_' or '.'. The name "
        "cannot start or end with '-' or '.' and the maximum length is 96: "
        "'./missing'.",
        error=OSError,
    ),
    Row(
        "no-such-base",
        broken.settings(base_model="./missing"),
        ours="./missing does not exist; expected a model's folder",
        mergekit="Repo id must use alphanumeric chars, '-', '_' or '.'. The name "
        "cannot start or end with '-' or '.' and the maximum length is 96: "
        "'./missing'.",
        error=OSError,
    ),
    Row(
        "neither-folder-nor-on-the-hub",
        broken.models("tuned0", "some-org/missing"),
        ours="some-org/missing …",
        mergekit=OFFLINE,
        error=OSError,
    ),
]

# Not in the table, and answered by mergekit while it plans or merges.
LATE: Events = frozenset({SCAN, LOAD, MERGE})
MERGEKIT_FIRST = [
    Row(
        "one-model-twice",
        broken.models("tuned0", "tuned0"),
        ours="…tuned0…",
        mergekit="Duplicate merge inputs for default.slices[0]",
        ours_after=LATE,
        options=("--quiet",),
    ),
    Row(
        "fewer-layers",
        broken.llama(num_hidden_layers=2),
        ours="{dir}/tuned1 has 2 layers by its config.json, the base {dir}/base has 3; "
        "expected as many. Name the layers that both have under `slices:`",
        mergekit="All inputs to a slice must contain the same number of layers",
        error=RuntimeError,
    ),
    Row(
        "tensor-missing-in-a-model",
        broken.rewritten("tuned1", broken.lose_tensor),
        ours=f"…{TENSOR}…{{dir}}/tuned1…",
        mergekit=f"Tensor {TENSOR} required but not present in model {{dir}}/tuned1",
        error=RuntimeError,
        ours_after=LATE,
        mergekit_after=LATE,
        options=("--quiet",),
    ),
    Row(
        "tensor-missing-in-the-base",
        broken.rewritten("base", broken.lose_tensor),
        ours=f"…{TENSOR}…{{dir}}/base…",
        mergekit=f"Tensor {TENSOR} required but not present in model {{dir}}/base",
        error=RuntimeError,
        ours_after=LATE,
        mergekit_after=LATE,
        options=("--quiet",),
    ),
    Row(
        "vocabulary-resized",
        broken.llama(vocab_size=100),
        ours="Tensor size mismatch for ….weight: […]. Align vocabulary axes with "
        "tokenizer configuration before merging (for example, tokenizer: {source: "
        "base})…",
        ours_after=LATE,
        mergekit_after=LATE,
        options=("--quiet",),
    ),
]

ROWS = [
    *BASES,
    *NOT_FINITE,
    *KINDS_OF_MODEL,
    *FILES,
    *CONFIGS,
    *PARAMETERS,
    *YAML,
    *PATHS,
    *MERGEKIT_FIRST,
]

each_row = pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])


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

    def merge(self, *options: str) -> int:
        """Run `mergekit-metagpt merge` as a new process would; return its status."""
        from mergekit.io.tasks import LoaderCache

        LoaderCache.loaders.clear()
        arguments = ["merge", str(self.config_file), str(self.out), *options]
        with pytest.raises(SystemExit) as ended:
            main.main(arguments, prog_name="mergekit-metagpt")
        assert isinstance(ended.value.code, int)
        return ended.value.code


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


def assert_refused(status: int, stdout: str, stderr: str, wanted: str) -> None:
    """Check for exit status 2, one line on stderr, and silence on stdout."""
    assert stderr.startswith("Error: ") and stderr.endswith("\n"), stderr
    assert len(stderr.splitlines()) == 1, stderr
    assert_says(stderr.removesuffix("\n"), f"Error: {wanted}")
    assert status == 2
    assert stdout == ""


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
    row: Row,
    job: Job,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    job.prepare(row.spoil)
    before = snapshot(job.folder.parent)
    capsys.readouterr()
    job.happened.clear()

    status = job.merge(*row.options)

    said = capsys.readouterr()
    assert_refused(status, said.out, said.err, job.fill(row.ours))
    assert job.happened <= row.ours_after, job.happened
    assert_only_new(before, job.folder.parent)
    if MERGE not in row.ours_after:
        # In a process of its own, logging would write to stderr too.
        assert not [r for r in caplog.records if r.levelname != "INFO"]


@each_row
def test_mergekit_yaml_raises_and_leaves_at_most_an_empty_folder(
    row: Row, job: Job
) -> None:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    job.prepare(row.spoil)
    before = snapshot(job.folder.parent)
    job.happened.clear()
    arguments = [str(job.config_file), str(job.out), "--quiet", "--no-copy-tokenizer"]

    if row.mergekit is None:
        mergekit_yaml.main([*arguments, *row.options], standalone_mode=False)
        assert read_model(job.out)
        return
    with pytest.raises(row.error) as raised:
        mergekit_yaml.main([*arguments, *row.options], standalone_mode=False)

    assert_says(str(raised.value), job.fill(row.mergekit, ours=job.fill(row.ours)))
    assert job.happened <= row.mergekit_after, job.happened
    assert_only_new(before, job.folder.parent, "work/out")


def test_without_a_fault_there_is_no_error(job: Job) -> None:
    """What all rows are made from merges: so it is the fault that they show."""
    job.prepare(broken.as_given)
    assert job.merge("--quiet", "--no-copy-tokenizer") == 0
    assert job.happened == {SCAN, LOAD, MERGE}
    assert read_model(job.out).keys() == read_model(job.folder / "base").keys()


# --- no configuration to read ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["missing", "folder"])
def test_configuration_that_is_no_file(
    kind: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    if kind == "folder":
        job.config_file.mkdir()
    before = snapshot(job.folder.parent)
    what = {"missing": "No such file or directory", "folder": "Is a directory"}[kind]
    error = {"missing": FileNotFoundError, "folder": IsADirectoryError}[kind]

    with pytest.raises(error) as raised:
        mergekit_yaml.main([str(job.config_file), str(job.out)], standalone_mode=False)
    assert_says(str(raised.value), f"[Errno …] {what}: '{job.config_file}'")

    status = job.merge()
    said = capsys.readouterr()
    assert_refused(status, said.out, said.err, f"…{job.config_file}…")
    assert not job.happened
    assert_only_new(before, job.folder.parent)


# --- what mergekit waits for: only our command answers --------------------------------

MODEL_FILES = ("model.safetensors", "config.json", broken.INDEX, "tokenizer.json")
ENDLESS = "… is a pipe or a device, which may never end; expected a file. Put the …"


@pytest.fixture
def in_time() -> Iterator[None]:
    """Ends the process of a test that waits for ever: no signal wakes some who wait."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


def endless(name: str, kind: str) -> Spoil:
    """A pipe or a device in the place of a file."""

    def spoil(folder: Path, config: Config) -> None:
        file = folder / name
        file.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(file)
        else:
            file.symlink_to("/dev/zero")

    return spoil


def merge_keys(levels: int) -> Spoil:
    """Mappings that take in ten times the one before, with `<<`."""

    def spoil(folder: Path, config: Config) -> str:
        lines = ["a0: &a0 {k: v}"]
        for level in range(1, levels):
            names = ", ".join([f"*a{level - 1}"] * 10)
            lines.append(f"a{level}: &a{level}\n  <<: [{names}]")
        return "\n".join(lines) + "\n" + yaml.safe_dump(config)

    return spoil


TOO_MANY = (
    "its aliases stand for over 1,000,000 values; expected a merge. Write out what is "
    "meant"
)
TOO_LONG = (
    "it has a number of 799,999 characters; expected at most 4,300. Put it in quotes "
    "if it is a word"
)
IN_RANGE = "expected two numbers from 0 to 3, the smaller one first"
WAITED_FOR: dict[str, tuple[Spoil, str]] = {
    **{
        f"{kind}-for-{name}": (
            endless(f"tuned1/{name}", kind),
            ENDLESS.replace("…", f"{{dir}}/tuned1/{name}", 1),
        )
        for name in MODEL_FILES
        for kind in ("pipe", "device")
    },
    "merge-keys": (
        merge_keys(9),
        f"{{dir}}/merge.yml: not readable as YAML: {TOO_MANY}",
    ),
    "a-number-base-60": (
        broken.text(f"x: {':'.join(['1'] * 400_000)}\n"),
        f"{{dir}}/merge.yml: not readable as YAML: {TOO_LONG}",
    ),
    "layers-without-end": (
        broken.slices(THREE, (0, 10**9)),
        f"layer_range of {{dir}}/base in slices[0] is [0, 1000000000]; {IN_RANGE}",
    ),
    "layers-backwards": (
        broken.slices(THREE, (0, 3), (3, 1)),
        f"layer_range of {{dir}}/base in slices[1] is [3, 1]; {IN_RANGE}",
    ),
}


@pytest.mark.usefixtures("in_time")
@pytest.mark.parametrize("name", WAITED_FOR)
def test_our_command_does_not_wait(
    name: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = WAITED_FOR[name]
    job.prepare(spoil)
    there = sorted(job.folder.parent.rglob("*"))
    capsys.readouterr()
    job.happened.clear()

    status = job.merge()

    output = capsys.readouterr()
    assert_refused(status, output.out, output.err, job.fill(said))
    assert not job.happened
    assert sorted(job.folder.parent.rglob("*")) == there


@pytest.mark.usefixtures("in_time")
def test_a_pipe_in_the_place_of_a_shard_is_refused(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    def spoil(folder: Path, config: Config) -> None:
        broken.rewritten("tuned1", lambda state: None, shards=3)(folder, config)
        endless(f"tuned1/{broken.SHARD}", "pipe")(folder, config)

    job.prepare(spoil)
    capsys.readouterr()
    status = job.merge()
    output = capsys.readouterr()
    said = ENDLESS.replace("…", f"{job.folder}/tuned1/{broken.SHARD}", 1)
    assert_refused(status, output.out, output.err, said)


def test_merge_keys_that_mean_little_are_taken(job: Job) -> None:
    job.prepare(merge_keys(4))
    assert job.merge("--quiet", "--no-copy-tokenizer") == 0


# --- weights of 0 on some tensors -----------------------------------------------------

MLP_ZERO = [{"filter": "mlp", "value": 0}, {"value": 1}]


def _is_mlp(name: str) -> bool:
    return "mlp" in name


def _in_first_layer(name: str) -> bool:
    return name.startswith("model.layers.0.")


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
@pytest.mark.parametrize(
    ("weight", "is_kept"),
    [
        pytest.param(MLP_ZERO, _is_mlp, id="filter"),
        pytest.param([0, 1], _in_first_layer, id="gradient"),
    ],
)
def test_weights_that_are_all_0_on_one_tensor_leave_it_to_the_base(
    weight: Any, is_kept: Callable[[str], bool], granularity: str, job: Job
) -> None:
    def spoil(folder: Path, config: Config) -> None:
        broken.weights(weight, weight)(folder, config)
        broken.parameters(granularity=granularity)(folder, config)

    config = job.prepare(spoil)
    assert job.merge("--quiet", "--no-copy-tokenizer") == 0
    base, ours = read_model(job.folder / "base"), read_model(job.out)
    theirs = run_mergekit(config, job.folder.parent / "plain" / "out")

    layers = [name for name in base if ".layers." in name]
    assert any(map(is_kept, layers)) and not all(map(is_kept, layers))
    for name in layers:
        assert_same_bits(ours[name], theirs[name])
        assert torch.equal(ours[name], base[name]) == is_kept(name), name


# --- the merge itself -----------------------------------------------------------------


def assert_same_files(ours: Path, theirs: Path) -> None:
    """Check that all that mergekit writes is there with the same bytes, card apart."""
    written = snapshot(theirs)
    assert {"config.json", "mergekit_config.yml"} <= written.keys()
    assert [name for name in written if name.endswith(".safetensors")]
    found = snapshot(ours)
    for name in written.keys() - {"README.md"}:
        assert found[name] == written[name], name


def title(folder: Path) -> str:
    """The model card's title."""
    text = (folder / "README.md").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("# ")]
    return line.removeprefix("# ")


@pytest.mark.parametrize("granularity", ["model", "layer", "tensor"])
def test_merge_writes_what_mergekit_yaml_writes(
    granularity: str, family: Family, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    config = merge_config(
        family.base, family.models, parameters={"granularity": granularity}
    )
    theirs = job.folder.parent / "plain" / "out"
    run_mergekit(config, theirs)
    text = theirs.with_name("out.yml").read_bytes()
    job.config_file.write_bytes(text)

    assert job.merge("--no-copy-tokenizer", "--quiet") == 0

    assert_same_files(job.out, theirs)
    assert title(job.out) == title(theirs) == "out"
    assert (job.out / "mergekit_config.yml").read_bytes() == text
    assert capsys.readouterr().out == ""
    assert {path.name for path in job.folder.iterdir()} == {"merge.yml", "out"}
    assert not [*(job.folder.parent / "temporary").iterdir()]


@pytest.mark.filterwarnings(
    # mergekit 0.1.5: merging an adapter calls peft, which reads what is deprecated
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
def test_merge_takes_adapters_as_mergekit_yaml_does(job: Job) -> None:
    config = job.prepare(broken.adapter(spelling="{dir}/base+{dir}/adapter"))
    options = ["--lora-merge-dtype", "bfloat16", "--lora-merge-cache"]
    theirs = job.folder.parent / "plain" / "out"
    cache = job.folder.parent / "their-cache"
    run_mergekit(config, theirs, *options, str(cache))
    assert all(t.dtype == torch.bfloat16 for t in read_model(*cache.iterdir()).values())

    cache = job.folder.parent / "our-cache"
    status = job.merge("--no-copy-tokenizer", "--quiet", *options, str(cache))

    assert status == 0
    for name, tensor in read_model(theirs).items():
        assert_same_bits(read_model(job.out)[name], tensor)


@pytest.mark.parametrize("out", ["my-model", "deep/er/my-model", "my-model/"])
def test_the_model_card_is_titled_by_the_output_folder(out: str, job: Job) -> None:
    job.prepare(broken.as_given)
    arguments = ["merge", "merge.yml", out, "--no-copy-tokenizer", "--quiet"]
    main.main(arguments, standalone_mode=False)
    assert title(job.folder / out) == "my-model"


def test_merge_into_the_current_folder(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    job.prepare(broken.as_given)
    here = job.folder / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    arguments = ["merge", str(job.config_file), ".", "--no-copy-tokenizer", "--quiet"]
    main.main(arguments, standalone_mode=False)
    assert here.samefile(".")
    assert read_model(here).keys() == read_model(job.folder / "base").keys()
    assert title(here) == "here"


def test_output_that_is_not_empty_is_refused(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job.prepare(broken.as_given)
    job.out.mkdir()
    (job.out / "precious").write_text("kept")
    before = snapshot(job.folder.parent)
    capsys.readouterr()
    job.happened.clear()

    status = job.merge()

    said = capsys.readouterr()
    wanted = f"{job.out} exists and is not empty; choose another, or --force"
    assert_refused(status, said.out, said.err, wanted)
    assert not job.happened
    assert_only_new(before, job.folder.parent)


@pytest.mark.parametrize("force", [False, True])
def test_output_that_is_a_file_is_refused(
    force: bool, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job.prepare(broken.as_given)
    job.out.write_text("kept")
    before = snapshot(job.folder.parent)
    capsys.readouterr()

    status = job.merge(*["--force"] * force)

    said = capsys.readouterr()
    assert status == 2
    assert str(job.out) in said.err and said.out == ""
    assert_only_new(before, job.folder.parent)


@pytest.mark.parametrize("force", [False, True])
def test_output_that_is_empty_is_used(force: bool, job: Job) -> None:
    job.prepare(broken.as_given)
    job.out.mkdir()
    options = ["--force"] * force
    assert job.merge("--no-copy-tokenizer", "--quiet", *options) == 0
    assert read_model(job.out)


def test_force_replaces_the_output(job: Job) -> None:
    job.prepare(broken.as_given)
    job.out.mkdir()
    (job.out / "outdated.safetensors").write_text("old")

    assert job.merge("--force", "--no-copy-tokenizer", "--quiet") == 0

    assert not (job.out / "outdated.safetensors").exists()
    assert read_model(job.out)
    assert not [path for path in job.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("granularity", ["model", "tensor"])
def test_force_keeps_the_old_output_when_the_merge_fails(
    granularity: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job.prepare(
        broken.both(
            broken.poisoned("tuned1", float("nan")),
            broken.parameters(granularity=granularity),
        )
    )
    job.out.mkdir()
    (job.out / "precious").write_text("kept")
    before = snapshot(job.folder.parent)
    capsys.readouterr()

    assert job.merge("--force", "--quiet") == 2

    assert MERGE not in job.happened
    assert "holds NaN or infinity" in capsys.readouterr().err
    assert_only_new(before, job.folder.parent)


def test_force_keeps_the_old_output_when_mergekit_leaves_none(
    job: Job, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mergekit.merge

    job.prepare(broken.as_given)
    monkeypatch.setattr(mergekit.merge, "run_merge", lambda *args, **kwargs: None)
    job.out.mkdir()
    (job.out / "precious").write_text("kept")
    before = snapshot(job.folder.parent)
    capsys.readouterr()

    assert job.merge("--force", "--quiet") == 2
    assert_only_new(before, job.folder.parent)


@pytest.mark.parametrize("out", ["base", "."])
def test_force_does_not_replace_a_folder_that_holds_inputs(
    out: str, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    job.prepare(broken.as_given)
    before = snapshot(job.folder.parent)
    capsys.readouterr()
    job.out = job.folder / out

    assert job.merge("--force", "--quiet", "--no-copy-tokenizer") == 2
    assert_only_new(before, job.folder.parent)


@pytest.mark.parametrize("out", ["out", "deep/er/out"])
@pytest.mark.parametrize("exists", [False, True])
def test_an_interrupted_merge_leaves_nothing(
    out: str,
    exists: bool,
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mergekit.merge

    def interrupted(config: Any, folder: str, *args: Any, **kwargs: Any) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "model-00001-of-00002.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    job.prepare(broken.as_given)
    monkeypatch.setattr(mergekit.merge, "run_merge", interrupted)
    job.out = job.folder / out
    if exists:
        job.out.mkdir(parents=True)
        (job.out / "precious").write_text("kept")
    before = snapshot(job.folder.parent)
    capsys.readouterr()

    assert job.merge("--force") == 1

    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.split() == ["Aborted!"]
    assert_only_new(before, job.folder.parent)


def test_a_misspelt_parameter_is_named(
    job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    def misspell(folder: Path, config: Config) -> None:
        config["parameters"] = {"granularty": "layer"}

    job.prepare(misspell)
    before = snapshot(job.folder.parent)
    capsys.readouterr()
    assert job.merge() == 2
    said = capsys.readouterr()
    wanted = "granularty is no parameter of metagpt; did you mean granularity?"
    assert_refused(2, said.out, said.err, wanted)
    assert_only_new(before, job.folder.parent)


def test_parameters_of_other_methods_are_said_to_be_ignored(
    job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    def keep_old_ones(folder: Path, config: Config) -> None:
        config["parameters"] = {"normalize": True, "int8_mask": True}

    job.prepare(keep_old_ones)
    assert job.merge() == 0
    assert "ignored, as metagpt has none: int8_mask, normalize" in caplog.text


# --- local models by relative paths ---------------------------------------------------


def one_slash(folder: Path, config: Config) -> None:
    """Models under `m/`, named as a user in their parent folder would name them."""
    (folder / "m").mkdir()
    for name in THREE:
        (folder / name).rename(folder / "m" / name)
    config["base_model"] = "m/base"
    config["models"] = [{"model": "m/tuned0"}, {"model": "m/tuned1"}]


def test_relative_paths_of_one_slash_merge_offline(job: Job) -> None:
    job.prepare(one_slash)
    assert job.merge("--no-copy-tokenizer", "--quiet") == 0

    config = merge_config(
        job.folder / "m/base", [job.folder / f"m/{name}" for name in TWO]
    )
    theirs = job.folder.parent / "plain" / "out"
    run_mergekit(config, theirs)
    for name, tensor in read_model(theirs).items():
        assert_same_bits(read_model(job.out)[name], tensor)
    assert (job.out / "mergekit_config.yml").read_bytes() == (
        job.config_file.read_bytes()
    )


def test_relative_paths_of_one_slash_make_mergekit_ask_the_hub(job: Job) -> None:
    """The fact about mergekit that our command works around, after hours of merging."""
    from mergekit.scripts.run_yaml import main as mergekit_yaml

    job.prepare(one_slash)
    arguments = [str(job.config_file), str(job.out), "--quiet", "--no-copy-tokenizer"]
    with pytest.raises(OSError) as raised:
        mergekit_yaml.main(arguments, standalone_mode=False)
    assert_says(
        str(raised.value),
        "Cannot reach https://huggingface.co/api/models/m/…: offline mode is "
        "enabled. To disable it, please unset the `HF_HUB_OFFLINE` environment "
        "variable.",
    )
    assert read_model(job.out)


def test_only_models_are_taken_for_paths(job: Job) -> None:
    """`base` and `union` of tokenizers are mergekit's words, whatever folders exist."""
    for name in ("base", "union", "linear", "m"):
        (job.folder / name).mkdir()
    given = {
        "merge_method": "linear",
        "base_model": "base",
        "models": [{"model": "m"}, {"model": "./missing"}, {"model": "a/missing"}],
        "tokenizer_source": "base",
        "dtype": "float32",
    }
    config = merge_yaml.read(yaml.safe_dump(given))
    assert str(config.base_model) == "./base"
    models = [str(entry.model) for entry in config.models or ()]
    assert models == ["./m", "./missing", "a/missing"]
    assert config.merge_method == "linear"
    assert config.tokenizer_source == "base"

    given["tokenizer_source"] = "union"
    assert merge_yaml.read(yaml.safe_dump(given)).tokenizer_source == "union"


# --- a sample through the real commands -----------------------------------------------

SAMPLE = [
    ("mergekit-metagpt", "nan-in-tuned1-by-layer"),
    ("mergekit-metagpt", "bare-adapter"),
    ("mergekit-metagpt", "other-architecture"),
    ("mergekit-metagpt", "truncated"),
    ("mergekit-yaml", "only-the-base"),
]


@dataclass(frozen=True)
class Ran:
    """A row through a console script: how it ended and what it left."""

    job: Job
    done: subprocess.CompletedProcess[str]
    before: Mapping[str, bytes | None]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Ran]:
    """The sample, two processes at a time: most of each is imports."""
    rows = {row.name: row for row in ROWS}

    def run(sample: tuple[str, str]) -> Ran:
        command, name = sample
        folder = tmp_path_factory.mktemp(f"{command}-{name}") / "work"
        folder.mkdir()
        (folder.parent / "temporary").mkdir()
        job = Job(folder, folder / "out")
        job.prepare(rows[name].spoil)
        before = snapshot(folder.parent)
        words: list[str | Path] = [script(command)]
        words += ["merge"] * (command == "mergekit-metagpt")
        words += [job.config_file, job.out, *rows[name].options]
        env = environment(TMPDIR=str(folder.parent / "temporary"))
        return Ran(job, run_process(words, env), before)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(SAMPLE, pool.map(run, SAMPLE), strict=True))


@pytest.mark.parametrize("sample", SAMPLE, ids=[" ".join(pair) for pair in SAMPLE])
def test_console_scripts_answer_the_same(
    sample: tuple[str, str], ran: dict[tuple[str, str], Ran]
) -> None:
    (row,) = [row for row in ROWS if row.name == sample[1]]
    found = ran[sample]
    ours = found.job.fill(row.ours)
    done, folder = found.done, found.job.folder.parent
    if sample[0] == "mergekit-metagpt":
        assert_refused(done.returncode, done.stdout, done.stderr, ours)
        assert_only_new(found.before, folder)
        return
    assert done.returncode == 1
    assert row.mergekit is not None
    lines = done.stderr.splitlines()
    assert "Traceback (most recent call last):" in lines
    assert_says(done.stderr, f"…{found.job.fill(row.mergekit, ours=ours)}…")
    assert_only_new(found.before, folder, "work/out")


def test_console_script_merges_paths_of_one_slash_offline(tmp_path: Path) -> None:
    job = Job(tmp_path, tmp_path / "out")
    job.prepare(one_slash)
    done = subprocess.run(
        [script("mergekit-metagpt"), "merge", "merge.yml", "out", "--quiet"],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "mergekit-yaml does not know metagpt" not in done.stderr
    assert read_model(job.out).keys() == read_model(tmp_path / "m/base").keys()
    assert title(job.out) == "out"
