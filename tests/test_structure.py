"""The seven wings of the package: who imports whom, and by which rooms."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import mergekit_metagpt

PACKAGE = Path(mergekit_metagpt.__file__).parent
DOCS = Path(__file__).parents[1] / "docs"
NAME = PACKAGE.name
WINGS = sorted(file.parent.name for file in PACKAGE.glob("*/__init__.py"))
# Every module but the faces of wings, such as `scanning.cache`.
MODULES = sorted(
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
    for file in PACKAGE.rglob("*.py")
    if file.name != "__init__.py"
)


def source_of(module: str) -> str:
    return (PACKAGE / f"{module.replace('.', '/')}.py").read_text()


def imports_of(source: str) -> set[str]:
    """Modules of ours that a source imports anywhere, by their names in the package."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            names = [node.module or ""]
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        modules |= {name.removeprefix(f"{NAME}.") for name in names}
    return {module for module in MODULES if module in modules}


def wing_of(module: str) -> str:
    """The wing of a module; empty for those at the top of the package."""
    return module.partition(".")[0] if "." in module else ""


def face_of(wing: str) -> list[str]:
    names: list[str] = importlib.import_module(f"{NAME}.{wing}").__all__
    return names


def rows(page: str) -> dict[str, set[str]]:
    """Read the table under `## Seven wings`: wing, the wings that it imports."""
    (section,) = re.findall(r"^## Seven wings$(.*?)(?=^## |\Z)", page, re.M | re.S)
    table: dict[str, set[str]] = {}
    for line in section.splitlines():
        if line.startswith("| `"):
            wing, answers, imports = (cell.strip() for cell in line.split("|")[1:-1])
            assert answers, f"{wing} answers nothing"
            table[wing.strip("`")] = set(re.findall(r"`(\w+)`", imports))
    return table


def violations(module: str, imports: set[str], table: dict[str, set[str]]) -> list[str]:
    """Say which imports of a module leave its row, or enter a wing beside its face."""
    problems = []
    for other in sorted(imports):
        wing, target = wing_of(module), wing_of(other)
        if not target or wing == target:
            continue
        if wing and target not in table[wing]:
            problems.append(f"{module} imports {other}: not in its row")
        if other.partition(".")[2] not in face_of(target):
            problems.append(f"{module} imports {other}: not in the face of {target}")
    return problems


TABLE = rows((DOCS / "architecture.md").read_text(encoding="utf-8"))


def test_reading_imports() -> None:
    source = f"""
import os, {NAME}.autoload
from {NAME} import scan
from {NAME}.scanning import cache, once
from {NAME}.checkpoints.pairs import align
def function():
    from {NAME}.report import tables as shown
"""
    assert imports_of(source) == {
        "autoload",
        *("scanning.cache", "scanning.once", "checkpoints.pairs", "report.tables"),
    }


def test_a_wrong_import_is_noticed() -> None:
    up = violations("arithmetic.in_parts", {"scanning.once"}, TABLE)
    assert up == ["arithmetic.in_parts imports scanning.once: not in its row"]
    beside = violations("report.tables", {"scanning.one_pass"}, TABLE)
    assert beside == [
        "report.tables imports scanning.one_pass: not in the face of scanning"
    ]


def test_the_page_has_all_wings_from_the_top_down() -> None:
    order = list(TABLE)
    assert sorted(order) == WINGS
    for row, wing in enumerate(order):
        assert TABLE[wing] <= set(order[row + 1 :]), f"{wing} imports upwards"
    assert len(order) == 7
    assert sum(map(len, TABLE.values())) <= 20


@pytest.mark.parametrize("module", MODULES)
def test_imports_stay_in_their_row_and_enter_by_the_face(module: str) -> None:
    assert not violations(module, imports_of(source_of(module)), TABLE)


def test_every_row_and_face_is_used() -> None:
    arrows: dict[str, set[str]] = {wing: set() for wing in WINGS}
    entered: dict[str, set[str]] = {wing: set() for wing in WINGS}
    sources = {module: source_of(module) for module in MODULES}
    sources["__init__"] = source_of("__init__")
    for module, source in sources.items():
        for other in imports_of(source):
            wing, target = wing_of(module), wing_of(other)
            if target and wing != target:
                entered[target].add(other.partition(".")[2])
                if wing:
                    arrows[wing].add(target)
    assert arrows == TABLE
    faces = {wing: set(face_of(wing)) for wing in WINGS}
    assert entered == faces


def test_no_module_reaches_itself() -> None:
    graph = {module: imports_of(source_of(module)) for module in MODULES}
    for module in MODULES:
        reached: set[str] = set()
        waiting = set(graph[module])
        while waiting:
            following = waiting.pop()
            reached.add(following)
            waiting |= graph[following] - reached
        assert module not in reached, f"{module} imports itself by way of others"


@pytest.mark.parametrize("wing", WINGS)
def test_a_face_is_a_docstring_and_a_list(wing: str) -> None:
    """Python runs it before any room of the wing: it imports nothing."""
    docstring, names = ast.parse(source_of(f"{wing}.__init__")).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(names, ast.Assign) and ast.unparse(names.targets[0]) == "__all__"
    assert "never" in (importlib.import_module(f"{NAME}.{wing}").__doc__ or "")
    assert face_of(wing) == sorted(face_of(wing))
    assert {f"{wing}.{room}" for room in face_of(wing)} <= set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_says_in_one_line_what_it_is(module: str) -> None:
    docstring = importlib.import_module(f"{NAME}.{module}").__doc__
    assert docstring and "\n" not in docstring and docstring.endswith(".")


def test_no_module_is_named_like_a_public_function() -> None:
    """A function exported lazily and a module of one name would shadow each other."""
    functions = {
        node.name
        for module in MODULES
        if not module.startswith("commands.") and module != "autoload"
        for node in ast.parse(source_of(module)).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    }
    rooms = {module.rpartition(".")[2] for module in MODULES} | set(WINGS)
    assert not rooms & (functions | set(mergekit_metagpt.__all__))


def test_exports_are_those_that_the_page_documents() -> None:
    page = (DOCS / "python.md").read_text(encoding="utf-8")
    documented = re.findall(r"^## `(\w+)", page, re.M)
    assert sorted(documented) == mergekit_metagpt.__all__
    for name in documented:
        exported = getattr(mergekit_metagpt, name)
        assert exported.__name__ == name
        assert inspect.getdoc(exported)
        assert name in dir(mergekit_metagpt)
    with pytest.raises(AttributeError, match="no_such_name"):
        mergekit_metagpt.no_such_name  # noqa: B018


def test_what_type_checkers_see_is_what_is_loaded() -> None:
    for node in ast.walk(ast.parse(source_of("__init__"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(NAME):
            for alias in node.names:
                exported = getattr(mergekit_metagpt, alias.name)
                assert exported.__module__ == node.module


def imported_at_top(source: str) -> Iterator[str]:
    for node in ast.parse(source).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("module", ["__init__", "autoload"])
def test_what_every_import_of_torch_loads_is_light(module: str) -> None:
    allowed = {"__future__", "importlib", "os", "typing"}
    assert set(imported_at_top(source_of(module))) <= allowed


MAKERS = {"arange", "empty", "full", "ones", "tensor", "triu_indices", "zeros"}


@pytest.mark.parametrize("module", MODULES)
def test_tensors_are_made_on_a_named_device(module: str) -> None:
    """mergekit's threads run under `with torch.device(...)`; we measure on the CPU."""
    if module.startswith("commands."):
        return  # the demo trains on one thread of its own
    for node in ast.walk(ast.parse(source_of(module))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            maker = ast.unparse(node.func)
            if maker.removeprefix("torch.") in MAKERS and maker.startswith("torch."):
                named = [keyword.arg for keyword in node.keywords]
                assert "device" in named, ast.unparse(node)


@pytest.mark.parametrize("file", sorted(Path(__file__).parent.glob("test_*.py")))
def test_no_test_file_imports_from_another(file: Path) -> None:
    pattern = re.compile(r"^(from|import) tests\.test_", re.M)
    assert not pattern.search(file.read_text())
