"""A run's folder: whether a run may be resumed there, on which part of its store, without what.

What lies in the folder is drawn in milan.reporting.run_files.
"""

from __future__ import annotations

import csv
import errno
import json
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from milan.config import PretrainConfig
from milan.core.atomic import cannot_write, ensure_writable, lock_folder
from milan.core.config_fields import identity_names
from milan.core.progress import Progress
from milan.data.changed_images import CSV, changed_images
from milan.data.dataset import CachedDataset
from milan.data.order import Stream
from milan.errors import CacheError, TrainError
from milan.models.decoder import PUBLISHED
from milan.models.export import ENCODER
from milan.reporting.log import last_step
from milan.reporting.run_files import (
    CURVES,
    LOG,
    METRICS,
    RUN,
    SHEET,
    TENSORBOARD,
    read_metrics,
    read_run,
    update_run,
    write_run,
)
from milan.store.cache import TargetCache
from milan.training import checkpoint
from milan.training.loop import Context

_LOCK_SECONDS = 10.0  # in which an earlier attempt of the same run, that is ending, holds the lock
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_SCHEDULE = ("epochs", "warmup_epochs", "lr", "min_lr")  # what a finished run may go on with anew


@dataclass(frozen=True)
class Start:
    """How a call begins, as its folder was when the call had locked it."""

    step: int | None = None
    """Of the checkpoint to resume; None: the run begins anew."""
    why: str = ""
    """Why it begins anew although the folder has a log or checkpoints; empty if it has none."""
    schedule: tuple[str, ...] = ()
    """'field: the run's -> the new one' of a finished run that goes on with more epochs."""


def decide(
    run: Path, config: PretrainConfig, values: dict[str, Any], *, resume: str, overwrite: bool,
    progress: Progress,
) -> Start:  # fmt: skip
    """Whether a run that is locked is resumed from its newest whole checkpoint, or begins anew.

    `values` are the settings with all defaults filled in. Writes nothing. Raises TrainError for a
    folder that holds another run, with the settings that differ, or files that `start_run` would
    replace.
    """
    has_run, saved = (run / RUN).exists(), checkpoint.steps(run)
    # Results of a run, or files that are not ours: lost, if this run began here at step 0.
    results = [ENCODER, METRICS]
    results += [] if has_run else [LOG, CURVES, TENSORBOARD, checkpoint.FOLDER]
    present = [name for name in results if (run / name).exists()]
    if present and not (saved and has_run) and not overwrite and resume == "auto":
        raise TrainError(
            f"{run} holds {', '.join(present)}, and no run that can be resumed",
            expected="an empty folder, or a run with its run.json and checkpoints",
            fix="--out another folder, or --overwrite to replace them",
        )
    if resume == "never" or not (saved and has_run):
        return Start(why=_why_anew(run, saved, "resume never" if resume == "never" else ""))
    try:
        differing = _differing(run, config, values)
    except TrainError:
        if not overwrite:
            raise
        return Start(why=_why_anew(run, saved, "overwrite"))
    if not differing:
        return Start(checkpoint.newest(run, note=progress.note))
    if overwrite:
        return Start(why=_why_anew(run, saved, "overwrite"))
    if differing.keys() <= {*_SCHEDULE} and _more_epochs(differing):
        step = checkpoint.newest(run, note=progress.note)
        if step is not None and step == _steps_of(run, step):
            changes = [f"{name} {old} -> {new}" for name, (old, new) in differing.items()]
            return Start(step, schedule=tuple(changes))
    told = ", ".join(f"{name}: {old} != {new}" for name, (old, new) in differing.items())
    raise TrainError(
        f"{run} holds a run of other settings ({told})",
        expected="the settings it was started with"
        + ("; more --epochs once it has finished" if "epochs" in differing else ""),
        fix="--out another folder, or --overwrite (or --resume never) to start it anew",
    )


def _why_anew(run: Path, saved: list[int], asked: str) -> str:
    logged = last_step(run)
    if not (logged or saved):
        return ""
    if saved and asked:
        return f"--{asked} replaces the run of step {max(logged, saved[-1])}"
    return f"its log speaks of step {logged}, and no checkpoint was written"


def _more_epochs(differing: dict[str, tuple[Any, Any]]) -> bool:
    old, new = differing.get("epochs", (0, 0))
    return isinstance(old, int) and new > old


def _steps_of(run: Path, step: int) -> int | None:
    """How many steps the run has to which the whole checkpoint of `step` belongs."""
    told = checkpoint.read_state(run, step).get("steps")  # a checkpoint of an older version: None
    return told or read_metrics(run).get("steps")


def start_run(
    run: Path, cache: TargetCache, values: dict[str, Any], differs: dict[str, tuple[Any, Any]],
    **more: Any,
) -> None:  # fmt: skip
    """Make the folder, which is locked, that of a new run; results of an earlier one are removed.

    `differs`: settings that deviate from the recipe, with (value, the recipe's). `more` is kept in
    run.json as it is.
    """
    for folder in (checkpoint.FOLDER, TENSORBOARD):
        shutil.rmtree(run / folder, ignore_errors=True)
    for name in (LOG, CURVES, METRICS, f"{SHEET}.png", ENCODER, CSV):
        (run / name).unlink(missing_ok=True)
    content = {
        "id": uuid.uuid4().hex[:12],
        "identity": _identity(values, cache.digest),
        "config": values,
        "differs": {name: list(pair) for name, pair in differs.items()},
        "fingerprint": cache.spec.fingerprint(),
        "targets": _summary_of(cache),
        "stretches": [part_of(0, cache)],
        "versions": {n: version(n) for n in ("milan-pretrain", "torch", "timm", "tensorstore")},
        "command": sys.argv,
        "platform": platform.platform(),
    }
    write_run(run, content | more)


def continue_run(
    run: Path, start: Start, parts: list[dict[str, Any]], values: dict[str, Any]
) -> None:
    """Write down what changes from the step on at which a run is resumed: its store, its schedule.

    Call it once the checkpoint is known to fit.
    """
    content = read_run(run)
    changes: dict[str, Any] = {}
    if parts != content["stretches"]:
        changes["stretches"] = parts
    if start.schedule:
        schedule = {name: values[name] for name in _SCHEDULE}
        changes["identity"] = content["identity"] | schedule
        changes["config"] = content["config"] | schedule
        before = {name: content["config"].get(name) for name in _SCHEDULE}
        changes["schedules"] = [
            *content.get("schedules", []), {"until_step": start.step, **before}
        ]  # fmt: skip
    if changes:
        update_run(run, **changes)


@contextmanager
def locked(run: Path, *, progress: Progress) -> Iterator[None]:
    """Make a run's folder and lock it: one call at a time trains there, or decides what to do.

    Raises TrainError: it cannot be written, or another call has the lock. An earlier attempt of
    the same run is given a moment to end. A folder that was made here and got no run is removed.
    """
    lock, until, made = None, time.monotonic() + _LOCK_SECONDS, list[Path]()
    while lock is None:
        try:
            made = made or [folder for folder in (run, *run.parents) if not folder.exists()]
            ensure_writable(run)
            lock = lock_folder(run)
        except BlockingIOError as holder:
            if time.monotonic() > until:
                raise TrainError(
                    f"{run} is in use by {holder}",
                    expected="one training at a time in a folder",
                    fix="wait for it, or --out another folder",
                ) from None
            time.sleep(0.2)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                progress.note(f"not locked: {run} ({error.strerror}); start nothing else there")
                break
            if error.errno == errno.ENOENT and time.monotonic() < until and _can_be_made(run):
                continue  # another call made the folder, got no run, and removed it
            found, fix = f"{run} cannot be written: {error.strerror}", "--out another folder"
            if error.errno not in (errno.ENOENT, errno.ENOTDIR):
                found, fix = cannot_write(run, error) or (found, fix)
            raise TrainError(found, fix=fix) from None
    try:
        yield
    finally:
        if not (run / RUN).exists():  # the folder is left as it was
            with suppress(OSError):  # one that is used by others meanwhile
                (run / ".lock").unlink()
                for folder in made:
                    folder.rmdir()
        if lock:
            lock.close()


def _can_be_made(folder: Path) -> bool:
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return folder.is_dir()


def restart_arguments(run: Path) -> Callable[[], dict[str, Any]]:
    """Arguments to change when the ranks of a call of `pretrain` are restarted.

    Once their run has begun they resume it: it was replaced already if it had to be.
    """
    before = _id(run)
    return lambda: {} if _id(run) == before else {"resume": "auto", "overwrite": False}


def _id(run: Path) -> str | None:
    try:
        return read_run(run).get("id")
    except (OSError, TrainError):
        return None


def decoder_of(run: Path) -> dict[str, Any]:
    """All arguments of a run's decoder, which it keeps whatever the defaults are by now."""
    about = read_run(run)
    # Once every encoder had the published decoder, and the run did not say so.
    return about.get("decoder") or PUBLISHED | about["identity"]["decoder"]


# --- the part of the store that a run knows -------------------------------------------------------


def known_parts(
    parts: list[dict[str, Any]], config: PretrainConfig
) -> list[tuple[int, TargetCache]]:
    """(first epoch, the store as it was when the run got there), oldest first.

    `parts` as run.json has them. A store may have grown since: a run goes on with what it knows.
    Raises CacheError if a part of it is not what it was.
    """
    caches = []
    for part in parts:
        cache = TargetCache(config.cache, layer=config.layer, pinned=part["generations"])
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
    newest = TargetCache(config.cache, layer=config.layer)
    if newest.digest == parts[-1]["cache"]:
        return parts
    # A part that was to begin then, or later, and never did, is replaced.
    return [*(part for part in parts if part["epoch"] < epoch), part_of(epoch, newest)]


def part_of(epoch: int, cache: TargetCache) -> dict[str, Any]:
    """A part of a run, as run.json has it."""
    return {"epoch": epoch, "generations": cache.pinned, "cache": cache.digest}


# --- what makes a run the same --------------------------------------------------------------------


def _identity(values: dict[str, Any], digest: str) -> dict[str, Any]:
    """What must stay as it is for a run to be resumed: fields that say so, and the store."""
    fixed = {name: values[name] for name in identity_names(PretrainConfig)}
    return json.loads(json.dumps({"cache": digest, **fixed}))


def _summary_of(cache: TargetCache) -> dict[str, Any]:
    """What people know a store by."""
    return {
        "teacher": cache.attributes["about"]["name"],
        "image_size": cache.view_spec.size,
        "grid": cache.grid,
        "width": cache.spec.channels,
        "codec": cache.spec.codec,
    }


def _differing(
    run: Path, config: PretrainConfig, values: dict[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """field -> (the run's, the one now) for each that differs."""
    content = read_run(run)
    pinned = content["stretches"][0]["generations"]
    try:
        cache = TargetCache(config.cache, layer=config.layer, pinned=pinned)
    except CacheError:
        cache = TargetCache(config.cache, layer=config.layer)  # says what is wrong, or differs
    before, now = content["identity"], _identity(values, cache.digest)
    if before["cache"] != now["cache"]:
        before, now = before | content["targets"], now | _summary_of(cache)
    return {k: (before.get(k), now[k]) for k in now if before.get(k) != now[k]}


# --- images that changed since extraction ---------------------------------------------------------


def without_changed(
    dataset: CachedDataset, order: Stream, context: Context, *, policy: str, step: int
) -> Stream:
    """The order without images that changed or are gone: those saved with the run, and new ones.

    Those dropped from the store are known; with the policy `drop` all others are compared. New
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
