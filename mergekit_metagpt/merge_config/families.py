"""Who is merged with whom by which settings: from a YAML, or from a list of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from mergekit_metagpt.merge_config import checks, merge_yaml
from mergekit_metagpt.method.parameters import own_parameters

if TYPE_CHECKING:
    from mergekit.common import ModelReference
    from mergekit.config import MergeConfiguration


@dataclass(frozen=True)
class Choice:
    """Settings of the closed form that hold for a whole model.

    `varying` names those that the YAML sets by filters or gradients, tensor by tensor:
    they stand here with their defaults.
    """

    granularity: str = "model"
    power: float = 2.0
    exclude: tuple[str, ...] = ()
    scale: float = 1.0
    varying: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A base and the models that are merged with each other.

    Attributes:
        places: where the YAML names them; empty without one.
        base: theta_0.
        models: the K fine-tunes.
        choice: settings of the closed form.
        weights: importance of each model, 1 unless a metagpt YAML says otherwise.
        by_hand: the `weight` of each model as a YAML of another method has it.
    """

    places: tuple[str, ...]
    base: ModelReference
    models: tuple[ModelReference, ...]
    choice: Choice
    weights: tuple[float, ...]
    by_hand: tuple[str | None, ...]


def checked(name: str, value: Any) -> Any:
    """Return a parameter's value if it is legal.

    Args:
        name: of a parameter of `metagpt`.
        value: as given.

    Returns:
        the value in its type.

    Raises:
        ValueError: it is not legal.
    """
    (parameter,) = (p for p in own_parameters() if p.name == name)
    return parameter.validate(value)


def split_exclude(text: str) -> tuple[str, ...]:
    """Return the parts of names in a comma-separated `exclude`."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _constant(
    levels: Sequence[merge_yaml.Settings], name: str, default: Any
) -> tuple[Any, bool]:
    """The value of a parameter, and whether it is the same on every tensor."""
    for level in levels:
        if name in level:
            value = level[name]
            if isinstance(value, list) or hasattr(value, "value"):
                return default, False
            return checked(name, value), True
    return default, True


def _choice(part: merge_yaml.Inputs) -> Choice:
    defaults = Choice()
    found, varying = {}, []
    for name, attribute in (
        ("granularity", "granularity"),
        ("power", "power"),
        ("exclude", "exclude"),
        ("lambda", "scale"),
    ):
        value, constant = _constant(part.shared, name, getattr(defaults, attribute))
        if isinstance(value, str) and name == "exclude":
            value = split_exclude(value)
        found[attribute] = value
        if not constant:
            varying.append(name)
    return Choice(**found, varying=tuple(varying))


def _by_hand(levels: Sequence[merge_yaml.Settings]) -> str | None:
    for level in levels:
        if "weight" in level:
            return _shown(level["weight"])
    return None


def _shown(setting: Any) -> str:
    if hasattr(setting, "value"):
        setting = [setting]
    if isinstance(setting, list) and any(hasattr(item, "value") for item in setting):
        return "by filter"
    if isinstance(setting, list):
        return "-".join(f"{value:g}" for value in setting)
    return f"{setting:g}" if isinstance(setting, int | float) else str(setting)


def of_config(
    config: MergeConfiguration,
    *,
    granularity: str | None = None,
    power: float | None = None,
    exclude: str | None = None,
) -> list[Family]:
    """Return the families of a merge YAML of any method, each once.

    Args:
        config: mergekit's configuration.
        granularity: instead of the YAML's.
        power: instead of the YAML's.
        exclude: instead of the YAML's.

    Returns:
        the families, in the order of the YAML.

    Raises:
        ValueError: no base, nothing beside it, or an illegal parameter.
    """
    ours = config.merge_method in checks.METHODS
    if ours:
        checks.check_yaml(config)
    found: dict[Any, Family] = {}
    for part in merge_yaml.inputs(config):
        if part.base is None:
            raise ValueError(
                f"no base_model is given for {part.place}; task vectors need one. Add "
                "it, or name the models: inspect --base BASE MODEL..."
            )
        choice = _choice(part) if ours else Choice()
        models, weights, by_hand = [], [], []
        for model, levels in zip(part.models, part.settings, strict=True):
            if model == part.base or model in models:
                continue
            weight, constant = _constant(levels, "weight", 1.0) if ours else (1.0, True)
            if not constant and "weight" not in choice.varying:
                choice = replace(choice, varying=(*choice.varying, "weight"))
            models.append(model)
            weights.append(weight)
            by_hand.append(None if ours else _by_hand(levels))
        if not models:
            continue
        if granularity is not None:
            choice = replace(choice, granularity=checked("granularity", granularity))
        if power is not None:
            choice = replace(choice, power=checked("power", power))
        if exclude is not None:
            choice = replace(choice, exclude=split_exclude(exclude))
        family = Family(
            (), part.base, tuple(models), choice, tuple(weights), tuple(by_hand)
        )
        known = found.setdefault(family, family)
        found[family] = replace(known, places=(*known.places, part.place))
    if not found:
        raise ValueError(
            "no model beside the base is given: there is nothing to measure. Add the "
            "fine-tuned models"
        )
    return list(found.values())


def of_models(
    base: str,
    models: Sequence[str],
    *,
    granularity: str | None = None,
    power: float | None = None,
    exclude: str | None = None,
) -> list[Family]:
    """Return the family of a base and models that are named without a YAML.

    Args:
        base: theta_0: a folder or hub repository.
        models: the fine-tunes.
        granularity: `model` if None.
        power: 2 if None.
        exclude: nothing if None.

    Returns:
        one family.

    Raises:
        ValueError: a model is given twice or is the base, or an illegal parameter.
    """
    from mergekit.config import MergeConfiguration

    if twice := [model for model in models if models.count(model) > 1]:
        raise ValueError(f"{twice[0]} is given twice. Once is all")
    data = {
        "merge_method": "metagpt",
        "base_model": base,
        "models": [{"model": model} for model in models],
    }
    return of_config(
        MergeConfiguration.model_validate(data),
        granularity=granularity,
        power=power,
        exclude=exclude,
    )
