"""Checkpoints: each is there whole or not at all.

    runs/pretrain/checkpoints/step-00000120/
        model.safetensors      every parameter of the student
        optimiser.safetensors  AdamW's moments, by parameter name
        state.json             step, gradient scaler, sums of the log, digests of all three

No pickles: nothing here can run code when it is loaded. A torn one that newer steps have not
replaced yet lies beside the others as step-00000120.torn. A run goes on while its checkpoint is
written: only the copy that is written from takes its time.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from milan.core.atomic import cannot_write, read_with_digest, sync_folder, write_with_digest
from milan.core.device import copy_to_host, reached
from milan.core.distributed import SINGLE, Ranks, full_tensor, shard_like
from milan.errors import TrainError

FOLDER = "checkpoints"
_PROVEN = ("model.safetensors", "optimiser.safetensors")
_GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_STATE: dict[str, type | tuple[type, ...]] = {
    "step": int, "sha256": dict, "scaler": dict, "losses": list
}  # fmt: skip


class Writer:
    """Writes the checkpoints of a run in a thread, one at a time.

    For it rank 0 keeps one copy of weights and moments in the memory of its machine, made at the
    first `save`: three times the weights' bytes; from a GPU in pinned pages, of which torch's
    allocator takes up to twice as many.
    """

    def __init__(
        self, run: Path, model: nn.Module, optimiser: torch.optim.Optimizer, *, keep: int,
        ranks: Ranks = SINGLE, written: Callable[[int], None] = lambda step: None,
    ) -> None:  # fmt: skip
        """`written` is called in the thread with the step of each checkpoint that is whole."""
        self.run, self.model, self.optimiser = run, model, optimiser
        self.keep, self.ranks, self.written = keep, ranks, written
        self._copies: dict[str, torch.Tensor] = {}
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy what is trained as it is now, and begin to write it as the checkpoint of `step`.

        Then all but the newest `keep` are dropped. `state` has `scaler` (the gradient scaler's),
        `losses` (sum and count since the last line of the log) and what else the loop goes on from.
        Every rank calls it; rank 0 writes. Waits for the checkpoint before, and raises as `wait`.
        """
        self.wait()
        weights = self._copied(self.model.state_dict())  # first: it shards what a probe gathered
        names: dict[Any, str] = {p: name for name, p in self.model.named_parameters()}
        moments = {
            f"{names[parameter]}|{key}": torch.as_tensor(value)
            for parameter, kept in self.optimiser.state.items()
            for key, value in kept.items()
        }
        moments = self._copied(moments)
        if self.ranks.is_rank0:
            copied = reached(next(self.model.parameters()).device)
            self._thread = Thread(
                target=self._write, args=(copied, step, weights, moments, state), daemon=True,
                name="checkpoint",
            )  # fmt: skip
            self._thread.start()

    def _copied(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Copies on the host of rank 0; from a GPU they are on their way."""
        copies = {}
        for name, tensor in tensors.items():
            whole = full_tensor(tensor.detach())
            if self.ranks.is_rank0:
                copies[name] = copy_to_host(whole, self._copies.get(name))
        self._copies |= copies
        return copies

    def _write(self, copied: torch.cuda.Event | None, step: int, *arguments: Any) -> None:
        try:
            if copied:
                copied.synchronize()
            _write(self.run, step, *arguments, keep=self.keep)
            self.written(step)
        except BaseException as error:  # raised by `wait`, in the thread that trains
            self._error = error

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written by this rank."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether `wait` is going to raise an error of this rank."""
        return self._error is not None

    def wait(self) -> None:
        """Until the last checkpoint is written; every rank calls it.

        Raises TrainError if it cannot be: those before stay as they are.
        """
        self.ranks.on_rank0(self._joined)

    def _joined(self) -> None:
        self.close()
        error, self._error = self._error, None
        if error:
            raise error

    def close(self) -> None:
        """Until this rank writes nothing any more, whatever comes of it."""
        if self._thread:
            self._thread.join()
            self._thread = None


def whole_weights(model: nn.Module, ranks: Ranks = SINGLE) -> dict[str, torch.Tensor]:
    """The state of a model on the CPU of rank 0; all must ask, others get nothing."""
    whole = {}
    for name, tensor in model.state_dict().items():
        full = full_tensor(tensor.detach())
        if ranks.is_rank0:
            whole[name] = full.cpu().contiguous()
    return whole


def _write(
    run: Path,
    step: int,
    weights: dict[str, torch.Tensor],
    moments: dict[str, torch.Tensor],
    state: dict[str, Any],
    *,
    keep: int,
) -> None:
    folder = _folder(run, step)
    fresh = folder.with_name(f".{folder.name}.tmp")
    try:
        (run / FOLDER).mkdir(exist_ok=True)  # not its parents: a deleted run is not made anew
        for left in (run / FOLDER).glob(".step-*.tmp"):  # of a run that was killed
            shutil.rmtree(left)
        fresh.mkdir()
        save_file(weights, fresh / "model.safetensors")
        save_file(moments, fresh / "optimiser.safetensors")
        digests = {}
        for name in _PROVEN:
            with open(fresh / name, "rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
        content = {"step": step} | state | {"sha256": digests}
        write_with_digest(fresh / "state.json", content)
        sync_folder(fresh)
        _set_aside(run, step)
        os.replace(fresh, folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        raise _not_written(run, step, error) from None
    for old in steps(run)[:-keep]:
        shutil.rmtree(_folder(run, old), ignore_errors=True)
    for torn in (run / FOLDER).glob("step-*.torn"):
        if torn.name[5:-5].isdecimal() and int(torn.name[5:-5]) <= step:
            shutil.rmtree(torn, ignore_errors=True)


def _set_aside(run: Path, step: int) -> None:
    """Rename the checkpoints from `step` on: they are torn, or the run would not be at this step.

    Raises TrainError if one is whole: it was written by another call.
    """
    for newer in steps(run):
        if newer < step:
            continue
        if not _why_torn(run, newer):
            raise TrainError(
                f"{run} has a checkpoint of step {newer}, and this call is at step {step}: another "
                "call trains in the folder",
                expected="one training at a time in a folder",
                fix="stop one of the two: the same line goes on from the newest checkpoint",
            )
        torn = _folder(run, newer).with_suffix(".torn")
        shutil.rmtree(torn, ignore_errors=True)
        os.replace(_folder(run, newer), torn)


def _not_written(run: Path, step: int, error: OSError | SafetensorError) -> TrainError:
    """The error for a checkpoint that cannot be written; those before stay as they are."""
    code = re.search(r"os error (\d+)", str(error))  # how safetensors tells the system's error
    if code:
        error = OSError(int(code[1]), os.strerror(int(code[1])), str(run / FOLDER))
    why, fix = None, "look at the disk; the same line goes on"
    if isinstance(error, OSError) and (reason := cannot_write(run, error)):
        fix = reason[1]
        why = None if run.exists() else reason[0]
    saved = steps(run)
    return TrainError(
        f"the checkpoint of step {step} cannot be written: {why or _words(error)}",
        expected="a folder that takes it" + (f"; that of step {saved[-1]} stays" if saved else ""),
        fix=fix,
    )


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def steps(run: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    names = [path.name[5:] for path in (run / FOLDER).glob("step-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def newest(run: Path, *, note: Callable[[str], None]) -> int | None:
    """The newest step whose checkpoint is whole, None if there is no checkpoint.

    Torn ones are named by `note` and skipped. Raises TrainError if there is none but these, and
    for one that cannot be read at the moment: that says nothing of what is in it.
    """
    saved = steps(run)
    for step in reversed(saved):
        why = _why_torn(run, step)
        if not why:
            return step
        note(f"passed over: checkpoint {_folder(run, step)} is torn ({why})")
    if saved:
        raise TrainError(
            f"none of the {len(saved)} checkpoints of {run} is whole",
            fix="a copy of one, or --resume never to start anew",
        )
    return None


def _why_torn(run: Path, step: int) -> str:
    """Why a checkpoint is not what was written; empty if it is whole. Raises as `newest` does."""
    folder = _folder(run, step)
    try:
        digests = read_state(run, step)["sha256"]
        for name in _PROVEN:
            with open(folder / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digests.get(name):
                    return f"{name} is not what was written"
    except _GONE as error:
        return f"{Path(error.filename).name} is gone"
    except ValueError as error:
        return f"state.json: {error}"
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        raise TrainError(
            f"checkpoint {folder} cannot be read: {_words(error)} ({name})",
            expected="a disk that answers: nothing is wrong with the checkpoint yet",
            fix="the same line again",
        ) from None
    return ""


def read_state(run: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself: step, sha256, and the `state` that it was saved with.

    Raises ValueError if it is damaged, OSError if it cannot be read.
    """
    state = read_with_digest(_folder(run, step) / "state.json", _STATE)
    if state["step"] != step:
        raise ValueError(f"it is of step {state['step']}")
    if len(state["losses"]) != 2 or not all(isinstance(n, int | float) for n in state["losses"]):
        raise ValueError("it has no usable 'losses'")
    return state


def check_fits(run: Path, step: int, model: nn.Module) -> None:
    """Raises TrainError if a whole checkpoint is of another model: names or shapes differ."""
    folder, there = _folder(run, step), model.state_dict()
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    ours = {name: tuple(tensor.shape) for name, tensor in there.items()}
    odd = sorted(shapes.keys() ^ ours.keys()) or [k for k in ours if shapes[k] != ours[k]]
    if odd:
        raise TrainError(
            f"{folder} is of another model: {odd[0]}", fix="--resume never, or another --out"
        )


def load(
    run: Path, step: int, *, model: nn.Module, optimiser: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load the checkpoint of a step, found by `newest`, into a model; returns its state.

    Raises TrainError if it is of another model, or has no optimiser of this one.
    """
    load_weights(run, step, model)
    _restore(model, optimiser, load_file(_folder(run, step) / "optimiser.safetensors"))
    return read_state(run, step)


def load_weights(run: Path, step: int, model: nn.Module) -> None:
    """Load only the weights of a checkpoint. Raises TrainError if it is of another model."""
    check_fits(run, step, model)
    there = model.state_dict()
    weights = load_file(_folder(run, step) / "model.safetensors")
    model.load_state_dict({k: shard_like(v, there[k]) for k, v in weights.items()}, strict=True)


def _folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step-{step:08d}"


def _restore(
    model: nn.Module, optimiser: torch.optim.Optimizer, moments: dict[str, torch.Tensor]
) -> None:
    parameters = dict(model.named_parameters())
    fused = any(group.get("fused") for group in optimiser.param_groups)
    for key, value in moments.items():
        name, _, kind = key.partition("|")
        parameter = parameters[name]
        if kind != "step":
            value = shard_like(value, parameter)
        elif fused:  # else AdamW counts its steps on the CPU
            value = value.to(parameter.device)
        optimiser.state[parameter][kind] = value
