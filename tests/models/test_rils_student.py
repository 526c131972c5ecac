"""RILS's student: what its published code computes, from weights under its published names."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from milan.errors import ConfigError
from milan.models.encoder import sincos_positions
from milan.models.masking import Mask, random_mask
from milan.models.rils import RilsStudent, load_rils, published_state, rils_decoder
from milan.models.student import build_student
from milan.models.text_encoder import TextEncoder, TextShape
from milan.objectives.sentences import SentenceLoss

VIT = "vit_base_patch16_224"
SMALL: dict[str, Any] = {"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
TEXT = TextShape(vocabulary=50, context=9, width=128, heads=2, layers=2, joint=24)
END = 49


def small(seed: int = 0, **model: Any) -> RilsStudent:
    """Views of 32 pixels, a grid of 4 x 4 patches."""
    torch.manual_seed(seed)
    plain = build_student(
        VIT, img_size=32, target_width=128, decoder_kind="mae",
        model_args=SMALL | model, decoder=rils_decoder(128, 2), seed=seed,
    )  # fmt: skip
    return RilsStudent(plain.encoder, plain.decoder, TextEncoder(TEXT))


def inputs(count: int = 3) -> tuple[torch.Tensor, Mask, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    noise = torch.rand(count, 16, generator=draw).clamp(1e-6, 1 - 1e-6)
    ids = torch.randint(1, END, (count, TEXT.context), generator=draw)
    for row, end in enumerate(range(3, 3 + count)):
        ids[row, end], ids[row, end + 1 :] = END, 0
    return torch.randn(count, 3, 32, 32, generator=draw), random_mask(noise, visible=4), ids


def published_weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the names and in the shapes of RILS's checkpoints."""
    draw = torch.Generator().manual_seed(seed)
    c, w, d = 128, TEXT.width, TEXT.joint
    shapes: dict[str, tuple[int, ...]] = {
        "visual.cls_token": (1, 1, c), "visual.mask_token": (1, 1, c),
        "visual.patch_embed.proj.weight": (c, 3, 8, 8), "visual.patch_embed.proj.bias": (c,),
        "token_embedding.weight": (TEXT.vocabulary, w), "positional_embedding": (TEXT.context, w),
        "image_projection": (c, d), "text_projection": (w, d), "logit_scale": (),
    }  # fmt: skip
    for stack, count in (("blocks", 2), ("decoder_blocks", 1)):
        for i in range(count):
            for name, size in (
                ("attn.qkv.weight", (3 * c, c)), ("attn.q_bias", (c,)), ("attn.v_bias", (c,)),
                ("attn.proj.weight", (c, c)), ("attn.proj.bias", (c,)),
                ("mlp.fc1.weight", (4 * c, c)), ("mlp.fc1.bias", (4 * c,)),
                ("mlp.fc2.weight", (c, 4 * c)), ("mlp.fc2.bias", (c,)),
                ("norm1.weight", (c,)), ("norm1.bias", (c,)),
                ("norm2.weight", (c,)), ("norm2.bias", (c,)),
            ):  # fmt: skip
                shapes[f"visual.{stack}.{i}.{name}"] = size
    for name in ("norm", "decoder_norm"):
        shapes |= {f"visual.{name}.weight": (c,), f"visual.{name}.bias": (c,)}
    for name in ("decoder_embed", "decoder_pred"):
        shapes |= {f"visual.{name}.weight": (c, c), f"visual.{name}.bias": (c,)}
    for i in range(TEXT.layers):
        stem = f"transformer.resblocks.{i}."
        for name, size in (
            ("attn.in_proj_weight", (3 * w, w)), ("attn.in_proj_bias", (3 * w,)),
            ("attn.out_proj.weight", (w, w)), ("attn.out_proj.bias", (w,)),
            ("ln_1.weight", (w,)), ("ln_1.bias", (w,)), ("ln_2.weight", (w,)), ("ln_2.bias", (w,)),
            ("mlp.c_fc.weight", (4 * w, w)), ("mlp.c_fc.bias", (4 * w,)),
            ("mlp.c_proj.weight", (w, 4 * w)), ("mlp.c_proj.bias", (w,)),
        ):  # fmt: skip
            shapes[stem + name] = size
    shapes |= {"ln_final.weight": (w,), "ln_final.bias": (w,)}
    state = {n: 0.2 * torch.randn(size, generator=draw) for n, size in shapes.items()}
    positions = sincos_positions(128, 4)
    return state | {"visual.pos_embed": positions, "visual.decoder_pos_embed": positions + 0}


def published_forward(
    state: dict[str, torch.Tensor], images: torch.Tensor, mask: Mask, ids: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """RILS's sections 3 and 4, restated: image_embed, text_embed, masked_pred, unmasked_feat."""

    def attention(x: torch.Tensor, weight: Any, bias: Any, causal: bool) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2)
            for part in F.linear(x, weight, bias).chunk(3, -1)
        )
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        if causal:
            scores = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1).to(scores.dtype)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, state[name + ".weight"], state[name + ".bias"])

    def norm(name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[name + ".weight"], state[name + ".bias"], eps)

    def vit_block(stem: str, x: torch.Tensor) -> torch.Tensor:
        q_bias, v_bias = state[stem + "attn.q_bias"], state[stem + "attn.v_bias"]
        bias = torch.cat([q_bias, torch.zeros_like(q_bias), v_bias])
        weight = state[stem + "attn.qkv.weight"]
        y = attention(norm(stem + "norm1", x, 1e-6), weight, bias, False)
        x = x + linear(stem + "attn.proj", y)
        hidden = F.gelu(linear(stem + "mlp.fc1", norm(stem + "norm2", x, 1e-6)))
        return x + linear(stem + "mlp.fc2", hidden)

    def encoder(visible: torch.Tensor | None) -> torch.Tensor:
        weight, bias = (state[f"visual.patch_embed.proj.{n}"] for n in ("weight", "bias"))
        x = F.conv2d(images, weight, bias, stride=8).flatten(2).transpose(1, 2)
        x = x + state["visual.pos_embed"][:, 1:]
        if visible is not None:
            x = x.gather(1, visible[..., None].expand(-1, -1, x.shape[2]))
        first = state["visual.cls_token"] + state["visual.pos_embed"][:, :1]
        x = torch.cat([first.expand(len(x), -1, -1), x], 1)
        for i in range(2):
            x = vit_block(f"visual.blocks.{i}.", x)
        return norm("visual.norm", x, 1e-6)

    def decoder(z: torch.Tensor) -> torch.Tensor:
        z = linear("visual.decoder_embed", z)
        kept, restore = z[:, 1:], torch.cat(mask[:2], 1).argsort(1)
        hidden = state["visual.mask_token"].expand(len(z), mask.masked.shape[1], -1)
        full = torch.cat([kept, hidden], 1)
        full = full.gather(1, restore[..., None].expand(-1, -1, full.shape[2]))
        x = torch.cat([z[:, :1], full], 1) + state["visual.decoder_pos_embed"]
        x = norm("visual.decoder_norm", vit_block("visual.decoder_blocks.0.", x), 1e-6)
        return linear("visual.decoder_pred", x)

    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    for i in range(TEXT.layers):
        stem = f"transformer.resblocks.{i}."
        weight, bias = state[stem + "attn.in_proj_weight"], state[stem + "attn.in_proj_bias"]
        y = attention(norm(stem + "ln_1", x, 1e-5), weight, bias, True)
        x = x + linear(stem + "attn.out_proj", y)
        hidden = linear(stem + "mlp.c_fc", norm(stem + "ln_2", x, 1e-5))
        x = x + linear(stem + "mlp.c_proj", hidden * torch.sigmoid(1.702 * hidden))
    x = norm("ln_final", x, 1e-5)
    text = x[torch.arange(len(ids)), ids.argmax(1)] @ state["text_projection"]
    whole = encoder(None)
    pooled = whole[:, 1:].mean(1) @ state["image_projection"]
    masked = decoder(encoder(mask.visible)) @ state["image_projection"]
    return pooled, text, masked, whole @ state["image_projection"]


def test_published_weights_give_published_outputs() -> None:
    """All four, in eval mode too, where the published code fails; and nothing is lost in saving."""
    state = {name: value.double() for name, value in published_weights().items()}
    images, mask, ids = inputs()
    pooled, text, masked, whole = published_forward(state, images.double(), mask, ids)
    student = load_rils(state).double()
    student.load_state_dict(load_rils(state).state_dict())
    assert not student.training
    with torch.no_grad():
        output = student(images.double(), mask, ids)
    at = mask.masked[..., None].expand(-1, -1, TEXT.joint) + 1
    expected = pooled, text, masked.gather(1, at), whole.gather(1, at)
    for found, wanted in zip(output, (*expected, state["logit_scale"].exp()), strict=False):
        assert torch.allclose(found, wanted, atol=1e-5)
    with torch.no_grad():
        whole = student.encode_patches(images.double()).mean(dim=1)
        assert torch.allclose(whole, pooled, atol=1e-5)
        assert torch.equal(student.text(ids), output.texts)
    kept = published_state(load_rils(state).state_dict())
    assert kept.keys() == state.keys()
    assert all(torch.equal(kept[name].double(), state[name].float().double()) for name in state)


def test_published_files_load(tmp_path: Path) -> None:
    """As safetensors, and as SLIP's trainer saves them, below `state_dict` and with `module.`."""
    state = published_weights()
    save_file(published_state(load_rils(state).state_dict()), tmp_path / "rils.safetensors")
    saved = {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 3}
    torch.save(saved, tmp_path / "rils.pt")
    one, other = (load_rils(tmp_path / name) for name in ("rils.safetensors", "rils.pt"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda state: state.pop(name)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_without("visual.blocks.1.attn.q_bias"), "it has no 'visual.blocks.1.attn.q_bias'"),
        (_without("token_embedding.weight"), "it has no 'token_embedding.weight'"),
        (lambda s: s.update(more=torch.zeros(1)), "it has more"),
        (lambda s: s.update(text_projection=torch.zeros(128, 8)), "size mismatch|shape"),
    ],
    ids=["a block's bias", "no text tower", "something else", "towers of two widths"],
)
def test_another_layout_is_told(change: Callable[[Any], Any], told: str) -> None:
    """What is missing or does not fit is named, in one line."""
    state = published_weights()
    change(state)
    with pytest.raises(ConfigError, match=told) as error:
        load_rils(state)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("vit", "shape", "counts"),
    [
        (VIT, TextShape(), (85_638_144, 8_270_592, 63_165_952, 655_361, 302_592)),
        (
            "vit_large_patch16_224", TextShape(width=768, heads=12, joint=768),
            (303_075_328, 14_697_472, 123_060_480, 1_376_257, 403_456),
        ),
    ],
)  # fmt: skip
def test_sizes_are_published(vit: str, shape: TextShape, counts: tuple[int, ...]) -> None:
    """Encoder, decoder with mask token, text tower, projections and scale; fixed positions."""
    width, heads = (768, 12) if vit == VIT else (1024, 16)
    with torch.device("meta"):
        plain = build_student(
            vit, img_size=224, target_width=width, decoder_kind="mae",
            decoder=rils_decoder(width, heads),
        )  # fmt: skip
        student = RilsStudent(plain.encoder, plain.decoder, TextEncoder(shape))
    found = dict.fromkeys(("encoder", "decoder", "text", "joint", "fixed"), 0)
    for name, value in published_state(student.state_dict()).items():
        part = "text"
        if name.endswith("pos_embed"):
            part = "fixed"
        elif name.startswith("visual."):
            part = "decoder" if "decoder" in name or "mask_token" in name else "encoder"
        elif name.endswith("_projection") or name == "logit_scale":
            part = "joint"
        found[part] += value.numel()
    assert tuple(found.values()) == counts
    assert sum(counts[:4]) == {VIT: 157_730_049}.get(vit, 442_209_537)


def test_initial_weights_are_published() -> None:
    """Spreads of the text tower and of the projections; biases that torch draws are not copies."""
    student = small()
    w, layers = TEXT.width, TEXT.layers
    first: Any = student.text.blocks.layers[0]
    spreads = {
        student.image_projection: 128**-0.5, student.text.projection: w**-0.5,
        student.text.token_embedding.weight: 0.02, student.text.positional_embedding: 0.01,
        first.self_attn.in_proj_weight: w**-0.5, first.linear1.weight: (2 * w) ** -0.5,
        first.linear2.weight: w**-0.5 * (2 * layers) ** -0.5,
        first.self_attn.out_proj.weight: w**-0.5 * (2 * layers) ** -0.5,
    }  # fmt: skip
    for weight, std in spreads.items():
        assert weight.std().item() == pytest.approx(std, rel=0.1)
    assert student.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    second: Any = student.text.blocks.layers[1]
    assert not torch.equal(first.linear1.bias, second.linear1.bias)


def test_gradients_go_where_the_reference_says() -> None:
    """Contrastive: whole images, texts, scale. Reconstruction: masked images, decoder, and the
    projection that both share; texts only if nothing is detached."""
    images, mask, ids = inputs()
    contrastive, recon = set[str](), dict[str, set[str]]()
    for gather in ("full", "detached"):
        student = small()
        output = student(images, mask, ids)
        # Each image is its text, so that all are accepted.
        output = output._replace(images=output.texts.detach() + 0 * output.images)
        both, clip = (SentenceLoss(weight, gather=gather)(output).loss for weight in (1, 0))
        recon[gather] = _learning(both - clip, student)
        output = student(images, mask, ids)
        contrastive = _learning(SentenceLoss(0)(output).loss, student)
    of_text = {name for name in contrastive if name.startswith("text.")}
    assert of_text
    assert recon["full"] == recon["detached"] | of_text
    assert not recon["detached"] & of_text
    decoder = {name for name in recon["detached"] if name.startswith("decoder.")}
    assert "decoder.mask_token" in decoder
    assert not contrastive & decoder
    assert {"image_projection", "encoder.cls_token"} <= contrastive & recon["detached"]
    assert "logit_scale" in contrastive - recon["full"]


def _learning(loss: torch.Tensor, student: RilsStudent) -> set[str]:
    """The parameters, but for biases of keys, whose gradient is above rounding."""
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], allow_unused=True, retain_graph=True)
    return {
        name
        for (name, _), grad in zip(named, grads, strict=True)
        if grad is not None and grad.abs().max() > 1e-9
    }


def test_target_does_not_teach() -> None:
    """It has no graph, though it comes from the pass that the contrastive loss trains."""
    output = small()(*inputs())
    assert not output.target.requires_grad
    assert output.predicted.requires_grad
    assert torch.equal(output.predicted.isfinite(), torch.ones_like(output.target).bool())


def test_the_scale_is_kept_in_bounds() -> None:
    """Between 1 and 100, and what is inside stays."""
    student = small()
    for value, kept in ((9.0, math.log(100)), (-2.0, 0.0), (1.5, 1.5)):
        student.logit_scale.data.fill_(value)
        student.clamp_scale()
        assert student.logit_scale.item() == pytest.approx(kept)


def test_a_text_is_read_at_its_end() -> None:
    """Captions without end marker, cut as SLIP's tokenizer cuts them, are all the same to the
    tower: its highest id is then the start, which sees only itself. Those that keep it differ."""
    text = TextEncoder(TEXT).eval()
    start = END - 1
    words = torch.randint(1, start, (2, TEXT.context), generator=torch.Generator().manual_seed(3))
    words[:, 0] = start
    with torch.no_grad():
        cut = text(words)
        words[:, -1] = END
        whole = text(words)
        longer = F.pad(words[:, :5], (0, 4))
        longer[:, 4] = END
        assert torch.allclose(text(longer), text(longer[:, :6].int()), atol=1e-6)
    assert torch.allclose(cut[0], cut[1], atol=1e-6)
    assert (whole[0] - whole[1]).abs().max() > 0.05
