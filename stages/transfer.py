"""`milan linear-probe`: measure a student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from milan.config import ProbeConfig
from stages.options import settings_command

_Teacher = Annotated[
    str | None, typer.Option(help="With teacher: as in extract-targets.", show_default=False)
]


@settings_command(
    ProbeConfig,
    (
        "checkpoint", "data", "val_data", "data_root", "out", "like", "model", "crop_share",
        "batch_size", "num_workers", "limit", "device", "seed",
    ),
)  # fmt: skip
def linear_probe(
    *,
    flags: dict[str, Any],
    params: str | None,
    sets: list[str] | None,
    teacher: _Teacher = None,
    pretrained: _Teacher = None,
    teacher_norm: _Teacher = None,
) -> None:
    """Fit a linear classifier on frozen features: mean of patches, and a class token if any."""
    from milan.core.atomic import ensure_writable, write_json
    from milan.core.config_resolver import resolve
    from milan.errors import ConfigError
    from milan.evaluation.linear_probe import linear_probe as run
    from stages import console

    config = resolve(ProbeConfig, section="linear_probe", params=params, sets=sets, flags=flags)
    if config.out:
        try:
            ensure_writable(Path(config.out).parent)
        except OSError as error:
            raise ConfigError(f"{config.out} cannot be written: {error.strerror}") from None
    frozen = None
    if config.checkpoint == "teacher":
        from pipeline.teachers.frozen import frozen_teacher

        frozen = frozen_teacher(teacher, pretrained, teacher_norm, config.device)
    with console.ConsoleProgress() as progress:
        metrics = run(config, frozen=frozen, progress=progress)
    name, place = config.checkpoint, Path(config.checkpoint)
    if name in ("random", "teacher") or name.startswith("timm:"):  # no paths, whatever lies there
        place = Path("runs") / name.replace(":", "-")
    elif place.is_file():
        place = place.parent
    path = Path(config.out) if config.out else place / "linear_probe.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, metrics)
    rows = [(key.replace("_", " "), value) for key, value in metrics.items()]
    console.table("Linear probe", ("what", ""), [*rows, ("metrics", path)])
