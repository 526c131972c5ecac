"""The figures of a pipeline put together: tables, one JSON file, pictures."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

from milan.core.atomic import write_json
from milan.core.config_resolver import read_section
from milan.core.paths import AnyPath, names_in, read_file
from milan.core.progress import NoProgress, Progress
from milan.errors import ConfigError
from milan.reporting.contact_sheet import contact_sheet, save_figure
from milan.store.cache import TargetCache
from milan.store.format import LOG, LOGS


def build_report(params: str, *, progress: Progress | None = None) -> dict[str, Any]:
    """Gather the figures that section `report` of `params` names and draw the pictures.

    The section has `out` (a folder), `cache`, `runs` (name -> folder) and `probes` (name -> JSON
    of a linear probe). Returns its `folder`, `probes` and `costs` as rows
    of tables, and `pictures` as paths.
    """
    progress = progress or NoProgress()
    section = read_section(params, "report")
    for key in ("out", "cache", "runs", "probes"):
        if key not in section:
            raise ConfigError(f"section report of {params} has no {key!r}")
    out = Path(section["out"])
    out.mkdir(parents=True, exist_ok=True)
    probes = {name: _read(path) for name, path in section["probes"].items()}
    runs = {name: _read(Path(path) / "metrics.json") for name, path in section["runs"].items()}
    cache = TargetCache(section["cache"])
    rate = _extraction_rate(cache.path)
    metrics = {
        "top1": {name: probe["top1"] for name, probe in probes.items()},
        "bytes_per_view": cache.spec.view_bytes(),
        "extract_images_per_second": rate,
        "pretrain_images_per_second": {n: run["images_per_second"] for n, run in runs.items()},
        "wait_share": {n: run["wait_share"] for n, run in runs.items()},
    }
    write_json(out / "metrics.json", metrics)
    _write_probes(out / "probes.csv", probes)
    total = cache.spec.total_bytes() / 1e6
    costs = [
        ("bytes a view", f"{cache.spec.view_bytes():,} ({cache.spec.codec})"),
        ("store", f"{cache.rows:,} images x {cache.views} views, {total:,.1f} MB"),
        ("extraction, images/s", f"{rate:,.0f}" if rate else "-"),
    ]
    for name, run in runs.items():
        costs.append((f"pretraining {name}, images/s", f"{run['images_per_second']:,.0f}"))
        costs.append((f"pretraining {name}, waiting", f"{run['wait_share']:.1%}"))
    pictures = [
        contact_sheet(section["cache"], out=out / "sheet.png", images=6),
        _draw_curves(section["runs"], out / "curves.png"),
        _draw_probes(probes, out / "probes.png"),
    ]
    return {
        "folder": str(out),
        "probes": [(n, f"{p['top1']:.1f}", f"{p['top5']:.1f}") for n, p in probes.items()],
        "costs": costs,
        "pictures": [str(p) for p in pictures],
    }


def _read(path: str | Path) -> dict[str, Any]:
    path = Path(path)
    if not path.is_file():
        raise ConfigError(f"no figures at {path}", fix="dvc repro")
    return json.loads(path.read_text())


def _extraction_rate(store: AnyPath) -> float | None:
    """Images a second of the last run that wrote to the store, from its log."""
    rate = None
    logs = [store / LOG] if isinstance(store, Path) else [
        store / LOGS / name for name in sorted(names_in(store / LOGS))
    ]  # fmt: skip
    text = b"".join(read_file(log) for log in logs if log.exists())
    for line in text.splitlines():
        rate = json.loads(line).get("images_per_second") or rate
    return rate


def _write_probes(path: Path, probes: dict[str, dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["encoder", "top1", "top5"])
        writer.writerows([n, p["top1"], p["top5"]] for n, p in probes.items())


def _draw_probes(probes: dict[str, dict[str, Any]], out: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 0.6 + 0.5 * len(probes)))
    names = list(probes)[::-1]
    values = [probes[name]["top1"] for name in names]
    bars = axis.barh(names, values, color=["#4363d8" if n == "MILAN" else "#9aa5b1" for n in names])
    axis.bar_label(bars, labels=[f"{v:.1f}" for v in values], padding=3)
    axis.set_xlim(0, 108)
    axis.set_xlabel("linear probe, top-1 %")
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return save_figure(figure, out)


def _draw_curves(runs: dict[str, str], out: Path) -> Path:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(runs), figsize=(4.2 * len(runs), 3), squeeze=False)
    for axis, (name, folder) in zip(axes[0], runs.items(), strict=True):
        with open(Path(folder) / "curves.csv") as file:
            lines = list(csv.DictReader(file))
        axis.plot([float(x["epoch"]) for x in lines], [float(x["loss"]) for x in lines], lw=1.2)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("epoch")
        axis.set_ylabel("loss")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return save_figure(figure, out)
