"""The tables and curves of a report, as plain values for its page."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from milan.core.units import format_bytes, format_duration
from milan.evaluation.protocols import Column, get_protocol
from milan.evaluation.table import rows_of
from milan.reporting.log import COLUMNS
from milan.reports.sources import Run, extraction_speed
from milan.store.cache import TargetCache

_POINTS = 400  # of a curve: more than a screen shows
NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """What stands in a table."""

    text: str
    sort: float | None = None
    """A number to sort by; None: the text."""
    below: str = ""
    """Small print: the interval."""


@dataclass(frozen=True)
class Row:
    """Cells under the headings of a table; the first is the row's name."""

    cells: list[Cell]
    run: int | None = None
    """Which run it is of; None: a baseline, or of all."""
    bar: tuple[float, float, float] | None = None
    """(value, low, high) in 0..1 of the table's axis: drawn in the last column."""


@dataclass(frozen=True)
class Grid:
    """A table."""

    title: str
    headings: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    axis: tuple[str, str] | None = None
    """The ends of the axis of bars, if there are any."""
    runs: list[int | None] = field(default_factory=list)
    """Which run each column is of, where columns are runs."""

    @property
    def numeric(self) -> list[bool]:
        """Whether each column is of figures."""
        columns = zip(*(row.cells for row in self.rows), strict=True)
        return [cells[0].sort is not None for cells in columns] or [False] * len(self.headings)


def number(value: Any, form: str = "{:.4g}") -> Cell:
    """A figure; a dash for none, and for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return Cell(NOTHING, -math.inf)
    return Cell(form.format(value), float(value) if math.isfinite(value) else -math.inf)


# --- runs -----------------------------------------------------------------------------------------


def overview(runs: Sequence[Run]) -> Grid:
    """A row for each run: what it is, how far, its last figures."""
    keys = dict.fromkeys(key for run in runs for line in run.log for key in line)
    metrics = [key for key in keys if key not in COLUMNS]
    rows = []
    for at, run in enumerate(runs):
        settings, log_epochs = run.config, run.last("epoch")
        best = [line["val_loss"] for line in run.log if "val_loss" in line]
        cells = [
            Cell(run.name),
            Cell(run.state),
            Cell(str(settings.get("objective") or run.about.get("kind") or _kind(run))),
            Cell(_model(settings)),
            number(log_epochs, "{:.3g}"),
            number(run.last("loss")),
            *(number(run.last(key)) for key in metrics),
            *([number(min(best, default=None))] if "val_loss" in metrics else []),
        ]
        rows.append(Row(cells, at))
    headings = ["run", "state", "objective", "model", "epochs done", "loss"]
    headings += [key.replace("_", " ") for key in metrics]
    headings += ["least val loss"] if "val_loss" in metrics else []
    return Grid("Runs, with the newest figures of their logs", headings, rows)


def _model(settings: dict[str, Any]) -> str:
    """The name in timm, and how the run's model differs from it."""
    changed = [f"{k} {v}" for k, v in (settings.get("model_args") or {}).items()]
    return ", ".join([str(settings.get("model") or NOTHING), *changed])


def _kind(run: Run) -> str:
    if not run.about:
        return NOTHING
    return run.about.get("protocol") or "supervised"


def settings_tables(runs: Sequence[Run]) -> tuple[Grid, Grid]:
    """(settings that differ, all settings) with a column for each run that has any."""
    having = [(at, run) for at, run in enumerate(runs) if run.about]
    flat = [_flat_settings(run) for _, run in having]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    of_runs = [at for at, _ in having]
    headings = ["setting", *(run.name for _, run in having)]

    def rows(chosen: Iterable[str]) -> list[Row]:
        return [Row([Cell(key), *(Cell(one.get(key, NOTHING)) for one in flat)]) for key in chosen]

    differ = [key for key in keys if len({one.get(key) for one in flat}) > 1]
    return (
        Grid("Settings that differ", headings, rows(differ), runs=[None, *of_runs]),
        Grid("All settings", headings, rows(keys), runs=[None, *of_runs]),
    )


def _flat_settings(run: Run) -> dict[str, str]:
    about, flat = run.about, dict[str, str]()

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for inner, part in value.items():
                add(f"{name}.{inner}", part)
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)

    for name, value in run.config.items():
        if name != "out":
            add(name, value)
    add("decoder", about.get("decoder", {}))
    add("targets", about.get("targets", {}))
    if run.pretrained:
        add("store", ", then ".join(part["cache"][:12] for part in about["stretches"]))
    add("versions", about.get("versions", {}))
    return flat


def commands(runs: Sequence[Run]) -> list[tuple[int, str, str]]:
    """(number, name, command line) of each run that knows it."""
    return [
        (at, run.name, shlex.join(map(str, run.about["command"])))
        for at, run in enumerate(runs)
        if run.about.get("command")
    ]


# --- curves ---------------------------------------------------------------------------------------


def charts(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Curves over epochs: title, `more` (of less interest), and series of points, by run.

    Losses of different objectives mean different things, so each objective has a chart.
    """
    by_title: dict[str, dict[str, Any]] = {}

    def add(key: str, title: str, at: int, kind: str, *, more: bool = False) -> None:
        points = [(line.get("epoch"), line.get(key)) for line in runs[at].log]
        xs, ys = thinned([(x, y) for x, y in points if x is not None and y is not None])
        if xs:
            chart = by_title.setdefault(title, {"title": title, "more": more, "series": []})
            chart["series"].append({"run": at, "kind": kind, "x": xs, "y": ys})

    for at, run in enumerate(runs):
        objective = run.config.get("objective")
        title = f"loss ({objective})" if objective else "loss"
        add("loss", title, at, "training")
        add("val_loss", title, at, "validation")
        keys = dict.fromkeys(key for line in run.log for key in line)
        for key in keys:
            if key not in (*COLUMNS, "val_loss"):
                add(key, key.replace("_", " ").replace("val ", "validation "), at, "validation")
        for key, title in (
            ("lr", "learning rate"), ("grad_norm", "norm of the gradient"),
            ("images_per_second", "images a second"), ("wait_share", "share of data-loading time"),
        ):  # fmt: skip
            add(key, title, at, "training", more=True)
    return sorted(by_title.values(), key=lambda chart: chart["more"])


def thinned(points: list[tuple[float, float]]) -> tuple[list[float], list[float | None]]:
    """At most 400 points: means of neighbours, so that nothing is left out; no nan or infinity."""
    size = -(-len(points) // _POINTS) or 1
    xs, ys = list[float](), list[float | None]()
    for at in range(0, len(points), size):
        part = points[at : at + size]
        xs.append(float(f"{part[-1][0]:.6g}"))
        mean = sum(y for _, y in part) / len(part)
        ys.append(float(f"{mean:.5g}") if math.isfinite(mean) else None)
    return xs, ys


# --- evaluations ----------------------------------------------------------------------------------


def evaluation_tables(runs: Sequence[Run]) -> list[Grid]:
    """A table for each protocol that any run was measured by, with baselines and intervals."""
    names = dict.fromkeys(name for run in runs for name in run.results)
    return [_evaluation(name, runs) for name in sorted(names, key=_order)]


def _order(name: str) -> int:
    from milan.evaluation.protocols import PROTOCOLS

    return [*PROTOCOLS, name].index(name)


def _evaluation(name: str, runs: Sequence[Run]) -> Grid:
    protocol = get_protocol(name)
    measured = {str(at): run.results[name] for at, run in enumerate(runs) if name in run.results}
    rows = rows_of(_with_known_baselines(measured))
    main = protocol.columns[0]
    low, high = _axis(main, rows)
    grid_rows = []
    for row in rows:
        if all(row.get(column.key) is None for column in protocol.columns):
            continue  # of a file in which a baseline is named without being measured
        key = row["checkpoint"]
        at = int(key) if key in measured else None
        label = runs[at].name if at is not None else _baseline(key, runs)
        cells = [Cell(label), *(_figure(column, row) for column in protocol.columns)]
        cells += [number(row.get(key), form) for key, form in _facts(rows)]
        grid_rows.append(Row(cells, at, _bar(main, row, low, high)))
    headings = [name, *(column.heading for column in protocol.columns)]
    headings[0] = "encoder"
    headings += [key.replace("_", " ") for key, _ in _facts(rows)]
    axis = (main.format.format(low), main.format.format(high))
    return Grid(protocol.title, headings, grid_rows, _notes(rows, protocol.settings), axis)


_CONDITIONS = (
    "protocol", "classes", "val_images", "train_images", "shots", "fraction", "epochs"
)  # fmt: skip
"""What figures must have in common to be compared. A baseline has it of the metrics it is in."""


def _with_known_baselines(measured: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The metrics; baselines of the same figures are `like` the first run that has them."""
    known: list[tuple[str, dict[str, Any]]] = []
    linked = {}
    for at, metrics in measured.items():
        linked[at] = metrics
        if other := metrics.get("baseline"):
            bare = {key: value for key, value in other.items() if key not in ("like", "seconds")}
            like = next((first for first, figures in known if figures == bare), at)
            known.append((like, bare))
            shared = {key: metrics[key] for key in _CONDITIONS if key in metrics}
            linked[at] = metrics | {"baseline": shared | other | {"like": like}}
    return linked


def _baseline(name: str, runs: Sequence[Run]) -> str:
    """A baseline's name, in which rows_of puts the number of a run: `random, like 2`."""
    what, like, at = name.partition(", like ")
    return f"{what}, like {runs[int(at)].name}" if like else name


_SHOWN_FACTS = (
    ("chance", "{:.1f}"), ("train_images", "{:,.0f}"), ("val_images", "{:,.0f}"),
    ("seconds", "{:,.0f}"),
)  # fmt: skip


def _facts(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(key, form) for key, form in _SHOWN_FACTS if any(key in row for row in rows)]


def _figure(column: Column, row: dict[str, Any]) -> Cell:
    cell = number(row.get(column.key), column.format)
    ends = row.get(f"{column.key}_interval")
    below = "–".join(column.format.format(end) for end in ends) if ends else ""
    return Cell(cell.text, cell.sort, below)


def _axis(main: Column, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Round ends of an axis that holds the main figures and their intervals."""
    values = [row[main.key] for row in rows if row.get(main.key) is not None]
    values += [end for row in rows for end in row.get(f"{main.key}_interval") or ()]
    low, high = min(values, default=0.0), max(values, default=1.0)
    step = 10.0 ** math.floor(math.log10(max(high - low, 1e-6)))
    return step * math.floor(low / step), step * math.ceil(high / step + 1e-9)


def _bar(
    main: Column, row: dict[str, Any], low: float, high: float
) -> tuple[float, float, float] | None:
    value = row.get(main.key)
    if value is None:
        return None
    ends = row.get(f"{main.key}_interval") or (value, value)
    width = (high - low) or 1.0
    first, second, third = (min(1.0, max(0.0, (x - low) / width)) for x in (value, *ends))
    return first, second, third


def _notes(rows: list[dict[str, Any]], settings: Any) -> list[str]:
    """What must be known to compare the rows."""
    notes = []
    for key in _CONDITIONS:
        usual = getattr(settings, "protocol", None) if key == "protocol" else None
        values = [row.get(key, usual) for row in rows]
        if len(set(map(str, values))) > 1:
            different = ", ".join(dict.fromkeys(str(value) for value in values))
            notes.append(f"Not measured alike: {key.replace('_', ' ')} {different}.")
    for key, what in (("repeated_images", "images to measure on are training images too"),
                      ("rejected_images", "images could not be read")):  # fmt: skip
        most = max((row.get(key) or 0 for row in rows), default=0)
        if most:
            notes.append(f"{most:,} {what}.")
    drawn = max((len(row.get("draws") or ()) for row in rows), default=0)
    if any(f"{key}_interval" in row for row in rows for key in row):
        notes.append(
            f"Small figures: 95 % interval over {drawn} draws of training images."
            if drawn
            else "Small figures: 95 % interval over images."
        )
    return notes


# --- cost -----------------------------------------------------------------------------------------


def cost_tables(runs: Sequence[Run], stores: Sequence[TargetCache]) -> list[Grid]:
    """Time, speed, data loading and bytes of runs; bytes and speed of stores."""
    rows = []
    for at, run in enumerate(runs):
        if not run.about:
            continue
        seconds, waited = run.seconds, run.wait_share
        kept = sum(p.stat().st_size for p in run.folder.rglob("*") if p.is_file())
        rows.append(
            Row(
                [
                    Cell(run.name),
                    Cell(format_duration(seconds), seconds) if seconds else number(None),
                    number(run.images_per_second, "{:,.0f}"),
                    number(None if waited is None else 100 * waited, "{:.1f} %"),
                    Cell(format_bytes(kept), kept),
                    Cell(str(run.figures.get("device", NOTHING))),
                    Cell(str(run.config.get("precision", NOTHING))),
                ],
                at,
            )
        )
    headings = ["run", "training time", "images/s", "data-loading time", "bytes of the folder",
                "device", "precision"]  # fmt: skip
    tables = [Grid("Cost of training", headings, rows)] if rows else []
    if stores:
        tables.append(_store_costs(stores))
    return tables


def _store_costs(stores: Sequence[TargetCache]) -> Grid:
    rows = []
    for cache in stores:
        total = sum(g.entry.bytes for g in cache.generations)
        cells = [Cell(str(cache.path)), Cell(cache.layer)]
        cells += [number(cache.images, "{:,.0f}"), number(cache.views)]
        cells += [number(cache.spec.view_bytes(), "{:,.0f}"), Cell(format_bytes(total), total)]
        rows.append(Row([*cells, number(extraction_speed(cache.path), "{:,.0f}")]))
    headings = ["store", "layer", "images", "views", "bytes a view", "bytes", "extracted, images/s"]
    return Grid("Cost of stores", headings, rows)
