"""What a second teacher is worth: `python -m studies.teachers`.

The demo's images, CLIP and student, as `studies.rils` has them. The second teacher is a student of
this project that was trained by pixels alone (MAE), exported and extracted into the same store:
CLIP alone, it alone, and both; three seeds. Whatever is done is skipped, so the same line goes on
after a stop.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import milan
from milan.core.progress import NoProgress
from studies.rils import DATA, METHODS, Figures, extract, probe, run_of, train
from studies.steps import markdown

CLIP, OWN = "teacher/int8", "timm:own/int8"
SECOND = "pixels teacher"
"""The run that becomes the second teacher."""
ROWS: dict[str, dict[str, Any]] = {
    "CLIP": {"layer": CLIP},
    "self-supervised": {"layer": OWN},
    "both": {"layer": [CLIP, OWN]},
    "both, dropping 0.5": {"layer": [CLIP, OWN], "teacher_dropping": 0.5},
}
MEASURES = ("k-NN", "linear")


def second_teacher(work: Path, epochs: int) -> None:
    """Train it, and add its targets to the store."""
    train(work, SECOND, 0, epochs, **METHODS["pixels"])
    folder = work / "own"
    if not folder.exists():
        milan.export(str(run_of(work, SECOND, 0)), out=str(folder), format="timm")
    milan.extract_targets(
        DATA["data"], out=str(work / "targets.zarr"), views=1, scale=(1.0, 1.0), hflip=0.0,
        extend=True, teacher=f"timm:local-dir:{folder}", executor="local", progress=NoProgress(),
    )  # fmt: skip


def main() -> None:
    """All runs and their figures, seed by seed, then the table."""
    parser = argparse.ArgumentParser(prog="python -m studies.teachers", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/studies-teachers"))
    parser.add_argument("--out", type=Path, default=Path("studies/results/teachers.csv"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--teacher-epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    given = parser.parse_args()
    work, figures = given.work, Figures(given.out)
    extract(work)
    second_teacher(work, given.teacher_epochs)
    for measure in MEASURES:
        figures.measure(SECOND, 0, measure, partial(probe, work, SECOND, 0, measure))
    for seed in range(given.seeds):
        for row in given.rows:
            name, settings = row.replace(", ", "-"), METHODS["MILAN"] | ROWS[row]
            pretrain = partial(train, work, name, seed, given.epochs, **settings)
            figures.measure(row, seed, "CPU s", pretrain)
            for measure in MEASURES:
                figures.measure(row, seed, measure, partial(probe, work, name, seed, measure))
    measures = (*MEASURES, "CPU s")
    rows = [[row, *(figures.cell(row, m) for m in measures)] for row in (*given.rows, SECOND)]
    print("\n" + markdown([["", *measures], *rows]))


if __name__ == "__main__":
    main()
