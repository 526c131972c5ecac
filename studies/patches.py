"""What a detector can see: a linear classifier of patches, by the box that each lies in.

    python -m studies.patches --bccd FOLDER --cifar10 runs/cifar10

The encoders of studies.transfer, as a detector begins with them: on its canvas, without class token
and final norm. Patches behind each block are classified by ridge regression as background or one of
the classes, once with the positions of each patch and once with their mean. Prints a table:
accuracy of patches, and the average precision of each class, in percent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_average_precision

from milan.core.progress import NoProgress
from milan.evaluation.box_splits import open_boxes
from milan.evaluation.coco import BoxSet
from milan.evaluation.config import DetectConfig
from milan.models.detector import (
    Detector,
    DetectorSpec,
    detector_encoder,
    interpolated,
    on_canvas,
    unit,
)
from milan.training.detect_data import read_image
from milan.training.supervised import initial_weights, load_weights

SIZE, RIDGE, OUTSIDE = 128, 1e-2, -1
LEFT_OUT = ("head.", "fc_norm.", "norm.")


def pictures(boxes: BoxSet) -> list[torch.Tensor]:
    """Images as they lie on the canvas, float32 [3, h, w] in 0..1."""
    count = range(len(boxes))
    return [unit(torch.from_numpy(on_canvas(read_image(boxes, n), SIZE).copy())) for n in count]


def labels_of(boxes: BoxSet, patch: int) -> torch.Tensor:
    """int64 [m * patches]: 0 background, then classes; of several boxes that the centre of a patch
    lies in the smallest; OUTSIDE the image."""
    grid = SIZE // patch
    at = (np.arange(grid) + 0.5) * patch
    labels = np.zeros((len(boxes), grid, grid), np.int64)
    for image, shape in enumerate(boxes.shapes):
        scale = SIZE / shape.max()
        there = boxes.of_image(image)
        objects = zip(boxes.boxes[there] * scale, boxes.labels[there], strict=True)
        largest_first = sorted(objects, key=lambda one: -np.prod(one[0][2:] - one[0][:2]))
        for (left, top, right, bottom), label in largest_first:
            rows, columns = (at >= top) & (at <= bottom), (at >= left) & (at <= right)
            labels[image][np.ix_(rows, columns)] = label + 1
        height, width = shape * scale
        labels[image, at > height] = OUTSIDE
        labels[image][:, at > width] = OUTSIDE
    return torch.from_numpy(labels.reshape(-1))


def network(checkpoint: str, like: str | None, classes: tuple[str, ...]) -> Detector:
    """A detector before its first step."""
    weights = initial_weights(DetectConfig(checkpoint, like=like))
    spec = DetectorSpec(
        weights.model, classes, False, SIZE, weights.args, mean=tuple(weights.mean),
        std=tuple(weights.std),
    )  # fmt: skip
    torch.manual_seed(0)
    vit = detector_encoder(spec)
    known = interpolated(weights, vit)
    load_weights(vit, known, name=checkpoint, leave=LEFT_OUT)
    return Detector(vit, spec).eval()


def behind_blocks(
    detector: Detector, images: list[torch.Tensor], *, places: bool
) -> list[torch.Tensor]:
    """Patches [m * patches, E] before the first block and behind each; without `places` every one
    has the mean of all positions."""
    vit = detector.backbone.encoder
    positions = vit.pos_embed if places else vit.pos_embed.mean(1, keepdim=True)
    x = vit.norm_pre(vit.patch_embed(detector.transform(images)[0].tensors) + positions)
    behind = [x]
    for block in vit.blocks:
        behind.append(block(behind[-1]))
    return [x.flatten(0, 1) for x in behind]


def fitted(x: torch.Tensor, y: torch.Tensor, val_x: torch.Tensor, val_y: torch.Tensor) -> list[str]:
    """Accuracy, and average precision of each class, of ridge regression to one-hot labels."""
    seen, val_seen, classes = y != OUTSIDE, val_y != OUTSIDE, int(y.max()) + 1
    mean, std = x[seen].mean(0), x[seen].std(0) + 1e-5
    x, val_x = (F.pad((each - mean) / std, (0, 1), value=1.0).double() for each in (x, val_x))
    x, y, val_x, val_y = (
        x[seen],
        F.one_hot(y[seen], classes).double(),
        val_x[val_seen],
        val_y[val_seen],
    )
    penalty = RIDGE * len(x) * torch.eye(x.shape[1], dtype=torch.float64)
    scores = val_x @ torch.linalg.solve(x.T @ x + penalty, x.T @ y)
    shown = [float((scores.argmax(1) == val_y).double().mean())]
    for number in range(1, classes):
        shown.append(float(binary_average_precision(scores[:, number], (val_y == number).long())))
    return [f"{100 * value:.1f}" for value in shown]


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bccd", required=True, help="BCCD with COCO's JSON")
    parser.add_argument("--cifar10", type=Path, default=Path("runs/cifar10"))
    args = parser.parse_args()
    student, teacher = str(args.cifar10 / "runs/milan"), str(args.cifar10 / "teacher")
    train, val = open_boxes(DetectConfig(data=args.bccd), NoProgress())
    seen, val_seen = pictures(train), pictures(val)
    head = ["encoder", "positions", "behind block", "accuracy", *train.classes]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for name, checkpoint, like in (
        ("random", "random", student), ("MILAN", student, None), ("teacher", teacher, None)
    ):  # fmt: skip
        detector = network(checkpoint, like, train.classes)
        patch = SIZE // detector.backbone.grid
        y, val_y = labels_of(train, patch), labels_of(val, patch)
        for places in (True, False):
            with torch.no_grad():
                xs = behind_blocks(detector, seen, places=places)
                val_xs = behind_blocks(detector, val_seen, places=places)
            for block, (x, val_x) in enumerate(zip(xs, val_xs, strict=True)):
                row = [name, "own" if places else "their mean", str(block)]
                print(f"| {' | '.join(row + fitted(x, y, val_x, val_y))} |", flush=True)


if __name__ == "__main__":
    main()
