"""Print the zero-shot accuracy of the demo's teacher.

    python demo/zero_shot.py                  # on the embedded 2,000 test images
    python demo/zero_shot.py --source DIR     # on the full test split of 10,000

DIR has Fashion-MNIST's four idx files (make_data.py says how to obtain them).
"""

import argparse
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from captions import PROMPTS, fill, noun
from fashion_mnist import CLASS_NAMES, read_split
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

DEMO = Path(__file__).parent
TEACHER = DEMO / "teacher"
# ImageNet's, because the students that learn from this teacher use them too.
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def normalise(grey: Tensor) -> Tensor:
    """Turn grey images (n, 1, h, w) in [0, 1] into the model's input (n, 3, h, w)."""
    return (grey - MEAN) / STD


def build(config: dict[str, Any]) -> CLIP:
    """Build the untrained model from an open_clip model config."""
    return CLIP(**config)


def load_teacher(folder: Path = TEACHER) -> tuple[CLIP, open_clip.SimpleTokenizer]:
    """Load the embedded teacher, in single precision, and its tokenizer."""
    config = json.loads((folder / "config.json").read_text())["model_cfg"]
    model = build(config)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    context_length = config["text_cfg"]["context_length"]
    return model.eval(), open_clip.SimpleTokenizer(context_length=context_length)


def class_embeddings(model: CLIP, tokenizer: Callable[[list[str]], Tensor]) -> Tensor:
    """Return the unit mean (classes, dim) of each class name's prompts."""
    rows = []
    for name in CLASS_NAMES:
        prompts = [fill(prompt, {"name": noun(name)}) for prompt in PROMPTS]
        rows.append(model.encode_text(tokenizer(prompts), normalize=True).mean(dim=0))
    return F.normalize(torch.stack(rows), dim=-1)


@torch.inference_mode()
def predict(model: CLIP, tokenizer: Callable[[list[str]], Tensor], images: Tensor) -> Tensor:
    """Return the zero-shot class of uint8 images (n, 28, 28)."""
    model.eval()
    classes = class_embeddings(model, tokenizer)
    predicted = []
    for batch in images.split(500):
        features = model.encode_image(normalise(batch.unsqueeze(1).float() / 255), normalize=True)
        predicted.append((features @ classes.T).argmax(dim=-1))
    return torch.cat(predicted)


def accuracy(
    model: CLIP, tokenizer: Callable[[list[str]], Tensor], images: Tensor, labels: Tensor
) -> float:
    """Return the share of images whose zero-shot class is their label."""
    return (predict(model, tokenizer, images) == labels).double().mean().item()


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
    model, tokenizer = load_teacher(args.teacher)
    correct = predict(model, tokenizer, torch.from_numpy(images.copy())).numpy() == labels
    for number, name in enumerate(CLASS_NAMES):
        print(f"{name:12} {correct[labels == number].mean():6.1%}")
    print(f"zero-shot accuracy over {len(correct):,} test images: {correct.mean():.2%}")


if __name__ == "__main__":
    main()
