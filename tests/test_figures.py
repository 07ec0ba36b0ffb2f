"""Figures: of the asked format, wide enough, and no text over another or cut off."""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure, FigureBase
from matplotlib.text import Text

from mergekit_metagpt.report import figures, schema

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
) -> schema.Family:
    """A report's family as it might be measured, without measuring."""
    total = sum(range(1, count + 1))
    shares = tuple(scale * (k + 1) / total for k in range(count))
    keys = (
        ALONE[0],
        *(f"model.layers.{n}" for n in range(layers)),
        *extra,
        *ALONE[1:],
    )
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
    return schema.Family(
        places=("models",),
        settings=schema.Settings(
            granularity=granularity, power=2, exclude=(), scale=scale, varying=()
        ),
        base=schema.Base(name=f"{name}-base", **STORED, norm=1),
        models=tuple(models),
        cosines=tuple(
            tuple(1.0 if i == j else -0.37 + 0.07 * (i + j) / count for i in shares)
            for j in shares
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
    "200 models": report(family(200, name=LONG)),
    "adapters": report(family(3, name=f"/data/{LONG}+/data/{LONG}")),
    "by layer": report(family(3, granularity="layer", name=LONG)),
    "80 layers": report(family(4, layers=80)),
    "two towers": report(
        family(2, extra=tuple(f"visual.blocks.{n}" for n in range(32)))
    ),
    "two families": report(family(2), family(12, name=LONG)),
    "another scale": report(family(3, scale=-0.5)),
    "a scale of 0": report(family(2, scale=0.0)),
}
# Whose texts are on top of each other, and where.


def cases() -> list[Any]:
    return [pytest.param(found, id=name) for name, found in REPORTS.items()]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that were to be saved, laid out as matplotlib does for that."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    saved: list[Figure] = []

    def noted(self: Figure, file: Path, *, dpi: float) -> None:
        assert self.get_figwidth() * dpi >= 1200
        FigureCanvasAgg(self)
        self.draw_without_rendering()
        saved.append(self)

    monkeypatch.setattr(Figure, "savefig", noted)
    return saved


def png_size(file: Path) -> tuple[int, int]:
    header = file.read_bytes()[:24]
    assert header.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", header[16:24])
    return width, height


def texts(figure: FigureBase) -> Iterator[Text]:
    """All texts that are seen; matplotlib also keeps ticks outside an axis's limits."""
    for axes in figure.get_axes():
        hidden = set()
        for axis, limits in (
            (axes.xaxis, sorted(axes.get_xlim())),
            (axes.yaxis, sorted(axes.get_ylim())),
        ):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                inside = limits[0] <= tick.get_loc() <= limits[1]
                if not inside:
                    hidden |= {tick.label1, tick.label2}
        for text in axes.findobj(Text):
            if text not in hidden and text.get_visible() and text.get_text().strip():
                yield text


def assert_readable(figure: Figure) -> None:
    """Check that no text leaves the canvas or lies on another one."""
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    canvas = figure.bbox
    found = {}
    titles = [part._suptitle for part in figure.subfigs if part._suptitle]
    for text in (*texts(figure), *titles):
        box = text.get_window_extent(renderer)
        assert box.x0 >= canvas.x0 - 1 and box.x1 <= canvas.x1 + 1, text
        assert box.y0 >= canvas.y0 - 1 and box.y1 <= canvas.y1 + 1, text
        found[text] = box
    assert len(found) > 5
    for (one, first), (two, second) in itertools.combinations(found.items(), 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert width <= 1 or height <= 1, (one.get_text(), two.get_text())


@pytest.mark.parametrize("found", cases())
def test_texts_can_be_read(
    found: schema.Report, drawn: list[Figure], tmp_path: Path
) -> None:
    figures.report_figure(found, tmp_path / "figure.png")
    (figure,) = drawn
    assert_readable(figure)
    shown = " ".join(text.get_text() for text in texts(figure))
    for one in found.families:
        for number, model in enumerate(one.models, 1):
            assert f"{number}  {figures.short_name(model.name)}" in shown


def test_overlapping_texts_are_noticed() -> None:
    """The check above can fail."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    for at, why in ((0.21, "first"), (1.2, "outside")):
        figure = Figure()
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.text(0.2, 0.5, "first text")
        axes.text(at, 0.5, "outside")
        figure.draw_without_rendering()
        with pytest.raises(AssertionError, match=why):
            assert_readable(figure)


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_a_picture_is_wide_enough(count: int, tmp_path: Path) -> None:
    file = tmp_path / "figure.png"
    figures.report_figure(report(family(count)), file)
    width, height = png_size(file)
    assert width >= 1200 and 300 <= height <= 2 * width


MAGIC = {".png": rb"\x89PNG", ".svg": rb"<\?xml.*<svg", ".pdf": rb"%PDF-"}


@pytest.mark.parametrize("ending", [*MAGIC, ".PNG"])
def test_the_ending_chooses_the_format(ending: str, tmp_path: Path) -> None:
    assert set(figures.FORMATS) == MAGIC.keys()
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
    zero = plain.models[0].model_copy(
        update={"norm": 0.0, "relative_norm": None, "coefficient_range": (0.0, 0.0)}
    )
    layers = tuple(
        layer.model_copy(
            update={"relative_norms": (None, 0.0), "coefficients": (0.0, 0.0)}
        )
        for layer in plain.layers
    )
    found = plain.model_copy(
        update={
            "models": (zero, plain.models[1]),
            "cosines": ((None, None), (None, 1.0)),
            "layers": layers,
        }
    )
    figures.report_figure(report(found), tmp_path / "figure.png")
    assert png_size(tmp_path / "figure.png")[0] >= 1200


@pytest.mark.parametrize(
    ("name", "limit", "short"),
    [
        ("math", 34, "math"),
        ("./math", 34, "math"),
        ("/data/models/math/", 34, "models/math"),
        ("owner/name", 34, "owner/name"),
        ("/a/b/base+/a/b/adapter", 34, "b/base+b/adapter"),
        ("abcdefghijkl", 9, "abc...jkl"),
    ],
)
def test_short_names(name: str, limit: int, short: str) -> None:
    assert figures.short_name(name, limit) == short


@pytest.mark.parametrize("limit", range(6, 40))
def test_short_names_keep_the_limit(limit: int) -> None:
    assert len(figures.short_name(LONG, limit)) <= limit
