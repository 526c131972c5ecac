"""`milan linear-probe` and every other evaluation: a command for each declared protocol."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

from milan.evaluation.protocols import Protocol
from stages.options import settings_command

_SHARED = {
    "Encoder": ("checkpoint", "like", "model", "teacher", "pretrained", "teacher_norm"),
    "Data": ("data", "split", "val_data", "val_split", "data_root", "crop_share", "limit"),
    "Machine": ("batch_size", "num_workers", "device"),
}


def _panels(settings: type) -> dict[str, tuple[str, ...]]:
    """All fields that can be flags, by panel of the help; dictionaries cannot."""
    hints, shared = (
        typing.get_type_hints(settings),
        {n for names in _SHARED.values() for n in names},
    )
    own = (f.name for f in dataclasses.fields(settings) if f.name not in shared)
    flags = tuple(name for name in own if typing.get_origin(hints[name]) is not dict)
    return {**_SHARED, "Evaluation": flags}


def evaluation_command(protocol: Protocol) -> Callable[..., None]:
    """The command that runs `protocol`, writes its metrics file and prints the metrics."""

    @settings_command(protocol.settings, _panels(protocol.settings), protocol.name)
    def evaluate(*, flags: dict[str, Any], params: str | None, sets: list[str] | None) -> None:
        from milan.core.atomic import ensure_writable, write_json
        from milan.core.config_resolver import resolve
        from milan.errors import ConfigError
        from stages import console

        config = resolve(
            protocol.settings, section=protocol.name, params=params, sets=sets, flags=flags
        )
        config.check()
        path = protocol.metrics_path(config)
        if config.out:
            try:
                ensure_writable(path.parent)
            except OSError as error:
                raise ConfigError(f"{path} cannot be written: {error.strerror}") from None
        frozen = None
        if config.checkpoint == "teacher":
            from pipeline.teachers.frozen import frozen_teacher

            frozen = frozen_teacher(config)
        with console.ConsoleProgress() as progress:
            metrics = protocol.load()(config, frozen=frozen, progress=progress)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, metrics)
        rows = [
            (key.replace("_", " "), "-" if value is None else value)
            for key, value in metrics.items()
        ]
        console.table(protocol.title, ("what", ""), [*rows, ("metrics", path)])

    evaluate.__doc__ = protocol.help
    return evaluate
