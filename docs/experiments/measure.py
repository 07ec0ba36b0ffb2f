"""Measures models: held-out loss, score, and the two assumptions of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from corpora import ANSWER_AFTER, DOMAINS, text
from family import WINDOW, encode, load


@dataclass(frozen=True)
class Evaluation:
    """One model on held-out text, by domain.

    Attributes:
        loss: mean next-byte cross entropy, nats.
        score: from 0 to 1. For domains with answers, the share of answers that greedy
            decoding gets entirely right, after the lines before as examples. For other
            domains, the share of bytes whose most likely prediction is right.
    """

    loss: dict[str, float]
    score: dict[str, float]


@cache
def held_out(domain: str, windows: int) -> torch.Tensor:
    """Cut evenly spaced windows of held-out text, shape `(windows, WINDOW)`, int64."""
    tokens = encode(text(domain, held_out=True))
    starts = [len(tokens) * k // windows for k in range(windows)]
    return torch.stack([tokens[start : start + WINDOW] for start in starts])


def _exact_match(domain: str, inputs: torch.Tensor, right: torch.Tensor) -> float:
    """Compute the share of answers of which every byte is right, newline included.

    The model sees the correct bytes before each byte. Up to the first wrong byte,
    greedy decoding writes the same bytes, so the result equals that of decoding each
    answer. The first whole line of a window is only an example.
    """
    marker = ord(ANSWER_AFTER[domain])
    results = []
    for row, good in zip(inputs.tolist(), right.tolist(), strict=True):
        ends = [at for at, byte in enumerate(row) if byte == 10]
        for before, end in pairwise(ends[1:]):
            start = row.index(marker, before)
            # good[i] tells whether byte i + 1 was predicted right.
            results.append(all(good[start:end]))
    return sum(results) / len(results)


@torch.inference_mode()
def evaluate(model: Any, windows: int) -> Evaluation:
    """Measure one model on held-out text of all domains, in one batch.

    Args:
        model: a causal language model over bytes, float32.
        windows: held-out windows of each domain.

    Returns:
        its losses and scores.
    """
    inputs = torch.cat([held_out(domain, windows) for domain in DOMAINS])
    logits = model(input_ids=inputs, use_cache=False).logits[:, :-1]
    targets = inputs[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), targets, reduction="none"
    )
    right = logits.argmax(-1) == targets
    loss, score = {}, {}
    for k, domain in enumerate(DOMAINS):
        rows = slice(k * windows, (k + 1) * windows)
        loss[domain] = float(losses[rows].mean())
        if domain in ANSWER_AFTER:
            score[domain] = _exact_match(domain, inputs[rows], right[rows])
        else:
            score[domain] = float(right[rows].float().mean())
    return Evaluation(loss, score)


def weights(path: Path) -> torch.Tensor:
    """Flatten a checkpoint into one vector, float64; a tied head counts once."""
    state = dict(load(path).named_parameters())
    flat = [state[name].detach().double().flatten() for name in sorted(state)]
    return torch.cat(flat)


def quadratic(tau: torch.Tensor, taus: Sequence[torch.Tensor]) -> float:
    """Compute sum_t n_t ||tau - tau_t||^2 / sum_t n_t^2, with n_t = ||tau_t||^2."""
    terms = [float(t.dot(t) * (tau - t).dot(tau - t)) for t in taus]
    return sum(terms) / sum(float(t.dot(t)) ** 2 for t in taus)


def bound(lambdas: Sequence[float], sq_norms: Sequence[float]) -> float:
    """Compute the paper's bound, which assumes orthogonal task vectors.

    sum_t n_t [ sum_{k != t} lambda_k^2 n_k + (1 - lambda_t)^2 n_t ] / sum_t n_t^2,
    for coefficients lambda and squared norms n of equal length.
    """
    total = 0.0
    for t, n in enumerate(sq_norms):
        others = sum(
            c * c * m
            for k, (c, m) in enumerate(zip(lambdas, sq_norms, strict=True))
            if k != t
        )
        total += n * (others + (1 - lambdas[t]) ** 2 * n)
    return total / sum(n * n for n in sq_norms)


@torch.inference_mode()
def bend(base: Path, tuned: Path, domain: str, windows: int) -> dict[str, list[float]]:
    """Follow the outputs of one model along theta_0 + alpha tau.

    Args:
        base: checkpoint of theta_0.
        tuned: checkpoint of theta_0 + tau.
        domain: the domain whose held-out text is the input.
        windows: number of windows of that text.

    Returns:
        lists over `alpha`: `bend`, the distance of the logits from the straight line
        between both ends, divided by the length of that line; and `loss`.
    """
    inputs = held_out(domain, windows)
    model, end = load(base), load(tuned)
    starts = [p.clone() for p in model.parameters()]
    steps = [q - p for p, q in zip(model.parameters(), end.parameters(), strict=True)]
    alphas = [0.0, 0.25, 0.5, 0.75, 1.0]
    outputs, losses = [], []
    for alpha in alphas:
        for p, start, step in zip(model.parameters(), starts, steps, strict=True):
            p.copy_(start + alpha * step)
        output = model(input_ids=inputs, labels=inputs, use_cache=False)
        # Centre the logits: a common shift does not change the softmax.
        outputs.append(output.logits - output.logits.mean(-1, keepdim=True))
        losses.append(float(output.loss))
    line = outputs[-1] - outputs[0]
    bends = [
        float((output - outputs[0] - alpha * line).norm() / line.norm())
        for alpha, output in zip(alphas, outputs, strict=True)
    ]
    return {"alpha": alphas, "bend": bends, "loss": losses}
