"""Proves that a model on disk is the merge that it says it is; writes nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mergekit_metagpt.commands.errors import in_one_line
from mergekit_metagpt.commands.merging import REPORT
from mergekit_metagpt.merge_config import (
    checks,
    families,
    jobs,
    merge_yaml,
    replaying,
    running,
    tensor_coefficients,
)
from mergekit_metagpt.report import inspecting, schema
from mergekit_metagpt.scanning import once

if TYPE_CHECKING:
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions

# mergekit's copy of the YAML, beside the merged model.
YAML = "mergekit_config.yml"
# Bytes of the output that are replayed by default.
SAMPLE = 200_000_000
# Compiled loops and torch measure coefficients that differ by less.
_TOLERANCE = 1e-9


class _Stopped(ValueError):
    """A check that could not be done, without which no later one can be."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(why)
        self.check = schema.Check(name=name, verdict="not checked", details=why)


def verify(
    out: Path, options: MergeOptions, *, full: bool = False, seed: int = 0
) -> schema.Verification:
    """Compare a merged model with its plan, its record, its inputs and a replay.

    Args:
        out: folder made by `merge`, or by mergekit-yaml with one of our methods.
        options: mergekit's: how to load models, and the random seed of the merge if
            that was not recorded.
        full: replay all tensors, not a sample of them.
        seed: seed of the sample.

    Returns:
        the result of each check.
    """
    found: list[schema.Check] = []
    try:
        for check in _checks(out, options, full=full, seed=seed):
            found.append(check)
    except _Stopped as stopped:
        found.append(stopped.check)
    order: tuple[schema.Verdict, ...] = ("different", "not checked", "verified")
    verdicts = {"verified", *(check.verdict for check in found)}
    verdict = next(each for each in order if each in verdicts)
    return schema.Verification(verdict=verdict, seed=seed, checks=tuple(found))


def _checks(
    out: Path, options: MergeOptions, *, full: bool, seed: int
) -> Iterator[schema.Check]:
    out = out.resolve()
    with _check("configuration"):
        config = _config(out)
    record: schema.Report | None = None
    verdict: schema.Verdict = "not recorded"
    unrecorded = f"{REPORT} is missing, as after mergekit-yaml"
    try:
        record = record_of(out)
    except (ValueError, OSError) as error:
        verdict, unrecorded = "not checked", in_one_line(error)
    options = _as_merged(options, record)
    try:
        result = replaying.open_result(out)
    except (ValueError, OSError) as error:
        details = in_one_line(error)
        yield schema.Check(name="files", verdict="different", details=details)
        return
    details = f"{_count(result.files, 'file')}, {_bytes(result.bytes)}, whole"
    yield schema.Check(name="files", verdict="verified", details=details)

    with _check("inputs"):
        job = _reopen(config, options)
    misfits = list(replaying.headers_differ(job, result))
    expected = _count(len(job.expected), "tensor")
    planned = f"{expected}, as mergekit plans them"
    yield _compared("tensors", misfits, expected, planned)
    if record is None:
        for name in ("inputs", "coefficients"):
            yield schema.Check(name=name, verdict=verdict, details=unrecorded)
    else:
        with _check("coefficients"), _as_estimated(record):
            merged = families.of_config(config)
            current = inspecting.inspect(merged, job.opened, gram=None)
            if any(family.varying for family in merged):
                shares = tensor_coefficients.of_plan(job.planned)
                current = inspecting.with_ranges(current, merged, shares)
        yield _inputs(record, current)
        yield _coefficients(record, current)
    with _check("values"), _as_estimated(record):
        names = result.headers.keys() & job.expected
        found = _values(job, options, record, result, names, full=full, seed=seed)
    yield found


def _as_estimated(record: schema.Report | None) -> AbstractContextManager[None]:
    """Estimate norms if the merge did, even if exact ones are in the cache by now."""
    return once.again(estimated=record is None or record.estimated)


@contextmanager
def _check(name: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, MemoryError) as error:
        raise _Stopped(name, in_one_line(error)) from error


def _config(out: Path) -> MergeConfiguration:
    file = out / YAML
    if not file.is_file():
        raise ValueError(
            f"{file} is missing, without which there is nothing to compare with. "
            "mergekit writes it unless --no-write-model-card is given"
        )
    try:
        config = merge_yaml.read(file.read_text(encoding="utf-8"))
        if config.merge_method not in checks.METHODS:
            raise ValueError(
                f"merge_method is {config.merge_method!r}; verify takes merges by "
                f"{', '.join(checks.METHODS)}. To check one that `export` wrote, merge "
                "its metagpt YAML too, and compare the tensors"
            )
        checks.check_yaml(config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return config


def record_of(out: Path) -> schema.Report | None:
    """Read the report that `merge` left in a merged model's folder, if any."""
    file = out / REPORT
    if not file.exists():
        return None
    try:
        return schema.Report.model_validate_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{file} is damaged, or of another version of mergekit-metagpt"
        ) from error


def _as_merged(options: MergeOptions, record: schema.Report | None) -> MergeOptions:
    """The options of the merge, if it recorded them."""
    if record is None or record.options is None:
        return options
    recorded = record.options.model_dump(exclude={"threads"})
    if options.random_seed is not None:
        recorded["random_seed"] = options.random_seed
    return options.model_copy(update=recorded)


def _reopen(config: MergeConfiguration, options: MergeOptions) -> jobs.Job:
    """Open the inputs, where the YAML says they are."""
    try:
        return jobs.reopen(config, options)
    except (ValueError, OSError) as error:
        paths = [model.model.path for model in merge_yaml.models(config)]
        local = [path for path in paths if path.startswith(".")]
        hint = ""
        # If some exist, this is the right folder.
        if local and not any(Path(path).exists() for path in local):
            hint = (
                f". Local models in {YAML} are named relative to the folder where they "
                "were merged: run verify there, or write their places into that file"
            )
        raise ValueError(f"{error}{hint}") from error


def _compared(
    name: str,
    differences: Sequence[replaying.Difference],
    count: str,
    verified: str,
    hint: str = "",
) -> schema.Check:
    if not differences:
        return schema.Check(name=name, verdict="verified", details=verified)
    first = "; ".join(f"{found.name} {found.what}" for found in differences[:3])
    largest = [d.largest for d in differences if d.largest is not None]
    most = max(largest) if largest else None
    by = "" if most is None else f", by {most:.3g} at most"
    return schema.Check(
        name=name,
        verdict="different",
        details=f"{len(differences)} of {count} differ{by}: {first}{hint}",
        different=tuple(found.name for found in differences),
        largest_difference=most,
    )


def changed(
    record: schema.Report, current: schema.Report
) -> list[tuple[schema.Stored, schema.Stored]]:
    """Pair what an earlier report and a new one say of files that have changed."""
    pairs = zip(_stored(record), _stored(current), strict=False)
    return [(old, new) for old, new in pairs if old.source.digest != new.source.digest]


def _stored(report: schema.Report) -> list[schema.Stored]:
    return [s for family in report.families for s in (family.base, *family.models)]


def _inputs(record: schema.Report, current: schema.Report) -> schema.Check:
    then, now = len(_stored(record)), len(_stored(current))
    if then != now:
        return schema.Check(
            name="inputs",
            verdict="different",
            details=f"{REPORT} records {then} inputs, {YAML} names {now}",
        )
    others = [
        replaying.Difference(
            new.name,
            f"has the digest {new.source.digest[:12]}, recorded is "
            f"{old.source.digest[:12]}",
        )
        for old, new in changed(record, current)
    ]
    inputs = _count(now, "input")
    return _compared("inputs", others, inputs, f"{inputs}, with the recorded digests")


def _coefficients(record: schema.Report, current: schema.Report) -> schema.Check:
    then, now = map(_shares, (record, current))
    others = [
        replaying.Difference(
            name,
            f"is recorded as {old:.10g}, measured {new:.10g}",
            abs(old - new),
        )
        for (_, old), (name, new) in zip(then, now, strict=False)
        if not math.isclose(old, new, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    ]
    if len(then) != len(now):
        others.append(
            replaying.Difference(
                "the number of coefficients",
                f"is recorded as {len(then)}, measured {len(now)}",
            )
        )
    shown = ", ".join(
        f"{_span(model)} {model.name}"
        for family in current.families
        for model in family.models
    )
    count = _count(len(now), "coefficient")
    return _compared("coefficients", others, count, shown)


def _span(model: schema.Model) -> str:
    if model.coefficient is not None:
        return f"{model.coefficient:.4g}"
    return " to ".join(dict.fromkeys(f"{end:.4g}" for end in model.coefficient_range))


def _shares(report: schema.Report) -> list[tuple[str, float]]:
    """All coefficients of a report: of each model, or their range, and of each pool."""
    shares = []
    for family in report.families:
        for model in family.models:
            if model.coefficient is not None:
                shares.append((model.name, model.coefficient))
                continue
            smallest, largest = model.coefficient_range
            shares.append((f"the smallest coefficient of {model.name}", smallest))
            shares.append((f"the largest coefficient of {model.name}", largest))
        for pool in family.pools:
            values = pool.coefficients or ()
            for model, value in zip(family.models, values, strict=False):
                shares.append((f"{model.name} in {pool.key}", value))
    return shares


def _values(
    job: jobs.Job,
    options: MergeOptions,
    record: schema.Report | None,
    result: replaying.Result,
    names: Collection[str],
    *,
    full: bool,
    seed: int,
) -> schema.Check:
    method, random = job.config.merge_method, replaying.draws(job.config)
    recorded = record.options if record else None
    then = recorded.random_seed if recorded else None
    why = ""
    if not replaying.has_device(str(options.device)):
        why = (
            f"the merge was made on {options.device}, which this machine does not have"
        )
    elif random and options.multi_gpu:
        why = f"{method} drew random numbers on several GPUs at once"
    elif random and options.random_seed is None:
        why = (
            f"{method} draws random numbers, and no seed is recorded. Give "
            "the --random-seed N of the merge; without one, no merge can be repeated"
        )
    elif random and then not in (None, options.random_seed):
        why = (
            f"{REPORT} records the random seed {then}, and {options.random_seed} was "
            "given. Leave out --random-seed"
        )
    if why:
        details = f"cannot be replayed: {why}"
        return schema.Check(name="values", verdict="not checked", details=details)
    chosen = set(names)
    if not full and not random:
        chosen = replaying.sample(result, names, SAMPLE, seed)
    with _threads(recorded.threads if recorded else torch.get_num_threads()):
        differences = replaying.replay(job.config, options, result.folder, chosen)
    how = f", sampled with seed {seed}" if len(chosen) < len(names) else ""
    if random:
        how = f", merged in order with random seed {options.random_seed}"
    size = _bytes(result.size(chosen))
    return _compared(
        "values",
        differences,
        f"{_count(len(chosen), 'replayed tensor')}",
        f"{len(chosen)} of {len(names)} tensors replayed ({size}{how}), equal to the "
        "last bit",
        _hint(record, unseeded=random and then is None),
    )


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Set torch's number of threads, on which the last bits of some sums depend."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _hint(record: schema.Report | None, *, unseeded: bool) -> str:
    """What else than other weights may explain a difference."""
    seed = ". Or the merge was given another seed" if unseeded else ""
    if record is None:
        threads = torch.get_num_threads()
        return (
            f". Without {REPORT}, a merge on the CPU by {_count(threads, 'thread')} is "
            f"assumed (OMP_NUM_THREADS sets another number){seed}"
        )
    current = running.versions()
    changed = [
        f"{package} {of} (here {current.get(package)})"
        for package, of in record.versions.items()
        if of != current.get(package)
    ]
    made = f". The merge was made with {', '.join(changed)}" if changed else ""
    return f"{made}{seed}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
