"""What a second teacher is worth: `python -m studies.teachers`.

The second teacher is a student of this project that was trained by pixels alone (MAE), exported and
extracted into the store beside CLIP. CLIP alone, it alone, and both at equal steps, also with
teacher dropping.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import milan
from milan.store.cache import TargetCache
from studies.setting import Setting, add_images, small
from studies.steps import Figures, flags, markdown

PIXELS: dict[str, Any] = {"objective": "pixels"}
SECOND = "second teacher"
MEASURES = ("k-NN", "linear")


def second_teacher(setting: Setting, store: Path, run: Path, given: argparse.Namespace) -> float:
    """Train it, and add its targets to the store; CPU seconds of the training."""
    clip = TargetCache(store).layers[0]
    spent = setting.train(store, run, 0, layer=clip, epochs=given.teacher_epochs, **PIXELS)
    folder = run.parent / "own"
    if not folder.exists():
        milan.export(str(run), out=str(folder), format="timm")
    own: dict[str, Any] = {"teacher": f"timm:local-dir:{folder}", "pretrained": None}
    setting.extract(store, views=given.views, limit=given.images, extend=True, **own)
    return spent


def rows_of(store: Path) -> dict[str, dict[str, Any]]:
    """Method -> settings, by the names of the layers."""
    clip, own = TargetCache(store).layers
    both: dict[str, Any] = {"layer": [clip, own]}
    return {
        "CLIP": {"layer": clip},
        "self-supervised": {"layer": own},
        "both": both,
        "both, dropping 0.5": both | {"teacher_dropping": 0.5},
    }


def main() -> None:
    """All runs and their figures, seed by seed, then the table."""
    parser = flags("teachers", __doc__)
    add_images(parser)
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--teacher-epochs", type=int, default=12)
    given = parser.parse_args()
    setting, figures = small(given), Figures(given.out)
    work = given.work / f"teachers-{setting.name}-{given.images}-{given.views}"
    store, second = work / "targets.zarr", work / "second"
    if len(TargetCache(store).layers if store.exists() else []) < 2:
        setting.extract(store, views=given.views, limit=given.images)
    train = partial(second_teacher, setting, store, second, given)
    figures.run(SECOND, 0, train, setting.probes(second, MEASURES))
    train()  # its targets have to be there, if its figures are known
    methods = rows_of(store)
    for seed in range(given.seeds):
        for method, settings in methods.items():
            run = work / f"{method.replace(', ', '-').replace(' ', '-')}-{given.epochs}-{seed}"
            learn = partial(setting.train, store, run, seed, epochs=given.epochs, **settings)
            figures.run(method, seed, learn, setting.probes(run, MEASURES))
    measures = (*MEASURES, "CPU s")
    rows = [[m, *(figures.cell(m, name) for name in measures)] for m in (*methods, SECOND)]
    print("\n" + markdown([["", *measures], *rows]))


if __name__ == "__main__":
    main()
