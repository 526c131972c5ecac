"""The faster kernels compute what the plain ones compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from milan.models import kernels
from milan.models.kernels import OneDNNLinear, choose_kernels
from milan.models.masking import Mask, random_mask
from milan.models.student import Student, build_student

CPU = torch.device("cpu")


def student(**settings: Any) -> Student:
    return build_student(
        "vit_base_patch16_224", img_size=32, target_width=24,
        model_args={"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        decoder={"embed_dim": 16, "depth": 2, "num_heads": 2}, **settings,
    )  # fmt: skip


def batch() -> tuple[torch.Tensor, Mask]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(3, 16, generator=generator).clamp(1e-6, 1 - 1e-6)
    return torch.randn(3, 3, 32, 32, generator=generator), random_mask(noise, visible=4)


def gradients(model: Student) -> dict[str, torch.Tensor]:
    images, mask = batch()
    model.zero_grad()
    model(images, mask).square().mean().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def fused(model: nn.Module) -> set[bool]:
    return {m.fused_attn for m in model.modules() if hasattr(m, "fused_attn")}  # type: ignore[misc]


@pytest.mark.parametrize(
    ("precision", "onednn"), [("fp32", True), ("fp32", False), ("bf16", False)]
)
def test_kernels_change_rounding_only(
    precision: str, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predictions and every gradient, with products and attention of either kind."""
    monkeypatch.setattr(kernels, "prefers_onednn", lambda: onednn and kernels.has_onednn())
    plain, chosen = student(), student()
    images, mask = batch()
    choose_kernels(chosen, CPU, precision)
    assert fused(chosen) == {precision == "fp32"}
    assert (plain(images, mask) - chosen(images, mask)).abs().max() < 1e-5
    expected, got = gradients(plain), gradients(chosen)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= 1e-5 * value.abs().max().clamp_min(1e-3), name


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_products_are_onednns(capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every linear layer, in float32 on a CPU with AVX-512; weights keep their names."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    pays = capability == "AVX512" and kernels.has_onednn()
    model = student()
    names = list(model.state_dict())
    choose_kernels(model, CPU, "bf16")
    assert not any(isinstance(m, OneDNNLinear) for m in model.modules())
    choose_kernels(model, CPU, "fp32")
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == 2 * 4 + 2 * 5 + 2
    assert {type(m) for m in linear} == {OneDNNLinear if pays else nn.Linear}
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layers_gradients(bias: bool) -> None:
    """Against finite differences' exact rival: float32 autograd of nn.Linear, in any rank."""
    if not kernels.has_onednn():
        pytest.skip("torch without oneDNN: products are torch's own")
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(12, 20, bias=bias)
    for shape in ((7, 12), (2, 5, 12)):
        x = torch.randn(shape, generator=generator, requires_grad=True)
        out = torch.randn(*shape[:-1], 20, generator=generator)
        found = []
        for kind in (nn.Linear, OneDNNLinear):
            layer.__class__ = kind
            layer.zero_grad()
            x.grad = None
            # A gradient that is not contiguous, as attention's transposes give.
            layer(x).mul(1).backward(out.transpose(0, -1).contiguous().transpose(0, -1))
            found.append([x.grad, *(p.grad.clone() for p in layer.parameters())])  # type: ignore[union-attr]
        for a, b in zip(*found, strict=True):
            assert (a - b).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["prompt", "mae"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_are_the_same(kind: str, precision: str) -> None:
    """checkpoint_activations: losses and gradients to the bit, in either precision."""
    found = []
    for recompute in (False, True):
        model = student(decoder_kind=kind, recompute=recompute).train()
        choose_kernels(model, CPU, precision)
        images, mask = batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = model(images, mask).float().square().mean()
        loss.backward()
        found.append({"loss": loss} | {n: p.grad for n, p in model.named_parameters()})
    for name, value in found[0].items():
        assert (value is None) == (found[1][name] is None)
        assert value is None or torch.equal(value, found[1][name]), name


def test_recomputing_keeps_less() -> None:
    """What is saved for the way back: a block's input instead of all that is inside it."""

    def saved(recompute: bool) -> int:
        model, sizes = student(recompute=recompute), []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(*batch())
        return sum(sizes)

    assert saved(True) < saved(False) / 2
