"""Trains a base Llama and specialists; a plan says how each specialist differs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from corpora import DOMAINS, text

WINDOW, BASE_BATCH, BATCH = 128, 16, 8
VOCABULARY = 128  # a token is a byte of ASCII


@dataclass(frozen=True)
class Plan:
    """How one specialist is trained: `rate` is the peak of AdamW's learning rate."""

    domain: str
    steps: int
    rate: float
    lora_rank: int = 0


@dataclass(frozen=True)
class Size:
    """The size of an experiment.

    Attributes:
        width: hidden size of the models, a multiple of 32.
        base_steps: training steps of the base.
        share: part of the base's text that comes from each other domain.
        length: multiplies the training steps of the specialists.
        windows: held-out windows of each domain.
    """

    width: int = 192
    base_steps: int = 500
    share: float = 0.05
    length: float = 1.0
    windows: int = 12


@contextmanager
def one_quiet_thread() -> Iterator[None]:
    """Limit torch to one thread and silence transformers; restore both afterwards."""
    from transformers.utils import logging

    threads, verbosity = torch.get_num_threads(), logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load(path: Path) -> Any:
    """Load a checkpoint in float32 for evaluation."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def encode(words: str) -> torch.Tensor:
    """Turn ASCII text into token numbers, shape `(len(words),)`, int64."""
    return torch.tensor(list(words.encode("ascii")))


def _optimise(
    model: Any, corpus: dict[str, float], steps: int, rate: float, batch: int, seed: int
) -> None:
    """Minimise next-byte cross entropy on domains drawn by their shares."""
    draw = torch.Generator().manual_seed(seed)
    texts = [encode(text(domain)) for domain in corpus]
    shares = torch.tensor(list(corpus.values()))
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, betas=(0.9, 0.95), weight_decay=0.0)
    model.train()
    for step in range(steps):
        warm_up = min(1.0, (step + 1) / max(1, steps // 20))
        decay = 0.1 + 0.45 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * warm_up * decay
        rows = []
        for source in torch.multinomial(
            shares, batch, replacement=True, generator=draw
        ):
            tokens = texts[int(source)]
            at = torch.randint(len(tokens) - WINDOW, (), generator=draw)
            rows.append(tokens[int(at) : int(at) + WINDOW])
        inputs = torch.stack(rows)
        model(input_ids=inputs, labels=inputs, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def train_base(path: Path, size: Size, seed: int) -> None:
    """Train a base on general text and a little of each other domain; save it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.width,
        intermediate_size=size.width * 8 // 3 // 32 * 32,
        num_hidden_layers=4,
        num_attention_heads=size.width // 32,
        max_position_embeddings=2 * WINDOW,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = LlamaForCausalLM(config)
    corpus = dict.fromkeys(DOMAINS, size.share)
    corpus["general"] = 1 - size.share * (len(DOMAINS) - 1)
    _optimise(model, corpus, size.base_steps, 2e-3, BASE_BATCH, seed)
    model.save_pretrained(path)


def train_specialist(base: Path, path: Path, plan: Plan, size: Size, seed: int) -> None:
    """Fine-tune the saved base by a plan, merge a LoRA into the weights, and save."""
    model = load(base)
    if plan.lora_rank:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=plan.lora_rank,
            lora_alpha=2 * plan.lora_rank,
            target_modules="all-linear",
            init_lora_weights=True,
        )
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = get_peft_model(model, settings)
    steps = max(1, round(plan.steps * size.length))
    _optimise(model, {plan.domain: 1.0}, steps, plan.rate, BATCH, seed)
    if plan.lora_rank:
        model = model.merge_and_unload()
    model.save_pretrained(path)
