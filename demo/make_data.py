"""Write the demo's embedded data: 10,000 captioned Fashion-MNIST images in two Parquet files.

    apt-get download dataset-fashion-mnist
    dpkg -x dataset-fashion-mnist_*.deb fashion-mnist
    python demo/make_data.py --source fashion-mnist/usr/share/datasets/fashion-mnist

The files follow the Hugging Face image schema. The same call always writes the same bytes.
"""

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from captions import attributes, caption
from fashion_mnist import CLASS_NAMES, read_split
from PIL import Image

DATA = Path(__file__).parent / "data"
PER_CLASS = {"train": 800, "test": 200}

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": list(CLASS_NAMES), "_type": "ClassLabel"},
    "caption": {"dtype": "string", "_type": "Value"},
}
SCHEMA = pa.schema(
    [
        pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        pa.field("label", pa.int64()),
        pa.field("caption", pa.string()),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
)


def choose(labels: np.ndarray, per_class: int, rng: np.random.Generator) -> np.ndarray:
    """Draw ``per_class`` numbers of every class, in shuffled order."""
    numbers = [
        rng.choice(np.flatnonzero(labels == label), per_class, replace=False)
        for label in range(len(CLASS_NAMES))
    ]
    return rng.permutation(np.concatenate(numbers))


def encode_png(image: np.ndarray) -> bytes:
    """Encode a grey image as a PNG as small as Pillow can make it."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def make_split(source: Path, split: str, rng: np.random.Generator) -> pa.Table:
    """Choose a split's images and return them with labels and captions."""
    images, labels = read_split(source, split)
    rows = []
    for number in choose(labels, PER_CLASS[split], rng).tolist():
        image, label = images[number], int(labels[number])
        rows.append(
            {
                # The number in the original split, so that every row can be traced back.
                "image": {"bytes": encode_png(image), "path": f"{split}/{number:05d}.png"},
                "label": label,
                "caption": caption(attributes(image, label), rng),
            }
        )
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def main() -> None:
    """Write both files and print their sizes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of the idx files")
    parser.add_argument("--output", type=Path, default=DATA)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for number, split in enumerate(PER_CLASS):
        table = make_split(args.source, split, np.random.default_rng([args.seed, number]))
        path = args.output / f"{split}.parquet"
        # PNG bytes do not compress again, but captions and paths do. Statistics would only
        # repeat whole images.
        pq.write_table(table, path, compression="zstd", write_statistics=False, row_group_size=2000)
        print(f"{path}: {table.num_rows:,} images, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
