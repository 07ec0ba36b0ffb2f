"""Lists the real model's mixtures and rows, and merges and measures them in memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from merges import DENSITY, Method, configuration, lifting_weight, merge
from real_family import LAYERS, Folders, claimed, evaluate, load, specialists
from real_rivals import (
    Tau,
    by_matrix,
    decaying_prior,
    gram,
    iso_merge,
    lines,
    magic_length,
    tsv_merge,
    weighted,
    wudi_merge,
)

from mergekit_metagpt import coefficients

MIXTURES = {
    "two equal": ("code", "worked"),
    "three equal": ("code", "worked", "german"),
    "four equal": ("code", "worked", "german", "chat"),
    "worked long": ("code", "worked_long", "german"),
    "worked short": ("code", "worked_short", "german"),
    "code short": ("code_short", "worked", "chat"),
    "short and long": ("code_short", "worked_long"),
    "one LoRA": ("code", "worked", "legal_lora"),
    "five, one LoRA": ("code", "worked", "german", "chat", "legal_lora"),
}
# Further pairs, merged by few methods, for the thresholds.
PAIRS = (
    ("code", "german"),
    ("code", "chat"),
    ("worked", "german"),
    ("worked", "chat"),
    ("german", "chat"),
    ("worked_long", "german"),
    ("worked_long", "chat"),
    ("code", "worked_short"),
    ("code_short", "german"),
    ("worked_short", "chat"),
    ("legal_lora", "german"),
    ("legal_lora", "worked_long"),
)
FEW = ("average", "metagpt", "power 1", "power -1")
# Mixtures that the methods on singular vectors are tried on: they take minutes each.
DECOMPOSED = ("two equal", "three equal", "short and long", "worked long")
PRIOR_RATE = 2.0


def mixtures() -> dict[str, tuple[str, ...]]:
    """List all mixtures by name; a further pair is called by its models."""
    return MIXTURES | {" + ".join(pair): pair for pair in PAIRS}


def _of_mergekit(count: int, lift: list[float]) -> dict[str, tuple[str, Any]]:
    """List the rows that mergekit merges: its name of the method, and parameters."""
    share = {"weight": 1 / count}
    sparse = {"density": DENSITY}
    della = {**sparse, "epsilon": 0.15}
    rows: dict[str, tuple[str, Any]] = {
        "average": ("linear", {"weight": 1.0}),
        "metagpt": ("metagpt", {}),
        "power 1": ("metagpt", {"power": 1.0}),
        "power -1": ("metagpt", {"power": -1.0}),
        "power -2": ("metagpt", {"power": -2.0}),
        "task arithmetic 0.3": ("task_arithmetic", {"weight": 0.3}),
        "task arithmetic 0.5": ("task_arithmetic", {"weight": 0.5}),
        "task arithmetic 1.0": ("task_arithmetic", {"weight": 1.0}),
        "layer": ("metagpt", {"granularity": "layer"}),
        "tensor": ("metagpt", {"granularity": "tensor"}),
        "exclude": ("metagpt", {"exclude": "embed_tokens,lm_head"}),
        "weight": ("metagpt", {"weight": lift}),
        "lambda 1.5": ("metagpt", {"lambda": 1.5}),
        "ties": ("ties", {**sparse, **share}),
        "dare linear": ("dare_linear", {**sparse, **share}),
        "dare ties": ("dare_ties", {**sparse, **share}),
        "sce": ("sce", {}),
        "model stock": ("model_stock", {}),
        "metagpt + ties": ("metagpt_ties", sparse),
        "metagpt + dare linear": ("metagpt_dare_linear", sparse),
        "metagpt + dare ties": ("metagpt_dare_ties", sparse),
        "metagpt + breadcrumbs": ("metagpt_breadcrumbs", sparse),
        "metagpt + della": ("metagpt_della", della),
    }
    return rows


class Inputs:
    """A base with its specialists in memory, float32, and what was measured of them."""

    def __init__(self, folders: Folders, names: tuple[str, ...]) -> None:
        """Load them."""
        self.folders, self.names = folders, names
        self.model = load(folders.base)
        self.base = self._state(self.model)
        self.states = [self._state(load(folders.model(name))) for name in names]
        self.gram = gram(self.taus())
        self.sq_norms = self.gram.diagonal()
        self.domains = tuple(specialists()[name].domain for name in names)

    @staticmethod
    def _state(model: Any) -> Tau:
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    def taus(self) -> list[Tau]:
        """Compute the task vectors."""
        return [
            {name: state[name] - self.base[name] for name in state}
            for state in self.states
        ]

    @torch.no_grad()
    def measure(self, state: Tau) -> dict[str, Any]:
        """Measure a merged model on the domains of its mixture."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[name])
        result = evaluate(self.model, self.folders, self.domains)
        moved = sum(
            float((state[name] - self.base[name]).double().square().sum())
            for name in state
        )
        return {"loss": result.loss, "right": result.right, "sq_length": moved}

    def with_tau(self, tau: Tau) -> Tau:
        """Add a merged task vector to the base."""
        return {name: self.base[name] + tau[name] for name in tau}


def _merged_by_mergekit(inputs: Inputs, method: str, parameters: Any) -> Tau:
    from mergekit.merge_methods import merge_state_dicts

    torch.manual_seed(0)
    states: list[Tau] = list(inputs.states)
    # mergekit's `linear` takes no base; all others get it first.
    if method == "linear":
        weights = [parameters["weight"]] * len(states)
        return dict(merge_state_dicts(states, method, parameters={"weight": weights}))
    named = {"base": inputs.base, **dict(zip(inputs.names, states, strict=True))}
    given = dict(parameters)
    if isinstance(given.get("weight"), list):
        given["weight"] = dict(zip(inputs.names, given["weight"], strict=True))
    return dict(merge_state_dicts(named, method, base="base", parameters=given))


def _rivals(inputs: Inputs, decompose: bool) -> Iterator[tuple[str, Any]]:
    """Yield each rival's name and a function that merges by it."""
    count = len(inputs.names)
    average = torch.full((count,), 1 / count, dtype=torch.float64)
    for name, lambdas in (
        ("average, MAGIC's length", average),
        ("metagpt, MAGIC's length", coefficients(inputs.sq_norms)),
    ):
        scale = magic_length(lambdas, inputs.gram)
        yield name, partial(weighted, lambdas=(scale * lambdas).tolist())
    yield (
        "average, LiNeS",
        lambda taus: lines(weighted(taus, average.tolist()), LAYERS, 0.5, 1.5),
    )
    if decompose:
        for name, by in (("TSV-M", tsv_merge), ("Iso-C", iso_merge)):
            for scale in (1.0, 1 / count):
                label = name if scale == 1 else f"{name} / K"
                yield label, partial(by_matrix, merge=by, scale=scale)
        yield "WUDI", partial(by_matrix, merge=wudi_merge)


def frank(folders: Folders, names: tuple[str, ...]) -> dict[str, Any]:
    """Write FRANK's prior over layers as a YAML: the first model leads early.

    `granularity: layer`, and a gradient in each model's `weight`.
    """
    config = configuration(
        folders.base,
        [folders.model(name) for name in names],
        Method("metagpt", {"granularity": "layer"}),
    )
    prior = decaying_prior(LAYERS, PRIOR_RATE)
    for entry, weights in zip(config["models"], prior, strict=True):
        entry["parameters"] = {"weight": weights}
    return config


def _file(path: Path) -> Tau:
    return Inputs._state(load(path))


def _rows(
    inputs: Inputs, mixture: str, first: bool
) -> Iterator[tuple[str, Callable[[], Tau]]]:
    """Yield the rows of a mixture and how to merge each; `first` yields `FEW` only."""
    shares = coefficients(inputs.sq_norms).tolist()
    least = shares.index(min(shares))
    lift = [1.0] * len(shares)
    lift[least] = lifting_weight(shares[least], 1 / len(shares))
    for row, (method, parameters) in _of_mergekit(len(shares), lift).items():
        if (row in FEW) == first:
            yield row, partial(_merged_by_mergekit, inputs, method, parameters)
    if first:
        return
    if len(shares) == 2:
        config = frank(inputs.folders, inputs.names)
        yield "FRANK's prior", lambda: _file(merge(config, inputs.folders.merged, 0))
    for row, rival in _rivals(inputs, mixture in DECOMPOSED):
        yield row, partial(lambda by: inputs.with_tau(by(inputs.taus())), rival)


def measure_mixture(folders: Folders, mixture: str, *, first: bool) -> None:
    """Merge and measure one mixture; a process that was stopped goes on.

    Args:
        folders: where base, specialists and records are.
        mixture: one of `mixtures`.
        first: merge by the methods of `FEW`; else by all others.
    """
    log = folders.out / "merges" / f"{mixture}.jsonl"
    log.parent.mkdir(exist_ok=True)
    with claimed(log.with_suffix(".lock")) as is_free:
        if not is_free:
            return
        known = log.read_text().splitlines() if log.exists() else []
        done = {json.loads(line)["method"] for line in known}
        inputs = Inputs(folders, mixtures()[mixture])
        for row, merged in _rows(inputs, mixture, first):
            if row not in done:
                measured = inputs.measure(merged())
                record = {"mixture": mixture, "method": row, **measured}
                with log.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(mixture, row, flush=True)


def file_against_memory(folders: Folders, mixture: str = "two equal") -> float:
    """Compare `mergekit-yaml`'s file with the merge in memory: largest difference."""
    names = mixtures()[mixture]
    inputs = Inputs(folders, names)
    models = [folders.model(name) for name in names]
    config = configuration(folders.base, models, Method("metagpt", {}))
    on_disk = _file(merge(config, folders.merged, 0))
    in_memory = _merged_by_mergekit(inputs, "metagpt", {})
    return max(float((on_disk[n] - in_memory[n]).abs().max()) for n in on_disk)
