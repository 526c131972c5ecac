"""Batches to a device and back: on a simulated GPU whose streams run in any order they may."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from milan.core import transfer
from milan.core.transfer import through_device


class Gpu(TorchDispatchMode):
    """Streams of work that is queued, and run as late as possible or in a random order.

    Its memory is the CPU's. A copy that does not wait is queued on the current stream.
    """

    def __init__(self, order: random.Random | None) -> None:
        super().__init__()
        self.order, self.streams, self.waits = order, list[Stream](), 0
        self.current = Stream(self)
        self.computing = self.current

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and len(args) > 2 and args[2]:
            target, source = args[:2]
            self.queue(lambda: target.copy_(source))
            return target
        return func(*args, **(kwargs or {}))

    def queue(self, work: Callable[[], object]) -> None:
        """Queue `work` on the current stream, and perhaps run some of what is queued."""
        self.current.work.append(work)
        if self.order:
            for _ in range(self.order.randrange(3)):
                self.order.choice(self.streams).step()

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """torch.cuda.stream."""
        before, self.current = self.current, stream
        yield
        self.current = before


class Stream:
    """A queue of work and of events to wait for."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.work = gpu, deque[Any]()
        gpu.streams.append(self)

    def wait_event(self, event: Event) -> None:
        """Work queued from now on runs after what `event` has recorded."""
        if event.last:
            self.work.append(event.last)

    def step(self) -> bool:
        """Run the first piece of work; False if there is none, or it waits for another stream."""
        if not self.work:
            return False
        if isinstance(self.work[0], Mark):
            if not self.work[0].reached and self.work[0].stream is not self:
                return False
            self.work.popleft().reached = True
        else:
            self.work.popleft()()
        return True

    def run_until(self, mark: Mark | None) -> None:
        """As little as it takes to reach `mark`, and what that waits for; None: all."""
        while self.work if mark is None else not mark.reached:
            if not self.step():
                first = self.work[0]
                first.stream.run_until(first)

    def synchronize(self) -> None:
        """The host waits."""
        self.run_until(None)


class Mark:
    """A place in a stream."""

    def __init__(self, stream: Stream) -> None:
        self.stream, self.reached = stream, False


class Event:
    """torch.cuda.Event."""

    def __init__(self, blocking: bool = False) -> None:
        self.last: Mark | None = None

    def record(self, stream: Stream) -> None:
        """Here."""
        self.last = Mark(stream)
        stream.work.append(self.last)

    def synchronize(self) -> None:
        """The host waits."""
        if self.last and not self.last.reached:
            self.last.stream.gpu.waits += 1
            self.last.stream.run_until(self.last)


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """A GPU whose streams are late (None) or in an order drawn by a seed."""
    seed = request.param
    gpu = Gpu(None if seed is None else random.Random(seed))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(gpu))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", gpu.stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: gpu.computing)
    monkeypatch.setattr(transfer, "_pinned", lambda shape, dtype: torch.zeros(shape, dtype=dtype))
    empty = torch.empty

    def used_before(*shape: Any, device: torch.device, **more: Any) -> torch.Tensor:
        """Work that is queued still writes to the memory."""
        memory = empty(*shape, **more)
        gpu.queue(lambda: memory.fill_(99))
        return memory

    monkeypatch.setattr(torch, "empty", used_before)
    return gpu


SIZES = (5, 5, 5, 5, 3)
"""Views in a batch."""


def batches() -> list[tuple[int, list[np.ndarray]]]:
    generator = np.random.default_rng(0)
    draw = generator.integers
    return [
        (n, [draw(0, 256, (2, 2, 3), np.uint8) for _ in range(size)])
        for n, size in enumerate(SIZES)
    ]


def results_of(views: list[np.ndarray]) -> dict[str, np.ndarray]:
    pixels = np.stack(views).astype(np.float32)
    return {"sum": pixels.sum((1, 2, 3)), "half": pixels / 2}


def run(gpu: Gpu, given: list[tuple[int, list[np.ndarray]]]) -> list[tuple[int, int]]:
    """Check each result when it comes; returns (its number, batches taken until then)."""
    taken: list[int] = []
    come = []

    def taking() -> Iterator[tuple[int, list[np.ndarray]]]:
        for batch in given:
            taken.append(batch[0])
            yield batch

    def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        count = len(pixels)
        outputs = {"sum": torch.full((count,), -1.0), "half": torch.full((count, 2, 2, 3), -1.0)}

        def work() -> None:
            outputs["sum"].copy_(pixels.float().sum((1, 2, 3)))
            outputs["half"].copy_(pixels.float() / 2)

        gpu.queue(work)
        return outputs

    device = torch.device("cuda", 0)
    with gpu:
        for number, results in through_device(taking(), compute, device, largest=max(SIZES)):
            for name, values in results_of(given[number][1]).items():
                assert np.array_equal(results[name], values), (number, name)
            come.append((number, len(taken)))
    return come


@pytest.mark.parametrize("gpu", [None, *range(40)], indirect=True)
def test_no_batch_meets_another(gpu: Gpu) -> None:
    """Whatever the streams' order: each result is of its batch, in order, with the next queued."""
    come = run(gpu, batches())
    last = len(SIZES)
    assert come == [(n, min(n + 2, last)) for n in range(last)]
    assert gpu.waits <= last  # for results that it is about to use, for nothing else
    assert not any(stream.work for stream in gpu.streams)


@pytest.mark.parametrize("gpu", [None, 1], indirect=True)
def test_nothing_is_in_flight_after_an_error(gpu: Gpu) -> None:
    """The memory of what was queued is given back only then."""
    broken = [*batches()[:3], (3, [np.zeros((9, 9, 3), np.uint8)])]
    with pytest.raises(ValueError, match="shape"):
        run(gpu, broken)
    assert not any(stream.work for stream in gpu.streams)


def test_elsewhere_batches_take_turns() -> None:
    """A CPU: each result at once, by plain copies."""
    given = batches()
    devices: list[torch.device] = []

    def compute(pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        devices.append(pixels.device)
        return {"half": pixels.float() / 2}

    come = list(through_device(given, compute, torch.device("cpu"), largest=5))
    assert [number for number, _ in come] == list(range(len(SIZES)))
    for number, results in come:
        assert np.array_equal(results["half"], results_of(given[number][1])["half"])
    assert {device.type for device in devices} == {"cpu"}
