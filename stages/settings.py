"""`milan config`: every setting of a command, with its value, unit and source."""

from __future__ import annotations

import dataclasses
import typing
from typing import Annotated, Any

import typer

from milan.config import PretrainConfig
from milan.core.config_fields import AUTO, as_typed
from milan.errors import ConfigError, nearest
from milan.evaluation.protocols import PROTOCOLS, find_protocol
from milan.exchange.config import ExportConfig
from milan.inference.config import EmbedConfig, NeighboursConfig, PredictConfig
from pipeline.config import ExtractConfig
from stages.options import Params, Sets, field_docs

COMMANDS: dict[str, tuple[type, str]] = {
    "extract-targets": (ExtractConfig, "extract"),
    "pretrain": (PretrainConfig, "pretrain"),
    **{p.command: (p.settings, p.name) for p in PROTOCOLS.values()},
    "predict": (PredictConfig, "predict"),
    "embed": (EmbedConfig, "embed"),
    "neighbours": (NeighboursConfig, "neighbours"),
    "export": (ExportConfig, "export"),
}
"""command -> its settings, and their section of a parameter file."""


def config(
    command: Annotated[
        str | None, typer.Argument(help="A command, or its section; default: all commands.")
    ] = None,
    params: Params = None,
    sets: Sets = None,
) -> None:
    """List the settings of a command: value, unit, where the value is from, meaning.

    Each is a key of --set and of a parameter file; many are flags too. With --params and --set it
    shows what the command would get.
    """
    from milan.core.config_resolver import collect
    from stages import console

    for name in [_command_of(command)] if command else list(COMMANDS):
        kind, section = _settings_of(name)
        given = collect(kind, section=section, params=params, sets=sets)
        console.table(
            f"milan {name}: --set KEY=VALUE, or section {section} of a parameter file",
            ("key", "value", "unit", "from", "meaning"),
            _rows(kind, given.values, given.sources),
            text=True,
        )


def _command_of(word: str) -> str:
    """The command that `word` names: plan takes the settings of extract-targets."""
    word = word.replace("_", "-")
    return {"extract": "extract-targets", "plan": "extract-targets"}.get(word, word)


def _settings_of(command: str) -> tuple[type, str]:
    if command in COMMANDS:
        return COMMANDS[command]
    if protocol := find_protocol(command.replace("-", "_")):
        return protocol.settings, protocol.name
    raise ConfigError(
        f"no settings of a command {command!r}",
        expected="one of " + ", ".join(COMMANDS),
        fix=f"milan config {nearest(command, COMMANDS, count=1)}".strip(),
    )


def _rows(kind: type, values: dict[str, Any], sources: dict[str, str]) -> list[tuple[str, ...]]:
    docs, hints = field_docs(kind), typing.get_type_hints(kind)
    rows: list[tuple[str, ...]] = []
    for field in dataclasses.fields(kind):
        name, unit = field.name, field.metadata.get("unit", "")
        if typing.get_origin(hints[name]) is dict:
            name, unit = f"{name.removesuffix('_args')}.KEY", "by key"
        value = values.get(field.name, _default(field))
        source = sources.get(field.name, "default").partition(", section")[0]
        rows.append((name, _shown(field, value), unit, source, docs[field.name]))
    return rows


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "(required)" if field.default is dataclasses.MISSING else field.default


def _shown(field: dataclasses.Field, value: Any) -> str:
    """As one writes it after `--set key=`."""
    if value is None:
        return AUTO if field.metadata.get("auto") else ""
    if isinstance(value, dict):  # its row is of KEY
        return ", ".join(f"{key}={as_typed(part)}" for key, part in value.items())
    return as_typed(value)
