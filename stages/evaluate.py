"""`milan linear-probe` and every other evaluation: a command for each declared protocol."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from milan.core.signals import REQUEUE
from milan.evaluation.config import EvaluationConfig, SupervisedConfig
from milan.evaluation.protocols import Protocol
from stages.options import settings_command

_SHARED = {
    "Encoder": ("checkpoint", "baseline", "like", "model", "teacher", "pretrained", "teacher_norm"),
    "Data": (
        "data",
        "annotations",
        "split",
        "val_data",
        "val_annotations",
        "val_split",
        "student_data",
        "val_student_data",
        "data_root",
        "crop_share",
        "limit",
    ),
    "Training images": (
        "fraction",
        "shots",
        "draws",
        "first_draw",
        "train_list",
        "save_lists",
    ),
    "Machine": ("features", "batch_size", "num_workers", "device", "devices", "memory"),
}


def _panels(settings: type) -> dict[str, tuple[str, ...]]:
    """All fields that can be flags, by panel of the help; dictionaries cannot."""
    hints, shared = (
        typing.get_type_hints(settings),
        {n for names in _SHARED.values() for n in names},
    )
    own = (f.name for f in dataclasses.fields(settings) if f.name not in shared)
    flags = tuple(name for name in own if typing.get_origin(hints[name]) is not dict)
    there = {panel: tuple(n for n in names if n in hints) for panel, names in _SHARED.items()}
    return {**there, "Evaluation": flags}


def evaluation_command(protocol: Protocol) -> Callable[..., None]:
    """The command that runs `protocol`, which writes its metrics file, and prints the metrics."""

    @settings_command(protocol.settings, _panels(protocol.settings), protocol.name)
    def evaluate(*, flags: dict[str, Any], params: str | None, sets: list[str] | None) -> None:
        from milan.core.atomic import ensure_writable
        from milan.core.config_resolver import resolve
        from milan.errors import ConfigError
        from milan.evaluation.evaluate import evaluate as run
        from stages import console

        config = resolve(
            protocol.settings, section=protocol.name, params=params, sets=sets, flags=flags
        )
        configs = config.each()
        for path in map(protocol.metrics_path, configs):
            try:
                if config.out or path.parent.is_dir():  # a run that is none gets no folder
                    ensure_writable(path.parent)
            except OSError as error:
                raise ConfigError(
                    f"{path} cannot be written: {error.strerror}",
                    expected="a place for the metrics",
                    fix="--out FILE.json elsewhere",
                ) from None
        kept = _kept(protocol.settings, protocol.metrics_path(configs[0]))
        load: dict[str, Any] = {}
        if any(one.checkpoint == "teacher" for one in configs):
            from pipeline.teachers.dense import dense_teacher
            from pipeline.teachers.frozen import frozen_teacher

            frozen = issubclass(protocol.settings, EvaluationConfig)
            load["load_teacher"] = frozen_teacher if frozen else dense_teacher
        try:
            with console.ConsoleProgress() as progress:
                metrics = run(protocol, config, progress=progress, write=True, **load)
        except KeyboardInterrupt:  # the second: the first one ends an evaluation
            raise KeyboardInterrupt(kept) from None
        if "stopped_by" in metrics:
            console.err.print(f"milan: stopped by {metrics['stopped_by']}; {kept}", markup=False)
            raise typer.Exit(REQUEUE)
        if not metrics:
            return  # another process says it
        if len(configs) > 1:
            console.table(protocol.title, *_of_several(metrics, protocol))
            return
        path = protocol.metrics_path(configs[0])
        console.table(protocol.title, *_of_one(metrics, path))
        for name, headings, rows in _parts(metrics, protocol):
            console.table(name, headings, rows)

    evaluate.__doc__ = protocol.help
    return evaluate


def _kept(settings: type, path: Path) -> str:
    """What stays of a protocol that was stopped."""
    if issubclass(settings, EvaluationConfig):
        return "features that were computed stay; the same line goes on"
    if issubclass(settings, SupervisedConfig):
        return f"checkpoints in {path.with_suffix('')} stay; the same line goes on"
    return "nothing was written; the same line starts again"


Shown = tuple[tuple[str, ...], list[tuple[Any, ...]]]
"""(headings, rows)"""


def _of_one(metrics: dict[str, Any], path: Path) -> Shown:
    """Figures with their intervals, and those of the baseline beside them."""
    from milan.evaluation.table import rows_of

    shown = [
        key
        for key, value in metrics.items()
        if not key.endswith("_interval") and not isinstance(value, dict | list)
    ]
    named = {metrics.get("checkpoint", ""): metrics}
    columns = rows_of(named)[::-1]
    rows = [(key.replace("_", " "), *(_cell(c, key) for c in columns)) for key in shown]
    blank = ("",) * (len(columns) - 1)
    return ("what", "", *blank), [*rows, ("metrics", path, *blank)]


def _of_several(metrics: dict[str, dict[str, Any]], protocol: Protocol) -> Shown:
    """A row a checkpoint, and for each baseline once."""
    from milan.evaluation.table import rows_of

    rows = rows_of(metrics)
    shown = [(column.key, column.heading) for column in protocol.columns]
    robust = {"corrupted_top1": "corrupted %", "corrupted_share": "of clean %"}
    shown += [(key, heading) for key, heading in robust.items() if key in rows[-1]]
    cells = [(row["checkpoint"], *(_cell(row, key) for key, _ in shown)) for row in rows]
    return ("checkpoint", *(heading for _, heading in shown)), cells


def _parts(
    metrics: dict[str, Any], protocol: Protocol
) -> Iterator[tuple[str, tuple[str, ...], list[tuple[Any, ...]]]]:
    """Further tables, each with its title: every draw, every corruption."""
    if draws := metrics.get("draws"):
        of = "draw" if "draw" in draws[0] else "train_list"
        columns = [column for column in protocol.columns if column.key in draws[0]]
        headings = ("draw", *(column.heading for column in columns))
        yield "Draws", headings, [(d[of], *(_cell(d, c.key) for c in columns)) for d in draws]
    if corruptions := metrics.get("corruptions"):
        rows = [(name, *values) for name, values in corruptions.items()]
        yield "Top-1 % by severity of corruption", ("corruption", *"12345"), rows


def _cell(metrics: dict[str, Any], key: str) -> Any:
    """A figure, with its interval if it has one."""
    if metrics.get(key) is None:
        return "-"
    interval = metrics.get(f"{key}_interval")
    return f"{metrics[key]} ({interval[0]} to {interval[1]})" if interval else metrics[key]
