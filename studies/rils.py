"""What RILS is worth beside MILAN, pixels and plain CLIP: `python -m studies.rils`.

On the images and captions in demo/: one store, the same small ViT, the same images and epochs for
every method; three seeds. Whatever is done is skipped, so the same line goes on after a stop.

    WORK/targets.zarr            the store, with texts
         METHOD-SEED/            a run, and its features
         rils.csv                method, seed, measure, value: a line for every figure
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import milan
from milan.core.progress import NoProgress
from milan.core.signals import REQUEUE
from pipeline.teachers.frozen import frozen_teacher

DATA: dict[str, Any] = {
    "data": "demo/data/train.parquet", "val_data": "demo/data/test.parquet", "limit": 4000
}  # fmt: skip
TEACHER = {
    "teacher": "demo/teacher/config.json", "pretrained": "demo/teacher/model.safetensors"
}  # fmt: skip
STUDENT: dict[str, Any] = {
    "model_args": {"patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": 4},
    "batch_size": 64, "warmup_epochs": 0.5, "num_workers": 0, "report_to": "none",
    "picture_every": 1000, "weight_decay": 0.05,
}  # fmt: skip
# Learning rates: the demo's for what has a frozen or pixel target, those of the training of the
# demo's teacher (demo/train_teacher.py) for what learns from captions. None was tuned here.
SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 4}
METHODS: dict[str, dict[str, Any]] = {
    "MILAN": {"objective": "milan", "decoder": SMALL, "lr": 4e-3},
    "pixels": {"objective": "pixels", "decoder": SMALL, "lr": 4e-3},
    "RILS": {"objective": "rils", "lr": 1e-3},
    "rils-cached": {
        "objective": "rils-cached", "decoder": SMALL, "lr": 4e-3, "objective_args": {"draws": 512},
    },
    "plain CLIP": {"objective": "rils", "lr": 1e-3, "objective_args": {"weight": 0}},
}  # fmt: skip
BESIDE = ("random encoder", "teacher")
ZERO_SHOT = {"MILAN": "token_top1", "rils-cached": "mean_top1", "teacher": "token_top1"}
"""What is compared with texts: the class token where it is trained, else the mean of patches."""
PROBES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "k-NN": ("knn", "k20", {}),
    "linear": ("linear_probe", "top1", {}),
    "linear, 10 %": ("linear_probe", "top1", {"fraction": 0.1, "draws": 3}),
    "linear, 1 %": ("linear_probe", "top1", {"fraction": 0.01, "draws": 3}),
    "attentive": ("attentive_probe", "top1", {"epochs": 4}),
}
"""measure -> (protocol, figure, settings)"""


class Figures:
    """The figures of a file, each written as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path, self.known = path, dict[tuple[str, str, str], float]()
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                self.known = {
                    (row["method"], row["seed"], row["measure"]): float(row["value"])
                    for row in csv.DictReader(file)
                }

    def measure(self, method: str, seed: int, name: str, find: Callable[[], float]) -> None:
        """Find a figure, if it is not known."""
        key = method, str(seed), name
        if key in self.known:
            return
        self.known[key] = value = find()
        new = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(("method", "seed", "measure", "value"))
            writer.writerow((*key, value))
        print(f"{method}, seed {seed}, {name}: {value}", flush=True)

    def cell(self, method: str, name: str) -> str:
        """Mean and standard deviation over the seeds, as far as they are known."""
        found = [v for (m, _, n), v in self.known.items() if (m, n) == (method, name)]
        if len(found) < 2:
            return f"{found[0]:.1f}" if found else "-"
        return f"{statistics.mean(found):.1f} ± {statistics.stdev(found):.1f}"


def train(work: Path, method: str, seed: int, epochs: int, **settings: Any) -> float:
    """Pretrain with a method's `settings`, or go on; CPU seconds, with those of stopped calls."""
    run = run_of(work, method, seed)
    before, began = run / "cpu_seconds", time.process_time()
    spent = float(before.read_text()) if before.exists() else 0.0
    found = milan.pretrain(
        str(work / "targets.zarr"), out=str(run), epochs=epochs, seed=seed, progress=NoProgress(),
        **STUDENT | settings,
    )  # fmt: skip
    spent += time.process_time() - began
    before.write_text(str(spent))
    unless_stopped(found)
    return round(spent, 1)


def unless_stopped(found: dict[str, Any]) -> dict[str, Any]:
    """The figures of a call that has ended. Exits with 75 after one that was asked to stop."""
    if "stopped_by" in found:
        raise SystemExit(REQUEUE)
    return found


def run_of(work: Path, method: str, seed: int) -> Path:
    """The folder of a run."""
    return work / f"{method.replace(' ', '-')}-{seed}"


def probe(work: Path, method: str, seed: int, name: str) -> float:
    """A figure of frozen features, in percent."""
    protocol, figure, settings = PROBES[name]
    checkpoint, more = str(run_of(work, method, seed)), dict[str, Any]()
    if method == "random encoder":
        checkpoint, more = "random", {"like": str(run_of(work, "MILAN", 0))}
    elif method == "teacher":
        checkpoint, more = "teacher", TEACHER
    found = milan.evaluate(
        protocol, checkpoint, baseline="none", crop_share=1.0, num_workers=1, progress=NoProgress(),
        features=str(work / "features" / f"{method}-{seed}"), load_teacher=frozen_teacher,
        **DATA, **settings, **more,
    )  # fmt: skip
    return unless_stopped(found)[figure]


def by_words(work: Path, method: str, seed: int) -> float:
    """Zero-shot, in percent."""
    checkpoint = "teacher" if method == "teacher" else str(run_of(work, method, seed))
    found = milan.evaluate(
        "zero_shot", checkpoint, cache=str(work / "targets.zarr"), val_data=DATA["val_data"],
        crop_share=1.0, pictures=0, num_workers=1, progress=NoProgress(),
    )  # fmt: skip
    return unless_stopped(found)[ZERO_SHOT.get(method, "mean_top1")]


def extract(work: Path) -> None:
    """The store of all methods."""
    milan.extract_targets(
        DATA["data"], out=str(work / "targets.zarr"), views=1, scale=(1.0, 1.0), hflip=0.0,
        texts=True, executor="local", progress=NoProgress(), **TEACHER,
    )  # fmt: skip


def main() -> None:
    """All runs and their figures, seed by seed, then the table."""
    parser = argparse.ArgumentParser(prog="python -m studies.rils", description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("runs/studies-rils"))
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    work, figures = given.work, Figures(given.work / "rils.csv")
    extract(work)
    quick, *slower, longest = PROBES
    runs = [(method, seed) for seed in range(given.seeds) for method in METHODS]
    measured = [*runs, *((method, 0) for method in BESIDE)]
    for of in measured:
        if of in runs:
            figures.measure(*of, "CPU s", partial(train, work, *of, given.epochs, **METHODS[of[0]]))
        figures.measure(*of, quick, partial(probe, work, *of, quick))
        if of[0] not in ("pixels", "random encoder"):
            figures.measure(*of, "zero-shot", partial(by_words, work, *of))
    for of in measured:
        for name in slower:
            figures.measure(*of, name, partial(probe, work, *of, name))
    for method in (*METHODS, *BESIDE):  # of one seed: it takes as long as all others together
        figures.measure(method, 0, longest, partial(probe, work, method, 0, longest))
    measures = (*PROBES, "zero-shot", "CPU s")
    print("\n| | " + " | ".join(measures) + " |\n|" + "---|" * (len(measures) + 1))
    for method in (*METHODS, *BESIDE):
        print(f"| {method} | " + " | ".join(figures.cell(method, m) for m in measures) + " |")


if __name__ == "__main__":
    main()
