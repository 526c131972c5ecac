"""Which kernels a network trains with: the same mathematics, the faster way on its device.

The figures behind each choice are in docs/performance.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def choose_kernels(model: nn.Module, device: torch.device, precision: str) -> None:
    """Set attention and products of all blocks of `model` to what is fastest on `device`.

    torch's fused attention, but on a CPU in half precisions: there the plain one takes less than
    half the time. In float32 on a CPU with AVX-512 products by oneDNN, which torch itself gives to
    MKL: a tenth faster on AMD's; without AVX-512 they would take a third longer. Weights keep their
    names and values.
    """
    cpu = device.type == "cpu"
    products = cpu and precision == "fp32" and prefers_onednn()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = not cpu or precision == "fp32"  # type: ignore[assignment]
        if type(module) is nn.Linear and products:
            module.__class__ = OneDNNLinear


class OneDNNLinear(nn.Linear):
    """nn.Linear on a CPU, its three products by oneDNN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], float32."""
        return _Linear.apply(x, self.weight, self.bias)


def prefers_onednn() -> bool:
    """Whether products by oneDNN are at hand, and the faster ones on this CPU."""
    return has_onednn() and torch.backends.cpu.get_cpu_capability() == "AVX512"


def has_onednn() -> bool:
    """Whether this build of torch has oneDNN's product as an operator."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # The operator that torch's compiler puts in a linear layer's place; it has no gradient.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        wanted = ctx.needs_input_grad
        return (
            _product(grad, weight.t(), None) if wanted[0] else None,
            _product(rows.t(), x.flatten(0, -2).t(), None) if wanted[1] else None,
            rows.sum(dim=0) if wanted[2] else None,
        )
