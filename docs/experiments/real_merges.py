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
    iso_merge,
    lines,
    magic_length,
    tsv_merge,
    weighted,
    wudi_merge,
)

from mergekit_metagpt import coefficients, scan

MIXTURES = {
    "two equal": ("worked", "german"),
    "three equal": ("worked", "german", "chat"),
    "code and worked": ("code", "worked"),
    "code, worked, german": ("code", "worked", "german"),
    "worked long": ("worked_long", "german", "chat"),
    "worked short": ("worked_short", "german", "chat"),
    "code short": ("code_short", "worked", "german"),
    "one LoRA": ("worked", "german", "legal_lora"),
    "all five": ("code", "worked", "german", "chat", "legal_lora"),
}
FEW = ("average", "metagpt", "power 1", "power -1")
# Mixtures that the methods on singular vectors are tried on: they take minutes each.
DECOMPOSED = ("two equal", "three equal", "worked short")
PRIOR_RATE = 2.0


def _linear(sq_norms: torch.Tensor) -> dict[str, list[float]]:
    """List the coefficients of the rows that are linear in the task vectors."""
    count = len(sq_norms)
    shares = coefficients(sq_norms)
    lift = torch.ones(count, dtype=torch.float64)
    least = int(shares.argmin())
    lift[least] = lifting_weight(float(shares[least]), 1 / count)
    rows = {
        "average": coefficients(sq_norms, power=0.0),
        "metagpt": shares,
        "power 1": coefficients(sq_norms, power=1.0),
        "power -1": coefficients(sq_norms, power=-1.0),
        "power -2": coefficients(sq_norms, power=-2.0),
        "weight": coefficients(sq_norms, lift),
        "lambda 1.5": coefficients(sq_norms, scale=1.5),
    }
    for weight in (0.3, 0.5, 1.0):
        rows[f"task arithmetic {weight}"] = torch.full((count,), weight)
    return {name: lambdas.tolist() for name, lambdas in rows.items()}


def _of_mergekit(count: int) -> dict[str, tuple[str, Any]]:
    """List the rows that mergekit merges: its name of the method, and parameters."""
    share = {"weight": 1 / count}
    sparse = {"density": DENSITY}
    della = {**sparse, "epsilon": 0.15}
    rows: dict[str, tuple[str, Any]] = {
        "layer": ("metagpt", {"granularity": "layer"}),
        "tensor": ("metagpt", {"granularity": "tensor"}),
        "exclude": ("metagpt", {"exclude": "embed_tokens,lm_head"}),
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


def grams(folders: Folders) -> dict[str, Any]:
    """Scan all specialists once; read what was measured from then on."""
    log = folders.own / "grams.json"
    if not log.exists():
        names = list(specialists())
        paths = [folders.model(name) for name in names]
        pooled = scan(folders.base, paths, gram=True).pool()
        assert pooled.gram is not None
        record = {
            "names": names,
            "gram": pooled.gram.tolist(),
            "of_embeddings": pooled.embeddings.tolist(),
            "base": float(pooled.base_sq_norms[0]),
        }
        log.write_text(json.dumps(record))
    return dict(json.loads(log.read_text()))


class Inputs:
    """A base with its specialists in memory, float32, and what was measured of them."""

    def __init__(self, folders: Folders, names: tuple[str, ...]) -> None:
        """Load them."""
        self.folders, self.names = folders, names
        self.model = load(folders.base)
        self.base = self._state(self.model)
        self.states = [self._state(load(folders.model(name))) for name in names]
        known = grams(folders)
        rows = torch.tensor([known["names"].index(name) for name in names])
        whole = torch.tensor(known["gram"], dtype=torch.float64)
        self.gram = whole[rows][:, rows]
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
            float((state[name] - self.base[name]).square().sum()) for name in state
        )
        return {"loss": result.loss, "right": result.right, "sq_length": moved}

    def with_tau(self, tau: Tau) -> Tau:
        """Add a merged task vector to the base."""
        return {name: self.base[name] + tau[name] for name in tau}

    def with_lambdas(self, lambdas: list[float]) -> Tau:
        """Compute theta_0 + sum_t lambda_t tau_t, as all linear methods do."""
        parts = [self.base, *self.states]
        return weighted(parts, [1 - sum(lambdas), *lambdas])


def _merged_by_mergekit(inputs: Inputs, method: str, parameters: Any) -> Tau:
    from mergekit.merge_methods import merge_state_dicts

    torch.manual_seed(0)
    named = dict(
        zip(("base", *inputs.names), (inputs.base, *inputs.states), strict=True)
    )
    return dict(merge_state_dicts(named, method, base="base", parameters=parameters))


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
                label = name if scale == 1 else f"{name} by K"
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
    for row, lambdas in _linear(inputs.sq_norms).items():
        if (row in FEW) == first:
            yield row, partial(inputs.with_lambdas, lambdas)
    if first:
        return
    count = len(inputs.names)
    for row, (method, parameters) in _of_mergekit(count).items():
        yield row, partial(_merged_by_mergekit, inputs, method, parameters)
    if count == 2:
        config = frank(inputs.folders, inputs.names)
        yield "FRANK's prior", lambda: _file(merge(config, inputs.folders.merged, 0))
    for row, rival in _rivals(inputs, mixture in DECOMPOSED):
        yield row, partial(lambda by: inputs.with_tau(by(inputs.taus())), rival)


def measure_mixture(folders: Folders, mixture: str, *, first: bool) -> None:
    """Merge and measure one mixture; a process that was stopped goes on.

    Args:
        folders: where base, specialists and records are.
        mixture: one of `MIXTURES`.
        first: merge by the methods of `FEW`; else by all others.
    """
    log = folders.own / "merges" / f"{mixture}.jsonl"
    log.parent.mkdir(exist_ok=True)
    with claimed(log.with_suffix(".lock")) as is_free:
        if not is_free:
            return
        known = log.read_text().splitlines() if log.exists() else []
        done = {json.loads(line)["method"] for line in known}
        inputs = Inputs(folders, MIXTURES[mixture])
        for row, merged in _rows(inputs, mixture, first):
            if row not in done:
                measured = inputs.measure(merged())
                record = {"mixture": mixture, "method": row, **measured}
                with log.open("a") as file:
                    file.write(json.dumps(record) + "\n")
                print(mixture, row, flush=True)


def file_against_memory(folders: Folders, mixture: str = "two equal") -> float:
    """Compare `mergekit-yaml`'s file with the merge in memory: largest difference."""
    names = MIXTURES[mixture]
    inputs = Inputs(folders, names)
    models = [folders.model(name) for name in names]
    config = configuration(folders.base, models, Method("metagpt", {}))
    on_disk = _file(merge(config, folders.merged, 0))
    in_memory = inputs.with_lambdas(_linear(inputs.sq_norms)["metagpt"])
    return max(float((on_disk[n] - in_memory[n]).abs().max()) for n in on_disk)
