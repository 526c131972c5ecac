"""A run's folder: whose run it is, whether it may go on, and on which part of its store.

runs/pretrain/run.json       identity, settings, stretches of the store, id: written once, and
                             added to when the run moves on or drops images
    checkpoints/             milan.training.checkpoint
    log.jsonl curves.csv sheet.png tensorboard/   milan.reporting.log
    encoder.safetensors metrics.json    at the end of every call
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from milan.config import PretrainConfig
from milan.core.atomic import ensure_writable, lock_folder, write_json
from milan.core.progress import Progress
from milan.data import changed_images
from milan.errors import CacheError, TrainError
from milan.models.export import ENCODER
from milan.reporting.log import CURVES, LOG, SHEET
from milan.store.cache import TargetCache
from milan.training import checkpoint

ABOUT = "run.json"
METRICS = "metrics.json"
_ENDING = 10.0  # seconds in which a life of the ranks that was ended may still hold the lock

# What may change between a run and its resumption, because it changes no step.
_FREE = (
    "cache", "layer", "out", "recipe", "data_root", "num_workers", "device", "log_every",
    "save_every", "save_minutes", "keep", "local", "cache_limit", "micro_batch", "devices",
    "num_nodes", "address", "parallel", "max_restarts", "report_to", "picture_every",
    "probe_every", "probe_images", "on_nonfinite", "checkpoint_activations",
    "on_changed", "on_growth",  # what these did is saved with the run
)  # fmt: skip


def step_to_resume(
    run: Path, config: PretrainConfig, *, resume: str, overwrite: bool, progress: Progress
) -> int | None:
    """The step of the newest whole checkpoint of the run to go on with; None: it begins anew.

    Writes nothing. Raises TrainError for a folder that holds another run, with the settings that
    differ, or something that `begin` would replace.
    """
    there, saved = (run / ABOUT).exists(), checkpoint.steps(run)
    # What a run leaves at its end, or what is not ours: lost, if this run began here at step 0.
    ends = [ENCODER, METRICS]
    ends += [] if there else [LOG, CURVES, "tensorboard", checkpoint.FOLDER]
    kept = [name for name in ends if (run / name).exists()]
    if kept and not (saved and there) and not overwrite and resume == "auto":
        raise TrainError(
            f"{run} holds {', '.join(kept)}, and no run that can go on",
            expected="an empty folder, or a run with its run.json and checkpoints",
            fix="--out another folder, or --overwrite to replace them",
        )
    if not (saved and there and resume == "auto"):
        return None
    try:
        differing = _differing(run, config)
    except TrainError:
        if not overwrite:
            raise
        return None
    if differing and not overwrite:
        raise TrainError(
            f"{run} holds a run of other settings ({', '.join(differing)})",
            expected="the settings it was started with",
            fix="--out another folder, or --overwrite (or --resume never) to start it anew",
        )
    return None if differing else checkpoint.newest(run, note=progress.note)


def writable(run: Path) -> None:
    """Make the folder of a run. Raises TrainError if nothing can be written there."""
    try:
        ensure_writable(run)
    except OSError as error:
        raise TrainError(
            f"{run} cannot be written: {error.strerror}", fix="--out another folder"
        ) from None


def begin(run: Path, config: PretrainConfig, targets: TargetCache, published: dict) -> None:
    """Make the folder, which is claimed, that of a new run; what a run left there before goes."""
    shutil.rmtree(run / checkpoint.FOLDER, ignore_errors=True)
    for name in (LOG, CURVES, METRICS, f"{SHEET}.png", ENCODER, changed_images.CSV):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "tensorboard", ignore_errors=True)
    facts = {
        "id": uuid.uuid4().hex[:12],
        "identity": _identity(config, targets.digest),
        "config": asdict(config),
        "differs": {k: list(v) for k, v in published.items()},
        "fingerprint": targets.spec.fingerprint(),
        "targets": _shown(targets),
        "stretches": [_stretch(0, targets)],
        "versions": {n: version(n) for n in ("milan-pretrain", "torch", "timm", "tensorstore")},
        "command": sys.argv,
        "platform": platform.platform(),
    }
    write_json(run / ABOUT, facts)


@contextmanager
def locked(run: Path, *, progress: Progress) -> Iterator[None]:
    """Make a run's folder and lock it: one call at a time trains there.

    Raises TrainError: it cannot be written, or another call keeps it. An earlier life of the same
    run, which is ending, is given a moment to end.
    """
    writable(run)
    lock, until = None, time.monotonic() + _ENDING
    while lock is None:
        try:
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
            progress.note(f"not locked: {run} ({error.strerror}); start nothing else there")
            break
    try:
        yield
    finally:
        if lock:
            lock.close()


def again(run: Path) -> Callable[[], dict[str, Any]]:
    """What a call of pretrain is told when its ranks live again, as a function of what is there.

    Once their run has begun, that it goes on: it was replaced already if it was to be.
    """
    before = _id(run)
    return lambda: {} if _id(run) == before else {"resume": "auto", "overwrite": False}


def _id(run: Path) -> str | None:
    try:
        return read_run(run).get("id")
    except (OSError, TrainError):
        return None


def read_run(run: Path) -> dict[str, Any]:
    """What run.json says. Raises TrainError if it is damaged."""
    try:
        found = json.loads((run / ABOUT).read_text())
        if not isinstance(found, dict):
            raise ValueError
        return found
    except ValueError:
        raise TrainError(
            f"{run / ABOUT} is damaged",
            expected="the JSON that the run was begun with",
            fix="a copy of it, or --overwrite (or --resume never) to start anew",
        ) from None


def stretches(parts: list[dict[str, Any]], config: PretrainConfig) -> list[tuple[int, TargetCache]]:
    """(first epoch, the store as it was when the run got there), oldest first.

    `parts` as run.json has them. A store may have grown since: a run goes on with what it knows.
    Raises CacheError if a part of it is not what it was.
    """
    found = []
    for part in parts:
        cache = TargetCache(config.cache, layer=config.layer, pinned=part["generations"])
        if cache.digest != part["cache"]:
            raise CacheError(
                f"{config.cache} is not the store that {config.out} was trained on "
                f"(cache: {part['cache'][:12]} != {cache.digest[:12]})",
                fix="the store it began with, or --out another folder",
            )
        found.append((part["epoch"], cache))
    return found


def move_on(run: Path, config: PretrainConfig, epoch: int) -> None:
    """From `epoch` on the run sees all that its store holds now."""
    newest, read = TargetCache(config.cache, layer=config.layer), read_run(run)
    if newest.digest != read["stretches"][-1]["cache"]:
        # A stretch that was to begin then, or later, and never did, is replaced.
        parts = [part for part in read["stretches"] if part["epoch"] < epoch]
        write_json(run / ABOUT, read | {"stretches": [*parts, _stretch(epoch, newest)]})


def _stretch(epoch: int, cache: TargetCache) -> dict[str, Any]:
    return {"epoch": epoch, "generations": cache.pinned, "cache": cache.digest}


def _identity(config: PretrainConfig, digest: str) -> dict[str, Any]:
    """What must not change between a run and its resumption."""
    fixed = {k: v for k, v in asdict(config).items() if k not in _FREE}
    return json.loads(json.dumps({"cache": digest, **fixed}))


def _shown(targets: TargetCache) -> dict[str, Any]:
    """What people know a store by."""
    return {
        "teacher": targets.attributes["about"]["name"],
        "image_size": targets.view_spec.size,
        "grid": targets.grid,
        "width": targets.spec.channels,
        "codec": targets.spec.codec,
    }


def _differing(run: Path, config: PretrainConfig) -> list[str]:
    """'field: the run's != the one now' for each that differs."""
    read = read_run(run)
    if "stretches" not in read:
        ours = f"{version('milan-pretrain')}, whose runs are kept otherwise"
        return [f"milan: an earlier version != {ours}"]
    first = read["stretches"][0]
    try:
        cache = TargetCache(config.cache, layer=config.layer, pinned=first["generations"])
    except CacheError:
        cache = TargetCache(config.cache, layer=config.layer)  # says what is wrong, or differs
    before, now = read["identity"], _identity(config, cache.digest)
    if before["cache"] != now["cache"]:
        before, now = before | read["targets"], now | _shown(cache)
    return [f"{k}: {before.get(k)} != {now[k]}" for k in now if before.get(k) != now[k]]
