"""Measures and merges one tensor of more than 2^31 elements, in a sparse file."""

from __future__ import annotations

import json
import os
import struct
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch

from mergekit_metagpt import scan
from mergekit_metagpt.arithmetic import in_parts, scaled_sums
from mergekit_metagpt.scanning.groups import SEGMENT
from tests.oracle import naive_coefficients

NAME = "w"

# More than 2^31, no multiple of a chunk.
NUMEL = 2**31 + 3 * in_parts.CHUNK + 5
# Elements that are set: at both ends, around 2^31, and at the ends of segments.
MARKED = sorted(
    {0, 1, SEGMENT - 1, SEGMENT, 2**30, 2**31 - 1, 2**31, 2**31 + 1, NUMEL - 1}
)


def write_sparse(folder: Path, numel: int, values: Mapping[int, float]) -> Path:
    """Write a model of one bfloat16 tensor: 0 but for some elements, mostly a hole."""
    folder.mkdir(parents=True)
    size = 2 * numel
    about = {"dtype": "BF16", "shape": [numel], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, NAME: about}).encode()
    header += b" " * (-len(header) % 8)
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(header)) + header)
        for at, value in values.items():
            stream.seek(8 + len(header) + 2 * at)
            stream.write(struct.pack("<f", value)[2:])
        stream.truncate(8 + len(header) + size)
    return folder


def marked(scale: float) -> dict[int, float]:
    """Values that bfloat16 represents, another one for each marked element."""
    return {at: scale * (1 + number) for number, at in enumerate(MARKED)}


def sq_norm(scale: float) -> float:
    """||tau||^2 of a model of `marked(scale)` against a base of zeros."""
    return sum(value**2 for value in marked(scale).values())


def write_family(folder: Path) -> tuple[Path, list[Path]]:
    """Write a base of zeros and two models."""
    base = write_sparse(folder / "base", NUMEL, {})
    models = [
        write_sparse(folder / f"tuned{k}", NUMEL, marked(scale))
        for k, scale in enumerate((0.5, 2.0))
    ]
    return base, models


def main() -> None:
    """Scan, merge the tensor in memory, and check every marked element."""
    with tempfile.TemporaryDirectory(prefix="metagpt-huge-") as name:
        base, models = write_family(Path(name))
        held = sum(f.stat().st_blocks * 512 for f in Path(name).rglob("*"))
        os.environ["MERGEKIT_METAGPT_CACHE"] = "0"
        started = time.monotonic()
        found = scan(base, models).pool("model").sq_norms
        seconds = time.monotonic() - started
        expected = torch.tensor([sq_norm(0.5), sq_norm(2.0)], dtype=torch.float64)
        assert found.tolist() == expected.tolist(), (found, expected)
        print(f"{NUMEL} elements in files of {held} bytes on disk")
        print(f"scan of 2 models: {seconds:.1f} s, squared norms exact", flush=True)

        from safetensors import safe_open

        tensors = []
        for folder in (base, *models):
            with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
                tensors.append(file.get_tensor(NAME))
        lambdas = naive_coefficients(expected)
        started = time.monotonic()
        merged = scaled_sums.scaled_sum(tensors[0], tensors[1:], lambdas)
        seconds = time.monotonic() - started
        assert merged.shape == (NUMEL,) and merged.dtype == torch.bfloat16
        exact = sum(
            factor * torch.tensor(list(marked(scale).values()), dtype=torch.float64)
            for factor, scale in zip(lambdas.tolist(), (0.5, 2.0), strict=True)
        )
        torch.testing.assert_close(
            merged[MARKED].double(), exact, rtol=2**-8, atol=0, check_dtype=False
        )
        zeros = sum(int((part == 0).sum()) for part in merged.split(SEGMENT))
        assert zeros == NUMEL - len(MARKED), zeros
        print(f"scaled sum: {seconds:.1f} s, {len(MARKED)} elements set, others 0")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
