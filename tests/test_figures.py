"""Figures: readers find what they need, and no text is over another or cut off."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from mergekit_metagpt.report import (
    comparison,
    comparison_plot,
    drawing,
    figures,
    ranking,
    schema,
)
from mergekit_metagpt.scanning.cache import ChunkLosses

LONG = "someone-with-a-long-name/a-very-long-name-of-a-model-in-its-seventh-edition-v2"
NONE = schema.Tensors(count=0, parameters=0, bytes=0, examples=())
STORED: dict[str, Any] = {
    "source": schema.Source(revision=None, digest="0" * 64, files=()),
    "parameters": 1000,
    "bytes": 2000,
    "precisions": {"bfloat16": 1000},
    "not_written": None,
}
ALONE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def pool(key: str, shares: tuple[float, ...]) -> schema.Pool:
    return schema.Pool(
        key=key, sq_norms=shares, relative_norms=shares, coefficients=shares
    )


def family(
    count: int,
    *,
    layers: int = 28,
    name: str = "models/expert",
    granularity: str = "model",
    extra: tuple[str, ...] = (),
    scale: float = 1.0,
    cosine: float | None = None,
) -> schema.Family:
    """A report's family as it might be measured, without measuring."""
    total = sum(range(1, count + 1))
    shares = tuple((k + 1) / total for k in range(count))
    numbered = (f"model.layers.{n}" for n in range(layers))
    keys = (ALONE[0], *numbered, *extra, *ALONE[1:])
    by_layer = tuple(
        pool(key, tuple(share * (1 + n % 7) / 7 for share in shares))
        for n, key in enumerate(keys)
    )
    one = granularity == "model"
    models = [
        schema.Model(
            name=f"{name}-{k}",
            **STORED,
            sq_norm=share,
            norm=share,
            distance=0.1,
            relative_norm=share,
            coefficient=share if one else None,
            coefficient_range=(share, share) if one else (share / 7, share),
            weight=1,
            weight_by_hand=None,
            parts={"mlp": 1.0},
            not_in_base=NONE,
            only_in_base=NONE,
        )
        for k, share in enumerate(shares)
    ]

    def cosine_of(i: int, j: int) -> float:
        if i == j:
            return 1.0
        return -0.37 + 0.07 * (i + j) / count if cosine is None else cosine

    return schema.Family(
        places=("models",),
        settings=schema.Settings(
            granularity=granularity, power=2, exclude=(), scale=scale, varying=()
        ),
        base=schema.Base(name=f"{name}-base", **STORED, norm=1),
        models=tuple(models),
        cosines=tuple(
            tuple(cosine_of(i, j) for i in range(count)) for j in range(count)
        ),
        reading="",
        pools=by_layer if not one else (pool("model", shares),),
        layers=by_layer,
        warnings=(),
    )


def report(*families: schema.Family) -> schema.Report:
    return schema.Report(versions={}, method="metagpt", families=families)


REPORTS: dict[str, schema.Report] = {
    **{f"{count} models": report(family(count)) for count in (1, 2, 3, 12)},
    **{
        f"{count} models of long names": report(family(count, name=LONG))
        for count in (1, 3, 12)
    },
    "16 models": report(family(16)),
    "60 models": report(family(60)),
    "adapters": report(family(3, name=f"/data/{LONG}+/data/{LONG}")),
    "by layer": report(family(3, granularity="layer", name=LONG)),
    "80 layers": report(family(4, layers=80)),
    "two towers": report(
        family(2, extra=tuple(f"visual.blocks.{n}" for n in range(32)))
    ),
    "two families": report(family(2), family(12, name=LONG)),
    "another scale": report(family(3, scale=-0.5)),
    "wide letters": report(family(3, name="W" * 60, granularity="layer")),
    "no layers": report(family(3, layers=0)),
}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were to be saved, laid out as matplotlib does for that."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    saved: list[Figure] = []

    def noted(self: Figure, file: Path, *, dpi: float) -> None:
        assert self.get_figwidth() * dpi >= 1200
        assert self.get_facecolor() == (1, 1, 1, 1)
        FigureCanvasAgg(self)
        saved.append(self)

    monkeypatch.setattr(Figure, "savefig", noted)
    return saved


def words_in(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


Words = Callable[..., str]


@pytest.fixture
def words_of(drawn: list[Figure], tmp_path: Path) -> Words:
    """Draw a report, check that it can be read, and return its words, one a line."""

    def words(found: schema.Report, method: str = "metagpt") -> str:
        found = found.model_copy(update={"method": method})
        figures.report_figure(found, tmp_path / "figure.png")
        assert_readable(drawn[-1])
        return "\n".join(words_in(drawn[-1]))

    return words


def assert_readable(figure: Figure) -> None:
    """Check that no text leaves the canvas or lies on another one."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    canvas = figure.bbox
    texts = [text for text in figure.findobj(Text) if text.get_text()]
    boxes = [(text, text.get_window_extent(renderer)) for text in texts]
    assert len(boxes) > 1
    for text, box in boxes:
        assert box.x0 >= canvas.x0 - 1 and box.x1 <= canvas.x1 + 1, text
        assert box.y0 >= canvas.y0 - 1 and box.y1 <= canvas.y1 + 1, text
        assert text.get_fontsize() >= 6.5
    for (one, first), (two, second) in itertools.combinations(boxes, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        # Boxes are as high as the highest letter, and lines are near each other.
        assert width <= 1 or height <= 3, (one.get_text(), two.get_text())


@pytest.mark.parametrize("found", REPORTS.values(), ids=REPORTS)
def test_texts_can_be_read(
    found: schema.Report, words_of: Words, drawn: list[Figure]
) -> None:
    words_of(found)
    shown = {re.sub(r"^\W*\d+ {2}", "", words) for words in words_in(drawn[-1])}
    for one in found.families:
        names = drawing.fitting(drawing.Page(), [model.name for model in one.models])
        assert len(set(names)) == len(names) and {*names} <= shown


@pytest.mark.parametrize("layers", [4, 80])
def test_norm_and_head_have_their_own_labels(layers: int, words_of: Words) -> None:
    words = words_of(report(family(2, layers=layers, granularity="layer"))).split("\n")
    assert words.count("norm") == words.count("lm_head") == 2


def test_overlapping_texts_are_noticed() -> None:
    """The check above can fail."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for at, why in ((0.21, "first"), (1.2, "outside")):
        figure = Figure()
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.text(0.2, 0.5, "first text")
        axes.text(at, 0.5, "outside")
        with pytest.raises(AssertionError, match=why):
            assert_readable(figure)


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_a_picture_is_wide_enough(count: int, tmp_path: Path) -> None:
    file = tmp_path / "figure.png"
    figures.report_figure(report(family(count)), file)
    height, width, _ = imread(file).shape
    assert width >= 1200 and 300 <= height <= 2 * width


MAGIC = {".png": rb"\x89PNG", ".svg": rb"<\?xml.*<svg", ".pdf": rb"%PDF-"}


@pytest.mark.parametrize("ending", [*MAGIC, ".PNG"])
def test_the_ending_chooses_the_format(ending: str, tmp_path: Path) -> None:
    assert set(drawing.FORMATS) == MAGIC.keys()
    file = tmp_path / f"figure{ending}"
    figures.report_figure(REPORTS["3 models"], file)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert re.match(MAGIC[ending.lower()], file.read_bytes(), re.DOTALL)


def test_no_window_is_opened(tmp_path: Path) -> None:
    """matplotlib's state of the whole process is left alone."""
    import matplotlib
    import matplotlib.pyplot as plt

    before = dict(matplotlib.rcParams)
    figures.report_figure(REPORTS["2 models"], tmp_path / "figure.svg")
    assert plt.get_fignums() == [] and dict(matplotlib.rcParams) == before


def test_models_without_a_task_vector(tmp_path: Path) -> None:
    """Zero norms, cosines that are null, relative norms that are null."""
    plain = family(2, layers=2)
    unmoved = {"relative_norms": (None, 0.0), "coefficients": (0.0, 0.0)}
    zero = {"norm": 0.0, "relative_norm": None, "coefficient_range": (0.0, 0.0)}
    found = changed(
        [zero, {}],
        cosines=((None, None), (None, 1.0)),
        layers=tuple(layer.model_copy(update=unmoved) for layer in plain.layers),
    )
    figures.report_figure(found, tmp_path / "figure.png")
    assert imread(tmp_path / "figure.png").shape[1] >= 1200


@pytest.mark.parametrize(("count", "title"), [(1, "1 adapter"), (2, "2 adapters")])
def test_adapters_without_their_base(count: int, title: str, words_of: Words) -> None:
    plain = family(count, layers=2)
    unknown = {"relative_norms": (None,) * count}
    found = changed(
        [{}] * count,
        base=plain.base.model_copy(update={"name": "BASE", "parameters": 0}),
        layers=tuple(layer.model_copy(update=unknown) for layer in plain.layers),
    )
    words = words_of(found)
    assert f"Merge of {title} of one base" in words and "BASE" not in words
    assert "How far each layer moved" not in words


def changed(models: list[dict[str, Any]], **changes: Any) -> schema.Report:
    """A report with other fields of its models, and of its family."""
    plain = family(len(models), cosine=0.01)
    pairs = zip(plain.models, models, strict=True)
    new = tuple(model.model_copy(update=fields) for model, fields in pairs)
    return report(plain.model_copy(update={"models": new, **changes}))


def test_weights_by_hand_are_shown(words_of: Words) -> None:
    words = words_of(changed([{"weight": 2.0}, {}]))
    assert "\nweight\n" in words and "times its weight" in words
    words = words_of(changed([{"weight_by_hand": "0.2-0.7"}, {}]), method="ties")
    assert "weight in the YAML" in words and "0.2-0.7" in words
    assert "by MetaGPT's weights" in words
    long = changed([{"weight_by_hand": "-".join(["0.125"] * 20)}, {}])
    assert "0.125-0.1..." in words_of(long, method="ties")
    assert "weight" not in words_of(REPORTS["2 models"])


def test_standard_errors_of_a_sample_are_shown(words_of: Words) -> None:
    errors = {"coefficient_se": 0.0043, "relative_norm_se": 0.02}
    sample = schema.Sample(share=0.01, seed=0, bytes_read=1, bytes_stored=100)
    words = words_of(changed([errors, errors], sample=sample))
    assert "33.3 ± 0.4%" in words and "33.3 ± 2.0%" in words
    assert "0.01 of each large tensor" in words


def test_numbers_of_a_column_have_the_same_digits(words_of: Words) -> None:
    small = {"coefficient_range": (1e-5, 1e-5), "relative_norm": 0.00031}
    large = {"coefficient_range": (0.99999, 0.99999), "relative_norm": 0.1}
    words = words_of(changed([small, large]))
    assert "< 0.1%\n100.0%" in words and "0.031%\n10.000%" in words


def with_layers(*norms: tuple[float | None, ...]) -> schema.Report:
    """Two models with other relative norms in their first layers."""
    layers = list(family(2).layers)
    for at, values in enumerate(norms):
        layers[at] = layers[at].model_copy(update={"relative_norms": values})
    return changed([{}, {}], layers=tuple(layers))


def test_cells_that_did_not_move_have_a_legend(
    words_of: Words, drawn: list[Figure]
) -> None:
    for value, legend in ((0.0, "did not move"), (None, "not comparable")):
        assert legend not in words_of(with_layers())
        assert legend in words_of(with_layers((value, 30.0)))
        hatched = [box for box in rectangles(drawn[-1]) if box.get_hatch()]
        # The cell, and the patch of the legend.
        assert len(hatched) == (2 if value == 0 else 0)


def test_a_legend_of_all_has_room(words_of: Words) -> None:
    words = words_of(with_layers((0.0, 1000.0), (None, 0.1)))
    for legend in ("(log scale)", "100,000% of", "did not move", "not comparable"):
        assert legend in words


def test_cosines_near_0_are_a_line(words_of: Words, drawn: list[Figure]) -> None:
    near = words_of(report(family(3, cosine=-0.04)))
    assert "nearly unrelated directions: cosine −0.04" in near  # noqa: RUF001
    assert "same direction?" not in near
    small = drawn[-1].get_figheight()
    far = words_of(report(family(3, cosine=-0.4)))
    assert "same direction?" in far and far.count("−.40") == 3  # noqa: RUF001
    assert drawn[-1].get_figheight() > small
    two = words_of(report(family(2, cosine=0.4)))
    assert "partly the same directions: cosine 0.40" in two
    slight = words_of(report(family(3, cosine=0.13)))
    assert "only slightly similar directions: cosine 0.13" in slight
    assert "same direction?" not in slight


def rectangles(figure: Figure) -> list[Rectangle]:
    return figure.findobj(Rectangle)  # type: ignore[return-value]


def test_the_whole_length_of_a_bar_is_the_whole_merge(
    words_of: Words, drawn: list[Figure]
) -> None:
    words = words_of(report(family(3)))
    assert "0%\n100%\nequal shares: 33.3%" in words
    assert "Larger does not mean better." in words

    def widths(color: str) -> list[float]:
        boxes = rectangles(drawn[-1])
        filled = (box for box in boxes if box.get_facecolor() == to_rgba(color))
        return [box.get_width() for box in filled]

    pairs = zip(widths(drawing.BLUE), widths(figures.TRACK), strict=True)
    lengths = [bar / track for bar, track in pairs]
    assert lengths == pytest.approx([1 / 6, 2 / 6, 3 / 6])
    same = changed([{}, {}], settings=schema.Settings(power=0, varying=()))
    assert "equal shares" not in words_of(same)


def test_shares_by_layer_have_a_panel(words_of: Words) -> None:
    panel = "Share of the merge, layer by layer"
    words = words_of(REPORTS["by layer"])
    assert panel in words and "lowest to highest" in words
    assert "How far each layer moved" in words
    assert panel not in words_of(report(family(2, granularity="tensor")))


def test_settings_are_explained(words_of: Words) -> None:
    words = words_of(report(family(2, scale=0.5)))
    assert "multiplied by 0.5" in words and "squared distance" in words
    for power, expected in ((0, "same for all"), (1, "'s distance"), (-1, "of -1")):
        settings = schema.Settings(power=power, exclude=("embed",), varying=())
        words = words_of(changed([{}, {}], settings=settings))
        assert expected in words and "Not counted in the distance: embed" in words
    for keep, shown in ((1.25, "keep, 1.25"), (None, "keep, undefined")):
        settings = schema.Settings(scale="keep", varying=())
        pools = (pool("model", (0.5, 0.5)).model_copy(update={"keep": keep}),)
        words = words_of(changed([{}, {}], settings=settings, pools=pools))
        assert f"scaled to the models' mean length (lambda: {shown})" in words


def test_names_with_dollar_signs(words_of: Words) -> None:
    assert "a$b$c-0" in words_of(report(family(2, name="./a$b$c")))


@pytest.mark.parametrize(
    ("names", "limit", "short"),
    [
        (["./math/"], 40, ["math"]),
        (["/data/models/math", "owner/name"], 40, ["math", "owner/name"]),
        (["/runs/a/final", "/runs/b/final"], 40, ["a/final", "b/final"]),
        (["/a/base+/a/one", "/a/base+/a/two"], 40, ["base+one", "base+two"]),
        (["the-same-x-end", "the-same-y-end"], 9, ["t...x-end", "t...y-end"]),
        (["a" * 20, "a" * 21], 9, ["1 a...a", "2 a...a"]),
    ],
)
def test_labels(names: list[str], limit: int, short: list[str]) -> None:
    assert drawing.labels(names, limit) == short


@pytest.mark.parametrize("limit", range(6, 40))
def test_labels_tell_models_apart(limit: int) -> None:
    names = [LONG, f"{LONG}-1", LONG.replace("long", "wide"), "/data/other", "math"]
    short = drawing.labels(names, limit)
    assert len(set(short)) == len(names)
    assert all(len(label) <= limit for label in short)


# ---- the figure of `compare`


def compared(
    texts: int, candidates: int, name: str = "task", unit: str = "token"
) -> comparison.Comparison:
    """Losses of twenty chunks: a base, a specialist for each text, and merges."""
    tasks = [f"{name}-{k}" for k in range(texts)]

    def losses(excess: float, seed: int) -> list[ChunkLosses]:
        chunks = [
            1e3 * (1.5 + excess + k % 3 / 10 + 0.01 * math.sin(k * seed))
            for k in range(20)
        ]
        tokens = [1000] * 19 + [1000 if unit == "token" else 1000 + seed]
        one = ChunkLosses(losses=chunks, tokens=tokens, bytes=[4000] * 20)
        return [one] * texts

    sizes = {"chunks": 20, "tokens": 20_000, "bytes": 80_000}
    models = [None if k and k == texts - 1 else tasks[k] for k in range(texts)]
    merges = {f"candidate {k}": losses(0.2 + 0.003 * k, k) for k in range(candidates)}
    return comparison.compare(
        [
            comparison.Text(name=task, file="text", model=model, **sizes)
            for task, model in zip(tasks, models, strict=True)
        ],
        {
            "base": losses(0.5, 90),
            **{task: losses(0.01 * k, 91 + k) for k, task in enumerate(tasks)},
            **merges,
        },
        {m: ranking.Merge([m], "", "weights of a kind") for m in merges},
        {"versions": {}, "context": 512, "dtype": "float32", "device": "cpu"},
    )


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(compared(1, 1), id="one"),
        pytest.param(compared(2, 6), id="2 texts, 6 candidates"),
        pytest.param(compared(5, 12), id="5 texts, 12 candidates"),
        pytest.param(compared(5, 12, LONG), id="long names"),
        pytest.param(compared(9, 3, unit="byte"), id="by byte"),
    ],
)
def test_a_comparison_can_be_read(
    found: comparison.Comparison, drawn: list[Figure], tmp_path: Path
) -> None:
    comparison_plot.comparison_figure(found, tmp_path / "figure.png")
    (figure,) = drawn
    assert_readable(figure)
    words = words_in(figure)
    joined = " ".join(words)
    assert found.verdict in joined
    assert f"Average loss difference (ALD), nats per {found.unit}" in joined
    assert "candidate 0: weights of a kind" in words
    rows = [*found.candidates, *found.models]
    for label, row in zip(
        drawing.labels([row.name for row in rows], comparison_plot.LONGEST_NAME),
        rows,
        strict=True,
    ):
        assert any(label in word for word in words)
        assert f"{row.ald:.4f}" in words
    assert ("(not counted)" in joined) == (len(found.texts) > 1)


def test_a_loss_that_is_no_number_is_drawn(tmp_path: Path) -> None:
    found = compared(2, 3)
    bad = comparison.Loss(
        per_token=math.nan, per_token_error=0, per_byte=math.inf, per_byte_error=0
    )
    worst = found.candidates[-1].model_copy(
        update={"ald": math.inf, "above_best": math.inf, "losses": (bad, bad)}
    )
    candidates = (*found.candidates[:-1], worst)
    changed = found.model_copy(update={"candidates": candidates})
    comparison_plot.comparison_figure(changed, tmp_path / "figure.png")
    assert imread(tmp_path / "figure.png").shape[1] >= 1200


def test_axes_end_at_round_numbers_beyond_what_they_show() -> None:
    for values in ([0.3, 0.3123], [1.0], [-2e-5, 7e-5], [512.0, 4096.0]):
        axis = comparison_plot._Axis.over(values, 0.0, 3.0)
        assert axis.low < min(values) and max(values) < axis.high
        for end in (axis.low, axis.high):
            assert end / axis.step == pytest.approx(round(end / axis.step))
        assert 2 <= round((axis.high - axis.low) / axis.step) <= 6


def test_noise_is_hollow(drawn: list[Figure], tmp_path: Path) -> None:
    found = compared(1, 4)
    assert {row.beyond_noise for row in found.candidates[1:]} == {True, False}
    comparison_plot.comparison_figure(found, tmp_path / "figure.png")
    marks = [line for line in drawn[-1].findobj(Line2D) if line.get_marker() == "o"]
    hollow = [mark.get_markerfacecolor() == "white" for mark in marks]
    near = [not row.beyond_noise for row in found.candidates]
    assert hollow == [False, *near[1:]] * 2
