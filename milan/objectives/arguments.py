"""Settings that an objective has of its own: `--set objective.KEY=VALUE`."""

from __future__ import annotations

from collections.abc import Mapping

from milan.config import PretrainConfig
from milan.errors import ConfigError, nearest


def check_arguments(
    config: PretrainConfig,
    *,
    numbers: Mapping[str, float],
    words: Mapping[str, tuple[str, ...]],
) -> None:
    """Raises ConfigError for an argument that is not there or out of its range.

    `numbers` have a least value each, `words` are one of some.
    """
    known = (*numbers, *words)
    for name, value in config.objective_args.items():
        if name not in known:
            raise ConfigError(
                f"unknown argument objective.{name}",
                expected="one of " + ", ".join(known),
                fix=nearest(name, known),
            )
        if name in words and value not in words[name]:
            raise ConfigError(f"objective.{name} {value}", expected=" or ".join(words[name]))
        if name in numbers and not (
            type(value) in (int, float) and numbers[name] <= value < float("inf")
        ):
            raise ConfigError(f"objective.{name} {value}", expected=f"at least {numbers[name]:g}")
