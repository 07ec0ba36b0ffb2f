"""The command line: parse, call one function, print; errors become exit status 2."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from mergekit_metagpt import __version__, autoload

P = ParamSpec("P")
T = TypeVar("T")


class Refusal(click.ClickException):
    """Bad input: one line on stderr, exit status 2."""

    exit_code = 2


def _one_line_errors(command: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(command)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, RuntimeError) as error:
            raise Refusal(" ".join(str(error).split())) from error

    return wrapper


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """MetaGPT merging for mergekit: no weights to guess, no data, no search."""


@main.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@_one_line_errors
def demo(folder: Path) -> None:
    """Train a tiny base and three specialists in DIR, merge and compare them.

    Needs no network. Takes one to two minutes on two cores. Prints squared norms,
    lambda, cosines and held-out losses; leaves models, YAML files and a figure in DIR.
    """
    from rich.console import Console

    from mergekit_metagpt import report
    from mergekit_metagpt.demo import run

    chatter, console = Console(stderr=True), Console()
    result = run(folder, say=lambda line: chatter.print(line, highlight=False))
    console.print(report.task_vector_table(result))
    console.print(report.loss_table(result))
    figure = folder / "demo.png"
    report.demo_figure(result, figure)
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


# mergekit's options take seconds to import: only this command's parser needs them.
@main.command(
    add_help_option=False,
    context_settings={"ignore_unknown_options": True},
    short_help="Merge CONFIG into OUT as mergekit-yaml does, checked first.",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def merge(context: click.Context, arguments: tuple[str, ...]) -> None:
    """Merge CONFIG into OUT: all of mergekit-yaml's options, the whole job checked."""
    _merge_command().main(
        list(arguments), prog_name=context.command_path, standalone_mode=False
    )


def _merge_command() -> click.Command:
    from mergekit.options import MergeOptions, PrettyPrintHelp, add_merge_options

    from mergekit_metagpt import merging

    @click.command("merge", cls=PrettyPrintHelp)
    @click.argument("config", type=click.Path())
    @click.argument("out", type=click.Path(file_okay=False))
    @click.option("--force", is_flag=True, help="Replace OUT if it exists.")
    @add_merge_options  # type: ignore[untyped-decorator]
    @_one_line_errors
    def command(
        config: str, out: str, force: bool, merge_options: MergeOptions
    ) -> None:
        """Merge CONFIG into OUT as mergekit-yaml does, for metagpt configurations.

        The YAML, the headers of all models and the weights are checked before mergekit
        starts; OUT appears only when it is whole. Needs no autoload.
        """
        merging.merge(Path(config), Path(out), merge_options, force=force)
        if autoload.failure:
            click.echo(
                f"mergekit-yaml does not know metagpt: {autoload.failure}", err=True
            )

    return command
