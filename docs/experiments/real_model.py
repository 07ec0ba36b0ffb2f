"""Repeats the experiment on Gemma 3 270M of docs/evaluation.md, step by step.

python docs/experiments/real_model.py prepare OUT    fetches the model and the texts
python docs/experiments/real_model.py train OUT      trains the specialists
python docs/experiments/real_model.py evaluate OUT   merges and measures
python docs/experiments/real_model.py write OUT      writes real_model.json
python docs/experiments/real_model.py all OUT        all of them, in this order
python docs/experiments/real_model.py repeat OUT     adds the first seed, trained again

Everything runs on one thread. Each step keeps what is finished in OUT, so a run that
was stopped continues from there. Several processes may work on one OUT at a time.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from family import one_quiet_thread
from real_family import (
    BATCH,
    CHUNK,
    CHUNKS,
    PLANS,
    WINDOW,
    Folders,
    evaluate,
    load,
    prepare,
    specialists,
    tokens,
    train,
)
from real_merges import (
    MIXTURES,
    PRIOR_RATE,
    file_against_memory,
    grams,
    measure_mixture,
)
from real_texts import DOMAINS
from run import written

from mergekit_metagpt import register

SEEDS = (0, 1, 2)
RESULTS = Path(__file__).resolve().parent / "real_model.json"


def _measure_models(folders: Folders) -> None:
    """Measure the base and each specialist on all domains."""
    for name in ("base", *specialists()):
        log = folders.own / f"measured {name}.json"
        if not log.exists():
            result = evaluate(load(folders.model(name)), folders, DOMAINS)
            log.write_text(json.dumps({"model": name, **asdict(result)}))


def _check_precision(folders: Folders) -> None:
    """Compare losses under bfloat16 autocast with those of float32.

    The effect to compare with is a difference between two models, so the errors of
    differences are kept too.
    """
    log = folders.own / "precision.json"
    if log.exists():
        return
    each: dict[str, list[float]] = {}
    for name in ("base", "code"):
        model = load(folders.model(name))
        for precise in (False, True):
            result = evaluate(model, folders, ("code", "worked"), precise=precise)
            losses = torch.tensor([result.loss[d] for d in ("code", "worked")])
            each[f"{name} {'float32' if precise else 'bfloat16'}"] = losses.mean(
                1
            ).tolist()
    model = load(folders.base)
    inputs = tokens(folders)["code training"][: 2 * WINDOW].view(2, WINDOW)
    step = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        model.zero_grad()
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters()])
        step.append((float(loss.detach()), flat))
    (low, g), (high, h) = step
    cosine = float(torch.nn.functional.cosine_similarity(g, h, dim=0))
    record = {"losses": each, "step": [low, high], "gradient_cosine": cosine}
    log.write_text(json.dumps(record))


def _short(value: Any) -> Any:
    """Round every number to 5 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _short(entry) for key, entry in value.items()}
    return [_short(entry) for entry in value] if isinstance(value, list) else value


def _gather(folders: Folders) -> dict[str, Any]:
    """Read what the steps kept of one seed."""
    known = grams(folders)
    gram = torch.tensor(known["gram"], dtype=torch.float64)
    lengths = gram.diagonal().sqrt()
    models = []
    for row, name in enumerate(("base", *known["names"])):
        record = json.loads((folders.own / f"measured {name}.json").read_text())
        if row:
            record["sq_norm"] = float(gram[row - 1, row - 1])
            record["of_embeddings"] = known["of_embeddings"][row - 1]
        models.append(record)
    merges = [
        json.loads(line)
        for mixture in MIXTURES
        if (log := folders.own / "merges" / f"{mixture}.jsonl").exists()
        for line in log.read_text().splitlines()
    ]
    return {
        "seed": folders.seed,
        "models": _short(models),
        "cosines": _short((gram / lengths / lengths[:, None]).tolist()),
        "merges": _short(merges),
    }


def _setting(folders: Folders) -> dict[str, Any]:
    """Read what all seeds share, and what was checked on the first."""
    prepared = json.loads((folders.out / "prepared.json").read_text())
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "domains": list(DOMAINS),
        "plans": [asdict(plan) for plan in PLANS],
        "tokens_a_step": WINDOW * BATCH,
        "chunks": CHUNKS,
        "chunk": CHUNK,
        "prior_rate": PRIOR_RATE,
        "mixtures": {name: list(models) for name, models in MIXTURES.items()},
        "prepared": _short(prepared),
        "precision": json.loads((folders.own / "precision.json").read_text()),
        "file_minus_memory": json.loads((folders.own / "file.json").read_text()),
        "base_sq_norm": grams(folders)["base"],
    }


def _evaluate(folders: Folders) -> None:
    """Measure models and merges; of seeds other than 0, those of `FEW` methods."""
    _measure_models(folders)
    same = folders.own / "file.json"
    if folders.seed == 0:
        _check_precision(folders)
        if not same.exists():
            same.write_text(json.dumps(file_against_memory(folders)))
    for first in (True, False) if folders.seed == 0 else (True,):
        for mixture in MIXTURES:
            measure_mixture(folders, mixture, first=first)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "step", choices=("prepare", "train", "evaluate", "write", "all", "repeat")
    )
    parser.add_argument("out", type=Path, help="folder for models and measurements")
    parser.add_argument("--to", type=Path, default=RESULTS, help="where `write` writes")
    options = parser.parse_args()
    seeds = [Folders(options.out.resolve(), seed) for seed in SEEDS]
    os.environ["MERGEKIT_METAGPT_QUIET"] = "1"
    logging.getLogger("mergekit_metagpt").setLevel(logging.ERROR)
    register()
    with one_quiet_thread():
        if options.step in ("prepare", "all"):
            prepare(seeds[0])
        for folders in seeds:
            if options.step in ("train", "all"):
                for plan in PLANS:
                    train(folders, plan)
            if options.step in ("evaluate", "all"):
                _evaluate(folders)
        if options.step in ("write", "all"):
            results = {
                "setting": _setting(seeds[0]),
                "seeds": [_gather(folders) for folders in seeds],
            }
            options.to.write_text(written(results))
        if options.step == "repeat":
            results = json.loads(options.to.read_text())
            results["repeated"] = [_gather(seeds[0])]
            options.to.write_text(written(results))


if __name__ == "__main__":
    main()
