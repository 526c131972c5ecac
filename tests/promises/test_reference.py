"""Parity with the published implementation, by its golden vectors.

The folder is $MILAN_GOLDEN, else tests/golden. Any folder of the same three files must pass,
whatever its dimensions.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, in_raster
from safetensors.torch import save_file

from milan.models.encoder import encode
from milan.models.masking import Mask, importance_mask
from milan.models.published import load_published, our_name
from milan.objectives.features import feature_regression
from milan.training.optim import learning_rate
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec

GOLDEN = Path(os.environ.get("MILAN_GOLDEN") or ROOT / "tests/golden")


def vectors(name: str) -> tuple[dict[str, np.ndarray], dict]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("config")))


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, torch.Tensor]:
    return {
        k.removeprefix(prefix): torch.from_numpy(v)
        for k, v in arrays.items()
        if k.startswith(prefix)
    }


@pytest.fixture(scope="module")
def teacher_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    arrays, config = vectors("clip_teacher")
    folder = tmp_path_factory.mktemp("golden")
    (folder / "config.json").write_text(json.dumps(config))
    save_file(part(arrays, "state/"), folder / "weights.safetensors")
    return folder, arrays


def forward(folder: Path, arrays: dict) -> tuple[torch.Tensor, torch.Tensor]:
    spec = TeacherSpec(str(folder / "config.json"), str(folder / "weights.safetensors"))
    teacher = load_teacher(spec, device="cpu")
    return teacher.forward(torch.from_numpy(arrays["images"]))


def test_teacher_tokens_and_attention(teacher_files: tuple[Path, dict]) -> None:
    folder, arrays = teacher_files
    tokens, attention = forward(folder, arrays)
    assert (tokens - torch.from_numpy(arrays["tokens"])).abs().max() <= 2e-5
    assert (attention - torch.from_numpy(arrays["attention"])).abs().max() <= 5e-6
    assert (attention > 0).all()


def test_teacher_with_the_other_activation_fails(teacher_files: tuple[Path, dict]) -> None:
    """The comparison can fail: GELU in QuickGELU's place (or the reverse) is seen."""
    folder, arrays = teacher_files
    config = json.loads((folder / "config.json").read_text())
    other = folder / "other"
    other.mkdir()
    config["quick_gelu"] = not config.get("quick_gelu", False)
    (other / "config.json").write_text(json.dumps(config))
    (other / "weights.safetensors").symlink_to(folder / "weights.safetensors")
    tokens, _ = forward(other, arrays)
    assert (tokens - torch.from_numpy(arrays["tokens"])).abs().max() > 1e-3


def golden_mask(arrays: dict[str, np.ndarray]) -> Mask:
    keep, drop = torch.from_numpy(arrays["ids_keep"]), torch.from_numpy(arrays["ids_mask"])
    mask = Mask(keep.sort(1).values, drop.sort(1).values)
    assert torch.equal(mask.boolean().float(), torch.from_numpy(arrays["mask"]).float())
    return mask


def test_student() -> None:
    arrays, config = vectors("milan_student")
    student = load_published(part(arrays, "state/"), config=config)
    mask = golden_mask(arrays)
    images, target = torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["target"])

    latent = encode(student.encoder, images, mask.visible)
    # The published order of visible tokens is the draw order; ours is raster order.
    order = torch.from_numpy(arrays["ids_keep"]).argsort(dim=1)
    expected = torch.from_numpy(arrays["latent"])
    patches = expected[:, 1:].gather(1, order[..., None].expand(-1, -1, expected.shape[2]))
    expected = torch.cat([expected[:, :1], patches], dim=1)
    assert (latent - expected).abs().max() <= 1e-5

    prediction = in_raster(student(images, mask), mask)
    assert (prediction - torch.from_numpy(arrays["pred"])).abs().max() <= 2e-5

    loss = feature_regression(prediction, target)
    assert abs(loss.item() - float(arrays["loss"])) <= 1e-6

    loss.backward()
    ours = dict(student.named_parameters())
    golden = part(arrays, "grad/")
    assert golden
    for name, expected_grad in golden.items():
        grad = ours[our_name(name)].grad
        assert grad is not None, name
        scale = expected_grad.abs().max().clamp_min(1e-12)
        assert (grad - expected_grad).abs().max() / scale <= 5e-5, name
    frozen = {our_name(k) for k in part(arrays, "state/")} - {our_name(k) for k in golden}
    assert all(not ours[name].requires_grad for name in frozen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_student_under_autocast(dtype: torch.dtype) -> None:
    """Products in half precision, the sums that blocks add to in float32, as published."""
    arrays, config = vectors("milan_student")
    student = load_published(part(arrays, "state/"), config=config)
    between: set[torch.dtype] = set()
    for block in [*student.encoder.blocks, *student.decoder.blocks]:
        block.register_forward_hook(lambda m, inputs, out: between.add(out.dtype))
    with torch.autocast("cpu", dtype):
        mask = golden_mask(arrays)
        prediction = in_raster(student(torch.from_numpy(arrays["images"]), mask), mask)
    assert between == {torch.float32}
    assert prediction.dtype == dtype
    error = (prediction.float() - torch.from_numpy(arrays["pred"])).abs().max()
    assert error <= (1e-2 if dtype == torch.float16 else 6e-2)
    loss = feature_regression(prediction, torch.from_numpy(arrays["target"]))
    assert loss.item() == pytest.approx(float(arrays["loss"]), abs=1e-3)


def test_a_norm_on_the_prompts_fails() -> None:
    """The comparison can fail: layer-normed prompts, the likeliest mistake, are seen."""
    arrays, config = vectors("milan_student")
    student = load_published(part(arrays, "state/"), config=config)
    for block in student.decoder.blocks:
        inner = block.attn.forward
        block.attn.forward = lambda prompts, x, b=block, f=inner: f(b.norm1(prompts), x)
    mask = golden_mask(arrays)
    prediction = in_raster(student(torch.from_numpy(arrays["images"]), mask), mask)
    assert (prediction - torch.from_numpy(arrays["pred"])).abs().max() > 1e-2


def test_sampling_is_multinomials_law() -> None:
    """Fed multinomial's own exponentials, our race gives multinomial's own draw (CPU)."""
    arrays, _ = vectors("milan_student")
    attention = torch.from_numpy(arrays["attention"])
    torch.manual_seed(int(arrays["mask_seed"]))
    drawn = torch.multinomial(attention, attention.shape[1], replacement=False)
    torch.manual_seed(int(arrays["mask_seed"]))
    exponential = torch.empty_like(attention).exponential_(1)
    visible = arrays["ids_keep"].shape[1]
    mask = importance_mask(attention.double(), (-exponential.double()).exp(), visible=visible)
    assert torch.equal(mask.visible, drawn[:, :visible].sort(1).values)


def test_schedule() -> None:
    schedule = json.loads((GOLDEN / "schedule.json").read_text())["pretrain_lr"]
    for epoch, lr in schedule.items():
        ours = learning_rate(float(epoch), peak=2.4e-3, warmup=40, epochs=400, end=0.0)
        assert abs(ours - lr) <= 1e-9, epoch


def test_published_shapes_are_read_off_the_weights() -> None:
    """Heads are in no weight; everything else need not be said."""
    arrays, config = vectors("milan_student")
    heads = {key: config[key] for key in ("num_heads", "decoder_num_heads")}
    student = load_published(part(arrays, "state/"), config=heads)
    assert student.encoder.patch_embed.patch_size[0] == config["patch_size"]
    assert len(student.decoder.blocks) == config["decoder_depth"]
