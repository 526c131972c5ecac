"""What a run leaves to read: lines of JSON, a CSV of curves, and those it reports to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from milan.core.atomic import write_text

LOG = "log.jsonl"
CURVES = "curves.csv"
SHEET = "sheet"
"""A picture's name: the newest is sheet.png in the run's folder."""
_COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "images_per_second", "wait_share")
_JUDGED = ("val_loss", "val_cosine", "knn_top1")


class Tracker(Protocol):
    """Someone who shows a run to people."""

    has: int
    """The last step that it knows already."""

    def add(self, line: dict[str, Any]) -> None:
        """Figures of a step, by name."""

    def picture(self, name: str, step: int, pixels: np.ndarray) -> None:
        """A picture, uint8 [H, W, 3]."""

    def flush(self) -> None:
        """What came so far is kept, whatever happens."""

    def close(self) -> None:
        """No more will come from this process."""


class RunLog:
    """The log, its curves and the reporters; a resumed run goes on in all of them.

    The log alone makes the others anew.
    """

    def __init__(self, run: Path, start: int, reporters: list[Tracker]) -> None:
        self.run, self.reporters = run, reporters
        self.lines = kept_lines(run, start)
        write_text(run / LOG, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.file = open(run / LOG, "a")  # noqa: SIM115 - closed by close()
        for line in self.lines:
            self._tell(line)

    def add(self, line: dict[str, Any], pictures: dict[str, np.ndarray]) -> None:
        """A line of figures, and pictures by name."""
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for name, pixels in pictures.items():
            write_picture(self.run / f"{name}.png", pixels)
        self._tell(line)
        for reporter in self.reporters:
            for name, pixels in pictures.items():
                reporter.picture(name, line["step"], pixels)

    def _tell(self, line: dict[str, Any]) -> None:
        """A resumed run says the same again of the steps after its checkpoint."""
        for reporter in self.reporters:
            if line["step"] > reporter.has:
                reporter.add(line)

    def keep(self) -> None:
        """Let all that was said be on the disk: what a checkpoint goes with."""
        os.fsync(self.file.fileno())
        write_curves(self.run, self.lines)
        for reporter in self.reporters:
            reporter.flush()

    def close(self) -> None:
        """The last curves, and good-bye."""
        write_curves(self.run, self.lines)
        self.file.close()
        for reporter in self.reporters:
            reporter.close()


def last_of(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the log says in the end of loss and judgement; empty if it never spoke."""
    found: dict[str, Any] = {}
    for line in lines:
        found |= {key: line[key] for key in ("loss", *_JUDGED) if key in line}
    return found


def write_curves(run: Path, lines: list[dict[str, Any]]) -> None:
    """The log as CSV, which is what DVC plots."""
    columns = [*_COLUMNS, *(c for c in _JUDGED if any(c in line for line in lines))]
    rows = [columns, *([str(line.get(key, "")) for key in columns] for line in lines)]
    write_text(run / CURVES, "".join(",".join(row) + "\n" for row in rows))


def write_picture(path: Path, pixels: np.ndarray) -> None:
    """A PNG of uint8 [H, W, 3], there whole or not at all."""
    from PIL import Image

    temporary = path.with_name(f".{path.name}.tmp")
    Image.fromarray(pixels).save(temporary, format="png")
    os.replace(temporary, path)


def kept_lines(run: Path, step: int) -> list[dict[str, Any]]:
    """The lines of the log up to `step`; what a killed run logged after it will be logged anew."""
    kept = []
    for text in (run / LOG).read_text().splitlines() if (run / LOG).exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short when the run was killed
        if line["step"] <= step:
            kept.append(line)
    return kept
