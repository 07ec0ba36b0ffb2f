"""docs/evaluation.md says what the raw results say, and the experiment runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml

from tests.families import run_mergekit
from tests.processes import assert_succeeded, environment, run_process
from tests.stand_ins import (
    ORIGINALS,
    first_rows,
    has_token_rows,
    make_stand_in,
    replaced,
    values_of,
)

if TYPE_CHECKING:
    from docs.experiments.results import Results

pytestmark = pytest.mark.usefixtures("one_torch_thread")

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
EXPERIMENTS = DOCS / "experiments"
PAGE = DOCS / "evaluation.md"
LICENCES = Path("/usr/share/common-licenses")
TABLE = re.compile(r"<!-- table: ([\w-]+) -->")

needs_licences = pytest.mark.skipif(
    not LICENCES.is_dir(), reason=f"no {LICENCES} here: not Debian"
)


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the scripts importable by their own names, as `python run.py` has them."""
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield
    for name in [path.stem for path in EXPERIMENTS.glob("*.py")]:
        sys.modules.pop(name, None)


@pytest.fixture
def results(scripts: None) -> Results:
    """The committed results."""
    from results import Results

    return Results.read(EXPERIMENTS / "results.json")


# ---- the pages and the results


def texts() -> dict[str, str]:
    """The pages whose tables and figures come from the results."""
    from page import PAGES

    return {name: (DOCS / name).read_text() for name in PAGES}


def test_the_pages_say_what_the_committed_results_say(results: Results) -> None:
    from page import up_to_date

    for name, text in texts().items():
        assert up_to_date(name, text, results) == text


def test_every_table_and_picture_is_on_a_page() -> None:
    from figures import FIGURES
    from tables import TABLES

    tables = TABLE.findall("".join(texts().values()))
    assert sorted(tables) == sorted(TABLES)
    for name in FIGURES:
        shown = [f"({folder}{name})" for folder in ("experiments/", "")]
        assert any(link in text for link in shown for text in texts().values())
        assert (EXPERIMENTS / name).stat().st_size < 150_000


def without_quotes(text: str) -> str:
    from page import pattern_of, read_quotes

    for quote in read_quotes("evaluation.md"):
        text = pattern_of(quote).sub("", text)
    return text


def test_every_figure_in_a_sentence_is_quoted() -> None:
    """A figure that looks like one of values.py is in quotes.txt, so it is checked."""
    text = PAGE.read_text().partition("\n## To repeat it")[0]
    prose = re.sub(r"(?m)^\|.*", "", text)
    like = re.compile(r"[-+]\d+\.\d{3}|\d+ of \d+")
    assert len(like.findall(prose)) > 50
    assert not like.findall(without_quotes(prose))


def test_each_finding_quotes_results() -> None:
    findings = PAGE.read_text().partition("## Findings")[2].partition("\n## ")[0]
    points = findings.split("\n- ")[1:]
    assert 5 <= len(points) <= 8
    for point in points:
        assert without_quotes(point) != point, point


def test_a_changed_figure_is_noticed(results: Results) -> None:
    from page import keys_of, pattern_of, read_quotes, with_figures
    from values import value

    changed = 0
    for name, text in texts().items():
        for quote in read_quotes(name):
            match = pattern_of(quote).search(text)
            assert match
            for at in range(len(keys_of(quote))):
                start, end = match.end(at + 1), match.start(at + 2)
                figure = text[start:end]
                assert figure == value(results, keys_of(quote)[at])
                page = text[:start] + "9.876" + text[end:]
                assert with_figures(page, results, [quote]) == text != page
                changed += 1
    assert changed > 80


def test_a_changed_result_is_noticed(results: Results) -> None:
    from page import up_to_date

    results.merges[0, "three equal", "metagpt"]["loss"][1] += 0.5
    for name, text in texts().items():
        assert up_to_date(name, text, results) != text


def test_a_changed_cell_is_noticed(results: Results) -> None:
    from page import with_tables

    for text in texts().values():
        (row, *_) = re.findall(r"(?m)^\| \w.* \| [-+]?\d.*$", text)
        page = text.replace(row, row.replace("0", "9"))
        assert with_tables(page, results) == text != page


def test_a_name_of_nothing_is_noticed(results: Results) -> None:
    from page import with_figures, with_tables

    with pytest.raises(KeyError, match="nothing"):
        with_tables("<!-- table: nothing -->\n\n", results)
    with pytest.raises(KeyError, match="nothing"):
        with_figures("by 1.0", results, ["by {nothing/x}"])


@pytest.mark.parametrize(("page", "count"), [("", 0), ("by 1.0, by 2.0", 2)])
def test_a_quote_that_is_not_once_on_the_page_is_noticed(
    page: str, count: int, results: Results
) -> None:
    from page import with_figures

    with pytest.raises(ValueError, match=f"{count} times"):
        with_figures(page, results, ["by {score/average/absolute}"])


def test_results_name_their_setting(results: Results) -> None:
    from family import Size
    from merges import MIXTURES, PLANS
    from results import GROUPS

    setting = results.raw["setting"]
    assert len(results.seeds) >= 3 and len(results.mixtures) >= 4
    assert results.mixtures == {name: list(models) for name, models in MIXTURES.items()}
    assert setting["specialists"] == {name: vars(plan) for name, plan in PLANS.items()}
    assert setting["size"] == vars(Size())
    assert len(results.merges) == len(results.seeds) * len(MIXTURES) * len(
        results.methods
    )
    assert sorted(sum(GROUPS.values(), ())) == sorted(MIXTURES)


def test_power_zero_is_the_average_and_metagpt_minimises_the_quadratic(
    results: Results,
) -> None:
    for seed in results.seeds:
        for mixture in results.mixtures:
            by_method = {
                name: results.merges[seed, mixture, name] for name in results.methods
            }
            mean, zero = by_method["average"], by_method["metagpt power 0"]
            assert zero["loss"] == pytest.approx(mean["loss"], abs=2e-5)
            for kind in ("quadratic", "bound"):
                least = min(r[kind] for r in by_method.values() if kind in r)
                assert by_method["metagpt"][kind] <= least * (1 + 1e-5)


def test_rank_correlation() -> None:
    from results import correlation

    assert correlation([1.0, 2.0, 5.0], [0.1, 0.2, 0.9]) == pytest.approx(1)
    assert correlation([1.0, 2.0, 5.0], [9.0, 3.0, 2.0]) == pytest.approx(-1)
    # By hand: ranks 1.5, 1.5, 3 against 1, 2, 3 give sqrt(3) / 2.
    for tied in ([1.0, 2.0, 3.0], [2.0, 1.0, 3.0]):
        assert correlation([4.0, 4.0, 7.0], tied) == pytest.approx(3**0.5 / 2)


# ---- the words of the page; a new run that turns one needs new words


def mean(results: Results, one: str, other: str, group: str) -> float:
    mixtures = [group] if group in results.mixtures else results.group(group)
    return fmean(results.differences(one, other, mixtures))


def lower(results: Results, one: str, other: str, group: str) -> float:
    """How often the first is lower, as a fraction."""
    pairs = results.differences(one, other, results.group(group))
    return sum(pair < 0 for pair in pairs) / len(pairs)


def test_words_on_metagpt_and_the_average(results: Results) -> None:
    assert -0.01 < mean(results, "metagpt", "average", "equal") < 0
    assert lower(results, "metagpt", "average", "equal") > 0.5
    assert min(results.differences("metagpt", "average", results.group("narrow"))) > 0
    assert mean(results, "metagpt", "base", "narrow") > 0
    assert mean(results, "metagpt", "average", "mixed") > 0
    assert mean(results, "metagpt", "average", "gentle") > 0
    assert abs(mean(results, "metagpt", "average", "code long")) < 0.005
    assert abs(mean(results, "metagpt", "average", "one fast LoRA")) < 0.005


def test_words_on_rivals(results: Results) -> None:
    for method in ("ties", "sce"):
        assert lower(results, "metagpt", method, "gentle") > 0.8
        assert mean(results, method, "average", "gentle") > 0


def test_words_on_parameters(results: Results) -> None:
    for granularity in ("metagpt layer", "metagpt tensor"):
        assert mean(results, granularity, "metagpt", "gentle") > 0.02
        assert lower(results, granularity, "metagpt", "gentle") < 0.5
    assert mean(results, "metagpt power 1", "metagpt", "gentle") < 0
    assert abs(mean(results, "metagpt power 1", "metagpt", "equal")) < 0.0005
    for group in ("mixed", "narrow"):
        assert lower(results, "metagpt power 1", "metagpt", group) == 1
    assert lower(results, "metagpt power 1", "average", "narrow") == 0
    variants = [name for name in results.methods if re.match(r"metagpt( \w|$)", name)]
    below = [m for m in variants if mean(results, m, "average", "narrow") < -1e-4]
    assert below == ["metagpt power -1"]
    assert mean(results, "metagpt power -1", "average", "mixed") > 0
    for mixture in ("one LoRA", "four, one slow"):
        assert mean(results, "metagpt weight", "metagpt", mixture) < -0.01
    assert lower(results, "metagpt exclude", "average", "equal") == 1
    assert mean(results, "metagpt exclude", "metagpt", "one fast LoRA") > 0
    repaired = {
        mixture: mean(results, "metagpt exclude", "metagpt", mixture)
        / mean(results, "average", "metagpt", mixture)
        for mixture in results.group("narrow")
    }
    assert 0.4 < repaired["arithmetic long"] < 0.7
    assert repaired["markup long"] < 0.2
    assert lower(results, "metagpt lambda 1.5", "metagpt", "gentle") < 0.1


def test_words_on_lambda(results: Results) -> None:
    """Where lambda is even, MetaGPT and the average are within 0.015 nats."""
    even, means = [], {}
    for mixture, models in results.mixtures.items():
        each = [results.merges[s, mixture, "metagpt"]["lambda"] for s in results.seeds]
        shares = [round(fmean(column), 2) for column in zip(*each, strict=True)]
        means[mixture] = dict(zip(models, shares, strict=True))
        if 0.19 <= min(shares) and max(shares) <= 0.55:
            even.append(mixture)
    assert even == [*results.group("equal"), "harsh"]
    pairs = results.differences("metagpt", "average", even)
    assert max(map(abs, pairs)) < 0.015
    assert means["four, one slow"]["legal_slow"] == 0.07
    assert means["one LoRA"]["code_lora"] == 0.10
    assert means["one fast LoRA"]["code_lora_fast"] == 0.77


def test_words_on_compositions(results: Results) -> None:
    from tables import COMPOSED

    below = []
    for method in COMPOSED:
        assert mean(results, f"metagpt + {method}", method, "gentle") > 0
        assert lower(results, f"metagpt + {method}", method, "gentle") < 0.5
        if mean(results, f"metagpt + {method}", "metagpt", "gentle") < 0:
            below.append(method)
    assert below == ["breadcrumbs", "breadcrumbs ties"]


def test_words_on_scores(results: Results) -> None:
    def score(method: str, kind: str = "absolute") -> float:
        return fmean(
            getattr(results.averages(seed, mixture, method), kind)
            for seed in results.seeds
            for mixture in results.gentle
        )

    others = [m for m in ("base", *results.methods) if m != "metagpt"]
    assert all(score(method) < score("metagpt") for method in others)
    assert score("metagpt", "normalised") > score("average", "normalised")
    for method in ("ties", "dare linear"):
        assert score(f"metagpt + {method}") > score(method)
    k = results.domains.index("markup")
    for model, percent in (("base", 4), ("markup_long", 95)):
        scores = [results.models[seed, model]["score"][k] for seed in results.seeds]
        assert round(100 * fmean(scores)) == percent


def test_words_on_forgetting(results: Results) -> None:
    lost = [
        fmean(results.models[seed, model]["loss"][0] for seed in results.seeds)
        for model in ("base", "code_long", "arithmetic_long", "markup_long")
    ]
    assert lost == sorted(lost)
    for mixture in results.mixtures:
        of_metagpt, of_average = (
            fmean(results.merges[s, mixture, method]["loss"][0] for s in results.seeds)
            for method in ("metagpt", "average")
        )
        assert of_metagpt > of_average


def test_words_on_the_assumptions(results: Results) -> None:
    from values import value

    names = list(results.raw["setting"]["specialists"])
    for models in results.mixtures.values():
        at = [names.index(model) for model in models]
        for record in results.raw["angles"]:
            for i, j in ((i, j) for i in at for j in at if i < j):
                assert abs(record["cosines"][i][j]) < 0.06
    assert float(value(results, "rank/bound/equal")) > 0.5
    assert float(value(results, "rank/bound/narrow")) < -0.2
    assert len(results.methods) == 33 and len(results.merges) == 990
    middle = {
        name: fmean(r["bend"][2] for r in results.raw["bends"] if r["model"] == name)
        for name in ("arithmetic", "arithmetic_long")
    }
    assert middle["arithmetic_long"] < middle["arithmetic"]


def test_words_on_the_regime(results: Results) -> None:
    from merges import GRID, HARSH, RATE

    rows = json.loads((EXPERIMENTS / "pilot.json").read_text())
    domains = [name for name in results.domains if name != "general"]

    def loss(row: dict[str, Any], who: str) -> float:
        return fmean(row[domain][who][0] for domain in domains)

    (gentle,) = (r for r in rows if (r["width"], r["rate"]) == (192, RATE))
    (harsh,) = (r for r in rows if (r["width"], r["rate"]) == (192, HARSH))
    assert all(gentle[d]["average"][0] < gentle[d]["base"][0] for d in domains)
    gained = loss(gentle, "base") - loss(gentle, "average")
    assert 0.2 < gained / (loss(gentle, "base") - loss(gentle, "specialist")) < 0.3
    assert loss(harsh, "average") > loss(harsh, "base")
    assert all(r["markup"]["specialist"][1] == 0 for r in rows if r["width"] == 64)
    assert abs(mean(results, "average", "base", "harsh")) < 0.001
    for seed in results.seeds:
        assert (
            results.oracle(results.ald, seed, "harsh") == f"task arithmetic {min(GRID)}"
        )


@needs_licences
def test_words_on_the_texts(results: Results) -> None:
    from corpora import HELD_OUT_BYTES
    from family import WINDOW
    from measure import held_out

    windows = results.raw["setting"]["size"]["windows"]
    assert (windows, WINDOW, windows * (WINDOW - 1)) == (12, 128, 1524)
    assert HELD_OUT_BYTES == 100_000
    for domain, answers in (("arithmetic", 168), ("markup", 27)):
        ends = (held_out(domain, windows) == ord("\n")).sum(1)
        # The first whole line of a window is an example; what is cut off is neither.
        assert int((ends - 2).sum()) == answers


def test_words_on_the_time(results: Results) -> None:
    text = PAGE.read_text()
    for record in results.raw["seconds"][1:]:
        spent = record["train"] + record["merge and measure"]
        assert re.search(rf"\b{spent} s\b", text)


# ---- the experiment


@needs_licences
def test_text_is_held_out() -> None:
    from corpora import text

    for domain in ("arithmetic", "markup", "legal"):
        trained = {line.strip() for line in text(domain).splitlines()} - {""}
        unseen = text(domain, held_out=True).splitlines()[:-1]  # the last is cut off
        assert len(unseen) > 100
        assert trained.isdisjoint(line.strip() for line in unseen if line.strip())


@pytest.mark.parametrize(
    ("domain", "complaint"),
    [("legal", "no licences in"), ("code", "no source of Python's library in")],
)
def test_missing_texts_are_named(
    domain: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import corpora

    monkeypatch.setattr(corpora, "LICENCES", tmp_path)
    paths = {"stdlib": str(tmp_path)}
    monkeypatch.setattr(corpora.sysconfig, "get_paths", lambda: paths)
    with pytest.raises(OSError, match=f"{complaint} {tmp_path}"):
        corpora.text(domain)


@needs_licences
def test_the_whole_experiment_runs_in_small(tmp_path: Path) -> None:
    command = [sys.executable, EXPERIMENTS / "run.py", "--tiny", tmp_path / "out"]
    done = run_process(
        [*command, "--to", tmp_path / "docs"], environment(OMP_NUM_THREADS="1")
    )
    assert_succeeded(done)
    written = tmp_path / "docs"
    for name, text in texts().items():
        page = (written / name).read_text()
        assert TABLE.findall(page) == TABLE.findall(text)
        assert page != text
    assert len(list((written / "experiments").glob("*.png"))) == 4


@needs_licences
def test_seeds_run_in_processes_and_go_on(tmp_path: Path) -> None:
    """What a seed has finished is read in its process, and gathered in order."""
    from family import Size
    from run import experiment

    for seed in (0, 1):
        done = tmp_path / f"seed{seed}" / "results.json"
        done.parent.mkdir()
        done.write_text(json.dumps({"models": [{"seed": seed}]}))
    results = experiment(tmp_path, Size(), (0, 1), {})
    assert results["models"] == [{"seed": 0}, {"seed": 1}]


# ---- the paper's models

FAMILIES = ("llama-2-7b", "mistral-7b", "llama-2-13b")


def test_commands_for_the_paper_cover_its_families() -> None:
    text = (DOCS / "reproduce.md").read_text()
    recipes = re.findall(r"recipes/paper/([\w-]+)\.yml", text)
    shipped = {path.stem for path in (ROOT / "recipes" / "paper").glob("*.yml")}
    assert {*recipes} == shipped
    assert all(f" {family}" in text for family in FAMILIES)
    for out in re.findall(r"^ *mergekit-yaml \S+ (\S+)", text, re.MULTILINE):
        assert out.startswith("./merged/"), "the evaluation looks there"
    named = {
        model
        for family in FAMILIES
        for model in values_of(recipe_of(family), "base_model", "model")
    }
    assert len(named) == 12
    for model in named:
        assert f" {model}" in text, f"{model} alone is not evaluated"


def test_examples_in_the_prompt_are_the_papers() -> None:
    text = (DOCS / "reproduce.md").read_text()
    given = dict(re.findall(r"^evaluate (\w+) (\d)", text, re.MULTILINE))
    assert given == {
        "winogrande": "0",
        "agieval_en": "5",
        "gsm8k": "4",
        "minerva_math": "4",
        "mbpp": "3",
        "humaneval": "0",
    }


def recipe_of(family: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / f"recipes/paper/{family}.yml").read_text())


@pytest.mark.parametrize("family", FAMILIES)
def test_baselines_of_the_paper_run_on_stand_ins(family: str, tmp_path: Path) -> None:
    """Their recipes are merged by tests/test_recipes.py."""
    from baselines import baselines

    recipe = recipe_of(family)
    names = values_of(recipe, "base_model") + values_of(recipe, "model")
    stand_ins = {
        name: make_stand_in(tmp_path / f"m{at}", ORIGINALS[name], at)
        for at, name in enumerate(names)
    }
    places = {name: stand_in.folder for name, stand_in in stand_ins.items()}
    base, *models = (first_rows(stand_in.state) for stand_in in stand_ins.values())
    found = baselines(recipe)
    assert list(found) == ["average", "task-arithmetic", "ties", "dare"]
    for name, config in found.items():
        merged = run_mergekit(replaced(config, places), tmp_path / name)
        assert merged.keys() == base.keys()
        for tensor, merged_tensor in merged.items():
            assert merged_tensor.shape == base[tensor].shape or has_token_rows(tensor)
            assert merged_tensor.isfinite().all()
            if name not in ("average", "task-arithmetic"):
                continue
            start = base[tensor].double()
            taus = sum(model[tensor].double() - start for model in models)
            share = 1 / 3 if name == "average" else 0.3
            torch.testing.assert_close(
                merged_tensor.double(), start + share * taus, rtol=2**-8, atol=1e-7
            )
    assert values_of(found["ties"], "density") == [0.55]
    assert values_of(found["dare"], "density") == [0.55]
