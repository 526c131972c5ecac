"""The studies' pictures: colours that the colour-blind tell apart (Okabe and Ito), and in print.

Each series has a sign of its own too, so that none is told by colour alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from studies.steps import Figures

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
SIGNS = ("o", "s", "^", "D", "v", "P", "x")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), "-", "--")


@contextmanager
def drawn(path: Path, panels: int, *, height: float = 3.2) -> Iterator[Any]:
    """Axes side by side, written as a picture in the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, panels, figsize=(4.2 * panels, height), squeeze=False, layout="constrained"
    )
    try:
        yield list(axes[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110, metadata={"Software": None})
    finally:
        pyplot.close(figure)


def losses(curves: dict[str, dict[int, float]], reference: str, path: Path) -> None:
    """Curves by method, and beside them how far each is from the `reference`."""
    with drawn(path, 2) as (left, right):
        for at, (method, curve) in enumerate(curves.items()):
            style: dict[str, Any] = {
                "color": COLOURS[at], "linestyle": DASHES[at], "label": method, "linewidth": 1.4
            }  # fmt: skip
            left.plot(list(curve), list(curve.values()), **style)
            apart = [abs(loss - curves[reference][step]) for step, loss in curve.items()]
            if method != reference:
                right.plot(list(curve), [max(one, 1e-7) for one in apart], **style)
        left.set(xlabel="step", ylabel="loss", title="training loss, seed 0")
        right.set(xlabel="step", yscale="log", title=f"difference to “{reference}”")
        left.legend(fontsize=8)
        right.legend(fontsize=8)


def costs(curves: dict[str, dict[int, float]], path: Path) -> None:
    """Hours by the number of students."""
    with drawn(path, 1) as (axis,):
        for at, (name, curve) in enumerate(curves.items()):
            axis.plot(
                list(curve), list(curve.values()), color=COLOURS[at], marker=SIGNS[at],
                linestyle=DASHES[at], markersize=4, label=name,
            )  # fmt: skip
        axis.set(xlabel="students", ylabel="A100 hours (prediction)")
        axis.legend(fontsize=8)


def fronts(
    figures: Figures,
    points: dict[str, dict[str, tuple[float, float]]],
    fronts: dict[str, list[str]],
    fresh: str,
    path: Path,
) -> None:
    """Accuracy against bytes an image, a panel for each measure; bars are the seeds' spread."""
    with drawn(path, len(points), height=3.8) as axes:
        for axis, (measure, stores) in zip(axes, points.items(), strict=True):
            codecs = list(dict.fromkeys(name.partition(",")[0] for name in stores))
            for at, codec in enumerate(codecs):
                names = [name for name in stores if name.partition(",")[0] == codec]
                x, y = zip(*(stores[name] for name in names), strict=True)
                errors = [_deviation(figures.values(name, measure)) for name in names]
                axis.errorbar(
                    x, y, yerr=errors, color=COLOURS[at], marker=SIGNS[at], linestyle=DASHES[at],
                    linewidth=1, markersize=5, capsize=2, label=codec,
                )  # fmt: skip
            x, y = zip(*(stores[name] for name in fronts[measure]), strict=True)
            axis.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor="#000000",
                      label="on the front")  # fmt: skip
            level = figures.values(fresh, measure)
            axis.axhline(statistics.mean(level), color="#666666", linestyle=(0, (1, 1)),
                         label="a new view every epoch")  # fmt: skip
            axis.set(xscale="log", xlabel="bytes an image", ylabel=f"{measure}, top-1 %")
        axes[0].figure.legend(
            *axes[-1].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8
        )


def effects(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """What each part adds, a point and its spread; a sign for each measure."""
    names = list(next(iter(found.values())))
    with drawn(path, 1, height=0.34 * len(names) + 1) as (axis,):
        axis.figure.set_size_inches(7.2, 0.34 * len(names) + 1)
        for at, (measure, values) in enumerate(found.items()):
            axis.errorbar(
                [statistics.mean(values[name]) for name in names],
                [row + (0.14 - 0.28 * at) for row in range(len(names))],
                xerr=[_deviation(values[name]) for name in names],
                color=COLOURS[at], marker=SIGNS[at], linestyle="", capsize=2, label=measure,
            )  # fmt: skip
        axis.axvline(0, color="#666666", linewidth=0.8)
        axis.set(yticks=range(len(names)), yticklabels=names, xlabel="points added")
        axis.invert_yaxis()
        axis.legend(fontsize=8)


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
