"""The loop by itself: it trains whatever a task and a schedule say, and needs no store."""

from __future__ import annotations

import errno
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from milan.core.device import reached
from milan.core.progress import NoProgress, Progress
from milan.core.signals import Stop
from milan.errors import TrainError
from milan.reporting.log import RunLog, read_log
from milan.training import checkpoint, loop
from milan.training.loop import Context, fit
from milan.training.optim import Schedule, adamw

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

    def to_device(self, batch: Any) -> Any:
        """It is there."""
        return batch

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


class EqualEpochs:
    """Epochs of STEPS steps each."""

    seed, batch_size = 0, BATCH

    def first_step(self, epoch: int) -> int:
        """The first step of an epoch."""
        return epoch * STEPS

    def position(self, step: int) -> tuple[int, int]:
        """(epoch, steps of it before this one)"""
        return divmod(step, STEPS)


def schedule(epochs: int, save_every: int | None = 3) -> Schedule:
    """Five steps an epoch."""
    return Schedule(
        data=EqualEpochs(), epochs=epochs, accumulate=1, lr=0.1, warmup_epochs=1,
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
    progress: Progress | None = None, stop: Stop | None = None, **more: Any,
) -> Any:  # fmt: skip
    run.mkdir(exist_ok=True)
    task = Classifier()
    figures = fit(
        task, adamw(task.model, CPU, weight_decay=0.0, beta2=0.95),
        schedule(epochs, save_every),
        Context(
            run, CPU, progress=progress or NoProgress(), stop=stop or Stop(),
            open_log=lambda step: RunLog(run, step, []),
        ), batches_from=batches_from, resume_from=resume_from, **more,
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
    clock, steps, begin = Clock(step, save), list[int](), checkpoint.Writer.save

    def noted(self: Any, at: int, state: Any) -> None:
        steps.append(at)
        clock.now += clock.save
        begin(self, at, state)
        self.wait()

    taken = loop._Loop.step

    def slow(self: Any, number: int) -> None:
        clock.now += clock.step
        taken(self, number)

    monkeypatch.setattr(loop, "time", clock)
    monkeypatch.setattr(checkpoint.Writer, "save", noted)
    monkeypatch.setattr(loop._Loop, "step", slow)
    _, figures = train(tmp_path, save_every=None)
    assert steps == expected
    assert figures["checkpoint_share"] == pytest.approx(
        len(steps) * save / (20 * step + len(steps) * save), abs=1e-4
    )


def test_a_validation_is_shown_and_stopped_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked to stop while it validates, a run takes no step more; the checkpoint is behind it."""
    stop, lines, shown = Stop(), list[str](), list[str]()
    measure = Classifier.validate

    def asked(self: Classifier, epoch: int, batches: Iterator[Any]) -> tuple[dict, dict]:
        if epoch == 1:
            stop.request(signal.SIGTERM)
        return measure(self, epoch, batches)

    class Seen(NoProgress):
        def note(self, text: str) -> None:
            lines.append(text)

        def advance(self, done: int, figures: str = "") -> None:
            shown.append(figures)

    monkeypatch.setattr(Classifier, "validate", asked)
    _, figures = train(tmp_path / "run", save_every=None, progress=Seen(), stop=stop)
    assert (figures["step"], figures["stopped_by"]) == (10, "SIGTERM")
    assert checkpoint.steps(tmp_path / "run")[-1] == 10
    assert lines == ["SIGTERM: finishing the validation, then a checkpoint"]
    assert shown.count("validating, batch 1") == 2
    monkeypatch.undo()
    whole, _ = train(tmp_path / "whole", save_every=None)
    resumed, _ = train(tmp_path / "run", save_every=None, resume_from=10)
    assert torch.equal(resumed.model.weight, whole.model.weight)
    logs = [(tmp_path / run / "log.jsonl").read_text() for run in ("run", "whole")]
    assert [len(log.splitlines()) for log in logs] == [12, 12]


# --- while a checkpoint is written ----------------------------------------------------------------


class Disk:
    """Writes files in its own time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[], object]) -> None:
        write = checkpoint.save_file

        def slow(tensors: Any, *arguments: Any) -> None:
            before()
            write(tensors, *arguments)

        monkeypatch.setattr(checkpoint, "save_file", slow)


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_steps_are_taken_while_a_checkpoint_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that takes half of the time training waits for no more than a copy; one checkpoint
    is written at a time; what is written is what was trained when it began."""
    train(tmp_path / "stopped", stop_after=12)
    steps: list[int] = []
    during: list[int] = []
    loss = Classifier.loss

    def slow(self: Any, batch: Any) -> torch.Tensor:
        time.sleep(0.02)
        steps.append(len(writers()))
        return loss(self, batch)

    def busy() -> None:
        if len(steps) < 18:  # the last one is waited for
            before = len(steps)
            time.sleep(0.1)
            during.append(len(steps) - before)

    monkeypatch.setattr(Classifier, "loss", slow)
    Disk(monkeypatch, busy)
    _, figures = train(tmp_path / "run", save_every=12)
    assert sum(during) >= 4
    assert max(steps) == 1
    assert figures["checkpoint_share"] < 0.2
    for name in ("model", "optimiser"):
        ours, theirs = (
            tmp_path / run / f"checkpoints/step-00000012/{name}.safetensors"
            for run in ("run", "stopped")
        )
        assert ours.read_bytes() == theirs.read_bytes()


def test_a_disk_that_fills_while_steps_are_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next step ends the run with one line; the checkpoint before is whole."""
    taken: list[Any] = []

    def full() -> None:
        if len(taken) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def joined(self: Any, batch: Any) -> list[str]:
        for thread in writers():
            thread.join()
        taken.append(batch)
        return batch

    monkeypatch.setattr(Classifier, "to_device", joined)
    Disk(monkeypatch, full)
    with pytest.raises(TrainError, match="the checkpoint of step 6 cannot be written: No space"):
        train(tmp_path)
    assert len(taken) == 8  # seven steps and a validation
    assert not writers()
    assert checkpoint.newest(tmp_path, note=print) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_ends_leaves_no_half_checkpoint(
    error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it ends: the folder is another call's from then on."""

    def fails(self: Any, batch: Any) -> Any:
        if writers():
            raise error
        return batch

    monkeypatch.setattr(Classifier, "to_device", fails)
    Disk(monkeypatch, lambda: time.sleep(0.05))
    with pytest.raises(error):
        train(tmp_path)
    assert not writers()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]
    assert checkpoint.newest(tmp_path, note=print) == 3


# --- a GPU's clock and streams, without one -------------------------------------------------------


class Gpu:
    """A host and a device with clocks of their own, in place of CUDA.

    What the host queues starts when it is queued and what was queued before is done. Seconds of the
    clock are made up; streams are names.
    """

    device = torch.device("cuda", 0)

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, loading: float, step: float) -> None:
        gpu, self.host, self.free, self.current = self, 100.0, 0.0, "kernels"
        self.seen: list[str] = []
        taken = loop._Loop._check_last

        class Event:
            def __init__(self, **_: Any) -> None:
                self.at, self.stream = 0.0, ""

            def record(self, stream: Any) -> None:
                self.at, self.stream = max(gpu.host, gpu.free), str(stream)

            def query(self) -> bool:
                return self.at <= gpu.host

            def synchronize(self) -> None:
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, other: Any) -> float:
                assert self.query()
                assert other.query()
                return 1000 * (other.at - self.at)

        class Stream(str):
            def wait_event(self, event: Event) -> None:
                gpu.seen.append(f"{self} wait for {event.stream}")

        class On:
            def __init__(self, stream: Stream) -> None:
                self.streams = stream, gpu.current

            def __enter__(self) -> None:
                gpu.current = self.streams[0]

            def __exit__(self, *_: object) -> None:
                gpu.current = self.streams[1]

        class Task(Classifier):
            def to_device(self, batch: Any) -> Any:
                gpu.seen.append(f"copied on {gpu.current}")
                return batch

            def loss(self, batch: Any) -> torch.Tensor:
                gpu.seen.append("step")
                gpu.free = max(gpu.host, gpu.free) + step
                return super().loss(batch)

        def read_last(self: Any) -> None:
            if self.unchecked:
                gpu.seen.append("loss read")
                self.unchecked.ready.synchronize()
            taken(self)

        def loaded(start: int) -> Iterator[Any]:
            for batch in batches_from(start):
                gpu.host += loading
                yield batch

        self.task, self.batches = Task(), loaded
        for name, value in {
            "Event": Event, "Stream": lambda _: Stream("copies"), "stream": On,
            "current_stream": lambda _: Stream(gpu.current),
            "get_device_name": lambda _: "a GPU",
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda _, stream: gpu.seen.append(f"used on {stream}")
        )
        monkeypatch.setattr(loop, "reached", lambda _: reached(gpu.device))
        monkeypatch.setattr(loop._Loop, "_check_last", read_last)
        monkeypatch.setattr(loop, "time", self)

    def perf_counter(self) -> float:
        return self.host

    monotonic = perf_counter

    def train(self, run: Path) -> dict[str, Any]:
        context = Context(run, self.device, open_log=lambda step: RunLog(run, step, []))
        optimiser = adamw(self.task.model, CPU, weight_decay=0.0, beta2=0.95)
        return fit(
            self.task, optimiser, schedule(4), context, batches_from=self.batches, stop_after=19
        )


@pytest.mark.parametrize(
    ("loading", "share"),
    [
        (4.0, 0.0),  # hidden behind the step before, though the host waits for it
        (15.0, 0.33),  # 5 of 15 seconds
    ],
)
def test_waiting_is_what_the_device_waits(
    loading: float, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its own clock: the gap between the kernels of a step and those of the next."""
    figures = Gpu(monkeypatch, loading=loading, step=10.0).train(tmp_path)
    logged = {line["step"]: line for line in read_log(tmp_path, 20)}
    # Lines of steps that follow no validation, which leaves nothing to hide behind.
    for step in (4, 8, 14, 18):
        assert logged[step]["wait_share"] == pytest.approx(share, abs=0.01)
    assert figures["wait_share"] == pytest.approx(share, abs=0.1)


def test_a_batch_is_copied_while_the_step_before_computes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stream of its own, once that step is queued and before anything waits for it; kernels
    wait for the copy, and its memory for them."""
    gpu = Gpu(monkeypatch, loading=1.0, step=10.0)
    gpu.train(tmp_path)
    arrived = ["kernels wait for copies", "used on kernels", "used on kernels"]
    first = ["copied on copies", *arrived, "step", "copied on copies"]
    assert gpu.seen[: len(first)] == first
    copied = [i for i, what in enumerate(gpu.seen) if what.startswith("copied")]
    assert all(gpu.seen[i] == "copied on copies" for i in copied)
    for i, what in enumerate(gpu.seen):
        if what == "step":
            assert gpu.seen[i - 3 : i] == arrived
            assert gpu.seen[i + 1] == "copied on copies"


def test_a_batch_that_cannot_be_read_is_raised_in_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for ahead; the step before is still finished, and saved."""
    gpu = Gpu(monkeypatch, loading=1.0, step=10.0)

    def torn(start: int) -> Iterator[Any]:
        yield from (batch_of(step) for step in range(3))
        raise TrainError("row 7 is torn")

    gpu.batches = torn
    with pytest.raises(TrainError, match="row 7"):
        gpu.train(tmp_path)
    assert checkpoint.newest(tmp_path, note=print) == 3
