"""The rooms of the package: what each imports, against docs/architecture.md."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

import mergekit_metagpt

PACKAGE = Path(mergekit_metagpt.__file__).parent
ARCHITECTURE = Path(__file__).parents[1] / "docs" / "architecture.md"
NAME = PACKAGE.name
MODULES = sorted(file.stem for file in PACKAGE.glob("*.py"))


@dataclass(frozen=True)
class Imports:
    """Modules of ours that one module imports, by their names without `.py`.

    Imports under `if TYPE_CHECKING:` do not count: they load nothing.
    """

    at_top: frozenset[str] = field(default_factory=frozenset)
    inside: frozenset[str] = field(default_factory=frozenset)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def import_statements(
    node: ast.AST, inside: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Yield each import that runs, and whether only when a function is called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        elif is_type_checking(child):
            continue
        else:
            function = isinstance(
                child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            )
            yield from import_statements(child, inside or function)


def imported(statement: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yield full names of modules; names from our package by where they live."""
    if isinstance(statement, ast.Import):
        yield from (alias.name for alias in statement.names)
        return
    module = statement.module or ""
    if statement.level:
        module = f"{NAME}.{module}".rstrip(".")
    if module != NAME:
        yield module
        return
    for alias in statement.names:
        if alias.name in MODULES:
            yield f"{NAME}.{alias.name}"
        elif alias.name in mergekit_metagpt.__all__:
            yield getattr(mergekit_metagpt, alias.name).__module__
        else:
            yield NAME


def imports_of(source: str) -> Imports:
    """What a module's source imports of our modules."""
    found: dict[bool, set[str]] = {False: set(), True: set()}
    for statement, inside in import_statements(ast.parse(source)):
        for name in imported(statement):
            package, _, module = name.partition(".")
            if package == NAME and module:
                found[inside].add(module)
    return Imports(frozenset(found[False]), frozenset(found[True] - found[False]))


def source_of(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text()


def rooms(page: str) -> dict[str, Imports]:
    """Read the table under the heading `## Rooms`: module, imports."""
    (section,) = re.findall(r"^## Rooms$(.*?)(?=^## |\Z)", page, re.M | re.S)
    found = {}
    for line in section.splitlines():
        if not line.startswith("| `"):
            continue
        module, purpose, at_top, inside = (
            cell.strip() for cell in line.strip("|").split("|")
        )
        name = module.strip("`").removesuffix(".py")
        assert name not in found, f"{name} is listed twice"
        assert purpose, f"{name} has no purpose"
        for cell in (at_top, inside):
            assert re.fullmatch(r"-|`\w+`(, `\w+`)*", cell), line
        found[name] = Imports(
            frozenset(re.findall(r"`(\w+)`", at_top)),
            frozenset(re.findall(r"`(\w+)`", inside)),
        )
    return found


def assert_one_way(table: dict[str, Imports]) -> None:
    """Check that no module can be reached from itself by imports at the top."""
    for module in table:
        reached: set[str] = set()
        waiting = set(table[module].at_top)
        while waiting:
            following = waiting.pop()
            reached.add(following)
            waiting |= table[following].at_top - reached
        assert module not in reached, f"{module} imports itself by way of others"


def test_reading_imports() -> None:
    source = f"""
import os, {NAME}.kernels
from {NAME} import names, scan
from .closed_form import coefficients
from . import tables as shown
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from {NAME} import demo
class Thing:
    from {NAME}.results import ScanResult
    def method(self):
        from {NAME} import recipe
        import {NAME}.names, {NAME}.cli
try:
    import {NAME}.files
except ImportError:
    pass
"""
    at_top = {"kernels", "names", "scanning", "closed_form", "tables", "results"}
    assert imports_of(source) == Imports(
        frozenset({*at_top, "files"}), frozenset({"recipe", "cli"})
    )


def test_reading_the_table() -> None:
    page = """
# Page
## Rooms
Words.
| module | what | at top | inside |
|---|---|---|---|
| `one.py` | first | `two`, `three` | - |
| `two.py` | second | - | `three` |
## Other
| `no.py` | x | - | - |
"""
    table = rooms(page)
    assert table == {
        "one": Imports(frozenset({"two", "three"})),
        "two": Imports(inside=frozenset({"three"})),
    }
    with pytest.raises(AssertionError, match="two"):
        rooms(page.replace("| `two`, `three`", "| two, three"))


def test_a_circle_is_noticed() -> None:
    circle = {"a": Imports(frozenset("b")), "b": Imports(frozenset("a"))}
    with pytest.raises(AssertionError, match="imports itself"):
        assert_one_way(circle)


def test_architecture_lists_every_module() -> None:
    assert sorted(rooms(ARCHITECTURE.read_text())) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_those_of_the_architecture(module: str) -> None:
    assert imports_of(source_of(module)) == rooms(ARCHITECTURE.read_text())[module]


def test_imports_go_one_way() -> None:
    assert_one_way({module: imports_of(source_of(module)) for module in MODULES})


@pytest.mark.parametrize("module", MODULES)
def test_docstring_is_one_line(module: str) -> None:
    docstring = ast.get_docstring(ast.parse(source_of(module)))
    assert docstring, f"{module} has no docstring"
    assert "\n" not in docstring
    assert docstring.endswith(".")


def public_functions(module: str) -> set[str]:
    """Functions to be called from elsewhere; commands of the command line are not."""
    return {
        node.name
        for node in ast.parse(source_of(module)).body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not node.name.startswith("_")
        and not any(".command" in ast.unparse(by) for by in node.decorator_list)
    }


# torch's entry point is `mergekit_metagpt.autoload:autoload`; it is no export.
@pytest.mark.parametrize("module", [m for m in MODULES if m != "autoload"])
def test_no_module_is_named_like_a_public_function(module: str) -> None:
    """A lazy export and a module of one name would shadow each other."""
    homes = [other for other in MODULES if module in public_functions(other)]
    assert not homes, f"{module} is also a function of {homes}"
    assert module not in mergekit_metagpt.__all__


def test_exports() -> None:
    """Each name of `__all__` is there, comes from one of our modules, and has a doc."""
    names = mergekit_metagpt.__all__
    assert names == sorted(names)
    assert len(set(names)) == len(names)
    for name in names:
        exported = getattr(mergekit_metagpt, name)
        assert exported.__name__ == name
        assert exported.__module__.startswith(f"{NAME}.")
        assert inspect.getdoc(exported)
        assert name in dir(mergekit_metagpt)
    with pytest.raises(AttributeError, match="no_such_name"):
        mergekit_metagpt.no_such_name  # noqa: B018


def test_nothing_else_is_exported() -> None:
    """Whatever is public in the package is a module of ours, or in `__all__`."""
    tree = ast.parse(source_of("__init__"))
    bound = {
        alias.asname or alias.name.partition(".")[0]
        for statement, _ in import_statements(tree)
        for alias in statement.names
    }
    public = {name for name in vars(mergekit_metagpt) if not name.startswith("_")}
    allowed = {*mergekit_metagpt.__all__, *MODULES, *bound}
    assert bound <= {"annotations", "importlib", "TYPE_CHECKING", "Any"}
    assert public <= allowed, f"{sorted(public - allowed)} is public"
    # What type checkers see is what is loaded at run time.
    for_checkers = {
        alias.name: statement.module
        for node in ast.walk(tree)
        if is_type_checking(node)
        for statement in ast.walk(node)
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    }
    assert for_checkers == {
        name: getattr(mergekit_metagpt, name).__module__
        for name in mergekit_metagpt.__all__
    }


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("autoload", {"__future__", "os", "typing"}),
        ("__init__", {"__future__", "importlib", "typing"}),
    ],
)
def test_what_every_import_of_torch_loads_is_light(
    module: str, allowed: set[str]
) -> None:
    at_top = {
        name
        for statement, inside in import_statements(ast.parse(source_of(module)))
        if not inside
        for name in imported(statement)
    }
    assert at_top <= allowed


@pytest.mark.parametrize("module", MODULES)
def test_module_can_be_imported(module: str) -> None:
    name = NAME if module == "__init__" else f"{NAME}.{module}"
    assert importlib.import_module(name).__doc__
