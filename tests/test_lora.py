"""LoRA adapters: measured from factors as PEFT applies them, and combined by PEFT."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_metagpt
from mergekit_metagpt.merge_config import families
from mergekit_metagpt.scanning import cache, groups, once
from mergekit_metagpt.scanning.once import measure
from mergekit_metagpt.scanning.results import ScanResult
from tests.adapters import (
    PEFT_WARNS,
    Tuned,
    architectures,
    distinct,
    loaded,
    taus_of,
    write_adapters,
    write_tuned,
)
from tests.conftest import Cli
from tests.families import (
    State,
    forget,
    merge_config,
    read_model,
    run_command,
    run_mergekit,
)
from tests.hub import Hub
from tests.merges import write_merge
from tests.processes import PACKAGE, ask_python

pytestmark = [
    pytest.mark.usefixtures("one_torch_thread", "own_cache"),
    # Of PEFT and transformers about tiny models.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning:peft"),
    PEFT_WARNS,
]

STACK = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
# Of each architecture two adapters: other ranks, other modules, every option somewhere.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        {
            "r": 2,
            "lora_alpha": 16,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 5},
            "alpha_pattern": {"v_proj": 3, "layers.1.self_attn.q_proj": 7},
        },
    ),
    "qwen2": (  # the head is tied to the embeddings, and both are adapted
        {"r": 4, "target_modules": ["embed_tokens", "q_proj", "lm_head"]},
        {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    ),
    "gpt2": (  # weights are stored transposed, some of them are square
        {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
        {"r": 3, "target_modules": ["c_proj", "c_fc", "wte"], "fan_in_fan_out": True},
    ),
    "qwen3_moe": (  # experts are stored one by one, and adapted as a stack
        {
            "r": 4,
            "target_modules": ["q_proj"],
            **STACK,
            "rank_pattern": {"down_proj": 6},
        },
        {"r": 2, "lora_alpha": 9, "target_modules": ["k_proj"], **STACK},
    ),
    "mixtral": (  # experts as PEFT names them itself, with the ranks of fused ones
        {"r": 4, "target_modules": ["q_proj", "w1", "w2", "w3"]},
        {"r": 2, "target_modules": "all-linear"},
    ),
    "gpt_oss": (  # experts are stored as a stack, transposed and square
        {"r": 4, "target_modules": ["q_proj"], **STACK},
        {"r": 2, "use_rslora": True, "target_modules": ["k_proj"], **STACK},
    ),
}
EACH = pytest.mark.parametrize("name", SETTINGS)


Q_PROJ: dict[str, Any] = {"target_modules": ["q_proj"]}
LAYER_0 = "base_model.model.model.layers.0.self_attn.q_proj"


def write_llama(folder: Path, *settings: dict[str, Any]) -> Tuned:
    """Write a Llama and its adapters, of its queries where nothing else is said."""
    return write_tuned(folder, architectures()["llama"], *(settings or [Q_PROJ]))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tuned]:
    """What PEFT has written of an architecture, made when it is first asked for."""
    made: dict[str, Tuned] = {}

    def of(name: str) -> Tuned:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = write_tuned(folder, architectures()[name], *SETTINGS[name])
        return made[name]

    return of


def measured_alone(adapters: Sequence[Path]) -> ScanResult:
    """What is measured of adapters without their base."""
    family, opened = families.open_adapters([str(adapter) for adapter in adapters])
    models = [opened[model] for model in family.models]
    return measure(opened[family.base], models, gram=True)


def gram_of(taus: Sequence[State]) -> torch.Tensor:
    rows = [torch.cat([t.reshape(-1) for t in tau.values()]) for tau in taus]
    flat = torch.stack(rows)
    return flat @ flat.T


def summed(family: Tuned, weights: Sequence[float]) -> State:
    """The base with the weighted task vectors."""
    taus = taus_of(family)
    return {
        name: before + sum(w * tau[name] for w, tau in zip(weights, taus, strict=True))
        for name, before in distinct(loaded(family.base)).items()
    }


def assert_gram(result: ScanResult, taus: Sequence[State]) -> None:
    """Check norms and inner products of whole models against dense task vectors."""
    found, expected = result.pool("model").gram, gram_of(taus)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(
        result.pool("model").sq_norms, expected.diagonal(), rtol=1e-6, atol=0
    )


# ---- against PEFT --------------------------------------------------------------------


@EACH
def test_with_a_base_as_peft_merges(name: str, tuned: Callable[[str], Tuned]) -> None:
    family = tuned(name)
    taus = taus_of(family)
    result = mergekit_metagpt.scan(family.base, family.adapters, gram=True)
    assert_gram(result, taus)
    for row, weight in enumerate(result.names):
        if weight in taus[0]:  # experts may be stored under other names
            norms = torch.stack([tau[weight].square().sum() for tau in taus])
            torch.testing.assert_close(result.sq_norms[row], norms, rtol=1e-6, atol=0)
    base = sum(t.square().sum() for t in distinct(loaded(family.base)).values())
    for of_base in result.pool("model").base_sq_norms:
        torch.testing.assert_close(of_base, base)


@EACH
def test_without_a_base_as_with_it(name: str, tuned: Callable[[str], Tuned]) -> None:
    family = tuned(name)
    if name == "qwen2":
        with pytest.raises(
            ValueError, match=r"one weight, only the base tells.*--base"
        ):
            measured_alone(family.adapters)
        return
    result = measured_alone(family.adapters)
    assert_gram(result, taus_of(family))
    assert not result.base_sq_norms.any()
    whole = mergekit_metagpt.scan(family.base, family.adapters)
    assert result.pool("layer").members.keys() <= whole.pool("layer").members.keys()


@EACH
def test_beside_a_full_fine_tune(
    name: str,
    tuned: Callable[[str], Tuned],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cache, "YOUNG_S", 0.0)
    # Pieces that begin and end within a row, and within an expert.
    monkeypatch.setattr(groups, "SEGMENT", 700)
    monkeypatch.setattr(groups, "PIECE", 130)
    family = tuned(name)
    model = loaded(family.base).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    model.save_pretrained(tmp_path / "full")
    base, full = (distinct(loaded(at)) for at in (family.base, tmp_path / "full"))
    first, second = taus_of(family)
    taus = [first, {n: full[n] - base[n] for n in base}, second]
    models = [family.adapters[0], tmp_path / "full", family.adapters[1]]
    result = mergekit_metagpt.scan(family.base, models, gram=True)
    assert_gram(result, taus)
    # From the cache, nothing is read again.
    forget()
    monkeypatch.setattr(once, "scan_checkpoints", None)
    monkeypatch.setattr(once.factors, "scan_adapters", None)
    again = mergekit_metagpt.scan(family.base, models, gram=True)
    assert torch.equal(again.pool("model").gram, result.pool("model").gram)


def write_single_experts(base: Path, folder: Path, **config: Any) -> Path:
    """Write an adapter of experts one by one, as under transformers 4."""
    from safetensors.torch import save_file

    state, random = {}, torch.Generator().manual_seed(5)
    for name, weight in read_model(base).items():
        if ".experts." in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            rows, columns = weight.shape
            for side, shape in (("A", (4, columns)), ("B", (rows, 4))):
                values = 0.1 * torch.randn(shape, generator=random)
                state[f"{module}.lora_{side}.weight"] = values
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 10,
        "base_model_name_or_path": str(base),
        "target_modules": ["w1", "w2", "w3"],
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_experts_that_are_adapted_one_by_one(tmp_path: Path, cli: Cli) -> None:
    family = write_tuned(tmp_path, architectures()["mixtral"], {"r": 2, **STACK})
    single = write_single_experts(family.base, tmp_path / "single")
    taus = taus_of(Tuned(family.base, (single,)))
    assert_gram(mergekit_metagpt.scan(family.base, [single], gram=True), taus)
    assert_gram(measured_alone([single]), taus)
    for models in (
        (single, family.adapters[0]),
        ("--base", family.base, single, family.adapters[0]),
    ):
        said = cli.error("inspect", *models)
        assert "the experts as one stack: how these overlap is not known" in said
    scaled = write_single_experts(family.base, tmp_path / "rs", use_rslora=True)
    assert "experts one by one with use_rslora" in cli.error("inspect", scaled)


# ---- PEFT's call ---------------------------------------------------------------------


def combined_by(lines: str, base: Path) -> State:
    """The parameters after the script was run on a base in float64.

    They are those of the adapter that it saves, too.
    """
    import peft

    class Auto:
        from_pretrained = staticmethod(lambda name: loaded(Path(name)))

    class Peft:
        @staticmethod
        def from_pretrained(model: Any, path: str, **options: Any) -> Any:
            options["autocast_adapter_dtype"] = False
            return peft.PeftModel.from_pretrained(model, path, **options)

    lines = re.sub(r"^from .*", "", lines, flags=re.MULTILINE)
    names = {"PeftModel": Peft, "AutoModelForCausalLM": Auto}
    exec(lines, names)
    combined = distinct(names["model"].merge_and_unload())  # type: ignore[attr-defined]
    (place,) = re.findall(r'^# PeftModel.*"(.*)"', lines, flags=re.MULTILINE)
    saved = distinct(Peft.from_pretrained(loaded(base), place).merge_and_unload())
    for name, tensor in combined.items():
        torch.testing.assert_close(saved[name], tensor, rtol=1e-6, atol=1e-6)
    return combined


@pytest.fixture
def printed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, Any]]:
    """The script that `inspect --peft -` prints and nothing else, and the report."""
    monkeypatch.chdir(tmp_path)

    def run(*models: Path) -> tuple[str, Any]:
        options = ("--peft", "-", "--json", "report.json")
        assert run_command("inspect", *models, *options) == 0
        text = capsys.readouterr().out
        assert text.startswith("from peft import")
        return text, json.loads(Path("report.json").read_text())

    return run


def coefficients_of(report: Any) -> list[float]:
    return [model["coefficient"] for model in report["families"][0]["models"]]


COMBINED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "ranks, modules and patterns": ("llama", list(SETTINGS["llama"])),
    "rank-stabilised, all of them": (
        "llama",
        [
            {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "v_proj"]},
            {"r": 2, "use_rslora": True, "target_modules": ["v_proj"]},
            {"r": 3, "use_rslora": True, "target_modules": ["gate_proj"]},
        ],
    ),
    "rank-stabilised, one of them": (
        "llama",
        [
            {"r": 4, "use_rslora": True, "target_modules": ["q_proj"]},
            {"r": 2, "target_modules": ["q_proj"]},
        ],
    ),
    "transposed weights": (
        "gpt2",
        [
            {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
            {"r": 3, "target_modules": ["c_proj"], "fan_in_fan_out": True},
        ],
    ),
    "embeddings": (
        "llama",
        [
            {"r": 4, "target_modules": ["embed_tokens"]},
            {"r": 3, "target_modules": ["embed_tokens", "k_proj"]},
        ],
    ),
    "patterns of names": (
        "llama",
        [{"r": 4, "target_modules": r".*\.[qk]_proj"}, {"target_modules": ".*v_proj"}],
    ),
    "one alone": ("llama", [{"r": 4, "target_modules": ["q_proj"]}]),
}


@pytest.mark.parametrize("case", COMBINED)
@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_the_printed_call_gives_the_sum(
    case: str, kind: str, tmp_path: Path, printed: Callable[..., tuple[str, Any]]
) -> None:
    name, settings = COMBINED[case]
    family = write_tuned(tmp_path, architectures()[name], *settings)
    lines, report = printed(*family.adapters)
    if kind == "svd":
        (rank,) = re.findall(r"svd_rank=(\d+)", lines)
        lines = lines.replace('"cat"', f'"svd", svd_rank={rank}')
    weights = coefficients_of(report)
    assert math.isclose(sum(weights), 1)
    combined = combined_by(lines, family.base)
    for weight, expected in summed(family, weights).items():
        torch.testing.assert_close(combined[weight], expected, rtol=1e-6, atol=1e-6)


def test_folders_named_as_parts_of_modules(
    tmp_path: Path, printed: Callable[..., tuple[str, Any]]
) -> None:
    family = write_llama(tmp_path, Q_PROJ, Q_PROJ, Q_PROJ)
    names = ("0", "weight", "q_proj")
    adapters = [
        adapter.rename(tmp_path / name)
        for adapter, name in zip(family.adapters, names, strict=True)
    ]
    lines, _ = printed(*adapters)
    combined_by(lines, family.base)  # compares what is saved with the sum


def test_linear_is_not_the_sum(
    tmp_path: Path, printed: Callable[..., tuple[str, Any]]
) -> None:
    family = write_llama(tmp_path, Q_PROJ, Q_PROJ)
    lines, report = printed(*family.adapters)
    expected = summed(family, coefficients_of(report))

    def off(kind: str) -> float:
        combined = combined_by(lines.replace('"cat"', f'"{kind}"'), family.base)
        return math.sqrt(
            sum(float((combined[n] - t).square().sum()) for n, t in expected.items())
        )

    length = math.sqrt(float(gram_of(taus_of(family)).diagonal().max()))
    assert off("cat") < 1e-6 * length
    assert off("linear") > 0.1 * length


def test_lambda_scales_the_weights(
    tmp_path: Path, printed: Callable[..., tuple[str, Any]]
) -> None:
    family = write_llama(tmp_path, Q_PROJ, Q_PROJ)
    file = write_merge(
        tmp_path / "merge.yml",
        family.base,
        [f"{family.base}+{adapter}" for adapter in family.adapters],
        parameters={"lambda": 1.5},
    )
    lines, report = printed(file)
    (weights,) = re.findall(r"weights=\[(.*)\]", lines)
    expected = [1.5 * coefficient for coefficient in coefficients_of(report)]
    assert list(map(float, weights.split(", "))) == expected
    assert report["refused"] is None
    assert report["families"][0]["base"]["not_written"]["count"] == 0
    assert 'adapters=["adapter0_1", "adapter1_2"]' in lines


NOT_COMBINED: dict[str, tuple[str, list[dict[str, Any]], Sequence[str], str]] = {
    "experts": (
        "gpt_oss",
        [{"r": 4, **STACK}],
        (),
        "adapts experts or target_parameters",
    ),
    "layers": (
        "llama",
        [
            {**Q_PROJ, "layers_to_transform": [0]},
            Q_PROJ,
        ],
        (),
        "another layers_to_transform than",
    ),
    "tied embeddings": (
        "llama",
        [{**Q_PROJ, "ensure_weight_tying": True}],
        (),
        "has ensure_weight_tying",
    ),
    "a pattern and a list": (
        "llama",
        [Q_PROJ, {"target_modules": ".*q_proj"}],
        (),
        "is a pattern and that of",
    ),
    "by layer": (
        "llama",
        [Q_PROJ, Q_PROJ],
        ("--granularity", "layer"),
        "Give --granularity model",
    ),
    "beside JSON": (
        "llama",
        [Q_PROJ],
        ("--json", "-"),
        "--json and --peft are both -",
    ),
}


@pytest.mark.parametrize("case", NOT_COMBINED)
def test_what_peft_cannot_combine_is_refused(
    case: str, tmp_path: Path, cli: Cli
) -> None:
    name, settings, options, words = NOT_COMBINED[case]
    family = write_tuned(tmp_path, architectures()[name], *settings)
    assert words in cli.error("inspect", *family.adapters, "--peft", "-", *options)


# ---- merges --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merge_agrees_within_the_rounding_of_its_copies(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    family = write_llama(tmp_path, *SETTINGS["llama"])
    models = [f"{family.base}+{adapter}" for adapter in family.adapters]
    file = write_merge(tmp_path / "merge.yml", family.base, models)

    def inspected(*options: str) -> Any:
        report = tmp_path / "report.json"
        assert run_command("inspect", file, "--json", report, "--force", *options) == 0
        return json.loads(report.read_text())["families"][0]

    exact, copies = inspected(), tmp_path / "copies"
    name = str(dtype).removeprefix("torch.")
    options = ("--lora-merge-cache", str(copies), "--lora-merge-dtype", name)
    merged = run_mergekit(merge_config(family.base, models), tmp_path / "out", *options)
    places = [next(copies.glob(f"*_{at.name}_*")) for at in family.adapters]
    of_copies = mergekit_metagpt.scan(family.base, places).pool("model").sq_norms
    # With the folder of the copies, `inspect` measures what the merge measured.
    measured = inspected(*options)["models"]
    assert [model["sq_norm"] for model in measured] == of_copies.tolist()
    unit = torch.finfo(dtype).eps / 2
    low, high = [], []
    for model, sq_norm in zip(exact["models"], of_copies.tolist(), strict=True):
        # Task vector and sum are rounded once each, of the second order no more than
        # a hundredth of that; B A in float32.
        bound = 1.01 * unit * (exact["base"]["norm"] + 2 * model["norm"])
        bound += 1e-5 * model["norm"]
        assert abs(math.sqrt(sq_norm) - model["norm"]) <= bound
        low.append(max(0.0, model["norm"] - bound) ** 2)
        high.append((model["norm"] + bound) ** 2)
    shares = of_copies / of_copies.sum()
    for k, model in enumerate(exact["models"]):
        others = [j for j in range(len(low)) if j != k]
        least = low[k] / (low[k] + sum(high[j] for j in others))
        most = high[k] / (high[k] + sum(low[j] for j in others))
        assert least <= float(shares[k]) <= most
        assert least <= model["coefficient"] <= most
    if dtype == torch.float32:
        weights = [model["coefficient"] for model in exact["models"]]
        for weight, expected in summed(family, weights).items():
            torch.testing.assert_close(
                merged[weight].double(), expected, rtol=1e-5, atol=1e-5
            )


def test_settings_by_tensor_need_merged_copies(
    tuned: Callable[[str], Tuned], tmp_path: Path, cli: Cli
) -> None:
    family = tuned("llama")
    file = write_merge(
        tmp_path / "merge.yml",
        family.base,
        [f"{family.base}+{adapter}" for adapter in family.adapters],
        parameters={"power": [{"filter": "mlp", "value": 1}, {"value": 2}]},
    )
    said = cli.error("inspect", file)
    assert "has a LoRA adapter; give --lora-merge-cache FOLDER" in said
    assert run_command("inspect", file, "--lora-merge-cache", tmp_path / "copies") == 0


# ---- the hub -------------------------------------------------------------------------


@pytest.fixture
def hub(tuned: Callable[[str], Tuned], empty_hub: Hub) -> Hub:
    """Base and adapters on a hub."""
    family = tuned("llama")
    empty_hub.add("org/base", family.base)
    for number, adapter in enumerate(family.adapters):
        empty_hub.add(f"org/adapter{number}", adapter)
    return empty_hub


def test_adapters_on_the_hub(
    hub: Hub,
    tuned: Callable[[str], Tuned],
    cli: Cli,
    tmp_path: Path,
) -> None:
    exact = gram_of(taus_of(tuned("llama"))).diagonal().tolist()
    names = ["org/adapter0", "org/adapter1"]
    for number, models in enumerate(
        (
            ["--remote", *names],
            names,
            ["--remote", "--base", "org/base", *names],
            ["--remote", "--base", "org/base", *(f"org/base+{name}" for name in names)],
        )
    ):
        file = tmp_path / f"{number}.json"
        assert run_command("inspect", *models, "--json", file) == 0
        (family,) = json.loads(file.read_text())["families"]
        assert [m["sq_norm"] for m in family["models"]] == pytest.approx(exact)
        assert family["sample"] is None
        assert [m["relative_norm"] for m in family["models"]] == [None, None]
        assert family["base"]["norm"] is None
    # Of the base, no weights were read.
    large = [asked for asked in hub.asked if "/org/base/" in asked.path]
    assert sum(asked.range is not None for asked in large) <= 4
    assert "org/none is not on " in cli.error("inspect", "--remote", "org/none")
    assert "none.yml" in cli.error("inspect", "--remote", "none.yml")


def test_adapters_beside_models_that_are_sampled_are_refused(
    hub: Hub, tuned: Callable[[str], Tuned], cli: Cli, tmp_path: Path
) -> None:
    model = loaded(tuned("llama").base).float()
    with torch.no_grad():
        model.lm_head.weight.add_(0.01)
    model.save_pretrained(tmp_path / "full")
    hub.add("org/full", tmp_path / "full")
    models = ("--base", "org/base", "org/full", "org/adapter0")
    said = cli.error("inspect", "--remote", *models)
    assert "org/full would be estimated from a sample" in said


# ---- what factors alone do not tell --------------------------------------------------

ODD: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "has DoRA (use_dora)"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "whole modules"),
    "biases": ({"bias": "all"}, "has trained biases (bias: all)"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "begins from a changed base"),
    "tokens": ({"trainable_token_indices": [1, 2]}, "has trained tokens"),
    "biases of factors": ({"lora_bias": True}, "has biases of its factors (lora_bias)"),
}


@pytest.mark.parametrize("case", ODD)
def test_what_has_more_than_factors_is_refused_or_merged(
    case: str, tmp_path: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, words = ODD[case]
    name = "qwen2" if case == "biases of factors" else "llama"  # it needs biases
    family = write_tuned(tmp_path, architectures()[name], {**Q_PROJ, **settings})
    (adapter,) = family.adapters
    for models in ((adapter,), ("--base", family.base, adapter)):
        said = cli.error("inspect", *models)
        assert words in said and "--lora-merge-cache FOLDER" in said
    options = ("--lora-merge-cache", tmp_path / "cache", "--json", "-")
    assert run_command("inspect", "--base", family.base, adapter, *options) == 0
    (model,) = json.loads(capsys.readouterr().out)["families"][0]["models"]
    if case not in ("tokens", "PiSSA"):  # which PEFT does not merge in float64
        exact = math.sqrt(gram_of(taus_of(family)).item())
        # The copy is made and measured in float32.
        assert model["norm"] == pytest.approx(exact, rel=1e-4)
    assert model["adapter"] is None


def rewritten(
    folder: Path, change: Callable[[State], State] | None = None, **config: Any
) -> None:
    """Change what an adapter stores, and its configuration."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    settings = folder / "adapter_config.json"
    if change is not None:
        save_file(change(load_file(file)), file)
    settings.write_text(json.dumps({**json.loads(settings.read_text()), **config}))


def without_a_factor(state: State) -> State:
    return {name: t for name, t in state.items() if name != f"{LAYER_0}.lora_B.weight"}


def with_nan(state: State) -> State:
    state[f"{LAYER_0}.lora_A.weight"][0, 0] = float("nan")
    return state


def with_a_whole_weight(state: State) -> State:
    return {**state, "base_model.model.lm_head.weight": torch.ones(96, 32)}


def with_a_convolution(state: State) -> State:
    name = f"{LAYER_0}.lora_A.weight"
    return {**state, name: state[name][:, :, None, None].clone()}


BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "another type": (lambda at: rewritten(at, peft_type="VERA"), "another type (VERA)"),
    "another rank": (lambda at: rewritten(at, r=5), "factors of rank 8 and 8"),
    "a factor is missing": (lambda at: rewritten(at, without_a_factor), "lacks lora_B"),
    "NaN": (lambda at: rewritten(at, with_nan), "holds NaN or infinity"),
    "a whole weight": (
        lambda at: rewritten(at, with_a_whole_weight),
        "stores base_model.model.lm_head.weight, which is no factor",
    ),
    "a convolution": (lambda at: rewritten(at, with_a_convolution), "a convolution"),
    "no JSON": (
        lambda at: (at / "adapter_config.json").write_text("{") and None,
        "adapter_config.json is corrupt",
    ),
    "no weights": (
        lambda at: (at / "adapter_model.safetensors").unlink(),
        "holds no weights; expected adapter_model.safetensors",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_adapters_are_named(case: str, tmp_path: Path, cli: Cli) -> None:
    spoil, words = BROKEN[case]
    (adapter,) = write_llama(tmp_path).adapters
    spoil(adapter)
    said = cli.error("inspect", adapter)
    assert words in said and str(adapter) in said


def test_adapters_that_do_not_fit_are_refused(
    tuned: Callable[[str], Tuned], tmp_path: Path, cli: Cli
) -> None:
    llama, other = tuned("llama"), tuned("gpt2")
    wide = architectures()["llama"]
    wide.hidden_size, wide.head_dim = 64, 16
    larger = write_tuned(tmp_path, wide, Q_PROJ)
    one, wider = llama.adapters[0], larger.adapters[0]
    foreign = cli.error("inspect", "--base", llama.base, other.adapters[0])
    assert "does not store. Does it belong to this" in foreign
    misfit = cli.error("inspect", "--base", llama.base, wider)
    assert "as [64, 64], which is [32, 32] in" in misfit
    assert "Do they have one base?" in cli.error("inspect", one, wider)
    assert "is no LoRA adapter, and no base" in cli.error("inspect", one, llama.base)
    assert "is given twice" in cli.error("inspect", one, one)

    def renamed(state: State) -> State:
        return {n.replace("model.layers", "text.layers"): t for n, t in state.items()}

    rewritten(wider, renamed)
    assert "adapt layers of other names" in cli.error("inspect", one, wider)


def test_a_copy_of_the_embeddings_must_be_that_of_the_base(
    tmp_path: Path, cli: Cli, capsys: pytest.CaptureFixture[str]
) -> None:
    family = write_llama(tmp_path, {"target_modules": ["embed_tokens"]})
    (adapter,) = family.adapters
    assert run_command("inspect", adapter) == 0
    assert "stores a copy of its base's embeddings" in capsys.readouterr().out
    assert run_command("inspect", "--base", family.base, adapter) == 0
    assert "stores a copy" not in capsys.readouterr().out

    def moved(state: State) -> State:
        return {n: t + 1 if "base_layer" in n else t for n, t in state.items()}

    rewritten(adapter, moved)
    said = cli.error("inspect", "--base", family.base, adapter)
    assert "which is not that of" in said
    assert_measured_as_a_copy(family, tmp_path, capsys)


def assert_measured_as_a_copy(
    family: Tuned, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check that an adapter is measured with the flag that its refusal names."""
    options = ("--lora-merge-cache", folder / "copies", "--json", "-")
    command = ("inspect", "--base", family.base, *family.adapters, *options)
    assert run_command(*command) == 0
    (model,) = json.loads(capsys.readouterr().out)["families"][0]["models"]
    (copy,) = (folder / "copies").iterdir()
    base, merged = distinct(loaded(family.base)), distinct(loaded(copy))
    exact = gram_of([{name: merged[name] - base[name] for name in base}])
    assert model["sq_norm"] == pytest.approx(exact.item(), rel=1e-6)
    assert model["adapter"] is None


def test_whole_weights_beside_factors_are_measured_as_a_copy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family = write_llama(tmp_path)
    rewritten(family.adapters[0], with_a_whole_weight)
    assert_measured_as_a_copy(family, tmp_path, capsys)


# ---- without a base, nothing grows with it -------------------------------------------


def write_large(folder: Path, seed: int) -> None:
    """Write an adapter of rank 16 for two weights in 80 layers of width 8192."""
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(seed)
    sides = {"self_attn.q_proj": (8192, 8192), "mlp.down_proj": (8192, 28672)}
    state = {}
    for layer in range(80):
        for module, (rows, columns) in sides.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            for side, shape in (("A", (16, columns)), ("B", (rows, 16))):
                values = torch.rand(shape, generator=random).bfloat16()
                state[f"{name}.lora_{side}.weight"] = values
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def test_memory_does_not_grow_with_the_base(tmp_path: Path) -> None:
    for seed in range(2):
        write_large(tmp_path / f"adapter{seed}", seed)
    names = [str(tmp_path / f"adapter{seed}") for seed in range(2)]
    grown, sq_norms, layers = ask_python(
        f"""
        import resource
        from mergekit_metagpt.merge_config import families
        from mergekit_metagpt.scanning.once import measure

        def peak():
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

        family, opened = families.open_adapters({names!r})
        models = [opened[model] for model in family.models]
        before = peak()
        result = measure(opened[family.base], models, gram=True)
        norms = result.pool("model").sq_norms.tolist()
        answer([peak() - before, norms, len(result.pool("layer").keys)])
        """,
        path=[PACKAGE.parent],
        MERGEKIT_METAGPT_CACHE="0",
    )
    assert layers == 80
    assert all(norm > 0 for norm in sq_norms)
    # In bfloat16 the adapters have 272 MB, and the weights that they adapt 48 GB.
    assert sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors")) > 2.7e8
    assert grown < 1.5e8


def test_what_a_merge_of_adapters_says_next_is_true(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapted = write_adapters(tmp_path)
    models = [f"{adapted.base}+{adapter}" for adapter in adapted.adapters]
    file = write_merge(tmp_path / "merge.yml", adapted.base, models)
    out, copies = tmp_path / "out", tmp_path / "copies"
    options = ("--lora-merge-cache", copies, "--no-copy-tokenizer", "--quiet")
    assert run_command("merge", file, out, *options) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"inspect {out}/mergekit_config.yml --lora-merge-cache {copies}`" in said
    assert f"verify {out} --lora-merge-cache {copies}`" in said
    for arguments in ((), ("--lora-merge-cache", copies)):
        assert run_command("inspect", out, *arguments) == 0
        assert "changed after this merge" not in capsys.readouterr().out
    assert run_command("verify", out, "--lora-merge-cache", copies) == 0
    assert run_command("export", file, tmp_path / "plain.yml", *options[:2]) == 0
    assert "./merged --lora-merge-cache FOLDER" in capsys.readouterr().err
    comment = (tmp_path / "plain.yml").read_text()
    assert "# Merge it with --lora-merge-cache FOLDER.\n" in comment
