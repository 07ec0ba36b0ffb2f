"""The command line: parse, call one function, print; errors become exit status 2."""

from __future__ import annotations

import os
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_metagpt import __version__, autoload
from mergekit_metagpt.commands.errors import (
    LEFT,
    Differs,
    OneLineGroup,
    Unverified,
    one_line_errors,
)
from mergekit_metagpt.commands.options import (
    MOST_SEED,
    check_merge_options,
    check_new,
    check_reports,
    is_zero,
    loading_options,
    lora_flags,
    numbers,
    pairs,
    quick_imports,
    require_config,
    require_subjects,
    sample_of,
    scales,
    weights_of,
)
from mergekit_metagpt.commands.printing import (
    show,
    tell_written,
    whole,
    write_json,
    write_text,
    write_yaml,
)
from mergekit_metagpt.report.parts import printable

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

# `compiled.built()` would import torch.
_LOOPS = "yes" if find_spec("_mergekit_metagpt") else "no"


@click.group(cls=OneLineGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    __version__, message=f"%(prog)s, version %(version)s, compiled loops: {_LOOPS}"
)
def main() -> None:
    """MetaGPT merging for mergekit: no weights to guess, no data, no search."""
    if "RANK" in os.environ:
        # Before torch is imported: it would print C++ stacks beside our one line.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="CONFIG | MODEL...")
@click.option("--base", help="The base that MODEL... were fine-tuned from.")
@click.option(
    "--granularity",
    type=click.Choice(["model", "layer", "tensor"]),
    help="What squared norms are pooled over; as in CONFIG by default, else model.",
)
@click.option("--power", type=float, help="Exponent of the norms; 2 is MetaGPT.")
@click.option(
    "--exclude", help="Comma-separated parts of names of tensors that do not count."
)
@click.option(
    "--weight",
    "weights",
    multiple=True,
    metavar="MODEL=W",
    help="Importance of a model, by its name or that of its folder; repeatable.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write all; - for stdout.")
@click.option("--csv", "csv_file", metavar="FILE", help="Write a row for each pool.")
@click.option("--plot", metavar="FILE", help="Draw a figure: .png, .svg or .pdf.")
@click.option(
    "--sample",
    "share",
    metavar="SHARE",
    help="Estimate from a share of each tensor, such as 0.01 or 1%.",
)
@click.option(
    "--budget",
    metavar="BYTES",
    help="Estimate from this much of all models together, such as 500MB.",
)
@click.option(
    "--remote",
    is_flag=True,
    help="Read headers and a sample of hub repositories, without downloading them; "
    "200MB by default, --sample 0 for headers alone.",
)
@click.option("--force", is_flag=True, help="Replace files that exist.")
@click.option(
    "--peft",
    metavar="FILE",
    help="Write a Python script that combines adapters with PEFT; - for stdout.",
)
@one_line_errors
@loading_options
def inspect(
    options: MergeOptions,
    models: tuple[str, ...],
    base: str | None,
    weights: tuple[str, ...],
    json_file: str | None,
    csv_file: str | None,
    plot: str | None,
    share: str | None,
    budget: str | None,
    remote: bool,
    force: bool,
    peft: str | None,
    **settings: Any,
) -> None:
    """Measure the models of CONFIG, or MODEL... against --base, without merging.

    CONFIG is a merge YAML of any method with a base_model. Prints norms of the task
    vectors, the coefficients that MetaGPT gives them, their cosines, the share of each
    part of the model, tensors that a merge leaves out, and warnings. One pass over
    the files. LoRA adapters are measured from their factors; where all of MODEL... are
    adapters, --base is not needed.
    """
    check_reports(
        models, json=json_file, csv=csv_file, peft=peft, plot=plot, force=force
    )

    from mergekit_metagpt.commands import measuring, together
    from mergekit_metagpt.merge_config import families
    from mergekit_metagpt.report import figures, headers, peft_call, tables

    headers_only = remote and is_zero(share)
    if headers_only and plot is not None:
        raise ValueError("--plot draws norms; expected a --sample above 0")
    sample = None if headers_only else sample_of(share, budget, remote=remote)
    wishes = {**settings, "weights": weights_of(weights)}
    with together.as_rank() as group:
        adapters = families.are_adapters(models, base, remote=remote)
        if adapters:
            report = measuring.report_of_adapters(models, **wishes)
        else:
            measure = measuring.remote_report_of if remote else measuring.report_of
            config = measuring.config_of(models, base)
            report = measure(config, options, sample=sample, **wishes)
        together.only_leader(group)
    write_json(json_file, report)
    if csv_file is not None:
        write_text(csv_file, tables.as_csv(report))
    if plot is not None and report.families:
        with whole(plot) as part:
            figures.report_figure(report, part)
    if peft is not None:
        write_text(peft, peft_call.script(report))
    if "-" not in (json_file, csv_file, peft):
        then = measuring.next_step(models, base, adapters=adapters)
        if base is None and not adapters and not remote:
            show(measuring.changed_since_merge(models[0], report))
        show(tables.lay_out(report, then))
        if sample and report.families and not any(f.sample for f in report.families):
            show(["Nothing had to be estimated: all figures are exact."])
    tell_written(json_file, csv_file, plot if report.families else None, peft)
    headers.require_fit(report.headers)


@main.command()
@click.argument("config")
@click.argument("out", metavar="OUT.yml")
@click.option("--force", is_flag=True, help="Replace OUT.yml if it exists.")
@one_line_errors
@loading_options
def export(options: MergeOptions, config: str, out: str, force: bool) -> None:
    """Write the metagpt merge CONFIG as plain mergekit YAML with fixed weights.

    Anyone can merge OUT.yml (- for stdout) with mergekit alone. The result equals that
    of CONFIG up to the last bit of a weight; where it differs by more, a line says so.
    Scans, and does not merge.
    """
    check_new(config, out, force=force)

    from mergekit_metagpt.merge_config import (
        checks,
        families,
        jobs,
        merge_yaml,
        plain_yaml,
    )
    from mergekit_metagpt.report import inspecting

    read = merge_yaml.read_file(Path(config))[1]
    job = jobs.check(read, options, Path(config))
    report = inspecting.inspect(families.of_config(read), job.opened, gram=None)
    if not options.allow_crimes:
        inspecting.require_near(report)
    exported = plain_yaml.export(job, options)
    for change in exported.changes:
        click.echo(f"Differs from {read.merge_method}: {change}.", err=True)
    name = "OUT.yml" if out == "-" else shlex.quote(out)
    flags = " --random-seed N" if read.merge_method in checks.RANDOM_METHODS else ""
    if any(model.lora for model in merge_yaml.models(read)):
        flags += lora_flags("FOLDER", options.lora_merge_dtype)
    then = f"It needs no plugin: mergekit-yaml {name} ./merged{flags}"
    write_yaml(out, exported.text, then=then)


@main.command()
@click.argument("config", metavar="OLD.yml")
@click.argument("out", metavar="NEW.yml")
@click.option("--base", help="The model that all were fine-tuned from.")
@click.option("--force", is_flag=True, help="Replace NEW.yml if it exists.")
@one_line_errors
def convert(config: str, out: str, base: str | None, force: bool) -> None:
    """Turn OLD.yml, a merge by another method, into a metagpt recipe.

    Takes task_arithmetic, linear, model_stock, sce, ties, dare_*, della* and
    breadcrumbs*. Drops the weights, lists all changes on stderr, and opens no model.
    NEW.yml may be - for stdout.
    """
    check_new(config, out, force=force)

    from mergekit_metagpt.merge_config import checks, converting, merge_yaml

    text = merge_yaml.text_of(Path(config))
    try:
        converted = converting.convert(text, base)
    except ValueError as error:
        raise ValueError(f"{config}: {error}") from error
    for change in converted.changes:
        click.echo(printable(change), err=True)
    for note in converted.notes:
        click.echo(f"Note: {printable(note)}.", err=True)
    name = "NEW.yml" if out == "-" else shlex.quote(out)
    then = f"Look first: mergekit-metagpt inspect {name}"
    if converted.method in checks.RANDOM_METHODS:
        then += f". Then: mergekit-metagpt merge {name} OUT --random-seed N"
    write_yaml(out, converted.text, then=then)


@main.command()
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--full", is_flag=True, help="Replay all tensors, not a sample.")
@click.option("--seed", type=int, default=0, help="Seed of the sample; 0 by default.")
@click.option(
    "--random-seed",
    type=click.IntRange(0, MOST_SEED),
    help="Seed of the merge, if mergekit-yaml was given one.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write all; - for stdout.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@one_line_errors
@loading_options
def verify(
    options: MergeOptions,
    out: Path,
    full: bool,
    seed: int,
    random_seed: int | None,
    json_file: str | None,
    force: bool,
) -> None:
    """Prove that the model in OUT is the merge that it says it is.

    Compares OUT with mergekit's plan of OUT/mergekit_config.yml, its inputs with the
    digests and coefficients in OUT/metagpt.json, and some 200 MB of its weights, bit by
    bit, with tensors that mergekit merges again from the inputs. Ends with status 0 if
    all agree, 1 if anything differs, and 3 if anything could not be checked.
    """
    check_reports(json=json_file, force=force)

    from mergekit_metagpt.commands import verifying
    from mergekit_metagpt.merge_config import merge_yaml
    from mergekit_metagpt.report import tables

    merge_yaml.require_folder(out, "the folder of a merged model")
    options = options.model_copy(update={"random_seed": random_seed})
    found = verifying.verify(out, options, full=full, seed=seed)
    write_json(json_file, found)
    if json_file != "-":
        for line in tables.verified(found):
            click.echo(line)
    tell_written(json_file)
    failed = [check.name for check in found.checks if check.verdict == found.verdict]
    names = ", ".join(failed)
    if found.verdict == "different" and "inputs" in failed:
        raise Differs(
            f"the inputs of {out} are not those that it was merged from: see {names}. "
            "Restore them, or their names in its mergekit_config.yml, and verify again"
        )
    recorded = all(check.verdict != "not recorded" for check in found.checks)
    if found.verdict == "different" and failed == ["values"] and not recorded:
        raise Differs(
            f"{out} holds other weights than its YAML gives now: see {names}. Without "
            "a metagpt.json nobody can tell whether an input has changed since, or OUT"
        )
    if found.verdict == "different":
        raise Differs(f"{out} is not the merge that it says it is: see {names}")
    if found.verdict == "not checked":
        raise Unverified(f"{out} could not be verified: see {names}")


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@one_line_errors
def demo(folder: Path) -> None:
    """Train a tiny base and three specialists in DIR, merge and compare them.

    Needs no network. Takes one to two minutes on two cores. Prints squared norms,
    coefficients, cosines and held-out losses; leaves models, texts, YAML files and a
    figure.
    """
    from rich.console import Console

    from mergekit_metagpt.commands import demo_report
    from mergekit_metagpt.commands.demo import run

    chatter = Console(stderr=True)
    result = run(folder, say=lambda line: chatter.print(line, highlight=False))
    figure = folder / "demo.png"
    demo_report.draw(result, figure)
    best = min(result.ald, key=result.ald.__getitem__)
    note = (
        f"Lowest ALD here: {best}. It depends on text, seed and training lengths, and "
        f"is no evidence for a method. Figure: {figure}"
    )
    show([demo_report.task_vectors(result), demo_report.losses(result), note])
    merge, compare = demo_report.by_hand(folder)
    click.echo(f"Merge again by hand, with mergekit's own command:\n{merge}")
    click.echo(f"Compare these and other weights on the held-out texts:\n{compare}")


@main.command()
@click.argument("config")
@click.option(
    "--text",
    "texts",
    multiple=True,
    metavar="MODEL=FILE",
    help="Text of the kind that a model of CONFIG is for: plain, or .jsonl with "
    "`text` or `messages`. Under any other name it is measured but does not count.",
)
@click.option(
    "--task",
    "tasks",
    multiple=True,
    metavar="TASK",
    help="Score on this task of lm-eval, or on one in a YAML file.",
)
@click.option(
    "--candidate",
    "candidates",
    multiple=True,
    metavar="NAME=FILE.yml",
    help="Compare this merge too, by any method of mergekit.",
)
@click.option("--power", metavar="P,P", help="Compare these powers of metagpt too.")
@click.option(
    "--lambda", "scale", metavar="L,L", help="And these values of lambda, or keep."
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=20_000,
    show_default=True,
    help="Tokens of each text, at most.",
)
@click.option(
    "--context",
    type=click.IntRange(8),
    help="Tokens of a chunk; 512 by default, or what the base can take.",
)
@click.option(
    "--limit", type=click.IntRange(2), help="Documents of each task, at most."
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Evaluate in this; by default float32 on a CPU, bfloat16 on a GPU.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write all; - for stdout.")
@click.option("--plot", metavar="FILE", help="Draw a figure: .png, .svg or .pdf.")
@click.option("--write", metavar="BEST.yml", help="Write the YAML of the best merge.")
@click.option("--keep", metavar="DIR", help="Merge the best one again, into DIR.")
@click.option("--force", is_flag=True, help="Replace files and DIR if they exist.")
@one_line_errors
@loading_options
def compare(
    options: MergeOptions,
    config: str,
    texts: tuple[str, ...],
    candidates: tuple[str, ...],
    power: str | None,
    scale: str | None,
    json_file: str | None,
    plot: str | None,
    write: str | None,
    keep: str | None,
    force: bool,
    **settings: Any,
) -> None:
    """Merge by several weights and measure each merge on your own text or tasks.

    Compares CONFIG with metagpt, power 1, the plain average, task arithmetic 0.3 and
    metagpt without embeddings: the loss on each text, and by how much it exceeds that
    of the specialists. Merges are removed again. A second run goes on where the first
    one ended.
    """
    check_reports(
        [config, *(pair.partition("=")[2] for pair in (*texts, *candidates))],
        json=json_file,
        plot=plot,
        write=write,
        keep=keep,
        force=force,
    )

    from mergekit_metagpt.commands import comparing, outcomes, together
    from mergekit_metagpt.report import comparison, comparison_plot, scoring

    if write == "-":
        raise ValueError("--write takes a file; expected one such as best.yml")
    require_subjects(texts=texts, tasks=settings["tasks"])
    request = comparing.Request(
        config=Path(config),
        texts=pairs("--text", texts, "MODEL=FILE"),
        candidates=pairs("--candidate", candidates, "NAME=FILE.yml"),
        powers=numbers("--power", power),
        scales=scales("--lambda", scale),
        **settings,
    )
    with together.as_rank():
        compared = comparing.compare(
            request,
            options,
            keep=Path(keep) if keep else None,
            write=Path(write) if write else None,
            force=force,
        )
    write_json(json_file, compared)
    if plot is not None:
        with whole(plot) as part:
            comparison_plot.comparison_figure(compared, part)
    if json_file != "-":
        if compared.texts:
            show([*comparison.lay_out(compared), compared.verdict])
        if compared.scoring is not None:
            show(scoring.lay_out(compared.scoring))
    click.echo(
        outcomes.closing(compared, json=json_file, plot=plot, write=write, keep=keep),
        err=True,
    )


@main.command()
@click.option("--clear", is_flag=True, help="Remove all entries.")
@one_line_errors
def cache(clear: bool) -> None:
    """Show, or with --clear remove, what is remembered of earlier scans.

    Entries hold squared norms, inner products, losses and scores, but no weights and no
    text. MERGEKIT_METAGPT_CACHE names another folder for them; 0 turns the cache off.
    """
    from mergekit_metagpt.report import tables
    from mergekit_metagpt.scanning import cache

    folder = cache.folder()
    if folder is None:
        click.echo("The cache is off.")
        return
    if clear:
        click.echo(f"Removed {cache.clear()} entries from {folder}.")
        return
    entries = list(cache.entries())
    size = sum(entry.bytes for entry in entries)
    click.echo(f"{folder}: {len(entries)} entries, {size / 1e6:.1f} MB")
    if entries:
        show(["", tables.remembered(entries)])


@main.command()
@click.argument("name", required=False, metavar="[NAME]")
@one_line_errors
def recipes(name: str | None) -> None:
    """List the recipes that ship, or print NAME.

    A recipe is a merge YAML whose first lines say what it merges, what to download, and
    how to run it. `recipes NAME > my.yml` copies one.
    """
    from mergekit_metagpt.commands import shipped_recipes

    if name is None:
        shelf = shipped_recipes.recipes()
        width = max(len(recipe.name) for recipe in shelf)
        for recipe in shelf:
            click.echo(f"{recipe.name:<{width}}  {recipe.summary}")
    else:
        click.echo(shipped_recipes.find(name).text, nl=False)


# Its parser is made when it runs: mergekit's options take seconds to import.
@main.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
    short_help="Merge CONFIG into OUT as mergekit-yaml does, checked first.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
@one_line_errors
def merge(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Merge CONFIG into OUT: all of mergekit-yaml's options, the whole job checked."""
    command = _merge_command()
    try:
        inner = command.make_context(context.command_path, list(arguments))
    except ValueError as error:  # raised by mergekit's reader of this option alone
        raise ValueError(
            "--out-shard-size is no whole number; expected one with K, M or B, such "
            "as 5B"
        ) from error
    from mergekit_metagpt.commands import merging

    context.meta[LEFT] = merging.after_interrupt(inner.params["out"])
    with inner:
        command.invoke(inner)


def _merge_command() -> click.Command:
    with quick_imports():
        from mergekit.options import PrettyPrintHelp, add_merge_options

        from mergekit_metagpt.commands import merging, splitting, together

    @click.command("merge", cls=PrettyPrintHelp)
    @click.argument("config", type=click.Path())
    @click.argument("out", type=click.Path())
    @click.option("--force", is_flag=True, help="Replace OUT if it exists.")
    @click.option(
        "--resume",
        is_flag=True,
        help="Keep finished files if interrupted, and go on from those of an earlier "
        "run; if OUT is complete already, end with status 0.",
    )
    @add_merge_options  # type: ignore[untyped-decorator]
    def command(
        config: str, out: str, force: bool, resume: bool, merge_options: MergeOptions
    ) -> None:
        """Merge CONFIG into OUT as mergekit-yaml does, for metagpt configurations.

        The YAML, the headers of all models and the weights are checked before mergekit
        starts. OUT appears only once it is complete. Needs no autoload.
        """
        check_merge_options(merge_options)
        merged = True
        with together.as_rank(resumable=resume) as group:
            require_config(config, out)
            if group is None:
                merging.merge(Path(config), Path(out), merge_options, force=force)
            else:
                merged = splitting.merge(
                    Path(config),
                    Path(out),
                    merge_options,
                    group,
                    force=force,
                    resume=resume,
                )
            together.only_leader(group)
        if not merged:
            click.echo(
                printable(
                    f"{out} is complete, and its YAML is {config}: there is nothing to "
                    "resume. To merge again, as after a change of models or options, "
                    "give --force"
                ),
                err=True,
            )
            return
        if autoload.failure:
            click.echo(
                f"mergekit-yaml does not know metagpt: {autoload.failure}", err=True
            )
        click.echo(printable(merging.closing(out, merge_options)), err=True)

    return command
