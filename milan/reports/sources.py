"""What reports are made of: folders of runs, and the stores that they were trained on.

Every figure of a report is read here, whether it is printed, written to metrics.json or drawn.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any

from milan.core.atomic import read_with_digest
from milan.core.paths import AnyPath, as_path, is_local, names_in, read_file
from milan.errors import ConfigError, MilanError
from milan.evaluation.protocols import Protocol, find_protocol
from milan.reporting.log import read_log
from milan.reporting.run_files import METRICS, RUN, layers_of_part, read_run
from milan.store.cache import TargetCache
from milan.store.format import INDEX, LOG, LOGS
from milan.store.joined import open_targets


@dataclass(frozen=True)
class Run:
    """A folder of a run, or of evaluations alone (a random encoder's, the teacher's)."""

    name: str
    """As people call it."""
    folder: Path
    about: dict[str, Any] = field(default_factory=dict)
    """run.json; empty for a folder of evaluations."""
    log: list[dict[str, Any]] = field(default_factory=list)
    """The lines of its log, in training and of validation images."""
    figures: dict[str, Any] = field(default_factory=dict)
    """metrics.json; empty before the first call has ended."""
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of a protocol -> its metrics."""

    @property
    def config(self) -> dict[str, Any]:
        """All settings of the run; empty for a folder of evaluations."""
        return self.about.get("config", {})

    @property
    def pretrained(self) -> bool:
        """Whether it was trained on a store: not one of fine-tuning, and not evaluations alone."""
        return bool(self.about.get("stretches"))

    @property
    def step(self) -> int:
        """The last step that its log or its figures speak of."""
        return max([line["step"] for line in self.log], default=self.figures.get("step", 0))

    @property
    def state(self) -> str:
        """How far it is, in words."""
        if not self.about:
            return "evaluations only"
        if self.figures.get("finished") and self.figures.get("step", 0) >= self.step:
            return "finished"
        at, of = (self.log[-1].get("epoch") if self.log else 0), self.config.get("epochs")
        return f"epoch {at or 0:.3g}" + (f" of {of:g}" if of else "") + ", not finished"

    def last(self, key: str) -> float | None:
        """The newest value of a figure of the log."""
        return next((line[key] for line in reversed(self.log) if key in line), None)

    @property
    def images_per_second(self) -> float | None:
        """Of the last call; of one that has not ended, the mean of the log."""
        rate = self.figures.get("images_per_second")
        images, seconds = self._trained()
        return rate or (round(images / seconds, 2) if seconds else None)

    @property
    def wait_share(self) -> float | None:
        """The share of data-loading time, of the same."""
        share = self.figures.get("wait_share")
        return self.last("wait_share") if share is None else share

    @property
    def seconds(self) -> float | None:
        """Training time over all calls, from the speeds in the log: without validation."""
        return self._trained()[1] or None

    def _trained(self) -> tuple[float, float]:
        """(images, seconds) of all lines of the log that tell a speed."""
        images = seconds = 0.0
        before, batch = 0, self.config.get("batch_size") or 0
        for line in self.log:
            seen, before = batch * (line["step"] - before), line["step"]
            if line.get("images_per_second"):
                images, seconds = images + seen, seconds + seen / line["images_per_second"]
        return images, seconds


def read_run_folder(name: str, folder: Path) -> Run:
    """The run in a folder, with the metrics of every protocol there. Raises MilanError."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        protocol = None if path.name in (RUN, METRICS) else find_protocol(path.stem)
        if protocol:
            results[protocol.name] = read_result(protocol, folder)
    about = read_run(folder) if (folder / RUN).is_file() else {}
    figures = read_figures(folder / METRICS) if (folder / METRICS).is_file() else {}
    return Run(name, folder, about, read_log(folder, sys.maxsize), figures, results)


def read_result(protocol: Protocol, folder: str | Path) -> dict[str, Any]:
    """The metrics of a protocol for the encoder in a folder. Raises ConfigError."""
    return read_figures(protocol.metrics_file(folder), *(c.key for c in protocol.columns))


def read_figures(path: Path, *needed: str) -> dict[str, Any]:
    """A metrics file with the figures that are needed. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"no metrics at {path}", fix="dvc repro")
    try:
        return read_with_digest(path, dict.fromkeys(needed, (int, float, NoneType)))
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged: {error}",
            expected="the metrics that a command wrote",
            fix="delete it, and dvc repro, or the command that wrote it",
        ) from None


def read_sources(what: Iterable[str]) -> tuple[list[Run], list[AnyPath]]:
    """(runs, stores) that people name, each PATH or NAME=PATH. Raises ConfigError for others."""
    folders: dict[Path, tuple[str, Path]] = {}
    stores: list[AnyPath] = []
    for word in what:
        name, equals, path = word.partition("=")
        if not equals or as_path(word).exists():
            name, path = "", word
        place = as_path(path)
        if (place / INDEX).exists():
            stores.append(place)
        elif isinstance(place, Path) and _is_run(place):
            folders[place.resolve()] = name, place
        else:
            raise ConfigError(
                f"{path} holds no run, no metrics of an evaluation and no finished store"
                if place.exists()
                else f"nothing is at {path}",
                expected="folders that milan pretrain or an evaluation wrote, or stores",
                fix="milan report runs/pretrain targets.zarr",
            )
    short = _short_names([path for path, (name, _) in folders.items() if not name])
    runs = [read_run_folder(name or short[at], folder) for at, (name, folder) in folders.items()]
    return runs, list(dict.fromkeys(stores))


def _is_run(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    return (folder / RUN).is_file() or any(find_protocol(p.stem) for p in folder.glob("*.json"))


def _short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Each folder by the fewest last parts of its path that tell it from the others."""
    names = {}
    for folder in folders:
        parts = folder.parts[1:]
        for count in range(1, len(parts) + 1):
            others = [other for other in folders if other.parts[-count:] == parts[-count:]]
            if others == [folder]:
                break
        names[folder] = "/".join(parts[-count:]) if parts else str(folder)
    return names


# --- stores ---------------------------------------------------------------------------------------


def find_store(run: Run, given: Sequence[AnyPath]) -> TargetCache | str:
    """The store of a pretraining, as the run knows it; or why it is not at hand.

    Looked at: the stores `given`, then the place that run.json names, from here and from each
    folder above the run's: a relative path says where milan was run.
    """
    part, recorded = run.about["stretches"][-1], run.config["cache"]
    pins = [layer["generations"] for layer in layers_of_part(part)]
    paths = [*given, as_path(recorded)]
    if is_local(paths[-1]) and not Path(recorded).is_absolute():
        paths += [folder / recorded for folder in run.folder.resolve().parents]
    for path in dict.fromkeys(paths):
        try:
            cache = open_targets(
                path, run.config.get("layer"), mask_layer=run.config.get("mask_layer"), pinned=pins
            )
        except MilanError:
            continue
        if cache.digest == part["cache"]:
            return cache
    return f"the store that it was trained on ({recorded}, {part['cache'][:12]}) is not there"


def extraction_speed(store: AnyPath) -> float | None:
    """Images a second of the last run that wrote to the store, from its log."""
    speed = None
    logs = [store / LOG] if isinstance(store, Path) else [
        store / LOGS / name for name in sorted(names_in(store / LOGS))
    ]  # fmt: skip
    text = b"".join(read_file(log) for log in logs if log.exists())
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # cut short when the run was killed
        rate = event.get("images_per_second") if isinstance(event, dict) else None
        speed = rate if isinstance(rate, int | float) and rate else speed
    return speed
