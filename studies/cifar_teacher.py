"""The studies' teacher: a small CLIP, trained on CIFAR-10's images and sentences of their classes.

    python -m studies.cifar_teacher --data FOLDER --out runs/cifar10/teacher

FOLDER holds CIFAR-10 as Parquet files in the Hugging Face schema. A stopped call goes on from the
last epoch. Half the sentences of a batch say the same class as another one's; open_clip's loss
treats them as different, which costs some loss but no class.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from demo.train_clip import MEAN, STD, Options, predict, train
from pipeline.teachers.text_tower import TEMPLATES

CONFIG = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": 32, "layers": 4, "width": 128, "head_width": 32, "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 16, "vocab_size": 49408, "width": 32, "heads": 1, "layers": 1,
        },
    },
    "preprocess_cfg": {"mean": MEAN.flatten().tolist(), "std": STD.flatten().tolist()},
}  # fmt: skip
OPTIONS = Options(
    epochs=2, whole_epochs=1, patch_dropout=0.5, batch_size=128, lr=1.5e-3, warmup_epochs=0.3,
    uncropped=0.5, smallest_crop=0.5, threads=1,
)  # fmt: skip


def read(folder: Path, split: str) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images uint8 [n, 3, 32, 32], labels [n] and class names of `split`."""
    table = pq.read_table(sorted(folder.glob(f"{split}-*.parquet")), columns=["image", "label"])
    names = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]["label"]["names"]
    encoded = (row["bytes"] for row in table["image"].to_pylist())
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(one)).convert("RGB")) for one in encoded])
    labels = torch.from_numpy(table["label"].to_numpy().copy())
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels, names


def make(data: Path, folder: Path) -> None:
    """Train the teacher into `folder`, unless it is there already."""
    state = folder.with_name(f"{folder.name}-state.pt")
    if (folder / "model.safetensors").exists() and not state.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    images, labels, names = read(data, "train")
    test, test_labels, _ = read(data, "test")
    prompts = [[template.format(name) for template in TEMPLATES] for name in names]

    def captions(rng: np.random.Generator) -> list[str]:
        chosen = rng.integers(len(TEMPLATES), size=len(labels))
        return [prompts[c][t] for c, t in zip(labels.tolist(), chosen.tolist(), strict=True)]

    train(
        folder, state, images, captions,
        lambda model, tokenizer: (
            (predict(model, tokenizer, prompts, test) == test_labels).double().mean().item()
        ),
        OPTIONS,
    )  # fmt: skip


def main() -> None:
    """Train, and print loss, rate, time left and zero-shot accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's Parquet files")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10/teacher"))
    args = parser.parse_args()
    make(args.data, args.out)


if __name__ == "__main__":
    main()
