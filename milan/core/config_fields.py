"""Fields of a command's settings that say their own range, and whether they make a run another."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from milan.errors import ConfigError, nearest


def setting(
    default: Any,
    *,
    identity: bool = True,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A field of a settings dataclass.

    `choices` are the words it may be; numbers lie in [least, most], or beyond `above` and `below`.
    `identity=False`: a run may be resumed with another value, for it changes no step. None passes
    every check, where the default is None.
    """
    metadata = {
        "identity": identity, "choices": choices,
        "least": least, "above": above, "most": most, "below": below,
    }  # fmt: skip
    return dataclasses.field(default=default, metadata=metadata)


def check_fields(config: Any) -> None:
    """Raises ConfigError for the first field that is out of its range."""
    for field in dataclasses.fields(config):
        value, rule = getattr(config, field.name), field.metadata
        if not rule or (value is None and field.default is None):
            continue
        if rule["choices"]:
            check_choice(field.name, value, rule["choices"])
        expected = _range(rule)
        if expected and not _inside(value, rule):
            raise ConfigError(f"{field.name} {value}", expected=expected)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ConfigError if `value` is none of `choices`."""
    if value not in choices:
        raise ConfigError(
            f"{name} {value!r}",
            expected="one of " + ", ".join(choices),
            fix=nearest(str(value), choices),
        )


def identity_names(kind: type) -> list[str]:
    """The fields that must stay as they are for a run to be resumed."""
    return [f.name for f in dataclasses.fields(kind) if f.metadata.get("identity", True)]


def _inside(value: Any, rule: Any) -> bool:
    return (
        -math.inf < value < math.inf
        and (rule["least"] is None or value >= rule["least"])
        and (rule["above"] is None or value > rule["above"])
        and (rule["most"] is None or value <= rule["most"])
        and (rule["below"] is None or value < rule["below"])
    )


def _range(rule: Any) -> str:
    words = (("least", "at least"), ("above", "a number greater than"),
             ("most", "at most"), ("below", "less than"))  # fmt: skip
    parts = (f"{word} {rule[key]:g}" for key, word in words if rule[key] is not None)
    return ", ".join(parts)
