"""Which training images are learnt from: a few of each class, drawn by name, or those of a list.

A draw is a fixed list that anybody can make again. An image's name is its key without the folders
that all images share. Of each class the images come in the order of

    SHA-256("SEED DRAW NAME")

and the first are taken. So a draw depends on nothing but the seed, its number and the names: not on
the order of a listing, other classes, the machine or the checkpoint; and 5 images of a class are
among its 10.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from milan.core.atomic import write_text
from milan.core.paths import read_lines
from milan.core.progress import Progress
from milan.errors import ConfigError
from milan.evaluation.config import ClassificationConfig
from milan.evaluation.protocols import Column
from milan.images.manifest import Manifest

_LINES = "the name of an image in each line"
_WRITTEN = "--shots 10 --save-lists lists, which leaves such a list"
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045,
)  # fmt: skip
"""97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom."""


def draw_rows(
    config: ClassificationConfig,
    manifest: Manifest,
    labels: np.ndarray,
    rows: np.ndarray,
    *,
    class_names: list[str] | None,
    progress: Progress,
) -> list[np.ndarray] | None:
    """The rows of each draw, int64 ascending; None if all are learnt from.

    `labels` [n] are those of the manifest, with `class_names` where they have any; draws are made
    of `rows`. `progress` is told of classes that have too few images. Writes the lists where
    `config.save_lists` says so. Raises ConfigError for a list that cannot be used, and for a folder
    that cannot be written.
    """
    if config.fraction is None and config.shots is None and config.train_list is None:
        return None
    of_all = _short_names(manifest.table["key"].to_pylist())
    if config.train_list is not None:
        chosen = "listed"
        drawn = [
            _listed(Path(str(one.train_list)), of_all, rows, config) for one in config.each_draw()
        ]
    else:
        chosen = "shots" if config.shots else "fraction"
        chosen += f" {config.shots or config.fraction:g}, seed {config.seed}"
        names, classes = [of_all[row] for row in rows.tolist()], labels[rows]
        numbers = range(config.first_draw, config.first_draw + config.draws)
        drawn = [
            rows[drawn_places(names, classes, config=config, number=number)] for number in numbers
        ]
        _tell_small_classes(config, classes, class_names, progress)
    counts = [min(map(len, drawn)), max(map(len, drawn))]
    progress.note(
        f"training images: {' to '.join(f'{n:,}' for n in dict.fromkeys(counts))} of "
        f"{len(rows):,} ({chosen})" + (f", {len(drawn)} draws" if len(drawn) > 1 else "")
    )
    if config.save_lists:
        _save(Path(config.save_lists), drawn, of_all, config, chosen)
    return drawn


def drawn_places(
    names: list[str], classes: np.ndarray, *, config: ClassificationConfig, number: int
) -> np.ndarray:
    """Places of the drawn images, int64 ascending, of n images with `names` and `classes` [n]."""
    prefix = f"{config.seed} {number} "
    digests = [
        hashlib.sha256((prefix + name).encode(errors="surrogatepass")).digest() for name in names
    ]
    order = sorted(range(len(names)), key=lambda place: (classes[place], digests[place]))
    sorted_classes = classes[order]
    _, first, counts = np.unique(sorted_classes, return_index=True, return_counts=True)
    if config.shots:
        wanted = np.full(len(counts), config.shots)
    else:
        wanted = np.maximum(1, np.floor(float(config.fraction or 0) * counts + 0.5)).astype(int)
    within = np.arange(len(order)) - np.repeat(first, counts)
    return np.sort(np.array(order)[within < np.repeat(wanted, counts)])


def _short_names(keys: list[str]) -> list[str]:
    """Keys without the folders that all share: a list is the same wherever the images lie."""
    shared = os.path.commonpath({key.rpartition("/")[0] for key in keys})
    return [key.removeprefix(f"{shared}/") for key in keys]


def _tell_small_classes(
    config: ClassificationConfig,
    classes: np.ndarray,
    names: list[str] | None,
    progress: Progress,
) -> None:
    numbers, counts = np.unique(classes, return_counts=True)
    small = np.flatnonzero(counts < (config.shots or 0))
    if len(small):
        first = int(numbers[small[0]])
        named = names[first] if names else first
        progress.note(
            f"{len(small):,} classes have fewer than {config.shots} images, the first is "
            f"{named!r} with {counts[small[0]]}: all of them are taken"
        )


# --- lists ----------------------------------------------------------------------------------------


def _listed(
    file: Path, names: list[str], rows: np.ndarray, config: ClassificationConfig
) -> np.ndarray:
    """Those of `rows` that a file names: by key, or by the last parts of it. Raises MilanError."""
    lines = read_lines(file, _LINES)
    wanted = dict.fromkeys(_name_in(line) for line in lines if line.strip() and line[0] != "#")
    if not wanted:
        raise ConfigError(f"{file} names no image", expected=_LINES, fix=_WRITTEN)
    parts = {name.count("/") + 1 for name in wanted}
    known: dict[str, int] = {}
    times: Counter[str] = Counter()
    for row in rows.tolist():
        words = names[row].split("/")
        for count in parts:
            ending = "/".join(words[-count:])
            if len(words) >= count and ending in wanted:
                known[ending] = row
                times[ending] += 1
    if twice := [name for name, count in times.items() if count > 1]:
        raise ConfigError(
            f"{len(twice):,} names in {file} stand for several images, the first is {twice[0]!r}",
            expected="names with their folder, such as class/image.jpg",
            fix=_WRITTEN,
        )
    if missing := [name for name in wanted if name not in known]:
        fix = _WRITTEN if config.val_data else "--val-data with images of its own"
        raise ConfigError(
            f"{len(missing):,} of {len(wanted):,} names in {file} are no training images, the "
            f"first is {missing[0]!r}",
            expected=f"names such as {names[int(rows[0])]!r}",
            fix="without --limit" if config.limit else fix,
        )
    return np.unique(np.array(list(known.values()), np.int64))


def _save(
    folder: Path,
    drawn: list[np.ndarray],
    names: list[str],
    config: ClassificationConfig,
    chosen: str,
) -> None:
    """A file a draw: what it is, and names in order. Raises ConfigError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, rows in enumerate(drawn, config.first_draw):
            head = f"# {len(rows)} training images, {chosen}, draw {number} (milan)"
            chosen_names = sorted(names[row] for row in rows.tolist())
            lines = [head, *map(_line_of, chosen_names)]
            write_text(folder / f"draw-{number}.txt", "\n".join(lines) + "\n")
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be written: {error.strerror}",
            expected="a folder for the lists",
            fix="--save-lists elsewhere",
        ) from None


def _line_of(name: str) -> str:
    """A name as a line: as it is, or as a JSON string where such a line would say something else
    (a comment, two lines, no spaces at its ends) or is no UTF-8."""
    plain = name.isprintable() and name == name.strip() and name[0] not in '#"'
    return name if plain else json.dumps(name)


def _name_in(line: str) -> str:
    """The name that a line has: see `_line_of`."""
    line = line.strip()
    try:
        return json.loads(line) if line[0] == '"' else line
    except ValueError:  # a name that begins with a quotation mark, written by hand
        return line


# --- what draws say together ----------------------------------------------------------------------


def over_draws(metrics: list[dict[str, Any]], columns: Sequence[Column]) -> dict[str, Any]:
    """Metrics of several draws as those of one: means, with 95 % intervals over the draws.

    The mean is taken of the figures of `columns`, and of what corruptions leave, of the baselines
    too; whatever else is the same for all draws stays; `draws` has what differs, for each.
    """
    if len(metrics) == 1:
        return metrics[0]
    merged: dict[str, Any] = {}
    for column in columns:
        values = [one.get(column.key) for one in metrics]
        merged[column.key] = _mean(values)
        interval = None if None in values else _interval(values, column)
        merged[f"{column.key}_interval"] = interval
    for key in ("corrupted_top1", "corrupted_share", "corruptions"):
        if key in metrics[0]:
            merged[key] = _mean([one[key] for one in metrics])
    if "baseline" in metrics[0]:
        merged["baseline"] = over_draws([one["baseline"] for one in metrics], columns)
    same = {
        key: value
        for key, value in metrics[0].items()
        if key not in merged and all(one.get(key) == value for one in metrics)
    }
    differing = [{k: v for k, v in one.items() if k not in same} for one in metrics]
    return {**merged, **same, "draws": differing}


def _mean(values: list[Any]) -> Any:
    """Of numbers, of numbers by name, or of lists of them; None if one of them is None."""
    if None in values:
        return None
    if isinstance(values[0], dict):
        return {key: _mean([value[key] for value in values]) for key in values[0]}
    if isinstance(values[0], list):
        return [_mean(list(together)) for together in zip(*values, strict=True)]
    return round(sum(values) / len(values), 2)


def _interval(values: list[Any], column: Column) -> list[float]:
    """Of the mean of draws: Student's t. A share ends at 0 and 100 %."""
    half = _T[len(values) - 2] * float(np.std(values, ddof=1)) / len(values) ** 0.5
    ends = np.mean(values) - half, np.mean(values) + half
    if column.heading.endswith("%"):
        ends = max(0, ends[0]), min(100, ends[1])
    return [round(float(end), 2) for end in ends]
