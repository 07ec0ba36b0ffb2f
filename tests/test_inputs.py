"""Every kind of checkpoint that mergekit can feed metagpt, against a float64 oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import matrix
from tests.adapters import PEFT_WARNS, Adapted, naive_adapted, write_adapters
from tests.conftest import Family, write_family
from tests.families import (
    State,
    cast,
    llama_config,
    llama_state,
    merge_config,
    read_model,
    run_mergekit,
    said,
    tuned,
    write_model,
)
from tests.layouts import make_model
from tests.matrix import Row, covers
from tests.merges import (
    assert_merges,
    assert_merges_exactly,
    assert_task_arithmetic_fails,
    assert_works,
    with_granularity,
)
from tests.oracle import (
    GRANULARITIES,
    Oracle,
    assert_merged,
    assert_same_bits,
    assert_same_states,
    assert_sq_norms,
    assert_within_bound,
)
from tests.stand_ins import write_tokenizer

pytestmark = pytest.mark.usefixtures("one_torch_thread")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
TIES = {HEAD: EMBEDDING}


States = list[State]


@pytest.fixture(scope="session")
def states() -> States:
    """A random base and three fine-tunes at different distances, in float32."""
    base = llama_state()
    sizes = (0.01, 0.02, 0.03)
    return [base, *(tuned(base, k + 1, size) for k, size in enumerate(sizes))]


def plainly(family: Family) -> dict[str, Any]:
    """The configuration that merges a family, and nothing else."""
    return merge_config(family.base, family.models)


def write_pickles(
    folder: Path, state: State, *, shards: int = 1, old_format: bool = False
) -> Path:
    """Write a checkpoint as pytorch_model.bin, or as several with an index.

    Matrices are stored column by column, as after a transposition.
    """
    folder.mkdir(parents=True)
    llama_config().save_pretrained(folder)
    weight_map = {}
    for number in range(shards):
        part = {
            name: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor
            for name, tensor in list(state.items())[number::shards]
        }
        name = "pytorch_model.bin"
        if shards > 1:
            name = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, folder / name, _use_new_zipfile_serialization=not old_format)
        weight_map.update(dict.fromkeys(part, name))
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


Write = Callable[[Path, State, int], Path]


def safetensors(*shards: int) -> Write:
    return lambda folder, state, at: write_model(folder, state, shards=shards[at])


def pickles(*shards: int, old_format: bool = False) -> Write:
    return lambda folder, state, at: write_pickles(
        folder, state, shards=shards[at], old_format=old_format
    )


def safetensors_and_pickles(folder: Path, state: State, at: int) -> Path:
    return write_pickles(folder, state) if at else write_model(folder, state)


LAZY = ("--lazy-unpickle",)
LAYOUTS: dict[str, tuple[Write, tuple[tuple[str, ...], ...]]] = {
    "one safetensors file": (safetensors(1, 1, 1, 1), ((),)),
    "safetensors in shards, cut differently in every model": (
        safetensors(3, 1, 4, 2),
        ((),),
    ),
    "`pytorch_model.bin`": (pickles(1, 1, 1, 1), ((),)),
    "`pytorch_model.bin` with `--lazy-unpickle`": (pickles(1, 1, 1, 1), (LAZY,)),
    "`pytorch_model.bin` in shards, with and without `--lazy-unpickle`": (
        pickles(3, 1, 4, 2),
        ((), LAZY),
    ),
    "pickles in the format of torch before 1.6": (
        pickles(1, 1, 1, 1, old_format=True),
        ((),),
    ),
    "base as safetensors, models as pickles": (safetensors_and_pickles, ((),)),
}


@pytest.fixture(scope="session")
def reference(
    tmp_path_factory: pytest.TempPathFactory, states: States
) -> dict[str, State]:
    """The merge of one safetensors file each, by granularity."""
    folder = tmp_path_factory.mktemp("reference")
    config = plainly(write_family(folder, states[0], states[1:]))
    return {
        granularity: run_mergekit(
            with_granularity(config, granularity), folder / granularity
        )
        for granularity in GRANULARITIES
    }


@covers(*LAYOUTS)
def test_files(
    row: Row, tmp_path: Path, states: States, reference: dict[str, State]
) -> None:
    write, variants = LAYOUTS[row.name]
    folders = [
        write(tmp_path / f"model{at}", state, at) for at, state in enumerate(states)
    ]
    oracle = Oracle(states[0], states[1:])
    config = merge_config(folders[0], folders[1:])
    for options in variants:
        out = tmp_path / f"out{len(options)}"
        merged = assert_works(row, config, out, oracle, *options, scanned=folders)
        for granularity, expected in reference.items():
            assert_same_states(merged[granularity], expected)


def with_head(state: State, kind: str, seed: int) -> State:
    """The state with its output head not stored, a copy of the embedding, or own."""
    kept = {name: tensor for name, tensor in state.items() if name != HEAD}
    if kind == "a copy of the embedding":
        kept[HEAD] = state[EMBEDDING].clone()
    elif kind == "its own":
        kept[HEAD] = tuned({HEAD: state[EMBEDDING]}, seed, 0.05)[HEAD]
    return kept


HEAD_PAIRS = {
    f"head: {base} in the base, {model} in a model": (base, model)
    for base in matrix.HEAD_KINDS
    for model in matrix.HEAD_KINDS
}


@covers(*HEAD_PAIRS)
def test_heads(row: Row, tmp_path: Path, states: States) -> None:
    of_base, of_model = HEAD_PAIRS[row.name]
    for third in matrix.HEAD_KINDS:
        base, *models = (
            with_head(state, kind, seed)
            for state, kind, seed in zip(
                states, (of_base, of_model, third), (10, 11, 12), strict=False
            )
        )
        oracle = Oracle(base, models, TIES)
        folder = tmp_path / third
        family = write_family(folder, base, models)
        assert_sq_norms(oracle, family.base, family.models)
        kinds = GRANULARITIES if third == "its own" else ("model",)
        with row.expect():
            for granularity in kinds:
                config = plainly(family)
                assert_merges_exactly(config, folder, oracle, granularity=granularity)


def test_a_copied_head_changes_no_lambda(states: States) -> None:
    """The oracle itself counts a tied head once, however it is stored."""
    found = []
    for kinds in (["absent"] * 3, ["a copy of the embedding", *["absent"] * 2]):
        base, *models = (
            with_head(state, kind, 0)
            for state, kind in zip(states, kinds, strict=False)
        )
        found.append(Oracle(base, models, TIES).sq_norms)
    assert torch.equal(*found)


@covers("head that shares its embedding's memory in a pickle")
def test_head_in_shared_memory(row: Row, tmp_path: Path, states: States) -> None:
    shared = [{**state, HEAD: state[EMBEDDING]} for state in states]
    folders = []
    for number, state in enumerate(shared):
        folders.append(tmp_path / f"m{number}")
        llama_config().save_pretrained(folders[-1])
        torch.save(state, folders[-1] / "pytorch_model.bin")
    oracle = Oracle(shared[0], shared[1:], TIES)
    config = merge_config(folders[0], folders[1:])
    assert_works(row, config, tmp_path / "out", oracle, scanned=folders)


DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
MIXTURES = {
    f"base in {base}; models in float32, float16 and bfloat16": (
        DTYPES[base],
        (torch.float32, torch.float16, torch.bfloat16),
    )
    for base in ("float32", "float16", "bfloat16")
} | {
    "base in float64; models in float64 and bfloat16": (
        torch.float64,
        (torch.float64, torch.bfloat16),
    )
}


def assert_works_as_stored(
    row: Row, out: Path, base: State, models: Sequence[State]
) -> None:
    """Check merges of checkpoints in their own precisions."""
    family, oracle = write_family(out, base, models), Oracle(base, models)
    scanned = family.paths
    assert_works(row, plainly(family), out, oracle, scanned=scanned)


@covers(*MIXTURES)
def test_precisions(row: Row, tmp_path: Path, states: States) -> None:
    of_base, of_models = MIXTURES[row.name]
    base, *models = (
        cast(state, dtype)
        for state, dtype in zip(states, (of_base, *of_models), strict=False)
    )
    assert_works_as_stored(row, tmp_path, base, models)


@covers("several precisions within one checkpoint")
def test_precisions_within_a_checkpoint(
    row: Row, tmp_path: Path, states: States
) -> None:
    order = [torch.bfloat16, torch.float32, torch.float16]
    base, *models = (
        {
            name: tensor.to(order[(start + k) % 3])
            for k, (name, tensor) in enumerate(state.items())
        }
        for start, state in zip((0, 0, 1, 2), states, strict=True)
    )
    assert_works_as_stored(row, tmp_path, base, models)


@covers("`dtype`")
def test_dtype(row: Row, tmp_path: Path, states: States) -> None:
    config = plainly(write_family(tmp_path, states[0], states[1:]))
    stored = Oracle(states[0], states[1:])
    with row.expect():
        for name, dtype in DTYPES.items():
            given = stored.as_dtype(dtype)
            for granularity in GRANULARITIES:
                merged = run_mergekit(
                    with_granularity({**config, "dtype": name}, granularity),
                    tmp_path / f"{name}-{granularity}",
                )
                # Under `tensor`, n_t is that of the tensors which mergekit hands over.
                measured = given if granularity == "tensor" else stored
                assert_merged(merged, measured, granularity, handed_over=given)


@covers("`out_dtype`", "`dtype` and `out_dtype`")
def test_out_dtype(row: Row, tmp_path: Path, states: States) -> None:
    base = cast(states[0], torch.bfloat16)
    config = plainly(write_family(tmp_path, base, states[1:]))
    if row.name != "`out_dtype`":
        config["dtype"] = "float32"
    plain = run_mergekit(config, tmp_path / "plain")
    with row.expect():
        for name, dtype in DTYPES.items():
            merged = run_mergekit({**config, "out_dtype": name}, tmp_path / name)
            assert_same_states(merged, cast(plain, dtype))


POOLER = "bert.pooler.dense.weight"


@pytest.fixture(scope="session")
def bert() -> Any:
    """A sequence classifier, whose pooler mergekit takes for optional."""
    return make_model("BERT with a classifier")


@pytest.fixture(scope="session")
def bert_states(bert: Any) -> States:
    """Its weights, and those of two fine-tunes."""
    base = {name: tensor.clone() for name, tensor in bert.state_dict().items()}
    return [base, *(tuned(base, k + 1, 0.01 * (k + 1)) for k in range(2))]


LACKING = {
    "optional tensor that one model lacks": (2,),
    "optional tensor that all models lack": (1, 2),
    "optional tensor that the base lacks": (0,),
}


@covers(*LACKING)
def test_optional_tensors(
    row: Row, tmp_path: Path, bert: Any, bert_states: States
) -> None:
    states = [dict(state) for state in bert_states]
    for number in LACKING[row.name]:
        del states[number][POOLER]
    family = write_family(tmp_path, states[0], states[1:], config=bert.config)
    config = plainly(family)
    if row.verdict != matrix.WORKS:
        assert_task_arithmetic_fails(config, tmp_path, "Base input is not present")
        with row.expect():
            run_mergekit(config, tmp_path / "out")
        return
    oracle = Oracle(states[0], states[1:])
    assert_sq_norms(oracle, family.base, family.models)
    with row.expect():
        for granularity in GRANULARITIES:
            merged = assert_merges_exactly(
                config, tmp_path, oracle, granularity=granularity
            )
            if not oracle.tensors(POOLER):
                assert_same_bits(merged[POOLER], states[0][POOLER].double())


@covers("buffer of integers, as in older BERT checkpoints")
def test_integers(row: Row, tmp_path: Path, bert: Any, bert_states: States) -> None:
    name = "bert.embeddings.position_ids"
    positions = torch.arange(32)[None]
    oracle = Oracle(bert_states[0], bert_states[1:])
    with row.expect():
        for holders in ((0, 1, 2), (0, 2)):
            folder = tmp_path / str(len(holders))
            base, *models = (
                {**state, name: positions} if number in holders else state
                for number, state in enumerate(bert_states)
            )
            family = write_family(folder, base, models, config=bert.config)
            assert_sq_norms(oracle, family.base, family.models)
            merged = run_mergekit(plainly(family), folder / "out")
            assert_same_bits(merged.pop(name), positions)
            assert_merged(merged, oracle)


ADAPTERS: dict[str, tuple[dict[str, Any], float]] = {
    "LoRA adapter as `base+adapter`, with `--lora-merge-cache`": ({}, 8 / 4),
    "rank-stabilised LoRA": ({"use_rslora": True}, 8 / 4**0.5),
    "LoRA that carries biases": ({"bias": "all"}, 8 / 4),
    "LoRA that carries whole modules": ({"modules_to_save": ["lm_head"]}, 8 / 4),
}


def copies_of(cache: Path, adapted: Adapted) -> list[Path]:
    """The merged copies of adapters in mergekit's cache."""
    return [next(cache.glob(f"*_{adapter.name}_*")) for adapter in adapted.adapters]


@PEFT_WARNS
@covers(*ADAPTERS)
def test_adapters(row: Row, tmp_path: Path) -> None:
    settings, scale = ADAPTERS[row.name]
    adapted = write_adapters(tmp_path, **settings)
    cache = tmp_path / "cache"
    whole = tuned(adapted.state, 7, 5e-3)
    models = [
        *(f"{adapted.base}+{adapter}" for adapter in adapted.adapters),
        write_model(tmp_path / "whole", whole, adapted.config),
    ]
    config = merge_config(adapted.base, models)
    options = ("--lora-merge-cache", str(cache))
    run_mergekit(config, tmp_path / "first", *options)
    copies = copies_of(cache, adapted)
    states = [read_model(copy) for copy in copies]
    for state, adapter in zip(states, adapted.adapters, strict=True):
        expected = naive_adapted(adapted.state, adapter, scale)
        assert state.keys() == expected.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, expected[name])
    if settings.get("bias"):
        name = "model.layers.0.self_attn.k_proj.bias"
        assert not torch.equal(states[0][name], adapted.state[name])
    oracle = Oracle(adapted.state, [*states, whole])
    assert_sq_norms(oracle, adapted.base, [*copies, models[-1]])
    assert_works(row, config, tmp_path, oracle, *options)


@PEFT_WARNS
@covers("`--lora-merge-dtype`", "adapter on the base, `base_model: base+adapter`")
def test_precision_of_adapted_models_and_adapted_bases(
    row: Row, tmp_path: Path
) -> None:
    adapted = write_adapters(tmp_path)
    cache = tmp_path / "cache"
    options = ["--lora-merge-cache", str(cache)]
    base: Path | str = adapted.base
    models = [f"{adapted.base}+{adapter}" for adapter in adapted.adapters]
    if row.name == "`--lora-merge-dtype`":
        options += ["--lora-merge-dtype", "bfloat16"]
    else:
        base, *models = (*models, str(adapted.base))
    config = merge_config(base, models)
    run_mergekit(config, tmp_path / "first", *options)
    states = [read_model(copy) for copy in copies_of(cache, adapted)]
    if row.name == "`--lora-merge-dtype`":
        assert {t.dtype for s in states for t in s.values()} == {torch.bfloat16}
        oracle = Oracle(adapted.state, states)
    else:
        oracle = Oracle(states[0], [states[1], adapted.state])
    with row.expect():
        assert_merges(config, tmp_path, oracle, *options)
        assert_merges_exactly(config, tmp_path, oracle, *options)


@PEFT_WARNS
@covers("LoRA adapter without `--lora-merge-cache`", "bare LoRA adapter")
def test_adapters_that_mergekit_cannot_merge(row: Row, tmp_path: Path) -> None:
    adapted = write_adapters(tmp_path)
    model = str(adapted.adapters[0])
    if row.name != "bare LoRA adapter":
        model = f"{adapted.base}+{model}"
    config = merge_config(adapted.base, [model])
    assert_task_arithmetic_fails(config, tmp_path, row.message.strip(" ."))
    with row.expect():
        run_mergekit(config, tmp_path / "out")


WORDS = ("<unk>", *(f"word{k}" for k in range(1, 90)))


@dataclass(frozen=True)
class Speaker:
    """A checkpoint with a tokenizer: its tensors, and the token of each row."""

    folder: Path
    state: State
    tokens: list[str]

    @classmethod
    def write(
        cls,
        folder: Path,
        state: State,
        words: Sequence[str] = WORDS,
        added: Sequence[str] = (),
        seed: int = 0,
    ) -> Speaker:
        tokens = [*words, *added]
        state = dict(state)
        generator = torch.Generator().manual_seed(seed)
        for name in (EMBEDDING, HEAD):
            rows = state[name][[WORDS.index(word) for word in words]]
            new = torch.randn(len(added), rows.shape[1], generator=generator)
            state[name] = torch.cat([rows, 0.02 * new])
        write_model(folder, state, llama_config(vocab_size=len(tokens)))
        write_tokenizer(folder, words, added)
        return cls(folder, state, tokens)

    def row(self, name: str, token: str) -> torch.Tensor | None:
        if token not in self.tokens:
            return None
        return self.state[name][self.tokens.index(token)]


def aligned(speakers: Sequence[Speaker], vocabulary: Sequence[str]) -> list[State]:
    """The states with the rows that mergekit gives to each token, the base first.

    A token that a model lacks gets the row of the only model that has it, else the
    base's, else the mean of all that have it.
    """
    states = []
    for speaker in speakers:
        state = dict(speaker.state)
        for name in (EMBEDDING, HEAD):
            rows = []
            for token in vocabulary:
                row = speaker.row(name, token)
                if row is None:
                    row = speakers[0].row(name, token)
                if row is None:
                    known = [s.row(name, token) for s in speakers]
                    having = [r for r in known if r is not None]
                    row = sum(having) / len(having)
                rows.append(row)
            state[name] = torch.stack(rows)
        states.append(state)
    return states


@pytest.fixture(scope="session")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> list[Speaker]:
    """A base and two models that have added two and three tokens, one in common."""
    folder = tmp_path_factory.mktemp("speakers")
    state = llama_state(vocab_size=len(WORDS))
    return [
        Speaker.write(folder / "base", state),
        Speaker.write(folder / "m0", tuned(state, 1), WORDS, ("<a>", "<b>"), 1),
        Speaker.write(
            folder / "m1", tuned(state, 2, 0.02), WORDS, ("<b>", "<c>", "<d>"), 2
        ),
    ]


def assert_merges_aligned(
    row: Row, config: Mapping[str, Any], tmp_path: Path, speakers: Sequence[Speaker]
) -> list[str]:
    """Check merges of aligned embeddings; return the vocabulary of the result."""
    from transformers import AutoTokenizer

    stored = Oracle(speakers[0].state, [s.state for s in speakers[1:]])
    assert_sq_norms(stored, speakers[0].folder, [s.folder for s in speakers[1:]])
    tokens: list[str] = []
    with row.expect():
        for granularity in GRANULARITIES:
            out = tmp_path / granularity
            merged = run_mergekit(with_granularity(config, granularity), out)
            vocabulary = AutoTokenizer.from_pretrained(out).get_vocab()
            tokens = sorted(vocabulary, key=vocabulary.__getitem__)
            states = aligned(speakers, tokens)
            given = Oracle(states[0], states[1:])
            # Under `tensor`, n_t is that of the tensors which mergekit hands over.
            measured = given if granularity == "tensor" else stored
            assert_merged(merged, measured, granularity, handed_over=given)
    return tokens


TOKENIZERS: dict[str, tuple[dict[str, Any], int]] = {
    "`tokenizer: {source: union}` with added tokens": (
        {"tokenizer": {"source": "union"}},
        len(WORDS) + 4,
    ),
    "`tokenizer: {source: base}` with added tokens": (
        {"tokenizer": {"source": "base"}},
        len(WORDS),
    ),
    "`tokenizer_source: union`": ({"tokenizer_source": "union"}, len(WORDS) + 4),
}


@covers(*TOKENIZERS)
def test_tokenizers(row: Row, tmp_path: Path, speakers: list[Speaker]) -> None:
    settings, size = TOKENIZERS[row.name]
    folders = [speaker.folder for speaker in speakers]
    config = merge_config(folders[0], folders[1:], **settings)
    tokens = assert_merges_aligned(row, config, tmp_path, speakers)
    assert len(tokens) == size


@covers("`tokenizer` with a vocabulary in another order")
def test_vocabulary_in_another_order(
    row: Row,
    tmp_path: Path,
    speakers: list[Speaker],
    caplog: pytest.LogCaptureFixture,
) -> None:
    base = speakers[0]
    words = ["<unk>", *reversed(WORDS[1:])]
    models = [
        Speaker.write(tmp_path / "m0", tuned(base.state, 1), words),
        Speaker.write(tmp_path / "m1", tuned(base.state, 2, 0.02)),
    ]
    everyone = [base, *models]
    config = merge_config(
        base.folder, [m.folder for m in models], tokenizer={"source": "base"}
    )
    tokens = assert_merges_aligned(row, config, tmp_path, everyone)
    assert tokens == list(WORDS)
    assert said(caplog, "exclude: embed_tokens,lm_head")

    config["parameters"] = {"exclude": "embed_tokens,lm_head"}
    merged = run_mergekit(config, tmp_path / "without")
    kept = [
        {n: t for n, t in speaker.state.items() if n not in (EMBEDDING, HEAD)}
        for speaker in everyone
    ]
    states = aligned(everyone, tokens)
    lambdas = Oracle(kept[0], kept[1:]).lambdas("model.norm.weight")
    for name, tensor in merged.items():
        given = [state[name] for state in states]
        assert_within_bound(tensor, given[0], given[1:], lambdas)


@covers(
    "`--unsafe-truncate-embeddings`", "vocabularies of different sizes with neither"
)
def test_resized_vocabularies(
    row: Row, tmp_path: Path, speakers: list[Speaker]
) -> None:
    folders = [speaker.folder for speaker in speakers]
    config = merge_config(folders[0], folders[1:])
    if row.verdict != matrix.WORKS:
        assert_task_arithmetic_fails(config, tmp_path, "Tensor size mismatch")
        with row.expect():
            run_mergekit(config, tmp_path / "out")
        return
    shared = slice(len(WORDS))
    states = [
        {n: t[shared] if n in (EMBEDDING, HEAD) else t for n, t in s.state.items()}
        for s in speakers
    ]
    oracle = Oracle(states[0], states[1:])
    assert_sq_norms(oracle, folders[0], folders[1:])
    with row.expect():
        for granularity in GRANULARITIES:
            assert_merges(
                config, tmp_path, oracle, row.name.strip("`"), granularity=granularity
            )
