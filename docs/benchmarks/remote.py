"""Measures what `inspect --remote` costs and how close it comes; prints Markdown.

    python docs/benchmarks/remote.py FOLDER [--latency-ms 50] [--most-reads 4000]

Writes a base and three fine-tunes of 153 M parameters to FOLDER (1.2 GB, made once),
serves them on loopback as a hub would, and inspects them: headers alone, then with
growing budgets. Real fine-tunes differ; the bytes and the number of requests do not.
Every answer may come late, as over a network. `--most-reads` sets beyond how many
requests blocks are made longer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch
from click.testing import CliRunner
from huggingface_hub import constants

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mergekit_metagpt.commands.cli import main as command  # noqa: E402
from mergekit_metagpt.scanning import once, sampling  # noqa: E402
from tests.families import (  # noqa: E402
    cast,
    llama_config,
    llama_state,
    tuned,
    write_model,
)
from tests.hub import Asked, Hub, serving  # noqa: E402

SIZES = {
    "hidden_size": 768,
    "vocab_size": 32000,
    "intermediate_size": 3072,
    "num_hidden_layers": 11,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
NAMES = ("base", "math", "code", "chat")
BUDGETS = ("20MB", "50MB", "100MB", "200MB")


def write(folder: Path) -> None:
    """Write the family, each model with noise of another size on each tensor."""
    base = llama_state(**SIZES)
    states = {"base": base}
    for seed, name in enumerate(NAMES[1:], 1):
        noise = tuned({n: torch.zeros_like(t) for n, t in base.items()}, seed, 1.0)
        sizes = {n: 1e-3 * (seed + hash_of(n, seed)) for n in base}
        states[name] = {n: base[n] + sizes[n] * noise[n] for n in base}
    for name, state in states.items():
        print(f"writing {name}", file=sys.stderr)
        narrow = cast(state, torch.bfloat16)
        write_model(folder / name, narrow, llama_config(**SIZES))


def hash_of(name: str, seed: int) -> float:
    """A number from 0 to 1 that is the same in every process."""
    return sum(map(ord, name)) * (seed + 7) % 97 / 97


def run(*arguments: str) -> tuple[str, float]:
    """Run a command in this process; return what it prints, and seconds."""
    started = time.perf_counter()
    done = CliRunner().invoke(command, ["inspect", *arguments])
    assert done.exit_code == 0, done.output or done.exception
    return done.stdout, time.perf_counter() - started


def coefficients(printed: str) -> list[dict[str, Any]]:
    return json.loads(printed)["families"][0]["models"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--most-reads", type=int, default=sampling.MOST_READS)
    parser.add_argument("--budgets", nargs="+", default=BUDGETS)
    given = parser.parse_args()
    folder, sampling.MOST_READS = given.folder, given.most_reads
    if not (folder / NAMES[-1]).exists():
        write(folder)
    models = [str(folder / name) for name in NAMES]
    os.environ["MERGEKIT_METAGPT_CACHE"] = "0"
    exact, _ = run("--base", *models, "--json", "-")
    lengths = [model["coefficient"] for model in coefficients(exact)]

    def late(asked: Asked) -> None:
        time.sleep(given.latency_ms / 1e3)

    with serving(Hub(trouble=late)) as hub, tempfile.TemporaryDirectory() as empty:
        constants.HF_HUB_OFFLINE = False
        constants.HF_HUB_CACHE = empty
        constants.ENDPOINT = hub.address
        constants.HUGGINGFACE_CO_URL_TEMPLATE = (
            hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        for name in NAMES:
            hub.add(f"acme/{name}", folder / name)
        models = ["--remote", "--base", *(f"acme/{name}" for name in NAMES)]
        run(*models, "--sample", "0")  # the first run imports transformers
        print(run(*models, "--budget", given.budgets[-1])[0])
        print(machine.describe())
        print("\n| asked for | sent | requests | seconds | largest error | largest ± |")
        print("|---|---|---|---|---|---|")
        for extra in (["--sample", "0"], *(["--budget", b] for b in given.budgets)):
            hub.asked.clear()
            hub.bytes_sent = 0
            once._SAMPLES.clear()
            printed, seconds = run(*models, *extra, "--json", "-")
            cells = [
                f"`{' '.join(extra)}`",
                f"{hub.bytes_sent / 1e6:.1f} MB",
                f"{len(hub.asked):,}",
                f"{seconds:.1f}",
            ]
            if extra[0] == "--budget":
                found = coefficients(printed)
                pairs = zip(found, lengths, strict=True)
                off = max(abs(model["coefficient"] - n) for model, n in pairs)
                error = max(model["coefficient_se"] for model in found)
                cells += [f"{off:.5f}", f"{error:.5f}"]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
