"""`convert`: what stays of another method's YAML, what goes, and what is said of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from mergekit import merge_methods
from mergekit.merge_methods import registry

from mergekit_metagpt.commands import shipped_recipes
from mergekit_metagpt.merge_config import checks, converting, merge_yaml
from mergekit_metagpt.merge_config.converting import (
    COMPARISONS,
    MEASURED,
    REFUSED,
    Converted,
)
from mergekit_metagpt.method.composed import COMPOSED
from tests.conftest import Cli, Family
from tests.families import merge_config, read_model, write_yaml
from tests.merges import write_merge

ROOT = Path(__file__).parents[1]
ALIKE = ("task_arithmetic", "linear", "model_stock", "sce")
METHODS = (*ALIKE, *COMPOSED)
# One value for each parameter of mergekit's methods that can be converted.
VALUES: dict[str, Any] = {
    "weight": 0.4,
    "density": 0.5,
    "gamma": 0.02,
    "epsilon": 0.1,
    "lambda": 0.9,
    "normalize": False,
    "rescale": True,
    "int8_mask": True,
    "select_topk": 0.5,
    "filter_wise": False,
}
# What is left of them.
SPARSE = {"density", "lambda", "normalize", "rescale", "int8_mask"}
LEFT: dict[str, set[str]] = dict.fromkeys(COMPOSED, SPARSE)
LEFT |= {name: set() for name in ALIKE} | {"task_arithmetic": {"lambda"}}
LEFT |= {name: LEFT[name] | {"gamma"} for name in COMPOSED if "breadcrumbs" in name}
LEFT |= {name: LEFT[name] | {"epsilon"} for name in COMPOSED if "della" in name}


def convert(old: Mapping[str, Any], base: str | None = None) -> Converted:
    return converting.convert(yaml.safe_dump(dict(old), sort_keys=False), base)


def converted(old: Mapping[str, Any], base: str | None = None) -> dict[str, Any]:
    """The recipe made of a YAML; it passes our own checks."""
    text = convert(old, base).text
    config = merge_yaml.read(text)
    checks.check_yaml(config)
    checks.check_names(config)
    data = yaml.safe_load(text)
    assert isinstance(data, dict)
    return data


def old_merge(method: str, **settings: Any) -> dict[str, Any]:
    """A merge by a method of mergekit."""
    config = merge_config("./base", ["./a", "./b"], **settings)
    return {**config, "merge_method": method}


def scopes_of(method: str) -> dict[str, str]:
    spec = merge_methods.get(method).spec
    return {parameter.name: parameter.scope.name for parameter in spec.parameters}


@pytest.mark.parametrize("method", METHODS)
def test_parameters_stay_where_the_recipe_has_them(method: str) -> None:
    """All parameters of the old method on top, and those of a model under a model."""
    scopes = scopes_of(method)
    assert scopes.keys() <= VALUES.keys()
    old = old_merge(method, parameters={name: VALUES[name] for name in scopes})
    alone = {name: VALUES[name] for name, scope in scopes.items() if scope != "SHARED"}
    old["models"][0]["parameters"] = alone
    new = converted(old)
    name = f"metagpt_{method}" if method in COMPOSED else "metagpt"
    assert new.pop("merge_method") == name
    first, second = new.pop("models")
    kept = {name: VALUES[name] for name in LEFT[method]}
    assert new.pop("parameters", {}) == kept
    assert first.pop("parameters", {}) == {n: kept[n] for n in alone if n in kept}
    assert (first, second) == ({"model": "./a"}, {"model": "./b"})
    assert new == {"base_model": "./base"}


def test_weights_go_on_every_level() -> None:
    layers = {"layer_range": [0, 3]}
    of_a = {"parameters": {"weight": [0.1, 0.9], "density": 0.5}}
    sources = [{"model": "./base", **layers}, {"model": "./a", **layers, **of_a}]
    module = {
        "slices": [{"sources": sources, "parameters": {"weight": 0.2}}],
        "parameters": {"weight": [{"filter": "mlp", "value": 0.3}, {"value": 1}]},
    }
    old = old_merge("ties", modules={"text": module}, parameters={"weight": 0.7})
    made = convert(old)
    assert made.changes == (
        "merge_method ties -> metagpt_ties",
        "dropped weight [0.1, 0.9] of ./a in modules.text.slices[0]",
        "dropped weight 0.2 of modules.text.slices[0]",
        "dropped weight [{filter: mlp, value: 0.3}, {value: 1}] of modules.text",
        "dropped weight 0.7 of all models",
    )
    new = yaml.safe_load(made.text)
    (cut,) = new["modules"]["text"]["slices"]
    assert "weight" not in made.text
    assert cut["sources"][1]["parameters"] == {"density": 0.5}


def test_everything_else_stays_in_its_order() -> None:
    old = {
        "models": [{"model": "./a+./lora"}, {"model": "org/name@abc"}],
        "base_model": "./base",
        "tokenizer": {"source": "union", "tokens": {"<x>": {"source": "./a"}}},
        "chat_template": "{% for m in messages %}# {{ m }}{% endfor %}",
        "parameters": {"weight": 1.0, "density": [0.5, 1.0]},
        "merge_method": "della",
        "dtype": "float32",
    }
    new = converted(old)
    assert [*new] == [*old]
    kept = {**old, "merge_method": "metagpt_della"}
    assert new == {**kept, "parameters": {"density": [0.5, 1.0]}}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "torch.bfloat16"])
def test_composed_recipes_compute_in_float32(dtype: str) -> None:
    new = converted(old_merge("ties", dtype=dtype, parameters={"weight": 1}))
    assert (new["dtype"], new["out_dtype"]) == ("float32", dtype)
    keys = [*new]
    assert keys[keys.index("dtype") + 1] == "out_dtype"
    new = converted(old_merge("ties", dtype=dtype, out_dtype="float32"))
    assert (new["dtype"], new["out_dtype"]) == ("float32", "float32")


@pytest.mark.parametrize("dtype", ["float32", "float64", None])
def test_a_precision_that_stays(dtype: str | None) -> None:
    made = convert(old_merge("ties", **({"dtype": dtype} if dtype else {})))
    assert yaml.safe_load(made.text).get("dtype") == dtype
    assert "out_dtype" not in yaml.safe_load(made.text)
    assert any("no dtype is given" in note for note in made.notes) == (dtype is None)
    new = converted(old_merge("task_arithmetic", dtype="bfloat16"))
    assert new["dtype"] == "bfloat16" and "out_dtype" not in new


# ---- what would change silently


def test_weight_0_leaves_a_model_out_as_before() -> None:
    old = old_merge("ties")
    old["models"][0]["parameters"] = {"weight": 0.0}
    old["models"][1]["parameters"] = {"weight": 0.5}
    made = convert(old)
    assert yaml.safe_load(made.text)["models"] == [
        {"model": "./a", "parameters": {"weight": 0.0}},
        {"model": "./b"},
    ]
    assert "kept weight 0.0 of ./a: it leaves the model out, as before" in made.changes


def test_a_filter_with_weight_0_leaves_out_as_before() -> None:
    old = old_merge("ties")
    weight = [{"filter": "mlp", "value": 0}, {"value": 0.6}]
    old["models"][0]["parameters"] = {"weight": weight}
    made = convert(old)
    kept = yaml.safe_load(made.text)["models"][0]["parameters"]["weight"]
    assert kept == [{"filter": "mlp", "value": 0}, {"value": 1}]
    assert any("0 leaves out as before" in line for line in made.changes)


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        ({"weight": 0.75}, "lambda: 1.5 "),
        ({"weight": 0.75, "lambda": 2.0}, "lambda: 3 "),
        ({"weight": 0.5}, None),
        ({"weight": 0.75, "normalize": True}, None),
        ({"weight": [0.5, 1.0]}, "lambda: 1.5 "),
        ({"weight": [0.0, 0.5, 1.0, 0.5]}, "lambda: 1.16667 "),
        ({"weight": [{"filter": "mlp", "value": 1}, {"value": 0.5}]}, None),
    ],
)
def test_a_total_other_than_1(settings: dict[str, Any], note: str | None) -> None:
    made = convert(old_merge("task_arithmetic", parameters=settings))
    said = [line for line in made.notes if "old weights sum" in line]
    assert len(said) == (note is not None)
    assert note is None or note in said[0]


def test_parameters_that_had_no_effect_do_not_begin_to() -> None:
    old = old_merge("dare_ties", parameters={"weight": 1, "power": 1.0})
    old["models"][0]["parameters"] = {"rescale": False, "density": 0.5}
    made = convert(old)
    new = yaml.safe_load(made.text)
    assert "parameters" not in new
    assert new["models"][0]["parameters"] == {"density": 0.5}
    said = "dropped power 1.0 of all models: dare_ties has no such parameter and"
    assert f"{said} ignored it" in made.changes
    assert any("rescale false of ./a: mergekit ignores" in c for c in made.changes)


# ---- comments


def test_comments_above_the_first_key_are_kept() -> None:
    text = (
        "# What this is.\n\n  # More.\n---\nmerge_method: ties\nbase_model: ./base\n"
        "models:\n- model: ./a\nchat_template: 'a # b'\n"
    )
    made = converting.convert(text)
    assert made.text.startswith("# What this is.\n\n  # More.\nmerge_method: metagpt_t")
    assert not any("comments" in line for line in made.changes)
    made = converting.convert(text.replace("./a\n", "./a  # the best\n"))
    assert "the best" not in made.text
    assert any("dropped the comments" in line for line in made.changes)


def test_the_comment_of_an_exported_yaml_is_dropped(
    family: Family, tmp_path: Path, cli: Cli
) -> None:
    """It says that the weights are coefficients; a recipe has none."""
    recipe = write_merge(tmp_path / "recipe.yml", family.base, family.models)
    cli("export", recipe, tmp_path / "plain.yml")
    text = "# Mine.\n" + (tmp_path / "plain.yml").read_text()
    made = converting.convert(text)
    assert made.text.startswith("# Mine.\nmerge_method: metagpt\n")
    assert any("the comment of `export`" in line for line in made.changes)


# ---- bases


@pytest.mark.parametrize("method", ["linear", "model_stock"])
def test_a_missing_base_is_asked_for(method: str) -> None:
    old = old_merge(method)
    del old["base_model"]
    old["models"].append({"model": "./base", "parameters": {"weight": 0.5}})
    with pytest.raises(ValueError, match="Add --base BASE with the model"):
        converted(old)
    new = converted(old, "./base")
    assert [*new][:2] == ["merge_method", "base_model"]
    assert new["base_model"] == "./base"
    assert new["models"][2] == {"model": "./base"}


def test_a_second_base_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--base is \./c, but the YAML has"):
        converted(old_merge("ties"), "./c")


def test_slices_get_the_base_among_their_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mergekit compares spellings: `base` must not become `./base`, as in our checks.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    layers = {"layer_range": [0, 3]}
    sources = [{"model": "./a", **layers}, {"model": "./b", **layers}]
    old = {"merge_method": "linear", "slices": [{"sources": sources}]}
    new = converted(old, "base")
    added = {"model": "base", **layers}
    assert new["slices"] == [{"sources": [*sources, added]}]
    other = {"model": "./b", "layer_range": [1, 4]}
    with pytest.raises(ValueError, match="which take different layers"):
        converted({**old, "slices": [{"sources": [sources[0], other]}]}, "./base")


# ---- refusals


def test_every_method_of_mergekit_is_converted_or_refused() -> None:
    theirs = {
        method.spec.name
        for method in registry.registered_methods()
        if method.spec.name not in checks.METHODS
    }
    assert theirs == {*METHODS, *REFUSED} and METHODS == checks.CONVERTIBLE
    assert not {*METHODS} & {*REFUSED}
    for name in REFUSED:
        with pytest.raises(ValueError, match=f"^{name} cannot be converted: it "):
            converted(old_merge(name))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge_method": "metagpt_ties"}, "is a recipe already"),
        ({"merge_method": "dare-ties"}, "Did you mean dare_ties?"),
        ({"parameters": {"weight": -0.5}}, "weight of ./a is -0.5: it takes something"),
        ({"parameters": {"weight": [1.0, -0.5]}}, "weight of ./a is -0.5"),
        ({"parameters": {"weight": "much"}}, "weight is 'much'; expected numbers"),
        ({"parameters": {"densty": 0.5}}, "no parameter of ties; did you mean density"),
        ({"models": [{"model": "./base"}]}, "only the base ./base is given"),
    ],
)
def test_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        converted({**old_merge("ties"), **settings})


# ---- what was measured


def test_figures_are_those_of_the_page() -> None:
    page = (ROOT / "docs" / "evaluation.md").read_text()
    of = f" of {COMPARISONS}"
    table = page.partition("| method | with MetaGPT's")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")] for row in table.splitlines()[2:]]
    shown = {
        name.replace(" ", "_"): (less, lower) for _, name, less, _, lower, *_ in rows
    }
    assert shown == {
        name: (MEASURED[name].difference, f"{MEASURED[name].lower}{of}")
        for name in COMPOSED
    }
    for name in COMPOSED:
        assert MEASURED[name].other == f"{name} with equal weights"
    flat = " ".join(page.split())
    average = MEASURED["linear"]
    assert (
        f"Over all {COMPARISONS} comparisons the mean difference is "
        f"{average.difference}, and MetaGPT is lower in {average.lower}{of}."
    ) in flat
    assert MEASURED["task_arithmetic"] == MEASURED["model_stock"] == average
    assert f"lower than SCE in {MEASURED['sce'].lower}{of}." in flat


def test_the_note_says_what_is_better() -> None:
    assert converting.experience("dare_ties").endswith(
        "metagpt_dare_ties had a worse average loss difference than dare_ties with "
        "equal weights in 24 of 27 comparisons, on average by +0.092 nats per "
        "byte"
    )


# ---- originals of recipes


ORIGINAL = {
    "gemma-2-9b-llm2024": "testmoto/gemma-2-9b-lora-0",
    "neuralpipe-7b-ties": "OpenPipe/mistral-ft-optimized-1218",
    "qwen2-5-7b-long-context": "Qwen/Qwen2.5-7B-Instruct-1M",
    "fuseo1-32b": "NovaSky-AI/Sky-T1-32B-Preview",
}


def meaning(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as each model's parameters, without what changes no result.

    `int8_mask` stores signs in 8 bits. Recipes that ship have the dtypes that suit
    their method, whatever their original had.
    """
    spec = merge_methods.get(recipe["merge_method"]).spec
    defaults = {parameter.name: parameter.default for parameter in spec.parameters}
    defaults.pop("int8_mask", None)
    shared = {**defaults, **recipe.get("parameters", {})}
    models = {
        entry["model"]: {**shared, **entry.get("parameters", {})}
        for entry in recipe["models"]
    }
    for given in models.values():
        given.pop("int8_mask", None)
    left = {k: v for k, v in recipe.items() if "dtype" not in k and k != "parameters"}
    return {**left, "models": models}


@pytest.mark.parametrize("name", ORIGINAL)
def test_recipes_that_were_converted_by_hand(name: str) -> None:
    page = (ROOT / "docs" / "converting.md").read_text()
    blocks = re.findall(r"```yaml\n# before\n(.*?)```", page, re.S)
    (old,) = (yaml.safe_load(block) for block in blocks if ORIGINAL[name] in block)
    by_hand = yaml.safe_load(shipped_recipes.find(f"converted/{name}").text)
    assert meaning(converted(old)) == meaning(by_hand)


# ---- the command


def stage(folder: Path, family: Family, method: str, **parameters: Any) -> Path:
    """Write a YAML of another method for real models."""
    if "weight" in scopes_of(method):
        parameters["weight"] = 0.5
    old = merge_config(family.base, family.models, parameters=parameters)
    old |= {"merge_method": method, "dtype": "bfloat16"}
    return write_yaml(folder / "old.yml", old)


def test_nothing_is_replaced_without_force(
    tmp_path: Path, family: Family, cli: Cli
) -> None:
    old, new = stage(tmp_path, family, "ties"), tmp_path / "new.yml"
    new.write_text("mine")
    assert f"{new} exists" in cli.refused("convert", old, new)
    assert new.read_text() == "mine"
    cli("convert", old, new, "--force")
    printed = cli("convert", old, "-")
    assert printed.out == new.read_text()
    assert "Wrote" not in printed.err and "--random-seed" not in printed.err


def test_the_next_command_has_a_seed_where_numbers_are_drawn(
    tmp_path: Path, family: Family, cli: Cli
) -> None:
    old, new = stage(tmp_path, family, "dare_ties"), tmp_path / "new.yml"
    assert f"merge {new} OUT --random-seed N" in cli("convert", old, new).err
    exported = cli("export", new, "-").err
    assert "mergekit-yaml OUT.yml ./merged --random-seed N" in exported


def test_a_refused_yaml_writes_nothing(tmp_path: Path, cli: Cli) -> None:
    old, new = tmp_path / "old.yml", tmp_path / "new.yml"
    write_yaml(old, old_merge("slerp"))
    said = cli.refused("convert", old, new)
    assert said.startswith(f"Error: {old}: slerp cannot be converted: it follows")
    assert not new.exists()


# What a recipe merges to is tested by method: test_exactness.py, test_composed.py.
@pytest.mark.parametrize("method", ["linear", "sce", "dare_ties", "breadcrumbs"])
def test_our_own_command_merges_a_recipe(
    method: str, tmp_path: Path, family: Family, cli: Cli
) -> None:
    given = {"density": 0.5} if method in COMPOSED else {}
    old, new = stage(tmp_path, family, method, **given), tmp_path / "new.yml"
    printed = cli("convert", old, new)
    assert printed.out == ""
    assert printed.err.splitlines()[-1].startswith(f"Wrote {new} (")
    out = tmp_path / "out"
    cli("merge", new, out, "--no-copy-tokenizer", "--quiet")
    assert read_model(out).keys() == family.base_state.keys()
