"""Pure functions behind `inspect`: warnings, parts of names, digests."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from mergekit_metagpt.arithmetic.closed_form import coefficients
from mergekit_metagpt.checkpoints import identity
from mergekit_metagpt.checkpoints.identity import FileIdentity
from mergekit_metagpt.method import advice
from mergekit_metagpt.report.parts import PARTS, part_of

# --- perils ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shares", "begins"),
    [
        ([1.0], None),
        ([0.9, 0.1], None),
        ([0.91, 0.09], "m0 takes 91.00%"),
        ([0.05, 0.95], "m1 takes 95.00%"),
        ([0.5, 0.47, 0.03], "m2 gets only 3.00%"),
        ([0.5, 0.466, 0.034], None),
        ([0.25] * 4, None),
        ([0.0, 1.0], "m1 takes 100.00%"),
    ],
)
def test_degenerate(shares: list[float], begins: str | None) -> None:
    """More than 0.9, or less than a tenth of an equal share."""
    models = [f"m{k}" for k in range(len(shares))]
    alike = [1.0] * len(shares)
    said = advice.degenerate("the-base", models, shares, alike, "the whole model")
    if begins is None:
        assert said is None
        return
    assert said is not None and said.startswith(f"{begins} of the merge")
    assert "the-base" in said and "the whole model" in said
    assert "left over" not in said and "exclude" not in said


@pytest.mark.parametrize("sizes", [(1.0, 8.0, 9.0), (14.0, 1.0, 2.0)])
@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_ways_out_of_a_degenerate_merge_have_numbers(
    sizes: tuple[float, ...], weight: float
) -> None:
    sq_norms, weights = [size**2 for size in sizes], [weight] * 3
    shares = coefficients(sq_norms, weights).tolist()
    said = str(
        advice.degenerate(
            "b", ["m0", "m1", "m2"], shares, weights, "here", sq_norms=sq_norms
        )
    )
    way = "less" if sizes[0] < 2 else "more"
    times = 9 if way == "less" else 7
    assert re.match(rf"m0 moved {times} times {way} than m[12] and ", said)
    assert said.index("weight: ") < said.index("power: 1")
    found = re.search(r"weight: (\S+) for m0 \(an equal share\)", said)
    assert found
    equal = coefficients(sq_norms, [float(found[1]), weight, weight])
    assert equal[0].item() == pytest.approx(1 / 3, rel=0.05)
    assert f"power: 1 ({sizes[0] / sum(sizes):.2%} for it)" in said


def test_a_power_above_2_is_a_cause() -> None:
    said = advice.degenerate(
        "b", ["m0", "m1"], [1.0, 1e-120], [1, 1], "here", sq_norms=[4.0, 1.0], power=400
    )
    assert said is not None and "causes: a power above 2, " in said
    assert "Ways out: power: 2 (20.00% for it)" in said


def test_a_power_that_does_not_help_is_no_way_out() -> None:
    said = advice.degenerate(
        "b", ["m0", "m1"], [0.999, 0.001], [1, 1], "here", sq_norms=[999.0, 1.0]
    )
    assert said is not None and "power: 1" not in said
    # Of two, what is said is how to get more of the one that moved little.
    assert "weight: 1000 for m1 " in said and "power: 0 (50.00% for it)" in said


def test_a_model_that_equals_the_base_is_named_so() -> None:
    norms = [0.0, 1.0, 1.0]
    said = advice.degenerate(
        "b", ["m0", "m1", "m2"], [0, 0.5, 0.5], [1] * 3, "here", sq_norms=norms
    )
    assert said is not None and said.startswith("m0 equals the base b in here:")


def test_a_share_that_is_not_zero_does_not_look_like_it() -> None:
    said = advice.degenerate(
        "b", ["m0", "m1", "m2"], [4e-6, 0.5, 0.5], [1, 1, 1], "here"
    )
    assert said is not None and "gets only 4.0e-04% of the merge" in said


@pytest.mark.parametrize(
    ("weights", "left_over"), [((1, 1), 0), ((9, 1), 1), ((1, 9), 0), ((0, 1), None)]
)
def test_a_weight_is_a_cause_only_where_it_adds_to_the_share(
    weights: tuple[float, ...], left_over: int | None
) -> None:
    said = advice.degenerate("b", ["m0", "m1"], [0.95, 0.05], weights, "here")
    assert (said is None) == (left_over is None)
    assert said is None or ("a weight left over in the YAML" in said) == left_over


def test_a_distance_is_no_reason_for_what_a_weight_did() -> None:
    said = advice.degenerate(
        "b", ["m0", "m1"], [0.95, 0.05], [38, 1], "here", sq_norms=[1.0, 2.0]
    )
    assert said is not None and "moved" not in said


@pytest.mark.parametrize(
    ("warning", "limit"), [(advice.embeddings, 0.5), (advice.counts_unwritten, 0.01)]
)
def test_a_share_of_a_squared_norm_above_the_limit_is_reported(
    warning: Callable[..., str | None], limit: float
) -> None:
    assert warning("m", 0.0, "wte") is warning("m", limit, "wte") is None
    for share in (limit + 0.01, 1.0):
        said = warning("m", share, "wte")
        assert said is not None and f"{share:.0%}" in said and "exclude: wte" in said


@pytest.mark.parametrize(
    ("distance", "says"), [(0.02, False), (0.5, False), (0.6, True), (1.4, True)]
)
def test_far(distance: float, says: bool) -> None:
    said = advice.far("b", "m", distance)
    assert (said is not None) == says
    if said is not None:
        assert f"tensors of m are typically {distance:.2f} of" in said


@pytest.mark.parametrize(
    ("cosines", "says"),
    [
        ([], False),
        ([0.5], False),
        ([0.51], True),
        ([0.9, 0.6, 0.7], True),
        ([0.9, 0.9, -0.9], False),
    ],
)
def test_siblings(cosines: list[float], says: bool) -> None:
    said = advice.siblings("b", cosines)
    assert (said is not None) == says
    assert said is None or f"cosines from {min(cosines):.2f}" in said


def matrix(*below: float) -> list[list[float]]:
    """The cosines of two or three models from those below the diagonal."""
    size = {1: 2, 3: 3}[len(below)]
    found = [[1.0] * size for _ in range(size)]
    values = iter(below)
    for row in range(size):
        for column in range(row):
            found[row][column] = found[column][row] = next(values)
    return found


NAN = float("nan")


@pytest.mark.parametrize(
    ("cosines", "parts"),
    [
        ([[1.0]], ["alone"]),
        (matrix(0.1), ["Near orthogonal (at most 0.10)"]),
        (matrix(-0.05), ["Near orthogonal (at most 0.05)"]),
        (matrix(0.11), ["m0 and m1 are slightly similar", "+0.11"]),
        (matrix(0.31), ["m0 and m1 share a direction", "+0.31"]),
        (matrix(-0.4), ["m0 and m1 point against each other", "-0.40"]),
        (matrix(0.2, -0.3, 0.1), ["m0 and m2 are slightly opposed", "-0.30"]),
        (matrix(0.2, NAN, NAN), ["m0 and m1 are slightly similar"]),
        (matrix(0.2, 0.0, 0.7), ["m1 and m2 share a direction", "+0.70"]),
    ],
)
def test_reading_of_cosines(cosines: list[list[float]], parts: list[str]) -> None:
    models = [f"m{k}" for k in range(len(cosines))]
    said = advice.cosine_reading(models, cosines)
    for part in parts:
        assert part in said
    assert "\n" not in said


def test_reading_where_a_task_vector_is_zero() -> None:
    said = advice.cosine_reading(["m0", "m1"], [[NAN, NAN], [NAN, 1.0]])
    assert "alone" not in said


def test_models_that_equal_the_base() -> None:
    assert "the base b" in advice.nothing_moved("b", "model.norm.weight")
    assert advice.left_out("b", [], -1.0, "model") is None
    said = advice.left_out("b", ["m0", "m2"], -0.5, "model")
    assert said is not None and "m0, m2" in said and "power -0.5" in said


# --- parts of a model -----------------------------------------------------------------

NAMES = {
    "embeddings": [
        "model.embed_tokens.weight",
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "gpt_neox.embed_in.weight",
        "model.tok_embeddings.weight",
        "bert.embeddings.word_embeddings.weight",
        "model.decoder.embed_positions.weight",
        "shared.weight",
        "visual.patch_embed.proj.weight",
    ],
    "attention": [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.o_proj.bias",
        "transformer.h.0.attn.c_attn.weight",
        "gpt_neox.layers.3.attention.query_key_value.weight",
        "encoder.layer.0.attention.output.dense.weight",
        "model.layers.0.attention.wqkv.weight",
        "model.layers.0.linear_attn.in_proj_qkvz.weight",
        "encoder.block.0.layer.0.SelfAttention.q.weight",
        "visual.blocks.0.attn.qkv.weight",
    ],
    "mlp": [
        "model.layers.0.mlp.gate_proj.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.feed_forward.w2.weight",
        "model.decoder.layers.0.fc1.weight",
        "encoder.layer.0.intermediate.dense.weight",
        "gpt_neox.layers.3.mlp.dense_h_to_4h.weight",
        "encoder.block.0.layer.1.DenseReluDense.wi_0.weight",
    ],
    "norms": [
        "model.norm.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
        "model.layers.0.pre_feedforward_layernorm.weight",
        "model.layers.0.self_attn.q_norm.weight",
        "transformer.h.0.ln_1.bias",
        "transformer.ln_f.weight",
        "gpt_neox.final_layer_norm.weight",
        "encoder.layer.0.attention.output.LayerNorm.weight",
    ],
    "head": [
        "lm_head.weight",
        "embed_out.weight",
        "classifier.weight",
        "score.weight",
        "transformer.output_layer.weight",
        "cls.predictions.transform.dense.weight",
    ],
    "other": ["backbone.layers.0.mixer.A_log", "model.layers.0.conv.weight"],
}
LISTED = [(name, part) for part, names in NAMES.items() for name in names]


@pytest.mark.parametrize(("name", "part"), LISTED, ids=[name for name, _ in LISTED])
def test_parts(name: str, part: str) -> None:
    assert set(PARTS) == NAMES.keys()
    assert part_of(name) == part


# --- fingerprints ---------------------------------------------------------------------


def print_of(file: Path) -> identity.Fingerprint:
    return identity.fingerprint(FileIdentity.of(file))


@pytest.mark.parametrize("size", [0, 1, 4095, 1 << 20, (1 << 20) + 1, 5 << 20])
def test_a_change_at_either_end_is_seen(size: int, tmp_path: Path) -> None:
    content = bytearray(os.urandom(size))
    places = {0, size - 1} if size else set()
    digests = []
    for number, place in enumerate([None, *places]):
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        file = tmp_path / str(number) / "model.safetensors"
        file.parent.mkdir()
        file.write_bytes(changed)
        found = print_of(file)
        assert (found.name, found.size, found.whole) == (file.name, size, False)
        digests.append(found.digest)
    assert len(set(digests)) == len(digests)


def test_the_same_content_elsewhere_has_the_same_digest(tmp_path: Path) -> None:
    identities = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        for name, content in (("b", b"x" * 9), ("a", b"y" * 7)):
            (tmp_path / folder / name).write_bytes(content)
        found = [FileIdentity.of(tmp_path / folder / name) for name in "ba"]
        identities.append(tuple(found))
    first, second = map(identity.digest_of, identities)
    assert first == second == identity.digest_of(identities[0][::-1])
    assert len(first) == 64
    (tmp_path / "two" / "b").rename(tmp_path / "two" / "c")
    renamed = tuple(FileIdentity.of(tmp_path / "two" / name) for name in "ac")
    assert identity.digest_of(renamed) != first


def test_a_file_that_is_written_anew_has_another_digest(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"first")
    first = print_of(file)
    other = tmp_path / "other"
    other.write_bytes(b"later")
    other.replace(file)
    assert print_of(file).digest != first.digest


@pytest.mark.parametrize("length", [40, 64])
def test_a_blob_of_the_hub_is_named_by_its_hash(length: int, tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    name = hashlib.sha256(b"content").hexdigest()[:length]
    (tmp_path / "blobs" / name).write_bytes(b"content")
    folder = tmp_path / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (folder / "model.safetensors").symlink_to(Path("../../blobs") / name)
    found = print_of(folder / "model.safetensors")
    assert found == identity.Fingerprint("model.safetensors", 7, name, whole=True)
    assert identity.hub_revision(folder) == "a" * 40
    assert identity.hub_revision(folder.parent) is None


def test_a_file_that_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"content")
    of_file = FileIdentity.of(file)
    file.unlink()
    with pytest.raises(OSError, match=file.name):
        identity.fingerprint(of_file)
