"""A run's folder: who may write there, whether its run may be resumed or begins anew.

What lies in the folder is drawn in milan.reporting.run_files.
"""

from __future__ import annotations

import errno
import json
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from milan.core.atomic import cannot_write, ensure_writable, lock_folder
from milan.core.config_fields import as_typed, identity_names
from milan.core.paths import AnyPath, is_local
from milan.core.progress import Progress
from milan.core.versions import version
from milan.data.changed_images import CSV
from milan.data.channels import TABLE
from milan.errors import TrainError
from milan.models.export import ENCODER
from milan.reporting.log import last_step
from milan.reporting.run_files import (
    CURVES,
    LOG,
    METRICS,
    RUN,
    SHEET,
    SUPERVISED,
    TENSORBOARD,
    VALIDATION,
    read_metrics,
    read_run,
    update_run,
    write_run,
)
from milan.store.format import INDEX
from milan.store.statistics import FOLDER as STATISTICS
from milan.training import checkpoint

_LOCK_SECONDS = 10.0  # in which an earlier attempt of the same run, that is ending, holds the lock
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)
_SCHEDULE = ("epochs", "warmup_epochs", "lr", "min_lr")  # what a finished run may go on with anew
_RECORDED = ("milan-pretrain", "torch", "timm", "tensorstore")  # packages whose versions a run says

Differing = dict[str, tuple[Any, Any]]
"""field -> (the run's, the one now) for each that differs."""


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
    run: Path, differing: Callable[[], Differing], *, resume: str, overwrite: bool,
    progress: Progress,
) -> Start:  # fmt: skip
    """Whether a run that is locked is resumed from its newest whole checkpoint, or begins anew.

    `differing` compares the run in the folder with the one that is asked for. Writes nothing.
    Raises TrainError for a folder that holds another run, with the settings that differ, or files
    that `start_run` would replace.
    """
    has_run, saved = (run / RUN).exists(), checkpoint.steps(run)
    # Results of a run, or files that are not ours: lost, if this run began here at step 0.
    results = [ENCODER, METRICS]
    if not has_run:
        results += [LOG, CURVES, VALIDATION, TENSORBOARD, checkpoint.FOLDER, f"{SHEET}.png", CSV]
        results += SUPERVISED
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
        differs = differing()
    except TrainError:
        if not overwrite:
            raise
        return Start(why=_why_anew(run, saved, "overwrite"))
    if not differs:
        return Start(checkpoint.newest(run, note=progress.note))
    if overwrite:
        return Start(why=_why_anew(run, saved, "overwrite"))
    typed = {name: (as_typed(old), as_typed(new)) for name, (old, new) in differs.items()}
    if differs.keys() <= {*_SCHEDULE} and _more_epochs(differs):
        step = checkpoint.newest(run, note=progress.note)
        if step is not None and step == _steps_of(run, step):
            changes = [f"{name} {old} -> {new}" for name, (old, new) in typed.items()]
            return Start(step, schedule=tuple(changes))
    differences = ", ".join(f"{name}: {old} != {new}" for name, (old, new) in typed.items())
    raise TrainError(
        f"{run} holds a run of other settings ({differences})",
        expected="the settings it was started with"
        + ("; more --epochs once it has finished" if "epochs" in differs else ""),
        fix="--out another folder, or --overwrite (or --resume never) to start it anew",
    )


def _why_anew(run: Path, saved: list[int], asked: str) -> str:
    logged = last_step(run)
    if not (logged or saved):
        return ""
    if saved and asked:
        return f"--{asked} replaces the run of step {max(logged, saved[-1])}"
    return f"its log speaks of step {logged}, and no checkpoint was written"


def _more_epochs(differing: Differing) -> bool:
    old, new = differing.get("epochs", (0, 0))
    return isinstance(old, int) and new > old


def _steps_of(run: Path, step: int) -> int | None:
    """How many steps the run has to which the whole checkpoint of `step` belongs."""
    steps = checkpoint.read_state(run, step).get("steps")  # a checkpoint of an older version: None
    return steps or read_metrics(run).get("steps")


def check_place(run: Path, paths: Iterable[AnyPath]) -> None:
    """Raises TrainError if a run's folder is one of `paths`, which it reads: a folder of
    images with a run in it is no data any more; or if it is inside a store."""
    ours = run.resolve()
    for path in paths:
        if not is_local(path) or not ours.is_relative_to(path.resolve()):
            continue
        if ours == path.resolve() or (path / INDEX).exists():
            raise TrainError(
                f"{run} is {'in ' * (ours != path.resolve())}what the run reads, {path}",
                expected="a folder of its own",
                fix="--out another folder",
            )


def start_run(
    run: Path, identity: dict[str, Any], values: dict[str, Any], differs: Differing, **more: Any
) -> None:
    """Make the folder, which is locked, that of a new run; results of an earlier one are removed.

    `identity`: what must stay as it is for the run to be resumed. `values` are its settings with
    all defaults filled in; `differs` those that deviate from the recipe, with (value, the
    recipe's). `more` is kept in run.json as it is.
    """
    for folder in (checkpoint.FOLDER, TENSORBOARD, STATISTICS):
        shutil.rmtree(run / folder, ignore_errors=True)
    for name in (
        LOG,
        CURVES,
        VALIDATION,
        METRICS,
        f"{SHEET}.png",
        ENCODER,
        CSV,
        TABLE,
        *SUPERVISED,
    ):
        (run / name).unlink(missing_ok=True)
    content = {
        "id": uuid.uuid4().hex[:12],
        "identity": identity,
        "config": values,
        "differs": {name: list(pair) for name, pair in differs.items()},
        "versions": {n: version(n) for n in ("milan-pretrain", "torch", "timm", "tensorstore")},
        "command": sys.argv,
        "platform": platform.platform(),
    }
    write_run(run, content | more)


def continue_run(run: Path, start: Start, values: dict[str, Any], **more: Any) -> None:
    """Write down what changes from the step on at which a run is resumed: its schedule, `more`.

    Call it once the checkpoint is known to fit.
    """
    content = read_run(run)
    changes = {name: value for name, value in more.items() if value != content.get(name)}
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


# --- what makes a run the same --------------------------------------------------------------------


def identity_of(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The fields of a command's settings that must stay as they are for a run to be resumed."""
    return json.loads(json.dumps({name: values[name] for name in identity_names(kind)}))


def stored_identity(run: Path, kind: type) -> dict[str, Any]:
    """The identity of the run in a folder; a setting that is newer than the run has its default."""
    return identity_of(kind, vars(kind())) | read_run(run)["identity"]


def compared(before: dict[str, Any], now: dict[str, Any]) -> Differing:
    """What differs between two identities; what only the old one has does not count."""
    return {k: (before.get(k), now[k]) for k in now if before.get(k) != now[k]}
