"""The page on compatibility says what the tests find: no row more, no row less."""

from __future__ import annotations

import importlib
import re
from collections import Counter
from pathlib import Path

import pytest

from tests import matrix
from tests.long.zoo_models import ANIMALS
from tests.matrix import BY_NAME, COVERED, SECTIONS, Row

DOCS = Path(__file__).parents[1] / "docs"
PAGE, LAYOUTS = DOCS / "compatibility.md", DOCS / "layouts.md"
MODULES = ("test_architectures", "test_composed", "test_front_ends", "test_inputs")
VERDICTS = {matrix.WORKS, matrix.REFUSED, matrix.HOST, matrix.CUDA}


def assert_page_is_true(page: str) -> None:
    """Check that the rows of a page are those of the tests, line by line."""
    found = matrix.sections_of(page)
    assert {section: found.get(section) for section in SECTIONS} == {
        section: matrix.lines_of(rows) for section, rows in SECTIONS.items()
    }


def test_page_has_the_rows_of_the_tests() -> None:
    # To renew them: python -m tests.matrix
    page = PAGE.read_text(encoding="utf-8")
    assert_page_is_true(page)
    assert matrix.with_current_rows(page) == page


def assert_all_layouts_are_named(page: str) -> None:
    """Check that the page on layouts has each architecture once."""
    whole = re.search(r"(?ms)^Whole in [^:]*:\s+(.*?)\.\n", page)
    assert whole is not None
    rows = re.findall(r"(?m)^\| (.+?) \|", page)[1:]
    names = " ".join(whole[1].split()).split("; ")
    assert sorted([*names, *rows]) == sorted(ANIMALS)
    assert f"# Layouts of {len(ANIMALS)} architectures\n" in page


def test_all_layouts_are_named() -> None:
    page = LAYOUTS.read_text(encoding="utf-8")
    assert_all_layouts_are_named(page)
    for name in ("Qwen3", "BERT"):
        assert re.search(rf"\b{name}\b", page)
        with pytest.raises(AssertionError):
            assert_all_layouts_are_named(re.sub(rf"\b{name}\b", "Tea", page))


def test_every_row_has_a_test() -> None:
    for module in MODULES:
        importlib.import_module(f"tests.{module}")
    assert COVERED == BY_NAME.keys()


def test_rows_say_all_that_they_must() -> None:
    rows = [row for section in SECTIONS.values() for row in section]
    repeated = [n for n, k in Counter(row.name for row in rows).items() if k > 1]
    assert not repeated
    for row in rows:
        assert row.verdict in VERDICTS
        assert "|" not in row.name + row.line + row.message + row.note
        if row.verdict == matrix.REFUSED:
            assert row.message


@pytest.mark.parametrize("change", ["a row less", "a row more", "another verdict"])
def test_a_false_page_is_noticed(change: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    line = SECTIONS["Files"][1].markdown()
    assert line in page
    other = {
        "a row less": "",
        "a row more": f"{line}\n- tea leaves\n",
        "another verdict": f"| {line[2:]} | refused |  |\n",
    }[change]
    with pytest.raises(AssertionError):
        assert_page_is_true(page.replace(f"{line}\n", other))


def test_a_row_that_was_not_looked_at_is_noticed() -> None:
    row = SECTIONS["Files"][0]

    @matrix.covers(row.name)
    def test_nothing(row: Row) -> None:
        """Expect nothing."""

    with pytest.raises(AssertionError, match="nothing was expected of"):
        test_nothing(row=row)


def test_another_outcome_than_the_row_says_is_noticed() -> None:
    refused = Row("refused", matrix.REFUSED, "granularity ... is not")
    with refused.expect():
        raise ValueError("granularity 'layer' is not one")
    with pytest.raises(AssertionError), refused.expect():
        raise ValueError("something else")
    with pytest.raises(BaseException, match="DID NOT RAISE"), refused.expect():
        pass
    with pytest.raises(ValueError, match="none"), Row("works").expect():
        raise ValueError("none was expected")
