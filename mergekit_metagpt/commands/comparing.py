"""Merges candidates one after the other, measures them on texts, keeps the best."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.commands import harness, losses, merging, outcomes, together
from mergekit_metagpt.commands.harness import Task
from mergekit_metagpt.commands.losses import Tokenized
from mergekit_metagpt.merge_config import candidates as merges
from mergekit_metagpt.merge_config import checks, families, jobs, merge_yaml, plan
from mergekit_metagpt.merge_config.candidates import Candidate
from mergekit_metagpt.report import card, comparison, inspecting, ranking, scoring
from mergekit_metagpt.scanning import cache, pools, ranks

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.options import MergeOptions

LOG = logging.getLogger("mergekit_metagpt")
CONTEXT = 512
PACKAGES = ("mergekit-metagpt", "mergekit", "torch", "transformers")


@dataclass(frozen=True)
class Request:
    """What is to be compared, on what and how.

    Attributes:
        config: a merge YAML of any method with a base.
        texts: files by the name of a specialist, or by any other name.
        candidates: further merge YAMLs by their names.
        powers: further exponents of the norms.
        scales: further values of `lambda`, `keep` among them.
        device: `cpu`, `cuda` or `auto`.
        dtype: to compute in; None is float32 on a CPU and bfloat16 elsewhere.
        tokens: of each text, at most.
        context: tokens of a chunk; None is 512, or what the base can take.
        tasks: of the EleutherAI harness, or YAML files of such tasks.
        limit: documents of each task, at most; None for all.
    """

    config: Path
    texts: Mapping[str, Path]
    candidates: Mapping[str, Path]
    powers: Sequence[float] = ()
    scales: Sequence[float | str] = ()
    device: str = "auto"
    dtype: str | None = None
    tokens: int = 20_000
    context: int | None = None
    tasks: Sequence[str] = ()
    limit: int | None = None


@dataclass(frozen=True)
class _Subject:
    """A model to measure: one that is there, or a merge.

    Attributes:
        opened: the headers of all that it is made of.
        candidate: the merge, or None.
        tokenized: the texts in the tokens of those whose tokenizer it may have.
        tokenizer: its own, or None of a merge.
    """

    opened: Sequence[Any]
    candidate: Candidate | None
    tokenized: Sequence[Sequence[Tokenized]]
    tokenizer: Any = None

    @property
    def origin(self) -> list[Any]:
        """What all that it predicts depends on, beside weights and settings."""
        configs = [(model.folder / "config.json").read_bytes() for model in self.opened]
        return [
            self.candidate.key if self.candidate else "",
            [hashlib.sha256(config).hexdigest() for config in configs],
        ]

    def about(self, text: int) -> list[Any]:
        """What its losses on a text depend on, beside weights and settings."""
        return [*self.origin, sorted(texts[text].digest for texts in self.tokenized)]

    def about_task(self, task: Task) -> list[Any]:
        """What its scores on a task depend on, beside weights and settings."""
        tokenizers = [
            hashlib.sha256(file.read_bytes()).hexdigest()
            for model in self.opened
            for file in sorted(model.folder.glob("*token*"))
            if file.is_file()
        ]
        return [*self.origin, tokenizers, task.digest]


def compare(
    request: Request,
    options: MergeOptions,
    *,
    keep: Path | None = None,
    write: Path | None = None,
    force: bool = False,
) -> comparison.Comparison:
    """Measure a base, its specialists and merges of them on texts of the user's own.

    One model is in memory at a time, and one merge on disk. Losses that an earlier run
    measured are taken from the cache.

    Args:
        request: what is to be compared.
        options: mergekit's; random methods get the seed 0 unless they name another.
        keep: folder for the best merge.
        write: file for the YAML of the best merge.
        force: whether `keep` may exist; `write` is replaced.

    Returns:
        the comparison.

    Raises:
        ValueError: a configuration, a model or a text is refused.
        OSError: a file cannot be read or written.
    """
    import torch

    if options.random_seed is None:
        options = options.model_copy(update={"random_seed": 0})
    if not request.texts and not request.tasks:
        raise ValueError(
            "there is nothing to compare by. Give --text MODEL=FILE for the models "
            "whose skills count, or --task TASK"
        )
    text, config = merge_yaml.read_file(request.config)
    if keep is not None:
        merging.check_place(keep.resolve(), request.config, config, force=force)
    merged = families.of_config(config)
    models = list(dict.fromkeys(m for f in merged for m in (f.base, *f.models)))
    base, *specialists = models
    of_text = _models_by_text(request.texts, specialists)
    with ranks.leader_first():
        opened = families.open_models(merged, options)
    device = request.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here. Give --device cpu")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = request.dtype or ("float32" if device == "cpu" else "bfloat16")
    context = request.context or min(CONTEXT, _limit(opened[base].folder, options))

    # Everything is checked before the first model is merged.
    tasks = harness.load(request.tasks, request.limit)
    tokenizers = _tokenizers(models, options)
    cut = {
        name: _cut(name, file, of_text[name], tokenizers, base, context, request.tokens)
        for name, file in request.texts.items()
    }
    wanted = merges.usual(
        text,
        (len(family.models) for family in merged),
        _embeddings(opened, base),
        request.powers,
        request.scales,
        merged[0].settings.sample,
    )
    own = [
        merges.of_text(name, merge_yaml.read_file(file)[0], f"the YAML of {file.name}")
        for name, file in request.candidates.items()
    ]
    listed = merges.distinct([*wanted, *own])
    inputs = {candidate.name: _check(candidate, options) for candidate in listed}
    gram = True if "keep" in request.scales else None
    report = inspecting.inspect(merged, opened, gram=gram)
    together.only_leader(ranks.group())
    if not options.allow_crimes:
        inspecting.require_near(report)
    for line in dict.fromkeys(w for family in report.families for w in family.warnings):
        LOG.warning("%s", line)

    names = _short_names(models, taken=inputs)
    tokenized = {
        model: [losses.tokenize(chunks, tokenizers[model]) for chunks in cut.values()]
        for model in models
    }
    subjects = {
        names[model]: _Subject(
            [opened[model]], None, [tokenized[model]], tokenizers[model]
        )
        for model in models
    }
    for candidate in listed:
        parts = list(inputs[candidate.name].values())
        subjects[candidate.name] = _Subject(parts, candidate, list(tokenized.values()))
    measured, scores = _measure(subjects, cut, tasks, dtype, device, options)
    merges_by_name = {
        each.name: ranking.Merge(each.names, each.text, "; ".join(each.meanings))
        for each in listed
    }
    about = {
        "versions": {package: version(package) for package in PACKAGES},
        "context": context,
        "dtype": dtype,
        "device": device,
    }
    if tasks:
        harness_version = version("lm-eval")
        about["scoring"] = scoring.compare(
            [task.name for task in tasks], scores, merges_by_name, harness_version
        )
    of_base = measured[names[base]]
    found = comparison.compare(
        [
            comparison.Text(
                name=name,
                file=str(file),
                model=None if of_text[name] is None else names[of_text[name]],
                chunks=len(cut[name]),
                tokens=sum(of_base[k].tokens),
                bytes=sum(of_base[k].bytes),
            )
            for k, (name, file) in enumerate(request.texts.items())
        ],
        measured,
        merges_by_name,
        about,
    )
    (best,) = (candidate for candidate in listed if candidate.name == found.best)
    source = f"{outcomes.origin(request.config, found)}{best.text}"
    if write is not None:
        write.write_text(source, encoding="utf-8")
    if keep is not None:
        _keep(best, source, keep, options, force=force)
        if options.write_model_card:
            with (keep / "README.md").open("a", encoding="utf-8") as stream:
                stream.write(f"\n{card.measured(found)}")
    return found


def _check(candidate: Candidate, options: MergeOptions) -> Mapping[Any, Any]:
    try:
        return jobs.check_any(candidate.config, options)
    except ValueError as error:
        raise ValueError(f"candidate {candidate.name}: {error}") from error


def _models_by_text(
    texts: Mapping[str, Path], specialists: Sequence[ModelReference]
) -> dict[str, ModelReference | None]:
    """Find the specialist of each text; None for a general text."""
    by_name: dict[str, list[ModelReference]] = {}
    for model in specialists:
        full = str(model)
        for name in {full, full.removeprefix("./"), Path(full).name}:
            by_name.setdefault(name, []).append(model)
    of_text: dict[str, ModelReference | None] = {}
    for name in texts:
        meant = by_name.get(name, [None])
        if len(meant) > 1:
            raise ValueError(
                f"--text {name} may mean {' or '.join(map(str, meant))}. Write it in "
                "full, as in the YAML"
            )
        if meant == [None] and (near := merge_yaml.closest(name, by_name)):
            raise ValueError(
                f"--text {name} names no model of the YAML. Did you mean {near}?"
            )
        if meant[0] is not None and meant[0] in of_text.values():
            raise ValueError(f"{meant[0]} has two texts. Join them in one file")
        of_text[name] = meant[0]
    if texts and not any(of_text.values()):
        raise ValueError(
            f"no --text names a model of the YAML ({', '.join(map(str, specialists))})."
            " Give --text MODEL=FILE for the models whose skills count"
        )
    return of_text


def _limit(folder: Path | None, options: MergeOptions) -> int:
    """How many tokens a model can take."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        folder, trust_remote_code=options.trust_remote_code
    )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    return longest or CONTEXT


def _tokenizers(
    models: Sequence[ModelReference], options: MergeOptions
) -> dict[ModelReference, Any]:
    """The tokenizer of each model; the base's where it has none of its own."""
    base = models[0]
    found: dict[ModelReference, Any] = {}
    with losses.quiet_transformers():
        for model in models:
            own = losses.tokenizer_of(
                model.model.path,
                revision=model.model.revision,
                trust_remote_code=options.trust_remote_code,
            )
            if own is None and model == base:
                raise ValueError(
                    f"the base {base} has no tokenizer that can be loaded; expected "
                    "one, to cut texts into tokens. Copy it into its folder"
                )
            found[model] = own or found[base]
    return found


def _cut(
    name: str,
    file: Path,
    model: ModelReference | None,
    tokenizers: Mapping[ModelReference, Any],
    base: ModelReference,
    context: int,
    tokens: int,
) -> list[str]:
    """Cut a text into the chunks that all models get."""
    first = [tokenizers[model]] if model else []
    with losses.quiet_transformers():
        texts = losses.documents(file, [*first, *tokenizers.values()])
        chunks = losses.cut(texts, tokenizers[base], context=context, tokens=tokens)
    if len(chunks) < losses.FEWEST_CHUNKS:
        raise ValueError(
            f"{file} ({name}) gives {len(chunks)} chunks of {context} tokens; expected "
            f"{losses.FEWEST_CHUNKS} or more, for a standard error. Give more text, a "
            f"smaller --context or more --tokens (now {tokens}). If the text is long "
            f"enough, does the tokenizer of {base} split it into words?"
        )
    return chunks


def _embeddings(opened: Mapping[ModelReference, Any], base: ModelReference) -> str:
    """An `exclude` that names the tensors with an entry for each token."""
    stored = {name for checkpoint in opened.values() for name in checkpoint.tensors}
    names = opened[base].vocabulary & stored
    return pools.exclude_for(names, stored - names)


def _short_names(
    models: Sequence[ModelReference], taken: Mapping[str, Any]
) -> dict[ModelReference, str]:
    """Names for tables: the last part of each, where it is of one model only."""
    last = {model: Path(str(model)).name for model in models}
    parts = [*last.values(), *taken]
    return {m: part if parts.count(part) == 1 else str(m) for m, part in last.items()}


def _measure(
    subjects: Mapping[str, _Subject],
    cut: Mapping[str, Sequence[str]],
    tasks: Sequence[Task],
    dtype: str,
    device: str,
    options: MergeOptions,
) -> tuple[dict[str, list[cache.ChunkLosses]], dict[str, list[cache.TaskScores]]]:
    """Measure every model on all texts and tasks; look up what an earlier run knows."""
    from tqdm import tqdm

    settings = [dtype, device, options.random_seed, *map(version, PACKAGES)]
    texts, chunks = list(cut), list(cut.values())
    abouts, known = {}, {}
    about_tasks, scored = {}, {}
    for name, subject in subjects.items():
        for k in range(len(texts)):
            about = json.dumps([*subject.about(k), *settings])
            abouts[name, k] = about
            known[name, k] = cache.read_measured(
                cache.ChunkLosses, subject.opened, about
            )
        for task in tasks:
            about = json.dumps([*subject.about_task(task), *settings])
            about_tasks[name, task.name] = about
            scored[name, task.name] = cache.read_measured(
                cache.TaskScores, subject.opened, about
            )
    counts = {task.name: task.count for task in tasks}
    bar = tqdm(
        total=sum(len(chunks[k]) for (_, k), found in known.items() if not found)
        + sum(counts[task] for (_, task), found in scored.items() if not found),
        unit="chunk",
        file=sys.stderr,
        disable=None,
        leave=False,
        smoothing=0,  # merges take time too
    )
    with bar, losses.quiet_transformers():
        for name, subject in subjects.items():
            missing = [k for k in range(len(texts)) if known[name, k] is None]
            left = [task for task in tasks if scored[name, task.name] is None]
            if not missing and not left:
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
                    shown = [losses.tokenize(text, own) for text in chunks]
                for k in missing:
                    bar.set_description(f"{name} on {texts[k]}")
                    new = losses.evaluate(model, shown[k], progress=bar.update)
                    for checkpoint in subject.opened:
                        checkpoint.verify_unchanged()
                    cache.write_measured(subject.opened, abouts[name, k], new)
                    known[name, k] = new
                for task in left:
                    bar.set_description(f"{name} on {task.name}")
                    scores = harness.score(model, own, task)
                    bar.update(task.count)
                    for checkpoint in subject.opened:
                        checkpoint.verify_unchanged()
                    about = about_tasks[name, task.name]
                    cache.write_measured(subject.opened, about, scores)
                    scored[name, task.name] = scores
                del model
    return (
        {
            name: [known[name, k] for k in range(len(texts))]  # type: ignore[misc]
            for name in subjects
        },
        {
            name: [scored[name, task.name] for task in tasks]  # type: ignore[misc]
            for name in subjects
        },
    )


@contextmanager
def _on_disk(subject: _Subject, options: MergeOptions) -> Iterator[Path]:
    """Yield the folder of a model; a merge is made for as long as it is needed."""
    if subject.candidate is None:
        yield subject.opened[0].folder
        return
    changes = {"quiet": True, "write_model_card": False}
    options = options.model_copy(update=changes)
    options.apply_global_options()
    with merging.workplace(Path(tempfile.gettempdir()) / "metagpt-compare") as home:
        level = LOG.level
        LOG.setLevel(logging.ERROR)  # all that matters was said of the YAML itself
        try:
            plan.run(
                subject.candidate.config,
                str(home / "merged"),
                options,
                source=subject.candidate.text,
                warned=False,
            )
        finally:
            LOG.setLevel(level)
        yield home / "merged"


def _keep(
    best: Candidate, source: str, out: Path, options: MergeOptions, *, force: bool
) -> None:
    """Merge the best candidate to where it is to stay."""
    if best.config.merge_method not in checks.METHODS:
        merging.merge_other(best.config, source, out, options)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "best.yml"
        file.write_text(source, encoding="utf-8")
        merging.merge(file, out, options, force=force)
