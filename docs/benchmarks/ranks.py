"""Times merges by 1, 2, 4, ... ranks, each of which reads no faster than a given rate.

    python docs/benchmarks/ranks.py STORE [--scale 0.1] [--rate-mb 30] [--ranks 1,2,4]

A rank stands for a node with storage of its own: whatever it reads of the checkpoints,
in the scan and in the merge, is slowed down to the rate. All ranks run here and share
the CPUs. Prints Markdown: seconds from start to end, and less what as many processes
take to import everything. Checks that all results have the same tensors.
"""

from __future__ import annotations

import argparse
import hashlib
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
import sys, threading, time
from mergekit.io import LazyTensorLoader
from mergekit_metagpt.scanning.pieces import Streams
from mergekit_metagpt.commands.cli import main

rate, lock, free = float(sys.argv.pop(1)), threading.Lock(), 0.0

def wait(size):
    global free
    with lock:
        free = max(free, time.monotonic()) + size / rate
        until = free
    time.sleep(max(0.0, until - time.monotonic()))

def slowed(read):
    def wrapper(self, stored, start, into):
        wait(len(into))
        return read(self, stored, start, into)
    return wrapper

def slowly_loaded(load):
    def wrapper(self, *args, **kwargs):
        tensor = load(self, *args, **kwargs)
        wait(tensor.numel() * tensor.element_size())
        return tensor
    return wrapper

Streams.read = slowed(Streams.read)
LazyTensorLoader.get_tensor = slowly_loaded(LazyTensorLoader.get_tensor)
main(prog_name="mergekit-metagpt")
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


def run(count: int, arguments: list[str], rate: float) -> float:
    """Run a command on all ranks at once; return the seconds that it took."""
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
            stderr=subprocess.PIPE,
        )
        for rank in range(count)
    ]
    for process in started:
        said = process.communicate()[1]
        if process.returncode:
            raise SystemExit(said.decode())
    return time.perf_counter() - start


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path, help="folder for checkpoints")
    parser.add_argument("--scale", type=float, default=0.1)
    parser.add_argument("--rate-mb", type=float, default=30.0)
    parser.add_argument("--ranks", default="1,2,4")
    given = parser.parse_args()
    base, tuned = store.make(given.store, 3, given.scale)
    files = [f for m in (base, *tuned) for f in m.glob("*.safetensors")]
    size = sum(file.stat().st_size for file in files)
    config = whole_process.configurations(base.resolve(), [t.resolve() for t in tuned])
    print(machine.describe())
    print(f"{size / 1e9:.2f} GB, {given.rate_mb:g} MB/s for each rank\n")
    print("| ranks | seconds | less imports | reading alone, by the rate |")
    print("|---|---|---|---|")
    digests = set()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        file = Path(name, "merge.yml")
        file.write_text(yaml.safe_dump(config["metagpt"]))
        for count in map(int, given.ranks.split(",")):
            out = Path(name, f"out{count}")
            startup = run(count, ["merge", "--help"], 1e12)
            took = run(
                count,
                ["merge", str(file), str(out), "--no-copy-tokenizer", "--quiet"],
                given.rate_mb * 1e6,
            )
            digests.add(digest(out))
            reading = 2 * size / count / given.rate_mb / 1e6
            print(
                f"| {count} | {took:.1f} | {took - startup:.1f} | {reading:.1f} |",
                flush=True,
            )
    assert len(digests) == 1, "the tensors differ"


if __name__ == "__main__":
    main()
