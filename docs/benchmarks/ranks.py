"""Times merges by 1, 2, 4, ... ranks, each of which reads no faster than a given rate.

    python docs/benchmarks/ranks.py STORE [--scale 0.1] [--rate-mb 30] [--ranks 1,2,4]

A rank stands for a node with storage of its own: whatever it reads of the checkpoints,
in the scan and in the merge, is slowed down to the rate. All ranks run here and share
the CPUs. Prints Markdown: seconds from the first read of any rank to the last, of the
scan and of the merge, and from start to end. Checks that all results have the same
tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import machine
import store
import torch
import whole_process
import yaml
from safetensors import safe_open

CODE = """
import json, sys, threading, time
from mergekit.io import LazyTensorLoader
from mergekit_metagpt.scanning.pieces import Streams
from mergekit_metagpt.commands.cli import main

rate, lock, free = float(sys.argv.pop(1)), threading.Lock(), 0.0
spans = {}

def wait(phase, size):
    global free
    with lock:
        start = time.monotonic()
        free = max(free, start) + size / rate
        until = free
    time.sleep(max(0.0, until - time.monotonic()))
    with lock:
        first, _ = spans.get(phase, (start, 0))
        spans[phase] = min(first, start), time.monotonic()

def slowed(read):
    def wrapper(self, stored, start, into):
        wait('scan', len(into))
        return read(self, stored, start, into)
    return wrapper

def slowly_loaded(load):
    def wrapper(self, *args, **kwargs):
        tensor = load(self, *args, **kwargs)
        wait('merge', tensor.numel() * tensor.element_size())
        return tensor
    return wrapper

Streams.read = slowed(Streams.read)
LazyTensorLoader.get_tensor = slowly_loaded(LazyTensorLoader.get_tensor)
try:
    main(prog_name="mergekit-metagpt")
finally:
    print(json.dumps(spans))
"""


def digest(folder: Path) -> str:
    """Return a digest of all tensors of a model, whatever files they are in."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                raw = opened.get_tensor(name).reshape(-1).view(torch.uint8).numpy()
                tensors[name] = hashlib.sha256(raw.tobytes()).hexdigest()
    return hashlib.sha256(repr(sorted(tensors.items())).encode()).hexdigest()


def run(count: int, arguments: list[str], rate: float) -> dict[str, float]:
    """Run a command on all ranks at once; return seconds by phase."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    common = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
        "MERGEKIT_METAGPT_CACHE": "0",
        "HF_HUB_OFFLINE": "1",
    }
    start = time.perf_counter()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CODE, str(rate), *arguments],
            env={**common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]
    spans: dict[str, list[tuple[float, float]]] = {}
    for process in started:
        told, said = process.communicate()
        if process.returncode:
            raise SystemExit(said.decode())
        for phase, span in json.loads(told).items():
            spans.setdefault(phase, []).append(span)
    took = {
        phase: max(last for _, last in all_spans) - min(first for first, _ in all_spans)
        for phase, all_spans in spans.items()
    }
    return {**took, "all": time.perf_counter() - start}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="folder for checkpoints")
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--rate-mb", type=float, default=30.0)
    parser.add_argument("--ranks", default="1,2,4")
    given = parser.parse_args()
    base, tuned = store.make(given.store, 3, given.scale)
    files = store.files_of([base, *tuned])
    size = sum(file.stat().st_size for file in files)
    config = whole_process.configurations(base.resolve(), [t.resolve() for t in tuned])
    print(machine.describe())
    print(f"{size / 1e9:.2f} GB, {given.rate_mb:g} MB/s for each rank\n")
    print("| ranks | scan, s | merge, s | each by the rate alone | from start to end |")
    print("|---|---|---|---|---|")
    digests = set()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        file = Path(name, "merge.yml")
        file.write_text(yaml.safe_dump(config["metagpt"]))
        for count in map(int, given.ranks.split(",")):
            out = Path(name, f"out{count}")
            took = run(
                count,
                ["merge", str(file), str(out), "--no-copy-tokenizer", "--quiet"],
                given.rate_mb * 1e6,
            )
            digests.add(digest(out))
            alone = size / count / given.rate_mb / 1e6
            cells = (took["scan"], took["merge"], alone, took["all"])
            print(f"| {count} | {' | '.join(f'{s:.1f}' for s in cells)} |", flush=True)
    assert len(digests) == 1, "the tensors differ"


if __name__ == "__main__":
    main()
