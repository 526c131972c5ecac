"""What pretraining was worth on CIFAR-10: every protocol of classification, on four encoders.

    python -m studies.cifar10 --data FOLDER --out runs/cifar10

FOLDER holds CIFAR-10 as Parquet files in the Hugging Face schema. Trains a small CLIP, extracts its
targets, pretrains a student on them and one on pixels, and measures both, a random encoder and the
teacher. Every step is a `milan` command, printed before it runs. A stopped call goes on after the
last whole step, within it where the command can; a changed line runs again. Leaves table.md,
table.csv and steps.csv (the lines with their seconds) in the folder of --out.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from studies import cifar_teacher
from studies.steps import Figures, in_a_fork, run, with_interval, write_table

TEACHER = "--teacher teacher/config.json --pretrained teacher/model.safetensors"
STUDENT = (
    "--epochs 6 --warmup-epochs 1 --batch-size 64 --lr 2e-3 --report-to none "
    "--set model.patch_size=8 --set model.embed_dim=128 --set model.depth=4 "
    "--set model.num_heads=4 --set decoder.embed_dim=64 --set decoder.depth=2 "
    "--set decoder.num_heads=4"
)
IMAGES = "--data DATA --split train --val-data DATA --val-split test --limit 2000 --crop-share 1"
STUDENTS = "random,runs/pixels,runs/milan"
FROZEN = f"--checkpoint {STUDENTS},teacher --like runs/milan {TEACHER} --baseline none {IMAGES}"
ENCODERS = {
    "random encoder": "random", "pixels (MAE)": "runs/pixels", "MILAN": "runs/milan",
    "teacher": "teacher",
}  # fmt: skip
"""Heading -> checkpoint."""


@dataclass(frozen=True)
class Step:
    """One `milan` command; DATA in its line is the folder of the images."""

    line: str
    rows: tuple[tuple[str, str], ...] = ()
    """(what it measures, key of its metrics) in the table."""


def _measured(command: str, title: str, key: str = "top1", flags: str = FROZEN) -> Step:
    return Step(f"{command} {flags}", ((title, key),))


STEPS = {
    "targets": Step(
        "extract-targets --data DATA --split train --limit 20000 --out targets.zarr --views 1 "
        f"--scale 0.6 1.0 --texts --executor local {TEACHER}"
    ),
    "milan": Step(f"pretrain --cache targets.zarr --out runs/milan {STUDENT}"),
    "pixels": Step(f"pretrain --cache targets.zarr --out runs/pixels --objective pixels {STUDENT}"),
    "knn": _measured("knn", "k-NN, k 20", "k20"),
    "linear": _measured("linear-probe", "linear, logistic regression"),
    "few": _measured("few-shot", "linear, 10 images a class, 3 draws"),
    "published": _measured("linear-probe --protocol published", "linear, MILAN's protocol"),
    "dinov2": _measured("linear-probe --protocol dinov2 --epochs 20", "linear, DINOv2's protocol"),
    "attentive": _measured("attentive-probe", "attentive probe, a query a class"),
    "all": _measured("attentive-probe --tokens all", "the same, with the class token"),
    "one": _measured("attentive-probe --queries one", "attentive probe, one query"),
    "zero-shot": Step(
        f"zero-shot --checkpoint random,runs/milan,teacher --like runs/milan {TEACHER} "
        "--cache targets.zarr --val-data DATA --val-split test --limit 2000 --crop-share 1",
        (
            ("zero-shot, class token", "token_top1"),
            ("zero-shot, mean of patches", "mean_top1"),
        ),
    ),
    "finetune": _measured(
        "finetune", "fine-tuning, 3 epochs",
        flags=f"--checkpoint {STUDENTS} --like runs/milan {IMAGES} --epochs 3 --batch-size 64 "
        "--lr 1e-3 --layer-decay 0.8 --drop-path 0 --scale 0.6 1.0 --auto-augment none --erasing 0 "
        "--mixup 0 --cutmix 0 --report-to none --overwrite",
    ),
}  # fmt: skip


def table(out: Path) -> list[list[str]]:
    """Headings, then a row for each figure: percent and its 95 % interval, by encoder."""
    rows = [["protocol", *ENCODERS]]
    for name, step in STEPS.items():
        for title, key in step.rows:
            found = json.loads((out / f"tables/{name}.json").read_text())
            cells = [with_interval(found.get(one, {}), key) for one in ENCODERS.values()]
            rows.append([title, *cells])
    return rows


def main() -> None:
    """Run what is left, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10's Parquet files")
    parser.add_argument("--out", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--until", choices=STEPS, help="the last step to run")
    args = parser.parse_args()
    data, out = args.data.resolve(), args.out
    (out / "tables").mkdir(parents=True, exist_ok=True)
    in_a_fork(cifar_teacher.make, data, out / "teacher")
    figures = Figures(out / "steps.csv")
    for name, step in STEPS.items():
        run(figures, step.line + f" --out tables/{name}.json" * bool(step.rows), out, DATA=data)
        if name == args.until:
            return
    write_table(table(out), out)


if __name__ == "__main__":
    main()
