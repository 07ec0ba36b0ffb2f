"""Reads a merge YAML into mergekit's configuration and its slices."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before our own modules: importing it makes our hook import them, and it would find
# them half imported if one of them were the first to import mergekit's methods.
import mergekit.merge_methods  # noqa: F401
import yaml
from pydantic import ValidationError

from mergekit_metagpt.checkpoints.nearby import missing, nearest
from mergekit_metagpt.merge_config import yaml_errors

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration

Settings = Mapping[str, Any]
_EXPECTED = "expected a merge YAML"
# Keys of a merge YAML whose values name a model or a tokenizer.
_MODEL_KEYS = ("model", "base_model", "path", "source", "tokenizer_source")


@dataclass(frozen=True)
class Inputs:
    """The models of one slice, or of a module without slices, merged with each other.

    Attributes:
        place: their place in the configuration, for messages.
        base: theta_0, or None.
        models: all models, including the base if it is listed.
        settings: parameters of each model, from highest to lowest precedence.
        shared: parameters of all models, likewise.
        slice_number: number of the slice in the module, from 0.
        moves_layers: whether a layer of an input gets another index in the output.
        module: name of the module, or empty if the configuration has no modules.
        ranges: layers of each model, as first and one past the last; None if all
            layers are merged.
    """

    place: str
    base: ModelReference | None
    models: tuple[ModelReference, ...]
    settings: tuple[tuple[Settings, ...], ...]
    shared: tuple[Settings, ...]
    slice_number: int
    moves_layers: bool
    module: str = ""
    ranges: tuple[tuple[int, int], ...] | None = None


def text_of(file: Path) -> str:
    """Read the file of a merge YAML.

    Raises an OSError if there is no such file, or it cannot be read; a ValueError if it
    is not text.
    """
    require_file(file, "a merge YAML")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text in UTF-8; {_EXPECTED}") from error
    if file.name == "config.json":
        raise ValueError(f"{file} is the configuration of a model; {_EXPECTED}")
    if file.name == "metagpt.json":
        meant = file.with_name("mergekit_config.yml")
        raise ValueError(
            f"{file} is the report of a merge; {_EXPECTED}, such as {meant}"
        )
    return text


def require_file(file: Path, expected: str) -> None:
    """Refuse a path that is no file, and say what was probably meant.

    Args:
        file: as its user wrote it.
        expected: what should be there.

    Raises:
        OSError: there is no such file, or it is a folder.
    """
    if file.is_dir():
        inside = file / "mergekit_config.yml"
        hint = f". Did you mean {inside}?" if inside.exists() else ""
        raise IsADirectoryError(f"{file} is a folder; expected {expected}{hint}")
    if not file.exists():
        raise FileNotFoundError(missing(file, expected))


def require_folder(folder: Path, expected: str) -> None:
    """Refuse a path that is no folder, as `require_file`."""
    if not folder.exists():
        raise FileNotFoundError(missing(folder, expected, folders=True))
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; expected {expected}")


def read_file(file: Path) -> tuple[str, MergeConfiguration]:
    """Read the file of a merge YAML: its text, and mergekit's configuration.

    Raises an OSError if there is no such file, or it cannot be read; a ValueError as
    `read`, with the name of the file, or if a model's path seems to be relative to
    another folder than the current one.
    """
    text = text_of(file)
    try:
        config = read(text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    _require_here(config, file)
    return text, config


def _require_here(config: MergeConfiguration, file: Path) -> None:
    """Refuse local models that do not exist, if the YAML is in another folder."""
    home = Path(os.path.normpath(file.absolute().parent))
    merged = (home / "metagpt.json").exists()
    if home == Path.cwd() and not merged:
        return
    for model in models(config):
        for part in (model.model, model.lora):
            if part is None or Path(part.path).exists():
                continue
            there = (home / part.path).exists()
            misspelt = not there and nearest(Path(part.path), folders=True)
            if there or (part.path.startswith(".") and not misspelt):
                way = f"run this in {home}" if there else "run this where they start"
                if merged:
                    way = f"{home}/metagpt.json has the earlier measurements; {way}"
                raise ValueError(
                    f"{file}: {part.path} does not exist. Relative paths are taken "
                    f"from the current folder, {Path.cwd()}, and the YAML lies in "
                    f"{home}: {way}, or write absolute paths"
                )


def read(text: str) -> MergeConfiguration:
    """Parse a merge YAML; paths of local models get a leading `./`.

    Otherwise mergekit's model card would ask the hub for every path with exactly one
    slash, and an offline merge of `out/base` would fail at its very end.

    Args:
        text: the YAML.

    Returns:
        mergekit's configuration.

    Raises:
        ValueError: the text is not a YAML mapping, or mergekit refuses it.
    """
    from mergekit.config import MergeConfiguration

    try:
        data = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        if "expected a single document" in str(error):
            raise ValueError(
                "holds several YAML documents; expected one merge. Merge them one by "
                "one, or with mergekit-multi"
            ) from error
        raise ValueError(yaml_errors.unreadable(error, text)) from error
    if not isinstance(data, dict):
        holds = "is empty" if data is None else f"holds {type(data).__name__}"
        raise ValueError(
            f"{holds}; expected a mapping with merge_method, base_model and models"
        )
    try:
        # mergekit itself ignores keys that it does not know.
        config = MergeConfiguration.model_validate(_local(data), extra="forbid")
    except ValidationError as error:
        raise ValueError(yaml_errors.in_words(error)) from error
    except (ValueError, RuntimeError) as error:
        said = yaml_errors.one_line(error)
        if said.startswith("Exactly one of"):
            said = "expected one of `models:`, `slices:` and `modules:`, not empty"
        raise ValueError(f"no merge configuration: {said}") from error
    for key in ("dtype", "out_dtype"):
        if name := getattr(config, key):
            setattr(config, key, name.removeprefix("torch."))
    return config


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> Any:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(
                    f"{name} is given twice in one place (line {lines[name]}, and "
                    f"again line {line})"
                )
            lines[name] = line
        return super().construct_mapping(node, deep)


def _local(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _local(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_local(item, key) for item in value]
    if key in ("source", "tokenizer_source") and value in ("base", "union"):
        return value
    if isinstance(value, str) and key in _MODEL_KEYS:
        return as_local(value)
    return value


def as_local(model: str) -> str:
    """Spell a model as `read` does: local folders with a leading `./`."""
    return "+".join(map(_marked, model.split("+")))


def _marked(path: str) -> str:
    if not path or path.startswith(("/", ".", "~")) or not Path(path).exists():
        return path
    return f"./{path}"


def values_of(setting: Any) -> Iterator[Any]:
    """Yield all single values of a setting, which may have filters or gradients."""
    if isinstance(setting, list):
        for item in setting:
            yield from values_of(item)
    elif hasattr(setting, "value"):
        yield from values_of(setting.value)
    else:
        yield setting


def filters_of(setting: Any) -> Iterator[str]:
    """Yield the filters of a setting, but those that fit every name."""
    for entry in setting if isinstance(setting, list) else [setting]:
        if (part := getattr(entry, "filter", None)) not in (None, "*"):
            yield part


def slices_of(config: MergeConfiguration) -> Iterator[Inputs]:
    """Yield the models of each slice, and of each module without slices."""
    modules = config.modules or {"": config}
    for module_name, module in modules.items():
        within = f"modules.{module_name}." if module_name else ""
        shared = [module.parameters] if module_name else []
        shared.append(config.parameters)
        if module.models:
            yield Inputs(
                place=f"{within}models",
                base=config.base_model,
                models=tuple(entry.model for entry in module.models),
                settings=tuple(
                    _given(entry.parameters, *shared) for entry in module.models
                ),
                shared=_given(*shared),
                slice_number=0,
                moves_layers=False,
                module=module_name,
            )
        first_layer = 0
        for number, entry in enumerate(module.slices or ()):
            if not entry.sources:
                raise ValueError(f"{within}slices[{number}] has no sources")
            ranges = [source.layer_range for source in entry.sources]
            yield Inputs(
                place=f"{within}slices[{number}]",
                base=entry.base_model or config.base_model,
                models=tuple(source.model for source in entry.sources),
                settings=tuple(
                    _given(source.parameters, entry.parameters, *shared)
                    for source in entry.sources
                ),
                shared=_given(entry.parameters, *shared),
                slice_number=number,
                moves_layers=any(start != first_layer for start, _ in ranges),
                module=module_name,
                ranges=tuple(ranges),
            )
            first_layer += ranges[0][1] - ranges[0][0]


def entries_of(data: Mapping[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """Yield the models of a YAML, given as plain data, in the order of `slices_of`."""
    for module in (data.get("modules") or {"": data}).values():
        if module.get("models"):
            yield module["models"]
        for entry in module.get("slices") or ():
            yield entry["sources"]


def models(config: MergeConfiguration) -> list[ModelReference]:
    """Return every base and model of a configuration once, in order."""
    named = {
        model: None
        for part in slices_of(config)
        for model in (part.base, *part.models)
        if model is not None
    }
    return list(named)


def _given(*settings: Settings | None) -> tuple[Settings, ...]:
    return tuple(level for level in settings if level)
