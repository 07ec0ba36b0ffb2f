"""Explains in words what is wrong with a merge YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any

import yaml
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import ParameterScope
from pydantic import ValidationError

from mergekit_metagpt.method.parameters import own_parameters

# Keys that are meant by what people write in their place.
_MEANT = {
    "base": "base_model",
    "method": "merge_method",
    "name": "model",
    "path": "model",
}
# What PyYAML says of a line in the wrong column, or of a key without a colon.
_MISPLACED = (
    *("found '<block", "found '-'", "found '?'", "mapping values"),
    *("expected ':'", r"'\t'"),
)
_FILTERED = "a value, or a list of values with `filter:` and `value:`"
# What a value should have been, by the class of it or the type of pydantic's error.
_LEGAL = {
    "ModelReference": "a folder, or the name of a repository",
    "dict_type": "keys with values",
    "string_type": "text (a number needs quotes)",
    "tuple_type": "two numbers, such as [0, 16]",
    "too_long": "two numbers, such as [0, 16]",
}


def unreadable(error: Exception, text: str) -> str:
    """Explain what PyYAML cannot read; quote a line that is indented wrongly."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem:
        lacks_colon = error.problem.endswith("expected ':'")
        mark = error.context_mark if lacks_colon else error.problem_mark
        if mark and any(words in error.problem for words in _MISPLACED):
            line = text.splitlines()[mark.line].strip()
            return (
                f"line {mark.line + 1} does not fit the lines around it: `{line}`. "
                "Indent items and keys of one level alike, with spaces, not tabs, and "
                "write a colon and a space between key and value"
            )
    return f"not readable as YAML: {one_line(error)}"


def in_words(error: ValidationError) -> str:
    """Explain the first error in a configuration, and name its place."""
    from mergekit.config import (
        ConditionalParameter,
        InputSliceDefinition,
        MergeConfiguration,
        OutputSliceDefinition,
    )
    from mergekit.tokenizer.config import TokenizerConfig

    errors = error.errors()
    unknown = [each for each in errors if each["type"] == "extra_forbidden"]
    first = (unknown or errors)[0]
    *above, key = first["loc"]
    if "parameters" in above:  # whose values are of one of many types
        at = above.index("parameters") + 1
        above = above[: at + bool(unknown)]
        key = key if unknown else first["loc"][at]
    elif first.get("ctx", {}).get("class_name") == key:  # one of several for this value
        key = above.pop()
    where = _spot(above) or "the YAML"
    if not unknown:
        if {"models", "sources"} & {key, *above[-1:]}:  # a list, or an item of one
            given = first["input"]
            name = given if isinstance(given, str) else "FOLDER"
            name = re.sub("^model[ :]+", "", name)
            return (
                f"{_spot([*above, key])} is {given!r}; expected a line "
                f"`- model: {name}` for each model"
            )
        if first["input"] is None and "parameters" in above:
            return f"{key} in {where} is empty; give a value, or remove it"
        kind = first.get("ctx", {}).get("class_name", first["type"])
        legal = _FILTERED if "parameters" in above else _LEGAL.get(kind)
        if legal:
            return f"{key} in {where} is {first['input']!r}; expected {legal}"
        return f"no merge configuration: {key} in {where}: {first['msg']}"
    scopes = {
        parameter.name: parameter.scope
        for method in registry.registered_methods()
        for parameter in (*own_parameters(), *method.spec.parameters)
    }
    if key in scopes and "parameters" not in above:
        of_all = scopes[key] == ParameterScope.SHARED
        home = "at the end of the YAML" if of_all or not above else "there"
        return (
            f"{key} stands in {where}, where mergekit ignores it. Move it to "
            f"`parameters:` {home}"
        )
    inner = (OutputSliceDefinition, InputSliceDefinition, ConditionalParameter)
    schemas = inner if above else (MergeConfiguration,)
    if above[:1] == ["tokenizer"]:
        schemas = (TokenizerConfig,)
    names = {name for each in schemas for name in each.model_fields}
    other = _MEANT.get(str(key))
    meant = other if other in names else closest(str(key), names)
    hint = f"did you mean {meant}?" if meant else "mergekit would ignore it. Remove it"
    if not meant and above[-2:-1] == ["parameters"]:
        return (
            f"{key} is no key of {above[-1]} in {_spot(above[:-1])}; expected "
            f"{_FILTERED}"
        )
    if not meant and (meant := closest(str(key), scopes)):
        hint = f"did you mean {meant}, under `parameters:`?"
    return f"{key} is no key of a merge in {where}; {hint}"


def _spot(keys: Sequence[Any]) -> str:
    """Write keys and numbers of items as a path, such as `models[0].parameters`."""
    parts = (f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return "".join(parts).removeprefix(".")


def closest(name: str, names: Collection[str]) -> str | None:
    """Return the name that is most similar to a misspelt one, if any is."""
    swapped = [each for each in names if sorted(each) == sorted(name)]
    close = swapped or difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    return close[0] if close else None


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split())
