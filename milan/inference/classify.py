"""Predictions of a fine-tuned classifier: the five most probable classes of each image."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import timm
import torch

from milan.core.device import normalise
from milan.core.size import as_size
from milan.evaluation.meaning import accuracy_interval
from milan.images.channels import centre_crop, picture_of, whole_image
from milan.inference.pictures import Pictures
from milan.inference.predict import Job
from milan.models.classifier import load_classifier
from milan.reporting.panels import Tile, thumbnail

_TOP = 5


def predict_classes(job: Job) -> dict[str, Any]:
    """Of each image its key, its class as the data have it, and up to 5 classes with scores.

    Scores are softmax probabilities in float32. An image is shown as in fine-tuning's validation:
    its centre crop. Where the data have labels of classes that the classifier knows, returns
    top1 (percent) over the images that have one, with its 95 % interval.
    """
    vit = load_classifier(job.file).to(job.device)
    data = timm.data.resolve_model_data_config(vit)
    size, share, names = as_size(data["input_size"][1:]), data["crop_pct"], vit.class_names
    top, shown = min(_TOP, len(names)), job.shown

    channels = job.pictures.channels

    def prepare(row: int, data: bytes, beside: bytes) -> tuple[np.ndarray, np.ndarray | None]:
        view = centre_crop(channels, data, beside, share=share, size=size)
        if row not in shown:
            return view, None
        return view, thumbnail(picture_of(channels, whole_image(channels, data, beside)))

    truth, right = _truth(job.pictures, names), list[bool]()
    text, number = pa.string(), pa.float32()
    ranked = [(f"{what}{i + 1}", kind) for i in range(top)
              for what, kind in (("class", text), ("score", number))]  # fmt: skip
    schema = pa.schema([("key", text), ("label", text), *ranked])
    with job.table(schema) as table, torch.inference_mode():
        for batch in job.pictures.batches(prepare):
            views = torch.from_numpy(np.stack([picture.prepared[0] for picture in batch]))
            views = views.to(job.device)
            images = views if channels else normalise(views, data["mean"], data["std"])
            scores, best = vit(images).float().softmax(dim=1).topk(top, dim=1)
            scores, best = scores.cpu(), best.cpu()
            rows = [picture.row for picture in batch]
            keys = job.pictures.manifest.table["key"].take(pa.array(rows)).to_pylist()
            columns: list[Any] = [keys, [_label(job.pictures, row) for row in rows]]
            for i in range(top):
                columns += [[names[n] for n in best[:, i].tolist()], scores[:, i].numpy()]
            table.write_table(pa.table(columns, schema=schema))
            right += [truth[r] == n for r, n in zip(rows, best[:, 0].tolist(), strict=True)
                      if truth[r] >= 0]  # fmt: skip
            for i, picture in enumerate(batch):
                if picture.prepared[1] is not None:
                    ranks = zip(best[i, :2].tolist(), scores[i, :2].tolist(), strict=True)
                    said = [f"{names[n]} {score:.0%}" for n, score in ranks]
                    job.tiles[picture.row] = Tile(picture.prepared[1], [keys[i], *said])
    figures: dict[str, Any] = {"classes": len(names)}
    known = np.array([one for part in job.over_ranks(right) for one in part])
    if len(known):
        figures |= {
            "top1": round(100 * float(known.mean()), 2),
            "top1_interval": accuracy_interval(known),
            "labelled_images": len(known),
        }
    return figures


def _truth(pictures: Pictures, names: list[str]) -> np.ndarray:
    """The classifier's number of each image's class, int64 [rows]; -1 where there is none."""
    number = {name: i for i, name in enumerate(names)}
    if pictures.classes is None:
        return np.array([number.get(str(label), -1) for label in pictures.labels.tolist()])
    table = np.array([number.get(name, -1) for name in pictures.classes] + [-1])
    return table[pictures.labels]


def _label(pictures: Pictures, row: int) -> str | None:
    """The class that the data give an image, if they do."""
    label = int(pictures.labels[row])
    if label < 0:
        return None
    return pictures.classes[label] if pictures.classes else str(label)
