"""What a run will take, from a few of its own micro-batches: steps, hours, memory."""

from __future__ import annotations

import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from milan.config import PretrainConfig
from milan.core.device import autocast, pick_device
from milan.core.distributed import Ranks
from milan.core.progress import NoProgress, Progress
from milan.data.dataset import CachedDataset, training_loader
from milan.data.order import StepSampler
from milan.models.kernels import choose_kernels
from milan.training.build import loss_function, optimiser_of, student_of
from milan.training.faults import as_train_error
from milan.training.memory import peak_bytes
from milan.training.pretrain import (
    devices_of,
    in_micro_batches,
    open_stream,
    resolve_defaults,
    schedule_of,
)

_ROUNDS = 3


def estimate_run(
    config: PretrainConfig, *, progress: Progress | None = None
) -> list[tuple[str, str]]:
    """What `milan pretrain` with these settings would take; (what, figure), writes nothing.

    A few steps of one micro-batch are taken on this machine with the store's own images, and their
    median is what hours come from; several ranks are taken to be as fast each. Raises MilanError.
    """
    config.check()
    progress = progress or NoProgress()
    device = pick_device(config.device)
    known = Ranks.from_environment()
    here = devices_of(config, device)
    ranks = known or Ranks(size=here * config.num_nodes, on_node=here)
    size, config = ranks.size, resolve_defaults(config, device, ranks)
    stream, targets = open_stream(config)
    student = student_of(config, targets).to(device)
    config = in_micro_batches(config, student, device, ranks, progress)
    schedule = schedule_of(config, stream, size)
    choose_kernels(student, device, config.precision)
    optimiser = optimiser_of(student, config, device)
    objective = loss_function(student, config, targets, device)

    micro = config.micro_batch or 1
    sampler = StepSampler(replace(stream, batch_size=micro), start=0, stop=1, micro=micro)
    loader = training_loader(
        CachedDataset(targets, data_root=config.data_root),
        sampler,
        features=config.objective == "milan",
        num_workers=0,
        patches=student.patches,
    )
    (batch,) = loader

    def seconds(work: str) -> float:
        began = time.perf_counter()
        if work == "update":
            optimiser.step()
        else:
            with autocast(device, config.precision):
                loss = objective(batch)
            loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    peak = peak_bytes(student, config, targets, device, ranks=size)
    progress.note(f"memory: {peak / 1e9:,.2f} GB of tensors on each rank at the peak")
    progress.begin("rehearse", _ROUNDS + 1, "rounds")
    rounds = []
    with as_train_error(Path(config.out), micro):
        for done in range(_ROUNDS + 1):
            rounds.append((seconds("gradient"), seconds("update")))
            optimiser.zero_grad(set_to_none=True)
            progress.advance(done + 1)
    progress.end()
    image = statistics.median(gradient for gradient, _ in rounds[1:]) / micro
    update = statistics.median(update for _, update in rounds[1:])
    step = image * config.batch_size / size + update
    saved = sum(p.numel() * 4 * (3 if p.requires_grad else 1) for p in student.parameters())
    weights = sum(p.numel() for p in student.parameters() if p.requires_grad)
    return [
        ("model", f"{config.model}, {weights / 1e6:,.1f} M weights with its decoder"),
        ("images", f"{len(stream.good):,} an epoch, {len(stream.held):,} held out"),
        ("steps", f"{schedule.steps:,}: {config.epochs} epochs of {stream.steps:,}"),
        ("ranks", f"{size}, {schedule.accumulate} x {config.micro_batch} images of a step each"),
        ("a step", f"{step:,.2f} s, of it {update:,.3f} s for the update of the weights"),
        ("images/s", f"{config.batch_size / step:,.1f}, reading left out"),
        ("hours", f"{schedule.steps * step / 3600:,.2f}"),
        ("memory", f"{peak / 1e9:,.2f} GB of tensors on each rank at the peak; leave a fifth more"),
        ("checkpoint", f"{saved / 1e6:,.0f} MB, {config.keep} kept"),
    ]
