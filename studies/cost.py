"""What a store saves, and from when on: `python -m studies.cost`.

Measured: CPU seconds of `studies.online`'s runs, whose figures must be there, and of the extraction
before them. On paper, which is a prediction: ImageNet-1K, a student ViT-B/16, by operations.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from benchmarks.roofline import counted
from milan.core.progress import NoProgress
from milan.models.masking import random_mask
from milan.models.student import build_student
from pipeline.config import ExtractConfig
from pipeline.estimate.accelerators import view_flop
from pipeline.estimate.cost import EPOCHS
from pipeline.extraction.plan import plan
from studies import pictures
from studies.online import ONLINE
from studies.setting import Setting, add_images, small
from studies.steps import Figures, flags, markdown

STUDENTS = (1, 3, 10)
LONGER = (1, 10)
"""Times the epochs that were measured."""
TEACHERS = ("ViT-B-16-quickgelu", "ViT-L-14")
IMAGES = 1_281_167
"""Of ImageNet-1K."""
PUBLISHED_HOURS = 39 * 8
"""Of an A100, for 400 epochs of ImageNet-1K with ViT-B/16 as teacher and student (MILAN's
repository). Here it says how long an operation takes there."""
VIEWS = (4, 16)


def extraction(given: argparse.Namespace, setting: Setting) -> float:
    """CPU seconds of an extraction into a new store."""
    store = given.work / "cost.zarr"
    shutil.rmtree(store, ignore_errors=True)
    spent = setting.extract(
        store, codec="int8", views=given.views, limit=given.images, store_views="jpeg:95"
    )
    shutil.rmtree(store)
    return spent


def measured(given: argparse.Namespace, figures: Figures) -> list[list[str]]:
    """CPU seconds of some students with the teacher online, and by one store with its extraction.

    Runs of as many epochs as were measured, and of more by the same seconds an epoch.
    """
    runs = Figures(given.runs)
    online, cached = (runs.mean(method, "CPU s") / given.epochs for method in (ONLINE, "int8"))
    once = figures.mean("extraction", "CPU s")
    rows = [["students", *(f"{given.epochs * times} epochs: online / store" for times in LONGER)]]
    for count in STUDENTS:
        pairs = [
            (count * epochs * online, once + count * epochs * cached)
            for epochs in (given.epochs * times for times in LONGER)
        ]
        rows.append([str(count), *(f"{a:,.0f} / {b:,.0f} = {a / b:.2f}" for a, b in pairs)])
    pays = once / (online - cached)
    rows.append(["break-even", f"{pays:.1f} epochs, of all students together", ""])
    return rows


def count_operations(figures: Figures) -> None:
    """GFLOP of a view through each teacher and of an image in the student's step; bytes a view."""
    for name in TEACHERS:
        if figures.values(name, "GFLOP a view"):
            continue
        about = ExtractConfig("demo/data/test.parquet", teacher=name, pretrained="none", limit=256)
        work = plan(about, NoProgress())
        figures.keep(name, 0, "GFLOP a view", round(view_flop(work.teacher) / 1e9, 1))
        figures.keep(name, 0, "bytes a view", work.parts[0].spec.view_bytes())
    if not figures.values("student", "GFLOP a step"):
        student = build_student("vit_base_patch16_224", img_size=224, target_width=512)
        mask = random_mask(torch.rand(1, 196).clamp(0.01, 0.99), visible=49)
        forward = counted(student, torch.zeros(1, 3, 224, 224), mask)
        figures.keep("student", 0, "GFLOP a step", round(3 * forward, 1))


def hours(figures: Figures, teacher: str, views: int, students: int) -> tuple[float, float]:
    """A100 hours for ImageNet-1K: with the teacher online, and by one store with its extraction."""
    step = figures.value("student", 0, "GFLOP a step")
    view = figures.value(teacher, 0, "GFLOP a view")
    epoch = PUBLISHED_HOURS / EPOCHS / (step + figures.value(TEACHERS[0], 0, "GFLOP a view"))
    online = students * EPOCHS * (view + step) * epoch
    return online, (views * view + students * EPOCHS * step) * epoch


def on_paper(figures: Figures) -> list[list[str]]:
    """Store, extraction and `hours` by teacher and views."""
    rows = [["teacher", "views", "store", "extraction, A100 h", "break-even, epochs"]]
    rows[0] += [f"{n} student{'s' * (n > 1)}, A100 h: online / store" for n in STUDENTS]
    for name in TEACHERS:
        for views in VIEWS:
            size = IMAGES * views * figures.value(name, 0, "bytes a view")
            once = hours(figures, name, views, 0)[1]
            row = [name, str(views), f"{size / 1e12:.2f} TB", f"{once:,.1f}", str(views)]
            for count in STUDENTS:
                online, ours = hours(figures, name, views, count)
                row.append(f"{online:,.0f} / {ours:,.0f} = {online / ours:.2f}")
            rows.append(row)
    return rows


def main() -> None:
    """Measure, count, and print both tables."""
    parser = flags("cost", __doc__)
    add_images(parser)
    parser.add_argument("--runs", type=Path, default=Path("studies/results/online.csv"))
    parser.add_argument("--images", type=int, default=2000, help="as for studies.online")
    parser.add_argument("--epochs", type=int, default=4, help="as for studies.online")
    parser.add_argument("--views", type=int, default=4, help="as for studies.online")
    parser.add_argument("--picture", type=Path, default=Path("docs/pictures/study-cost.png"))
    given = parser.parse_args()
    setting, figures = small(given), Figures(given.out)
    for repeat in range(given.seeds):
        figures.measure("extraction", repeat, "CPU s", lambda: extraction(given, setting))
    count_operations(figures)
    print("\n" + markdown(measured(given, figures)) + "\n" + markdown(on_paper(figures)))
    counts = range(1, STUDENTS[-1] + 1)
    curves = {
        f"{name}, {how}": {n: hours(figures, name, VIEWS[0], n)[at] for n in counts}
        for name in TEACHERS
        for at, how in enumerate(("online", f"a store of {VIEWS[0]} views"))
    }
    pictures.costs(curves, given.picture)


if __name__ == "__main__":
    main()
