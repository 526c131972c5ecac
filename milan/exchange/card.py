"""The model card: what a network is, how it is opened, where it comes from, what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from milan.core.config_fields import as_typed
from milan.core.size import height_width, size_in_words
from milan.errors import MilanError
from milan.evaluation.protocols import PROTOCOLS
from milan.exchange.formats import Written
from milan.exchange.source import Source
from milan.models.export import CHANNELS
from milan.reporting.run_files import METRICS, RUN, read_run
from milan.store.describe import describe

_FIGURES = ("loss", "val_loss", "val_cosine", "top1", "top5")
_UNKNOWN = "not stated"


def model_card(source: Source, written: Written, *, format: str, name: str) -> str:
    """README.md in Markdown, with the fields that model hubs read."""
    run = _run(source)
    measured, missing = _measured(source)
    kind = "image-classification" if source.classes else "image-feature-extraction"
    library = f"library_name: {written.library}\n" if written.library else ""
    parameters = sum(p.numel() for p in source.network.parameters())
    what = f"A classifier of {len(source.classes):,} classes" if source.classes else "An encoder"
    lines = [
        f"---\n{library}pipeline_tag: {kind}\ntags:\n- milan\n- vision-transformer\n---\n",
        f"# {name}\n",
        f"{what}: `{source.model}`{_args(source)}, {parameters / 1e6:,.2f} million weights, "
        f"written by `milan export --format {format}`.\n",
        "## Use\n",
        "```python\n" + written.use.replace("FOLDER", name) + "\n```\n",
        *(f"- {note}" for note in written.notes),
        *([""] if written.notes else []),
        "## Images\n",
        _table(_images(source)),
        "## Origin\n",
        _table(_origin(source, run)),
        "## Measured\n",
        _table(measured) if measured else "Nothing: no figures were found beside the weights.\n",
        "## Not measured\n",
        "No figures were found beside the weights for: " + "; ".join(missing) + "."
        if missing else "",
        "Nothing is known of images unlike those it was trained on, of bias against groups of "
        "people, or of robustness, beyond the tables above.\n",
    ]  # fmt: skip
    return "\n".join(line for line in lines if line is not None)


def _args(source: Source) -> str:
    shown = {k: v for k, v in source.args.items() if k not in ("global_pool", "fc_norm")}
    return f" with {', '.join(f'{k}={v}' for k, v in shown.items())}" if shown else ""


def _images(source: Source) -> list[tuple[str, str]]:
    height, width = height_width(source.size)
    resize = round(min(height, width) / source.crop_share)
    first = f"shorter edge to {resize}" if height == width else "as much as covers them"
    pooled = "mean of patches" if source.averages else "class token"
    rows = [
        ("size", f"{height} x {width} (height x width): {first}, bicubic, then the centre crop "
                 f"of {source.crop_share:g}"),
        (f"mean of {_seen(source)}", _numbers(source.mean)),
        ("standard deviation", _numbers(source.std)),
        ("an image as one vector", pooled),
    ]  # fmt: skip
    about = source.about.get(CHANNELS) or {}
    if about.get("bands"):
        bands = about["bands"]
        low, high = bands["low"], bands["high"]
        rows.append(("red, green and blue", f"channels {bands['numbers']} of the file, of which "
                     f"{low:g} becomes 0 and {high:g} 255 (of 255)"))  # fmt: skip
    if about.get("paired"):
        rows.append(("numbered channels", "of a file beside each image, of its name"))
    if source.size != source.trained_size:
        trained, now = size_in_words(source.trained_size), size_in_words(source.size)
        rows.append(("trained at", f"{trained}; positions are made for {now}"))
    return rows


def _seen(source: Source) -> str:
    return f"channels {source.channels}, in the unit of the files' samples" if (
        source.channels) else "red, green, blue (of 1)"  # fmt: skip


def _origin(source: Source, run: dict[str, Any]) -> list[tuple[str, str]]:
    about, settings, rows = source.about, run.get("config", {}), list[tuple[str, str]]()
    only = [about["teacher"]] if about.get("teacher") else []
    for teacher in about.get("teachers") or only:
        weights = "RANDOM WEIGHTS" if teacher["random_weights"] else teacher["pretrained"]
        rows.append(("teacher", f"{teacher['name']} ({weights})"))
        rows.append(("licence of the teacher's weights", teacher["licence"]))
    rows += _store(settings.get("cache"), about.get("cache"))
    if "data" in settings:
        rows.append(("data", str(settings["data"])))
        rows.append(("validated on", str(settings.get("val_data") or _UNKNOWN)))
    if "from" in about:
        rows.append(("started from", str(about["from"])))
    elif "initial" in run:
        rows.append(("started from", str(run["initial"]["encoder"])))
    if "objective" in about:
        rows.append(("objective", about["objective"]))
    if "epochs" in about:
        rows.append(("epochs", f"{about['epochs']:g}"))
    if recipe := settings.get("recipe"):
        changes = ", ".join(f"{k} {as_typed(v[0])}" for k, v in (run.get("differs") or {}).items())
        rows.append(("recipe", f"{recipe}; differs in: {changes or 'nothing'}"))
    if source.said:
        rows.append(("read", source.said))
    versions = run.get("versions") or {"milan-pretrain": about.get("milan", _UNKNOWN)}
    rows.append(("written by", ", ".join(f"{k} {v}" for k, v in versions.items())))
    rows.append(("licence of these weights", f"{_UNKNOWN}: that of data and teacher applies"))
    return rows


def _store(place: str | None, digest: str | None) -> list[tuple[str, str]]:
    """What is known of the targets: the store itself says more, where it still is."""
    rows = [("identity of the store of targets", digest)] if digest else []
    try:
        tables = describe(place) if place else {}
    except (MilanError, OSError):
        return rows
    wanted = ("data", "images", "views of each", "targets")
    first = next(iter(tables.values()), [])
    facts = [(what, str(value)) for what, value in first if what in wanted]
    same = any(what == "identity" and value == digest for what, value in first)
    return rows + [(what if same else f"{what} (of the store as it is today)", v)
                   for what, v in facts]  # fmt: skip


def _measured(source: Source) -> tuple[list[tuple[str, str]], list[str]]:
    """(figures found in the run, what has none)."""
    rows, missing = list[tuple[str, str]](), list[str]()
    own = _json(source.folder, METRICS)
    rows += [(f"training: {key.replace('_', ' ')}", f"{own[key]:.4g}")
             for key in _FIGURES if isinstance(own.get(key), int | float)]  # fmt: skip
    for protocol in PROTOCOLS.values():
        figures = _json(source.folder, f"{protocol.name}.json")
        said = [
            f"{column.heading} {column.format.format(figures[column.key])}"
            for column in protocol.columns
            if isinstance(figures.get(column.key), int | float)
        ]
        if said:
            rows.append((protocol.title, ", ".join(said)))
        elif not source.classes:
            missing.append(protocol.title)
    return rows, missing


def _json(folder: Path | None, name: str) -> dict[str, Any]:
    """A file of figures; empty if there is none that can be read."""
    try:
        figures = json.loads((folder / name).read_text(encoding="utf-8")) if folder else {}
    except (OSError, ValueError):
        return {}
    return figures if isinstance(figures, dict) else {}


def _run(source: Source) -> dict[str, Any]:
    if source.folder is None or not (source.folder / RUN).is_file():
        return {}
    return read_run(source.folder)


def _table(rows: list[tuple[str, str]]) -> str:
    cells = [(what, str(value).replace("|", "\\|").replace("\n", " ")) for what, value in rows]
    return "| | |\n|---|---|\n" + "".join(f"| {what} | {value} |\n" for what, value in cells)


def _numbers(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.4g}" for value in values)
