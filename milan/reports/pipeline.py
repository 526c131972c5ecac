"""A pipeline's report: tables, one JSON file, pictures, and the page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from milan.core.atomic import write_json
from milan.core.config_resolver import read_section
from milan.core.progress import NoProgress, Progress
from milan.errors import CacheError, ConfigError
from milan.evaluation.protocols import Column, Protocol, get_protocol
from milan.reporting.contact_sheet import contact_sheet
from milan.reporting.run_files import METRICS
from milan.reports.page import write_page
from milan.reports.pictures import PictureSettings
from milan.reports.sources import Run, extraction_speed, read_result, read_run_folder
from milan.store.cache import TargetCache

_OURS = "#4363d8"

Metrics = dict[str, dict[str, Any]]
"""Of one protocol, or of pretraining: name of the encoder or run -> its metrics."""


class Table(NamedTuple):
    """A table to print."""

    title: str
    headings: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Report:
    """What was written to `folder`, and what to print."""

    folder: Path
    tables: list[Table]
    pictures: list[Path]
    page: Path


def build_report(
    params: str, settings: PictureSettings | None = None, progress: Progress | None = None
) -> Report:
    """Collect the metrics that a parameter file names, draw the pictures, write metrics.json.

    Section `report` has `out` (a folder), `runs` and `encoders` (name -> folder); the store is
    `out` of section `extract`; `protocols`, `finetuned` and `by_words` of section `evaluation` say
    which metrics files the encoders have. Raises ConfigError if one of these, or a metrics file, is
    missing; of the last two only encoders that have one are shown. report.html is made of the same
    folders.
    """
    progress = progress or NoProgress()
    section = read_section(params, "report")
    measured = read_section(params, "evaluation")
    names: Any = measured.get("protocols")
    some = [*(measured.get("finetuned") or []), *(measured.get("by_words") or [])]
    store: Any = section.get("cache") or read_section(params, "extract").get("out")
    needed = {f"report.{key}": section.get(key) for key in ("out", "runs", "encoders")}
    for key, value in (needed | {"evaluation.protocols": names, "extract.out": store}).items():
        if value is None:
            raise ConfigError(
                f"{params} has no {key}",
                expected="the sections report, evaluation and extract of a whole pipeline",
                fix="copy them from the params.yaml of a checkout",
            )
    out = Path(section["out"])
    called = {path: name for name, path in section["encoders"].items()}
    called |= {path: name for name, path in section["runs"].items() if path not in called}
    sources = {path: read_run_folder(name, Path(path)) for path, name in called.items()}
    results = {
        protocol: {
            encoder: _result(protocol, sources[folder])
            for encoder, folder in section["encoders"].items()
            # The teacher is not fine-tuned, and pixels have no words.
            if protocol.name not in some or protocol.metrics_file(folder).exists()
        }
        for protocol in map(get_protocol, [*names, *some])
    }
    for protocol, metrics in results.items():
        check_alike(protocol, metrics)
    runs = [replace(sources[path], name=name) for name, path in section["runs"].items()]
    for run in runs:
        if not run.figures:
            raise ConfigError(f"no metrics at {run.folder / METRICS}", fix="dvc repro")
    cache = TargetCache(store)
    speed = extraction_speed(cache.path)
    # A folder of its own: DVC tracks it whole, whichever protocols there are.
    evaluation = out / "evaluation"
    evaluation.mkdir(parents=True, exist_ok=True)
    write_json(
        out / "metrics.json",
        {
            **{p.name: _by_column(p, metrics) for p, metrics in results.items()},
            "bytes_per_view": cache.spec.view_bytes(),
            "extract_images_per_second": speed,
            "pretrain_images_per_second": {run.name: run.images_per_second for run in runs},
            "wait_share": {run.name: run.wait_share for run in runs},
        },
    )
    pictures = [
        contact_sheet(store, out=out / "sheet.png", images=6, among_images=True),
        _draw_curves(runs, out / "curves.png"),
    ]
    for protocol, metrics in results.items():
        _write_chart_data(protocol, metrics, evaluation / f"{protocol.name}.csv")
        pictures.append(_draw_chart(protocol, metrics, evaluation / f"{protocol.name}.png"))
    tables = [_protocol_table(protocol, metrics) for protocol, metrics in results.items()]
    written = write_page(
        out / "report.html", list(sources.values()), [cache.path], settings, progress
    )
    return Report(out, [*tables, _cost_table(cache, speed, runs)], pictures, written)


def check_alike(protocol: Protocol, metrics: Metrics) -> None:
    """Raises ConfigError for encoders that were measured in different ways by one command."""
    usual = getattr(protocol.settings, "protocol", None)
    ways = {encoder: values.get("protocol", usual) for encoder, values in metrics.items()}
    if len(set(ways.values())) > 1:
        raise ConfigError(
            f"{protocol.command}: " + ", ".join(f"{e} by {way}" for e, way in ways.items()),
            expected="the same --protocol for all encoders",
            fix=f"dvc repro, or milan {protocol.command} with one --protocol for all",
        )


def _result(protocol: Protocol, encoder: Run) -> dict[str, Any]:
    """The metrics of an encoder, which must be there. Raises ConfigError."""
    return encoder.results.get(protocol.name) or read_result(protocol, encoder.folder)


def _by_column(protocol: Protocol, metrics: Metrics) -> dict[str, dict[str, Any]]:
    """The figures of the report's columns, and their intervals: key -> encoder -> value."""
    keys = [key for column in protocol.columns for key in (column.key, f"{column.key}_interval")]
    return {
        key: {encoder: values[key] for encoder, values in metrics.items() if key in values}
        for key in keys
        if any(key in values for values in metrics.values())
    }


def _protocol_table(protocol: Protocol, metrics: Metrics) -> Table:
    rows = [
        (encoder, *(_figure(column, values) for column in protocol.columns))
        for encoder, values in metrics.items()
    ]
    return Table(protocol.title, ("encoder", *(c.heading for c in protocol.columns)), rows)


def _figure(column: Column, metrics: dict[str, Any]) -> str:
    """A figure, with its interval if it has one."""
    if metrics[column.key] is None:
        return "-"
    numbers = metrics[column.key], *(metrics.get(f"{column.key}_interval") or ())
    texts = [column.format.format(number) for number in numbers]
    return f"{texts[0]} ({texts[1]}-{texts[2]})" if len(texts) == 3 else texts[0]


def _cost_table(cache: TargetCache, speed: float | None, runs: list[Run]) -> Table:
    megabytes = cache.spec.total_bytes() / 1e6
    rows = [
        ("bytes a view", f"{cache.spec.view_bytes():,} ({cache.spec.codec})"),
        ("store", f"{cache.images:,} images x {cache.views} views, {megabytes:,.1f} MB"),
        ("extraction, images/s", f"{speed:,.0f}" if speed else "-"),
    ]
    for run in runs:
        rate, waited = run.images_per_second, run.wait_share
        rows.append((f"pretraining {run.name}, images/s", f"{rate:,.0f}" if rate else "-"))
        shown = "-" if waited is None else f"{waited:.1%}"
        rows.append((f"pretraining {run.name}, data-loading time", shown))
    return Table("Cost", ("what", ""), rows)


def _write_chart_data(protocol: Protocol, metrics: Metrics, path: Path) -> None:
    """A CSV that `dvc plots` draws, with the same columns for every protocol."""
    main = protocol.columns[0]
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["encoder", "metric", "value"])
        writer.writerows([name, main.heading, m[main.key]] for name, m in metrics.items())


def _draw_chart(protocol: Protocol, metrics: Metrics, out: Path) -> Path:
    main = protocol.columns[0]
    figure, (axis,) = _axes(6, 0.6 + 0.5 * len(metrics))
    names = list(metrics)[::-1]
    values = [metrics[name][main.key] or 0 for name in names]  # nothing: none could be measured
    bars = axis.barh(names, values, color=[_OURS if n == "MILAN" else "#9aa5b1" for n in names])
    axis.bar_label(bars, labels=[_figure(main, metrics[name]) for name in names], padding=3)
    if main.heading.endswith("%"):
        axis.set_xlim(0, 150)  # with room for an interval
        axis.set_xticks(range(0, 101, 20))
    axis.set_xlabel(f"{protocol.title}, {main.heading}")
    for label in axis.get_yticklabels():
        label.set_parse_math(False)  # a name may have dollars
    return _save(figure, out)


def _draw_curves(runs: list[Run], out: Path) -> Path:
    """The loss of each run, in training and on its validation images."""
    figure, axes = _axes(4.2 * len(runs), 3, columns=len(runs))
    for axis, run in zip(axes, runs, strict=True):
        for key, label, style in (
            ("loss", "training", {"color": "#9aa5b1", "lw": 1.2}),
            ("val_loss", "validation", {"color": _OURS, "lw": 1.2, "marker": "o", "ms": 3}),
        ):
            points = [(line["epoch"], line[key]) for line in run.log if key in line]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, **style)
        axis.set_title(run.name, fontsize=10, parse_math=False)
        axis.set_xlabel("epoch")
        axis.set_ylabel("loss")
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    return _save(figure, out)


def _axes(width: float, height: float, *, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes, side by side; without pyplot, which keeps every figure."""
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="tight")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise CacheError(
            f"{path} cannot be written: {error}", fix="another report.out in the parameter file"
        ) from None
    return path
