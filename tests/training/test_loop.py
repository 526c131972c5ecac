"""The loop by itself: it trains whatever a task and a schedule say, and needs no store."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from milan.reporting.log import RunLog, read_log
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


def schedule(epochs: int) -> Schedule:
    """Five steps an epoch."""
    return Schedule(
        data=EqualEpochs(STEPS, BATCH), epochs=epochs, accumulate=1, lr=0.1, warmup_epochs=1,
        min_lr=0, precision="fp32", save_every=3, save_minutes=15, keep=2, log_every=2,
    )  # fmt: skip


def batches_from(step: int) -> Iterator[Any]:
    """Those of each step, and after an epoch one for validation."""
    while True:
        yield batch_of(step)
        step += 1
        if step % STEPS == 0:
            yield batch_of(10_000 + step)


def train(run: Path, *, epochs: int = 4, resume_from: int | None = None, **more: Any) -> Any:
    run.mkdir(exist_ok=True)
    task = Classifier()
    log = RunLog(run, resume_from or 0, [])
    figures = fit(
        task, adamw(task.model, CPU, weight_decay=0.0, beta2=0.95), schedule(epochs),
        Context(run, CPU, log=log), batches_from=batches_from, resume_from=resume_from, **more,
    )  # fmt: skip
    log.close()
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
