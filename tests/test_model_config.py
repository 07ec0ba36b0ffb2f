"""What config.json may say: measured whatever it says, merged only if it fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_metagpt import scan
from mergekit_metagpt.checkpoints.checkpoint import Checkpoint
from mergekit_metagpt.checkpoints.opening import open_checkpoint
from tests.families import llama_state, tuned, write_model

BASE = llama_state()
TUNED = tuned(BASE, seed=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A fine-tune beside its base."""
    write_model(tmp_path / "base", BASE)
    return write_model(tmp_path / "model", TUNED)


def change(model: Path, **keys: Any) -> None:
    """Keys of a model's config.json."""
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


def opened(model: Path) -> Checkpoint:
    return open_checkpoint(str(model))


ODD: dict[str, dict[str, Any]] = {
    "model_type": {"model_type": ["llama"]},
    "unknown": {"model_type": "unheard-of"},
    "no-architecture": {"architectures": []},
    "two-architectures": {"architectures": ["LlamaForCausalLM", "LlamaModel"]},
    "a-word": {"architectures": "LlamaForCausalLM"},
    "a-word-of-width": {"hidden_size": "32"},
    "no-heads": {"num_attention_heads": 0},
    "dtype": {"dtype": "float99"},
    "method": {"to_dict": 3},
    "labels": {"id2label": [1]},
}


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_merged_can_be_measured(name: str, model: Path) -> None:
    base = model.parent / "base"
    expected = scan(base, [model]).pool("model").sq_norms
    assert opened(model).refused is None
    change(model, **ODD[name])
    found = scan(base, [model]).pool("model").sq_norms
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    refused = opened(model).refused
    assert refused is not None
    assert refused.startswith(f"{model}/config.json of {model} "), refused
    assert refused.endswith(". Repair it, or fetch the model again"), refused


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff"])
def test_what_is_no_object_can_be_measured(content: bytes, model: Path) -> None:
    (model / "config.json").write_bytes(content)
    assert scan(model.parent / "base", [model]).pool("model").sq_norms.item() > 0
    assert f"{model}/config.json" in (opened(model).refused or "")


def test_layers_beyond_the_number_are_left_out(model: Path) -> None:
    """As of models that predict several tokens: mergekit does not write them."""
    change(model, num_hidden_layers=2)
    found = opened(model)
    assert found.refused is None
    assert found.layers == {"default": 2}


def test_an_architecture_that_its_user_gives_counts(model: Path) -> None:
    from mergekit.common import ModelReference

    change(model, architectures=["Unheard", "Of"])
    reference = ModelReference.model_validate(
        {"model": str(model), "override_architecture": "LlamaForCausalLM"}
    )
    assert opened(model).refused
    assert open_checkpoint(reference).refused is None


def test_files_without_a_configuration_can_be_measured(model: Path) -> None:
    (model / "config.json").unlink()
    found = opened(model)
    assert found.refused == f"{model} has no config.json; expected a model's folder"
    assert (found.model_type, found.layers) == (None, {})


@pytest.mark.parametrize("nested", [True, False])
def test_tensors_under_state_dict_can_be_measured_not_merged(
    nested: bool, model: Path
) -> None:
    """mergekit finds them in its index, but not when it loads them."""
    (model / "model.safetensors").unlink()
    file = model / "pytorch_model.bin"
    torch.save({"state_dict": TUNED} if nested else TUNED, file)
    assert scan(model.parent / "base", [model]).pool("model").sq_norms.item() > 0
    refused = opened(model).refused
    assert (f"{file} of {model} holds tensors under state_dict" in str(refused)) == (
        nested
    )
