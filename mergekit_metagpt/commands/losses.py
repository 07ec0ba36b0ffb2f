"""Cuts texts into chunks, and measures how well a language model predicts them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.scanning.cache import ChunkLosses

if TYPE_CHECKING:
    import torch

# A standard error from fewer chunks means little.
FEWEST_CHUNKS = 8
# Only runs of spaces make longer tokens: no more than this of a text is tokenized.
CHARACTERS_A_TOKEN = 32
# Tokens in one batch: logits take 4 bytes for each token and vocabulary entry.
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Tokenized:
    """Chunks of a text in the tokens of one model.

    Attributes:
        ids: tokens of each chunk; the first is not predicted.
        bytes: length of each chunk's predicted tokens, in bytes of UTF-8.
    """

    ids: tuple[tuple[int, ...], ...]
    bytes: tuple[int, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of what a model is shown, in hexadecimal."""
        return hashlib.sha256(json.dumps([self.ids, self.bytes]).encode()).hexdigest()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence the warnings and progress bars of transformers."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def tokenizer_of(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer of a folder or repository; None if none can be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception:  # any class of tokenizer may raise anything
        return None


def documents(file: Path, tokenizers: Sequence[Any]) -> list[str]:
    """Read the documents of a text file.

    Args:
        file: plain text, which is one document; or .jsonl, with `text`, or `messages`
            for a chat template, on each line.
        tokenizers: the first that has a chat template formats the messages.

    Returns:
        the documents.

    Raises:
        ValueError: a line has neither; messages do not fit the template; no template.
        OSError: the file cannot be read.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    if file.suffix != ".jsonl":
        return [text]
    found = []
    # Unlike str.splitlines: JSON may hold other ends of lines, such as U+2028.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"line {number} of {file}"
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{place} is not JSON: {error}") from error
        content = entry.get("text") if isinstance(entry, dict) else None
        if isinstance(content, str):
            found.append(content)
        elif isinstance(entry, dict) and "messages" in entry:
            found.append(_chat(entry["messages"], place, tokenizers))
        else:
            raise ValueError(f"{place} has neither `text` nor `messages`; expected one")
    return found


def _chat(messages: Any, place: str, tokenizers: Sequence[Any]) -> str:
    from jinja2 import TemplateError

    able = [tokenizer for tokenizer in tokenizers if tokenizer.chat_template]
    if not able:
        raise ValueError(
            f"{place} holds messages, and no tokenizer of these models has a chat "
            "template. Give the text itself, in `text`"
        )
    try:
        text = str(able[0].apply_chat_template(messages, tokenize=False))
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise ValueError(
            f"{place}: the chat template does not take these messages: {error}"
        ) from error
    return text.removeprefix(able[0].bos_token or "")


def cut(
    texts: Sequence[str], tokenizer: Any, *, context: int, tokens: int
) -> list[str]:
    """Cut documents into chunks.

    Args:
        texts: the documents; no chunk reaches from one into the next.
        tokenizer: its tokens are counted.
        context: tokens of a chunk, with the one that begins every sequence, if any.
        tokens: most tokens of all chunks together.

    Returns:
        the chunks, as text.

    Raises:
        ValueError: the tokenizer does not say where its tokens lie.
    """
    size, left, chunks = context - len(_start(tokenizer)), tokens, []
    for text in texts:
        text = text[: CHARACTERS_A_TOKEN * left]
        places = _offsets(tokenizer, text)[1][:left]
        # Cut at ends: the beginning of a token may leave out the space before it.
        ends = [end for _, end in places]
        ends = [*ends[size - 1 :: size], *ends[-1:]]
        pieces = [text[b:e] for b, e in zip([0, *ends], ends, strict=False)]
        if pieces and len(places) % size == 1 and not _start(tokenizer):
            pieces.pop()  # a single token, which nothing predicts
        chunks += pieces
        left -= len(places)
        if left <= 0:
            break
    return [chunk for chunk in chunks if chunk]


def tokenize(chunks: Sequence[str], tokenizer: Any) -> Tokenized:
    """Tokenize chunks for a model.

    Args:
        chunks: chunks of a text.
        tokenizer: the model's.

    Returns:
        tokens and bytes. If no token begins every sequence, the first token of each
        chunk is not predicted, and its bytes do not count.

    Raises:
        ValueError: the tokenizer does not say where its tokens lie, or makes no token
            of a chunk.
    """
    start, ids, sizes = _start(tokenizer), [], []
    for chunk in chunks:
        own, places = _offsets(tokenizer, chunk)
        if not own:
            raise ValueError(
                f"the tokenizer of {tokenizer.name_or_path} makes no token of "
                f"{chunk[:40]!r}, so that its model cannot be compared on this text. "
                "Remove that part of the text"
            )
        given = 0 if start else places[0][1]
        ids.append((*start, *own))
        sizes.append(len(chunk[given:].encode()))
    return Tokenized(tuple(ids), tuple(sizes))


def _start(tokenizer: Any) -> tuple[int, ...]:
    """The token with which the tokenizer begins every sequence, if any."""
    begin = tokenizer.bos_token_id
    ids = tokenizer("a")["input_ids"]
    return (begin,) if begin is not None and ids[:1] == [begin] else ()


def _offsets(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} does not say where its tokens "
            "lie in a text; expected one with a tokenizer.json"
        )
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return found["input_ids"], found["offset_mapping"]


def load(folder: Path, *, dtype: str, device: str, trust_remote_code: bool) -> Any:
    """Load a causal language model for evaluation.

    Args:
        folder: where its config.json lies.
        dtype: to compute in.
        device: `cpu` or `cuda`.
        trust_remote_code: run code that comes with the model.

    Returns:
        transformers' model.

    Raises:
        ValueError: transformers has no such causal language model, or would make up
            some of its weights.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
    )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{folder} does not hold {missing[0]} ({len(missing)} tensors in all), "
            "which a causal language model of its architecture needs"
        )
    return model.to(device).eval()


def evaluate(
    model: Any, text: Tokenized, *, progress: Callable[[int], Any] = lambda count: None
) -> ChunkLosses:
    """Sum the cross entropy of each chunk's tokens.

    Args:
        model: a causal language model.
        text: in this model's tokens.
        progress: called with the number of chunks after each batch.

    Returns:
        losses in nats, computed in float32 from the logits.

    Raises:
        ValueError: a token is beyond the model's vocabulary; a loss is not finite.
    """
    import torch

    size = model.get_input_embeddings().weight.shape[0]
    if (highest := max(max(ids, default=0) for ids in text.ids)) >= size:
        raise ValueError(
            f"{model.name_or_path} has {size} embeddings, and its tokenizer gives the "
            f"token {highest}: it has the tokenizer of another model"
        )
    losses: list[float] = []
    with torch.inference_mode():
        for batch in _batches(text.ids):
            losses += _losses(model, torch.tensor(batch, device=model.device))
            progress(len(batch))
    if not all(abs(loss) < float("inf") for loss in losses):
        raise ValueError(
            f"{model.name_or_path} gives a loss that is not finite. If it holds in "
            "float32, give --dtype float32"
        )
    return ChunkLosses(
        losses=losses,
        tokens=[len(ids) - 1 for ids in text.ids],
        bytes=list(text.bytes),
    )


def _batches(ids: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Batch neighbours of equal length, so that nothing is padded."""
    for length, group in groupby(ids, len):
        chunks, count = list(group), max(1, BATCH_TOKENS // max(length, 1))
        yield from (chunks[at : at + count] for at in range(0, len(chunks), count))


def _losses(model: Any, ids: torch.Tensor) -> list[float]:
    import torch

    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), ids[:, 1:], reduction="none"
    )
    return losses.double().sum(1).tolist()
