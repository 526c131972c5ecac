"""The log of a run: lines of JSON, a CSV of curves, pictures; and the trackers that follow it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from milan.core.atomic import is_open_file, write_text
from milan.reporting.run_files import CURVES, LOG, VALIDATION

COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "wait_share")
"""Of every line; what else a line has are validation metrics."""


class Tracker(Protocol):
    """A service or file format that shows a run to people: TensorBoard, wandb, MLflow."""

    last_step: int
    """The last step that it has already."""

    def add(self, line: dict[str, Any]) -> None:
        """Metrics of a step, by name."""

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        """A picture, uint8 [H, W, 3]."""

    def flush(self) -> None:
        """Make sure that everything so far is kept."""

    def close(self) -> None:
        """No more will come from this process."""


class RunLog:
    """log.jsonl, curves.csv, validation.csv and the trackers; a resumed run continues all of them.

    The others can be made anew from log.jsonl.
    """

    def __init__(self, run: Path, start: int, trackers: list[Tracker]) -> None:
        """Keep the lines up to step `start`, and send trackers those that they miss."""
        self.run, self.trackers = run, trackers
        self.lines = read_log(run, start)
        self._open()
        for line in self.lines:
            self._track(line)

    def _open(self) -> None:
        """Write the lines that are known, and open the file for those to come."""
        write_text(self.run / LOG, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.file = open(self.run / LOG, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def add(self, line: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        """A line of metrics, and pictures by name."""
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, pixels in pictures.items():
            write_picture(self.run / f"{name}.png", pixels)
        self._track(line)
        for tracker in self.trackers:
            for name, pixels in pictures.items():
                tracker.picture(name, line["step"], pixels)

    def _track(self, line: dict[str, Any]) -> None:
        """A resumed run repeats the steps after its checkpoint: trackers may have them already."""
        for tracker in self.trackers:
            if line["step"] > tracker.last_step:
                tracker.add(line)

    def flush(self) -> None:
        """Have everything on the disk: a checkpoint goes with it."""
        if not is_open_file(self.file.fileno(), self.run / LOG):  # somebody removed it
            self._open()
        os.fsync(self.file.fileno())
        write_curves(self.run, self.lines)
        for tracker in self.trackers:
            tracker.flush()

    def close(self) -> None:
        """Write the last curves and close the trackers."""
        write_curves(self.run, self.lines)
        self.file.close()
        for tracker in self.trackers:
            tracker.close()


def last_metrics(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The last loss and the last validation metrics; empty if there is no line."""
    last: dict[str, Any] = {}
    for line in lines:
        last |= {key: line[key] for key in line if key == "loss" or key not in COLUMNS}
    return last


def write_curves(run: Path, lines: list[dict[str, Any]]) -> None:
    """The log as CSV, which DVC plots: all of it, and what validation said."""
    metrics = dict.fromkeys(key for line in lines for key in line if key not in COLUMNS)
    validated = [line for line in lines if metrics.keys() & line.keys()]
    for name, columns, shown in (
        (CURVES, [*COLUMNS, *metrics], lines),
        (VALIDATION, ["step", "epoch", *metrics], validated),
    ):
        rows = [columns, *([str(line.get(key, "")) for key in columns] for line in shown)]
        write_text(run / name, "".join(",".join(row) + "\n" for row in rows))


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """A PNG of uint8 [H, W, 3], there whole or not at all."""
    from PIL import Image

    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(pixels).save(temporary, format="png")
    os.replace(temporary, path)


def read_log(run: Path, step: int) -> list[dict[str, Any]]:
    """The lines of the log up to `step`; a resumed run logs later ones anew.

    What is no line of a log is left out: the last one may be cut short by a kill.
    """
    try:
        texts = (run / LOG).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    lines = []
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if _is_line(line) and line["step"] <= step:
            lines.append(line)
    return lines


def _is_line(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("step"), int)
        and all(isinstance(figure, int | float) for figure in value.values())
    )


def last_step(run: Path) -> int:
    """The last step that the log of a run speaks of; 0 if there is none."""
    return max((line["step"] for line in read_log(run, sys.maxsize)), default=0)
