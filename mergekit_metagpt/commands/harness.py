"""Scores language models on tasks of lm-eval, EleutherAI's harness."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from mergekit_metagpt.scanning.cache import TaskScores

# As in lm-eval's own command.
FEWSHOT_SEED = 1234
BATCH = 8


@dataclass(frozen=True)
class Task:
    """A task, with its documents loaded.

    Attributes:
        name: its name.
        loaded: lm-eval's own object.
        limit: most documents to score; None for all.
        higher_is_better: by metric.
    """

    name: str
    loaded: Any
    limit: int | None
    higher_is_better: Mapping[str, bool]

    @property
    def count(self) -> int:
        """The number of documents that are scored."""
        count = len(self.loaded.eval_docs)
        return count if self.limit is None else min(count, self.limit)

    @property
    def digest(self) -> str:
        """SHA-256 of all that scores depend on beside the model, in hexadecimal."""
        documents = list(islice(self.loaded.eval_docs, self.count))
        about = [version("lm-eval"), self.loaded.dump_config(), documents]
        return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()


def load(names: Sequence[str], limit: int | None = None) -> list[Task]:
    """Load tasks and their documents.

    Args:
        names: tasks or groups of lm-eval, or YAML files of tasks.
        limit: most documents of each task; None for all.

    Returns:
        the tasks, with groups split into theirs.

    Raises:
        ValueError: lm-eval is not installed, or cannot load a task.
    """
    if not names:
        return []
    found: list[Task] = []
    with _quiet():
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise ValueError(
                "--task needs lm-eval, which is not installed here. Install this "
                'package with its extra eval: python -m pip install ".[eval]"'
            ) from error
        # To index lm-eval's own tasks takes seconds.
        own = not all(Path(name).is_file() for name in names)
        manager = TaskManager(include_defaults=own)
        for name in names:
            try:
                loaded = manager.load([name])["tasks"]
            except Exception as error:  # lm-eval and datasets may raise anything
                said = " ".join(str(error).split())
                raise ValueError(
                    f"--task {name} cannot be loaded: {said}. Expected a task of "
                    "lm-eval (`lm-eval ls tasks` lists them), or the YAML file of one"
                ) from error
            for key, task in loaded.items():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=FEWSHOT_SEED)
                found.append(Task(key, task, limit, task.higher_is_better()))
    keys = [task.name for task in found]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ValueError(f"--task {twice[0]} is given twice. Give each task once")
    for task in found:
        if task.count < 2:
            raise ValueError(
                f"--task {task.name} has {task.count} documents; expected 2 or more, "
                "for a standard error"
            )
    return found


def score(model: Any, tokenizer: Any, task: Task) -> TaskScores:
    """Score a model on the documents of a task.

    Args:
        model: transformers' causal language model.
        tokenizer: its own.
        task: what `load` returned.

    Returns:
        the scores of each document, by metric.

    Raises:
        ValueError: lm-eval refuses the task, or none of its metrics is a mean over
            documents.
    """
    with _quiet():
        from lm_eval.evaluator import evaluate
        from lm_eval.models.huggingface import HFLM

        try:
            found = evaluate(
                lm=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH),
                task_dict={"tasks": {task.name: task.loaded}, "groups": {}},
                limit=task.limit,
                bootstrap_iters=0,
            )
        except (ValueError, KeyError) as error:
            raise ValueError(f"--task {task.name}: {error}") from error
    values = found["results"][task.name]
    documents: dict[str, list[float]] = {}
    for sample in found["samples"][task.name]:
        for metric in sample["metrics"]:
            name = (
                metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
            )
            documents.setdefault(name, []).append(sample[metric])
    means = {
        name: scores
        for name, scores in documents.items()
        if all(isinstance(score, int | float) for score in scores)
        and _is_mean(scores, values[name if "," in name else f"{name},none"])
    }
    if not means:
        raise ValueError(
            f"--task {task.name}: none of its metrics ({', '.join(documents)}) is a "
            "mean over documents, so that merges cannot be compared by them. Expected "
            "one such as acc or exact_match"
        )
    return TaskScores(
        documents={
            n: [float(score) for score in scores] for n, scores in means.items()
        },
        higher_is_better={
            name: task.higher_is_better.get(name.partition(",")[0]) is not False
            for name in means
        },
    )


def _is_mean(scores: Sequence[float], value: float) -> bool:
    return abs(sum(scores) / len(scores) - value) <= 1e-9 * max(1.0, abs(value))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence lm-eval: its log, progress bars and warnings."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
