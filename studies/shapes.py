"""What views of the pictures' own shape are worth: `python -m studies.shapes`.

Wide pictures are two images of one class side by side. Square views see a part of one; a view that
is twice as wide as high can see all of it.
"""

from __future__ import annotations

import argparse
import io
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from milan.core.atomic import write_bytes
from milan.core.size import Size, height_width
from milan.evaluation.config import EvaluationConfig
from milan.evaluation.splits import Split, open_splits
from milan.images.decode import decode_pixels
from milan.store.format import INDEX
from studies.setting import Setting, add_images, small
from studies.steps import Figures, Probe, flags, markdown

PROBED = ("k-NN", "linear")
TUNED = "fine-tuned"


def pairs_of(split: Split) -> pa.Table:
    """Two images of a class side by side, as PNG, with its number: as many as the split has."""
    order = np.argsort(split.labels, kind="stable")
    images, labels = list[dict[str, Any]](), list[int]()
    for first, second in zip(order[::2].tolist(), order[1::2].tolist(), strict=False):
        if split.labels[first] != split.labels[second]:
            continue
        halves = [
            decode_pixels(split.of.images.read(int(split.rows[at]))) for at in (first, second)
        ]
        sink = io.BytesIO()
        Image.fromarray(np.concatenate(halves, axis=1)).save(sink, "PNG")
        images.append({"bytes": sink.getvalue(), "path": f"{len(images):06d}.png"})
        labels.append(int(split.labels[first]))
    return pa.table({"image": images, "label": labels})


def wide(setting: Setting, work: Path, *, images: int, measured: int) -> tuple[Setting, int]:
    """The setting with pairs of its images, made once, and the edge of one in pixels."""
    folder = work / f"shapes/{setting.name}-{images}-{measured}"
    files = {name: folder / f"{name}.parquet" for name in ("train", "test")}
    if not all(file.exists() for file in files.values()):
        splits = open_splits(EvaluationConfig(**setting.measured | {"limit": 2 * images}))
        for file, split in zip(files.values(), splits, strict=True):
            sink = io.BytesIO()
            pq.write_table(pairs_of(split), sink)
            folder.mkdir(parents=True, exist_ok=True)
            write_bytes(file, sink.getvalue())
    first = pq.read_table(files["train"])["image"][0].as_py()["bytes"]
    train, test = (str(file) for file in files.values())
    named = {"data": train, "val_data": test, "limit": measured}
    return replace(
        setting, name=f"{setting.name}-pairs", data={"data": train}, measured=named
    ), decode_pixels(first).shape[0]


def store_of(setting: Setting, given: argparse.Namespace, size: Size) -> Path:
    """A store of views of this size, made if it is not there."""
    height, width = height_width(size)
    folder = given.work / "stores" / setting.name
    store = folder / f"{height}x{width}-{given.images}-{given.views}.zarr"
    if not (store / INDEX).exists():
        setting.extract(
            store, codec="int8", views=given.views, limit=given.images, store_views="jpeg:95",
            img_size=height, img_width=width,
        )  # fmt: skip
    return store


def methods(edge: int, patch: int, epochs: int) -> dict[str, tuple[Size, int]]:
    """Name -> (size of a view, epochs): of about as many patches, or as many steps."""
    larger = round(edge * math.sqrt(2) / patch) * patch
    return {
        f"{edge} x {edge}": (edge, epochs),
        f"{edge} x {edge}, twice the epochs": (edge, 2 * epochs),
        f"{larger} x {larger}": (larger, epochs),
        f"{edge} x {2 * edge}, the picture's shape": ((edge, 2 * edge), epochs),
    }


def main() -> None:
    """All runs and their figures, seed by seed, then the table."""
    parser = flags("shapes", __doc__)
    add_images(parser)
    parser.add_argument("--images", type=int, default=2000, help="pairs to train on")
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--tuning", type=int, default=3, help="epochs of fine-tuning")
    given = parser.parse_args()
    plain, figures = small(given), Figures(given.out)
    setting, edge = wide(plain, given.work, images=given.images, measured=given.measured)
    patch = setting.student["model_args"]["patch_size"]
    found = methods(edge, patch, given.epochs)
    for seed in range(given.seeds):
        for name, (size, epochs) in found.items():
            height, width = height_width(size)
            run = given.work / f"shapes/{setting.name}-{height}x{width}-{epochs}-{seed}"

            def train(
                size: Size = size, run: Path = run, epochs: int = epochs, seed: int = seed
            ) -> float:
                return setting.train(store_of(setting, given, size), run, seed, epochs=epochs)

            probes: dict[str, Probe] = setting.probes(run, PROBED)
            probes[TUNED] = partial(
                setting.fine_tuned, run, seed, epochs=given.tuning, images=given.measured
            )
            figures.run(name, seed, train, probes)
    measures = (*PROBED, TUNED, "CPU s")
    rows = [["a view", "patches", *measures]]
    for name, (size, _) in found.items():
        patches = str(math.prod(height_width(size)) // patch**2)
        rows.append([name, patches, *(figures.cell(name, m) for m in measures)])
    print("\n" + markdown(rows))


if __name__ == "__main__":
    main()
