"""The command line: parse, call one function, print; errors become exit status 2."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_metagpt import __version__, autoload
from mergekit_metagpt.commands.errors import Differs, Unverified, one_line_errors
from mergekit_metagpt.report.parts import printable

if TYPE_CHECKING:
    from mergekit.options import MergeOptions
    from rich.console import Console

    from mergekit_metagpt.scanning.sampling import Sample

# Table width when stdout is not a terminal, so that rows are not wrapped.
PIPE_WIDTH = 240
# What `inspect --remote` reads if nothing else is asked for.
REMOTE_BUDGET = "200MB"
# `compiled.built()` would import torch.
_LOOPS = "yes" if find_spec("_mergekit_metagpt") else "no"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(
    __version__, message=f"%(prog)s, version %(version)s, compiled loops: {_LOOPS}"
)
def main() -> None:
    """MetaGPT merging for mergekit: no weights to guess, no data, no search."""


def _console() -> Console:
    from rich.console import Console

    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    width = None if fixed else PIPE_WIDTH
    return Console(width=width, highlight=False, emoji=False)


def _loading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """mergekit's options that say how to load models, collected in MergeOptions."""

    @functools.wraps(command)
    def wrapper(
        lora_merge_cache: str | None,
        transformers_cache: str | None,
        trust_remote_code: bool,
        lazy_unpickle: bool,
        allow_crimes: bool,
        **others: Any,
    ) -> Any:
        import logging

        from mergekit.options import MergeOptions

        logging.basicConfig(level=logging.WARNING)
        options = MergeOptions(
            lora_merge_cache=lora_merge_cache,
            transformers_cache=transformers_cache,
            trust_remote_code=trust_remote_code,
            lazy_unpickle=lazy_unpickle,
            allow_crimes=allow_crimes,
        )
        return command(options=options, **others)

    for option in (
        click.option(
            "--allow-crimes/--no-allow-crimes",
            default=False,
            help="Mix architectures, as in mergekit, and models far from their base.",
        ),
        click.option(
            "--lazy-unpickle/--no-lazy-unpickle",
            default=False,
            help="As in mergekit. (A scan maps pickles into memory either way.)",
        ),
        click.option(
            "--trust-remote-code/--no-trust-remote-code",
            default=False,
            help="Run code that comes with a model, for its configuration (danger).",
        ),
        click.option(
            "--transformers-cache", help="Folder of downloaded models, as in mergekit."
        ),
        click.option(
            "--lora-merge-cache",
            help="Folder for merged LoRA models; needed for base+adapter.",
        ),
    ):
        wrapper = option(wrapper)
    return wrapper


def _config(file: str) -> Any:
    from mergekit_metagpt.merge_config import merge_yaml

    return merge_yaml.read_file(Path(file))[1]


@contextmanager
def _named(file: str) -> Iterator[None]:
    """Say which file it is that a ValueError is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _check_new(out: str, *, force: bool) -> None:
    """Refuse an output file that is there already, or cannot be written."""
    _check_target(out)
    if out != "-" and Path(out).exists() and not force:
        raise ValueError(f"{out} exists; choose another name, or --force")


def _write(out: str, text: str, *, then: str) -> None:
    """Write a YAML all or nothing; say on stderr what is where, and what to do next."""
    with click.open_file(out, "w", encoding="utf-8", atomic=True) as stream:
        stream.write(text)
    place = "stdout" if out == "-" else out
    size = len(text.encode("utf-8"))
    click.echo(printable(f"Wrote {place} ({size:,} bytes). {then}"), err=True)


def _check_target(file: str | None, endings: tuple[str, ...] = ()) -> None:
    """Refuse a file that cannot be written, before the work that it is to hold."""
    if file is None:
        return
    if file == "-":
        if endings:
            raise ValueError("--plot - is no file; expected one to draw the figure in")
        return
    path = Path(file)
    if endings and path.suffix.lower() not in endings:
        raise ValueError(
            f"{file} ends in {path.suffix!r}; expected one of {', '.join(endings)}"
        )
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{file} cannot be written; expected a file in a folder")


def _is_zero(share: str | None) -> bool:
    """Whether --sample asks for no weights at all."""
    return share is not None and set(share.removesuffix("%")) in ({"0"}, {"0", "."})


def _sample(share: str | None, budget: str | None, *, remote: bool) -> Sample | None:
    """What --sample and --budget ask for; None for an exact scan."""
    from mergekit_metagpt.scanning.sampling import Sample

    if share is not None and budget is not None:
        raise ValueError("--sample and --budget are both given; expected one of them")
    if share is not None:
        number, scale = (share[:-1], 100) if share.endswith("%") else (share, 1)
        try:
            value = float(number) / scale
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise ValueError(
                f"--sample is {share!r}; expected a share above 0 and at most 1, such "
                "as 0.01 or 1%"
            )
        return Sample(share=value) if value < 1 else None
    if budget is None and remote:
        budget = REMOTE_BUDGET
    return None if budget is None else Sample(budget=_bytes(budget))


def _bytes(text: str) -> int:
    """Read a number of bytes, such as 500MB."""
    number = text.strip().upper().removesuffix("B")
    scales = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
    scale = scales.get(number[-1:], 1)
    try:
        value = int(float(number[:-1] if scale > 1 else number) * scale)
    except (ValueError, OverflowError):
        value = 0
    if value < 1:
        raise ValueError(f"--budget is {text!r}; expected bytes such as 500MB or 2GB")
    return value


@main.command()
@click.argument("models", nargs=-1, required=True, metavar="CONFIG | MODEL...")
@click.option("--base", help="The base that MODEL... were fine-tuned from.")
@click.option(
    "--granularity",
    type=click.Choice(["model", "layer", "tensor"]),
    help="Pool squared norms over these; by default as CONFIG says, else the model.",
)
@click.option("--power", type=float, help="Exponent of the norms; 2 is MetaGPT.")
@click.option("--exclude", help="Comma-separated parts of names that do not count.")
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
    help="Estimate from as much as this buys, such as 500MB, of all models together.",
)
@click.option(
    "--remote",
    is_flag=True,
    help="Read headers and a sample of hub repositories, without downloading them; "
    "200MB by default, --sample 0 for headers alone.",
)
@one_line_errors
@_loading_options
def inspect(
    options: MergeOptions,
    models: tuple[str, ...],
    base: str | None,
    granularity: str | None,
    power: float | None,
    exclude: str | None,
    json_file: str | None,
    csv_file: str | None,
    plot: str | None,
    share: str | None,
    budget: str | None,
    remote: bool,
) -> None:
    """Measure the models of CONFIG, or MODEL... against --base, without merging.

    CONFIG is a merge YAML of any method with a base_model. Prints norms of the task
    vectors, the coefficients that MetaGPT gives them, their cosines, the share of each
    part of the model, tensors that a merge leaves out, and warnings. One pass over
    the files.
    """
    if json_file == csv_file == "-":
        raise ValueError("--json and --csv are both -; one of them can go to stdout")
    _check_target(json_file)
    _check_target(csv_file)

    from mergekit_metagpt.merge_config import checks, families, jobs, plan
    from mergekit_metagpt.report import figures, headers, inspecting, tables

    _check_target(plot, figures.FORMATS)
    headers_only = remote and _is_zero(share)
    sample = None if headers_only else _sample(share, budget, remote=remote)
    if base is None and len(models) != 1:
        raise ValueError(
            f"{len(models)} models are given and no base; expected one CONFIG, or "
            "--base BASE and the models"
        )
    wishes: dict[str, Any] = {
        "granularity": granularity,
        "power": power,
        "exclude": exclude,
    }
    if base is None:
        yaml_inside = Path(models[0], "mergekit_config.yml")
        if yaml_inside.is_file():  # a merged model
            models = (str(yaml_inside),)
        elif Path(models[0]).is_dir():
            raise ValueError(
                f"{models[0]} is a folder; expected a merge YAML, or --base BASE and "
                "the models"
            )
        config = _config(models[0])
        checks.check_method(config)
        if config.merge_method in checks.METHODS:
            checks.check_names(config)
    else:
        config = families.config_of(base, models)
    merged = families.of_config(config, **wishes)
    planned = refused = None
    opened: Mapping[Any, Any]
    seen: tuple[Any, ...] = ()
    if remote:
        looked = families.glimpse_models(merged, options)
        seen = headers.headers_of(merged, looked)
        opened = {model: at.checkpoint for model, at in looked.items()}
        refused = next((c.refused for c in opened.values() if c.refused), None)
        if headers_only or any(header.misfit for header in seen):
            merged = []
    else:
        opened = families.open_models(merged, options)
        try:
            planned = jobs.check_plan(config, opened, options)
        except ValueError as error:
            refused = str(error)
    report = inspecting.inspect(
        merged,
        opened,
        method=config.merge_method,
        planned=planned,
        refused=refused,
        sample=sample,
    ).model_copy(update={"headers": seen})
    changed = any(value is not None for value in wishes.values())
    if (
        planned
        and not changed
        and not sample
        and any(family.varying for family in merged)
    ):
        found = plan.coefficients(planned)
        report = inspecting.with_ranges(report, merged, found)
    if json_file is not None:
        with click.open_file(json_file, "w", encoding="utf-8") as stream:
            stream.write(report.model_dump_json(indent=2) + "\n")
    if csv_file is not None:
        with click.open_file(csv_file, "w", encoding="utf-8") as stream:
            stream.write(tables.as_csv(report))
    if plot is not None and report.families:
        figures.report_figure(report, Path(plot))
    if "-" not in (json_file, csv_file):
        console = _console()
        for part in tables.lay_out(report):
            text = printable(part) if isinstance(part, str) else part
            console.print(text, soft_wrap=isinstance(part, str), markup=False)
    headers.require_fit(seen)


@main.command()
@click.argument("config")
@click.argument("out", metavar="OUT.yml")
@click.option("--force", is_flag=True, help="Replace OUT.yml if it exists.")
@one_line_errors
@_loading_options
def export(options: MergeOptions, config: str, out: str, force: bool) -> None:
    """Write the metagpt merge CONFIG as plain mergekit YAML with fixed weights.

    Anyone can merge OUT.yml (- for stdout) with mergekit alone and gets the same model
    but for rounding in the last place. Scans, and does not merge.
    """
    _check_new(out, force=force)

    from mergekit_metagpt.merge_config import checks, families, jobs, plain_yaml
    from mergekit_metagpt.report import inspecting

    read = _config(config)
    checks.check_yaml(read, config)
    job = jobs.check(read, options)
    report = inspecting.inspect(families.of_config(read), job.opened, gram=None)
    if not options.allow_crimes:
        inspecting.require_near(report)
    exported = plain_yaml.export(job)
    for change in exported.changes:
        click.echo(f"Differs from {read.merge_method}: {change}.", err=True)
    name = "OUT.yml" if out == "-" else shlex.quote(out)
    then = f"It needs no plugin: mergekit-yaml {name} ./merged"
    _write(out, exported.text, then=then)


@main.command()
@click.argument("config", metavar="OLD.yml")
@click.argument("out", metavar="NEW.yml")
@click.option("--base", help="The model that all were fine-tuned from.")
@click.option("--force", is_flag=True, help="Replace NEW.yml if it exists.")
@one_line_errors
def convert(config: str, out: str, base: str | None, force: bool) -> None:
    """Turn OLD.yml, a merge by another method, into a metagpt recipe.

    Takes task_arithmetic, linear, model_stock, sce, ties, dare_*, della* and
    breadcrumbs*. Drops the weights, says each change on stderr, and opens no model.
    NEW.yml may be - for stdout.
    """
    _check_new(out, force=force)

    from mergekit_metagpt.merge_config import converting, merge_yaml

    with _named(config):
        converted = converting.convert(merge_yaml.text_of(Path(config)), base)
    for change in converted.changes:
        click.echo(printable(change), err=True)
    for note in converted.notes:
        click.echo(f"Note: {printable(note)}.", err=True)
    name = "NEW.yml" if out == "-" else shlex.quote(out)
    _write(out, converted.text, then=f"Look first: mergekit-metagpt inspect {name}")


@main.command()
@click.argument(
    "out", metavar="OUT", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--full", is_flag=True, help="Replay all tensors, not a sample.")
@click.option("--seed", type=int, default=0, help="Of the sample; 0 by default.")
@click.option(
    "--random-seed", type=int, help="Of the merge, if mergekit-yaml was given one."
)
@click.option("--json", "json_file", metavar="FILE", help="Write all; - for stdout.")
@one_line_errors
@_loading_options
def verify(
    options: MergeOptions,
    out: Path,
    full: bool,
    seed: int,
    random_seed: int | None,
    json_file: str | None,
) -> None:
    """Prove that the model in OUT is the merge that it says it is.

    Compares OUT with mergekit's plan of OUT/mergekit_config.yml, its inputs with the
    digests and coefficients in OUT/metagpt.json, and some 200 MB of its weights, bit by
    bit, with tensors that mergekit merges again from the inputs. Ends with status 0 if
    all agree, 1 if something differs, and 3 if something could not be checked.
    """
    _check_target(json_file)

    from mergekit_metagpt.commands import verifying
    from mergekit_metagpt.report import tables

    options = options.model_copy(update={"random_seed": random_seed})
    found = verifying.verify(out, options, full=full, seed=seed)
    if json_file is not None:
        with click.open_file(json_file, "w", encoding="utf-8") as stream:
            stream.write(found.model_dump_json(indent=2) + "\n")
    if json_file != "-":
        for line in tables.verified(found):
            click.echo(line)
    failed = [check for check in found.checks if check.verdict == found.verdict]
    if found.verdict == "different":
        names = ", ".join(check.name for check in failed)
        raise Differs(f"{out} is not the merge that it says it is: see {names}")
    if found.verdict == "not checked":
        raise Unverified(f"{out} could not be verified: {failed[0].details}")


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@one_line_errors
def demo(folder: Path) -> None:
    """Train a tiny base and three specialists in DIR, merge and compare them.

    Needs no network. Takes one to two minutes on two cores. Prints squared norms,
    coefficients, cosines and held-out losses; leaves models, YAML files and a figure.
    """
    from rich.console import Console

    from mergekit_metagpt.commands import demo as family

    chatter, console = Console(stderr=True), _console()
    result = family.run(folder, say=lambda line: chatter.print(line, highlight=False))
    console.print(family.task_vectors(result))
    console.print(family.losses(result))
    figure = folder / "demo.png"
    family.draw(result, figure)
    best = min(result.ald, key=result.ald.__getitem__)
    console.print(
        f"Lowest ALD here: {best}. Which it is depends on text, seed and training "
        f"lengths: no evidence for a method. Figure: {figure}",
        soft_wrap=True,
    )
    console.print("Merge again by hand, with mergekit's own command:", soft_wrap=True)
    place = shlex.quote(str(folder))
    command = f"(cd {place} && mergekit-yaml metagpt.yml ./merged-by-hand)"
    console.print(command, soft_wrap=True, highlight=False)


def _pairs(option: str, given: tuple[str, ...]) -> dict[str, Path]:
    """Read NAME=FILE options; every file must exist."""
    files: dict[str, Path] = {}
    for pair in given:
        name, equals, file = pair.partition("=")
        if not (name and equals and file):
            raise ValueError(f"{option} {pair}: expected NAME=FILE")
        if name in files:
            raise ValueError(f"{option} {name} is given twice; give each name once")
        if not Path(file).is_file():
            raise ValueError(f"{option} {pair}: there is no file {file}")
        files[name] = Path(file)
    return files


def _numbers(option: str, given: str | None) -> list[float]:
    try:
        return [float(number) for number in given.split(",")] if given else []
    except ValueError as error:
        raise ValueError(
            f"{option} {given}: expected numbers with commas between them"
        ) from error


@main.command()
@click.argument("config")
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    metavar="MODEL=FILE",
    help="Text that a model of CONFIG is for: plain, or .jsonl with `text` or "
    "`messages`. Under another name it is measured, and does not count.",
)
@click.option(
    "--candidate",
    "candidates",
    multiple=True,
    metavar="NAME=FILE.yml",
    help="Compare with this merge too; any method of mergekit.",
)
@click.option("--power", metavar="P,P", help="Compare metagpt with these powers too.")
@click.option("--lambda", "scale", metavar="L,L", help="And with these lambda.")
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=20_000,
    show_default=True,
    help="Of each text, at most.",
)
@click.option(
    "--context",
    type=click.IntRange(8),
    help="Tokens of a chunk; 512 by default, or what the base can take.",
)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="To evaluate in; by default float32 on a CPU, bfloat16 on a GPU.",
)
@click.option("--json", "json_file", metavar="FILE", help="Write all; - for stdout.")
@click.option("--plot", metavar="FILE", help="Draw a figure: .png, .svg or .pdf.")
@click.option("--write", metavar="BEST.yml", help="Write the YAML of the best merge.")
@click.option("--keep", metavar="DIR", help="Merge the best one again, into DIR.")
@click.option("--force", is_flag=True, help="Replace BEST.yml and DIR if they exist.")
@one_line_errors
@_loading_options
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
    """Merge by several weights and measure each merge on your own text.

    Compares CONFIG with metagpt, power 1, the plain average, task arithmetic 0.3 and
    metagpt without embeddings: the loss on each text, and how much more a merge loses
    than the specialists do. Merges are removed again. A second run goes on where the
    first one ended.
    """
    _check_target(json_file)
    _check_target(write)

    from mergekit_metagpt.commands import comparing
    from mergekit_metagpt.report import comparison, figures

    _check_target(plot, figures.FORMATS)
    request = comparing.Request(
        config=Path(config),
        texts=_pairs("--text", texts),
        candidates=_pairs("--candidate", candidates),
        powers=_numbers("--power", power),
        scales=_numbers("--lambda", scale),
        **settings,
    )
    compared = comparing.compare(
        request,
        options,
        keep=Path(keep) if keep else None,
        write=Path(write) if write else None,
        force=force,
    )
    if json_file is not None:
        with click.open_file(json_file, "w", encoding="utf-8") as stream:
            stream.write(compared.model_dump_json(indent=2) + "\n")
    if plot is not None:
        figures.comparison_figure(compared, Path(plot))
    if json_file != "-":
        console = _console()
        for part in comparison.lay_out(compared):
            text = printable(part) if isinstance(part, str) else part
            console.print(text, soft_wrap=isinstance(part, str), markup=False)
        console.print(printable(compared.verdict), soft_wrap=True, markup=False)


@main.command()
@click.option("--clear", is_flag=True, help="Remove all entries.")
@one_line_errors
def cache(clear: bool) -> None:
    """Show, or with --clear remove, what is remembered of earlier scans.

    Entries hold squared norms, inner products and losses, no weights and no text.
    MERGEKIT_METAGPT_CACHE names another folder for them, or 0 for none.
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
        _console().print(tables.remembered(entries), markup=False)


@main.command()
@click.argument("name", required=False, metavar="[NAME]")
@one_line_errors
def recipes(name: str | None) -> None:
    """List the recipes that ship, or print NAME.

    A recipe is a merge YAML that says at its top what it merges, what to download, and
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


# mergekit's options take seconds to import: only this command's parser needs them.
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
    _merge_command().main(
        list(arguments), prog_name=context.command_path, standalone_mode=False
    )


def _merge_command() -> click.Command:
    from mergekit.options import PrettyPrintHelp, add_merge_options

    from mergekit_metagpt.commands import merging

    @click.command("merge", cls=PrettyPrintHelp)
    @click.argument("config", type=click.Path())
    @click.argument("out", type=click.Path(file_okay=False))
    @click.option("--force", is_flag=True, help="Replace OUT if it exists.")
    @add_merge_options  # type: ignore[untyped-decorator]
    @one_line_errors
    def command(
        config: str, out: str, force: bool, merge_options: MergeOptions
    ) -> None:
        """Merge CONFIG into OUT as mergekit-yaml does, for metagpt configurations.

        The YAML, the headers of all models and the weights are checked before mergekit
        starts. OUT appears only once it is complete. Needs no autoload.
        """
        merging.merge(Path(config), Path(out), merge_options, force=force)
        if autoload.failure:
            click.echo(
                f"mergekit-yaml does not know metagpt: {autoload.failure}", err=True
            )
        size = sum(file.stat().st_size for file in Path(out).iterdir())
        copy = shlex.quote(str(Path(out) / "mergekit_config.yml"))
        click.echo(
            printable(
                f"Wrote {out} ({size / 1e6:,.1f} MB). Its coefficients are in "
                "metagpt.json there. To see them again, from this folder: "
                f"mergekit-metagpt inspect {copy}"
            ),
            err=True,
        )

    return command
