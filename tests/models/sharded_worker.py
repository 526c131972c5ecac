"""Micro-batches of a small student under autocast: bare, or sharded over ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from milan.core.device import autocast
from milan.core.distributed import Ranks, full_tensor, parallelise, sync_gradients
from milan.core.launch import as_rank
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.models.masking import random_mask
from milan.models.student import add_deep_decoders, build_student, split_deep
from milan.objectives.features import feature_regression

CPU = torch.device("cpu")


class Step:
    """The two micro-batches of one rank; sharded with `size` ranks, which all make a step."""

    def __init__(
        self, precision: str, *, recompute: bool = False, deep: bool = False, rank: int = 0,
        size: int = 0,
    ) -> None:  # fmt: skip
        student = build_student(
            "vit_tiny_patch16_224", img_size=32, target_width=8, recompute=recompute,
            model_args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
            decoder={"embed_dim": 16, "depth": 2, "num_heads": 2},
        )  # fmt: skip
        torch.manual_seed(0)
        add_deep_decoders(student, [1] if deep else [])
        generator = torch.Generator().manual_seed(0)
        for parameter in student.parameters():  # norms and tokens that half precision would round
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        generator.manual_seed(1 + rank)
        network = parallelise(student, Ranks(size=2), "fsdp", precision) if size else student
        self.seen: dict[str, torch.dtype] = {}
        for name in ("encoder.blocks.0.mlp.fc1", "encoder.blocks.0.norm1", "decoder.blocks.1"):
            student.get_submodule(name).register_forward_hook(partial(self._look, name))
        self.losses = []
        for micro in range(2):
            images = torch.randn(3, 3, 32, 32, generator=generator)
            noise = torch.rand(3, 16, generator=generator).clamp(1e-6)
            with sync_gradients(network, micro == 1):
                with autocast(CPU, precision):
                    tokens = split_deep(network(images, random_mask(noise, visible=4)))
                    losses = [feature_regression(one, torch.ones(3, 17, 8)) for one in tokens]
                    loss = torch.stack(losses).sum()
                loss.backward()
            self.losses.append(loss.detach())
        self.dtypes = {p.dtype for p in student.parameters()}
        self.grads = {
            name: full_tensor(p.grad)
            for name, p in student.named_parameters()
            if p.grad is not None
        }

    def _look(self, name: str, module: torch.nn.Module, _: Any, out: torch.Tensor) -> None:
        weight = getattr(module, "weight", None)
        self.seen[name] = out.dtype if weight is None else weight.dtype


def as_one_of(stop: Stop, progress: Progress, **given: Any) -> list[dict[str, Any]]:
    """A sharded step in a process of its own; what each of the ranks saw."""
    torch.set_num_threads(1)
    with as_rank(Ranks.from_environment(), CPU, stop=stop, progress=progress) as (ranks, _):
        step = Step(rank=ranks.rank, size=ranks.size, **given)
        return [seen for _, seen in ranks.gather_objects(vars(step))]
