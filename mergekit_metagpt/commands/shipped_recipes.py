"""Lists the recipes that ship with the package, and finds one by its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Recipe:
    """A merge YAML with a comment that explains it.

    Attributes:
        name: its path under `recipes/`, without `.yml`.
        summary: the first line of its comment.
        text: the whole file.
    """

    name: str
    summary: str
    text: str


def recipes() -> list[Recipe]:
    """Return all recipes, sorted by name."""
    folder = _folder()
    found = []
    for file in folder.rglob("*.yml"):
        text = file.read_text(encoding="utf-8")
        name = file.relative_to(folder).with_suffix("").as_posix()
        summary = text.partition("\n")[0].lstrip("# ")
        found.append(Recipe(name, summary, text))
    if not found:
        raise FileNotFoundError(f"{folder} holds no recipes. Install the package anew")
    return sorted(found, key=lambda recipe: recipe.name)


def _folder() -> Path:
    """The folder of the recipes: in an installed package, or beside a checkout's."""
    shipped = _PACKAGE / "recipes"
    return shipped if shipped.is_dir() else _PACKAGE.parent / "recipes"


def find(name: str) -> Recipe:
    """Find a recipe by its name, or by a last part or text that only its name has."""
    shelf = {recipe.name: recipe for recipe in recipes()}
    wanted = name.removesuffix(".yml").removeprefix("recipes/")
    if wanted in shelf:
        return shelf[wanted]
    ending = [full for full in shelf if full.rpartition("/")[2] == wanted]
    holding = [full for full in shelf if wanted and wanted in full]
    named = ending or holding
    if len(named) == 1:
        return shelf[named[0]]
    if named:
        raise ValueError(f"{name} is {' or '.join(named)}. Write it in full")
    raise ValueError(
        f"there is no recipe {name}; `mergekit-metagpt recipes` lists them all"
    )
