"""Reading Fashion-MNIST's four idx files."""

import gzip
from pathlib import Path

import numpy as np

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
# The files' own name for the test split is "t10k".
PREFIXES = {"train": "train", "test": "t10k"}


def _read_idx(path: Path) -> np.ndarray:
    """Read one gzipped idx file of unsigned bytes."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    shape = np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def read_split(source: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images (n, 28, 28) and labels (n,) of the split "train" or "test"."""
    prefix = PREFIXES[split]
    images = _read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
    labels = _read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
    if len(images) != len(labels):
        raise ValueError(f"{source}: {len(images)} images but {len(labels)} labels in {split}")
    return images, labels
