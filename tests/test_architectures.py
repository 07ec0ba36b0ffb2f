"""Architectures, layouts and the syntax of mergekit's YAML, against float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import Family, write_family
from tests.families import (
    State,
    llama_state,
    merge_config,
    read_model,
    run_mergekit,
    tuned,
    write_model,
)
from tests.layouts import LOADED, ORIGINAL, Layouts, Trio, save_trio
from tests.matrix import BY_NAME, Row, covers
from tests.merges import (
    assert_merges,
    assert_merges_exactly,
    assert_task_arithmetic_fails,
    assert_works,
    merge_files,
    task_arithmetic,
    with_granularity,
)
from tests.oracle import (
    GRANULARITIES,
    Oracle,
    assert_merged,
    assert_same_bits,
    assert_sq_norms,
    naive_coefficients,
)

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread"),
    # GPT-2 and Qwen2-VL name token ids beyond a vocabulary of 96.
    pytest.mark.filterwarnings("ignore:.*token_id must be:UserWarning"),
]


Trios = Callable[[str], Trio]


@pytest.fixture(scope="session")
def trios(tmp_path_factory: pytest.TempPathFactory) -> Trios:
    """Make each architecture's checkpoints when they are first asked for."""
    made: dict[str, Trio] = {}

    def trio(name: str) -> Trio:
        if name not in made:
            made[name] = save_trio(tmp_path_factory.mktemp("trio"), name)
        return made[name]

    return trio


SAME: Layouts = (ORIGINAL, ORIGINAL, ORIGINAL)
FUSED: Layouts = (LOADED, LOADED, LOADED)
FROM_ORIGINAL: Layouts = (ORIGINAL, LOADED, ORIGINAL)
FROM_LOADED: Layouts = (LOADED, ORIGINAL, LOADED)

ARCHITECTURES: dict[str, tuple[str, Sequence[Layouts]]] = {
    **{name: (name, [SAME]) for name in ("Llama", "Mistral", "Qwen2", "Qwen3")},
    "Gemma 2": ("Gemma 2", [SAME]),
    "GPT-2": ("GPT-2", [SAME]),
    "BERT with a classifier (`BertForSequenceClassification`)": (
        "BERT with a classifier",
        [SAME],
    ),
    "ModernBERT, of which mergekit has no definition": ("ModernBERT", [SAME]),
    "LLaVA, saved with `save_original_format=False`": ("LLaVA", [FUSED]),
    **{
        f"{name}, {layout}": (name, layouts)
        for name in ("Qwen3-MoE", "Mixtral")
        for layout, layouts in {
            "fused experts": [FUSED],
            "single experts": [SAME],
            "base with single experts, models with fused and single ones": [
                FROM_ORIGINAL
            ],
            "base with fused experts, models with single and fused ones": [FROM_LOADED],
        }.items()
    },
    "DINOv3, whose layers transformers 5 renames": ("DINOv3", [SAME, FUSED]),
    "DINOv3, base and models in different layouts": (
        "DINOv3",
        [FROM_ORIGINAL, FROM_LOADED],
    ),
    "NomicBERT, whose layers transformers 5 renames and splits": (
        "NomicBERT",
        [SAME, FUSED],
    ),
    "NomicBERT, base and models in different layouts": (
        "NomicBERT",
        [FROM_ORIGINAL, FROM_LOADED],
    ),
}


def assert_architecture(
    row: Row, out: Path, folders: Sequence[Path], states: Sequence[State]
) -> None:
    """Check n_t, lambda and every element under each granularity."""
    oracle = Oracle(states[0], states[1:])
    config = merge_config(folders[0], folders[1:])
    with row.expect():
        assert_sq_norms(oracle, folders[0], folders[1:])
        assert_merges(config, out, oracle)
        for granularity in GRANULARITIES:
            assert_merges_exactly(config, out, oracle, granularity=granularity)


@covers(*ARCHITECTURES)
def test_architectures(row: Row, tmp_path: Path, trios: Trios) -> None:
    name, variants = ARCHITECTURES[row.name]
    trio = trios(name)
    for number, layouts in enumerate(variants):
        out = tmp_path / str(number)
        assert_architecture(row, out, trio.paths(layouts), trio.states)


@covers("Qwen2.5-VL: language model, projector and vision tower")
def test_stored_names(row: Row, tmp_path: Path, trios: Trios) -> None:
    """mergekit's definition of this model has the names that transformers 4 wrote."""
    folders = trios("Qwen2.5-VL").paths(SAME)
    assert_architecture(row, tmp_path, folders, [read_model(f) for f in folders])


@covers("GPT-2, base stored under the names of older checkpoints")
def test_older_names(row: Row, tmp_path: Path, trios: Trios) -> None:
    from transformers import AutoConfig

    trio = trios("GPT-2")
    base, *models = trio.paths(SAME)
    older = {
        name.removeprefix("transformer."): tensor
        for name, tensor in trio.states[0].items()
    }
    config = AutoConfig.from_pretrained(base)
    folder = write_model(tmp_path / "older", older, config)
    assert_architecture(row, tmp_path, [folder, *models], trio.states)


@covers("BERT encoder (`BertModel`)", "Qwen2-VL")
def test_architectures_that_mergekit_cannot_merge(
    row: Row, tmp_path: Path, trios: Trios
) -> None:
    folders = trios(row.name.split(" (")[0]).paths(SAME)
    config = merge_config(folders[0], folders[1:])
    assert_task_arithmetic_fails(config, tmp_path, row.message)
    with row.expect():
        run_mergekit(config, tmp_path / "out")


@covers("`BertModel` by `mergekit-pytorch`")
def test_bare_files_of_a_model(row: Row, tmp_path: Path, trios: Trios) -> None:
    trio = trios("BERT encoder")
    files = [folder / "model.safetensors" for folder in trio.paths(SAME)]
    oracle = Oracle(trio.states[0], trio.states[1:])
    with row.expect():
        for granularity in GRANULARITIES:
            out = tmp_path / granularity
            merged = merge_files(files, out, granularity=granularity)
            assert_merged(merged, oracle, granularity)


@covers("LLaVA, as `save_pretrained` writes it")
def test_llava_loses_its_language_model(row: Row, tmp_path: Path, trios: Trios) -> None:
    """mergekit's translation of LLaVA's names is wrong under transformers 5."""
    trio = trios("LLaVA")
    folders = trio.paths(SAME)
    config = merge_config(folders[0], folders[1:])
    lost = {name for name in trio.states[0] if name.startswith("model.language_model.")}
    theirs = run_mergekit(task_arithmetic(config), tmp_path / "theirs")
    assert trio.states[0].keys() - theirs.keys() >= lost
    oracle = Oracle(trio.states[0], trio.states[1:])
    assert_sq_norms(oracle, folders[0], folders[1:])
    with row.expect():
        merged = run_mergekit(config, tmp_path / "out")
        assert merged.keys() == theirs.keys()
        written = [{n: s[n] for n in merged} for s in trio.states]
        given = Oracle(written[0], written[1:])
        assert_merged(merged, oracle, handed_over=given)


@covers("LLaVA, base and models in different layouts")
def test_llava_in_different_layouts(row: Row, tmp_path: Path, trios: Trios) -> None:
    trio = trios("LLaVA")
    for layouts in (FROM_ORIGINAL, FROM_LOADED):
        folders = trio.paths(layouts)
        config = merge_config(folders[0], folders[1:])
        with row.expect():
            run_mergekit(config, tmp_path / f"out{layouts[0]}")
    theirs = run_mergekit(task_arithmetic(config), tmp_path / "theirs")
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    only = trio.states[0][name] + 0.5 * (trio.states[2][name] - trio.states[0][name])
    torch.testing.assert_close(theirs[name], only)


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Three layers in float32, so that the bound tells every lambda."""
    base = llama_state()
    states = [tuned(base, k, 0.01 * k) for k in (1, 2, 3)]
    return write_family(tmp_path_factory.mktemp("deep"), base, states)


def moved(family: Family, maps: Sequence[Sequence[int]]) -> Oracle:
    """The oracle of what is handed over: for each checkpoint its layers in turn."""
    states = []
    for state, layers in zip(family.all_states, maps, strict=False):
        handed = {n: t for n, t in state.items() if ".layers." not in n}
        for number, layer in enumerate(layers):
            start = f"model.layers.{layer}."
            handed |= {
                n.replace(start, f"model.layers.{number}.", 1): t
                for n, t in state.items()
                if n.startswith(start)
            }
        states.append(handed)
    return Oracle(states[0], states[1:])


def sources(folders: Sequence[Path], *ranges: tuple[int, int]) -> list[dict[str, Any]]:
    """Sources of a slice; the last range is that of all further ones."""
    padded = [*ranges, *([ranges[-1]] * len(folders))]
    return [
        {"model": str(folder), "layer_range": list(layers)}
        for folder, layers in zip(folders, padded, strict=False)
    ]


@covers(
    "`models:` without the base",
    "`models:` with the base among them",
    "`slices:` in which layers stay in place",
)
def test_the_same_merge_in_other_words(row: Row, tmp_path: Path, deep: Family) -> None:
    config = merge_config(deep.base, deep.models)
    if row.name == "`models:` with the base among them":
        config = merge_config(deep.base, [deep.models[0], deep.base, *deep.models[1:]])
    elif row.name.startswith("`slices:`"):
        halves = [
            {"sources": sources(deep.paths, layers)} for layers in ((0, 1), (1, 3))
        ]
        config = merge_config(deep.base, [], slices=halves)
    oracle = Oracle(deep.base_state, deep.states)
    assert_works(row, config, tmp_path, oracle, scanned=deep.paths)


def frankenmerge(deep: Family) -> dict[str, Any]:
    """Layers 0, 1, 1, 2 of all checkpoints."""
    ranges = ((0, 2), (1, 3))
    slices = [{"sources": sources(deep.paths, layers)} for layers in ranges]
    return merge_config(deep.base, [], slices=slices)


def assert_merges_moved(
    row: Row, config: dict[str, Any], out: Path, stored: Oracle, given: Oracle
) -> None:
    """Check merges of layers that are handed over in other places."""
    with row.expect():
        for granularity, measured in (("model", stored), ("tensor", given)):
            config = with_granularity(config, granularity)
            merged = run_mergekit(config, out / granularity)
            assert_merged(merged, measured, granularity, handed_over=given)


@covers("`slices:` that move layers, `granularity: model` and `tensor`")
def test_layers_that_move(row: Row, tmp_path: Path, deep: Family) -> None:
    stored = Oracle(deep.base_state, deep.states)
    given = moved(deep, [(0, 1, 1, 2)] * 4)
    assert_merges_moved(row, frankenmerge(deep), tmp_path, stored, given)


@covers("`slices:` that move layers, `granularity: layer`")
def test_layers_that_move_have_no_layer_norms(
    row: Row, tmp_path: Path, deep: Family
) -> None:
    with row.expect():
        config = with_granularity(frankenmerge(deep), "layer")
        run_mergekit(config, tmp_path / "out")


@covers("a slice of different layers of its sources, `model` and `tensor`")
def test_different_layers_of_the_sources(
    row: Row, tmp_path: Path, deep: Family
) -> None:
    slices = [{"sources": sources(deep.paths[:3], (0, 2), (1, 3), (0, 2))}]
    config = merge_config(deep.base, [], slices=slices)
    stored = Oracle(deep.base_state, deep.states[:2])
    given = moved(deep, [(0, 1), (1, 2), (0, 1)])
    assert_merges_moved(row, config, tmp_path, stored, given)


@covers("`slices:` with different models", "`slices:` with a `base_model` of their own")
def test_slices_of_their_own(row: Row, tmp_path: Path, deep: Family) -> None:
    """The ratio is taken over the models of the slice at hand."""
    chosen = [(0, 1, 2), (0, 3, 1)]
    slices: list[dict[str, Any]] = [{}, {}]
    if row.name.endswith("of their own"):
        chosen[1] = (3, 1, 2)
        slices = [{"base_model": str(deep.paths[first])} for first, *_ in chosen]
    for entry, numbers, layers in zip(slices, chosen, ((0, 2), (2, 3)), strict=True):
        entry["sources"] = sources([deep.paths[k] for k in numbers], layers)
    base = None if "base_model" in slices[0] else deep.base
    config = merge_config(base, [], slices=slices)
    with row.expect():
        for granularity in GRANULARITIES:
            merged = run_mergekit(
                with_granularity(config, granularity), tmp_path / granularity
            )
            second = ("model.layers.2.", "model.norm.", "lm_head.")
            for numbers, is_second in zip(chosen, (False, True), strict=True):
                part = {
                    name: tensor
                    for name, tensor in merged.items()
                    if name.startswith(second) == is_second
                }
                base, *models = (deep.all_states[k] for k in numbers)
                handed = [{n: state[n] for n in part} for state in (base, *models)]
                given = Oracle(handed[0], handed[1:])
                stored = Oracle(base, models)
                assert_merged(part, stored, granularity, handed_over=given)


@covers("`slices:` without the base among their sources")
def test_slices_without_the_base(row: Row, tmp_path: Path, deep: Family) -> None:
    slices = [{"sources": sources(deep.models, (0, 3))}]
    with row.expect():
        run_mergekit(merge_config(deep.base, [], slices=slices), tmp_path / "out")


@covers("`modules:` with `models:`", "`modules:` with `slices:`")
def test_modules(row: Row, tmp_path: Path, trios: Trios) -> None:
    trio = trios("LLaVA")
    folders = trio.paths(FUSED)
    layers = {
        "default": 0,
        "model.language_model.layers": 2,
        "model.vision_tower.encoder.layers": 2,
    }
    modules: dict[str, Any] = {}
    for name, count in layers.items():
        if row.name == "`modules:` with `models:`":
            modules[name] = {"models": [{"model": str(f)} for f in folders[1:]]}
        else:
            given = {"sources": sources(folders, (0, count))}
            modules[name] = {"slices": [given]}
    config = merge_config(folders[0], [], modules=modules)
    assert_works(row, config, tmp_path, Oracle(trio.states[0], trio.states[1:]))


@covers("parameters with filters and gradients")
def test_filters_and_gradients(row: Row, tmp_path: Path, deep: Family) -> None:
    config = merge_config(deep.base, deep.models[:2])
    # The first model fades out towards the last layer, but for its attention.
    config["models"][0]["parameters"] = {
        "weight": [{"filter": "self_attn", "value": 2.0}, {"value": [1.0, 0.0]}]
    }
    config["parameters"] = {
        "granularity": [{"filter": "mlp", "value": "tensor"}, {"value": "model"}]
    }
    oracle = Oracle(deep.base_state, deep.states[:2])
    fading = {"0": 1.0, "1": 0.5, "2": 0.0}
    with row.expect():
        merged = run_mergekit({**config, "dtype": "float64"}, tmp_path / "out")
        for name, tensor in merged.items():
            layer = name.split(".")[2] if ".layers." in name else "0"
            first = 2.0 if "self_attn" in name else fading[layer]
            base, *models = (
                state[name].double() for state in (oracle.base, *oracle.models)
            )
            sq_norms = oracle.sq_norms
            if "mlp" in name:
                own = [float((m - base).square().sum()) for m in models]
                sq_norms = torch.tensor(own, dtype=torch.float64)
            lambdas = naive_coefficients(sq_norms, [first, 1.0])
            shift = sum(x * (m - base) for x, m in zip(lambdas, models, strict=True))
            torch.testing.assert_close(tensor, base + shift, rtol=0, atol=1e-14)


def test_unchanged_layouts_agree(trios: Trios) -> None:
    """Both ways of saving hold the same weights: the tests above compare layouts."""
    trio = trios("Mixtral")
    original, loaded = (read_model(trio.folders[k][0]) for k in (ORIGINAL, LOADED))
    assert len(original) > len(loaded)
    for name, tensor in trio.states[0].items():
        assert_same_bits(loaded[name], tensor)
    assert BY_NAME["Mixtral, single experts"]
