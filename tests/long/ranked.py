"""Kills random ranks at random moments, and merges by every method; prints counts.

    python -m tests.long.ranked [--kills 20] [--seed 0]

Takes some minutes. Nothing hangs, nothing wrong appears, and `--resume` completes the
model with the tensors that one process makes.
"""

from __future__ import annotations

import argparse
import random
import signal
from collections import Counter

import torch
import yaml

from mergekit_metagpt.commands import demo
from tests.adapters import write_adapters
from tests.families import State, merge_config, read_model
from tests.long.rank_jobs import (
    OURS,
    SEED,
    THEIRS,
    Place,
    place,
)
from tests.oracle import assert_same_states


def every_method(found: Place) -> int:
    """Merge by every method on two and four ranks; return the number of merges."""
    count = 0
    for method in (*OURS, *THEIRS):
        found.config(method)
        alone = found.alone if method in OURS else found.alone_by_mergekit
        reference = alone(*SEED)
        for size in (2, 4):
            with found.work():
                all_ended = found.ranks(size, found.merge(*SEED))
                assert {ended.status for ended in all_ended} == {0}, all_ended
                assert_same_states(read_model(found.out), reference)
            count += 1
    for settings in (
        {"granularity": "layer"},
        {"granularity": "tensor"},
        {"sample": 0.5},
        {"lambda": "keep"},
    ):
        found.config("metagpt", **settings)
        reference = found.alone()
        with found.work():
            all_ended = found.ranks(4, found.merge())
            assert {ended.status for ended in all_ended} == {0}, all_ended
            assert_same_states(read_model(found.out), reference)
        count += 1
    return count


def kill_at_random(found: Place, count: int, number: int, seed: int) -> Counter[str]:
    """Kill a random rank of four at random moments; return what came of it."""
    found.config()
    reference = found.alone()
    chance = random.Random(seed)
    outcomes: Counter[str] = Counter()
    with found.work():
        took = max(ended.seconds for ended in found.ranks(4, found.merge()))
    for at in range(count):
        victim = chance.randrange(4)
        moment = took * (at + chance.random()) / count
        with found.work():
            change = {victim: {"after_s": moment, "number": number}}
            all_ended = found.ranks(4, found.merge(), change)
            assert not any(ended.hung for ended in all_ended), all_ended
            done = found.out.exists()
            step = all_ended[victim].step
            outcomes[f"{step}: {'complete' if done else 'ended'}"] += 1
            if not done:
                assert all_ended[victim].status != 0, all_ended
                for rank, ended in enumerate(all_ended):
                    if rank != victim:
                        assert ended.status == 2, all_ended
                        assert ended.said.count("Error: ") == 1, all_ended
                        assert f"rank {victim} " in ended.said, all_ended
                all_ended = found.ranks(4, found.merge("--resume"))
                assert {ended.status for ended in all_ended} == {0}, all_ended
            assert_same_states(read_model(found.out), reference)
            assert [path.name for path in found.out.parent.iterdir()] == ["out"]
    return outcomes


def adapters(found: Place) -> None:
    """Merge adapters, measured from their factors and from copies that rank 0 makes."""
    made = write_adapters(found.folder / "lora")
    models = [f"{made.base}+{adapter}" for adapter in made.adapters]
    (found.folder / "merge.yml").write_text(
        yaml.safe_dump(merge_config(made.base, models))
    )
    copies = ("--lora-merge-cache", str(found.folder / "work" / "copies"))
    reference = found.alone(*copies)
    with found.work():
        all_ended = found.ranks(3, found.merge(*copies))
        assert {ended.status for ended in all_ended} == {0}, all_ended
        assert_same_states(read_model(found.out), reference)


def other_outputs(found: Place) -> None:
    """Merge into an empty folder, over an old model, as pickles, and asynchronously."""
    found.config()
    reference = found.alone()
    with found.work():
        found.out.mkdir()
        for options in ((), ("--force",), ("--force", "--async-write")):
            all_ended = found.ranks(2, found.merge(*options))
            assert {ended.status for ended in all_ended} == {0}, all_ended
            assert_same_states(read_model(found.out), reference)
    with found.work():
        all_ended = found.ranks(2, found.merge("--no-safe-serialization"))
        assert {ended.status for ended in all_ended} == {0}, all_ended
        pickles: State = {}
        for file in found.out.glob("*.bin"):
            pickles.update(torch.load(file))
        assert_same_states(pickles, reference)


def tokenizers(found: Place, family: demo.Family) -> None:
    """Copy a tokenizer, and make one; compare all that is written."""
    models = list(family.specialists.values())
    arguments = tuple(a for a in found.merge() if a != "--no-copy-tokenizer")
    for settings in ({}, {"tokenizer_source": "union"}, {"tokenizer_source": "base"}):
        config = merge_config(family.base, models, **settings)
        (found.folder / "merge.yml").write_text(yaml.safe_dump(config))
        seen = []
        for size in (1, 2):
            with found.work():
                if size == 1:
                    all_ended = found.forks.run(found.job(arguments))
                else:
                    all_ended = found.ranks(size, arguments)
                assert {ended.status for ended in all_ended} == {0}, all_ended
                files = {
                    path.name: path.read_bytes()
                    for path in found.out.iterdir()
                    if not path.name.startswith("model")
                }
                seen.append((files, read_model(found.out)))
        assert "tokenizer.json" in seen[0][0]
        assert seen[0][0] == seen[1][0]
        assert_same_states(seen[0][1], seen[1][1])


def compare(found: Place, family: demo.Family) -> None:
    """Compare merges on two ranks, of which rank 0 evaluates."""
    folder = family.base.parents[1]
    models = list(family.specialists.values())
    file = folder / "merge.yml"
    file.write_text(yaml.safe_dump(merge_config(family.base, models)))
    texts = []
    for name, model in family.specialists.items():
        (folder / f"{name}.txt").write_text(demo.text(name, 2000, held_out=True))
        texts += ["--text", f"{model}={folder / name}.txt"]
    command = ("compare", str(file), *texts, "--context", "64", "--json", "-")
    (alone,) = found.forks.run(found.job(command))
    first, second = found.ranks(2, command)
    assert (alone.status, first.status, second.status) == (0, 0, 0), (first, second)
    told = [ended.said[ended.said.index("{\n") :] for ended in (alone, first)]
    assert told[0] == told[1]
    assert not second.said


def main() -> None:
    """Run all and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with place() as found:
        for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
            outcomes = kill_at_random(found, given.kills, number, given.seed)
            print(f"{number.name}: {dict(outcomes)}", flush=True)
        adapters(found)
        print("adapters: the same tensors", flush=True)
        other_outputs(found)
        print("other outputs: the same tensors", flush=True)
        steps = (40, 10, 15, 20)
        family = demo.make_family(found.folder / "trained" / "m", steps=steps, width=32)
        tokenizers(found, family)
        print("tokenizers: the same files", flush=True)
        compare(found, family)
        print("compare: the same report", flush=True)
        print(f"merges by every method: {every_method(found)}", flush=True)


if __name__ == "__main__":
    main()
