"""The page on compatibility says what the tests find: no row more, no row less."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import pytest

from tests import matrix
from tests.long.zoo_models import ANIMALS
from tests.matrix import BY_NAME, COVERED, SECTIONS, Row

PAGE = Path(__file__).parents[1] / "docs" / "compatibility.md"
MODULES = ("test_architectures", "test_composed", "test_front_ends", "test_inputs")
VERDICTS = {matrix.WORKS, matrix.REFUSED, matrix.HOST, matrix.CUDA}


def assert_page_is_true(page: str) -> None:
    """Check that the tables of a page are those of the tests, line by line."""
    found = matrix.tables_of(page)
    (layouts,) = (section for section in found if section.startswith("Layouts of"))
    rows = found.pop(layouts)[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [*ANIMALS]
    assert layouts == f"Layouts of {len(ANIMALS)} architectures"
    wanted = {section: matrix.table(section) for section in SECTIONS}
    assert list(found) == list(wanted)
    for section, lines in wanted.items():
        assert found[section] == lines


def test_page_has_the_rows_of_the_tests() -> None:
    assert_page_is_true(PAGE.read_text(encoding="utf-8"))


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
        assert "|" not in row.markdown()[1:-1].replace(" | ", "")
        if row.verdict == matrix.REFUSED:
            assert row.message


@pytest.mark.parametrize("change", ["a row less", "a row more", "another verdict"])
def test_a_false_page_is_noticed(change: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    line = SECTIONS["Files"][1].markdown()
    assert line in page
    other = {
        "a row less": "",
        "a row more": f"{line}\n| tea leaves | works |  |\n",
        "another verdict": line.replace("| works |", "| refused |"),
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
