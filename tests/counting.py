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
from milan.core.device import autocast
from milan.objectives import normalisation, rils_cached
from milan.objectives.base import JointObjective
from milan.store import codecs
from milan.store.cache import TargetCache
from milan.training.build import Settings, student_of
from milan.training.compilation import StepLoss
from milan.training.memory import trial_batch
from milan.training.optim import adamw, gradient_norm
from pipeline.teachers import towers

GPU = torch.device("cuda", 0)
_READ = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim"}


class Waits(TorchDispatchMode):
    """Counts operators that read a value on the host, and copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.all: Counter[str] = Counter()
        """All operators."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        self.all[name] += 1
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

    for module in (milan_device, codecs, towers, normalisation, rils_cached):
        monkeypatch.setattr(module, "kept_copy", uncounted)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, waits:
        yield fake, waits


def to_gpu(module: nn.Module, fake: FakeTensorMode) -> None:
    """Give a module weights without memory on GPU."""
    for each in module.modules():
        for name, weight in each._parameters.items():
            if weight is not None:
                moved = fake.from_tensor(weight.detach()).to(GPU)
                each._parameters[name] = nn.Parameter(moved, weight.requires_grad)
        for name, buffer in each._buffers.items():
            if buffer is not None:
                each._buffers[name] = fake.from_tensor(buffer).to(GPU)


def waits_of_a_step(
    settings: Settings, cache: TargetCache, monkeypatch: pytest.MonkeyPatch
) -> dict[str, int]:
    """What makes the host wait in a micro-batch of pretraining and the update of its weights.

    Without the way back, which torch does not walk on tensors of a GPU that is not there.
    """
    student = student_of(settings, cache).train()
    objective = settings.objective(cache)
    objective.to(torch.device("cpu"))  # what is measured of the store is measured before a run
    objective.notes()
    with fake_gpu(monkeypatch) as (fake, waits):
        to_gpu(student, fake)
        optimiser = adamw(student, GPU, weight_decay=0.05, beta2=0.95)
        batch = trial_batch(4, student, cache, GPU, objective=objective)
        waits.found.clear()
        with autocast(GPU, "bf16"):
            if isinstance(objective, JointObjective):
                said = objective.predict(student, batch).joint
                loss = objective.joint_loss(said).loss
            else:
                loss = StepLoss(objective, student, objective.loss)(batch)
        for weight in student.parameters():
            weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
        norm = gradient_norm(student)
        waits.all.clear()
        optimiser.step()
        # A kernel for each group (torch does not take the norm of fake tensors in one).
        assert waits.all["_fused_adamw_"] == len(optimiser.param_groups) == 2
        assert loss.device == norm.device == GPU
        assert loss.requires_grad
    return dict(waits.found)
