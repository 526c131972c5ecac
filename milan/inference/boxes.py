"""Predictions of a detector: a row for each box that it finds, with its mask if it has one."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from milan.evaluation.coco import mask_functions
from milan.images.channels import picture_of, whole_image
from milan.inference.predict import Job
from milan.models.detector import find_boxes, load_detector
from milan.reporting.boxes import draw_boxes
from milan.reporting.panels import PANEL, Tile

_AT_ONCE = 4  # images: whole ones, each up to a canvas
_COLUMNS = [
    ("key", pa.string()), ("class", pa.string()), ("score", pa.float32()),
    *((side, pa.float32()) for side in ("left", "top", "right", "bottom")),
]  # fmt: skip


def predict_boxes(job: Job) -> dict[str, Any]:
    """Of each box with a score of `job.config.score` or more its image, class, score, and sides in
    pixels of the image; of a detector with masks also `mask`, COCO's run lengths as JSON. Returns
    how many there are, and in how many images none was found."""
    detector = load_detector(job.file).to(job.device)
    schema = pa.schema(_COLUMNS + ([("mask", pa.string())] if detector.spec.masks else []))
    names, shown = detector.class_names, job.shown
    channels = job.pictures.channels

    def prepare(row: int, data: bytes, beside: bytes) -> np.ndarray:
        return whole_image(channels, data, beside)

    total = np.zeros(2, np.int64)  # of boxes, of images without one
    with job.table(schema) as table:
        for batch in job.pictures.batches(prepare, at_once=_AT_ONCE):
            images = [picture.prepared for picture in batch]
            answers = find_boxes(detector, images, score=job.config.score)
            for picture, detections in zip(batch, answers, strict=True):
                key = job.pictures.manifest.key(picture.row)
                labels = detections["labels"] - 1
                columns: list[Any] = [
                    [key] * len(labels), [names[label] for label in labels.tolist()],
                    detections["scores"], *np.ascontiguousarray(detections["boxes"].T),
                ]  # fmt: skip
                if detector.spec.masks:
                    columns.append([_run_lengths(mask) for mask in detections["masks"]])
                if len(labels):
                    table.write_table(pa.table(columns, schema=schema))
                total += len(labels), not len(labels)
                if picture.row in shown:
                    panel = draw_boxes(
                        picture_of(channels, picture.prepared), detections["boxes"], labels, names,
                        masks=detections.get("masks"), edge=PANEL, named=False,
                    )  # fmt: skip
                    counts = Counter(names[label] for label in labels.tolist()).most_common(4)
                    said = ", ".join(f"{name} {count}" for name, count in counts)
                    job.tiles[picture.row] = Tile(panel, [key, said or "nothing found"])
    boxes, empty = sum(job.over_ranks(total)).tolist()
    return {"classes": len(names), "boxes": boxes, "images_without_boxes": empty}


def _run_lengths(mask: np.ndarray) -> str:
    """A mask [H, W] as COCO's compressed run lengths, JSON."""
    encoded = mask_functions().encode(np.asfortranarray(mask.astype(np.uint8)))
    return json.dumps({"size": encoded["size"], "counts": encoded["counts"].decode()})
