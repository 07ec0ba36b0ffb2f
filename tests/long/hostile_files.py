"""Hostile checkpoints: refused in one line, or merged right; never anything else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from tests.families import State, merge_config, read_model, tuned
from tests.long.contained import (
    FORBIDDEN,
    OPTIONS,
    SCAN,
    Place,
    assert_contained,
    opened,
    tree,
)
from tests.long.hostile import LAST, MUTATIONS, TENSOR, Mutation, good_state, write_good
from tests.oracle import assert_within_bound, naive_coefficients, naive_sq_norms

BASE = good_state()
TUNED = (tuned(BASE, seed=1), tuned(BASE, seed=2, size=2e-2))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Good models, and a warm process that merges in forks."""
    folder = tmp_path_factory.mktemp("good").resolve()
    for name, state in zip(("base", "tuned0", "tuned1"), (BASE, *TUNED), strict=True):
        write_good(folder / name, state)
    with opened(folder) as found:
        yield found


@dataclass(frozen=True)
class Trial:
    """A mutated model in the place of the base, or of the second fine-tune.

    Attributes:
        work: the folder that may be written to.
        role: `base` or `tuned`.
        states: what base and models mean; None where they mean nothing.
        left: what can be scanned of them, likewise.
    """

    work: Path
    role: str
    states: tuple[State, ...] | None
    left: tuple[State, ...] | None

    @property
    def hostile(self) -> Path:
        return self.work / "hostile"

    @property
    def paths(self) -> list[Path]:
        """Base and models."""
        if self.role == "base":
            return [self.hostile, self.work / "tuned0", self.work / "tuned1"]
        return [self.work / "base", self.work / "tuned0", self.hostile]

    def out(self, command: str) -> Path:
        return self.work / f"out-{command}"


def prepare(place: Place, folder: Path, mutation: Mutation, role: str) -> Trial:
    """Write the mutated model and links to the good ones beside it."""
    work = (folder / role).resolve()
    work.mkdir()
    for name in ("base", "tuned0", "tuned1"):
        shutil.copytree(place.folder / name, work / name)
    replaced = "base" if role == "base" else "tuned1"
    (work / replaced).rename(work / "hostile")
    mutation.spoil(work / "hostile")
    at = 0 if role == "base" else 2
    good = (BASE, *TUNED)

    def with_hostile(state: State) -> tuple[State, ...]:
        return (*good[:at], state, *good[at + 1 :])

    states = left = None
    if mutation.means is not None:
        states = left = with_hostile(mutation.means(good[at]))
    if mutation.lost is not None:
        left = with_hostile({n: t for n, t in good[at].items() if n != mutation.lost})
    trial = Trial(work, role, states, left)
    config = merge_config(trial.paths[0], trial.paths[1:])
    (work / "merge.yml").write_text(yaml.safe_dump(config))
    return trial


def assert_merged(trial: Trial, out: Path) -> None:
    """Check every element of a merge of what the mutated model means."""
    assert trial.states is not None, "merged, though it means nothing"
    base, *models = trial.states
    merged = read_model(out)
    assert merged.keys() == base.keys()
    lambdas = naive_coefficients(naive_sq_norms(base, models))
    for name, tensor in merged.items():
        assert_within_bound(tensor, base[name], [m[name] for m in models], lambdas)


def assert_refused(trial: Trial, said: str) -> None:
    """Check for one line that names the model, one of its files, or the tensor.

    Before it there may be what is said of a merge under way.
    """
    said = "".join(
        line
        for line in said.splitlines(keepends=True)
        if not line.startswith("WARNING:mergekit_metagpt:")
    )
    assert said.startswith("Error: ") and said.endswith("\n"), said
    assert len(said.splitlines()) == 1, said
    assert any(name in said for name in (str(trial.hostile), TENSOR, LAST)), said


def assert_scanned(trial: Trial, said: str) -> bool:
    """Check what `scan` said: the right squared norms, or a clear error."""
    found = json.loads(said.splitlines()[-1])
    if "error" in found:
        assert str(trial.hostile) in found["error"], found
        return False
    assert trial.left is not None, f"measured, though it means nothing: {found}"
    base, *models = trial.left
    pairs = [({n: base[n] for n in base.keys() & m}, m) for m in models]
    expected = torch.cat([naive_sq_norms(shared, [model]) for shared, model in pairs])
    sq_norms = torch.tensor(found["sq_norms"], dtype=torch.float64)
    torch.testing.assert_close(sq_norms, expected, rtol=1e-12, atol=0)
    return True


def assert_answered(place: Place, trials: list[Trial], *, legal: bool) -> None:
    """Scan and merge with each mutated model, at once, and check all answers."""
    before = [tree(trial.work) for trial in trials]
    jobs = []
    for trial in trials:
        models = [str(path) for path in trial.paths]
        out = str(trial.out("ours"))
        merge = ("merge", str(trial.work / "merge.yml"), out, *OPTIONS)
        jobs += [
            place.job(trial.work, *merge),
            place.job(trial.work, code=f"MODELS = {models!r}\n{SCAN}"),
        ]
    ended = place.forks.run(*jobs)
    for number, trial in enumerate(trials):
        merged, scanned = ended[2 * number : 2 * number + 2]
        assert_contained(merged)
        assert_contained(scanned)
        assert scanned.status == 0, scanned.said
        measured = assert_scanned(trial, scanned.said)
        assert measured or not legal, scanned.said
        assert merged.status in (0, 2), merged.said
        if merged.status == 0:
            assert_merged(trial, trial.out("ours"))
            shutil.rmtree(trial.out("ours"))
        else:
            assert not legal, merged.said
            assert_refused(trial, merged.said)
        assert tree(trial.work) == before[number]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mutated_model_is_refused_or_merged_right(
    name: str, place: Place, tmp_path: Path
) -> None:
    mutation = MUTATIONS[name]
    trials = [prepare(place, tmp_path, mutation, role) for role in ("base", "tuned")]
    assert_answered(place, trials, legal=mutation.legal)


def test_the_guard_sees_what_it_must(place: Place, tmp_path: Path) -> None:
    """Without it, the tests above could not fail for code that is run."""
    codes = {
        "os.system('true')": FORBIDDEN,
        "open('/tmp/outside', 'w')": FORBIDDEN,
        "import subprocess; subprocess.Popen(['true'])": FORBIDDEN,
        "os.mkdir('/tmp/outside')": FORBIDDEN,
        "open('inside', 'w')\nos._exit(3)": 3,
        "x = bytearray(5 << 30)": 1,
    }
    work = tmp_path.resolve()
    for code, status in codes.items():
        (ended,) = place.forks.run(place.job(work, code=code))
        assert ended.status == status, (code, ended)
    assert not Path("/tmp/outside").exists()


def test_names_of_tensors_are_shown_without_control_characters(
    place: Place, tmp_path: Path
) -> None:
    """A model that was downloaded must not write to the terminal as it likes."""
    for kind in ("another-tensor-escape", "renamed-to-escape"):
        (tmp_path / kind).mkdir()
        trial = prepare(place, tmp_path / kind, MUTATIONS[kind], "tuned")
        base, _, hostile = map(str, trial.paths)
        job = place.job(trial.work, "inspect", "--base", base, hostile)
        (ended,) = place.forks.run(job)
        assert_contained(ended)
        odd = {c for c in ended.said if ord(c) < 32 or 127 <= ord(c) < 160}
        assert odd <= {"\n"}, odd
