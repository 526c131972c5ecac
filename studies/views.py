"""How many views, in how many bytes: `python -m studies.views`.

Students of equal steps on stores of 1 to 8 views by each codec, and one that sees a view in every
epoch that it never saw before, with the teacher in every step. Leaves a picture: accuracy against
bytes an image, with the front of those that nothing smaller beats.
"""

from __future__ import annotations

import argparse
import os
import shutil
from functools import partial
from pathlib import Path

from milan.store.cache import TargetCache
from pipeline.copy_store import copy_store
from pipeline.prune import Drop, prune
from studies import pictures
from studies.online import online
from studies.setting import Setting, add_images, small
from studies.steps import Figures, Probe, flags, markdown

CODECS = ("float16", "int8", "pq:32", "pq:16")
FRESH = "a new view in every epoch, teacher online"
PROBED = ("k-NN", "linear")
TUNED = "fine-tuned"
BYTES = "bytes an image"


def store_of(given: argparse.Namespace, setting: Setting, codec: str, views: int) -> Path:
    """A store of the first `views` of the most views: extracted once, and cut."""
    most = max(given.keep)
    whole = setting.store(given.work, codec=codec, views=most, images=given.images)
    cut = whole.with_name(whole.name.replace(f"-{most}.zarr", f"-{views}.zarr"))
    if cut.exists():
        return cut
    building = cut.with_name(f"{cut.name}-building")
    shutil.rmtree(building, ignore_errors=True)
    copy_store(whole, building)
    prune(building, Drop(views=views), agree=lambda decision: True)
    os.rename(building, cut)
    return cut


def measure(given: argparse.Namespace, setting: Setting, figures: Figures, seed: int) -> None:
    """All stores by one seed."""
    cells = [(codec, views) for views in given.keep for codec in given.codecs]
    for codec, views in [*cells, (FRESH, given.epochs)]:
        method = FRESH if codec == FRESH else name_of(codec, views)
        run = given.work / f"views/{method.replace(' ', '-').replace(':', '')}-{seed}"

        def train(codec: str = codec, views: int = views, run: Path = run) -> float:
            if codec == FRESH:
                how = online(setting)
                store = setting.store(given.work, codec="float16", views=views, images=given.images)
            else:
                how, store = {}, store_of(given, setting, codec, views)
                size = TargetCache(store).spec.view_bytes() * views
                figures.keep(name_of(codec, views), 0, BYTES, size)
            return setting.train(
                store, run, seed, epochs=given.epochs, warmup_epochs=given.epochs / 10, **how
            )

        probes: dict[str, Probe] = setting.probes(run, PROBED)
        if given.tuning:
            probes[TUNED] = partial(
                setting.fine_tuned, run, seed, epochs=given.tuning, images=given.measured
            )
        figures.run(method, seed, train, probes)


def name_of(codec: str, views: int) -> str:
    """What a store is called in the table."""
    return f"{codec}, {views} view{'s' * (views > 1)}"


def front(points: dict[str, tuple[float, float]]) -> list[str]:
    """Names of those (bytes, accuracy) that are better than all that take no more bytes."""
    chosen: list[str] = []
    best = float("-inf")
    for name, (_, accuracy) in sorted(points.items(), key=lambda item: (item[1][0], -item[1][1])):
        if accuracy > best:
            chosen.append(name)
            best = accuracy
    return chosen


def main() -> None:
    """All runs and their figures, seed by seed, then the table and the picture."""
    parser = flags("views", __doc__)
    add_images(parser)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--keep", type=int, nargs="+", default=[1, 2, 4, 8], help="views")
    parser.add_argument("--codecs", nargs="+", default=CODECS)
    parser.add_argument("--tuning", type=int, default=3, help="epochs of fine-tuning; 0: none")
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/study-views.png"))
    given = parser.parse_args()
    setting, figures = small(given), Figures(given.out)
    for seed in range(given.seeds):
        measure(given, setting, figures, seed)
    measures = [*PROBED, TUNED] if given.tuning else PROBED
    names = [name_of(codec, views) for codec in given.codecs for views in given.keep]
    points = {
        m: {name: (figures.value(name, 0, BYTES), figures.mean(name, m)) for name in names}
        for m in measures
    }
    fronts = {m: front(points[m]) for m in measures}
    rows = [["store", BYTES, *measures, "on the front"]]
    for name in [*names, FRESH]:
        size = "" if name == FRESH else f"{figures.value(name, 0, BYTES):,.0f}"
        on = ", ".join(m for m in measures if name in fronts[m])
        rows.append([name, size, *(figures.cell(name, m) for m in measures), on])
    print("\n" + markdown(rows))
    pictures.fronts(figures, points, fronts, FRESH, given.picture)


if __name__ == "__main__":
    main()
