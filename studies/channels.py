"""What a student of other channels than its teacher's learns: `python -m studies.channels`.

The teacher sees RGB. Brightness and edges lie in files beside the images, as depth or the picture
of another sensor would; a student sees RGB, or these, or both.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from milan.data.dataset import open_cache
from milan.evaluation.config import EvaluationConfig
from milan.evaluation.splits import open_splits
from milan.images.decode import decode_pixels
from milan.images.pairing import stem_of
from studies.setting import Setting, add_images, small
from studies.steps import Figures, Probe, flags, markdown

STUDENTS = {
    "RGB": "", "brightness": "1", "edges": "2", "RGB and edges": "rgb,2",
}  # fmt: skip
"""Name -> --student-channels; none for RGB."""
TIMED = "RGB and edges, equal time"
PROBED = ("k-NN", "linear")
TUNED = "fine-tuned"


def channels_of(data: bytes) -> np.ndarray:
    """Brightness, the mean of the colours, and its steepness: float32 [H, W, 2] of an image."""
    brightness = decode_pixels(data).astype(np.float32).mean(axis=2)
    down, right = np.gradient(brightness)
    return np.stack([brightness, np.hypot(down, right)], axis=2)


def images_of(setting: Setting, store: Path, seed: int) -> Iterator[tuple[str, bytes]]:
    """(key, bytes) of all images that a student, its probes (of seed 0) and its fine-tuning see."""
    dataset = open_cache(store)
    for row, key in enumerate(dataset.cache.manifest.keys()):
        yield key, dataset.source.read(row)
    for drawn in sorted({0, seed}):
        for split in open_splits(EvaluationConfig(**setting.measured, seed=drawn)):
            for position, row in enumerate(split.rows.tolist()):
                yield split.key(position), split.of.images.read(row)


def files_beside(setting: Setting, store: Path, folder: Path, seed: int) -> None:
    """The files of `channels_of` all images in `folder`, made once."""
    done = folder / f"done-{seed}"
    if not done.exists():
        for key, data in images_of(setting, store, seed):
            file = folder / f"{stem_of(key)}.npy"
            file.parent.mkdir(parents=True, exist_ok=True)
            np.save(file, channels_of(data))
        done.touch()


def main() -> None:
    """All runs and their figures, seed by seed, then the table."""
    parser = flags("channels", __doc__)
    add_images(parser)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--tuning", type=int, default=3, help="epochs of fine-tuning")
    given = parser.parse_args()
    setting, figures = small(given), Figures(given.out)
    for seed in range(given.seeds):
        for name, spelled in STUDENTS.items():
            measure(given, setting, figures, name, spelled, seed, given.epochs)
    epochs = figures.epochs_at_equal_time("RGB and edges", "RGB", given.epochs)
    for seed in range(given.seeds):
        measure(given, setting, figures, TIMED, STUDENTS["RGB and edges"], seed, epochs)
    measures = (*PROBED, TUNED, "CPU s")
    rows = [[m, *(figures.cell(m, name) for name in measures)] for m in (*STUDENTS, TIMED)]
    table = markdown([["the student sees", *measures], *rows])
    print(f"\n{table}\n{TIMED}: {epochs} epochs")


def measure(
    given: argparse.Namespace, setting: Setting, figures: Figures, name: str, spelled: str,
    seed: int, epochs: int,
) -> None:  # fmt: skip
    """The figures of a student of these channels."""
    label = name.replace(",", "").replace(" ", "-")
    run = given.work / f"channels/{setting.name}-{label}-{epochs}-{seed}"
    store = partial(setting.store, given.work, codec="int8", views=given.views, images=given.images)
    folder = given.work / f"channels/{setting.name}-{given.images}-{given.measured}"
    own: dict[str, Any] = {}
    beside: dict[str, Any] = {}
    if spelled:
        own = {"student_channels": spelled, "student_data": str(folder)}
        beside = {"student_data": str(folder), "val_student_data": str(folder)}

    def train() -> float:
        if spelled:
            files_beside(setting, store(), folder, seed)
        return setting.train(store(), run, seed, epochs=epochs, **own)

    probes: dict[str, Probe] = {m: partial(setting.probe, run, m, **beside) for m in PROBED}
    probes[TUNED] = partial(
        setting.fine_tuned, run, seed, epochs=given.tuning, images=given.measured, **beside
    )
    figures.run(name, seed, train, probes)


if __name__ == "__main__":
    main()
