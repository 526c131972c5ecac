"""What the options over a cache are worth: `python -m studies.options --options both phi-s`.

Each at the steps of the published objective, and at its time: with as many epochs as take as many
CPU seconds. First all at equal steps, option by option with all seeds of each, so that a stopped
call leaves whole rows.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

from milan.store.cache import TargetCache
from studies.setting import Setting, add_images, small
from studies.steps import Figures, flags, markdown

PUBLISHED = "published"
BLOCK = 4
"""The teacher's inner block; the demo's has six."""
OUTPUT, INNER = "teacher/int8", f"teacher@{BLOCK}/int8"
"""Layers of the store."""
OPTIONS: dict[str, dict[str, Any]] = {
    PUBLISHED: {},
    "both": {"predict": "both"},
    "visible": {"predict": "visible"},
    "deep": {"deep_supervision": "1,2"},
    "phi-s": {"target_norm": "phi-s"},
    "smooth-l1": {"loss": "smooth-l1"},
    "relation": {"loss": "relation"},
    "quarter": {"decode_fraction": 0.25},
    "masked": {"predict": "masked"},
    "class": {"class_weight": 0.5},
    "both-class": {"predict": "both", "class_weight": 0.5},
    "layernorm": {"target_norm": "layernorm"},
    "standardise": {"target_norm": "standardise"},
    "smooth-l1-phi-s": {"loss": "smooth-l1", "target_norm": "phi-s"},
    "inner": {"layer": INNER},
    "inner-relation": {"layer": INNER, "loss": "relation"},
}
"""Name -> what differs from the published objective."""
PROBED = ("k-NN", "linear")
TUNED = "fine-tuned"
MEASURES = (*PROBED, TUNED)


def at_equal_time(name: str) -> str:
    """The method whose epochs take as long as the published objective's."""
    return f"{name}, equal time"


def measure(
    given: argparse.Namespace, setting: Setting, figures: Figures, name: str, epochs: int,
    method: str,
) -> None:  # fmt: skip
    """An option with so many epochs, all seeds."""
    store = setting.store(given.work, codec="int8", views=given.views, images=given.images)
    how = {"layer": OUTPUT} | OPTIONS[name]
    if how["layer"] not in TargetCache(store).layers:
        setting.extract(
            store, codec="int8", views=given.views, limit=given.images, store_views="jpeg:95",
            extend=True, teacher_layer=BLOCK,
        )  # fmt: skip
    for seed in range(given.seeds):
        run = given.work / f"options/{name}-{given.images}-{epochs}-{seed}"
        train = partial(
            setting.train, store, run, seed, epochs=epochs, warmup_epochs=epochs / 10, **how
        )  # fmt: skip
        tune = partial(
            setting.fine_tuned, run, seed, epochs=given.tuning, images=given.tuned_images
        )
        figures.run(method, seed, train, setting.probes(run, PROBED) | {TUNED: tune})
        figures.keep(method, seed, "epochs", epochs)


def rows(figures: Figures, names: Sequence[str]) -> list[list[str]]:
    """The table: equal steps, and beside it equal time."""
    found = [
        ["", *MEASURES, "CPU s", "epochs at equal time", *(f"{m}, equal time" for m in MEASURES)]
    ]
    for name in names:
        timed = at_equal_time(name) if name != PUBLISHED else name
        found.append([
            name, *(figures.cell(name, m) for m in (*MEASURES, "CPU s")),
            figures.cell(timed, "epochs", "{:.0f}").partition(" ")[0],
            *(figures.cell(timed, m) for m in MEASURES),
        ])  # fmt: skip
    return found


def main() -> None:
    """All runs and their figures, option by option, then the table."""
    parser = flags("options", __doc__)
    add_images(parser)
    parser.add_argument("--options", nargs="+", choices=OPTIONS, default=list(OPTIONS))
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--views", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--tuning", type=int, default=3, help="epochs of fine-tuning")
    parser.add_argument("--tuned-images", type=int, default=1000)
    given = parser.parse_args()
    setting, figures = small(given), Figures(given.out)
    names = list(dict.fromkeys([PUBLISHED, *given.options]))
    for name in names:
        measure(given, setting, figures, name, given.epochs, name)
    for name in names[1:]:
        epochs = figures.epochs_at_equal_time(name, PUBLISHED, given.epochs)
        timed = at_equal_time(name)
        if epochs == given.epochs:  # the same runs
            for seed in range(given.seeds):
                for what in (*MEASURES, "CPU s", "epochs"):
                    figures.keep(timed, seed, what, figures.value(name, seed, what))
        else:
            measure(given, setting, figures, name, epochs, timed)
    print("\n" + markdown(rows(figures, names)))


if __name__ == "__main__":
    main()
