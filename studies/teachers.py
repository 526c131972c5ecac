"""What a second teacher is worth: `python -m studies.teachers`.

The second teacher is a student of this project that was trained by pixels alone (MAE), exported and
extracted into the store beside CLIP. CLIP alone, it alone, and both: at equal steps, with dropping,
and in the time of one.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import milan
from milan.store.cache import TargetCache
from studies.setting import Setting, add_images, small
from studies.steps import Figures, Probe, flags, markdown

CLIP, OWN = "teacher/int8", "timm:own/int8"
SECOND = "second teacher"
METHODS: dict[str, dict[str, Any]] = {
    "CLIP": {"layer": CLIP},
    "second teacher alone": {"layer": OWN},
    "both": {"layer": [CLIP, OWN]},
    "both, dropping 0.5": {"layer": [CLIP, OWN], "teacher_dropping": 0.5},
}
TIMED = "both, equal time"
PROBED = ("k-NN", "linear")
TUNED = "fine-tuned"


def train_second(given: argparse.Namespace, setting: Setting, work: Path) -> float:
    """Train the second teacher on CLIP's store, for its images alone; CPU seconds."""
    store = work / "targets.zarr"
    if not store.exists():
        setting.extract(store, views=given.views, limit=given.images)
    return setting.train(
        store, work / SECOND, 0, epochs=given.teacher_epochs, layer=CLIP, objective="pixels"
    )


def store_of_both(given: argparse.Namespace, setting: Setting, work: Path) -> Path:
    """The store with the targets of both, made if it is not there."""
    store, folder = work / "targets.zarr", work / "own"
    if not folder.exists():
        train_second(given, setting, work)
        milan.export(str(work / SECOND), out=str(folder), format="timm")
    if OWN not in TargetCache(store).layers:
        own: dict[str, Any] = {"teacher": f"timm:local-dir:{folder}", "pretrained": None}
        setting.extract(store, views=given.views, limit=given.images, extend=True, **own)
    return store


def main() -> None:
    """All runs and their figures, seed by seed, then the table."""
    parser = flags("teachers", __doc__)
    add_images(parser)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--teacher-epochs", type=int, default=12)
    parser.add_argument("--tuning", type=int, default=3, help="epochs of fine-tuning")
    given = parser.parse_args()
    setting, figures = small(given), Figures(given.out)
    work = given.work / f"teachers/{setting.name}-{given.images}-{given.views}"
    tuned = partial(setting.fine_tuned, epochs=given.tuning, images=given.measured)

    def probes(run: Path, seed: int) -> dict[str, Probe]:
        return setting.probes(run, PROBED) | {TUNED: partial(tuned, run, seed)}

    figures.run(SECOND, 0, lambda: train_second(given, setting, work), probes(work / SECOND, 0))

    def measure(method: str, how: dict[str, Any], epochs: int, seed: int) -> None:
        run = work / f"{method.replace(', ', '-').replace(' ', '-')}-{epochs}-{seed}"

        def train() -> float:
            return setting.train(
                store_of_both(given, setting, work), run, seed, epochs=epochs, **how
            )

        figures.run(method, seed, train, probes(run, seed))

    for seed in range(given.seeds):
        for method, how in METHODS.items():
            measure(method, how, given.epochs, seed)
    epochs = figures.epochs_at_equal_time("both", "CLIP", given.epochs)
    for seed in range(given.seeds):
        measure(TIMED, METHODS["both"], epochs, seed)
    measures = (*PROBED, TUNED, "CPU s")
    rows = [[m, *(figures.cell(m, name) for name in measures)] for m in (*METHODS, TIMED, SECOND)]
    print("\n" + markdown([["", *measures], *rows]) + f"\n{TIMED}: {epochs} epochs")


if __name__ == "__main__":
    main()
