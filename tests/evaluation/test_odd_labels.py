"""Labels and images that are odd: what can be measured is, by every protocol; else one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from milan.errors import MilanError
from milan.evaluation.config import ClassificationConfig, SupervisedConfig
from milan.evaluation.evaluate import evaluate
from milan.evaluation.protocols import PROTOCOLS

SMALL: dict[str, Any] = {
    "model": "vit_tiny_patch16_224", "baseline": "none",
    "model_args": {"img_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 16, "num_heads": 2},
}  # fmt: skip
SHORT: dict[str, Any] = {
    "epochs": 1, "warmup_epochs": 0, "batch_size": 2, "num_workers": 0, "report_to": "none",
}  # fmt: skip
RUN = {
    p.run: p.name
    for p in reversed(PROTOCOLS.values())
    if issubclass(p.settings, ClassificationConfig)
}
"""Function -> the first protocol that calls it."""


def images(
    folder: Path, classes: str, *, count: int = 3, size: tuple[int, int] = (12, 12), seed: int = 0
) -> str:
    """Class folders, a letter each, of noise of `size` (width, height)."""
    generator = np.random.default_rng(seed)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return str(folder)


def pair(folder: Path, train: str, val: str, **settings: Any) -> dict[str, Any]:
    """Images to fit on and to measure on."""
    return {
        "data": images(folder / "train", train, **settings),
        "val_data": images(folder / "val", val, **{**settings, "count": 3, "seed": 1}),
    }


def several_labels(folder: Path) -> dict[str, Any]:
    """A column with two labels an image."""
    whole = pair(folder, "abc", "abc")
    files = sorted(Path(whole["data"]).rglob("*.png"))
    pictures = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    table = pa.table({"image": pictures, "label": [[0, i % 3] for i in range(len(files))]})
    pq.write_table(table, folder / "several.parquet")
    return whole | {"data": str(folder / "several.parquet")}


def empty(folder: Path) -> dict[str, Any]:
    (folder / "empty").mkdir()
    return pair(folder, "abc", "abc") | {"val_data": str(folder / "empty")}


CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], str | None]] = {
    "label sets that differ": (
        lambda f: pair(f, "abc", "abd"), "1 classes of --val-data are not in --data, .* 'd'"
    ),
    "classes of one image": (lambda f: pair(f, "abc", "abc", count=1), None),
    "an empty split": (lambda f: pair(f, "abc", "abc") | {"val_split": "test"}, "test"),
    "an empty folder": (empty, "no images in"),
    "fewer classes than the head": (lambda f: pair(f, "abc", "a"), None),
    "one class": (lambda f: pair(f, "a", "a"), "of one class"),
    "images smaller than a patch": (lambda f: pair(f, "abc", "abc", size=(2, 1)), None),
    "images that are not square": (lambda f: pair(f, "abc", "abc", size=(50, 7)), None),
    "an encoder that is not square": (
        lambda f: pair(f, "abc", "abc") | {"model_args": {"img_size": [16, 32]}}, None
    ),
    "several labels of an image": (several_labels, "label"),
}  # fmt: skip


@pytest.mark.parametrize("name", RUN.values())
@pytest.mark.parametrize("case", CASES)
def test_odd_labels(case: str, name: str, tmp_path: Path) -> None:
    """By every protocol alike."""
    make, found = CASES[case]
    protocol = PROTOCOLS[name]
    trains = issubclass(protocol.settings, SupervisedConfig)
    settings = {**SMALL, "out": str(tmp_path / "out.json"), **make(tmp_path)}
    settings |= SHORT if trains else {"features": "none"}
    if trains:
        settings.pop("baseline")
    if found is None:
        got = evaluate(protocol, "random", **settings)
        assert got["val_images"] == (3 if "fewer" in case else 9)
        assert got["classes"] == 3
        return
    with pytest.raises(MilanError, match=found) as refused:
        evaluate(protocol, "random", **settings)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()
