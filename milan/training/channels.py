"""The channels of a run's student: examined and measured before its first step, kept with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from milan.config import PretrainConfig
from milan.core.paths import as_path
from milan.core.waiting import Stopped
from milan.data.channels import TABLE, Examined, StudentChannels, mean_and_std, sample_of
from milan.data.dataset import CachedDataset
from milan.errors import ConfigError, DataError
from milan.images.channels import RGB, Channels
from milan.images.views import ViewSpec
from milan.models.export import CHANNELS
from milan.reporting.run_files import read_run
from milan.training.loop import Context


@dataclass(frozen=True)
class Prepared:
    """What a run's student sees."""

    channels: StudentChannels | None = None
    """None: the teacher's pixels."""
    kept: dict[str, Any] = field(default_factory=dict)
    """What run.json says of it."""
    faults: dict[int, str] = field(default_factory=dict)
    """Why the channels of rows cannot be used; only with --on-changed drop."""
    fresh: bool = True
    """Whether all this was found in this call."""
    table: pa.Table | None = None
    """Of files beside the images, for `keep_table`."""

    @property
    def law(self) -> Channels | None:
        """The channels, measured."""
        return self.channels.law if self.channels else None

    def faults_now(self, rows: np.ndarray, context: Context) -> dict[int, str]:
        """Why the channels of some of `rows` cannot be used: found when the run began, or now, of a
        run that is resumed, in whose folder the table is."""
        channels, ranks = self.channels, context.ranks
        if channels is None or self.fresh:
            return self.faults
        if channels.folder is None and not channels.dataset.stored:
            return {}  # the images themselves are compared
        mine = channels.changed(
            rows[ranks.rank :: ranks.size], stop=context.stop, progress=context.progress
        )
        return {row: why for _, part in ranks.gather_objects(mine) for row, why in part.items()}

    def keep_table(self, run: Path) -> None:
        """Write the files beside the images to a run's folder, for its loader workers."""
        if self.table is not None:
            with pa.OSFile(str(run / TABLE), "wb") as sink, pa.ipc.new_file(
                sink, self.table.schema
            ) as writer:  # fmt: skip
                writer.write_table(self.table)


def law_of(config: PretrainConfig) -> Channels | None:
    """The channels that the settings name; None: the teacher's colours. Raises ConfigError."""
    if config.student_channels is None:
        return None
    return Channels.parse(config.student_channels, paired=config.student_data is not None)


def colours_of(law: ViewSpec) -> Channels | None:
    """The teacher's colours as channels, where they are made of a file's bands; else None."""
    if law.colours is None:
        return None
    return Channels(RGB, bands=law.colours).measured(np.zeros(0), np.zeros(0))


def prepare(
    config: PretrainConfig, dataset: CachedDataset, rows: np.ndarray, context: Context
) -> Prepared:
    """Examine the channels of a new run, whose images are `rows` (ascending), on all ranks.

    Files beside images are all read and decoded once; of images' own files a sample, and all with
    --on-changed drop. Raises DataError for those that cannot be used, unless they are dropped;
    ConfigError for a constant channel; Stopped.
    """
    law = law_of(config)
    if law is None:
        return Prepared()
    bands = dataset.cache.view_spec.colours
    law = Channels(law.spelled, law.paired, bands=bands)
    folder = None if config.student_data is None else as_path(config.student_data)
    channels, ranks, drops = (
        StudentChannels(law, dataset, folder), context.ranks, config.on_changed == "drop"
    )  # fmt: skip
    sample = sample_of(rows, config.seed)
    looked_at = rows if folder is not None or drops else sample
    mine = channels.examine(
        looked_at[ranks.rank :: ranks.size], sample, stop=context.stop, progress=context.progress
    )
    if ranks.any_flags(int(context.stop.by is not None)):
        raise Stopped(context.stop.by or "a signal to another rank")
    examined = Examined({}, {}, {})
    for _, part in ranks.gather_objects(mine):
        examined.files.update(part.files)
        examined.faults.update(part.faults)
        examined.moments.update(part.moments)
    if examined.faults and not drops:
        first = min(examined.faults)
        raise DataError(
            f"{len(examined.faults):,} of {len(looked_at):,} images have no usable channels "
            f"{law.spelled}, the first is {dataset.cache.manifest.key(first)!r}: "
            f"{examined.faults[first]}",
            expected="for each image a file of its size with these channels, all numbers",
            fix="mend them, or --on-changed drop, which leaves these images out",
        )
    if not examined.moments:
        why = next(iter(examined.faults.values()), "there are none")
        raise DataError(f"no image has usable channels {law.spelled}: {why}")
    moments = [examined.moments[row] for row in sorted(examined.moments)]
    channels.law = law.measured(*mean_and_std(moments))
    channels.table = examined.as_table() if folder is not None else None
    kept = channels.law.about() | {
        "folder": None if folder is None else str(folder), "measured_on": len(moments)
    }  # fmt: skip
    return Prepared(channels, {CHANNELS: kept}, examined.faults, table=channels.table)


def kept_channels(
    run: Path, dataset: CachedDataset, student_data: str | None = None
) -> StudentChannels | None:
    """What the student of a run sees, as run.json keeps it; `student_data`: where files beside the
    images are now. Raises ConfigError if the run has no such files, or has and none are named."""
    about = read_run(run).get(CHANNELS)
    if about is None:
        return None
    law = Channels.from_about(about)
    place = student_data or about["folder"]
    channels = StudentChannels(law, dataset, as_path(place) if law.paired else None)
    channels.table = run / TABLE if law.paired else None
    return channels


def resumed(config: PretrainConfig, dataset: CachedDataset, context: Context) -> Prepared:
    """What the student of a run sees that is resumed. Raises ConfigError."""
    about = context.ranks.on_rank0(lambda: read_run(context.run).get(CHANNELS))
    if about is None:
        return Prepared()
    if about["paired"] != (config.student_data is not None):
        raise ConfigError(
            f"the channels of {context.run} are of "
            + ("files beside the images" if about["paired"] else "the images' own files"),
            expected="what the run began with",
            fix=f"--student-data {about['folder']}" if about["paired"]
            else "without --student-data",
        )  # fmt: skip
    channels = kept_channels(context.run, dataset, config.student_data)
    return Prepared(channels, {CHANNELS: about}, fresh=False)


def describe(prepared: Prepared) -> str:
    """What the student sees, in a line."""
    about = prepared.kept[CHANNELS]
    law = Channels.from_about(about)
    first = 3 * law.colours
    figures = ", ".join(
        f"{number}: {m:.4g} ± {s:.3g}"
        for number, m, s in zip(law.numbers, law.mean[first:], law.std[first:], strict=True)
    )
    where = f"files in {about['folder']}" if law.paired else "the images' own files"
    return (
        f"the student sees {law.count} channels, {law.spelled}, of {where}; mean ± deviation of "
        f"{about['measured_on']:,} images: {figures}"
    )
