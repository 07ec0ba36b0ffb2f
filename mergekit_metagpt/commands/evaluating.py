"""Evaluates models and merges on texts and tasks, with one of them in memory."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.commands import harness, losses, placing
from mergekit_metagpt.commands.harness import Task
from mergekit_metagpt.commands.losses import Tokenized
from mergekit_metagpt.merge_config import running
from mergekit_metagpt.merge_config.candidates import Candidate
from mergekit_metagpt.scanning import cache
from mergekit_metagpt.scanning.cache import ChunkLosses, TaskScores

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

LOG = logging.getLogger("mergekit_metagpt")


@dataclass(frozen=True)
class Subject:
    """What is evaluated: a model on disk, or a merge.

    Attributes:
        opened: headers of the model, or of all inputs of the merge.
        candidate: the merge; None for a model on disk.
        tokenized: the texts in the tokens of the model, or of each input of the merge.
        tokenizer: of the model; None for a merge.
    """

    opened: Sequence[Any]
    candidate: Candidate | None
    tokenized: Sequence[Sequence[Tokenized]]
    tokenizer: Any = None

    @property
    def origin(self) -> list[Any]:
        """All that its predictions depend on, beside weights and settings."""
        configs = [(model.folder / "config.json").read_bytes() for model in self.opened]
        return [
            self.candidate.key if self.candidate else "",
            [hashlib.sha256(config).hexdigest() for config in configs],
        ]

    def about_text(self, text: int) -> list[Any]:
        """All that its losses on a text depend on, beside weights and settings."""
        return [*self.origin, sorted(texts[text].digest for texts in self.tokenized)]

    def about_task(self, task: Task) -> list[Any]:
        """All that its scores on a task depend on, beside weights and settings."""
        tokenizers = [
            hashlib.sha256(file.read_bytes()).hexdigest()
            for model in self.opened
            for file in sorted(model.folder.glob("*token*"))
            if file.is_file()
        ]
        return [*self.origin, tokenizers, task.digest]


def evaluate(
    subjects: Mapping[str, Subject],
    texts: Mapping[str, Sequence[str]],
    tasks: Sequence[Task],
    options: MergeOptions,
    *,
    dtype: str,
    device: str,
) -> tuple[dict[str, list[ChunkLosses]], dict[str, list[TaskScores]]]:
    """Evaluate each model on all texts and tasks, unless an earlier run did.

    One model is in memory at a time, and one merge on disk.

    Args:
        subjects: models and merges by name.
        texts: chunks of each text, by its name.
        tasks: of lm-eval.
        options: mergekit's.
        dtype: to compute in.
        device: `cpu` or `cuda`.

    Returns:
        losses on each text and scores on each task, by the name of the model.

    Raises:
        ValueError: a model cannot be merged, loaded or evaluated.
        OSError: an input has changed, or a file cannot be read or written.
    """
    from tqdm import tqdm

    settings = [dtype, device, options.random_seed, *running.versions().values()]
    # One entry for each text, then one for each task.
    labels = [*texts, *(task.name for task in tasks)]
    counts = [*map(len, texts.values()), *(task.count for task in tasks)]
    abouts: dict[str, list[str]] = {}
    measured: dict[str, list[Any]] = {}
    for name, subject in subjects.items():
        on_texts = [subject.about_text(k) for k in range(len(texts))]
        on_tasks = [subject.about_task(task) for task in tasks]
        abouts[name] = [json.dumps([*on, *settings]) for on in (*on_texts, *on_tasks)]
        measured[name] = [
            cache.read_entry(ChunkLosses, subject.opened, about)
            if at < len(texts)
            else cache.read_entry(TaskScores, subject.opened, about)
            for at, about in enumerate(abouts[name])
        ]
    missing = {
        name: [at for at, known in enumerate(row) if known is None]
        for name, row in measured.items()
    }
    bar = tqdm(
        total=sum(counts[at] for row in missing.values() for at in row),
        unit="chunk",
        file=sys.stderr,
        disable=None,
        leave=False,
        smoothing=0,  # merges take time too
    )
    with bar, losses.quiet_transformers():
        for name, subject in subjects.items():
            if not missing[name]:
                continue
            bar.set_description(f"merging {name}" if subject.candidate else name)
            with _on_disk(subject, options) as folder:
                trust = options.trust_remote_code
                model = losses.load(
                    folder, dtype=dtype, device=device, trust_remote_code=trust
                )
                shown, own = subject.tokenized[0], subject.tokenizer
                if subject.candidate:
                    own = losses.tokenizer_of(str(folder), trust_remote_code=trust)
                    shown = [losses.tokenize(text, own) for text in texts.values()]
                for at in missing[name]:
                    bar.set_description(f"{name} on {labels[at]}")
                    found: Any
                    if at < len(texts):
                        found = losses.evaluate(model, shown[at], progress=bar.update)
                    else:
                        found = harness.score(model, own, tasks[at - len(texts)])
                        bar.update(counts[at])
                    for checkpoint in subject.opened:
                        checkpoint.verify_unchanged()
                    cache.write_entry(found, subject.opened, abouts[name][at])
                    measured[name][at] = found
                del model  # before the next one is loaded
    return (
        {name: row[: len(texts)] for name, row in measured.items()},
        {name: row[len(texts) :] for name, row in measured.items()},
    )


@contextmanager
def _on_disk(subject: Subject, options: MergeOptions) -> Iterator[Path]:
    """Yield the folder of a model; a merge is made, and removed afterwards."""
    if subject.candidate is None:
        yield subject.opened[0].folder
        return
    options = options.model_copy(update={"quiet": True, "write_model_card": False})
    options.apply_global_options()
    with placing.workplace(Path(tempfile.gettempdir()) / "metagpt-compare") as home:
        level = LOG.level
        LOG.setLevel(logging.ERROR)  # warnings were logged once, for the YAML itself
        try:
            running.run(
                subject.candidate.config,
                str(home / "merged"),
                options,
                source=subject.candidate.text,
                warned=False,
            )
        finally:
            LOG.setLevel(level)
        yield home / "merged"
