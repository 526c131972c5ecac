"""The training loop: one step, many times, resumable, watched."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from milan import checkpoint
from milan.device import autocast
from milan.errors import TrainError
from milan.watch import Watch

LOG = "log.jsonl"
CURVES = "curves.csv"
_COLUMNS = ("step", "epoch", "loss", "lr", "images_per_second", "wait_share")


def learning_rate(
    epoch: float, *, peak: float, warmup: float, epochs: float, end: float = 0.0
) -> float:
    """The rate at a fractional epoch: linear from 0 to `peak`, then half a cosine to `end`.

    As published (MAE and MILAN, util/lr_sched.py).
    """
    if epoch < warmup:
        return peak * epoch / warmup
    share = (epoch - warmup) / (epochs - warmup)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * share))


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups: no decay for biases and 1-D parameters; class and mask token do decay.

    As published: timm's grouping by dimension, which for ViT-B gives 93 with and 175 without.
    """
    decay: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (free if parameter.ndim <= 1 or name.endswith(".bias") else decay).append(parameter)
    return [
        {"params": decay, "weight_decay": weight_decay},
        {"params": free, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Course:
    """How a run goes: its length, its rates, how often it saves and speaks."""

    epochs: int
    steps_per_epoch: int
    batch_size: int
    """Images of a step; cut into `accumulate` micro-batches."""
    accumulate: int
    lr: float
    warmup_epochs: float
    min_lr: float
    precision: str
    save_every: int
    """Steps between checkpoints."""
    keep: int
    """Checkpoints kept."""
    log_every: int
    """Steps between lines of the log."""

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        return learning_rate(
            step / self.steps_per_epoch,
            peak=self.lr,
            warmup=self.warmup_epochs,
            epochs=self.epochs,
            end=self.min_lr,
        )


def fit(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    *,
    course: Course,
    run: Path,
    device: torch.device,
    batches_from: Callable[[int], Iterable[Any]],
    loss_of_batch: Callable[[Any], torch.Tensor],
    rows_of_batch: Callable[[Any], list[int]],
    watch: Watch,
    stop_after: int | None = None,
) -> dict[str, Any]:
    """Train from the newest checkpoint in `run`, or from the start, to the end of `course`.

    `batches_from(step)` gives the micro-batches from a step on; `loss_of_batch` is called under
    autocast. Every draw is addressed, so a resumed run is the uninterrupted one. `stop_after`
    ends this call after so many steps, checkpoint written: for tests, and for time limits.
    Returns figures of this call; rates leave out the start of the loader. Raises TrainError on a
    loss that is not finite.
    """
    scaler = torch.amp.GradScaler(device.type, enabled=course.precision == "fp16")
    state = checkpoint.load_newest(run, model=model, optimiser=optimiser)
    start = state["step"] if state else 0
    if state and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    last = course.steps if stop_after is None else min(course.steps, start + stop_after)
    if start >= last:  # nothing is left to do
        line = _kept_lines(run, start)[-1]
        rates = {key: line[key] for key in ("loss", "images_per_second", "wait_share")}
        return {"step": start, "steps": course.steps, "finished": True, "seconds": 0.0, **rates}
    log = _Log(run, start)
    watch.begin("train", course.steps, "steps", done=start)
    model.train()
    began = time.perf_counter()
    waited, loss_sum, counted = 0.0, 0.0, 0
    batches: Iterator[Any] = iter(batches_from(start))
    # The first batch waits for the loader's processes to start; that is not waiting for data.
    ahead: list[Any] = [next(batches)]
    startup = time.perf_counter() - began
    mark = (time.perf_counter(), 0.0)
    for step in range(start, last):
        rate = course.rate(step)
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.zero_grad(set_to_none=True)
        loss_value, rows = 0.0, []
        for _ in range(course.accumulate):
            asked = time.perf_counter()
            batch = ahead.pop() if ahead else next(batches)
            waited += time.perf_counter() - asked
            with autocast(device, course.precision):
                loss = loss_of_batch(batch) / course.accumulate
            scaler.scale(loss).backward()
            loss_value += loss.item()
            rows.append(batch)
        if not math.isfinite(loss_value):
            _nonfinite(run, step, loss_value, [r for b in rows for r in rows_of_batch(b)])
        scaler.step(optimiser)
        scaler.update()
        loss_sum, counted = loss_sum + loss_value, counted + 1
        done = step + 1
        saving = done == last or done % course.save_every == 0
        if saving or done % course.log_every == 0 or done % course.steps_per_epoch == 0:
            now = time.perf_counter()
            span = max(now - mark[0], 1e-9)
            line = {
                "step": done,
                "epoch": round(done / course.steps_per_epoch, 4),
                "loss": loss_sum / counted,
                "lr": rate,
                "images_per_second": round(counted * course.batch_size / span, 2),
                "wait_share": round((waited - mark[1]) / span, 4),
            }
            log.add(line)
            loss_sum, counted, mark = 0.0, 0, (now, waited)
            watch.advance(
                done,
                f"epoch {line['epoch']:.1f}, loss {line['loss']:.4f}, lr {rate:.1e}, "
                f"{line['images_per_second']:,.0f} images/s, waiting {line['wait_share']:.0%}",
            )
        else:
            watch.advance(done)
        if saving:
            extra = {"scaler": scaler.state_dict()}
            checkpoint.save(
                run, step=done, model=model, optimiser=optimiser, state=extra, keep=course.keep
            )
            log.curves()
    watch.end()
    log.close()
    seconds = time.perf_counter() - began
    return {
        "step": last,
        "steps": course.steps,
        "finished": last == course.steps,
        "loss": log.last_loss(),
        "seconds": round(seconds, 2),
        "startup_seconds": round(startup, 2),
        "images_per_second": round((last - start) * course.batch_size / (seconds - startup), 2),
        "wait_share": round(waited / (seconds - startup), 4),
    }


def _nonfinite(run: Path, step: int, loss: float, rows: list[int]) -> None:
    saved = checkpoint.steps(run)
    where = f"the last checkpoint is step {saved[-1]}" if saved else "there is no checkpoint yet"
    shown = ", ".join(str(r) for r in rows[:32]) + (", …" if len(rows) > 32 else "")
    raise TrainError(
        f"the loss of step {step} is {loss}; {where}; rows of the batch: {shown}",
        expected="a finite loss",
        fix="a smaller --lr, or --precision bf16 or fp32",
    )


class _Log:
    """JSON lines, TensorBoard and a CSV of the same figures; a resumed run goes on in all three."""

    def __init__(self, run: Path, start: int) -> None:
        self.path, self.csv = run / LOG, run / CURVES
        self.lines = _kept_lines(run, start)
        checkpoint.write_text(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self.file = open(self.path, "a")  # noqa: SIM115 - closed by close()
        self.board = _board(run, start)

    def add(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for key in _COLUMNS[1:]:
            self.board.add_scalar(f"train/{key}", line[key], line["step"])

    def curves(self) -> None:
        """DVC plots CSV, not JSON lines."""
        rows = [",".join(_COLUMNS)]
        rows += [",".join(str(line[key]) for key in _COLUMNS) for line in self.lines]
        checkpoint.write_text(self.csv, "\n".join(rows) + "\n")

    def last_loss(self) -> float | None:
        return self.lines[-1]["loss"] if self.lines else None

    def close(self) -> None:
        self.curves()
        self.file.close()
        self.board.close()


def _kept_lines(run: Path, step: int) -> list[dict[str, Any]]:
    """The lines of the log up to `step`; what a killed run logged after it will be logged anew."""
    kept = []
    for text in (run / LOG).read_text().splitlines() if (run / LOG).exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue  # cut short when the run was killed
        if line["step"] <= step:
            kept.append(line)
    return kept


def _board(run: Path, start: int) -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"), purge_step=start + 1 if start else None)
