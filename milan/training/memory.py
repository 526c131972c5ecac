"""What a training step takes at its peak, found without taking it."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from milan.config import PretrainConfig
from milan.core.device import autocast
from milan.data.dataset import Batch
from milan.models.student import Student
from milan.store.cache import TargetCache
from milan.training.build import loss_function


def peak_bytes(
    student: Student,
    config: PretrainConfig,
    targets: TargetCache,
    device: torch.device,
    *,
    ranks: int = 1,
) -> int:
    """Bytes of tensors that a step of pretraining holds at its peak on `device`.

    Weights, gradients, AdamW's two moments, a micro-batch and what its way forwards and back
    keeps: the step itself is run on tensors that have shapes and no memory, so its cost does not
    depend on the batch. `config` is resolved. Of `ranks` under fsdp each keeps its share of weights
    and moments; gradients are whole, as they are while they accumulate. Not counted: what the
    process, the device's context and kernels take, and what an allocator leaves unused.
    """
    assert config.micro_batch is not None
    weights = list(student.parameters())
    held = sum(_size(p) for p in weights)
    trained = sum(_size(p) for p in weights if p.requires_grad)
    counter = _Live()
    targets.codec.to(device)  # what it keeps for later calls has to have memory
    with FakeTensorMode(allow_non_fake_inputs=True) as fake, counter:
        batch = _batch(config.micro_batch, student, targets, device)
        faked: dict[str, torch.Tensor] = {
            name: torch.nn.Parameter(fake.from_tensor(p.data).to(device), p.requires_grad)
            for name, p in student.named_parameters()
        }
        counter.forget()
        counter.track(batch)
        if config.batch_size > config.micro_batch:  # the second finds the gradients of the first
            for p in faked.values():
                p.grad = torch.zeros_like(p) if p.requires_grad else None

        def predict(images: torch.Tensor, mask: Any) -> torch.Tensor:
            return functional_call(student, faked, (images, mask))

        objective = loss_function(predict, config, targets, device)  # type: ignore[arg-type]
        with autocast(device, config.precision):
            loss = objective(batch)
        loss.backward()
    shared = ranks if config.parallel == "fsdp" else 1
    return (held + 2 * trained) // shared + counter.peak


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _batch(size: int, student: Student, targets: TargetCache, device: torch.device) -> Batch:
    """A micro-batch as a loader worker hands it over; its values are never looked at."""
    spec, edge = targets.spec, targets.view_spec.size
    codec = targets.codec
    codes = torch.empty(
        size, spec.tokens, codec.width(spec.channels),
        dtype=getattr(torch, codec.dtype), device=device,
    )  # fmt: skip
    rows = torch.empty(size, dtype=torch.int64, device=device)
    return Batch(
        torch.empty(size, edge, edge, 3, dtype=torch.uint8, device=device),
        torch.empty(size, spec.tokens - 1, device=device),
        torch.empty(size, student.patches, device=device),
        rows,
        rows,
        codes,
        torch.empty(size, spec.tokens, device=device) if codec.scaled else None,
    )


class _Live(TorchDispatchMode):
    """Adds up the storages that operators have made and nobody has let go of yet."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def forget(self) -> None:
        """Start anew: what is there already is counted elsewhere."""
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
            weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.track(out)
        return out
