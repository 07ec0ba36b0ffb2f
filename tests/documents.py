"""Parts of the pages under docs/ that the code itself writes; tests compare them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from click.testing import CliRunner
from pydantic import BaseModel

from mergekit_metagpt.commands.cli import main
from mergekit_metagpt.report import schema, tables

CLI = Path(__file__).parents[1] / "docs" / "cli.md"


def help_text(name: str) -> str:
    """The help of a command, as a terminal of 80 columns shows it."""
    runner = CliRunner()
    shown = runner.invoke(
        main, [name, "--help"], prog_name="mergekit-metagpt", terminal_width=80
    )
    assert shown.exit_code == 0, shown.output
    return shown.output.rstrip()


def schema_tables() -> Iterator[str]:
    """A Markdown table for every kind of object in the report."""
    kinds = (
        schema.Report,
        schema.Header,
        schema.Family,
        schema.Settings,
        schema.Base,
        schema.Model,
        schema.Adapter,
        schema.Lengths,
        schema.Pool,
        schema.Sample,
        schema.Tensors,
        schema.Source,
        schema.File,
        schema.Options,
        schema.Verification,
        schema.Check,
    )
    for kind in kinds:
        yield f"\n{kind.__name__}: {(kind.__doc__ or '').strip()}\n"
        yield "| field | type | meaning |\n|---|---|---|"
        for name, field in kind.model_fields.items():
            meaning = (field.description or "").replace("|", "\\|")
            yield f"| `{name}` | {_type(field.annotation)} | {meaning} |"
    yield ""


def _type(annotation: object) -> str:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__
    shown = re.sub(r"(?<![\w.])(?:\w+\.)+(?=\w)", "", str(annotation))
    shown = re.sub(r"Annotated\[(\w+), \w+\(.*?\)\](?:\)\])?", r"\1", shown)
    shown = re.sub(r"Union\[(.*?), (Literal.*)\]", r"\1 or \2", shown)
    shown = re.sub(r"<class '(.*)'>", r"\1", shown)
    while "..." in shown:
        shown = re.sub(r"tuple\[((?:(?!tuple).)*?), \.\.\.\]", r"list of \1", shown)
    return shown.replace("|", "or")


def with_current_parts(page: str) -> str:
    """The page of the command line with all written parts made anew."""
    page = re.sub(
        r"(<!-- help: (\w+) -->\n```text\n).*?(```)",
        lambda found: f"{found[1]}{help_text(found[2])}\n{found[3]}",
        page,
        flags=re.S,
    )
    listed = ", ".join(f"`{column}`" for column in tables.COLUMNS)
    first, last = listed.rsplit(" ", 1)
    page = re.sub(
        r"<!-- columns -->.*?<!-- end -->",
        f"<!-- columns -->{first}\n{last}<!-- end -->",
        page,
        flags=re.S,
    )
    schema = "\n".join(schema_tables())
    return re.sub(
        r"<!-- schema -->.*?<!-- end -->",
        lambda _: f"<!-- schema -->{schema}\n<!-- end -->",
        page,
        flags=re.S,
    )


if __name__ == "__main__":
    CLI.write_text(with_current_parts(CLI.read_text()))
