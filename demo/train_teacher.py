"""Train the demo's teacher, a small CLIP, on Fashion-MNIST images and captions.

    python demo/train_teacher.py --source DIR

DIR holds Fashion-MNIST's four idx files (make_data.py says how to obtain them). After every
epoch the model is written to ``demo/teacher/model.safetensors`` in half precision, and the
whole training state to ``--state``. A later call with the same options resumes from it. It is
deleted after the last epoch.
"""

import argparse
from pathlib import Path

import torch
from captions import attributes, caption
from fashion_mnist import read_split
from train_clip import Options, train
from zero_shot import TEACHER, accuracy


def main() -> None:
    """Train, and print loss, rate, time left and zero-shot accuracy."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, required=True, help="folder of the idx files")
    parser.add_argument("--output", type=Path, default=TEACHER, help="folder of config.json")
    parser.add_argument("--state", type=Path, default=Path("runs/teacher-state.pt"))
    Options.add_flags(parser)
    args = parser.parse_args()
    images, labels = read_split(args.source, "train")
    words = [attributes(i, int(c)) for i, c in zip(images, labels, strict=True)]
    test, test_labels = (torch.from_numpy(part.copy()) for part in read_split(args.source, "test"))
    train(
        args.output, args.state, torch.from_numpy(images.copy()).unsqueeze(1),
        lambda rng: [caption(w, rng) for w in words],
        lambda model, tokenizer: accuracy(model, tokenizer, test, test_labels),
        Options.of(args),
    )  # fmt: skip


if __name__ == "__main__":
    main()
