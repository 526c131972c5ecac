"""What RILS is worth beside MILAN, pixels and plain CLIP: `python -m studies.rils`.

On the images and captions in demo/: one store, the same small ViT, the same images and epochs for
every method; three seeds. Whatever is done is skipped, so the same line goes on after a stop.

    WORK/targets.zarr            the store, with texts
         METHOD-SEED/            a run
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import milan
from milan.core.progress import NoProgress
from studies.setting import DEMO, PROBES, unless_stopped
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


def run_of(work: Path, method: str, seed: int) -> Path:
    """The folder of a run."""
    return work / f"{method.replace(' ', '-')}-{seed}"


def train(work: Path, method: str, seed: int, epochs: int, **settings: Any) -> float:
    """Pretrain with a method's `settings`; CPU seconds."""
    store, run = work / "targets.zarr", run_of(work, method, seed)
    return DEMO.train(store, run, seed, epochs=epochs, **settings)


def probe(work: Path, method: str, seed: int, name: str) -> float:
    """A figure of frozen features, in percent."""
    kept: dict[str, Any] = {"features": str(work / "features" / f"{method}-{seed}")}
    if method == "random encoder":
        return DEMO.probe("random", name, like=str(run_of(work, "MILAN", 0)), **kept)
    checkpoint = "teacher" if method == "teacher" else run_of(work, method, seed)
    return DEMO.probe(checkpoint, name, **kept)


def by_words(work: Path, method: str, seed: int) -> float:
    """Zero-shot, in percent."""
    checkpoint = "teacher" if method == "teacher" else str(run_of(work, method, seed))
    found = milan.evaluate(
        "zero_shot", checkpoint, cache=str(work / "targets.zarr"),
        val_data=DEMO.measured["val_data"], crop_share=1.0, pictures=0, num_workers=1,
        progress=NoProgress(),
    )  # fmt: skip
    return unless_stopped(found)[ZERO_SHOT.get(method, "mean_top1")]


def extract(work: Path) -> None:
    """The store of all methods."""
    DEMO.extract(work / "targets.zarr", views=1, scale=(1.0, 1.0), hflip=0.0, texts=True)


def main() -> None:
    """All runs and their figures, seed by seed, then the table."""
    parser = flags("rils", __doc__)
    parser.add_argument("--epochs", type=int, default=2)
    given = parser.parse_args()
    work, figures = given.work, Figures(given.out)
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
    rows = [[m, *(figures.cell(m, name) for name in measures)] for m in (*METHODS, *BESIDE)]
    print("\n" + markdown([["", *measures], *rows]))


if __name__ == "__main__":
    main()
