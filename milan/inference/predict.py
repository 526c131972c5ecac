"""`milan predict`: what a trained network says of the images of a folder: table, sheet, metrics.

A training leaves one file that says what it is for. PREDICTORS names, for each kind of file, the
function that predicts with it. To add one: a function as `Predictor` describes it, and a line here.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from milan.core.atomic import write_json
from milan.core.config_resolver import from_call
from milan.core.device import pick_device
from milan.core.progress import NoProgress, Progress
from milan.errors import CacheError
from milan.inference.config import PredictConfig
from milan.inference.pictures import Pictures
from milan.inference.tables import check_ending, replaced
from milan.models.export import ENCODER
from milan.reporting.panels import Tile, check_apart, draw_tiles, save_picture

PREDICTORS = {
    "classifier.safetensors": "milan.inference.classify:predict_classes",
    "segmenter.safetensors": "milan.inference.masks:predict_masks",
    "detector.safetensors": "milan.inference.boxes:predict_boxes",
}
"""What a training leaves -> module:function, a Predictor. Imported when it is used."""

_BESIDE = _SHEET, _METRICS, _REJECTED = ".png", ".json", ".bad-images.csv"


@dataclass
class Job:
    """What a predictor is given: its file, the images, the device; and where its answers go."""

    file: Path
    """The network's file, one of PREDICTORS."""
    config: PredictConfig
    pictures: Pictures
    device: torch.device
    progress: Progress
    tiles: dict[int, Tile] = field(default_factory=dict)
    """row -> picture on the contact sheet; to be filled for the rows of `shown`."""

    @property
    def table(self) -> Path:
        """Where the table goes (milan.inference.tables.written)."""
        return Path(self.config.out)

    @property
    def shown(self) -> frozenset[int]:
        """The rows on the contact sheet; of those that cannot be read there is no picture."""
        return self.pictures.sample(self.config.pictures)


Predictor = Callable[[Job], dict[str, Any]]
"""Reads all of job.pictures, writes job.table, fills job.tiles; returns its figures as JSON."""


def predict(
    checkpoint: str | PredictConfig = "runs/pretrain/finetune",
    *,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Predict for all images of a folder, by the network that a training for a task left.

    `checkpoint` and `settings` are the command's arguments (PredictConfig's fields). Writes a table
    with a row an image, and beside it a contact sheet, the metrics, and the images that could not
    be read, if any. Returns the metrics, with the paths of these files. Raises MilanError.
    """
    config = from_call(PredictConfig, "checkpoint", checkpoint, settings, "predict")
    config.check()
    check_ending(Path(config.out))
    progress, began = progress or NoProgress(), time.perf_counter()
    file = _file_of(config.checkpoint)
    device = pick_device(config.device)
    pictures = Pictures(config, progress)
    for ending in (Path(config.out).suffix, *_BESIDE):
        check_apart(config.beside(ending), [pictures.place])
    job = Job(file, config, pictures, device, progress)
    module, _, function = PREDICTORS[file.name].partition(":")
    progress.begin("predictions", len(pictures), "images")
    figures = getattr(import_module(module), function)(job)
    progress.end()
    metrics = {
        "checkpoint": str(file),
        "data": config.data,
        **figures,
        "images": len(pictures) - len(pictures.rejected),
        "rejected_images": len(pictures.rejected),
        "table": config.out,
        "sheet": _draw(job),
        "rejected": _write_rejected(job),
        "seconds": round(time.perf_counter() - began, 1),
    }
    write_json(config.beside(_METRICS), metrics)
    return metrics


def _file_of(checkpoint: str) -> Path:
    """The file in the folder of a training, or the file itself. Raises CacheError."""
    path = Path(checkpoint)
    names = list(PREDICTORS)
    if path.is_file() and path.name in names:
        return path
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if len(found) == 1:
            return found[0]
        if found:
            raise CacheError(
                f"{path} holds {' and '.join(file.name for file in found)}",
                expected="one of them",
                fix=f"milan predict {found[0]}",
            )
        below = [file.parent for name in names for file in sorted(path.glob(f"*/{name}"))]
        if below:
            raise CacheError(
                f"{path} itself holds none of {', '.join(names)}",
                expected="the folder of a training for a task",
                fix=" or ".join(f"milan predict {folder}" for folder in below[:3]),
            )
    encoder = path.name == ENCODER or (path / ENCODER).is_file()
    raise CacheError(
        f"{path} is an encoder, which names no classes"
        if encoder
        else f"no network that predicts at {path}",
        expected="the folder of a training for a task, with " + " or ".join(names),
        fix=f"milan finetune --checkpoint {path}" if encoder else "",
    )


def _draw(job: Job) -> str | None:
    """The contact sheet, if there is one."""
    tiles = [job.tiles[row] for row in sorted(job.tiles)]
    if not tiles:
        return None
    title = f"{len(tiles)} of {len(job.pictures):,} images of {job.config.data}, by {job.file}"
    return str(save_picture(draw_tiles(title, tiles), job.config.beside(_SHEET)))


def _write_rejected(job: Job) -> str | None:
    """The list of images that cannot be read, if there are any; an old one is removed."""
    path, pictures = job.config.beside(_REJECTED), job.pictures
    if not pictures.rejected:
        path.unlink(missing_ok=True)
        return None
    with replaced(path) as part, open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "reason"])
        for row, why in sorted(pictures.rejected.items()):
            writer.writerow([pictures.manifest.key(row), why])
    return str(path)
