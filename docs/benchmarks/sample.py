"""Counts what errors of a coefficient change in a merge, and what blocks cost.

    python docs/benchmarks/sample.py BASE MODEL MODEL...

Merges trained models by MetaGPT in bfloat16, then with an error in the coefficients of
the first two, and counts the elements that differ. Then estimates the coefficients from
ever longer blocks, with 200 seeds each. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from mergekit_metagpt.checkpoints.opening import open_checkpoint
from mergekit_metagpt.scanning import sampling
from mergekit_metagpt.scanning.one_pass import scan_checkpoints
from mergekit_metagpt.scanning.sampling import Sample, sample_checkpoints

ERRORS = (1e-4, 1e-3, 1e-2)
SEEDS = 200
SHARES = (0.02, 0.1)
State = Mapping[str, torch.Tensor]


def read(folder: Path) -> State:
    """Read all weights of a model."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state


def merged(states: Sequence[State], shares: torch.Tensor) -> torch.Tensor:
    """Merge in float32, round to bfloat16; all elements in one row."""
    base, *models = states
    rows = []
    for name, tensor in base.items():
        total = tensor.float()
        for share, model in zip(shares.tolist(), models, strict=True):
            total = total + share * (model[name].float() - tensor.float())
        rows.append(total.bfloat16().flatten())
    return torch.cat(rows)


def changed(states: Sequence[State], shares: torch.Tensor) -> None:
    """Print how many elements change by an error of a coefficient."""
    print("| error of a coefficient | elements that change | by more than one step |")
    print("|---|---|---|")
    first = merged(states, shares)
    for error in ERRORS:
        other = shares.clone()
        other[:2] += torch.tensor([error, -error], dtype=torch.float64)
        second = merged(states, other)
        # Neighbours of one sign are one apart as integers.
        steps = first.view(torch.int16).int() - second.view(torch.int16).int()
        more = (steps.abs() > 1).double().mean()
        print(f"| {error:g} | {(steps != 0).double().mean():.2%} | {more:.2%} |")


def errors(base: Path, models: Sequence[Path], shares: torch.Tensor) -> None:
    """Print the errors of estimates, by the length of blocks."""
    opened, *tuned = map(open_checkpoint, (base, *models))
    print(
        "\n| sample | shortest block | blocks | rms error | within 2 standard errors |"
    )
    print("|---|---|---|---|---|")
    for share in SHARES:
        for length in (1 << 12, 1 << 13, 1 << 14):
            sampling.BLOCK = length
            off, inside, read = [], [], 0
            for seed in range(SEEDS):
                sample = Sample(share=share, seed=seed)
                pooled = sample_checkpoints(opened, tuned, sample, workers=1)
                whole = pooled.pool("model")
                assert whole.covariances is not None and pooled.sampled is not None
                found = whole.sq_norms / whole.sq_norms.sum()
                error = sampling_error(whole.sq_norms, whole.covariances.sq_norms)
                off.append(float((found - shares).square().mean()))
                inside.append(((found - shares).abs() <= 2 * error).double())
                read = pooled.sampled.bytes_read
            cover = torch.stack(inside).mean(dim=0).min()
            print(
                f"| {share:g} | {length:,} | {read / 1e6:.1f} MB "
                f"| {statistics.mean(off) ** 0.5:.4f} | {cover:.0%} |"
            )


def sampling_error(sq_norms: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Standard errors of the coefficients."""
    from mergekit_metagpt.arithmetic.standard_errors import of_coefficients

    return of_coefficients(sq_norms, covariance, sq_norms / sq_norms.sum(), 2.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("models", type=Path, nargs="+")
    given = parser.parse_args()
    opened, *tuned = map(open_checkpoint, (given.base, *given.models))
    sq_norms = scan_checkpoints(opened, tuned).pool("model").sq_norms
    shares = sq_norms / sq_norms.sum()
    print(f"coefficients {', '.join(f'{share:.4f}' for share in shares.tolist())}\n")
    changed([read(folder) for folder in (given.base, *given.models)], shares)
    errors(given.base, given.models, shares)


if __name__ == "__main__":
    main()
