"""Repeats the experiment of docs/evaluation.md: trains, merges, measures, writes.

python docs/experiments/run.py OUT            everything; checkpoints go to OUT
python docs/experiments/run.py --tables-only  pages and pictures from results.json

Each seed runs in its own process on one thread, as many at a time as there are cores.
OUT keeps what is finished, so a run that was stopped continues from there.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from corpora import DOMAINS, fingerprints
from family import Size, one_quiet_thread
from merges import MIXTURES, PLANS
from page import HERE, write_pages
from seeds import Mixtures, Record, one_seed

from mergekit_metagpt import register

SEEDS = (0, 1, 2)


def _seed(
    out: Path, size: Size, mixtures: Mixtures, seed: int
) -> dict[str, list[Record]]:
    """Run one seed on one thread, without the log lines about lambda."""
    os.environ["MERGEKIT_METAGPT_QUIET"] = "1"
    logging.getLogger("mergekit_metagpt").setLevel(logging.ERROR)
    register()
    with one_quiet_thread():
        return one_seed(out / f"seed{seed}", size, seed, mixtures)


def _each_seed(
    out: Path, size: Size, seeds: tuple[int, ...], mixtures: Mixtures
) -> Iterator[dict[str, list[Record]]]:
    one = partial(_seed, out, size, mixtures)
    workers = min(len(seeds), os.cpu_count() or 1)
    if workers == 1:
        yield from map(one, seeds)
        return
    # Spawn, not fork: a fork of a process that has used torch's threads may hang.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(one, seeds)


def experiment(
    out: Path, size: Size, seeds: tuple[int, ...], mixtures: Mixtures
) -> dict[str, Any]:
    """Run all seeds and gather their records, with the setting to repeat them."""
    results: dict[str, Any] = {
        "setting": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "size": vars(size),
            "domains": list(DOMAINS),
            "specialists": {name: vars(plan) for name, plan in PLANS.items()},
            "mixtures": {name: list(models) for name, models in mixtures.items()},
            "texts": fingerprints(),
        }
    }
    for records_by_kind in _each_seed(out, size, seeds, mixtures):
        for kind, records in records_by_kind.items():
            results.setdefault(kind, []).extend(records)
    return results


def written(results: dict[str, Any]) -> str:
    """Write results as JSON, one record per line."""
    parts = [f'"setting": {json.dumps(results["setting"])}']
    for kind, records in results.items():
        if kind != "setting":
            lines = ",\n".join(json.dumps(record) for record in records)
            parts.append(f'"{kind}": [\n{lines}\n]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", nargs="?", type=Path, help="folder for checkpoints")
    parser.add_argument("--tables-only", action="store_true", help="train nothing")
    parser.add_argument(
        "--tiny", action="store_true", help="a few steps of training, one mixture"
    )
    parser.add_argument(
        "--to", type=Path, default=HERE.parent, help="folder of evaluation.md"
    )
    options = parser.parse_args()
    if options.out is None and not options.tables_only:
        parser.error("name a folder OUT, or give --tables-only")
    target = options.to / "experiments" / "results.json"
    if not options.tables_only:
        size, seeds, mixtures = Size(), SEEDS, MIXTURES
        if options.tiny:
            size = replace(size, width=32, base_steps=2, length=0.02, windows=2)
            seeds = SEEDS[:1]
            mixtures = {"one LoRA": MIXTURES["one LoRA"]}
        results = experiment(options.out, size, seeds, mixtures)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(written(results))
    write_pages(options.to)


if __name__ == "__main__":
    main()
