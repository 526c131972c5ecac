"""Print the zero-shot accuracy of the demo's teacher.

    python demo/zero_shot.py                  # on the embedded 2,000 test images
    python demo/zero_shot.py --source DIR     # on the full test split of 10,000

DIR has Fashion-MNIST's four idx files (make_data.py says how to obtain them).
"""

import argparse
import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from captions import PROMPTS, fill, noun
from fashion_mnist import CLASS_NAMES, read_split
from open_clip.model import CLIP
from PIL import Image
from torch import Tensor
from train_clip import Tokenizer, load, predict

DEMO = Path(__file__).parent
TEACHER = DEMO / "teacher"


def prompts() -> list[list[str]]:
    """The sentences of each class, by number."""
    return [[fill(prompt, {"name": noun(name)}) for prompt in PROMPTS] for name in CLASS_NAMES]


def accuracy(model: CLIP, tokenizer: Tokenizer, images: Tensor, labels: Tensor) -> float:
    """Return the share of uint8 images [n, 28, 28] whose zero-shot class is their label."""
    predicted = predict(model, tokenizer, prompts(), images.unsqueeze(1))
    return (predicted == labels).double().mean().item()


def read_embedded(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels of a file which make_data.py wrote."""
    table = pq.read_table(path, columns=["image", "label"])
    encoded = (row["bytes"] for row in table.column("image").to_pylist())
    images = np.stack([np.array(Image.open(io.BytesIO(png), formats=["PNG"])) for png in encoded])
    return images, table.column("label").to_numpy()


def main() -> None:
    """Print the accuracy, overall and by class."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="folder of Fashion-MNIST's idx files")
    parser.add_argument("--teacher", type=Path, default=TEACHER)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.source:
        images, labels = read_split(args.source, "test")
    else:
        images, labels = read_embedded(DEMO / "data" / "test.parquet")
    model, tokenizer = load(args.teacher)
    pixels = torch.from_numpy(images.copy()).unsqueeze(1)
    correct = predict(model, tokenizer, prompts(), pixels).numpy() == labels
    for number, name in enumerate(CLASS_NAMES):
        print(f"{name:12} {correct[labels == number].mean():6.1%}")
    print(f"zero-shot accuracy over {len(correct):,} test images: {correct.mean():.2%}")


if __name__ == "__main__":
    main()
