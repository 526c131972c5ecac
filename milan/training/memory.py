"""The peak memory of a training step, computed without allocating it."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from milan.core.device import autocast
from milan.data.loader import Batch, bytes_of
from milan.models.student import Student
from milan.objectives.base import Objective
from milan.store.cache import TargetCache
from milan.training.build import Settings
from milan.training.compilation import StepLoss


def peak_bytes(
    student: Student,
    settings: Settings,
    cache: TargetCache,
    device: torch.device,
    micro_batch: int,
    *,
    ranks: int = 1,
) -> int:
    """Bytes of tensors that a step of pretraining holds at its peak on `device`.

    Weights, gradients, AdamW's two moments, a micro-batch (on CUDA the next one too) and the
    activations of its forward and backward pass: the step itself is run on tensors that have shapes
    and no memory, so its cost does not depend on the batch. Of `ranks` under fsdp each keeps its
    share of weights and moments; gradients are whole, as they are while they accumulate. Not
    counted: what the process, the device's context and kernels take, and what an allocator leaves
    unused.
    """
    weights = list(student.parameters())
    total = sum(_size(p) for p in weights)
    trained = sum(_size(p) for p in weights if p.requires_grad)
    live = _LiveStorages()
    for part in cache.parts:
        part.codec.to(device)  # its tables are kept for later calls: they need memory
    objective = settings.objective(cache)
    objective.to(device)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, live:
        batch = trial_batch(micro_batch, student, cache, device, objective=objective)
        fakes: dict[str, torch.Tensor] = {
            name: nn.Parameter(fake.from_tensor(p.data).to(device), p.requires_grad)
            for name, p in student.named_parameters()
        }
        live.reset()
        live.track(batch)
        if settings.config.batch_size > micro_batch:  # the second adds to gradients of the first
            for p in fakes.values():
                p.grad = torch.zeros_like(p) if p.requires_grad else None
        network: Any = partial(_call, student, fakes)
        with autocast(device, settings.precision):
            loss = StepLoss(objective, network, objective.loss)(batch)
        loss.backward()
    sharded = ranks if settings.config.parallel == "fsdp" else 1
    # A GPU has the next micro-batch already.
    ahead = bytes_of(batch) if device.type == "cuda" else 0
    return (total + 2 * trained) // sharded + live.peak + ahead


def _call(student: Student, weights: dict[str, torch.Tensor], *inputs: Any) -> torch.Tensor:
    """What the student predicts with other weights than its own."""
    return functional_call(student, weights, inputs)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def trial_batch(
    size: int,
    student: Student,
    cache: TargetCache,
    device: torch.device,
    *,
    objective: Objective | None = None,
) -> Batch:
    """A micro-batch as it arrives on `device`; only its shapes are a store's."""
    spec, shape = cache.spec, cache.view_spec.shape
    texts = objective is not None and objective.needs_texts
    tokens = texts or (objective is not None and objective.needs_tokens)
    first, *others = (_trial_codes(size, part, device) for part in cache.parts)
    rows = torch.zeros(size, dtype=torch.int64, device=device)
    return Batch(
        torch.zeros(size, *shape, 3, dtype=torch.uint8, device=device),
        torch.ones(size, cache.masking.spec.tokens - 1, device=device),
        torch.full((size, student.patches), 0.5, device=device),
        rows,
        rows.clone(),  # no alias: a compiled step would be compiled again for a real batch
        *first,
        _trial_ids(size, cache, device) if tokens else None,
        torch.ones(size, spec.channels, device=device) if texts else None,
        tuple(others),
        torch.full((size, 1 + len(others)), 0.5, device=device) if others else None,
        _trial_channels(size, student, shape, device),
    )


def _trial_codes(
    size: int, part: TargetCache, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Codes and scale of a teacher."""
    spec, codec = part.spec, part.codec
    codes = torch.zeros(
        size, spec.tokens, codec.width(spec.channels),
        dtype=getattr(torch, codec.dtype), device=device,
    )  # fmt: skip
    return codes, torch.ones(size, spec.tokens, device=device) if codec.scaled else None


def _trial_channels(
    size: int, student: Student, shape: tuple[int, int], device: torch.device
) -> torch.Tensor | None:
    """What a student sees that does not see the teacher's pixels."""
    if not student.own_channels:
        return None
    count = student.encoder.patch_embed.proj.in_channels
    return torch.zeros(size, count, *shape, device=device)


def _trial_ids(size: int, cache: TargetCache, device: torch.device) -> torch.Tensor:
    """Token ids of `size` texts as long as the store's, whose end is their last id."""
    length = (cache.spec.texts or {})["context"]
    return torch.arange(length, dtype=torch.int32, device=device).expand(size, -1).contiguous()


class _LiveStorages(TorchDispatchMode):
    """Adds up the storages that operators have allocated and that were not freed yet."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def reset(self) -> None:
        """Start from zero: what was allocated before is counted elsewhere."""
        self.now = self.peak = 0

    def track(self, made: Any) -> None:
        """Count the storages of the tensors in `made`, each once."""
        for leaf in tree_leaves(made):
            if not isinstance(leaf, torch.Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage in self.seen:
                continue
            self.seen.add(storage)
            size = storage.nbytes()
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.track(out)
        return out
