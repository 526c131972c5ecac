"""What pretraining was worth for segmentation and detection, on small sets of real photographs.

    python -m studies.transfer --camvid FOLDER --bccd FOLDER --cifar10 runs/cifar10

The encoders are the random one, and the MILAN student and teacher of studies.cifar10, which must be
there (`python -m studies.cifar10 --until milan`). As there every step is a `milan` command that
runs once. Leaves table.md, table.csv, figures.csv (of every seed) and steps.csv (the lines with
their seconds) in --out.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

from studies.steps import Figures, run, spread, with_interval, write_table

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
    "--epochs 24 --warmup-epochs 1 --batch-size 4 --set micro_batch=4 --lr 1e-3 --layer-decay 0.8 "
    "--schedule cosine --scale 0.8 1.25 --baseline none --report-to none --num-workers 0"
)
MILAN, RANDOM = "--checkpoint MILAN", "--checkpoint random --like MILAN"
TEACHER = "--checkpoint TEACHER"
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
    "linear-teacher": f"{LINEAR} --width 160 {TEACHER}",
    "upernet-milan": f"{UPERNET} {MILAN}",
    "upernet-random": f"{UPERNET} {RANDOM}",
    "detect-milan": f"{DETECT} {MILAN}",
    "detect-random": f"{DETECT} {RANDOM}",
    "detect-teacher": f"{DETECT} {TEACHER}",
    "upernet-teacher": f"{UPERNET} {TEACHER}",
}


def step(name: str, seed: int) -> str:
    """A step of a seed; its metrics have this name."""
    return f"{name}-{seed}" if seed else name


def found(out: Path, name: str) -> dict[int, dict[str, Any]]:
    """Metrics of a step by seed, as far as they are there."""
    files = {seed: out / f"{step(name, seed)}.json" for seed in range(100)}
    return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}


def cell(metrics: list[dict[str, Any]], key: str) -> str:
    """Mean and standard deviation over seeds; of one seed the figure with its interval."""
    if len(metrics) < 2:
        return with_interval(metrics[0] if metrics else {}, key)
    return f"{spread([one[key] for one in metrics])} ({len(metrics)} seeds)"


def table(out: Path) -> list[list[str]]:
    """Headings, then a row for each figure, in percent, by encoder."""
    rows = [["percent", *ENCODERS]]
    for protocol, figures in ROWS.items():
        seeds = [list(found(out, f"{protocol}-{n}").values()) for n in ENCODERS.values()]
        rows += [[title, *(cell(metrics, key) for metrics in seeds)] for title, key in figures]
    return rows


def write_figures(out: Path) -> None:
    """figures.csv: every figure of every seed, with its interval over images."""
    with open(out / "figures.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "seed", "measure", "value", "low", "high"])
        for name in STEPS:
            for seed, metrics in found(out, name).items():
                for _, key in ROWS[name.partition("-")[0]]:
                    interval = metrics.get(f"{key}_interval") or ("", "")
                    writer.writerow([name, seed, key, metrics[key], *interval])


def main() -> None:
    """Run what is left, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--camvid", type=Path, required=True, help="CamVid in ADE20K's layout")
    parser.add_argument("--bccd", type=Path, required=True, help="BCCD with COCO's JSON")
    parser.add_argument("--cifar10", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--out", type=Path, default=Path("runs/transfer"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=STEPS, default=list(STEPS), help="steps")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "camvid.txt").write_text("\n".join(CLASSES.split()) + "\n")
    cifar = args.cifar10.resolve()
    folders = {
        "CAMVID": args.camvid.resolve(), "BCCD": args.bccd.resolve(), "MILAN": cifar / "runs/milan",
        "TEACHER": cifar / "teacher",
    }  # fmt: skip
    figures = Figures(args.out / "steps.csv")
    for seed in range(args.seeds):
        for name in args.only:
            drawn = f" --seed {seed}" if seed else ""
            run(figures, f"{STEPS[name]}{drawn} --out {step(name, seed)}.json", args.out, **folders)
    write_figures(args.out)
    write_table(table(args.out), args.out)


if __name__ == "__main__":
    main()
