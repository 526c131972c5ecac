"""Checkpoints: each is there whole or not at all.

    runs/pretrain/checkpoints/step-00000120/
        model.safetensors      every parameter of the student
        optimiser.safetensors  AdamW's moments, by parameter name
        state.json             step, gradient scaler, sums of the log, digests of the others

No pickles: nothing here can run code when it is loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from milan.core.atomic import sync_folder, write_json
from milan.core.distributed import SINGLE, Ranks, full_tensor, shard_like
from milan.errors import TrainError

FOLDER = "checkpoints"
_PROVEN = ("model.safetensors", "optimiser.safetensors")


def save(
    run: Path,
    *,
    step: int,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    ranks: Ranks,
) -> Path:
    """Write the checkpoint of `step`, then drop all but the newest `keep`. Returns its folder.

    Every rank calls it; rank 0 writes. Raises TrainError if there is no room for it: those before
    stay as they are.
    """
    weights = whole_weights(model, ranks)
    names: dict[Any, str] = {p: name for name, p in model.named_parameters()}
    moments = {
        f"{names[parameter]}|{key}": torch.as_tensor(value)
        for parameter, kept in optimiser.state.items()
        for key, value in kept.items()
    }
    moments = _gathered(moments, ranks)
    return ranks.on_rank0(lambda: _write(run, step, weights, moments, state, keep))


def whole_weights(model: nn.Module, ranks: Ranks = SINGLE) -> dict[str, torch.Tensor]:
    """The state of a model on the CPU of rank 0; all must ask, others get nothing."""
    return _gathered(model.state_dict(), ranks)


def _gathered(tensors: Mapping[str, torch.Tensor], ranks: Ranks) -> dict[str, torch.Tensor]:
    whole = {}
    for name, tensor in tensors.items():
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
    keep: int,
) -> Path:
    folder = run / FOLDER / f"step-{step:08d}"
    fresh = folder.with_name(f".{folder.name}.tmp")
    try:
        for left in (run / FOLDER).glob(".step-*.tmp"):  # of a run that was killed
            shutil.rmtree(left)
        fresh.mkdir(parents=True)
        save_file(weights, fresh / "model.safetensors")
        save_file(moments, fresh / "optimiser.safetensors")
        digests = {}
        for name in _PROVEN:
            with open(fresh / name, "rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
                os.fsync(file.fileno())
        write_json(fresh / "state.json", {"step": step} | state | {"sha256": digests})
        sync_folder(fresh)
        # One of this step is there only if it is incomplete.
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(fresh, folder)
        sync_folder(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        saved = steps(run)
        raise TrainError(
            f"the checkpoint of step {step} cannot be written: {error}",
            expected="room for it; " + (f"that of step {saved[-1]} stays" if saved else ""),
            fix="free some space, and the same line goes on",
        ) from None
    saved = steps(run)
    # Newer ones are incomplete, or the run would not be at this step.
    incomplete = [old for old in saved if old > step]
    for old in incomplete + [old for old in saved if old <= step][:-keep]:
        shutil.rmtree(run / FOLDER / f"step-{old:08d}", ignore_errors=True)
    return folder


def steps(run: Path) -> list[int]:
    """The steps that have a checkpoint, ascending."""
    folder = run / FOLDER
    if not folder.exists():
        return []
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit())


def newest(run: Path, *, note: Callable[[str], None]) -> int | None:
    """The newest step whose checkpoint is whole, None if there is no checkpoint.

    Incomplete ones are named by `note` and skipped. Raises TrainError if there is none but these.
    """
    saved = steps(run)
    for step in reversed(saved):
        folder = run / FOLDER / f"step-{step:08d}"
        try:
            digests = json.loads((folder / "state.json").read_text())["sha256"]
            for name in _PROVEN:
                with open(folder / name, "rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != digests[name]:
                        raise ValueError(f"{name} is not what was written")
            return step
        except (OSError, ValueError, LookupError, TypeError) as error:
            note(f"passed over: checkpoint {folder} is torn ({error})")
    if saved:
        raise TrainError(
            f"none of the {len(saved)} checkpoints of {run} is whole",
            fix="a copy of one, or --resume never to start anew",
        )
    return None


def load(
    run: Path, step: int, *, model: nn.Module, optimiser: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load the checkpoint of a step, found by `newest`, into a model; returns its state.

    Raises TrainError if it is of another model.
    """
    folder = run / FOLDER / f"step-{step:08d}"
    state = json.loads((folder / "state.json").read_text())
    weights = load_file(folder / "model.safetensors")
    there = model.state_dict()
    fits = weights.keys() == there.keys()
    if not fits or any(weights[k].shape != there[k].shape for k in there):
        odd = sorted(weights.keys() ^ there.keys()) or [
            k for k in there if weights[k].shape != there[k].shape
        ]
        raise TrainError(
            f"{folder} is of another model: {odd[0]}", fix="--resume never, or another --out"
        )
    model.load_state_dict({k: shard_like(v, there[k]) for k, v in weights.items()}, strict=True)
    _restore(model, optimiser, load_file(folder / "optimiser.safetensors"))
    return state


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
