"""The student: MAE's positions and weights, MILAN's prompts, timm's encoder, published sizes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import in_raster
from timm.optim import param_groups_weight_decay
from torch import nn

from milan.core.device import MEAN, STD
from milan.errors import ConfigError
from milan.models.decoder import Decoder, decoder_arguments
from milan.models.encoder import _embedded, build_encoder, encode, sincos_positions
from milan.models.export import load_encoder, save_encoder
from milan.models.masking import Mask, random_mask
from milan.models.student import Student, build_student
from milan.training.checkpoint import whole_weights

VIT = "vit_base_patch16_224"
SMALL = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
DECODER = {"embed_dim": 16, "depth": 2, "num_heads": 2}


def small(kind: str = "prompt", *, seed: int = 0, target: int = 24, **model: Any) -> Student:
    """Views of 32 pixels, a grid of 4 x 4 patches."""
    return build_student(
        VIT, img_size=32, target_width=target, decoder_kind=kind,
        model_args=SMALL | model, decoder=DECODER, seed=seed,
    )  # fmt: skip


def images(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def masks(count: int = 3, visible: int = 4, seed: int = 0) -> Mask:
    noise = torch.rand(count, 16, generator=torch.Generator().manual_seed(seed))
    return random_mask(noise.clamp(1e-6, 1 - 1e-6), visible=visible)


# --- positions ------------------------------------------------------------------------------------


def mae_positions(embed_dim: int, grid_size: int) -> np.ndarray:
    """facebookresearch/mae, util/pos_embed.py: get_2d_sincos_pos_embed, cls_token=True."""
    grid_h = np.arange(grid_size, dtype=np.float32)
    grid_w = np.arange(grid_size, dtype=np.float32)
    grid = np.stack(np.meshgrid(grid_w, grid_h), axis=0)  # w goes first
    grid = grid.reshape([2, 1, grid_size, grid_size])

    def one(dim: int, pos: np.ndarray) -> np.ndarray:
        omega = np.arange(dim // 2, dtype=np.float64)
        omega /= dim / 2.0
        omega = 1.0 / 10000**omega
        out = np.einsum("m,d->md", pos.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    emb = [one(embed_dim // 2, grid[0]), one(embed_dim // 2, grid[1])]
    return np.concatenate([np.zeros([1, embed_dim]), np.concatenate(emb, axis=1)], axis=0)


@pytest.mark.parametrize(("width", "grid"), [(768, 14), (512, 14), (16, 4), (4, 1), (32, 3)])
def test_positions_are_maes(width: int, grid: int) -> None:
    """Rows and columns swapped still train, but no published checkpoint fits."""
    ours = sincos_positions(width, grid)
    assert ours.shape == (1, 1 + grid * grid, width)
    assert ours.dtype == torch.float32
    assert np.abs(ours[0].numpy() - mae_positions(width, grid)).max() < 1e-6


def test_positions_put_the_column_first() -> None:
    """Literal: patch 1 is right of patch 0; its first channels move, the second half does not."""
    table = sincos_positions(8, 3)[0]
    assert (table[0] == 0).all()
    assert table[1].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    column = [math.sin(1), math.sin(0.01), math.cos(1), math.cos(0.01)]
    assert table[2].tolist() == pytest.approx([*column, 0, 0, 1, 1])
    assert table[4].tolist() == pytest.approx([0, 0, 1, 1, *column])


@pytest.mark.parametrize("width", [0, 2, 6, 30])
def test_positions_need_four_channels(width: int) -> None:
    """Sine and cosine of row and column."""
    with pytest.raises(ConfigError, match="multiple of 4"):
        sincos_positions(width, 2)


# --- the encoder ----------------------------------------------------------------------------------


def test_exported_encoder_is_timms_own(tmp_path: Path) -> None:
    """The three lines of the README: timm loads it strictly and computes the same tokens."""
    student = small(mlp_ratio=2.0, qkv_bias=False)
    args = SMALL | {"mlp_ratio": 2.0, "qkv_bias": False}
    about = {"model": VIT, "model_args": args, "mean": MEAN, "std": STD, "input_size": 32}
    save_encoder(tmp_path / "encoder.safetensors", whole_weights(student.encoder), about)

    from safetensors.torch import load_file

    vit = timm.create_model(VIT, num_classes=0, img_size=32, **args)
    vit.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    with torch.no_grad():
        expected = vit.eval().forward_features(images())
        assert (encode(student.encoder, images()) - expected).abs().max() <= 1e-5
        loaded = load_encoder(tmp_path)
        assert torch.equal(loaded.forward_features(images()), expected)
    assert not loaded.training
    config = timm.data.resolve_model_data_config(loaded)
    assert config["mean"] == MEAN
    assert config["std"] == STD
    assert config["input_size"] == (3, 32, 32)
    assert config["interpolation"] == "bicubic"


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_small_patch16_224", {}),
        ("vit_base_patch16_clip_224", {}),  # a norm before the blocks
        ("deit3_small_patch16_224", {"no_embed_class": False}),  # layer scale
        ("vit_large_patch14_224", {"patch_size": 8}),
        (VIT, {"patch_size": 8, "no_embed_class": True}),
        (VIT, {"patch_size": 8, "reg_tokens": 3}),  # positions for class token and registers too
        ("vit_base_patch14_reg4_dinov2", {"patch_size": 8}),
        ("vit_base_patch16_reg4_gap_256", {"patch_size": 8}),  # registers, no class token
        ("vit_base_patch16_siglip_224", {"patch_size": 8, "global_pool": "avg"}),
    ],
)
def test_other_vits_of_timm(name: str, args: dict[str, Any]) -> None:
    """Any plain ViT: what we compute of all patches is what timm computes, and it can be a student.

    Positions are zero but for patches; every parameter that is trained gets a gradient.
    """
    args = {"depth": 2, "embed_dim": 32, "num_heads": 2} | args
    student = build_student(name, img_size=32, target_width=24, model_args=args, decoder=DECODER)
    vit, patches = student.encoder, student.patches
    table = sincos_positions(32, vit.patch_embed.grid_size[0])
    assert torch.equal(vit.pos_embed[:, -patches:], table[:, 1:])
    assert (vit.pos_embed[:, :-patches] == 0).all()
    with torch.no_grad():
        expected = vit.fc_norm(vit.eval().forward_features(images()))
        assert (encode(vit, images()) - expected).abs().max() <= 1e-5
    noise = torch.rand(3, patches, generator=torch.Generator().manual_seed(0)).clamp(0.01, 0.99)
    prediction = student(images(), random_mask(noise, visible=max(1, patches // 4)))
    assert prediction.shape == (3, patches + vit.has_class_token, 24)
    prediction.square().sum().backward()
    assert all(p.grad is not None for p in student.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("name", "width", "heads", "depth", "patches", "parameters"),
    [
        ("vit_small_patch16_224", 384, 6, 12, 196, 21_665_664),
        ("vit_base_patch16_224", 768, 12, 12, 196, 85_798_656),
        ("vit_large_patch16_224", 1024, 16, 24, 196, 303_301_632),
        ("vit_huge_patch14_224", 1280, 16, 32, 256, 630_764_800),
    ],
)
def test_published_models_by_name(
    name: str, width: int, heads: int, depth: int, patches: int, parameters: int
) -> None:
    """S, B, L and H: the sizes behind the names, without their memory; one block really runs."""
    with torch.device("meta"):
        student = build_student(name, img_size=224, target_width=512)
    vit = student.encoder
    assert (vit.embed_dim, len(vit.blocks), student.patches) == (width, depth, patches)
    assert vit.blocks[0].attn.num_heads == heads
    assert sum(p.numel() for p in vit.parameters()) == parameters
    small = build_student(
        name, img_size=224, target_width=8, model_args={"depth": 1}, decoder=DECODER
    )
    noise = torch.rand(1, patches, generator=torch.Generator().manual_seed(0)).clamp(0.01, 0.99)
    with torch.no_grad():
        mask = random_mask(noise, visible=patches // 4)
        assert small(torch.zeros(1, 3, 224, 224), mask).shape == (1, 1 + patches, 8)


def test_registers_are_no_part_of_the_picture() -> None:
    """They change what patches become, are never masked, and nothing is predicted from them."""
    student, mask = small(reg_tokens=2), masks()
    latent = encode(student.encoder, images(), mask.visible)
    assert latent.shape == (3, 1 + 2 + 4, 32)
    prediction = student(images(), mask)
    assert prediction.shape == (3, 17, 24)
    prompts = torch.cat([latent[:, :1], latent[:, 3:]], dim=1)
    assert torch.equal(student.decoder(prompts, mask), prediction)
    student.encoder.reg_token.data.add_(torch.randn(1, 2, 32))
    assert not torch.allclose(student(images(), mask), prediction)


def test_embedding_of_the_visible_is_the_convolution() -> None:
    """A product of gathered patches, and timm's convolution: 1e-6, gradients too."""
    vit, mask = small().encoder, masks()
    index = mask.visible[..., None].expand(-1, -1, 32)
    found = []
    for embedded in (
        _embedded(vit.patch_embed, images(), mask.visible),
        vit.patch_embed(images()).gather(1, index),
    ):
        vit.zero_grad()
        embedded.square().mean().backward()
        found.append((embedded, vit.patch_embed.proj.weight.grad, vit.patch_embed.proj.bias.grad))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 1e-6 * b.abs().max().clamp_min(1)


def test_visible_patches_are_seen_alone() -> None:
    """The encoder's output depends on the visible patches and their places, on no other pixel."""
    vit, mask = small().encoder, masks()
    with torch.no_grad():
        latent = encode(vit, images(), mask.visible)
        assert latent.shape == (3, 1 + 4, 32)
        hidden = mask.boolean().view(3, 1, 4, 4)
        stretched = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)
        noise = torch.where(stretched, images(seed=1), images())
        assert torch.equal(encode(vit, noise, mask.visible), latent)
        shifted = (mask.visible + 1) % 16
        assert not torch.allclose(encode(vit, images(), shifted), latent)
        everything = torch.arange(16).expand(3, -1)
        assert torch.allclose(encode(vit, images(), everything), encode(vit, images()), atol=1e-6)


# --- the decoder ----------------------------------------------------------------------------------


def test_prompts_pass_through() -> None:
    """Class and visible tokens meet no block: they are pred(norm(embed(latent) + position))."""
    student, mask = small(), masks()
    decoder = student.decoder
    with torch.no_grad():
        latent = encode(student.encoder, images(), mask.visible)
        prediction = student(images(), mask)
        assert prediction.shape == (3, 17, 24)
        at = torch.cat([torch.zeros(3, 1, dtype=torch.int64), mask.visible + 1], dim=1)
        position = decoder.pos_embed[0][at]
        expected = decoder.pred(decoder.norm(decoder.embed(latent) + position))
        got = prediction[:, : at.shape[1]]
        assert (got - expected).abs().max() < 1e-6
        for block in decoder.blocks:  # nothing in a block changes them by a bit
            for parameter in block.parameters():
                parameter.add_(0.5)
        assert torch.equal(student(images(), mask)[:, : at.shape[1]], got)


def test_masked_tokens_ask_the_prompts() -> None:
    """A masked token's prediction follows the visible pixels, its place and the other masked."""
    student, mask = small(), masks(1)
    with torch.no_grad():
        prediction = student(images(1), mask)
        other = student(images(1, seed=1), mask)
        masked = mask.masked[0] + 1
        assert ((prediction - other)[0, masked].abs().amax(dim=1) > 1e-6).all()
        assert len({tuple(p.tolist()) for p in prediction[0, masked]}) == 12


def test_a_block_is_the_published_one() -> None:
    """Restated: norm on the masked only, raw prompts beside them, q of one, k and v of both."""
    student = small()
    block: Any = student.decoder.blocks[0]
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(2, 5, 16, generator=generator)
    x = torch.randn(2, 12, 16, generator=generator)
    with torch.no_grad():
        h = block.norm1(x)
        both = torch.cat([prompts, h], dim=1)
        weight, bias = block.attn.kv.weight, block.attn.kv.bias
        q = block.attn.q(h)
        k, v = both @ weight[:16].T + bias[:16], both @ weight[16:].T + bias[16:]
        heads = []
        for head in (slice(0, 8), slice(8, 16)):
            share = (q[..., head] @ k[..., head].transpose(1, 2) * 8**-0.5).softmax(dim=-1)
            heads.append(share @ v[..., head])
        y = x + block.attn.proj(torch.cat(heads, dim=2))
        y = y + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(y))))
        assert torch.allclose(block(prompts, x), y, atol=1e-6)
    assert block.norm1.eps == block.norm2.eps == student.decoder.norm.eps == 1e-6
    assert student.encoder.norm.eps == 1e-6


@pytest.mark.parametrize("kind", ["prompt", "mae"])
def test_order_of_the_visible_does_not_matter(kind: str) -> None:
    """The published code keeps them in the order of the draw, we in raster order."""
    student, mask = small(kind), masks()
    shuffled = Mask(mask.visible[:, [2, 0, 3, 1]], mask.masked.flip(1))
    with torch.no_grad():
        expected, got = (in_raster(student(images(), m), m) for m in (mask, shuffled))
    assert (expected - got).abs().max() < 1e-5


def test_gradient_goes_through_masked_rows() -> None:
    """Masked tokens' losses reach the encoder through keys and values."""
    for kind in ("prompt", "mae"):
        student, mask = small(kind), masks()
        _, masked = mask.split(student(images(), mask))
        masked.square().sum().backward()
        without = {n for n, p in student.named_parameters() if p.requires_grad and p.grad is None}
        assert not without
        assert all(
            p.grad.abs().max() > 0
            for n, p in student.named_parameters()
            if p.grad is not None and n.startswith("encoder") and n.endswith("weight")
        )


def test_mae_decoder_updates_every_token() -> None:
    """The baseline: plain self-attention over all tokens, restated with timm's blocks."""
    student, mask = small("mae"), masks()
    decoder = student.decoder
    with torch.no_grad():
        latent = decoder.embed(encode(student.encoder, images(), mask.visible))
        full = decoder.mask_token.repeat(3, 17, 1)
        full[:, 0] = latent[:, 0]
        for row in range(3):
            full[row, mask.visible[row] + 1] = latent[row, 1:]
        x = full + decoder.pos_embed
        for block in decoder.blocks:
            x = block(x)
        expected = decoder.pred(decoder.norm(x))
        assert (in_raster(student(images(), mask), mask) - expected).abs().max() < 1e-5


# --- sizes and initial weights --------------------------------------------------------------------


@pytest.fixture(scope="module")
def published() -> Student:
    """The published ViT-B/16 student: its shapes only, no memory."""
    with torch.device("meta"):
        return build_student(VIT, img_size=224, target_width=512)


def test_published_sizes(published: Student) -> None:
    """Counted on the released code (reference: arXiv 2208.06049's models_milan.py)."""
    assert sum(p.numel() for p in published.parameters()) == 111_776_512
    assert sum(p.numel() for p in published.encoder.parameters()) == 85_798_656
    trained = [p for p in published.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 111_524_352
    frozen = {n for n, p in published.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.pos_embed", "decoder.pos_embed"}


def test_published_decay_groups(published: Student) -> None:
    """93 tensors decay, the class and mask token among them, 175 do not."""
    free, decay = param_groups_weight_decay(published, 0.05)
    assert (len(decay["params"]), len(free["params"])) == (93, 175)
    assert (decay["weight_decay"], free["weight_decay"]) == (0.05, 0.0)
    ids = {id(p) for p in decay["params"]}
    assert id(published.encoder.cls_token) in ids
    assert id(published.decoder.mask_token) in ids
    assert all(p.ndim > 1 for p in decay["params"])


def test_initial_weights_are_maes() -> None:
    """Xavier over fused shapes, zero biases, tokens N(0, 0.02), norms one and zero."""
    student = build_student(
        VIT, img_size=32, target_width=64,
        model_args={"patch_size": 8, "embed_dim": 256, "depth": 1, "num_heads": 4},
        decoder={"embed_dim": 256, "depth": 1, "num_heads": 4},
    )  # fmt: skip
    for name, module in student.named_modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / (module.in_features + module.out_features))
            largest = module.weight.abs().max().item()
            assert 0.98 * bound < largest <= bound, name
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05), name
            assert (module.bias == 0).all(), name
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    projection = student.encoder.patch_embed.proj
    bound = math.sqrt(6 / (256 + 3 * 8 * 8))
    assert 0.98 * bound < projection.weight.abs().max() <= bound
    edge = 1 / math.sqrt(3 * 8 * 8)
    assert 0.9 * edge < projection.bias.abs().max() <= edge
    for token in (student.encoder.cls_token, student.decoder.mask_token):
        assert token.shape == (1, 1, 256)
        assert token.std().item() == pytest.approx(0.02, rel=0.2)
        assert abs(token.mean().item()) < 0.005
    assert torch.equal(student.encoder.pos_embed, sincos_positions(256, 4))
    assert torch.equal(student.decoder.pos_embed, sincos_positions(256, 4))


def test_seeds() -> None:
    """The same seed, the same student, whatever was drawn before; the global state is left be."""
    first = small(seed=3).state_dict()
    torch.manual_seed(5)
    torch.rand(10)
    before = torch.get_rng_state()
    again, other = small(seed=3).state_dict(), small(seed=4).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = [n for n, t in first.items() if not torch.equal(t, other[n])]
    assert "encoder.cls_token" in drawn
    assert "decoder.mask_token" in drawn
    assert sum(name.endswith("weight") for name in drawn) > 15


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "args", "size", "message"),
    [
        ("vit_base_patch16_225", {}, 224, "try: --model vit_base_patch16_224"),
        ("ViT_Base_Patch16_224", {}, 224, "vit_base_patch16_224"),
        ("resnet18", {}, 32, "plain ViT"),
        ("vit_base_patch16_rope_224", {"depth": 1}, 224, "is no plain ViT"),
        ("vit_base_patch16_siglip_224", {"depth": 1}, 224, "try: --set model.global_pool=avg"),
        ("deit_base_distilled_patch16_224", {"depth": 1}, 224, "distillation token"),
        ("vit_base_r50_s16_224", {"depth": 1}, 224, "is no plain ViT"),
        ("vit_tiny_patch16_224", {"depth": 0}, 224, "has no block"),
        (VIT, SMALL | {"embed_dimm": 3}, 32, "try: embed_dim"),
        (VIT, SMALL | {"num_heads": 3}, 32, "cannot be built"),
        (VIT, SMALL | {"embed_dim": 30}, 32, "multiple of 4"),
        (VIT, SMALL | {"embed_dim": "x"}, 32, "cannot be built"),
        (VIT, SMALL | {"patch_size": 7}, 32, "do not tile 32"),
        (VIT, SMALL | {"patch_size": 0}, 32, "cannot be built"),
        (VIT, SMALL | {"patch_size": 64}, 32, "do not tile 32"),
        (VIT, {"depth": 1}, 100, "do not tile 100"),
        (VIT, SMALL | {"norm_layer": "no such"}, 32, "cannot be built"),
        (VIT, SMALL | {"pos_embed": "none"}, 32, "no absolute positions"),
        (VIT, SMALL | {"dynamic_img_size": True}, 32, "any size"),
        (VIT, SMALL | {"num_classes": 5}, 32, "classifier"),
        (VIT, SMALL | {"patch_drop_rate": 0.5}, 32, "drops tokens"),
        (VIT, SMALL | {"pos_drop_rate": 0.5}, 32, "drops tokens"),
    ],
)
def test_models_that_do_not_fit(name: str, args: dict, size: int, message: str) -> None:
    """One clear line instead of timm's traceback, or of an argument that does nothing."""
    with pytest.raises(ConfigError, match=message):
        build_encoder(name, img_size=size, args=args)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ({"dept": 1}, "try: depth"),
        ({"num_heads": 3}, "heads divide"),
        ({"embed_dim": 18}, "multiple of 4"),
        ({"depth": 0}, "above 0"),
        ({"depth": "two"}, "above 0"),
    ],
)
def test_decoders_that_do_not_fit(decoder: dict, message: str) -> None:
    """Unknown arguments and widths that do not work."""
    with pytest.raises(ConfigError, match=message):
        build_student(VIT, img_size=32, target_width=8, model_args=SMALL, decoder=DECODER | decoder)


@pytest.mark.parametrize(
    ("encoder", "given", "width", "heads"),
    [
        (192, {}, 128, 4), (384, {}, 256, 8), (576, {}, 384, 12),  # ViT-Ti, S, M
        (768, {}, 512, 16), (1024, {}, 512, 16), (1280, {}, 512, 16),  # B, L, H as published
        (32, {}, 32, 1), (4, {}, 32, 1), (400, {}, 256, 8),
        (192, {"embed_dim": 512}, 512, 16), (768, {"embed_dim": 100}, 100, 2),
        (768, {"embed_dim": 16}, 16, 1), (192, {"num_heads": 2}, 128, 2),
    ],
)  # fmt: skip
def test_a_decoder_fits_its_encoder(encoder: int, given: dict, width: int, heads: int) -> None:
    """Two thirds as wide, at most as published; what is given stays, and heads divide."""
    arguments = decoder_arguments(encoder, given)
    assert arguments == {"embed_dim": width, "depth": 8, "num_heads": heads, "mlp_ratio": 4.0}


def test_the_weights_of_a_small_students_decoder() -> None:
    """1.7 M beside the 5.5 M of ViT-Ti, where the published decoder has 25.6 M."""
    with torch.device("meta"):
        students = [
            build_student("vit_tiny_patch16_224", img_size=224, target_width=512, decoder=given)
            for given in ({}, {"embed_dim": 512})
        ]
    sizes = [sum(p.numel() for p in s.decoder.parameters()) / 1e6 for s in students]
    assert sizes == pytest.approx([1.7, 25.6], abs=0.1)


def test_decoders_of_no_kind() -> None:
    """The two that there are, are named."""
    with pytest.raises(ConfigError, match="prompt or mae"):
        small("prompts")
    assert isinstance(small("mae").decoder, Decoder)
