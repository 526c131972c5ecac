"""What pretraining was worth for segmentation and detection, on CamVid and BCCD.

    python -m studies.dense --camvid FOLDER --bccd FOLDER --cifar10 runs/cifar10 --out runs/dense

The encoders are the random one, and the MILAN student and teacher of studies.cifar10, which must be
there. As there every step is a `milan` command that runs once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from studies.steps import run

CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
SCENES = (
    "--data CAMVID --val-data CAMVID --ignore 11 --classes camvid.txt --batch-size 8 "
    "--baseline none --report-to none"
)
LINEAR = f"segment {SCENES} --size 120 --lr 4e-3 --epochs 10"
UPERNET = f"segment {SCENES} --size 96 --width 128 --protocol upernet --channels 32 --lr 1e-3"
BLOOD = (
    "detect --data BCCD --size 128 --anchor-scale 2 --width 48 --proposals 100 --samples 64 "
    "--warmup-epochs 1 --batch-size 8 --set micro_batch=8 --lr 1e-3 --layer-decay 0.8 "
    "--schedule cosine --scale 0.8 1.25 --report-to none"
)
RANDOM, MILAN = "--checkpoint random --like MILAN", "--checkpoint MILAN"
TEACHER = "--checkpoint teacher --teacher TEACHER --pretrained WEIGHTS"
STEPS = {
    "linear-milan": f"{LINEAR} --width 160 {MILAN}",
    "linear-random": f"{LINEAR} --width 160 {RANDOM}",
    "linear-teacher": f"{LINEAR} {TEACHER}",
    "upernet-milan": f"{UPERNET} --epochs 12 {MILAN}",
    "upernet-random": f"{UPERNET} --epochs 12 {RANDOM}",
    "detect-milan": f"{BLOOD} --epochs 12 {MILAN}",
    "detect-random": f"{BLOOD} --epochs 12 {RANDOM}",
}


def main() -> None:
    """Run what is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--camvid", type=Path, required=True)
    parser.add_argument("--bccd", type=Path, required=True)
    parser.add_argument("--cifar10", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--out", type=Path, default=Path("runs/dense"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "camvid.txt").write_text("\n".join(CLASSES.split()) + "\n")
    cifar = args.cifar10.resolve()
    folders = {
        "CAMVID": args.camvid.resolve(), "BCCD": args.bccd.resolve(), "MILAN": cifar / "runs/milan",
        "TEACHER": cifar / "teacher/config.json", "WEIGHTS": cifar / "teacher/model.safetensors",
    }  # fmt: skip
    for name, line in STEPS.items():
        run(name, f"{line} --out {name}.json", args.out, **folders)


if __name__ == "__main__":
    main()
