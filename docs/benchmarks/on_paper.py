"""Works out how long a large merge takes by nodes; measures nothing; prints Markdown.

    python docs/benchmarks/on_paper.py [--models 8] [--billions 671] [--tensors 45400]

Every model and the base are read twice, once to scan and once to merge, and the result
is written once. A node reads and writes at its own rate, all nodes together at most at
the file system's. Planning is done by rank 0 first and then by all others.
"""

from __future__ import annotations

import argparse

# Seconds of CPU time to check and to deal one tensor of a base and eight models.
CHECK_S, DEAL_S = 1.6e-3, 0.9e-3
NODES = (1, 2, 4, 8, 16, 32, 64)


def seconds(nodes: int, given: argparse.Namespace) -> tuple[float, float, float]:
    """Return the seconds of planning, of reading and of writing."""
    size = given.billions * 2  # GB in bfloat16
    reading = 2 * size * (given.models + 1)
    planning = given.tensors * (2 * CHECK_S + DEAL_S) * (given.models + 1) / 9
    return (
        planning,
        reading / min(nodes * given.read, given.limit),
        size / min(nodes * given.write, given.limit),
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=8)
    parser.add_argument("--billions", type=float, default=671)
    parser.add_argument("--tensors", type=int, default=45_400)
    parser.add_argument("--read", type=float, default=5, help="GB/s of a node")
    parser.add_argument("--write", type=float, default=2, help="GB/s of a node")
    parser.add_argument("--limit", type=float, default=100, help="GB/s of all nodes")
    given = parser.parse_args()
    print("| nodes | planning | reading | writing | minutes in all |")
    print("|---|---|---|---|---|")
    for nodes in NODES:
        parts = [part / 60 for part in seconds(nodes, given)]
        cells = " | ".join(f"{part:.1f}" for part in [*parts, sum(parts)])
        print(f"| {nodes} | {cells} |")


if __name__ == "__main__":
    main()
