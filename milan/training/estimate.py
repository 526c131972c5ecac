"""What a run will take, estimated from a few of its own micro-batches: steps, hours, memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milan.config import PretrainConfig
from milan.core.device import autocast, pick_device, ranks_here, tf32
from milan.core.distributed import Ranks, process_group
from milan.core.progress import NoProgress, Progress
from milan.core.units import format_bytes, format_duration
from milan.data.dataset import CachedDataset
from milan.data.feeding import Feeding
from milan.data.loader import Batch
from milan.data.sampler import StepSampler
from milan.models.kernels import choose_kernels
from milan.objectives.base import JointObjective
from milan.training.build import (
    Settings,
    loader_of,
    micro_batch_of,
    resolve_defaults,
    run_order,
    schedule_of,
    student_of,
    workers_of,
)
from milan.training.channels import prepare, resumed
from milan.training.compilation import StepLoss, compile_step
from milan.training.initial import initialise_from
from milan.training.loop import Context
from milan.training.machine_errors import as_train_error
from milan.training.memory import peak_bytes
from milan.training.optim import adamw
from milan.training.pretrain import Call, start_of
from milan.training.run_store import decoder_of, open_cache_of

_STEPS = 3  # that are timed, after one that is not


@dataclass(frozen=True)
class _Trial:
    """A micro-batch on the host, and what a step does with it."""

    settings: Settings
    step: StepLoss
    optimiser: torch.optim.Optimizer
    batch: Batch
    device: torch.device

    def medians(self, twice: bool, progress: Progress) -> tuple[float, float]:
        """Seconds of the gradient of the micro-batch, and of the update of the weights.

        `twice`: the batch is seen once more before, without a gradient.
        """
        timings = []
        progress.begin("time a step", _STEPS + 1, "steps")
        for done in range(_STEPS + 1):
            first = self._seconds(self._first_pass) if twice else 0.0
            timings.append(
                (first + self._seconds(self._gradient), self._seconds(self.optimiser.step))
            )
            self.optimiser.zero_grad(set_to_none=True)
            progress.advance(done + 1)
        progress.end()
        gradients, updates = zip(*timings[1:], strict=True)
        return statistics.median(gradients), statistics.median(updates)

    def _seconds(self, work: Callable[[], Any]) -> float:
        began = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - began

    def _first_pass(self) -> None:
        with torch.no_grad(), autocast(self.device, self.settings.precision):
            self.step.objective.predict(self.step.network, self.batch.to(self.device))

    def _gradient(self) -> None:
        with autocast(self.device, self.settings.precision):
            loss = self.step(self.batch.to(self.device))
        assert type(loss) is torch.Tensor, "a step of the estimate ran on fake tensors"
        loss.backward()


def estimate_run(
    config: PretrainConfig, *, call: Call | None = None, progress: Progress | None = None
) -> list[tuple[str, str]]:
    """What `milan pretrain` with these settings would take, as (what, figure); writes nothing.

    Of a run that is in its folder: what is left of it, with the decoder that it has; else the
    weights that it would start from are looked at. `call` says how it meets such a run.

    A few steps of one micro-batch are taken on this machine with the store's own images; hours
    follow from their median. Of several ranks each is assumed to be as fast. Raises MilanError.
    """
    config.check()
    with process_group(None, pick_device(config.device)) as (_, device):
        return _estimate(config, device, call or Call(), progress or NoProgress())


def _estimate(
    config: PretrainConfig, device: torch.device, call: Call, progress: Progress
) -> list[tuple[str, str]]:
    here = ranks_here(config.device, device, config.devices)
    ranks = Ranks.from_environment() or Ranks(size=here * config.num_nodes, on_node=here)
    settings = resolve_defaults(config, device, ranks)
    cache = open_cache_of(config)
    order = run_order(config, cache).without(cache.dropped, cache.dropped[:0])
    run = Path(config.out)
    start = start_of(settings, call, run, progress)
    student = student_of(settings, cache, decoder=decoder_of(run) if start.step else None)
    dataset = CachedDataset(cache, data_root=config.data_root)
    own = Context(run, device, progress=progress)
    if start.step is None:
        rows = np.union1d(order.train_rows, order.validation_rows)
        prepared = prepare(config, dataset, rows, own)
        initialise_from(config, student, progress, prepared.law)
        order = order.without(np.array(list(prepared.faults), np.int64), order.replaced[:0])
    else:
        prepared = resumed(config, dataset, own)
    dataset.channels = prepared.channels
    student = student.to(device)
    micro = micro_batch_of(config, student, device, ranks, progress)
    schedule = schedule_of(settings, order, micro, ranks.size)
    choose_kernels(student, device, settings.precision)
    optimiser = adamw(student, device, weight_decay=config.weight_decay, beta2=config.beta2)
    objective = settings.objective(cache)
    objective.to(device)

    # The second batch is measured: the first opens the store and the images.
    sampler = StepSampler(replace(order, batch_size=micro), start=0, stop=2, micro=micro)
    loader = loader_of(dataset, sampler, objective, student, num_workers=0)
    *_, batch = loader
    workers = workers_of(config, dataset, micro, ranks)

    step_loss = StepLoss(objective, student, objective.loss)
    step_loss = compile_step(step_loss, lambda: batch.to(device), settings, own)
    # Of micro-batches that are compared with each other each is seen twice (JointStep).
    twice = isinstance(objective, JointObjective) and schedule.accumulate > 1
    peak = peak_bytes(student, settings, cache, device, micro, ranks=ranks.size)
    progress.note(f"memory: {format_bytes(peak)} of tensors on each rank at the peak")
    trial = _Trial(settings, step_loss, optimiser, batch, device)
    with as_train_error(run, micro), tf32(device, settings.tf32):
        gradient, update = trial.medians(twice, progress)
    image = gradient / micro
    step = image * config.batch_size / ranks.size + update
    rate = config.batch_size / ranks.size / step
    feeding = Feeding(loader.loading, workers, ranks.on_node, dataset.stored, rate)
    saved = sum(p.numel() * 4 * (3 if p.requires_grad else 1) for p in student.parameters())
    weights = sum(p.numel() for p in student.parameters() if p.requires_grad)
    left = schedule.steps - (start.step or 0)
    train, validation = len(order.train_rows), len(order.validation_rows)
    return [
        ("model", f"{config.model}, {weights / 1e6:,.1f} M weights with its decoder"),
        ("images", f"{train:,} an epoch, {validation:,} for validation"),
        ("steps", f"{schedule.steps:,}: {config.epochs} epochs of {order.steps:,}"),
        *([("steps that are left", f"{left:,}")] if start.step else []),
        ("ranks", f"{ranks.size}, {schedule.accumulate} x {micro} images of a step each"),
        (
            "a step",
            f"{step:,.2f} s, of it {update:,.3f} s for the update of the weights"
            + twice * "; each micro-batch forwards twice, and its loss is of itself alone",
        ),
        ("images/s", f"{config.batch_size / step:,.1f}, without data loading"),
        ("data loading", feeding.words()),
        ("time", format_duration(left * step)),
        ("memory", f"{format_bytes(peak)} of tensors on each rank at the peak; leave a fifth more"),
        ("checkpoint", f"{format_bytes(saved)}, {config.keep} kept; as much memory of the host"),
    ]
