"""Mutations of a good model's files: hundreds of ways to mislead who reads them."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support import State, llama_config, llama_state, read_model, write_model

Json = dict[str, Any]
Meaning = Callable[[State], State]

TENSOR = "model.layers.0.mlp.up_proj.weight"
OTHER = "model.layers.0.mlp.gate_proj.weight"
LAST = "model.norm.weight"  # in its file
FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
SHARDS = 3
SHARD = f"model-00002-of-0000{SHARDS}.safetensors"
# What code in a model would leave in the model's folder.
MARKER = "code-was-run"

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@dataclass(frozen=True)
class Mutation:
    """A change of a good model's folder.

    Attributes:
        name: for the test's id.
        spoil: changes the folder.
        means: what the folder then holds, by what it held: the one right result, if
            it is not refused. None if it can only be refused.
        legal: whether it must not be refused.
        lost: a tensor that the folder no longer holds: what is left can be scanned.
    """

    name: str
    spoil: Callable[[Path], object]
    means: Meaning | None = None
    legal: bool = False
    lost: str | None = None


def the_same(state: State) -> State:
    """Nothing that counts was changed."""
    return state


def good_state(seed: int = 0) -> State:
    """Weights of the tiny model that all are mutations of."""
    return llama_state(seed, **SIZES)


def write_good(folder: Path, state: State, *, shards: int = 1) -> Path:
    """Write that model."""
    return write_model(folder, state, llama_config(**SIZES), shards=shards)


# ---- parts of a file


def split(content: bytes) -> tuple[Json, bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def pack(header: Json | bytes, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file; `length` is what it says of its header."""
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    stated = len(header) if length is None else length
    return struct.pack("<Q", stated) + header + data


def with_bytes(
    change: Callable[[bytes], bytes], name: str = FILE
) -> Callable[[Path], object]:
    """A file's bytes changed."""

    def spoil(folder: Path) -> None:
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return spoil


def with_header(
    change: Callable[[Json], Json | bytes | None],
) -> Callable[[Path], object]:
    """The header of the safetensors file changed, in place or for another."""

    def changed(content: bytes) -> bytes:
        header, data = split(content)
        found = change(header)
        return pack(header if found is None else found, data)

    return with_bytes(changed)


def with_entry(change: Callable[[Json], object]) -> Callable[[Path], object]:
    """What the header says of one tensor changed in place."""

    def changed(header: Json) -> None:
        change(header[TENSOR])

    return with_header(changed)


def with_text(old: str, new: str) -> Callable[[Path], object]:
    """A piece of the header's JSON replaced."""

    def changed(header: Json) -> bytes:
        text = json.dumps(header)
        assert old in text
        return text.replace(old, new, 1).encode("utf-8", "surrogatepass")

    return with_header(changed)


def deep(levels: int, opening: str = "[", closing: str = "]") -> str:
    return opening * levels + closing * levels


# ---- safetensors


def lengths() -> Iterator[Mutation]:
    """The eight bytes that say how long the header is."""
    stated = [0, 1, 2, 7, 100_000_000, 100_000_001, 2**31 - 1, 2**31, 2**32]
    stated += [2**40, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 2**64 - 8, 2**64 - 9]
    for value in stated:
        yield Mutation(f"length-{value}", with_bytes(_stating(lambda n, s, v=value: v)))
    for step in (-1000, -8, -1, 1, 8, 1000):
        yield Mutation(
            f"length-off-by-{step}",
            with_bytes(_stating(lambda n, s, step=step: n + step)),
        )
    for step in (-16, -8, -7, 0, 1):
        yield Mutation(
            f"length-of-file-{step}",
            with_bytes(_stating(lambda n, s, step=step: s + step)),
        )


def _stating(length: Callable[[int, int], int]) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        (true,) = struct.unpack("<Q", content[:8])
        return struct.pack("<Q", length(true, len(content))) + content[8:]

    return change


def cuts() -> Iterator[Mutation]:
    """Files that end too early, or too late."""
    for size in (0, 1, 4, 7, 8, 9, 16, 100):
        yield Mutation(f"cut-to-{size}", with_bytes(lambda c, s=size: c[:s]))
    for twentieth in range(1, 20):
        yield Mutation(
            f"cut-to-{twentieth}-of-20",
            with_bytes(lambda c, t=twentieth: c[: len(c) * t // 20]),
        )
    for lost in (1, 2, 4, 1024):
        yield Mutation(f"cut-by-{lost}", with_bytes(lambda c, n=lost: c[:-n]))
    for more in (1, 8, 4096):
        yield Mutation(f"longer-by-{more}", with_bytes(lambda c, n=more: c + b"x" * n))
    yield Mutation("zeros", with_bytes(lambda c: bytes(len(c))))
    yield Mutation("ones", with_bytes(lambda c: b"\xff" * len(c)))
    yield Mutation("twice", with_bytes(lambda c: c + c))
    yield Mutation("sparse", lambda folder: os.truncate(folder / FILE, 1 << 40))


def headers() -> Iterator[Mutation]:
    """Headers that are no JSON, or JSON of another kind."""
    texts: dict[str, bytes] = {
        "nothing": b"",
        "a-space": b" ",
        "empty-object": b"{}",
        "list": b"[]",
        "null": b"null",
        "number": b"3",
        "string": b'"model"',
        "open": b"{",
        "half": b'{"a": {"dtype": "F32", "shape"',
        "zeros": bytes(64),
        "not-utf-8": b'{"\xff\xfe": {}}',
        "html": b"<html>404</html>",
        "deep-127": deep(127).encode(),
        "deep-10000": deep(10_000).encode(),
        "deep-objects": deep(10_000, '{"a":', "}").replace(":}", ":1}", 1).encode(),
        "open-100000": b"[" * 100_000,
        "only-metadata": b'{"__metadata__": {"format": "pt"}}',
    }
    for name, text in texts.items():
        yield Mutation(f"header-{name}", with_header(lambda header, t=text: t))
    around: dict[str, tuple[str, str]] = {
        "spaces-after": ("", " " * 64),
        "spaces-before": (" " * 8, ""),
        "garbage-after": ("", "garbage"),
        "zeros-after": ("", "\0" * 8),
        "second-object": ("", "{}"),
        "byte-order-mark": ("\ufeff", ""),
        "comment": ("", "// fine"),
        "lines": ("\n\n\n", "\n\n\n"),
    }
    for name, (before, after) in around.items():
        yield Mutation(
            f"header-{name}",
            with_header(lambda h, b=before, a=after: f"{b}{json.dumps(h)}{a}".encode()),
            the_same,
        )
    yield Mutation(
        "header-utf-16", with_header(lambda h: json.dumps(h).encode("utf-16"))
    )
    yield Mutation("header-single-quotes", with_header(lambda h: str(h).encode()))
    metadata: dict[str, Any] = {
        "missing": None,
        "list": [],
        "string": "pt",
        "number": 3,
        "empty": {},
        "other-format": {"format": "tf"},
        "numpy": {"format": "np"},
        "number-in-it": {"format": 1},
        "null-in-it": {"format": None},
        "nested": {"format": {"a": "b"}},
        "a-tensor": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "large": {"format": "pt", "more": "x" * 1_000_000},
        "many": {f"key{n}": "value" for n in range(20_000)},
    }
    for name, value in metadata.items():
        yield Mutation(
            f"metadata-{name}",
            with_header(lambda h, v=value: h.update(__metadata__=v)),
            the_same,
        )
    yield Mutation("metadata-deep", with_text('{"format": "pt"}', deep(10_000)))
    yield Mutation(
        "metadata-twice",
        with_text('"__metadata__"', '"__metadata__": {}, "__metadata__"'),
        the_same,
    )


_NO_NUMBERS = (None, True, "1", "", 1.5, -1, [1], {}, 2**64, 2**128)
BAD_SHAPES: list[Any] = [
    *(value for value in _NO_NUMBERS if value != [1]),
    [],
    [[16, 16]],
    ["16", "16"],
    [16.5, 16],
    [16.0, 16],
    [None, 16],
    [True, True],
    [-16, -16],
    [-1, 256],
    [16, -16],
    [0, 16],
    [2**40, 0],
    [2**40],
    [2**40, 2**40],
    [2**32, 2**32],
    [2**33, 2**31],
    [2**62, 4, 16],
    [2**63, 2],
    [2**64, 1],
    [2**64 + 16, 16],
    [16, 16, 2**64],
    [1] * 1000 + [256],
    [256],
    [1, 256],
    [256, 1],
    [8, 32],
    [32, 8],
    [4, 4, 16],
    [15, 17],
    [16, 15],
    [16, 17],
]
BAD_DTYPES: list[Any] = [
    *(value for value in _NO_NUMBERS if value != "1"),
    "F33",
    "f32",
    "float32",
    "F32 ",
    " F32",
    "F32\0",
    "F64",
    "F16",
    "BF16",
    "F8_E4M3",
    "F8_E5M2",
    "F4",
    "F6_E2M3",
    "C64",
    "I8",
    "U8",
    "I16",
    "U16",
    "I32",
    "U32",
    "I64",
    "U64",
    "BOOL",
    "F128",
    "object",
    "torch.float32",
    "x" * 10_000,
]
# Of the same number of bits as float32: only the meaning of the bytes changes.
_FOUR_BYTES = ("I32", "U32")


def entries() -> Iterator[Mutation]:
    """What the header says of one tensor."""
    for shape in BAD_SHAPES:
        shown = json.dumps(shape)[:40]
        yield Mutation(
            f"shape-{shown}",
            with_entry(lambda entry, s=shape: entry.update(shape=s)),
        )
    for dtype in BAD_DTYPES:
        shown = json.dumps(dtype)[:40]
        yield Mutation(
            f"dtype-{shown}",
            with_entry(lambda entry, d=dtype: entry.update(dtype=d)),
        )
    for name, shape in (("C64", [16, 8]), ("BOOL", [16, 64]), ("U8", [16, 64])):
        yield Mutation(
            f"dtype-{name}-that-fits",
            with_entry(lambda entry, d=name, s=shape: entry.update(dtype=d, shape=s)),
            lost=TENSOR,
        )
    for key in ("dtype", "shape", "data_offsets"):
        yield Mutation(f"no-{key}", with_entry(lambda entry, k=key: entry.pop(k)))
    yield Mutation(
        "entry-with-more",
        with_entry(lambda entry: entry.update(code="import os", data_offset=[0, 1])),
        the_same,
    )
    for value in _NO_NUMBERS:
        yield Mutation(
            f"entry-{json.dumps(value)[:20]}",
            with_header(lambda header, v=value: header.update({TENSOR: v})),
        )
    for levels in (100, 10_000):
        yield Mutation(f"shape-{levels}-levels", with_text("[16, 16]", deep(levels)))
    for word in ("NaN", "Infinity", "-Infinity", "1e400", "0x10", "16,", "-0", "1e1"):
        yield Mutation(
            f"shape-of-{word}", with_text('"shape": [16, 16]', f'"shape": [{word}, 16]')
        )


def offsets() -> Iterator[Mutation]:
    """Where a tensor's bytes are said to lie."""
    moves: dict[str, Callable[[int, int, int], Any]] = {
        "reversed": lambda a, b, n: [b, a],
        "overlapping-before": lambda a, b, n: [a - 4, b - 4],
        "overlapping-after": lambda a, b, n: [a + 4, b + 4],
        "one-byte-off": lambda a, b, n: [a + 1, b + 1],
        "shorter": lambda a, b, n: [a, b - 4],
        "longer": lambda a, b, n: [a, b + 4],
        "empty": lambda a, b, n: [a, a],
        "at-the-start": lambda a, b, n: [0, b - a],
        "at-the-end": lambda a, b, n: [n - (b - a), n],
        "beyond-the-end": lambda a, b, n: [n, n + b - a],
        "across-the-end": lambda a, b, n: [n - 4, n - 4 + b - a],
        "far-beyond": lambda a, b, n: [2**40, 2**40 + b - a],
        "everything": lambda a, b, n: [0, n],
        "wrapping": lambda a, b, n: [2**64 - 4, b - a - 4],
        "largest": lambda a, b, n: [2**64 - 1 - (b - a), 2**64 - 1],
        "too-large": lambda a, b, n: [2**64, 2**64 + b - a],
        "negative": lambda a, b, n: [-(b - a), 0],
        "both-negative": lambda a, b, n: [-b, -a],
        "fractions": lambda a, b, n: [a + 0.5, b + 0.5],
        "floats": lambda a, b, n: [float(a), float(b)],
        "words": lambda a, b, n: [str(a), str(b)],
        "null": lambda a, b, n: None,
        "nulls": lambda a, b, n: [None, None],
        "one": lambda a, b, n: [a],
        "three": lambda a, b, n: [a, b, b],
        "none": lambda a, b, n: [],
        "object": lambda a, b, n: {"start": a, "end": b},
        "number": lambda a, b, n: a,
        "nested": lambda a, b, n: [[a, b]],
    }
    for name, move in moves.items():

        def change(header: Json, move: Callable[..., Any] = move) -> None:
            last = max(e["data_offsets"][1] for n, e in header.items() if n[0] != "_")
            entry = header[TENSOR]
            entry["data_offsets"] = move(*entry["data_offsets"], last)

        yield Mutation(f"offsets-{name}", with_header(change))

    def swapped(header: Json) -> None:
        one, other = header[TENSOR], header[OTHER]
        one["data_offsets"], other["data_offsets"] = (
            other["data_offsets"],
            one["data_offsets"],
        )

    yield Mutation(
        "offsets-of-two-swapped",
        with_header(swapped),
        lambda state: {**state, TENSOR: state[OTHER], OTHER: state[TENSOR]},
        legal=True,
    )

    def shared(header: Json) -> None:
        header[TENSOR]["data_offsets"] = header[OTHER]["data_offsets"]

    yield Mutation("offsets-of-two-shared", with_header(shared))

    def gap(content: bytes) -> bytes:
        header, data = split(content)
        for name, entry in header.items():
            if name[0] != "_":
                entry["data_offsets"] = [at + 64 for at in entry["data_offsets"]]
        return pack(header, bytes(64) + data)

    yield Mutation("offsets-after-a-gap", with_bytes(gap), the_same)


def names() -> Iterator[Mutation]:
    """Names of tensors: twice, missing, strange."""

    def twice(content: bytes) -> bytes:
        header, data = split(content)
        first = json.dumps({TENSOR: header[TENSOR]})[1:-1]
        return pack(f"{{{first}, {json.dumps(header)[1:]}".encode(), data)

    yield Mutation("name-twice", with_bytes(twice), the_same)

    def twice_elsewhere(content: bytes) -> bytes:
        header, data = split(content)
        first = json.dumps({TENSOR: header[OTHER]})[1:-1]
        return pack(f"{{{first}, {json.dumps(header)[1:]}".encode(), data)

    yield Mutation("name-twice-of-other-bytes", with_bytes(twice_elsewhere), the_same)

    def twice_with_bytes(content: bytes) -> bytes:
        header, data = split(content)
        size = len(data)
        zeros = {**header[TENSOR], "data_offsets": [size, size + 1024]}
        first = json.dumps({TENSOR: zeros})[1:-1]
        return pack(f"{{{first}, {json.dumps(header)[1:]}".encode(), data + bytes(1024))

    yield Mutation("name-twice-with-bytes-of-its-own", with_bytes(twice_with_bytes))

    strange = {
        "empty": "",
        "slash": "../../etc/passwd",
        "absolute": "/etc/passwd",
        "nul": "a\0b",
        "newline": "a\nError: none",
        "escape": "\x1b[2J\x1b]0;title\x07",
        "markup": "[bold red]x[/]",
        "long": "x" * 100_000,
        "dots": ".".join("0" * 1000),
        "digits": "9" * 5000,
        "superscript": "model.layers.²³.weight",
        "metadata": "__metadata__2",
        "unicode": "\u202e\u0000\uffff\U0001f600",
        "percent": "%s%n%(x)s{}{0}",
    }
    for name, word in strange.items():

        def more(content: bytes, word: str = word) -> bytes:
            header, data = split(content)
            size = len(data)
            header[word] = {
                "dtype": "F32",
                "shape": [1],
                "data_offsets": [size, size + 4],
            }
            return pack(header, data + bytes(4))

        yield Mutation(f"another-tensor-{name}", with_bytes(more), the_same)
        yield Mutation(
            f"renamed-to-{name}",
            with_header(lambda h, w=word: h.update({w: h.pop(TENSOR)})),
            lost=TENSOR,
        )
    yield Mutation("renamed-to-a-lone-surrogate", with_text(TENSOR, r"\ud800"))
    yield Mutation("name-not-utf-8", with_text(TENSOR, "\udcff"))

    def thousands(content: bytes) -> bytes:
        header, data = split(content)
        size = len(data)
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [size, size]}
        header.update({f"empty.{n}": empty for n in range(20_000)})
        return pack(header, data)

    yield Mutation("20000-empty-tensors", with_bytes(thousands), the_same)
    yield Mutation(
        "a-tensor-dropped",
        with_bytes(lambda c: pack(*_without(*split(c)))),
        lost=LAST,
    )


def _without(header: Json, data: bytes) -> tuple[Json, bytes]:
    """The file without its last tensor."""
    start, end = header.pop(LAST)["data_offsets"]
    assert end == len(data)
    return header, data[:start]


# ---- indexes


def sharded(folder: Path) -> None:
    """The same model in three files and an index."""
    state = read_model(folder)
    (folder / FILE).unlink()
    write_good(folder, state, shards=SHARDS)


def with_index(
    change: Callable[[Json], Json | bytes | None],
) -> Callable[[Path], object]:
    """In three files, their index changed in place or for another."""

    def spoil(folder: Path) -> None:
        sharded(folder)
        file = folder / INDEX
        index = json.loads(file.read_text())
        found = change(index)
        found = index if found is None else found
        text = found if isinstance(found, bytes) else json.dumps(found).encode()
        file.write_bytes(text)

    return spoil


def pointing(to: Any) -> Callable[[Json], None]:
    """One tensor said to be in that file."""
    return lambda index: index["weight_map"].update({TENSOR: to})


def indexes() -> Iterator[Mutation]:
    """What an index says."""
    places: list[Any] = [
        "../tuned0/model.safetensors",
        "../../escape.safetensors",
        f"sub/../../tuned0/{FILE}",
        f"./../tuned0/{FILE}",
        "/etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        "/proc/self/mem",
        "//etc/passwd",
        "",
        ".",
        "./",
        "..",
        "../",
        "/",
        "~",
        "~/model.safetensors",
        "$HOME/model.safetensors",
        "missing.safetensors",
        "missing/missing.safetensors",
        "config.json",
        f"config.json/../{SHARD}x",
        "file:///etc/passwd",
        "https://example.org/model.safetensors",
        "C:\\model.safetensors",
        "..\\model.safetensors",
        "model.safetensors\0",
        "\0",
        "a\nb.safetensors",
        "x" * 300,
        "x/" * 5000 + "x",
        "\ud800.safetensors",
        "*.safetensors",
        SHARD,  # which does not hold it
        SHARD.upper(),
        f"{SHARD} ",
        None,
        3,
        -1,
        1.5,
        True,
        [],
        [SHARD],
        {},
        {"file": SHARD},
    ]
    for place in places:
        yield Mutation(
            f"index-to-{json.dumps(place)[:40]}", with_index(pointing(place))
        )
    yield Mutation(
        "index-to-the-same-folder",
        with_index(_relabelled(lambda shard: f"./{shard}")),
        the_same,
        legal=True,
    )
    yield Mutation(
        "index-through-its-parent",
        with_index(_relabelled(lambda shard: f"../hostile/{shard}")),
        the_same,
    )

    def in_a_folder(folder: Path) -> None:
        with_index(_relabelled(lambda shard: f"sub/{shard}"))(folder)
        (folder / "sub").mkdir()
        for file in folder.glob("model-*.safetensors"):
            file.rename(folder / "sub" / file.name)

    yield Mutation("index-to-a-folder-below", in_a_folder, the_same, legal=True)

    def with_strange_names(folder: Path) -> None:
        change = {f"model-0000{n}-of-00003.safetensors": n for n in (1, 2, 3)}
        new = ["a b.safetensors", "x\ny.safetensors", "é%s.safetensors"]
        with_index(_relabelled(lambda shard: new[change[shard] - 1]))(folder)
        for old, number in change.items():
            (folder / old).rename(folder / new[number - 1])

    yield Mutation("index-to-strange-names", with_strange_names, the_same, legal=True)

    texts: dict[str, bytes] = {
        "empty": b"",
        "open": b"{",
        "list": b"[]",
        "null": b"null",
        "number": b"3",
        "string": b'"weight_map"',
        "empty-object": b"{}",
        "not-utf-8": b'{"weight_map": {"\xff": "x"}}',
        "deep-1000": f'{{"weight_map": {deep(1000)}}}'.encode(),
        "deep-100000": f'{{"weight_map": {deep(100_000)}}}'.encode(),
        "open-100000": b'{"a":' * 100_000,
        "html": b"<!doctype html>",
        "digits": b'{"weight_map": ' + b"9" * 5000 + b"}",
        "lfs": b"version https://git-lfs.github.com/spec/v1\nsize 12\n",
    }
    for name, text in texts.items():
        yield Mutation(f"index-{name}", with_index(lambda index, t=text: t))
    for value in (None, [], "x", 3, True, {}, [[TENSOR, SHARD]], [TENSOR]):
        yield Mutation(
            f"weight-map-{json.dumps(value)[:30]}",
            with_index(lambda index, v=value: {"weight_map": v}),
        )
    yield Mutation(
        "index-utf-16", with_index(lambda index: json.dumps(index).encode("utf-16"))
    )
    yield Mutation(
        "index-byte-order-mark",
        with_index(lambda index: json.dumps(index).encode("utf-8-sig")),
        the_same,
    )
    yield Mutation(
        "index-names-one-twice",
        with_index(
            lambda index: (
                json.dumps(index)
                .replace(f'"{TENSOR}"', f'"{TENSOR}": "../x", "{TENSOR}"')
                .encode()
            )
        ),
        the_same,
    )
    for word in ("", "../x", "\0", "a\nb", "x" * 10_000):
        yield Mutation(
            f"index-of-another-tensor-{json.dumps(word)[:20]}",
            with_index(lambda index, w=word: index["weight_map"].update({w: SHARD})),
        )
    yield Mutation(
        "index-of-20000-others",
        with_index(
            lambda index: index["weight_map"].update(
                {f"empty.{n}": SHARD for n in range(20_000)}
            )
        ),
    )
    yield Mutation(
        "index-of-one-less",
        with_index(lambda index: {"weight_map": _one_less(index["weight_map"])}),
        lost=TENSOR,
    )
    yield Mutation(
        "index-of-odd-metadata",
        with_index(lambda index: index.update(metadata=["x", None], total_size="1e9")),
        the_same,
        legal=True,
    )

    def beside_a_file(folder: Path) -> None:
        """An index goes before the single file, which is of other weights."""
        state = load_file(folder / FILE)
        sharded(folder)
        save_file({n: torch.zeros_like(t) for n, t in state.items()}, folder / FILE)

    yield Mutation("index-beside-a-file", beside_a_file, the_same, legal=True)

    def shards_overlap(folder: Path) -> None:
        """A tensor stored twice; the index says which one counts."""
        with_index(pointing("more.safetensors"))(folder)
        save_file({TENSOR: torch.ones(16, 16)}, folder / "more.safetensors")

    yield Mutation(
        "index-chooses-between-two",
        shards_overlap,
        lambda state: {**state, TENSOR: torch.ones(16, 16)},
    )


def _relabelled(change: Callable[[str], str]) -> Callable[[Json], None]:
    def apply(index: Json) -> None:
        index["weight_map"] = {
            name: change(shard) for name, shard in index["weight_map"].items()
        }

    return apply


def _one_less(weight_map: Json) -> Json:
    return {name: shard for name, shard in weight_map.items() if name != TENSOR}


# ---- what stands in the place of a file


def replaced(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something else where a file was."""

    def spoil(folder: Path) -> None:
        if name in (INDEX, SHARD):
            sharded(folder)
        file = folder / name
        file.unlink(missing_ok=True)
        make(file)

    return spoil


def places() -> Iterator[Mutation]:
    """Folders, links, loops and pipes in the place of files."""
    kinds: dict[str, Callable[[Path], object]] = {
        "folder": lambda file: file.mkdir(),
        "dangling-link": lambda file: file.symlink_to("nowhere"),
        "loop": lambda file: file.symlink_to(file.name),
        "link-to-its-folder": lambda file: file.symlink_to("."),
        "link-to-config": lambda file: file.symlink_to("config.json"),
        "link-to-nothing": lambda file: file.symlink_to("/dev/null"),
        "empty-file": lambda file: file.touch(),
    }
    for name in (FILE, INDEX, SHARD, "config.json"):
        for kind, make in kinds.items():
            yield Mutation(
                f"{kind}-for-{name}",
                replaced(name, make),
                the_same if name == "config.json" else None,
            )

    def two_links(folder: Path) -> None:
        (folder / FILE).rename(folder / "stored")
        (folder / FILE).symlink_to("once")
        (folder / "once").symlink_to("stored")

    yield Mutation("link-to-a-link", two_links, the_same, legal=True)

    def blobs(folder: Path) -> None:
        """As the hub's client stores what it downloads."""
        home = folder.parent / f"{folder.name}-blobs"
        home.mkdir()
        for file in list(folder.iterdir()):
            file.rename(home / file.name)
            file.symlink_to(Path("..") / home.name / file.name)

    yield Mutation("links-out-of-the-folder", blobs, the_same, legal=True)

    def folder_link(folder: Path) -> None:
        folder.rename(folder.with_name(f"{folder.name}-stored"))
        folder.symlink_to(f"{folder.name}-stored")

    yield Mutation("folder-that-is-a-link", folder_link, the_same, legal=True)

    def folder_loop(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.symlink_to(folder.name)

    yield Mutation("folder-that-is-a-loop", folder_loop)

    def folder_dangling(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.symlink_to("nowhere")

    yield Mutation("folder-that-is-a-dangling-link", folder_dangling)

    def loop_below(folder: Path) -> None:
        (folder / "again").symlink_to(".")

    yield Mutation("a-loop-beside-the-files", loop_below, the_same, legal=True)


def endless() -> Iterator[Mutation]:
    """Pipes and devices, which never end."""
    for name in (FILE, INDEX, SHARD, "config.json"):
        yield Mutation(f"pipe-for-{name}", replaced(name, os.mkfifo))
        yield Mutation(
            f"link-to-zeros-for-{name}",
            replaced(name, lambda file: file.symlink_to("/dev/zero")),
        )


# ---- pickles


class Call:
    """Pickles as a call of a function, which a careless reader makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def evil(folder: Path) -> list[Any]:
    """Objects that leave the marker when they are read."""
    marker = str(folder / MARKER)
    return [
        Call(os.system, f"touch {marker}"),
        Call(eval, f"open({marker!r}, 'w').close()"),
        Call(exec, f"open({marker!r}, 'w').close()"),
        Call(open, marker, "w"),
        Call(os.mkdir, marker),
        Call(Path.touch, Path(marker)),
        Call(getattr, Path(marker), "touch"),
        Call(torch.save, torch.ones(1), marker),
        Call(torch.hub.download_url_to_file, "file:///etc/passwd", marker),
        Call(shutil.copy, "/etc/passwd", marker),
    ]


def to_pickle(folder: Path) -> State:
    """The model's state, its file taken away."""
    state = read_model(folder)
    (folder / FILE).unlink()
    return state


def pickled(
    content: Callable[[State, Path], Any], *, legacy: bool = False, **options: Any
) -> Callable[[Path], object]:
    """What `torch.save` writes of a changed state."""

    def spoil(folder: Path) -> None:
        state = content(to_pickle(folder), folder)
        torch.save(
            state,
            folder / PICKLE,
            _use_new_zipfile_serialization=not legacy,
            **options,
        )

    return spoil


def plain_pickle(
    content: Callable[[State, Path], Any], protocol: int
) -> Callable[[Path], object]:
    """A pickle that is not torch's."""

    def spoil(folder: Path) -> None:
        state = to_pickle(folder)
        (folder / PICKLE).write_bytes(
            pickle.dumps(content(state, folder), protocol=protocol)
        )

    return spoil


def pickles() -> Iterator[Mutation]:
    """Pickles with code, with other things than tensors, with other structure."""
    kinds = ("system", "eval", "exec", "open", "mkdir", "touch", "getattr")
    kinds += ("torch-save", "download", "copy")
    for at, kind in enumerate(kinds):
        yield Mutation(
            f"code-{kind}",
            pickled(lambda state, folder, at=at: {**state, "x": evil(folder)[at]}),
        )
        yield Mutation(
            f"code-{kind}-legacy",
            pickled(
                lambda state, folder, at=at: {**state, "x": evil(folder)[at]},
                legacy=True,
            ),
        )
    whereabouts: dict[str, Callable[[State, Any], Any]] = {
        "alone": lambda state, call: call,
        "as-a-tensor": lambda state, call: {**state, TENSOR: call},
        "in-a-list": lambda state, call: [state, call],
        "below-state-dict": lambda state, call: {"state_dict": state, "x": call},
        "as-state-dict": lambda state, call: {**state, "state_dict": call},
    }
    for name, place in whereabouts.items():
        yield Mutation(
            f"code-{name}",
            pickled(lambda state, folder, put=place: put(state, evil(folder)[0])),
        )
    for protocol in range(6):
        yield Mutation(
            f"code-in-a-plain-pickle-{protocol}",
            plain_pickle(lambda state, folder: evil(folder)[0], protocol),
        )

    def code_as_safetensors(folder: Path) -> None:
        (folder / FILE).write_bytes(pickle.dumps(evil(folder)[0]))

    yield Mutation("code-in-a-safetensors-file", code_as_safetensors)

    def code_in_a_shard(folder: Path) -> None:
        with_index(pointing("more.bin"))(folder)
        torch.save({TENSOR: evil(folder)[0]}, folder / "more.bin")

    yield Mutation("code-in-a-shard", code_in_a_shard)
    yield Mutation("pickle", pickled(lambda state, folder: state), the_same, legal=True)
    yield Mutation(
        "pickle-legacy",
        pickled(lambda state, folder: state, legacy=True),
        the_same,
        legal=True,
    )
    yield Mutation(
        "pickle-ordered",
        pickled(lambda state, folder: OrderedDict(state)),
        the_same,
        legal=True,
    )
    yield Mutation(
        "pickle-of-parameters",
        pickled(
            lambda state, folder: {n: torch.nn.Parameter(t) for n, t in state.items()}
        ),
        the_same,
        legal=True,
    )
    nested: dict[str, Callable[[State], Any]] = {
        "state-dict": lambda state: {"state_dict": state},
        "state-dict-beside": lambda state: {**state, "state_dict": state},
        "state-dict-of-none": lambda state: {**state, "state_dict": None},
        "state-dict-of-a-list": lambda state: {**state, "state_dict": [1]},
        "state-dict-of-a-tensor": lambda state: {**state, "state_dict": torch.ones(1)},
        "list-of-tensors": lambda state: list(state.values()),
        "list-of-names": lambda state: list(state),
        "tuple": lambda state: tuple(state.items()),
        "set": lambda state: set(state),
        "tensor": lambda state: state[TENSOR],
        "string": lambda state: "state_dict",
        "number": lambda state: 3,
        "none": lambda state: None,
        "empty": lambda state: {},
        "numbers-for-names": lambda state: dict(enumerate(state.values())),
        "tuples-for-names": lambda state: {(n,): t for n, t in state.items()},
        "none-for-a-name": lambda state: {**state, None: torch.ones(1)},
        "one-number-for-a-name": lambda state: {**state, 3: torch.ones(1)},
        "numbers-beside": lambda state: {**state, "step": 3, "rate": 0.5},
        "dict-beside": lambda state: {**state, "optimizer": {"a": torch.ones(1)}},
        "number-for-a-tensor": lambda state: {**state, TENSOR: 3},
        "list-for-a-tensor": lambda state: {**state, TENSOR: state[TENSOR].tolist()},
        "none-for-a-tensor": lambda state: {**state, TENSOR: None},
        "integer-tensor": lambda state: {**state, TENSOR: state[TENSOR].int()},
        "boolean-tensor": lambda state: {**state, TENSOR: state[TENSOR] > 0},
        "complex-tensor": lambda state: {**state, TENSOR: state[TENSOR] * 1j},
        "fp8-tensor": lambda state: {**state, TENSOR: state[TENSOR].to(_fp8())},
        "sparse-tensor": lambda state: {**state, TENSOR: state[TENSOR].to_sparse()},
        "meta-tensor": lambda state: {**state, TENSOR: state[TENSOR].to("meta")},
        "quantised-tensor": lambda state: {**state, TENSOR: _quantised(state[TENSOR])},
        "nested-tensor": lambda state: {**state, TENSOR: [state[TENSOR]]},
        "expanded-tensor": lambda state: {**state, TENSOR: _expanded(2**20)},
        "huge-expanded-tensor": lambda state: {**state, TENSOR: _expanded(2**31)},
    }
    same = {
        "state-dict",
        "state-dict-beside",
        "numbers-beside",
        "dict-beside",
        "none-for-a-name",
        "one-number-for-a-name",
    }
    lost = {"boolean-tensor", "complex-tensor"}
    same |= {"state-dict-of-none", "state-dict-of-a-list", "state-dict-of-a-tensor"}
    for name, change in nested.items():
        yield Mutation(
            f"pickle-of-{name}",
            pickled(lambda state, folder, change=change: change(state)),
            the_same if name in same else None,
            lost=TENSOR if name in lost else None,
        )

    def transposed(state: State, folder: Path) -> State:
        return {n: t.T.contiguous().T if t.ndim > 1 else t for n, t in state.items()}

    yield Mutation("pickle-of-other-strides", pickled(transposed), the_same, legal=True)

    def one_storage(state: State, folder: Path) -> State:
        flat = torch.cat([t.flatten() for t in state.values()])
        parts = flat.split([t.numel() for t in state.values()])
        return {
            n: part.view(t.shape)
            for (n, t), part in zip(state.items(), parts, strict=True)
        }

    yield Mutation("pickle-of-one-storage", pickled(one_storage), the_same, legal=True)
    files: dict[str, Callable[[bytes], bytes]] = {
        "empty": lambda content: b"",
        "a-dot": lambda content: b".",
        "zeros": lambda content: bytes(len(content)),
        "garbage": lambda content: bytes(range(256)) * 40,
        "zip-magic": lambda content: b"PK\x03\x04" + bytes(100),
        "end-of-zip": lambda content: b"PK\x05\x06" + bytes(18),
        "tar": lambda content: b"ustar".rjust(262, b"\0") + bytes(1000),
        "longer": lambda content: content + bytes(1000),
    }
    for name, change in files.items():
        yield Mutation(
            f"pickle-{name}",
            _then(pickled(_state), with_bytes(change, PICKLE)),
            the_same if name == "longer" else None,
        )
    for twelfth in range(1, 12):
        cut = with_bytes(lambda c, t=twelfth: c[: len(c) * t // 12], PICKLE)
        yield Mutation(f"pickle-cut-to-{twelfth}-of-12", _then(pickled(_state), cut))
        yield Mutation(
            f"pickle-legacy-cut-to-{twelfth}-of-12",
            _then(pickled(_state, legacy=True), cut),
        )

    def safetensors_as_pickle(folder: Path) -> None:
        (folder / FILE).rename(folder / PICKLE)

    yield Mutation("safetensors-as-pickle", safetensors_as_pickle)

    def pickle_as_safetensors(folder: Path) -> None:
        torch.save(to_pickle(folder), folder / FILE)

    yield Mutation("pickle-as-safetensors", pickle_as_safetensors)

    def bomb(folder: Path) -> None:
        """A list of lists of lists, each ten times the one before."""
        to_pickle(folder)
        levels: list[Any] = ["x"]
        for _ in range(12):
            levels = [levels] * 10
        (folder / PICKLE).write_bytes(pickle.dumps(levels))

    yield Mutation("pickle-of-a-trillion-references", bomb)

    def deep_pickle(folder: Path) -> None:
        to_pickle(folder)
        (folder / PICKLE).write_bytes(
            b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
        )

    yield Mutation("pickle-100000-levels-deep", deep_pickle)

    def memo_bomb(folder: Path) -> None:
        """Opcodes that ask for 2^62 places of the memo, and for a string as long."""
        to_pickle(folder)
        content = b"\x80\x02K\x01r\xff\xff\xff\x7f\x8d" + struct.pack("<Q", 2**62)
        (folder / PICKLE).write_bytes(content + b"x.")

    yield Mutation("pickle-that-claims-2-to-62-bytes", memo_bomb)


def _state(state: State, folder: Path) -> State:
    return state


def _then(*spoils: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        for each in spoils:
            each(folder)

    return spoil


def _fp8() -> torch.dtype:
    return torch.float8_e4m3fn


def _quantised(tensor: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def _expanded(size: int) -> torch.Tensor:
    """One stored element, read again and again."""
    return torch.ones(1).expand(size, size)


# ---- torch's archives


@dataclass
class Stored:
    """One tensor of an archive: what its pickle says, and the bytes that it has."""

    kind: Any
    key: Any
    location: Any
    numel: Any
    offset: Any
    size: Any
    stride: Any
    data: bytes | None


class _Storage:
    def __init__(self, stored: Stored) -> None:
        self.identity = (
            "storage",
            stored.kind,
            stored.key,
            stored.location,
            stored.numel,
        )


class _Rebuilt:
    def __init__(self, stored: Stored) -> None:
        self.stored = stored

    def __reduce__(self) -> Any:
        s = self.stored
        arguments = (_Storage(s), s.offset, s.size, s.stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return obj.identity if isinstance(obj, _Storage) else None


def archive(
    change: Callable[[Stored], object],
    rename: Callable[[dict[str, bytes]], object] = lambda files: None,
    compression: int = zipfile.ZIP_STORED,
) -> Callable[[Path], object]:
    """An archive as torch writes it, what it says of one tensor changed."""

    def spoil(folder: Path) -> None:
        parts = {}
        for number, (name, tensor) in enumerate(sorted(to_pickle(folder).items())):
            parts[name] = Stored(
                kind=torch.FloatStorage,
                key=str(number),
                location="cpu",
                numel=tensor.numel(),
                offset=0,
                size=tuple(tensor.shape),
                stride=tensor.stride(),
                data=tensor.numpy().tobytes(),
            )
        change(parts[TENSOR])
        stream = io.BytesIO()
        rebuilt = {name: _Rebuilt(part) for name, part in parts.items()}
        _Pickler(stream, protocol=2).dump(rebuilt)
        files = {"archive/data.pkl": stream.getvalue(), "archive/byteorder": b"little"}
        for part in parts.values():
            if part.data is not None:
                files[f"archive/data/{part.key}"] = part.data
        files["archive/version"] = b"3\n"
        rename(files)
        with zipfile.ZipFile(folder / PICKLE, "w", compression) as target:
            for name, content in files.items():
                target.writestr(name, content)

    return spoil


def _with_first(state: State) -> State:
    """One tensor from the beginning of the first one's storage."""
    return {**state, TENSOR: state[min(state)].flatten()[:256].view(16, 16)}


def archives() -> Iterator[Mutation]:
    """Archives whose storages are not what their pickle says."""
    yield Mutation("archive", archive(lambda stored: None), the_same, legal=True)
    claims: dict[str, Json] = {
        "size-too-large": {"size": (32, 16)},
        "size-huge": {"size": (2**40, 16)},
        "size-beyond-64-bits": {"size": (2**70, 16)},
        "size-overflowing": {"size": (2**32, 2**32)},
        "size-negative": {"size": (-16, -16)},
        "size-mixed": {"size": (-1, 16)},
        "size-of-words": {"size": ("16", "16")},
        "size-of-fractions": {"size": (16.5, 16)},
        "size-none": {"size": None},
        "size-number": {"size": 256},
        "size-zero": {"size": (0, 16)},
        "size-of-100-axes": {"size": (1,) * 100, "stride": (1,) * 100},
        "size-of-other-rank": {"size": (16, 16, 1)},
        "stride-negative": {"stride": (-16, 1)},
        "stride-huge": {"stride": (2**40, 1)},
        "stride-overflowing": {"stride": (2**62, 2**62)},
        "stride-none": {"stride": None},
        "offset-one-off": {"offset": 1},
        "offset-at-the-end": {"offset": 256},
        "offset-negative": {"offset": -1},
        "offset-far-before": {"offset": -(2**40)},
        "offset-huge": {"offset": 2**62},
        "offset-word": {"offset": "0"},
        "numel-one-less": {"numel": 255},
        "numel-one-more": {"numel": 257},
        "numel-huge": {"numel": 2**60},
        "numel-negative": {"numel": -1},
        "numel-none": {"numel": None},
        "numel-zero": {"numel": 0},
        "data-empty": {"data": b""},
        "data-half": {"data": bytes(512)},
        "data-one-byte-less": {"data": bytes(1023)},
        "data-missing": {"data": None},
        "kind-double": {"kind": torch.DoubleStorage},
        "kind-half": {"kind": torch.HalfStorage},
        "kind-long": {"kind": torch.LongStorage},
        "kind-bool": {"kind": torch.BoolStorage},
        "kind-list": {"kind": list},
        "kind-word": {"kind": "FloatStorage"},
        "kind-none": {"kind": None},
        "kind-class": {"kind": OrderedDict},
        "key-elsewhere": {"key": "../../config.json"},
        "key-absolute": {"key": "/etc/passwd"},
        "key-of-another": {"key": "0", "data": None},
        "key-number": {"key": 0, "data": None},
        "key-none": {"key": None, "data": None},
        "key-long": {"key": "9" * 60_000, "data": None},
        "location-gpu": {"location": "cuda:7"},
        "location-meta": {"location": "meta"},
        "location-unknown": {"location": "../../x"},
        "location-number": {"location": 3},
        "location-none": {"location": None},
    }
    # What need not be followed, since the tensor follows from the rest.
    meanings: dict[str, Meaning] = {
        name: the_same
        for name in claims
        if name.startswith(("location", "numel", "key-elsewhere", "key-absolute"))
        or name == "stride-none"
    }
    meanings |= dict.fromkeys(("key-of-another", "key-number"), _with_first)
    for name, changes in claims.items():
        yield Mutation(
            f"archive-{name}",
            archive(
                lambda stored, c=changes: [setattr(stored, k, v) for k, v in c.items()]
            ),
            meanings.get(name),
            lost=TENSOR if name in ("size-zero", "kind-bool") else None,
        )

    def put(name: str, content: bytes | None) -> Callable[[dict[str, bytes]], object]:
        def change(files: dict[str, bytes]) -> None:
            files.pop(name, None)
            if content is not None:
                files[name] = content

        return change

    files: dict[str, tuple[str, bytes | None, bool]] = {
        "without-a-pickle": ("archive/data.pkl", None, False),
        "of-an-empty-pickle": ("archive/data.pkl", b"", False),
        "of-a-stop": ("archive/data.pkl", b".", False),
        "of-none": ("archive/data.pkl", b"N.", False),
        "without-version": ("archive/version", None, True),
        "of-version-99": ("archive/version", b"99\n", True),
        "of-version-x": ("archive/version", b"x", True),
        "without-byteorder": ("archive/byteorder", None, True),
        "of-unknown-byteorder": ("archive/byteorder", b"middle", True),
        "with-a-path-outside": ("../../outside", b"x", True),
        "with-an-absolute-path": ("/tmp/outside", b"x", True),
        "with-code": ("archive/code/__torch__.py", b"import os", True),
        "with-constants": ("archive/constants.pkl", b"N.", True),
    }
    for name, (file, content, fine) in files.items():
        yield Mutation(
            f"archive-{name}",
            archive(lambda stored: None, put(file, content)),
            the_same if fine else None,
        )
    yield Mutation(
        "archive-of-the-other-byteorder",
        archive(lambda stored: None, put("archive/byteorder", b"big")),
        lambda state: {
            n: torch.from_numpy(t.numpy().byteswap()) for n, t in state.items()
        },
    )
    yield Mutation(
        "archive-compressed",
        archive(lambda stored: None, compression=zipfile.ZIP_DEFLATED),
        the_same,
    )
    yield Mutation(
        "archive-that-unpacks-to-a-gigabyte",
        archive(
            lambda stored: None,
            put("archive/data/more", bytes(1 << 26)),
            zipfile.ZIP_DEFLATED,
        ),
        the_same,
    )


# ---- configurations


def with_config(change: Json | bytes) -> Callable[[Path], object]:
    """Keys of config.json changed, or all of it."""

    def changed(content: bytes) -> bytes:
        if isinstance(change, bytes):
            return change
        return json.dumps({**json.loads(content), **change}).encode()

    return with_bytes(changed, "config.json")


def configs() -> Iterator[Mutation]:
    """config.json of other types."""
    texts: dict[str, bytes] = {
        "empty": b"",
        "open": b"{",
        "list": b"[]",
        "list-of-pairs": b'[["model_type", "llama"]]',
        "null": b"null",
        "number": b"3",
        "string": b'"llama"',
        "empty-object": b"{}",
        "not-utf-8": b'{"model_type": "\xff"}',
        "deep": deep(100_000).encode(),
        "deep-value": f'{{"model_type": {deep(2000)}}}'.encode(),
        "zeros": bytes(100),
        "digits": b'{"vocab_size": ' + b"9" * 5000 + b"}",
    }
    for name, text in texts.items():
        yield Mutation(f"config-{name}", with_config(text), the_same)
    changes: list[Json] = [
        {"model_type": value}
        for value in (None, 3, [], {}, "", "unknown", "../llama", "gpt2", "llama\0")
    ]
    changes += [
        {"architectures": value}
        for value in (None, [], [None], [3], "LlamaForCausalLM", ["Unknown"], {}, 3)
    ]
    changes += [{"architectures": ["__import__"]}, {"architectures": ["AutoModel"]}]
    changes += [
        {"num_hidden_layers": value}
        for value in (None, 0, -1, 2, "1", 1.5, [], {}, True, 1e400)
    ]
    changes += [
        {key: value}
        for key in ("hidden_size", "vocab_size", "num_attention_heads")
        for value in (None, 0, -1, 2**40, "16", [], 10**400)
    ]
    changes += [{"tie_word_embeddings": value} for value in (None, "yes", 1, [], True)]
    changes += [
        {"quantization_config": value} for value in ({"bits": 4}, [1], "int8", 3, True)
    ]
    changes += [{"torch_dtype": value} for value in ("float99", 3, [], "bfloat16")]
    changes += [
        {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}},
        {"auto_map": "evil.Evil"},
        {"auto_map": {"AutoConfig": "../evil.Evil"}},
        {"name_or_path": "../../etc"},
        {"_name_or_path": ["x"]},
        {"transformers_version": {"a": 1}},
        {"rope_scaling": "x"},
        {"rope_scaling": {"type": [], "factor": "x"}},
        {"max_position_embeddings": -1},
        {"id2label": [1]},
        {"id2label": {"x": []}},
        {"torchscript": "x", "use_cache": []},
        {"pad_token_id": 10**30},
        {"eos_token_id": {"a": 1}},
        {"dtype": "float99"},
        {"text_config": {"model_type": "llama"}},
        {"text_config": 3},
        {"__class__": "x", "__init__": 3},
        {"from_dict": "x", "to_dict": 3, "save_pretrained": []},
        {"": "", "\0": "\0", "x" * 10_000: 1},
    ]
    for change in changes:
        shown = json.dumps(change)[1:50]
        yield Mutation(f"config-{shown}", _with_code(change), the_same)


def _with_code(change: Json) -> Callable[[Path], object]:
    """With a module beside it that leaves the marker, for what asks for its code."""

    def spoil(folder: Path) -> None:
        with_config(change)(folder)
        if "auto_map" in change:
            code = f"open({str(folder / MARKER)!r}, 'w').close()\n"
            (folder / "evil.py").write_text(f"{code}class Evil: ...\n")

    return spoil


def enormous_configs() -> Iterator[Mutation]:
    """config.json that asks for more than there is."""
    for count in (10**9, 2**63, 10**400):
        yield Mutation(
            f"config-{count:.0e}-layers"
            if count < 10**300
            else "config-too-many-layers",
            with_config({"num_hidden_layers": count}),
        )


def unique(found: Iterator[Mutation]) -> Iterator[Mutation]:
    """The mutations, with names that can be told apart."""
    seen: dict[str, int] = {}
    for mutation in found:
        number = seen[mutation.name] = seen.get(mutation.name, 0) + 1
        name = mutation.name if number == 1 else f"{mutation.name}-{number}"
        yield replace(mutation, name=name)


def _all() -> Iterator[Mutation]:
    for group in (
        lengths,
        cuts,
        headers,
        entries,
        offsets,
        names,
        indexes,
        places,
        endless,
        pickles,
        archives,
        configs,
        enormous_configs,
    ):
        yield from group()


MUTATIONS: Mapping[str, Mutation] = {m.name: m for m in unique(_all())}
