"""Many merges in one process, eight processes at once, 10,000 tensors by mergekit."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import torch
import yaml

import mergekit_metagpt
from tests.conftest import make_family
from tests.processes import environment, script
from tests.support import (
    assert_within_bound,
    llama_config,
    merge_config,
    naive_coefficients,
    naive_sq_norms,
    read_model,
    run_mergekit,
    tuned,
    write_model,
)

LONG_AGO = 1_600_000_000
LIMIT_S = 600
MOST_KIB = 16_384  # by which memory may grow from the 8th merge to the last
LAYERS = 1_112  # of nine tensors each


def memory_kib() -> int:
    """Resident memory of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in status if line.startswith("VmRSS"))
    return int(line.split()[1])


def held(folder: Path) -> tuple[int, int, int]:
    """Threads, open files, and files below a folder that are mapped."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return (
        threading.active_count(),
        len(list(Path("/proc/self/fd").iterdir())),
        sum(str(folder) in line for line in maps),
    )


def one_after_the_other(folder: Path, granularity: str, count: int = 64) -> None:
    """Merge again and again; what 8 merges needed is enough for the others."""
    family = make_family(folder / granularity, count=2)
    parameters = {"granularity": granularity}
    config = merge_config(family.base, family.models, parameters=parameters)
    seen = []
    for number in range(1, count + 1):
        run_mergekit(config, folder / "out")
        if number % 8 == 0:
            gc.collect()
            seen.append((number, memory_kib(), *held(folder)))
    print(
        f"{count} merges, {granularity}: (merge, KiB, threads, open files, mapped)"
        f" {seen}",
        flush=True,
    )
    assert seen[-1][1] < seen[0][1] + MOST_KIB, "memory grew"
    assert seen[-1][2:] == seen[0][2:], "threads or files grew"


def at_once(folder: Path, count: int = 8) -> None:
    """Let real commands merge the same models with one cache, all at once, twice."""
    family = make_family(folder / "shared", count=3)
    for file in (folder / "shared").rglob("*"):
        os.utime(file, (LONG_AGO, LONG_AGO))
    file = folder / "merge.yml"
    file.write_text(yaml.safe_dump(merge_config(family.base, family.models)))
    env = environment(MERGEKIT_METAGPT_CACHE=str(folder / "cache"))
    for turn in ("empty", "filled"):
        started = time.monotonic()
        outs = [folder / f"{turn}{number}" for number in range(count)]
        running = [
            subprocess.Popen(
                [script("mergekit-metagpt"), "merge", file, out, "--no-copy-tokenizer"],
                env=env,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            for out in outs
        ]
        statuses = [process.wait(LIMIT_S) for process in running]
        assert statuses == [0] * count, statuses
        found = {(out / "model.safetensors").read_bytes() for out in outs}
        assert len(found) == 1, "the results differ"
        entries = sorted(path.name for path in (folder / "cache").iterdir())
        assert len(entries) == 4 and all(e.endswith(".json") for e in entries), entries
        seconds = time.monotonic() - started
        print(
            f"{count} processes, cache {turn}: same bytes, {seconds:.0f} s", flush=True
        )


def many_tensors(folder: Path) -> None:
    """Merge a model of some 10,000 tensors through mergekit."""
    sizes = {
        "num_hidden_layers": LAYERS,
        "hidden_size": 8,
        "intermediate_size": 8,
        "vocab_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    shapes = {"self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8)}
    shapes |= {"self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8)}
    shapes |= {f"mlp.{name}_proj": (8, 8) for name in ("gate", "up", "down")}
    shapes |= {"input_layernorm": (8,), "post_attention_layernorm": (8,)}
    names = {
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(LAYERS)
        for name, shape in shapes.items()
    }
    names |= {"model.embed_tokens.weight": (16, 8), "lm_head.weight": (16, 8)}
    names["model.norm.weight"] = (8,)
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator) for n, s in names.items()}
    states = [tuned(base, seed, size) for seed, size in ((1, 0.01), (2, 0.02))]
    config = llama_config(**sizes)
    paths = [
        write_model(folder / f"large{number}", state, config)
        for number, state in enumerate((base, *states))
    ]
    started = time.monotonic()
    merged = run_mergekit(merge_config(paths[0], paths[1:]), folder / "large-out")
    seconds = time.monotonic() - started
    lambdas = naive_coefficients(naive_sq_norms(base, states))
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert_within_bound(tensor, base[name], [s[name] for s in states], lambdas)
    started = time.monotonic()
    theirs = {
        **merge_config(paths[0], paths[1:]),
        "merge_method": "task_arithmetic",
        "parameters": {"weight": 0.5},
    }
    run_mergekit(theirs, folder / "large-theirs")
    other = time.monotonic() - started
    assert read_model(folder / "large-theirs").keys() == base.keys()
    print(
        f"{len(base)} tensors: {seconds:.0f} s, every element within the bound; "
        f"task_arithmetic {other:.0f} s",
        flush=True,
    )


def main() -> None:
    """Run all, and print what was seen."""
    torch.set_num_threads(1)
    os.environ["MERGEKIT_METAGPT_CACHE"] = "0"
    mergekit_metagpt.register()
    with tempfile.TemporaryDirectory(prefix="metagpt-crowded-") as name:
        folder = Path(name)
        for granularity in ("model", "layer", "tensor"):
            one_after_the_other(folder, granularity)
        at_once(folder)
        many_tensors(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak memory {peak} KiB")


if __name__ == "__main__":
    main()
