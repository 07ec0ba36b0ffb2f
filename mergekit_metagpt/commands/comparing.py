"""Compares merges of the same models on texts and tasks, and keeps the best."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.commands import (
    harness,
    losses,
    merging,
    outcomes,
    placing,
    together,
)
from mergekit_metagpt.commands.evaluating import Subject, evaluate
from mergekit_metagpt.commands.printing import write_text
from mergekit_metagpt.merge_config import candidates as merges
from mergekit_metagpt.merge_config import (
    checks,
    families,
    jobs,
    merge_yaml,
    replaying,
    running,
    yaml_errors,
)
from mergekit_metagpt.merge_config.candidates import Candidate
from mergekit_metagpt.report import card, comparison, inspecting, ranking, scoring
from mergekit_metagpt.scanning import pools, sharing

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.options import MergeOptions

LOG = logging.getLogger("mergekit_metagpt")
CONTEXT = 512


@dataclass(frozen=True)
class Request:
    """What to compare, by which measure, and how.

    Attributes:
        config: a merge YAML of any method with a base.
        texts: files by the name of a specialist, or by any other name.
        candidates: further merge YAMLs by their names.
        powers: further exponents of the norms.
        scales: further values of `lambda`; may include `keep`.
        device: `cpu`, `cuda` or `auto`.
        dtype: to compute in; None is float32 on a CPU, bfloat16 on a GPU.
        tokens: most tokens of each text.
        context: tokens of a chunk; None is 512, or what the base can take.
        tasks: tasks of lm-eval, or YAML files of such tasks.
        limit: most documents of each task; None for all.
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


def compare(
    request: Request,
    options: MergeOptions,
    *,
    keep: Path | None = None,
    write: Path | None = None,
    force: bool = False,
) -> comparison.Comparison:
    """Evaluate a base, its specialists and merges of them, and rank the merges.

    Args:
        request: what to compare.
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
    if options.random_seed is None:
        options = options.model_copy(update={"random_seed": 0})
    if not request.texts and not request.tasks:
        raise ValueError(
            "there is nothing to compare by. Give --text MODEL=FILE for the models "
            "whose skills count, or --task TASK"
        )
    text, config = merge_yaml.read_file(request.config)
    if keep is not None:
        placing.require_free(keep.resolve(), request.config, config, force=force)
    merged = families.of_config(config)
    models = list(dict.fromkeys(m for f in merged for m in (f.base, *f.models)))
    base, *specialists = models
    of_text = _models_by_text(request.texts, specialists)
    with sharing.leader_first():
        opened = families.open_models(merged, options)
    device = _device(request.device)
    dtype = request.dtype or ("float32" if device == "cpu" else "bfloat16")
    most = _limit(opened[base].folder, options)
    if most and request.context and request.context > most:
        raise ValueError(
            f"--context is {request.context}; expected at most {most}, the longest "
            f"sequence that the base {base} takes"
        )
    context = request.context or min(CONTEXT, most or CONTEXT)

    # Check everything before the first model is merged.
    tasks = harness.load(request.tasks, request.limit)
    tokenizers = _tokenizers(models, options)
    cut = {
        name: _cut(name, file, of_text[name], tokenizers, base, context, request.tokens)
        for name, file in request.texts.items()
    }
    listed = _candidates(request, text, merged, _embeddings(opened, base))
    inputs = {candidate.name: _check(candidate, options) for candidate in listed}
    gram = True if "keep" in request.scales else None
    report = inspecting.inspect(merged, opened, gram=gram)
    together.only_leader(sharing.group())
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
        names[model]: Subject(
            [opened[model]], None, [tokenized[model]], tokenizers[model]
        )
        for model in models
    }
    for candidate in listed:
        parts = list(inputs[candidate.name].values())
        subjects[candidate.name] = Subject(parts, candidate, list(tokenized.values()))
    measured, scores = evaluate(
        subjects, cut, tasks, options, dtype=dtype, device=device
    )
    merges_by_name = {
        each.name: ranking.Merge(each.names, each.text, "; ".join(each.meanings))
        for each in listed
    }
    about = {
        "versions": running.versions(),
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
    if replaying.draws(best.config):
        seed = options.random_seed
        source = f"# Drops the same elements only with --random-seed {seed}.\n{source}"
    if keep is not None:
        _keep(best, source, keep, options, force=force)
        if options.write_model_card:
            with (keep / "README.md").open("a", encoding="utf-8") as stream:
                stream.write(f"\n{card.measured(found)}")
    if write is not None:  # it may lie in `keep`
        write_text(str(write), source)
    return found


def _device(name: str) -> str:
    """Return `cpu` or `cuda`; for `auto`, a GPU if there is one."""
    import torch

    if name != "cpu" and torch.cuda.is_available():
        return "cuda"
    if name == "cuda":
        raise ValueError("--device cuda: torch sees no GPU here. Give --device cpu")
    return "cpu"


def _candidates(
    request: Request, text: str, merged: Sequence[families.Family], embeddings: str
) -> list[Candidate]:
    """The merges to compare, each once: the usual ones, then the user's own."""
    usual = merges.usual(
        text,
        (len(family.models) for family in merged),
        embeddings,
        request.powers,
        request.scales,
        merged[0].settings.sample,
    )
    own = [
        merges.of_text(name, merge_yaml.read_file(file)[0], f"the YAML of {file.name}")
        for name, file in request.candidates.items()
    ]
    return merges.distinct([*usual, *own])


def _check(candidate: Candidate, options: MergeOptions) -> Mapping[Any, Any]:
    try:
        return jobs.check_any(candidate.config, options).opened
    except ValueError as error:
        raise ValueError(f"candidate {candidate.name}: {error}") from error


def _models_by_text(
    texts: Mapping[str, Path], specialists: Sequence[ModelReference]
) -> dict[str, ModelReference | None]:
    """Find the specialist that each text is for; None for any other text."""
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
        if meant == [None] and (near := yaml_errors.closest(name, by_name)):
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


def _limit(folder: Path | None, options: MergeOptions) -> int | None:
    """The tokens of the longest sequence that a model takes, if that is limited."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        folder, trust_remote_code=options.trust_remote_code
    )
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _tokenizers(
    models: Sequence[ModelReference], options: MergeOptions
) -> dict[ModelReference, Any]:
    """Load each model's tokenizer, or the base's if it has none."""
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
    """Cut a text into chunks, the same for all models."""
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
    """An `exclude` for the tensors that have a row for each token."""
    stored = {name for checkpoint in opened.values() for name in checkpoint.tensors}
    names = opened[base].vocabulary & stored
    return pools.exclude_for(names, stored - names)


def _short_names(
    models: Sequence[ModelReference], taken: Mapping[str, Any]
) -> dict[ModelReference, str]:
    """Shorten names of models to their last part, unless others share it."""
    last = {model: Path(str(model)).name for model in models}
    parts = [*last.values(), *taken]
    return {m: part if parts.count(part) == 1 else str(m) for m, part in last.items()}


def _keep(
    best: Candidate, source: str, out: Path, options: MergeOptions, *, force: bool
) -> None:
    """Merge the best candidate again, into a folder of the user's."""
    if best.config.merge_method not in checks.METHODS:
        merging.merge_other(best.config, source, out, options, force=force)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "best.yml"
        file.write_text(source, encoding="utf-8")
        merging.merge(file, out, options, force=force)
