"""Reads options that commands share; a bad value is a ValueError that says why."""

from __future__ import annotations

import functools
import gc
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from mergekit.options import MergeOptions

    from mergekit_metagpt.scanning.sampling import Sample

# Budget of `inspect --remote`, unless another is given.
REMOTE_BUDGET = "200MB"
# Names of a model's files and of records of a merge, which no report replaces.
_OF_MODELS = re.compile(
    r".+\.(safetensors|bin|pth?|gguf|model|jinja|index\.json)"
    r"|((generation_|adapter_|tokenizer_|preprocessor_)?config|tokenizer|vocab"
    r"|special_tokens_map|added_tokens|metagpt)\.json"
    r"|mergekit_config(\.plain)?\.yml"
)
# Highest seed that numpy takes, with which mergekit seeds too.
MOST_SEED = 2**32 - 1
# Values of --lora-merge-dtype.
ADAPTER_DTYPES = ("float32", "bfloat16", "float16", "float64")


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import without collecting garbage, and never collect what was imported.

    All of it stays until the end. To look through it again and again, and once more at
    exit, takes over a second.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def loading_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add mergekit's options for loading models; pass them on as MergeOptions."""

    @functools.wraps(command)
    def wrapper(
        lora_merge_cache: str | None,
        lora_merge_dtype: str | None,
        transformers_cache: str | None,
        trust_remote_code: bool,
        lazy_unpickle: bool,
        allow_crimes: bool,
        **others: Any,
    ) -> Any:
        import logging

        with quick_imports():
            from mergekit.options import MergeOptions

        logging.basicConfig(level=logging.WARNING)
        options = MergeOptions(
            lora_merge_cache=lora_merge_cache,
            lora_merge_dtype=lora_merge_dtype,
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
            "--lora-merge-dtype",
            type=click.Choice(ADAPTER_DTYPES),
            help="Precision in which adapters are merged, as in mergekit.",
        ),
        click.option(
            "--lora-merge-cache",
            type=click.Path(file_okay=False),
            help="Folder for merged LoRA models; needed to merge base+adapter.",
        ),
    ):
        wrapper = option(wrapper)
    return wrapper


def check_merge_options(options: MergeOptions) -> None:
    """Refuse options of a merge that would fail only after its models were measured."""
    import torch

    from mergekit_metagpt.merge_config import replaying

    threads, dtype = options.num_threads, options.lora_merge_dtype
    seed, cache = options.random_seed, options.lora_merge_cache
    if seed is not None and not 0 <= seed <= MOST_SEED:
        raise ValueError(
            f"--random-seed is {seed}; expected a number from 0 to {MOST_SEED}"
        )
    if cache and Path(cache).is_file():
        raise ValueError(f"--lora-merge-cache {cache} is a file; expected a folder")
    if threads is not None and threads < 1:
        raise ValueError(f"--num-threads is {threads}; expected a number >= 1")
    if dtype is not None and dtype.removeprefix("torch.") not in ADAPTER_DTYPES:
        raise ValueError(
            f"--lora-merge-dtype is {dtype}; expected one of "
            f"{', '.join(ADAPTER_DTYPES)}"
        )
    device = "a GPU" if options.multi_gpu else str(options.device or "cpu")
    if options.multi_gpu:
        here = getattr(torch, "accelerator", torch.cuda).is_available()
    else:
        here = replaying.has_device(device)
    if not here:
        raise ValueError(
            f"the merge is to run on {device}, which torch does not see here. Leave "
            "out --cuda (and --device, --multi-gpu, --gpu-rich), or install a torch "
            "for the GPU"
        )


def require_config(config: str, out: str) -> None:
    """Refuse a merge YAML that does not exist, as where it and `out` are swapped."""
    from mergekit_metagpt.merge_config import merge_yaml

    place, expected = Path(out), "a merge YAML"
    if place.suffix in (".yml", ".yaml") and place.is_file():
        expected += " (are the two arguments swapped?)"
    merge_yaml.require_file(Path(config), expected)


def check_new(read: str, out: str, *, force: bool) -> None:
    """Refuse an output file that exists, cannot be written, or is what is read.

    First of all refuses a merge YAML to be read that does not exist.
    """
    require_config(read, out)
    _require_writable(out)
    if out != "-" and Path(out).exists():
        _require_expendable([out], [read])
        _require_force([out], force=force)


def check_reports(
    reads: Iterable[str] = (),
    *,
    force: bool,
    plot: str | None = None,
    keep: str | None = None,
    **targets: str | None,
) -> None:
    """Refuse report files that exist, cannot be written, or are named twice.

    With `force`, they may exist, but be none of `reads`, and no file of a model.
    """
    owners: dict[str, str] = {}
    taken: list[str] = []
    for option, file in {"keep": keep, **targets, "plot": plot}.items():
        if file is None:
            continue
        if option == "keep":
            pass  # a folder, which is checked with its merge
        elif option == "plot":
            from mergekit_metagpt.report import drawing

            _require_writable(file, drawing.FORMATS)
        else:
            _require_writable(file)
        # A device or a pipe can be written again.
        if option != "keep" and Path(file).is_file():
            taken.append(file)
        if (other := owners.setdefault(file, option)) != option:
            one = "stdout" if file == "-" else "a name"
            raise ValueError(
                f"--{other} and --{option} are both {file}; {one} takes one of them"
            )
    _require_expendable(taken, reads)
    _require_force(taken, force=force)


def _require_expendable(taken: Sequence[str], reads: Iterable[str]) -> None:
    """Refuse to replace, even by force, what a command reads, or a model's file."""
    read = {Path(path).resolve() for path in reads}
    for file in taken:
        if Path(file).resolve() in read:
            raise ValueError(f"{file} is what this command reads; choose another name")
        if _OF_MODELS.fullmatch(Path(file).name):
            raise ValueError(f"{file} is a file of a model; choose another name")


def _require_force(taken: Sequence[str], *, force: bool) -> None:
    """Refuse files that exist, all of them at once."""
    if taken and not force:
        one = len(taken) == 1
        raise ValueError(
            f"{' and '.join(taken)} {'exists' if one else 'exist'}; choose "
            f"{'another name' if one else 'other names'}, or --force"
        )


def _require_writable(file: str, endings: tuple[str, ...] = ()) -> None:
    if file == "-":
        if endings:
            raise ValueError("--plot - is no file; expected one to draw the figure in")
        return
    path = Path(file)
    if endings and path.suffix.lower() not in endings:
        raise ValueError(
            f"{file} ends in {path.suffix!r}; expected one of {', '.join(endings)}"
        )
    above = path.absolute().parent
    if path.is_dir():
        raise ValueError(f"{file} is a folder; expected a file to write to")
    if not above.is_dir():
        raise ValueError(f"{file} cannot be written: there is no folder {path.parent}")
    if not os.access(path if path.exists() else above, os.W_OK):
        raise ValueError(f"{file} cannot be written: no permission")


def weights_of(given: tuple[str, ...]) -> dict[str, float] | None:
    """Read MODEL=W options; None if there is none."""
    weights: dict[str, float] = {}
    for pair in given:
        model, equals, number = pair.rpartition("=")
        if not (model and equals):
            raise ValueError(f"--weight {pair}: expected MODEL=W, such as ./math=2")
        if model in weights:
            raise ValueError(f"--weight {model} is given twice; give each model once")
        try:
            weights[model] = float(number)
        except ValueError as error:
            raise ValueError(f"--weight {pair}: {number!r} is no number") from error
    return weights or None


def require_subjects(*, texts: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuse options of `compare` that are about texts or tasks, if there are none."""
    given = click.get_current_context().get_parameter_source
    options = ["limit"] * (not tasks) + ["tokens", "context", "plot"] * (not texts)
    for option in options if texts or tasks else ():
        if given(option) is ParameterSource.COMMANDLINE:
            needed = "task TASK" if option == "limit" else "text MODEL=FILE"
            raise ValueError(f"--{option} is for {needed[:4]}s; expected --{needed}")


def is_zero(share: str | None) -> bool:
    """Whether --sample asks to read no weights."""
    return share is not None and set(share.removesuffix("%")) in ({"0"}, {"0", "."})


def sample_of(share: str | None, budget: str | None, *, remote: bool) -> Sample | None:
    """Read --sample and --budget; None stands for an exact scan."""
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
        return Sample(share=value)
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


def lora_flags(folder: str, dtype: str | None) -> str:
    """The options by which a command finds or makes the same merged adapters."""
    of_dtype = f" --lora-merge-dtype {dtype}" if dtype else ""
    return f" --lora-merge-cache {folder}{of_dtype}"


def pairs(option: str, given: tuple[str, ...], form: str) -> dict[str, Path]:
    """Read options such as NAME=FILE, where the file must exist."""
    from mergekit_metagpt.merge_config import merge_yaml

    files: dict[str, Path] = {}
    for pair in given:
        name, equals, file = pair.partition("=")
        if not (name and equals and file):
            raise ValueError(f"{option} {pair}: expected {form}")
        if name in files:
            raise ValueError(f"{option} {name} is given twice; give each once")
        files[name] = Path(file)
        try:
            merge_yaml.require_file(files[name], "a file")
        except OSError as error:
            raise ValueError(f"{option} {name}: {error}") from error
    return files


def numbers(option: str, given: str | None) -> list[float]:
    """Read numbers with commas between them."""
    try:
        return [float(number) for number in given.split(",")] if given else []
    except ValueError as error:
        also = " (or keep)" if option == "--lambda" else ""
        raise ValueError(
            f"{option} {given}: expected numbers{also} with commas between them"
        ) from error


def scales(option: str, given: str | None) -> list[float | str]:
    """Read numbers with commas between them, or `keep` in their place."""
    read: list[float | str] = []
    for part in given.split(",") if given else []:
        read += ["keep"] if part.strip() == "keep" else numbers(option, part)
    return read
