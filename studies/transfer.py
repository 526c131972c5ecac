"""What pretraining was worth for segmentation and detection, on small sets of real photographs.

    python -m studies.transfer --camvid FOLDER --bccd FOLDER --cifar10 runs/cifar10

The encoders are the random one, and the MILAN student and teacher of studies.cifar10, which must be
there (`python -m studies.cifar10 --until milan`). As there every step is a `milan` command that
runs once. Leaves table.md, table.csv and steps.csv (the lines with their seconds) in --out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from studies.steps import Figures, run, with_interval, write_table

CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
SEGMENT = (
    "segment --data CAMVID --val-data CAMVID --ignore 11 --classes camvid.txt --baseline none "
    "--report-to none"
)
LINEAR = f"{SEGMENT} --size 120 --batch-size 8 --lr 4e-3 --epochs 10"
UPERNET = (
    f"{SEGMENT} --size 96 --width 128 --protocol upernet --channels 32 --batch-size 4 --lr 1e-3 "
    "--epochs 8 --num-workers 0"
)
DETECT = (
    "detect --data BCCD --size 128 --anchor-scale 2 --width 48 --proposals 100 --samples 64 "
    "--epochs 8 --warmup-epochs 1 --batch-size 4 --set micro_batch=4 --lr 1e-3 --layer-decay 0.8 "
    "--schedule cosine --scale 0.8 1.25 --report-to none --num-workers 0"
)
MILAN, RANDOM = "--checkpoint MILAN", "--checkpoint random --like MILAN"
TEACHER = "--checkpoint teacher --teacher TEACHER --pretrained WEIGHTS"
ENCODERS = {"random encoder": "random", "MILAN": "milan", "teacher": "teacher"}
"""Heading -> the end of a step's name."""
ROWS = {
    "linear": (("linear head, mIoU", "miou"), ("the same, pixel accuracy", "pixel_accuracy")),
    "upernet": (("UPerNet, mIoU", "miou"), ("the same, pixel accuracy", "pixel_accuracy")),
    "detect": (("Faster R-CNN, box AP", "box_ap"), ("the same, AP50", "box_ap50")),
}
"""The beginning of a step's name -> its rows: (what it measures, key of its metrics)."""
STEPS = {
    "linear-milan": f"{LINEAR} --width 160 {MILAN}",
    "linear-random": f"{LINEAR} --width 160 {RANDOM}",
    "linear-teacher": f"{LINEAR} {TEACHER}",
    "upernet-milan": f"{UPERNET} {MILAN}",
    "upernet-random": f"{UPERNET} {RANDOM}",
    "detect-milan": f"{DETECT} {MILAN}",
    "detect-random": f"{DETECT} {RANDOM}",
}


def table(out: Path) -> list[list[str]]:
    """Headings, then a row for each figure: percent and its 95 % interval, by encoder."""
    rows = [["percent, 95 % over images", *ENCODERS]]
    for protocol, figures in ROWS.items():
        files = [out / f"{protocol}-{name}.json" for name in ENCODERS.values()]
        found = [json.loads(file.read_text()) if file.exists() else {} for file in files]
        rows += [
            [title, *(with_interval(metrics, key) for metrics in found)] for title, key in figures
        ]
    return rows


def main() -> None:
    """Run what is left, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--camvid", type=Path, required=True, help="CamVid in ADE20K's layout")
    parser.add_argument("--bccd", type=Path, required=True, help="BCCD with COCO's JSON")
    parser.add_argument("--cifar10", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "camvid.txt").write_text("\n".join(CLASSES.split()) + "\n")
    cifar = args.cifar10.resolve()
    folders = {
        "CAMVID": args.camvid.resolve(), "BCCD": args.bccd.resolve(), "MILAN": cifar / "runs/milan",
        "TEACHER": cifar / "teacher/config.json", "WEIGHTS": cifar / "teacher/model.safetensors",
    }  # fmt: skip
    figures = Figures(args.out / "steps.csv")
    for name, line in STEPS.items():
        run(figures, f"{line} --out {name}.json", args.out, **folders)
    write_table(table(args.out), args.out)


if __name__ == "__main__":
    main()
