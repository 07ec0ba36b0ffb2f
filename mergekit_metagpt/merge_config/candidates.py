"""Writes the YAML of merges that are worth comparing with a given one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from mergekit_metagpt.merge_config import merge_yaml
from mergekit_metagpt.merge_config.checks import METHODS
from mergekit_metagpt.merge_config.plain_yaml import dumped, kept
from mergekit_metagpt.method.parameters import own_parameters

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration


@dataclass(frozen=True)
class Candidate:
    """A merge to compare with others.

    Attributes:
        names: all names of the merge.
        text: its YAML.
        config: mergekit's configuration of it.
        meanings: explanations, for readers who do not know the names.
    """

    names: tuple[str, ...]
    text: str
    config: MergeConfiguration
    meanings: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    @property
    def key(self) -> str:
        """Everything but the models' weights that the merge depends on."""
        data = dumped(self.config)
        if self.config.merge_method in METHODS and "parameters" in data:
            defaults = {spec.name: spec.default for spec in own_parameters()}
            given = data.pop("parameters")
            left = {
                name: float(value) if type(value) is int else value
                for name, value in given.items()
                if value != defaults.get(name)
            }
            data |= {"parameters": left} if left else {}
        return json.dumps(data, sort_keys=True)


def of_text(name: str, text: str, meaning: str) -> Candidate:
    """Read a candidate from a merge YAML.

    Args:
        name: name of the candidate.
        text: the YAML, of any method.
        meaning: explanation of the merge.

    Returns:
        the candidate.

    Raises:
        ValueError: as `merge_yaml.read`; the message begins with the name.
    """
    try:
        return Candidate((name,), text, merge_yaml.read(text), (meaning,))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def by_metagpt(text: str, parameters: Mapping[str, Any]) -> str:
    """Write the merge of the same models by `metagpt` with these parameters only."""
    data = {**kept(yaml.safe_load(text), ()), "merge_method": "metagpt"}
    if parameters:
        data["parameters"] = dict(parameters)
    return yaml.safe_dump(data, sort_keys=False)


def usual(
    text: str,
    counts: Iterable[int],
    embeddings: str,
    powers: Sequence[float] = (),
    scales: Sequence[float | str] = (),
    sample: float = 1.0,
) -> Iterator[Candidate]:
    """Yield a merge as written, and those to compare it with by default.

    Args:
        text: the merge YAML.
        counts: number of models in each family.
        embeddings: an `exclude` for the embeddings; empty if there are none.
        powers: further exponents of the norms.
        scales: further values of `lambda`; may include `keep`.
        sample: `sample` of the merge as written; used for every merge with norms.

    Yields:
        candidates, some of which may be the same merge.
    """
    yield of_text("as written", text, "the YAML as it was given")
    derived: dict[str, Mapping[str, Any]] = {
        "metagpt": {},
        "power 1": {"power": 1.0},
        "average": {"power": 0.0},
    }
    count, *others = set(counts)
    if not others:  # else no single `lambda` gives each model the same weight
        summed = {"power": 0.0, "lambda": round(0.3 * count, 10)}
        derived["task arithmetic 0.3"] = summed
    if embeddings:
        derived["no embeddings"] = {"exclude": embeddings}
    derived |= {f"power {power:g}": {"power": power} for power in powers}
    for scale in scales:
        shown = scale if isinstance(scale, str) else f"{scale:g}"
        derived[f"lambda {shown}"] = {"lambda": scale}
    for name, parameters in derived.items():
        if sample < 1 and parameters.get("power") != 0.0:
            parameters = {**parameters, "sample": sample}
        meaning = _meaning(parameters)
        if name == "task arithmetic 0.3":
            meaning = "each model's change times 0.3"
        yield of_text(name, by_metagpt(text, parameters), meaning)


def _meaning(parameters: Mapping[str, Any]) -> str:
    """Explain what `metagpt` does with these parameters."""
    power, scale = float(parameters.get("power", 2)), parameters.get("lambda", 1)
    weights = {
        2.0: "weights by squared distance from the base",
        1.0: "weights by distance from the base",
        0.0: "equal weights",
    }
    said = [
        weights.get(power, f"weights by distance from the base to the power {power:g}")
    ]
    if "exclude" in parameters:
        said.append("embeddings and head not counted")
    if scale == "keep":
        said.append("as long as its models' changes are on average")
    elif scale != 1:
        said.append(f"the merged change times {scale:g}")
    return ", ".join(said)


def distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Join candidates that are the same merge.

    Args:
        candidates: candidates in the order to show them.

    Returns:
        each merge once, with all its names.

    Raises:
        ValueError: two different merges have one name.
    """
    merges: dict[str, Candidate] = {}
    for new in candidates:
        old = merges.get(new.key, Candidate((), new.text, new.config))
        merges[new.key] = Candidate(
            tuple(dict.fromkeys((*old.names, *new.names))),
            old.text,
            old.config,
            tuple(dict.fromkeys((*old.meanings, *new.meanings))),
        )
    names = [name for candidate in merges.values() for name in candidate.names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two candidates are named {twice[0]}. Rename one of them")
    return list(merges.values())
