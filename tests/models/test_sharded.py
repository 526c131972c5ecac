"""A student whose weights are sharded (fsdp) is the student."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from milan.core.device import PRECISIONS, autocast
from milan.core.distributed import Ranks, full_tensor, parallelise, sync_gradients
from milan.models.masking import random_mask
from milan.models.student import build_student
from milan.objectives.features import feature_regression


class Step:
    """Two micro-batches of a small student under autocast, bare or sharded over one rank."""

    def __init__(self, precision: str, *, sharded: bool, recompute: bool) -> None:
        student = build_student(
            "vit_tiny_patch16_224", img_size=32, target_width=8, recompute=recompute,
            model_args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
            decoder={"embed_dim": 16, "depth": 2, "num_heads": 2},
        )  # fmt: skip
        generator = torch.Generator().manual_seed(0)
        for parameter in student.parameters():  # norms and tokens that half precision would round
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        network = parallelise(student, Ranks(size=2), "fsdp", precision) if sharded else student
        self.seen: dict[str, torch.dtype] = {}
        for name in ("encoder.blocks.0.mlp.fc1", "encoder.blocks.0.norm1", "decoder.blocks.1"):
            student.get_submodule(name).register_forward_hook(partial(self._look, name))
        self.losses = []
        for micro in range(2):
            images = torch.randn(3, 3, 32, 32, generator=generator)
            noise = torch.rand(3, 16, generator=generator).clamp(1e-6)
            with sync_gradients(network, micro == 1):
                with autocast(torch.device("cpu"), precision):
                    tokens = network(images, random_mask(noise, visible=4))
                    loss = feature_regression(tokens, torch.ones(3, 17, 8))
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


@pytest.mark.parametrize(
    ("precision", "recompute"), [("bf16", False), ("bf16", True), ("fp16", False)]
)
def test_a_sharded_student_computes_what_autocast_does(precision: str, recompute: bool) -> None:
    """To the bit on one rank: weights of products travel in half precision; norms, the sums between
    blocks, the loss, gradients and what is kept stay in float32."""
    torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        ours = Step(precision, sharded=True, recompute=recompute)
    finally:
        torch.distributed.destroy_process_group()
    bare = Step(precision, sharded=False, recompute=recompute)
    half = PRECISIONS[precision] or torch.float32
    assert ours.seen == {
        "encoder.blocks.0.mlp.fc1": half,
        "encoder.blocks.0.norm1": torch.float32,
        "decoder.blocks.1": torch.float32,
    }
    assert ours.dtypes == {torch.float32}
    assert [loss.dtype for loss in ours.losses] == 2 * [torch.float32]
    assert ours.losses == bare.losses
    assert ours.grads.keys() == bare.grads.keys()
    for name, grad in ours.grads.items():
        assert grad.dtype == torch.float32
        assert torch.equal(grad, bare.grads[name]), name
