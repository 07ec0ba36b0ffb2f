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

import yaml

from mergekit_metagpt.commands import demo
from tests.adapters import write_adapters
from tests.families import merge_config, read_model
from tests.long.rank_jobs import (
    OURS,
    SEED,
    THEIRS,
    Place,
    assert_same_tensors,
    place,
)


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
                assert_same_tensors(read_model(found.out), reference)
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
            assert_same_tensors(read_model(found.out), reference)
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
                    # Others have left where rank 0 completes the model.
                    left = victim == 0 and ended.status == 0
                    if rank != victim and not left:
                        assert ended.status == 2, all_ended
                        assert ended.said.count("Error: ") == 1, all_ended
                        assert f"rank {victim} of 4" in ended.said, all_ended
                all_ended = found.ranks(4, found.merge("--resume"))
                assert {ended.status for ended in all_ended} == {0}, all_ended
            assert_same_tensors(read_model(found.out), reference)
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
        assert_same_tensors(read_model(found.out), reference)


def compare(found: Place) -> None:
    """Compare merges on two ranks, of which rank 0 evaluates."""
    folder = found.folder / "trained"
    folder.mkdir()
    family = demo.make_family(folder / "m", steps=(40, 10, 15, 20), width=32)
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
        compare(found)
        print("compare: the same report", flush=True)
        print(f"merges by every method: {every_method(found)}", flush=True)


if __name__ == "__main__":
    main()
