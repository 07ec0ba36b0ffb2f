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
from mergekit_metagpt.scanning import cache, once, one_pass
from mergekit_metagpt.scanning.once import measure
from mergekit_metagpt.scanning.results import ScanResult
from tests.adapters import (
    PEFT_WARNS,
    Tuned,
    architectures,
    distinct,
    loaded,
    taus_of,
    write_tuned,
)
from tests.families import State, run_command

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
    "gpt_oss": (  # experts are stored as a stack, transposed and square
        {"r": 4, "target_modules": ["q_proj"], **STACK},
        {"r": 2, "use_rslora": True, "target_modules": ["k_proj"], **STACK},
    ),
}
EACH = pytest.mark.parametrize("name", SETTINGS)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that has measured nothing."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "scans"))
    for name in ("_PAIRS", "_REQUESTS", "_FAILURES"):
        monkeypatch.setattr(once, name, {})


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
    flat = torch.stack(
        [torch.cat([t.reshape(-1) for t in tau.values()]) for tau in taus]
    )
    return flat @ flat.T


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
    monkeypatch.setattr(one_pass, "SEGMENT", 700)
    monkeypatch.setattr(one_pass, "PIECE", 130)
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
    once._PAIRS.clear()
    once._REQUESTS.clear()
    monkeypatch.setattr(once, "scan_checkpoints", None)
    monkeypatch.setattr(once.factors, "scan_adapters", None)
    again = mergekit_metagpt.scan(family.base, models, gram=True)
    assert torch.equal(again.pool("model").gram, result.pool("model").gram)


# ---- PEFT's call ---------------------------------------------------------------------


def combined_by(lines: str, base: Path) -> State:
    """The parameters after the printed lines were run on a base in float64."""
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
    return distinct(names["model"].merge_and_unload())  # type: ignore[attr-defined]


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, Any]:
    """The lines that `inspect --peft` prints, and the report."""
    file = Path(str(arguments[-1]))
    assert run_command("inspect", *arguments[:-1], "--peft", "--json", file) == 0
    text = capsys.readouterr().out
    return text[text.index("from peft import") :], json.loads(file.read_text())


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
    case: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, settings = COMBINED[case]
    family = write_tuned(tmp_path, architectures()[name], *settings)
    lines, report = printed(capsys, *family.adapters, tmp_path / "report.json")
    if kind == "svd":
        (rank,) = re.findall(r"svd_rank=(\d+)", lines)
        lines = lines.replace('"cat"', f'"svd", svd_rank={rank}')
    models = report["families"][0]["models"]
    weights = [model["coefficient"] for model in models]
    assert math.isclose(sum(weights), 1)
    taus, base = taus_of(family), distinct(loaded(family.base))
    combined = combined_by(lines, family.base)
    for weight, before in base.items():
        tau = sum(w * tau[weight] for w, tau in zip(weights, taus, strict=True))
        torch.testing.assert_close(combined[weight], before + tau, rtol=1e-6, atol=1e-6)


def test_linear_is_not_the_sum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [{"r": 4, "target_modules": ["q_proj"]}] * 2
    family = write_tuned(tmp_path, architectures()["llama"], *settings)
    lines, report = printed(capsys, *family.adapters, tmp_path / "report.json")
    base, taus = distinct(loaded(family.base)), taus_of(family)
    weights = [m["coefficient"] for m in report["families"][0]["models"]]

    def off(kind: str) -> float:
        combined = combined_by(lines.replace('"cat"', f'"{kind}"'), family.base)
        squares = 0.0
        for name, before in base.items():
            tau = sum(w * t[name] for w, t in zip(weights, taus, strict=True))
            squares += float((combined[name] - before - tau).square().sum())
        return math.sqrt(squares)

    length = math.sqrt(float(gram_of(taus).diagonal().max()))
    assert off("cat") < 1e-6 * length
    assert off("linear") > 0.1 * length


def test_lambda_scales_the_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [{"r": 4, "target_modules": ["q_proj"]}] * 2
    family = write_tuned(tmp_path, architectures()["llama"], *settings)
    config = {
        "merge_method": "metagpt",
        "base_model": str(family.base),
        "models": [{"model": f"{family.base}+{at}"} for at in family.adapters],
        "parameters": {"lambda": 1.5},
    }
    (tmp_path / "merge.yml").write_text(json.dumps(config))
    lines, report = printed(capsys, tmp_path / "merge.yml", tmp_path / "report.json")
    (weights,) = re.findall(r"weights=\[(.*)\]", lines)
    models = report["families"][0]["models"]
    assert list(map(float, weights.split(", "))) == [
        1.5 * model["coefficient"] for model in models
    ]
    assert report["refused"] is None
    assert report["families"][0]["base"]["not_written"]["count"] == 0
    assert [name for name, _ in re.findall(r"(\w+)=\['(.*?)'", lines)] == ["adapters"]


NOT_COMBINED: dict[str, tuple[str, list[dict[str, Any]], Sequence[str], str]] = {
    "experts": ("gpt_oss", [{"r": 4, **STACK}], (), "adapts parameters"),
    "layers": (
        "llama",
        [
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            {"target_modules": ["q_proj"]},
        ],
        (),
        "another layers_to_transform than",
    ),
    "a pattern and a list": (
        "llama",
        [{"target_modules": [".*q_proj"]}, {"target_modules": ".*q_proj"}],
        (),
        "is a pattern and that of",
    ),
    "by layer": (
        "llama",
        [{"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]}],
        ("--granularity", "layer"),
        "Give --granularity model",
    ),
    "beside JSON": (
        "llama",
        [{"target_modules": ["q_proj"]}],
        ("--json", "-"),
        "--peft prints to stdout",
    ),
}


@pytest.mark.parametrize("case", NOT_COMBINED)
def test_what_peft_cannot_combine_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, settings, options, words = NOT_COMBINED[case]
    if case == "a pattern and a list":
        settings = [{"target_modules": ["q_proj"]}, settings[1]]
    family = write_tuned(tmp_path, architectures()[name], *settings)
    assert run_command("inspect", *family.adapters, "--peft", *options) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
