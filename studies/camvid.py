"""What pretraining was worth for segmentation: a linear head on three frozen encoders, on CamVid.

    python -m studies.camvid --data FOLDER --cifar10 runs/cifar10 --out runs/camvid

The encoders are the random one, and the MILAN student and teacher of studies.cifar10, which must be
there. As there every step is a `milan` command that runs once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from studies.steps import Figures, run

CLASSES = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
LINEAR = (
    "segment --data CAMVID --val-data CAMVID --ignore 11 --classes camvid.txt --batch-size 8 "
    "--baseline none --report-to none --size 120 --lr 4e-3 --epochs 10"
)
STEPS = {
    "linear-milan": f"{LINEAR} --width 160 --checkpoint MILAN",
    "linear-random": f"{LINEAR} --width 160 --checkpoint random --like MILAN",
    "linear-teacher": f"{LINEAR} --checkpoint teacher --teacher TEACHER --pretrained WEIGHTS",
}


def main() -> None:
    """Run what is left."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="CamVid in ADE20K's layout")
    parser.add_argument("--cifar10", type=Path, default=Path("runs/cifar10"))
    parser.add_argument("--out", type=Path, default=Path("runs/camvid"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "camvid.txt").write_text("\n".join(CLASSES.split()) + "\n")
    cifar = args.cifar10.resolve()
    folders = {
        "CAMVID": args.data.resolve(), "MILAN": cifar / "runs/milan",
        "TEACHER": cifar / "teacher/config.json", "WEIGHTS": cifar / "teacher/model.safetensors",
    }  # fmt: skip
    figures = Figures(args.out / "steps.csv")
    for name, line in STEPS.items():
        run(figures, f"{line} --out {name}.json", args.out, **folders)


if __name__ == "__main__":
    main()
