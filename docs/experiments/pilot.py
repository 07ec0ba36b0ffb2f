"""Looks for a learning rate and width at which averaging works; only averages.

python docs/experiments/pilot.py OUT   writes docs/experiments/pilot.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from corpora import DOMAINS
from family import Plan, Size, load, one_quiet_thread, train_base, train_specialist
from measure import evaluate

SEED = 100  # not a seed of the experiment
RATES = (1e-4, 3e-4, 1e-3)
STEPS = 100
SIZES = {"wide": Size(), "narrow": Size(width=64)}
Row = dict[str, object]


def sweep(out: Path, size: Size) -> list[Row]:
    """Train four specialists at each rate; average them in memory; measure all."""
    train_base(out / "base", size, SEED)
    base = evaluate(load(out / "base"), size.windows)
    rows = []
    for rate in RATES:
        states, own = [], {}
        for domain in DOMAINS[1:]:
            path = out / f"{domain}-{rate}"
            plan = Plan(domain, STEPS, rate)
            train_specialist(out / "base", path, plan, size, SEED)
            model = load(path)
            states.append(model.state_dict())
            own[domain] = evaluate(model, size.windows)
        model = load(out / "base")
        model.load_state_dict(
            {k: torch.stack([state[k] for state in states]).mean(0) for k in states[0]}
        )
        merged = evaluate(model, size.windows)
        row: Row = {"width": size.width, "rate": rate}
        for domain in DOMAINS[1:]:
            evaluations = {"base": base, "specialist": own[domain], "average": merged}
            row[domain] = {
                name: [round(one.loss[domain], 5), round(one.score[domain], 5)]
                for name, one in evaluations.items()
            }
        print(json.dumps(row), flush=True)
        rows.append(row)
    return rows


def main() -> None:
    """Sweep both widths, except those that OUT already has."""
    rows: list[Row] = []
    for label, size in SIZES.items():
        done = Path(sys.argv[1], label, "rows.json")
        if not done.exists():
            done.write_text(json.dumps(sweep(done.parent, size)))
        rows += json.loads(done.read_text())
    text = "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"
    Path(__file__).with_name("pilot.json").write_text(text)


if __name__ == "__main__":
    with one_quiet_thread():
        main()
