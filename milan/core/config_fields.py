"""Fields of a command's settings that say their own range, and whether they make a run another."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

from milan.core.paths import check_unicode
from milan.errors import ConfigError, nearest

_LIMITS = {
    "least": "at least", "above": "a number greater than", "most": "at most", "below": "less than"
}  # fmt: skip
AUTO = "auto"
"""The word for None where a setting depends on the teacher, the machine or other settings."""
_SEEDS = (-(2**63), 2**63 - 1)  # what torch, numpy and JSON all take; a larger one would be cut


def setting(
    default: Any,
    *,
    identity: bool = True,
    choices: tuple[str, ...] = (),
    unit: str = "",
    auto: bool = False,
    several: bool = False,
    **limits: float,
) -> Any:
    """A field of a settings dataclass.

    `choices` are the words it may be; numbers lie in [least, most], or beyond `above` and `below`
    (the four `limits`), and count `unit`. `identity=False`: a run may be resumed with another
    value, for it changes no step. None passes every check, where the default is None; with `auto`
    people write it as that word. `several`: text that may be several names with commas between; a
    flag that is repeated and a list in a file mean the same.
    """
    if unknown := limits.keys() - _LIMITS.keys():
        raise TypeError(f"limits {sorted(unknown)}")
    metadata = {"identity": identity, "choices": choices, "unit": unit, "auto": auto, **limits}
    return dataclasses.field(default=default, metadata=metadata | {"several": several})


def names_in(text: str) -> list[str]:
    """The names in the text of a setting that takes several. A path with commas is one name.

    Raises ConfigError for an empty one.
    """
    if os.path.exists(text):
        return [text]
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(
            f"an empty name in {text!r}",
            expected="names with a comma between",
            fix=",".join(filter(None, names)) or "a name, or without this setting",
        )
    return names


def is_auto(field: dataclasses.Field, value: Any) -> bool:
    """Whether `value` is the word for the default of a field that takes it."""
    return bool(field.metadata.get("auto")) and value == AUTO


def seed_setting() -> Any:
    """The field of a seed: a whole number of 64 bits with its sign."""
    return setting(0, unit="number", least=_SEEDS[0], most=_SEEDS[1])


def check_seed(seed: int) -> None:
    """Raises ConfigError for a seed that is no field of a dataclass and is out of range."""
    if not _SEEDS[0] <= seed <= _SEEDS[1]:
        least, most = _SEEDS
        raise ConfigError(
            f"seed {seed}", expected=f"at least {least}, at most {most}", fix="--seed 0"
        )


def check_fields(config: Any) -> None:
    """Raises ConfigError for the first field that is out of its range."""
    for field in dataclasses.fields(config):
        value, rule = getattr(config, field.name), field.metadata
        if isinstance(value, str):
            check_unicode(value, field.name)
        if not rule or (value is None and field.default is None):
            continue
        if rule["choices"]:
            check_choice(field.name, value, rule["choices"])
        expected = _range(rule)
        if expected and not _inside(value, rule):
            raise ConfigError(f"{field.name} {value}", expected=expected, fix=as_given(field))


def as_given(field: dataclasses.Field) -> str:
    """A setting with a value that it surely takes, its default, as people type it."""
    flag, default = f"--{field.name.replace('_', '-')}", field.default
    if field.default_factory is not dataclasses.MISSING:
        return f"--set {field.name.removesuffix('_args')}.KEY=VALUE"
    if default is None or default is dataclasses.MISSING:
        return f"{flag} {AUTO}" if field.metadata.get("auto") else f"without {flag}"
    if isinstance(default, bool):  # a switch takes no value
        return f"--set {field.name}={as_typed(default)}"
    return f"{flag} {as_typed(default)}"


def as_typed(value: Any) -> str:
    """A value as people type it after `--set key=` and in a parameter file.

    3 * 1.2 / 32 is 0.1125, whatever float64 makes of it.
    """
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, tuple | list):
        return ",".join(map(as_typed, value))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {as_typed(part)}" for key, part in value.items()) + "}"
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ConfigError if `value` is none of `choices`."""
    if value not in choices:
        raise ConfigError(
            f"{name} {value!r}",
            expected="one of " + ", ".join(choices),
            fix=nearest(str(value), choices) or choices[0],
        )


def identity_names(kind: type) -> list[str]:
    """The fields that must stay as they are for a run to be resumed."""
    return [f.name for f in dataclasses.fields(kind) if f.metadata.get("identity", True)]


def _inside(value: Any, rule: Any) -> bool:
    if isinstance(value, tuple):
        return all(_inside(part, rule) for part in value)
    return (
        -math.inf < value < math.inf
        and ("least" not in rule or value >= rule["least"])
        and ("above" not in rule or value > rule["above"])
        and ("most" not in rule or value <= rule["most"])
        and ("below" not in rule or value < rule["below"])
    )


def _range(rule: Any) -> str:
    parts = (f"{word} {_text(rule[key])}" for key, word in _LIMITS.items() if key in rule)
    return ", ".join(parts)


def _text(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"
