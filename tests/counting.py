"""A GPU without memory, on which a test counts what makes the host wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from milan.core import device as milan_device
from milan.store import codecs
from pipeline.teachers import towers

GPU = torch.device("cuda", 0)
_READ = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim"}


class Waits(TorchDispatchMode):
    """Counts operators that read a value on the host, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        result = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        # A number of the host may meet a tensor of any device: it travels with the kernel.
        devices = {t.device.type for t in tensors if t.ndim or name in ("_to_copy", "copy_")}
        if name in _READ or len(devices) > 1:
            self.found[name] += 1
        return result


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeTensorMode, Waits]]:
    """Inside, tensors of GPU have no memory, and Waits counts. What reads one raises.

    What `kept_copy` keeps is copied once in a run and does not count.
    """
    waits, kept_copy = Waits(), milan_device.kept_copy

    def uncounted(*arguments: Any) -> torch.Tensor:
        before = waits.found.copy()
        result = kept_copy(*arguments)
        waits.found = before
        return result

    for module in (milan_device, codecs, towers):
        monkeypatch.setattr(module, "kept_copy", uncounted)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, waits:
        yield fake, waits


def to_gpu(module: nn.Module, fake: FakeTensorMode) -> None:
    """Give a module weights without memory on GPU."""
    for each in module.modules():
        for name, weight in each._parameters.items():
            if weight is not None:
                moved = fake.from_tensor(weight.detach()).to(GPU)
                each._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = fake.from_tensor(buffer).to(GPU)
