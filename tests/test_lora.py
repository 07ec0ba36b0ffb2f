"""LoRA adapters: measured from factors as PEFT applies them, and combined by PEFT."""

from __future__ import annotations

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
from tests.families import State

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
