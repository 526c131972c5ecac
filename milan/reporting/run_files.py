"""The files of a run's folder by name, and run.json, which says what the run is.

runs/pretrain/run.json       identity, settings, parts of the store, id: written once, and added
                             to when the run moves on or drops images
    checkpoints/             milan.training.checkpoint
    log.jsonl curves.csv validation.csv sheet.png tensorboard/    milan.reporting.log
    encoder.safetensors metrics.json                at the end of every call
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from milan.core.atomic import read_with_digest, write_with_digest
from milan.errors import TrainError

RUN = "run.json"
METRICS = "metrics.json"
LOG = "log.jsonl"
CURVES = "curves.csv"
VALIDATION = "validation.csv"
"""Of the lines of validation alone: a plot of curves.csv would have gaps."""
SHEET = "sheet"
"""A picture's name: the newest is sheet.png in the run's folder."""
TENSORBOARD = "tensorboard"
SUPERVISED = (
    "classifier.safetensors", "segmenter.safetensors", "detector.safetensors",
    "classes.csv", "confusion.csv", "predictions.png",
)  # fmt: skip
"""What milan.training.supervised_run leaves, as far as the protocol has it."""


_PARTS: dict[str, type | tuple[type, ...]] = {"id": str, "identity": dict, "config": dict}
_STORE_PARTS = {"targets": dict, "stretches": list}


def write_run(run: Path, content: dict[str, Any]) -> None:
    """Write run.json."""
    write_with_digest(run / RUN, content)


def read_run(run: Path) -> dict[str, Any]:
    """The content of run.json. Raises TrainError if it is damaged, OSError if it is gone."""
    try:
        content = read_with_digest(run / RUN, _PARTS)
        _check_parts(content)
        return content
    except ValueError as error:
        raise TrainError(
            f"{run / RUN} is damaged: {error}",
            expected="the JSON that the run was begun with",
            fix="a copy of it, or --overwrite (or --resume never) to start anew",
        ) from None


def _check_parts(content: dict[str, Any]) -> None:
    """Raises ValueError for what is not as a run writes it: one from before it had a digest."""
    if not isinstance(content.get("reported", {}), dict):
        raise ValueError("it has no usable 'reported'")
    if content["identity"].keys() & {"data", "cache"} == {"data"}:
        return  # a fine-tuning knows no store
    for name, kind in _STORE_PARTS.items():
        if not isinstance(content.get(name), kind):
            raise ValueError(f"it has no usable {name!r}")
    parts, dropped = content["stretches"], content.get("dropped", {})
    kinds = {"epoch": int, "generations": int, "cache": str}
    if not parts or not all(_has(part, kinds) and _layers_are_whole(part) for part in parts):
        raise ValueError("it has no usable 'stretches'")
    if "cache" not in content["identity"]:
        raise ValueError("it has no usable 'identity'")
    pairs = dropped.items() if isinstance(dropped, dict) else [("", dropped)]
    if not all(k.isdecimal() and isinstance(v, list) and len(v) == 2 for k, v in pairs):
        raise ValueError("it has no usable 'dropped'")


def _has(value: Any, kinds: dict[str, type]) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(name), kind) for name, kind in kinds.items()
    )


def _layers_are_whole(part: dict[str, Any]) -> bool:
    layers = part.get("layers", [])
    kinds = {"generations": int, "cache": str}
    return isinstance(layers, list) and all(_has(layer, kinds) for layer in layers)


def layers_of_part(part: dict[str, Any]) -> list[dict[str, Any]]:
    """`generations` and `cache` of each layer that a part of a run reads."""
    return part.get("layers") or [part]


def update_run(run: Path, **fields: Any) -> None:
    """Set fields of run.json."""
    write_run(run, read_run(run) | fields)


def read_metrics(run: Path) -> dict[str, Any]:
    """The figures of metrics.json; empty if it is gone or damaged: it is written again."""
    try:
        return read_with_digest(run / METRICS, {"step": int, "steps": int})
    except (ValueError, OSError):
        return {}
