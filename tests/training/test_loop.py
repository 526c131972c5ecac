"""The loop by itself: it trains whatever a task and a schedule say, and needs no store."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from milan.reporting.log import RunLog, read_log
from milan.training import checkpoint, loop
from milan.training.loop import Context, fit
from milan.training.optim import EqualEpochs, Schedule, adamw

CPU = torch.device("cpu")
STEPS, BATCH = 5, 16


def batch_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in three clusters, and which they are of; a pure function of the step."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 3, (BATCH,), generator=generator)
    return torch.randn(BATCH, 8, generator=generator) + 4 * F.one_hot(labels, 8), labels


class Classifier:
    """A linear head, as a probe or a fine-tuned model has it: labels instead of targets."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = self.network = nn.Linear(8, 3)
        self.validated: list[int] = []

    def loss(self, batch: Any) -> torch.Tensor:
        """Cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def describe(self, batch: Any) -> list[str]:
        """The labels stand for names."""
        return [str(label) for label in batch[1].tolist()]

    def validate(self, epoch: int, batches: Iterator[Any]) -> tuple[dict[str, float], dict]:
        """Accuracy on one batch more."""
        self.validated.append(epoch)
        points, labels = next(batches)
        return {"top1": float((self.network(points).argmax(1) == labels).float().mean())}, {}


def schedule(epochs: int, save_every: int | None = 3) -> Schedule:
    """Five steps an epoch."""
    return Schedule(
        data=EqualEpochs(STEPS, BATCH), epochs=epochs, accumulate=1, lr=0.1, warmup_epochs=1,
        min_lr=0, precision="fp32", save_every=save_every, save_minutes=None, keep=2, log_every=2,
    )  # fmt: skip


def batches_from(step: int) -> Iterator[Any]:
    """Those of each step, and after an epoch one for validation."""
    while True:
        yield batch_of(step)
        step += 1
        if step % STEPS == 0:
            yield batch_of(10_000 + step)


def train(
    run: Path, *, epochs: int = 4, resume_from: int | None = None, save_every: int | None = 3,
    **more: Any,
) -> Any:  # fmt: skip
    run.mkdir(exist_ok=True)
    task = Classifier()
    figures = fit(
        task, adamw(task.model, CPU, weight_decay=0.0, beta2=0.95),
        schedule(epochs, save_every),
        Context(run, CPU, open_log=lambda step: RunLog(run, step, [])), batches_from=batches_from,
        resume_from=resume_from, **more,
    )  # fmt: skip
    return task, figures


def test_it_trains_a_classifier(tmp_path: Path) -> None:
    """Loss falls, every epoch is validated, the log has the task's own metric."""
    task, figures = train(tmp_path)
    assert (figures["step"], figures["finished"]) == (20, True)
    assert task.validated == [0, 1, 2, 3]
    lines = read_log(tmp_path, 20)
    assert [line["top1"] for line in lines if "top1" in line][-1] > 0.9
    assert lines[-1]["loss"] < lines[0]["loss"] / 3
    assert lines[-1]["epoch"] == 4


@pytest.mark.parametrize(("measured", "calls"), [(0.0, [2]), (1e9, [20])])
def test_its_speed_is_told_once(
    tmp_path: Path, measured: float, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After enough steps, or the last; what the device takes does not count the waiting."""
    monkeypatch.setattr(loop, "_SPEED", measured)
    told: list[tuple[float, float]] = []
    at: list[int] = []

    def on_speed(rate: float, wait_share: float) -> dict[str, Any]:
        told.append((rate, wait_share))
        at.append(len(began))
        return {"mine": 7}

    began: list[float] = []

    def slowly(step: int) -> Iterator[Any]:
        for batch in batches_from(step):
            began.append(time.perf_counter())
            time.sleep(0.05)
            yield batch

    task = Classifier()
    figures = fit(
        task, adamw(task.model, CPU, weight_decay=0.0, beta2=0.95), schedule(4, None),
        Context(tmp_path, CPU, on_speed=on_speed), batches_from=slowly,
    )  # fmt: skip
    assert figures["mine"] == 7
    ((rate, wait_share),) = told
    assert 0.2 < wait_share < 1
    assert rate > BATCH / 0.05
    assert at[0] >= calls[0]
    assert (at[0] >= 20) == (calls[0] == 20)


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_resumed_it_is_the_same(tmp_path: Path, stop: int) -> None:
    """Stopped anywhere, at an epoch's end or within: the same bits."""
    whole, _ = train(tmp_path / "whole")
    _, first = train(tmp_path / "parts", stop_after=stop)
    assert first["step"] == stop
    resumed, _ = train(tmp_path / "parts", resume_from=stop)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    losses = [
        [line["loss"] for line in read_log(tmp_path / name, 20)] for name in ("whole", "parts")
    ]
    assert losses[1][-1] == losses[0][-1]


class Clock:
    """Seconds that pass with each step and each checkpoint."""

    def __init__(self, step: float, save: float) -> None:
        self.now, self.step, self.save = 1000.0, step, save

    def monotonic(self) -> float:
        return self.now

    perf_counter = monotonic


@pytest.mark.parametrize(
    ("step", "save", "expected"),
    [
        (0.1, 0.0, [5, 20]),  # the first epoch's end, then none in two minutes
        (30.0, 0.0, [5, 10, 15, 20]),  # epochs of 150 s
        (13.0, 0.0, [5, 15, 20]),  # epochs of 65 s: every other
        (30.0, 2.0, [5, 15, 20]),  # saving took 2 s: 200 s have to pass
        (400.0, 0.0, [3, 5, 8, 10, 13, 15, 18, 20]),  # every 15 minutes besides
        (400.0, 15.0, [3, 7, 11, 15, 19, 20]),  # but not before 25
    ],
)
def test_when_checkpoints_are_written(
    step: float, save: float, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At an epoch's end unless one is young; else after 15 minutes; at most 1 % of the time."""
    clock, steps, write = Clock(step, save), list[int](), checkpoint.save

    def noted(*arguments: Any, **more: Any) -> Any:
        steps.append(more["step"])
        clock.now += clock.save
        return write(*arguments, **more)

    taken = loop._Loop.step

    def slow(self: Any, number: int) -> None:
        clock.now += clock.step
        taken(self, number)

    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(checkpoint, "save", noted)
    monkeypatch.setattr(loop._Loop, "step", slow)
    _, figures = train(tmp_path, save_every=None)
    assert steps == expected
    assert figures["checkpoint_share"] == pytest.approx(
        len(steps) * save / (20 * step + len(steps) * save), abs=1e-4
    )
