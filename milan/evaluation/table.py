"""Several checkpoints in one table: a row for each, and for each baseline once."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from milan.core.atomic import write_json, write_text


def rows_of(metrics: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of checkpoints (name -> metrics) as rows; `checkpoint` is the name of each.

    Baselines come first. Checkpoints of one shape have the same random one; a
    teacher is like none.
    """
    beside = {
        other.get("like", ""): {key: value for key, value in other.items() if key != "like"}
        for one in metrics.values()
        if (other := one.get("baseline"))
    }
    rows = [
        {**other, "checkpoint": other["checkpoint"] + (f", like {like}" if len(beside) > 1 else "")}
        for like, other in beside.items()
        if not any(other.items() <= one.items() for one in metrics.values())  # it was asked for too
    ]
    return rows + [{**one, "checkpoint": name} for name, one in metrics.items()]


def write_table(path: Path, metrics: dict[str, dict[str, Any]]) -> None:
    """Write the metrics of checkpoints: CSV if the file ends so, a row each; else JSON by name.

    A CSV has what is a number or text; of an interval its ends, as `top1_low` and `top1_high`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".csv":
        write_json(path, metrics)
        return
    flat = [_flat(row) for row in rows_of(metrics)]
    names = list(dict.fromkeys(name for row in flat for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(path, text.getvalue())


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name.endswith("_interval") and value is not None:
            stem = name.removesuffix("_interval")
            flat[f"{stem}_low"], flat[f"{stem}_high"] = value
        elif isinstance(value, int | float | str):
            flat[name] = value
    return flat
