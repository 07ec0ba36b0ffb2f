"""Mutations of a good model's files: damaged, misleading, or with code in them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.families import State, llama_config, llama_state, read_model, write_model

Json = dict[str, Any]
Spoil = Callable[[Path], object]
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
    spoil: Spoil
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


# ---- safetensors


def split(content: bytes) -> tuple[Json, bytes]:
    """Header and data of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def pack(header: Json | bytes, data: bytes) -> bytes:
    """A safetensors file."""
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def with_bytes(change: Callable[[bytes], bytes], name: str = FILE) -> Spoil:
    """A file's bytes changed."""

    def spoil(folder: Path) -> None:
        file = folder / name
        file.write_bytes(change(file.read_bytes()))

    return spoil


def with_header(change: Callable[[Json], Json | bytes | None]) -> Spoil:
    """The header of the safetensors file changed, in place or for another."""

    def changed(content: bytes) -> bytes:
        header, data = split(content)
        found = change(header)
        return pack(header if found is None else found, data)

    return with_bytes(changed)


def damage() -> Iterator[Mutation]:
    """Files that end too early or too late, and headers that are none."""
    changes: dict[str, Callable[[bytes], bytes]] = {
        **{f"length-{n}": _stating(n) for n in (0, 1, 7, 2**31, 2**53, 2**64 - 1)},
        **{f"cut-to-{n}": lambda c, n=n: c[:n] for n in (0, 7, 8, 100)},
        **{f"cut-to-{n}-of-4": lambda c, n=n: c[: len(c) * n // 4] for n in (1, 2, 3)},
        **{f"cut-by-{n}": lambda c, n=n: c[:-n] for n in (1, 4, 1024)},
        "longer": lambda c: c + b"x" * 8,
        "zeros": lambda c: bytes(len(c)),
        "twice": lambda c: c + c,
    }
    for name, change in changes.items():
        yield Mutation(name, with_bytes(change))
    for text in (b"", b"{}", b"[]", b"null", b"{", b'{"\xff": {}}', b"<html>"):
        yield Mutation(f"header-{text!r}", with_header(lambda header, t=text: t))


def _stating(length: int) -> Callable[[bytes], bytes]:
    return lambda content: struct.pack("<Q", length) + content[8:]


SHAPES: list[Any] = [None, "1", 1.5, 2**64, [], [16.5, 16], [-16, -16], [0, 16]]
SHAPES += [[2**40, 2**40], [2**32, 2**32], [256], [8, 32], [16, 15], [16, 17]]
DTYPES: list[Any] = [None, 1, "F33", "float32", "F64", "BF16", "F8_E4M3", "I32", "U8"]


def tensors() -> Iterator[Mutation]:
    """What the header says of one tensor: its shape, dtype, place, and name."""
    for key, values in (("shape", SHAPES), ("dtype", DTYPES)):
        for value in values:
            yield Mutation(
                f"{key}-{json.dumps(value)}",
                with_header(lambda h, k=key, v=value: h[TENSOR].update({k: v})),
            )
    moves: dict[str, Callable[[int, int, int], Any]] = {
        "reversed": lambda a, b, n: [b, a],
        "overlapping-before": lambda a, b, n: [a - 4, b - 4],
        "overlapping-after": lambda a, b, n: [a + 4, b + 4],
        "shorter": lambda a, b, n: [a, b - 4],
        "empty": lambda a, b, n: [a, a],
        "at-the-start": lambda a, b, n: [0, b - a],
        "beyond-the-end": lambda a, b, n: [n, n + b - a],
        "across-the-end": lambda a, b, n: [n - 4, n - 4 + b - a],
        "wrapping": lambda a, b, n: [2**64 - 4, b - a - 4],
        "negative": lambda a, b, n: [-(b - a), 0],
        "null": lambda a, b, n: None,
    }
    for name, move in moves.items():

        def change(header: Json, move: Callable[..., Any] = move) -> None:
            last = max(e["data_offsets"][1] for n, e in header.items() if n[0] != "_")
            entry = header[TENSOR]
            entry["data_offsets"] = move(*entry["data_offsets"], last)

        yield Mutation(f"offsets-{name}", with_header(change))

    def swapped(header: Json) -> None:
        one, other = header[TENSOR], header[OTHER]
        places = one["data_offsets"], other["data_offsets"]
        other["data_offsets"], one["data_offsets"] = places

    yield Mutation(
        "offsets-of-two-swapped",
        with_header(swapped),
        lambda state: {**state, TENSOR: state[OTHER], OTHER: state[TENSOR]},
        legal=True,
    )
    strange = {"slash": "../../etc/passwd", "newline": "a\nError: none"}
    strange |= {"escape": "\x1b[2J\x1b]0;title\x07", "markup": "[bold red]x[/]"}
    for name, word in strange.items():

        def more(content: bytes, word: str = word) -> bytes:
            header, data = split(content)
            place = [len(data), len(data) + 4]
            header[word] = {"dtype": "F32", "shape": [1], "data_offsets": place}
            return pack(header, data + bytes(4))

        yield Mutation(f"another-tensor-{name}", with_bytes(more), the_same)
        yield Mutation(
            f"renamed-to-{name}",
            with_header(lambda h, w=word: h.update({w: h.pop(TENSOR)})),
            lost=TENSOR,
        )

    def dropped(content: bytes) -> bytes:
        header, data = split(content)
        start, end = header.pop(LAST)["data_offsets"]
        assert end == len(data)
        return pack(header, data[:start])

    yield Mutation("a-tensor-dropped", with_bytes(dropped), lost=LAST)


# ---- indices


def sharded(folder: Path) -> None:
    """The same model in three files and an index."""
    state = read_model(folder)
    (folder / FILE).unlink()
    write_good(folder, state, shards=SHARDS)


def with_index(change: Callable[[Json], Json | bytes | None]) -> Spoil:
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


def relabelled(change: Callable[[str], str]) -> Callable[[Json], None]:
    """All tensors said to be in files of other names."""

    def apply(index: Json) -> None:
        index["weight_map"] = {
            name: change(shard) for name, shard in index["weight_map"].items()
        }

    return apply


def indices() -> Iterator[Mutation]:
    """What an index says."""
    outside = ["../tuned0/model.safetensors", "../../escape.safetensors", "/etc/passwd"]
    outside += [f"sub/../../tuned0/{FILE}", f"./../tuned0/{FILE}", "//etc/passwd"]
    outside += ["..", "/", "/dev/stdin", "/proc/self/mem"]
    inside = ["", ".", "~/model.safetensors", "missing.safetensors", "config.json"]
    inside += ["file:///etc/passwd", "..\\model.safetensors", "model.safetensors\0"]
    inside += ["x" * 300, SHARD, SHARD.upper()]  # SHARD does not hold it
    for place in (*outside, *inside, None, 3, [], [SHARD], {"file": SHARD}):
        yield Mutation(
            f"index-to-{json.dumps(place)[:40]}", with_index(pointing(place))
        )
    yield Mutation(
        "index-to-the-same-folder",
        with_index(relabelled(lambda shard: f"./{shard}")),
        the_same,
        legal=True,
    )

    def in_a_folder(folder: Path) -> None:
        with_index(relabelled(lambda shard: f"sub/{shard}"))(folder)
        (folder / "sub").mkdir()
        for file in folder.glob("model-*.safetensors"):
            file.rename(folder / "sub" / file.name)

    yield Mutation("index-to-a-folder-below", in_a_folder, the_same, legal=True)
    texts = [b"", b"{", b"[]", b"null", b"{}", b"<!doctype html>", b'{"\xff": 1}']
    for text in (*texts, b"version https://git-lfs.github.com/spec/v1\nsize 12\n"):
        yield Mutation(f"index-{text!r}"[:50], with_index(lambda index, t=text: t))
    for value in (None, [], "x", {}, [[TENSOR, SHARD]]):
        yield Mutation(
            f"weight-map-{json.dumps(value)[:30]}",
            with_index(lambda index, v=value: {"weight_map": v}),
        )
    yield Mutation(
        "index-of-one-less",
        with_index(lambda index: index["weight_map"].pop(TENSOR) and None),
        lost=TENSOR,
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


# ---- what stands in the place of a file


def places() -> Iterator[Mutation]:
    """Folders and links in the place of files."""
    kinds: dict[str, Spoil] = {
        "folder": lambda file: file.mkdir(),
        "dangling-link": lambda file: file.symlink_to("nowhere"),
        "empty-file": lambda file: file.touch(),
    }
    for name in (FILE, INDEX, SHARD, "config.json"):
        for kind, make in kinds.items():

            def spoil(folder: Path, name: str = name, make: Spoil = make) -> None:
                if name in (INDEX, SHARD):
                    sharded(folder)
                (folder / name).unlink()
                make(folder / name)

            means = the_same if name == "config.json" else None
            yield Mutation(f"{kind}-for-{name}", spoil, means)

    def blobs(folder: Path) -> None:
        """As the hub's client stores what it downloads."""
        home = folder.parent / f"{folder.name}-blobs"
        home.mkdir()
        for file in list(folder.iterdir()):
            file.rename(home / file.name)
            file.symlink_to(Path("..") / home.name / file.name)

    yield Mutation("links-out-of-the-folder", blobs, the_same, legal=True)


# ---- pickles


class Call:
    """Pickles as a call of a function, which a careless reader makes."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def evil(folder: Path) -> dict[str, Any]:
    """Objects that leave the marker when they are read."""
    marker = str(folder / MARKER)
    return {
        "system": Call(os.system, f"touch {marker}"),
        "eval": Call(eval, f"open({marker!r}, 'w').close()"),
        "exec": Call(exec, f"open({marker!r}, 'w').close()"),
        "open": Call(open, marker, "w"),
        "mkdir": Call(os.mkdir, marker),
        "getattr": Call(getattr, Path(marker), "touch"),
        "torch-save": Call(torch.save, torch.ones(1), marker),
        "download": Call(torch.hub.download_url_to_file, "file:///etc/passwd", marker),
        "copy": Call(shutil.copy, "/etc/passwd", marker),
    }


def pickled(
    content: Callable[[State, Path], Any],
    *after: Spoil,
    legacy: bool = False,
) -> Spoil:
    """What `torch.save` writes of a changed state, and changes of that."""

    def spoil(folder: Path) -> None:
        state = content(read_model(folder), folder)
        (folder / FILE).unlink()
        file = folder / PICKLE
        torch.save(state, file, _use_new_zipfile_serialization=not legacy)
        for each in after:
            each(folder)

    return spoil


def as_it_is(state: State, folder: Path) -> State:
    return state


def code() -> Iterator[Mutation]:
    """Pickles with code."""
    for kind in evil(Path()):
        for legacy in (False, True):
            yield Mutation(
                f"code-{kind}{'-legacy' * legacy}",
                pickled(
                    lambda state, folder, kind=kind: {**state, "x": evil(folder)[kind]},
                    legacy=legacy,
                ),
            )
    whereabouts: dict[str, Callable[[State, Any], Any]] = {
        "alone": lambda state, call: call,
        "as-a-tensor": lambda state, call: {**state, TENSOR: call},
        "in-a-list": lambda state, call: [state, call],
        "below-state-dict": lambda state, call: {"state_dict": state, "x": call},
        "as-state-dict": lambda state, call: {**state, "state_dict": call},
    }
    for name, put in whereabouts.items():
        yield Mutation(
            f"code-{name}",
            pickled(lambda state, folder, put=put: put(state, evil(folder)["system"])),
        )
    for name in (FILE, PICKLE):
        for protocol in range(6):

            def plain(folder: Path, name: str = name, protocol: int = protocol) -> None:
                (folder / FILE).unlink()
                call = evil(folder)["system"]
                (folder / name).write_bytes(pickle.dumps(call, protocol=protocol))

            yield Mutation(f"code-in-a-plain-{name}-{protocol}", plain)

    def code_in_a_shard(folder: Path) -> None:
        with_index(pointing("more.bin"))(folder)
        torch.save({TENSOR: evil(folder)["system"]}, folder / "more.bin")

    yield Mutation("code-in-a-shard", code_in_a_shard)


def pickles() -> Iterator[Mutation]:
    """Pickles of other things than tensors, of other structure, cut, garbled."""
    kinds: dict[str, tuple[Callable[[State], Any], Meaning | None]] = {
        "ordered": (OrderedDict, the_same),
        "strides": (
            lambda s: {n: t.t().contiguous().t() for n, t in s.items()},
            the_same,
        ),
        "state-dict": (lambda s: {"state_dict": s}, the_same),
        "state-dict-of-none": (lambda s: {**s, "state_dict": None}, the_same),
        "numbers-beside": (lambda s: {**s, "step": 3, "rate": 0.5}, the_same),
        "dict-beside": (lambda s: {**s, "optimizer": {"a": s[TENSOR]}}, the_same),
        "list-of-tensors": (lambda s: list(s.values()), None),
        "none": (lambda s: None, None),
        "empty": (lambda s: {}, None),
        "numbers-for-names": (lambda s: dict(enumerate(s.values())), None),
        "number-for-a-tensor": (lambda s: {**s, TENSOR: 3}, None),
        "integers": (lambda s: {**s, TENSOR: s[TENSOR].int()}, None),
        "fp8": (lambda s: {**s, TENSOR: s[TENSOR].to(torch.float8_e4m3fn)}, None),
        "sparse": (lambda s: {**s, TENSOR: s[TENSOR].to_sparse()}, None),
    }
    for name, (change, means) in kinds.items():
        yield Mutation(
            f"pickle-of-{name}",
            pickled(lambda state, folder, change=change: change(state)),
            means,
            legal=name in ("ordered", "strides"),
        )
    for legacy in (False, True):
        kind = "-legacy" * legacy
        yield Mutation(
            f"pickle{kind}", pickled(as_it_is, legacy=legacy), the_same, legal=True
        )
        for sixth in range(6):
            cut = with_bytes(lambda c, s=sixth: c[: len(c) * s // 6], PICKLE)
            yield Mutation(
                f"pickle{kind}-cut-to-{sixth}-of-6",
                pickled(as_it_is, cut, legacy=legacy),
            )
    for name, content in (("zeros", bytes(5000)), ("garbage", bytes(range(256)) * 40)):
        other = with_bytes(lambda c, content=content: content, PICKLE)
        yield Mutation(f"pickle-of-{name}", pickled(as_it_is, other))
    yield Mutation(
        "safetensors-as-pickle", lambda folder: (folder / FILE).rename(folder / PICKLE)
    )
    yield Mutation(
        "pickle-as-safetensors",
        pickled(as_it_is, lambda folder: (folder / PICKLE).rename(folder / FILE)),
    )


def records(
    change: Callable[[dict[str, bytes]], object], compression: int = 0
) -> Spoil:
    """An archive of torch with other records: bytes by name."""

    def rewritten(folder: Path) -> None:
        with zipfile.ZipFile(folder / PICKLE) as archive:
            held = {name: archive.read(name) for name in archive.namelist()}
        change(held)
        with zipfile.ZipFile(folder / PICKLE, "w", compression) as archive:
            for name, content in held.items():
                archive.writestr(name, content)

    return pickled(as_it_is, rewritten)


def archives() -> Iterator[Mutation]:
    """Archives whose records are not what their pickle says."""

    def each(change: Callable[[bytes], bytes]) -> Callable[[dict[str, bytes]], None]:
        def apply(held: dict[str, bytes]) -> None:
            held |= {n: change(c) for n, c in held.items() if "/data/" in n}

        return apply

    refused: dict[str, Callable[[dict[str, bytes]], object]] = {
        "short": each(lambda content: content[:-1]),
        "half": each(lambda content: content[: len(content) // 2]),
        "empty": each(lambda content: b""),
        "long": each(lambda content: content + bytes(4)),
        "without-one": lambda held: held.pop("pytorch_model/data/0"),
        "without-a-pickle": lambda held: held.pop("pytorch_model/data.pkl"),
        "of-an-empty-pickle": lambda held: held.update({"pytorch_model/data.pkl": b""}),
    }
    for name, change in refused.items():
        yield Mutation(f"archive-{name}", records(change))
    yield Mutation("archive", records(lambda held: None), the_same, legal=True)
    yield Mutation(
        "archive-compressed",
        records(lambda held: None, zipfile.ZIP_DEFLATED),
        the_same,
    )
    for place in ("../../outside", "/tmp/outside"):
        yield Mutation(
            f"archive-with-{place}",
            records(lambda held, place=place: held.update({place: b"x"})),
            the_same,
        )


# ---- configurations


def configs() -> Iterator[Mutation]:
    """config.json of other types; with code beside it for what asks for its code."""
    changes: list[Json] = [
        {key: value}
        for key, values in {
            "model_type": (None, 3, "unknown", "../llama", "gpt2"),
            "architectures": (None, [], ["Unknown"], ["__import__"]),
            "num_hidden_layers": (None, 0, 2, "1"),
            "hidden_size": (None, 0, "16"),
            "torch_dtype": ("float99", "bfloat16"),
            "auto_map": ("evil.Evil", {"AutoConfig": "../evil.Evil"}),
        }.items()
        for value in values
    ]
    everything = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    for change in (*changes, {"auto_map": everything}):

        def spoil(folder: Path, change: Json = change) -> None:
            file = folder / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
            leaving = f"open({str(folder / MARKER)!r}, 'w').close()\n"
            (folder / "evil.py").write_text(f"{leaving}class Evil: ...\n")

        yield Mutation(f"config-{json.dumps(change)[1:60]}", spoil, the_same)


GROUPS = (damage, tensors, indices, places, code, pickles, archives, configs)
MUTATIONS: Mapping[str, Mutation] = {m.name: m for group in GROUPS for m in group()}
