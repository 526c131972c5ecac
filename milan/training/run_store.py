"""The part of a store that a run knows, and the images that it leaves out."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from milan.config import PretrainConfig
from milan.core.size import as_size
from milan.data.changed_images import CSV, changed_images
from milan.data.dataset import CachedDataset
from milan.data.order import Stream
from milan.errors import CacheError, TrainError
from milan.models.decoder import PUBLISHED
from milan.models.export import CHANNELS
from milan.objectives.base import Objective
from milan.reporting.run_files import layers_of_part, read_run, update_run
from milan.store.cache import TargetCache
from milan.store.joined import open_targets
from milan.store.statistics import FOLDER, Statistics, find_digest, keep, settle, statistics_of
from milan.training.channels import Prepared, colours_of
from milan.training.loop import Context
from milan.training.run import Differing, compared, identity_of, stored_identity


def decoder_of(run: Path) -> dict[str, Any]:
    """All arguments of a run's decoder, which it keeps whatever the defaults are by now."""
    about = read_run(run)
    # Once every encoder had the published decoder, and the run did not say so.
    return about.get("decoder") or PUBLISHED | about["identity"]["decoder"]


# --- the part of the store that a run knows -------------------------------------------------------


def open_cache_of(config: PretrainConfig, part: dict[str, Any] | None = None) -> TargetCache:
    """The targets of a run, as it knows them in a `part` of it; else all that is there now."""
    pins = [layer["generations"] for layer in layers_of_part(part)] if part else []
    return open_targets(config.cache, config.layer, mask_layer=config.mask_layer, pinned=pins)


def known_parts(
    parts: list[dict[str, Any]], config: PretrainConfig
) -> list[tuple[int, TargetCache]]:
    """(first epoch, the store as it was when the run got there), oldest first.

    `parts` as run.json has them. A store may have grown since: a run goes on with what it knows.
    Raises CacheError if a part of it is not what it was.
    """
    caches = []
    for part in parts:
        cache = open_cache_of(config, part)
        if cache.digest != part["cache"]:
            raise CacheError(
                f"{config.cache} is not the store that {config.out} was trained on "
                f"(cache: {part['cache'][:12]} != {cache.digest[:12]})",
                fix="the store it began with, or --out another folder",
            )
        caches.append((part["epoch"], cache))
    return caches


def moved_on(
    parts: list[dict[str, Any]], config: PretrainConfig, epoch: int
) -> list[dict[str, Any]]:
    """The parts of a run that reads all that its store holds now, from `epoch` on."""
    newest = open_cache_of(config)
    if newest.digest == parts[-1]["cache"]:
        return parts
    # A part that was to begin then, or later, and never did, is replaced.
    return [*(part for part in parts if part["epoch"] < epoch), part_of(epoch, newest)]


def part_of(epoch: int, cache: TargetCache) -> dict[str, Any]:
    """A part of a run, as run.json has it; `layers` where it reads several."""
    part: dict[str, Any] = {"epoch": epoch, "generations": cache.pinned, "cache": cache.digest}
    if len(cache.parts) > 1:
        layers = [{"generations": one.pinned, "cache": one.digest} for one in cache.parts]
        part["layers"] = layers
    return part


# --- what makes a run the same --------------------------------------------------------------------


def identity_with(values: dict[str, Any], cache: TargetCache) -> dict[str, Any]:
    """What must stay as it is for a run to be resumed: its fields that say so, and the store."""
    return cache.identity | identity_of(PretrainConfig, values)


def store_of_run(cache: TargetCache) -> dict[str, Any]:
    """What the run.json of a new run says of its store."""
    return {
        "fingerprint": cache.spec.fingerprint(),
        "targets": _summary_of(cache),
        "stretches": [part_of(0, cache)],
    }


def _summary_of(cache: TargetCache) -> dict[str, Any]:
    """What people know a store by; of several layers a list of what differs between them."""
    columns: dict[str, list[Any]] = {
        "teacher": [part.attributes["about"]["name"] for part in cache.parts],
        "image_size": [cache.view_spec.size],
        "grid": [as_size(part.grid) for part in cache.parts],
        "width": [part.spec.channels for part in cache.parts],
        "codec": [part.spec.codec for part in cache.parts],
    }
    if colours := colours_of(cache.view_spec):
        columns[CHANNELS] = [colours.about()]
    return {name: of[0] if len(of) == 1 else of for name, of in columns.items()}


def differing(run: Path, config: PretrainConfig, values: dict[str, Any]) -> Differing:
    """What differs between the run in a folder and the one of these settings."""
    content = read_run(run)
    try:
        cache = open_cache_of(config, content["stretches"][0])
    except CacheError:
        cache = open_cache_of(config)  # says what is wrong, or differs
    before = stored_identity(run, PretrainConfig)
    now = identity_with(values, cache)
    if before["cache"] != now["cache"]:
        before, now = before | content["targets"], now | _summary_of(cache)
    return compared(before, now)


# --- statistics of targets ------------------------------------------------------------------------


def digests_of(run: Path) -> list[str]:
    """Those of a run's statistics of targets, of each layer that is normalised by some."""
    return read_run(run)["identity"].get("target_statistics", [])


def settle_statistics(objective: Objective, context: Context, step: int | None) -> list[str]:
    """The digests of the statistics by which targets are normalised, the same on all ranks.

    A run that goes on has its own copy. A new one has those kept with the store; where there are
    none they are measured, and kept there if it can be written. Raises TrainError for a run without
    its copy.
    """
    ranks, progress, run = context.ranks, context.progress, context.run

    def begun(cache: TargetCache, number: int) -> Statistics:
        statistics, store = statistics_of(cache), cache.path
        if not keep(statistics, cache, store / FOLDER):
            progress.note(f"target statistics: kept with the run, {store} cannot be written")
        return statistics

    def resumed(cache: TargetCache, number: int) -> Statistics:
        digest = digests_of(run)[number]
        for folder in (run / FOLDER, cache.path / FOLDER):
            if statistics := find_digest(folder, digest):
                return statistics
        raise TrainError(
            f"the target statistics {digest[:12]} of {run} are not in its folder {FOLDER}/",
            expected="the numbers that it was trained with",
            fix="a copy of that folder, or --out another folder",
        )

    look, digests = begun if step is None else resumed, list[str]()
    for number, cache in enumerate(objective.normalised_by):
        statistics = ranks.on_rank0(partial(look, cache, number))
        settle(cache, statistics)
        digests.append(statistics.digest)
    return digests


def keep_statistics(objective: Objective, run: Path) -> None:
    """Write them into a new run's folder. Raises TrainError."""
    for cache in objective.normalised_by:
        if not keep(statistics_of(cache), cache, run / FOLDER):
            raise TrainError(f"{run} cannot be written", fix="--out another folder")


# --- images that changed since extraction ---------------------------------------------------------


def without_changed(
    dataset: CachedDataset,
    order: Stream,
    context: Context,
    *,
    policy: str,
    step: int,
    prepared: Prepared,
) -> Stream:
    """The order without images that changed or are gone: those saved with the run, and new ones.

    Those dropped from the store are known; with the policy `drop` all others are compared, and the
    channels of a student that sees some of its own. New
    ones are saved in run.json, with the `step` that this call starts from. At the beginning of a
    run such rows leave the order as those without targets do; in a resumed run other rows take
    their places, so that an epoch keeps its steps. Raises ConfigError if too few images are left.
    """
    run, ranks = context.run, context.ranks
    # Of rank 0: the store may be extended at this moment.
    dropped, gone = ranks.on_rank0(lambda: (_dropped_before(run), dataset.cache.dropped.tolist()))
    new = {row: (step, "dropped from the store") for row in gone if row not in dropped}
    if policy == "drop" and not dataset.stored:  # stored views are verified with their targets
        rows = dataset.good[~np.isin(dataset.good, list(dropped))]
        mine = changed_images(
            dataset, rows[ranks.rank :: ranks.size], stop=context.stop, progress=context.progress
        )
        parts = ranks.gather_objects(mine)
        new |= {row: (step, why) for _, part in parts for row, why in part.items()}
    if policy == "drop":
        faults = prepared.faults_now(dataset.good, context)
        new |= {row: (step, why) for row, why in faults.items() if row not in dropped | new}
    dropped |= new
    if new:
        ranks.on_rank0(lambda: update_run(run, dropped=dropped))
    if not dropped:
        return order
    ranks.on_rank0(lambda: _write_csv(run / CSV, dropped, dataset))
    context.progress.note(
        f"dropped: {len(dropped):,} images changed or deleted since extraction, see {run / CSV}"
    )
    removed = [row for row, (at, _) in dropped.items() if at == 0]
    replaced = [row for row, (at, _) in dropped.items() if at > 0]
    return order.without(np.array(removed, np.int64), np.array(replaced, np.int64))


def _dropped_before(run: Path) -> dict[int, tuple[int, str]]:
    """row -> (step at which it was dropped, reason), of earlier calls."""
    return {int(row): tuple(pair) for row, pair in read_run(run).get("dropped", {}).items()}


def _write_csv(path: Path, dropped: dict[int, tuple[int, str]], dataset: CachedDataset) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "key", "reason", "from_step"])
        for row, (at, why) in sorted(dropped.items()):
            writer.writerow([row, dataset.cache.manifest.key(row), why, at])
