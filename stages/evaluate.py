"""`milan linear-probe` and every other evaluation: a command for each declared protocol."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from milan.evaluation.protocols import Protocol
from stages.options import plain_fields, settings_command


def evaluation_command(protocol: Protocol) -> Callable[..., None]:
    """The command that runs `protocol`, writes its metrics file and prints the metrics."""

    @settings_command(protocol.settings, plain_fields(protocol.settings))
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
        rows = [(key.replace("_", " "), value) for key, value in metrics.items()]
        console.table(protocol.title, ("what", ""), [*rows, ("metrics", path)])

    evaluate.__doc__ = protocol.help
    return evaluate
