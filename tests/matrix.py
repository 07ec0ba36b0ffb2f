"""The rows of docs/compatibility.md, and the tests that say what each one found.

`python -m tests.matrix` writes the rows into the page.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

WORKS = "works"
REFUSED = "refused"
HOST = "mergekit cannot"
CUDA = "needs CUDA"


@dataclass(frozen=True)
class Row:
    """One kind of input, front end or option, and what a merge by metagpt does.

    Attributes:
        name: what the page calls it; unique.
        verdict: `works`, `refused`, `mergekit cannot`, or `needs CUDA` where only a
            machine with a CUDA device can tell.
        message: what the exception says, `...` for anything; empty if none is raised.
        note: what else the reader should know.
        line: what stands on the page for this row and its neighbours; by default the
            name.
    """

    name: str
    verdict: str = WORKS
    message: str = ""
    note: str = ""
    line: str = ""

    @contextmanager
    def expect(self) -> Iterator[None]:
        """Check that the block ends as the row says: quietly, or with its message."""
        if self.message:
            with pytest.raises(Exception) as raised:
                yield
            parts = (re.escape(part) for part in self.message.split("..."))
            said = " ".join(str(raised.value).split())
            assert re.search(".*".join(parts), said), said
        else:
            yield
        FOUND.add(self.name)

    def markdown(self) -> str:
        """The row's line on the page: of a list if it works, else of a table."""
        line = self.line or self.name
        if self.verdict == WORKS:
            return f"- {line}" + (f". {self.note}" if self.note else "")
        said = [f"`{self.message}`"] if self.message else []
        remarks = ". ".join([*said, self.note] if self.note else said)
        return f"| {line} | {self.verdict} | {remarks} |"


def listed(*rows: Row) -> tuple[Row, ...]:
    """Rows of one verdict that share a line, which has all their names."""
    return described(", ".join(row.name for row in rows), *rows)


def described(line: str, *rows: Row) -> tuple[Row, ...]:
    """Rows of one verdict that share this line."""
    assert len({(row.verdict, row.message, row.note) for row in rows}) == 1
    return tuple(replace(row, line=line) for row in rows)


FILES = (
    Row("one safetensors file"),
    Row("safetensors in shards, cut differently in every model"),
    *described(
        "`pytorch_model.bin`, whole and in shards, with and without `--lazy-unpickle`",
        Row("`pytorch_model.bin`"),
        Row("`pytorch_model.bin` with `--lazy-unpickle`"),
        Row("`pytorch_model.bin` in shards, with and without `--lazy-unpickle`"),
    ),
    Row("pickles in the format of torch before 1.6"),
    Row("base as safetensors, models as pickles"),
)

HEAD_KINDS = ("absent", "a copy of the embedding", "its own")
HEADS = (
    *described(
        "head absent, a copy of the embedding, or its own: each of the nine pairs of "
        "base and model",
        *(
            Row(f"head: {base} in the base, {model} in a model")
            for base in HEAD_KINDS
            for model in HEAD_KINDS
        ),
    ),
    Row("head that shares its embedding's memory in a pickle"),
)

PRECISIONS = (
    *described(
        "base in float32, float16 or bfloat16; models in all three",
        Row("base in float32; models in float32, float16 and bfloat16"),
        Row("base in float16; models in float32, float16 and bfloat16"),
        Row("base in bfloat16; models in float32, float16 and bfloat16"),
    ),
    Row("base in float64; models in float64 and bfloat16"),
    Row("several precisions within one checkpoint"),
    *described(
        "`dtype` and `out_dtype`, one or both",
        Row("`dtype`"),
        Row("`out_dtype`"),
        Row("`dtype` and `out_dtype`"),
    ),
)

OPTIONAL = (
    Row("optional tensor that one model lacks"),
    Row("optional tensor that all models lack", note="The base's tensor is kept."),
    Row(
        "optional tensor that the base lacks",
        REFUSED,
        "the base ... has no ..., which others have",
        "mergekit's own methods refuse it too.",
    ),
    Row(
        "buffer of integers, as in older BERT checkpoints", note="The buffer is copied."
    ),
)

LORA = (
    Row("LoRA adapter as `base+adapter`, with `--lora-merge-cache`"),
    *listed(
        Row("rank-stabilised LoRA"),
        Row("LoRA that carries biases"),
        Row("LoRA that carries whole modules"),
        Row("`--lora-merge-dtype`"),
    ),
    Row("adapter on the base, `base_model: base+adapter`"),
    Row(
        "LoRA adapter without `--lora-merge-cache`",
        HOST,
        "Need to specify cache dir to merge adapters",
    ),
    Row(
        "bare LoRA adapter",
        HOST,
        "Unrecognized model in ...",
        "Write it as `base+adapter`; `mergekit-metagpt merge` says so.",
    ),
)

VOCABULARIES = (
    *listed(
        Row("`tokenizer: {source: union}` with added tokens"),
        Row("`tokenizer: {source: base}` with added tokens"),
        Row("`tokenizer_source: union`"),
    ),
    Row(
        "`tokenizer` with a vocabulary in another order",
        note="n_t compares rows at the same position, so use `exclude`.",
    ),
    Row("`--unsafe-truncate-embeddings`"),
    Row(
        "vocabularies of different sizes with neither",
        HOST,
        "Tensor size mismatch for ...",
    ),
)

MODELS = (
    *listed(
        Row("Llama"),
        Row("Mistral"),
        Row("Qwen2"),
        Row("Qwen3"),
        Row("Gemma 2"),
        Row("GPT-2"),
    ),
    Row("GPT-2, base stored under the names of older checkpoints"),
    Row("BERT with a classifier (`BertForSequenceClassification`)"),
    Row("ModernBERT, of which mergekit has no definition"),
    Row(
        "BERT encoder (`BertModel`)",
        HOST,
        'can only concatenate list (not "tuple") to list',
        "Use `mergekit-pytorch` to merge its files.",
    ),
    Row("`BertModel` by `mergekit-pytorch`"),
    Row("Qwen2.5-VL: language model, projector and vision tower"),
    Row("Qwen2-VL", HOST, "has no attribute num_hidden_layers"),
    Row("LLaVA, saved with `save_original_format=False`"),
    Row(
        "LLaVA, as `save_pretrained` writes it",
        HOST,
        note="No error, but the result lacks the language model. The method warns; "
        "`mergekit-metagpt merge` refuses it.",
    ),
    Row(
        "LLaVA, base and models in different layouts",
        REFUSED,
        "... is not a fine-tune of ...: ...% of the parameters match",
        "mergekit's own methods drop part of a model in the other layout.",
    ),
    *described(
        "Qwen3-MoE and Mixtral: fused experts, single ones, and both mixed",
        Row("Qwen3-MoE, fused experts"),
        Row("Qwen3-MoE, single experts"),
        Row("Qwen3-MoE, base with single experts, models with fused and single ones"),
        Row("Qwen3-MoE, base with fused experts, models with single and fused ones"),
        Row("Mixtral, fused experts"),
        Row("Mixtral, single experts"),
        Row("Mixtral, base with single experts, models with fused and single ones"),
        Row("Mixtral, base with fused experts, models with single and fused ones"),
    ),
    *described(
        "DINOv3 and NomicBERT, whose layers transformers 5 renames or splits: in one "
        "layout or in two",
        Row("DINOv3, whose layers transformers 5 renames"),
        Row("DINOv3, base and models in different layouts"),
        Row("NomicBERT, whose layers transformers 5 renames and splits"),
        Row("NomicBERT, base and models in different layouts"),
    ),
)

SYNTAX = (
    *described(
        "`models:` with and without the base among them",
        Row("`models:` without the base"),
        Row("`models:` with the base among them"),
    ),
    Row("`slices:` in which layers stay in place"),
    Row("`slices:` that move layers, `granularity: model` and `tensor`"),
    Row(
        "`slices:` that move layers, `granularity: layer`",
        REFUSED,
        "granularity 'layer': ... of the output is not ... of ...",
        "Use `model` or `tensor`.",
    ),
    Row("a slice of different layers of its sources, `model` and `tensor`"),
    Row("`slices:` with different models"),
    Row("`slices:` with a `base_model` of their own"),
    Row(
        "`slices:` without the base among their sources",
        REFUSED,
        "the base ... is not among the inputs for ...",
        "Add it to the sources.",
    ),
    *listed(Row("`modules:` with `models:`"), Row("`modules:` with `slices:`")),
    Row("parameters with filters and gradients"),
)

FRONT_ENDS = (
    Row("`mergekit-yaml`"),
    Row("`mergekit-metagpt merge`"),
    Row("`mergekit-multi`, a later merge with an earlier one's output as its base"),
    Row("`mergekit-pytorch` on `.safetensors` files"),
    Row("`mergekit-pytorch` on `.pt` files, with and without `--lazy-unpickle`"),
    Row("`mergekit-pytorch` on the files of models that have a `config.json`"),
    Row("`mergekit-pytorch` with `--tensor-intersection`"),
    Row("`mergekit-pytorch` with `--tensor-union`, every tensor in the base"),
    Row("`run_merge` in Python"),
    Row("`merge_state_dicts` on state dicts and on modules"),
    Row("`merge_tensors`", note="n_t is that of this one tensor."),
    Row("several merges in threads of one process"),
    Row(
        "models overwritten between two processes",
        note="lambda is that of the new files.",
    ),
    Row(
        "models overwritten within one process",
        REFUSED,
        "... has changed since ... was opened",
        "mergekit itself would continue with the files that it has open.",
    ),
    Row("`mergekit-evolve`", note="Needs [a few lines](#mergekit-evolve)."),
)

OPTIONS = (
    *listed(
        Row("`--low-cpu-memory`"),
        Row("`--clone-tensors`"),
        Row("`--async-write` and `--write-threads`"),
        Row("`--out-shard-size`"),
        Row("`--num-threads`"),
        Row("`--no-safe-serialization`"),
        Row("`--copy-tokenizer`"),
        Row("`--no-write-model-card`"),
        Row("`--trust-remote-code`"),
    ),
    Row("`--quiet` and its absence", note="lambda is logged in both cases."),
    Row("`--random-seed`", note="Only the composed methods use random numbers."),
    Row("`--allow-crimes`, architectures that differ in name only"),
    Row("`--transformers-cache`, a folder laid out as the hub's cache"),
    Row(
        "`--transformers-cache` without a network",
        HOST,
        "offline mode is enabled",
        "mergekit first asks the hub for the list of files.",
    ),
    Row("the engine of `--multi-gpu`, on two CPU workers"),
    *listed(
        Row("`--cuda`", CUDA),
        Row("`--cuda --low-cpu-memory`", CUDA),
        Row("`--cuda --read-to-gpu`", CUDA),
        Row("`--multi-gpu`", CUDA),
        Row("`--gpu-rich`", CUDA),
    ),
)

COMPOSED = listed(
    *(
        Row(f"`metagpt_{name}`")
        for name in (
            "ties",
            "dare_linear",
            "dare_ties",
            "breadcrumbs",
            "breadcrumbs_ties",
            "della",
            "della_linear",
        )
    )
)

SECTIONS: dict[str, tuple[Row, ...]] = {
    "Files": FILES,
    "LoRA": LORA,
    "Vocabularies": VOCABULARIES,
    "Tied heads": HEADS,
    "Optional tensors": OPTIONAL,
    "Precisions": PRECISIONS,
    "Architectures": MODELS,
    "Configuration": SYNTAX,
    "Composed methods": COMPOSED,
    "Front ends": FRONT_ENDS,
    "Options": OPTIONS,
}

BY_NAME = {row.name: row for rows in SECTIONS.values() for row in rows}

# Names of rows with a test, and of those that a test has looked at in this run.
COVERED: set[str] = set()
FOUND: set[str] = set()


def covers(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test for each of these rows, as its argument `row`; it must `expect` it."""
    rows = [BY_NAME[name] for name in names]
    COVERED.update(names)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def checked(**arguments: Any) -> None:
            row = arguments["row"]
            FOUND.discard(row.name)
            test(**arguments)
            assert row.name in FOUND, f"nothing was expected of {row.name!r}"

        return pytest.mark.parametrize("row", rows, ids=[row.name for row in rows])(
            checked
        )

    return decorate


def covers_at_once(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test once for all these rows, by name its argument `rows`."""
    rows = {name: BY_NAME[name] for name in names}
    COVERED.update(names)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def checked(**arguments: Any) -> None:
            FOUND.difference_update(names)
            test(**arguments)
            assert rows.keys() <= FOUND, f"nothing was expected of one of {names}"

        return pytest.mark.parametrize("rows", [rows], ids=["all"])(checked)

    return decorate


HEADER = ("| what | verdict | message or remark |", "|---|---|---|")
PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"


def lines_of(rows: Sequence[Row]) -> list[str]:
    """The lines of a section, as they stand on the page: what works, then a table."""
    lines = list(dict.fromkeys(row.markdown() for row in rows))
    works = [line for line in lines if line.startswith("- ")]
    others = [line for line in lines if line.startswith("| ")]
    return [*works, *((*HEADER, *others) if others else ())]


def sections_of(page: str) -> dict[str, list[str]]:
    """The lines of the lists and tables of a page, by the heading above them."""
    found: dict[str, list[str]] = {}
    heading = ""
    for line in page.splitlines():
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        elif line.startswith(("|", "- ")):
            found.setdefault(heading, []).append(line)
    return found


def with_current_rows(page: str) -> str:
    """The page with the rows of all sections made anew."""
    for heading, rows in SECTIONS.items():
        lines = "\n".join(lines_of(rows)).replace(f"\n{HEADER[0]}", f"\n\n{HEADER[0]}")
        page, count = re.subn(
            rf"(<!-- rows: {heading} -->\n).*?(\n<!-- end -->)",
            lambda found, lines=lines: f"{found[1]}{lines}{found[2]}",
            page,
            flags=re.S,
        )
        assert count == 1, heading
    return page


if __name__ == "__main__":
    PAGE.write_text(with_current_rows(PAGE.read_text()))
