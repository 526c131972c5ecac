"""What RILS is worth beside MILAN, pixels and plain CLIP: `python -m studies.rils`.

On the images and captions in demo/, or with --cifar10 on CIFAR-10 and sentences with the names of
its classes: one store, the same small ViT, the same images and epochs for every method; three
seeds. Whatever is done is skipped, so the same line goes on after a stop.

    WORK/targets.zarr            the store, with texts
         METHOD-SEED/            a run
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import milan
from milan.core.progress import NoProgress
from studies.setting import DEMO, PROBES, Setting, unless_stopped
from studies.steps import Figures, flags, markdown

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


@dataclass(frozen=True)
class Runs:
    """The runs of all methods on some images, in the folder `work`."""

    work: Path
    epochs: int
    setting: Setting = DEMO
    made: Path | None = None
    """The store, where it is there already."""

    @property
    def store(self) -> Path:
        """That of all methods."""
        return self.made or self.work / "targets.zarr"

    def extract(self) -> None:
        """Make the store, unless it is there."""
        if not self.made:
            self.setting.extract(self.store, views=1, scale=(1.0, 1.0), hflip=0.0, texts=True)

    def run(self, method: str, seed: int) -> Path:
        """The folder of a run."""
        return self.work / f"{method.replace(' ', '-')}-{seed}"

    def train(self, method: str, seed: int, **settings: Any) -> float:
        """Pretrain with a method's `settings`; CPU seconds."""
        run = self.run(method, seed)
        return self.setting.train(self.store, run, seed, epochs=self.epochs, **settings)

    def probe(self, method: str, seed: int, name: str) -> float:
        """A figure of frozen features, in percent."""
        kept: dict[str, Any] = {"features": str(self.work / "features" / f"{method}-{seed}")}
        if method == "random encoder":
            return self.setting.probe("random", name, like=str(self.run("MILAN", 0)), **kept)
        checkpoint = "teacher" if method == "teacher" else self.run(method, seed)
        return self.setting.probe(checkpoint, name, **kept)

    def by_words(self, method: str, seed: int) -> float:
        """Zero-shot, in percent."""
        checkpoint = "teacher" if method == "teacher" else str(self.run(method, seed))
        images = dict(self.setting.measured)  # all that are measured on; nothing is fitted
        for name in ("data", "split"):
            images.pop(name, None)
        images |= self.setting.teacher if method == "teacher" else {}
        found = milan.evaluate(
            "zero_shot", checkpoint, cache=str(self.store), crop_share=1.0, pictures=0,
            num_workers=1, progress=NoProgress(), **images,
        )  # fmt: skip
        return unless_stopped(found)[ZERO_SHOT.get(method, "mean_top1")]


def on_cifar10(data: Path, made: Path, work: Path) -> Runs:
    """Runs on CIFAR-10's Parquet files `data`, by the teacher and store that studies.cifar10 made.

    One pass over its 20,000 images is as many steps as two over the demo's.
    """
    teacher = made / "teacher"
    setting = Setting(
        name="cifar10",
        data={"data": str(data), "split": "train"},
        measured={
            "data": str(data), "split": "train", "val_data": str(data), "val_split": "test",
            "limit": 4000,
        },
        teacher={
            "teacher": str(teacher / "config.json"),
            "pretrained": str(teacher / "model.safetensors"),
        },
        student=DEMO.student | {"model_args": DEMO.student["model_args"] | {"patch_size": 8}},
    )  # fmt: skip
    return Runs(work, 1, setting, made / "targets.zarr")


def main() -> None:
    """All runs and their figures, seed by seed, then the table."""
    parser = flags("rils", __doc__)
    parser.add_argument("--epochs", type=int, default=2, help="of the demo's images")
    parser.add_argument("--cifar10", type=Path, help="its Parquet files; without it: demo/")
    parser.add_argument(
        "--made", type=Path, default=Path("runs/cifar10"), help="of studies.cifar10"
    )
    given = parser.parse_args()
    runs, figures = Runs(given.work, given.epochs), Figures(given.out)
    if given.cifar10:
        runs = on_cifar10(given.cifar10, given.made, given.work)
    runs.extract()
    quick, *slower = PROBES
    trained = [(method, seed) for seed in range(given.seeds) for method in METHODS]
    measured = [*trained, *((method, 0) for method in BESIDE)]
    for of in measured:
        if of in trained:
            figures.measure(*of, "CPU s", partial(runs.train, *of, **METHODS[of[0]]))
        figures.measure(*of, quick, partial(runs.probe, *of, quick))
        if of[0] not in ("pixels", "random encoder"):
            figures.measure(*of, "zero-shot", partial(runs.by_words, *of))
    for name in slower:
        for of in measured:
            figures.measure(*of, name, partial(runs.probe, *of, name))
    measures = (*PROBES, "zero-shot", "CPU s")
    rows = [[m, *(figures.cell(m, name) for name in measures)] for m in (*METHODS, *BESIDE)]
    print("\n" + markdown([["", *measures], *rows]))


if __name__ == "__main__":
    main()
