"""`milan predict`: what a trained network says of the images of a folder: table, sheet, metrics.

A training leaves one file that says what it is for. PREDICTORS names, for each kind of file, the
function that predicts with it. To add one: a function as `Predictor` describes it, and a line here.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from milan.core.atomic import write_json
from milan.core.config_resolver import from_call
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.errors import CacheError
from milan.evaluation.features import Context
from milan.evaluation.ranks import on_ranks
from milan.images.channels import Channels
from milan.inference.config import PredictConfig
from milan.inference.pictures import Pictures
from milan.inference.tables import Table, check_ending, check_place, replaced, written
from milan.models.export import CHANNELS, ENCODER, read_about
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
    """What a predictor is given: its file, images, device and ranks; and where its answers go."""

    file: Path
    """The network's file, one of PREDICTORS."""
    config: PredictConfig
    pictures: Pictures
    context: Context
    tiles: dict[int, Tile] = field(default_factory=dict)
    """row -> picture on the contact sheet; to be filled for the rows of `shown`."""

    @property
    def device(self) -> torch.device:
        """Where the network goes."""
        return self.context.device

    @property
    def place(self) -> Path:
        """Where the table goes."""
        return Path(self.config.out)

    def table(self, schema: pa.Schema) -> AbstractContextManager[Table]:
        """The table, to be written row by row; it has the rows of all ranks."""
        return written(self.place, schema, self.context.ranks)

    def over_ranks(self, value: Any) -> list[Any]:
        """What each rank gives, in their order; all must call it."""
        return [one for _, one in self.context.ranks.gather_objects(value)]

    @property
    def shown(self) -> frozenset[int]:
        """The rows on the contact sheet; of those that cannot be read there is no picture."""
        return self.pictures.sample(self.config.pictures)


Predictor = Callable[[Job], dict[str, Any]]
"""Reads its rank's share of job.pictures, writes their rows to job.table, fills job.tiles; returns
figures of the images of all ranks as JSON."""


def predict(
    checkpoint: str | PredictConfig = "runs/pretrain/finetune",
    *,
    stop: Stop | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Predict for all images of a folder, by the network that a training for a task left.

    `checkpoint` and `settings` are the command's arguments (PredictConfig's fields). Writes a table
    with a row an image, and beside it a contact sheet, the metrics, and the images that could not
    be read, if any. With several GPUs it starts a rank for each. Returns the metrics, with the
    paths of these files; ranks after the first return {}. Asked to stop, or by SIGINT, SIGTERM or
    SIGUSR1, it returns {"stopped_by": signal}, and leaves no table. Raises MilanError.
    """
    config = from_call(PredictConfig, "checkpoint", checkpoint, settings, "predict")
    config.check()
    check_ending(Path(config.out))
    return on_ranks(
        partial(_predict, config), config, kept="nothing is written", stop=stop, progress=progress
    )


def _predict(config: PredictConfig, context: Context) -> dict[str, Any]:
    """The metrics; each rank predicts for its share of the images."""
    began, progress = time.perf_counter(), context.progress
    file = _file_of(config.checkpoint)
    channels = Channels.if_any(read_about(file).get(CHANNELS))
    pictures = Pictures(config, context, channels=channels)
    for ending in (Path(config.out).suffix, *_BESIDE):
        check_apart(config.beside(ending), [pictures.place])
        context.ranks.on_rank0(partial(check_place, config.beside(ending)))
    job = Job(file, config, pictures, context)
    module, _, function = PREDICTORS[file.name].partition(":")
    progress.begin("predictions", len(pictures), "images")
    figures = getattr(import_module(module), function)(job)
    progress.end()
    job.tiles = {row: tile for tiles in job.over_ranks(job.tiles) for row, tile in tiles.items()}
    if not context.ranks.is_rank0:
        return {}
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
        files = [path / name for name in names if (path / name).is_file()]
        if len(files) == 1:
            return files[0]
        if files:
            raise CacheError(
                f"{path} holds {' and '.join(file.name for file in files)}",
                expected="one of them",
                fix=f"milan predict {files[0]}",
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
        fix=f"milan finetune --checkpoint {path}"
        if encoder
        else "milan finetune, which leaves one",
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
