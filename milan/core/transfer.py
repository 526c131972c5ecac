"""Batches of pixels to a device and results back, while the device computes.

On CUDA two sets of pinned buffers take turns. A stream of its own brings pixels to the device and
another brings results back, so that the host always has the next batch queued and waits only for
results that it is about to use. Elsewhere each batch is copied, computed and copied back in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import numpy as np
import torch

from milan.core.device import copy_to

Address = TypeVar("Address")
Compute = Callable[[torch.Tensor], dict[str, torch.Tensor]]
"""Pixels [B, H, W, 3] uint8 on the device to results by name, [B, ...], on the device."""


def through_device(
    batches: Iterable[tuple[Address, list[np.ndarray]]],
    compute: Compute,
    device: torch.device,
    *,
    largest: int,
) -> Iterator[tuple[Address, dict[str, np.ndarray]]]:
    """(address, results) of each batch, in the order of `batches`: (address, B views).

    A view is uint8 [H, W, 3]; B is at most `largest`. Results are valid until the next are asked
    for. On CUDA they come one batch late: an error that they tell of is met then.
    """
    if device.type == "cuda":
        return _overlapped(batches, compute, device, largest)
    return _in_turn(batches, compute, device)


def _in_turn(
    batches: Iterable[tuple[Address, list[np.ndarray]]], compute: Compute, device: torch.device
) -> Iterator[tuple[Address, dict[str, np.ndarray]]]:
    for address, views in batches:
        results = compute(copy_to(torch.from_numpy(np.stack(views)), device))
        yield address, {name: tensor.cpu().numpy() for name, tensor in results.items()}


def _overlapped(
    batches: Iterable[tuple[Address, list[np.ndarray]]],
    compute: Compute,
    device: torch.device,
    largest: int,
) -> Iterator[tuple[Address, dict[str, np.ndarray]]]:
    computing = torch.cuda.current_stream(device)
    there, back = torch.cuda.Stream(device), torch.cuda.Stream(device)
    buffers = (_Buffers(), _Buffers())
    waiting: tuple[Address, _Buffers] | None = None
    try:
        for number, (address, views) in enumerate(batches):
            now = buffers[number % 2]
            now.fill(views, device, largest, computing)
            now.send(there)
            now.compute(compute, computing)
            now.fetch(back, largest)
            if waiting:  # its batch ran before the one just queued
                yield waiting[0], waiting[1].results()
            waiting = address, now
        if waiting:
            yield waiting[0], waiting[1].results()
    finally:
        # After an error too: nothing of this is in flight once its memory is given back.
        for stream in (there, computing, back):
            stream.synchronize()


class _Buffers:
    """The memory of one batch in flight, and the events that say how far the device is with it.

    Its methods are called in the order in which they stand here, once a batch.
    """

    def __init__(self) -> None:
        self.count = 0
        self.pixels: torch.Tensor | None = None  # pinned
        self.on_device: torch.Tensor
        self.outputs: dict[str, torch.Tensor] = {}  # kept until they have been copied
        self.pinned: dict[str, torch.Tensor] = {}
        self.sent, self.computed = torch.cuda.Event(), torch.cuda.Event()
        self.fetched = torch.cuda.Event(blocking=True)  # the host sleeps while it waits

    def fill(
        self,
        views: list[np.ndarray],
        device: torch.device,
        largest: int,
        computing: torch.cuda.Stream,
    ) -> None:
        """Take the views of a batch; the results of the last one in here have been fetched."""
        if self.pixels is None:
            shape = (largest, *views[0].shape)
            self.pixels = _pinned(shape, torch.uint8)
            self.on_device = torch.empty(shape, dtype=torch.uint8, device=device)
            self.computed.record(computing)  # what is queued may still use this memory
        self.count = len(views)
        np.stack(views, out=self.pixels[: self.count].numpy())

    def send(self, stream: torch.cuda.Stream) -> None:
        """Bring them to the device, once its memory is free."""
        assert self.pixels is not None
        with torch.cuda.stream(stream):
            stream.wait_event(self.computed)
            pixels = self.pixels[: self.count]
            self.on_device[: self.count].copy_(pixels, non_blocking=True)
            self.sent.record(stream)

    def compute(self, compute: Compute, stream: torch.cuda.Stream) -> None:
        """Queue the work on them."""
        stream.wait_event(self.sent)
        results = compute(self.on_device[: self.count])
        self.outputs = {name: tensor.contiguous() for name, tensor in results.items()}
        self.computed.record(stream)

    def fetch(self, stream: torch.cuda.Stream, largest: int) -> None:
        """Queue the copies of the results to the host."""
        with torch.cuda.stream(stream):
            stream.wait_event(self.computed)
            for name, tensor in self.outputs.items():
                if name not in self.pinned:
                    self.pinned[name] = _pinned((largest, *tensor.shape[1:]), tensor.dtype)
                self.pinned[name][: self.count].copy_(tensor, non_blocking=True)
            self.fetched.record(stream)

    def results(self) -> dict[str, np.ndarray]:
        """Wait for the results."""
        self.fetched.synchronize()
        self.outputs = {}
        return {name: tensor[: self.count].numpy() for name, tensor in self.pinned.items()}


def _pinned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory of the host that a GPU copies from and to by itself."""
    return torch.empty(shape, dtype=dtype, pin_memory=True)
