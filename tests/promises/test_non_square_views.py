"""Views that are not square, from the teacher's grid to what is done with an encoder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from helpers import SMALL, STUDENT, TEACHER, run_here
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModel

from milan.data.dataset import open_cache
from milan.errors import CacheError, ConfigError, TeacherError
from milan.evaluation.evaluate import evaluate
from milan.images.views import View, ViewSpec, centre_view, ratio_for, view_of
from milan.models.encoder import build_encoder, create_vit, encode, sincos_positions
from milan.models.export import load_encoder, read_about
from milan.models.weights import find_weights, resampled
from milan.objectives.pixels import patchify, unpatchify_prediction
from milan.objectives.resample import resampled_attention, resampled_features
from milan.store.cache import TargetCache
from milan.training.pretrain import pretrain
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec

WIDE: dict[str, Any] = {"img_size": 32, "img_width": 64}
"""Of a teacher with patches of 8 pixels: 4 x 8 of them, in place of 4 x 4."""


@pytest.fixture(scope="module")
def wide_store(finished_store: Callable[..., Path]) -> Path:
    return finished_store(**WIDE, codec="float16")


@pytest.fixture(scope="module")
def wide_run(wide_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("wide") / "run"
    pretrain(str(wide_store), out=str(run), **{**SMALL, "epochs": 2, "held_out": 0.34})
    return run


# --- the teacher ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (16, 64)])
def test_the_teacher_sees_the_whole_view(
    teacher_files: dict[str, str], shape: tuple[int, int]
) -> None:
    """As the same CLIP built for such images, its positions resampled from 4 x 4: also where 2 x 8
    patches are as many."""
    ours = load_teacher(TeacherSpec(*teacher_files.values(), img_size=shape), device="cpu")
    rows, columns = shape[0] // 8, shape[1] // 8
    assert (ours.size, ours.tower.grid, ours.tokens) == (shape, (rows, columns), 1 + rows * columns)
    vision = {**TEACHER["vision_cfg"], "image_size": list(shape)}  # type: ignore[dict-item]
    theirs = open_clip.CLIP(**{**TEACHER, "vision_cfg": vision}).visual  # type: ignore[arg-type]
    state = load_file(teacher_files["pretrained"])
    state = {k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}
    first, patches = state["positional_embedding"].split([1, 16])
    grid = patches.T.reshape(1, -1, 4, 4)
    grid = F.interpolate(grid, (rows, columns), mode="bicubic", antialias=True)
    state["positional_embedding"] = torch.cat([first, grid[0].flatten(1).T])
    theirs.load_state_dict(state)
    images = torch.randn(3, 3, *shape, generator=torch.Generator().manual_seed(0))
    kept: list[torch.Tensor] = []
    theirs.transformer.register_forward_hook(lambda *call: kept.append(call[2]))
    with torch.inference_mode():
        theirs.eval()(images)
        expected = theirs.ln_post(kept[0]) @ theirs.proj
    features, attention = ours.forward(images)
    assert torch.allclose(features, expected, atol=1e-5)
    assert attention.shape == (3, rows * columns)
    assert (attention > 0).all()


def test_a_config_of_wide_images(teacher_files: dict[str, str], tmp_path: Path) -> None:
    """An open_clip config, and a ViT of timm, which say so themselves."""
    vision = {**TEACHER["vision_cfg"], "image_size": [16, 64]}  # type: ignore[dict-item]
    (tmp_path / "wide.json").write_text(json.dumps({**TEACHER, "vision_cfg": vision}))
    wide = load_teacher(TeacherSpec(str(tmp_path / "wide.json"), "none"), device="cpu")
    assert (wide.size, wide.tower.grid) == ((16, 64), (2, 8))
    spec = TeacherSpec("timm:test_vit", "none", img_size=(32, 64))
    assert load_teacher(spec, device="cpu").tower.grid == (2, 4)


def test_sizes_that_do_not_tile(teacher_files: dict[str, str]) -> None:
    """The edge is named by its flag, with two that do."""
    spec = TeacherSpec(*teacher_files.values(), img_size=(32, 60))
    with pytest.raises(TeacherError, match=r"--img-width 60 .*try: --img-width 56 or 64"):
        load_teacher(spec, device="cpu")
    ran = run_here("extract-targets", "--data", "x", "--img-width", 64)
    assert ran.code == 1
    assert "--img-width 64 without --img-size" in ran.err


# --- views ----------------------------------------------------------------------------------------


def test_crops_have_the_shape_of_the_view() -> None:
    """From 3/4 to 4/3 of it; a square has one number, and the law of before."""
    assert ViewSpec(size=(32, 32)) == ViewSpec(size=32)
    assert ViewSpec().law()["size"] == 224
    assert ratio_for(224) == (3 / 4, 4 / 3)
    spec = ViewSpec((32, 64), ratio=ratio_for((32, 64)))
    assert ViewSpec.from_law(json.loads(json.dumps(spec.law()))) == spec
    for row in range(200):
        crop = view_of(spec, row, view=0, height=300, width=400)
        assert 1.45 < crop.width / crop.height < 2.75


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (100, 900), (3, 5)])
def test_the_centre_crop_has_the_shape_of_the_view(height: int, width: int) -> None:
    """The largest one of this shape, times its share; inside the image."""
    for size in ((32, 64), (64, 32), (32, 32)):
        crop = centre_view(height, width, crop_share=1, size=size)
        assert (crop.height == height) or (crop.width == width)
        assert crop.height <= height
        assert crop.width <= width
        expected = max(1, round(crop.height * size[1] / size[0]))
        assert abs(crop.width - expected) <= max(1, size[1] / size[0])
        assert abs(2 * crop.top + crop.height - height) <= 1
        assert abs(2 * crop.left + crop.width - width) <= 1


def test_the_store_has_what_the_teacher_gave(
    wide_store: Path, photos: Path, teacher_files: dict[str, str]
) -> None:
    """Of pixels that Pillow cut and resized by the stored numbers."""
    cache = TargetCache(wide_store)
    assert (cache.view_spec.size, cache.grid, cache.spec.tokens) == ((32, 64), (4, 8), 33)
    teacher = load_teacher(TeacherSpec(*teacher_files.values(), img_size=(32, 64)), device="cpu")
    rows = cache.good_rows()[:5]
    crops = cache.crops(rows, np.ones_like(rows))
    pixels = []
    for row, numbers in zip(rows.tolist(), crops, strict=True):
        crop = View.of(numbers)
        image = Image.open(photos / cache.manifest.key(row)).convert("RGB")
        box = (crop.left, crop.top, crop.left + crop.width, crop.top + crop.height)
        view = np.asarray(image.crop(box).resize((64, 32), Image.Resampling.BICUBIC))
        pixels.append(view[:, ::-1] if crop.flip else view)
    shown = open_cache(wide_store).pixels(rows, np.ones_like(rows))
    assert np.array_equal(shown, np.stack(pixels))
    features, attention = teacher.targets(np.stack(pixels))
    targets = cache.read(rows, np.ones_like(rows))
    assert targets.codes is not None
    decoded = cache.codec.decode(torch.from_numpy(targets.codes), None)
    assert torch.allclose(decoded, features, atol=5e-3)
    assert np.allclose(targets.attention, attention.numpy(), atol=1e-6)


# --- the student ----------------------------------------------------------------------------------


def test_the_student_sees_patches_where_they_are() -> None:
    """The visible patches alone, embedded by hand, as timm embeds them all; MAE's positions of
    rows and columns."""
    vit = build_encoder("vit_base_patch16_224", img_size=(32, 64), args=STUDENT["model_args"])
    assert vit.patch_embed.grid_size == (4, 8)
    for row, column in ((0, 0), (1, 5), (3, 7)):
        angle = [p / 10000 ** (i / 8) for p in (column, row) for i in range(8)]
        parts = np.split(np.array(angle), 2)
        expected = np.concatenate([f(p) for p in parts for f in (np.sin, np.cos)])
        assert np.allclose(vit.pos_embed[0, 1 + 8 * row + column], expected, atol=1e-6)
    images = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    every = torch.arange(32).expand(2, -1)
    with torch.no_grad():
        assert torch.allclose(encode(vit, images, every), encode(vit, images), atol=1e-5)
        assert torch.allclose(encode(vit, images), vit.forward_features(images), atol=1e-5)
    pixels = patchify(images, 8)
    assert torch.equal(pixels[:, 13].view(2, 8, 8, 3).permute(0, 3, 1, 2), images[..., 8:16, 40:48])
    mean, std = pixels.mean(-1, keepdim=True), (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(unpatchify_prediction((pixels - mean) / std, images, patch=8), images)


def test_targets_of_another_grid() -> None:
    """Of 4 x 8 patches on 2 x 4 and on 8 x 16: torch's own interpolation of the map; attention
    keeps its sum, of each half too."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 33, 5, generator=generator)
    attention = torch.rand(2, 32, generator=generator) + 0.1
    for new in ((2, 4), (8, 16)):
        got = resampled_features(features, math.prod(new), (32, 64))
        grid = features[:, 1:].transpose(1, 2).unflatten(2, (4, 8))
        grid = F.interpolate(grid, new, mode="bilinear", antialias=True)
        assert torch.allclose(got[:, 1:], grid.flatten(2).transpose(1, 2), atol=1e-5)
        assert torch.equal(got[:, 0], features[:, 0])
        spread = resampled_attention(attention, math.prod(new), (320, 640))
        assert torch.allclose(spread.sum(1), attention.sum(1), atol=1e-5)
    halves = resampled_attention(attention, 2, (1, 2))
    assert torch.allclose(halves[:, 0], attention.view(2, 4, 8)[..., :4].sum((1, 2)), atol=1e-5)


@pytest.mark.parametrize("patch", [4, 16])
def test_a_student_of_other_patches(wide_store: Path, tmp_path: Path, patch: int) -> None:
    """Its grid is 8 x 16 or 2 x 4: targets and attention are resampled for it."""
    args = {**STUDENT["model_args"], "patch_size": patch}
    settings = {**SMALL, "model_args": args, "epochs": 1, "masking": "semantic"}
    pretrain(str(wide_store), out=str(tmp_path / "run"), **settings)
    vit = load_encoder(tmp_path / "run")
    assert vit.patch_embed.grid_size == (32 // patch, 64 // patch)


@pytest.mark.parametrize("objective", ["pixels", "milan"])
def test_what_a_run_leaves(wide_store: Path, tmp_path: Path, objective: str) -> None:
    """The same line goes on where it stopped; the sheet has wide panels."""
    settings = {**SMALL, "objective": objective, "epochs": 2, "held_out": 0.34, "picture_every": 1}
    pretrain(str(wide_store), out=str(tmp_path / "run"), **settings)
    again = pretrain(str(wide_store), out=str(tmp_path / "run"), **settings)
    assert again["finished"]
    about = read_about(tmp_path / "run")
    assert about["input_size"] == (32, 64)
    page = np.asarray(Image.open(tmp_path / "run" / "sheet.png"))
    assert page.shape[1] > page.shape[0] / 2


def test_weights_of_squares(wide_run: Path, finished_run: Callable[..., Path]) -> None:
    """--init: sine-cosine positions become those of the grid, learnt ones are resampled; those of a
    wide grid are too, for a square."""
    wide = build_encoder("vit_base_patch16_224", img_size=(32, 64), args=STUDENT["model_args"])
    weights = find_weights(str(finished_run()), flag="--init", model="x")
    new = resampled(weights.encoder, wide, weights.size)["pos_embed"]
    assert torch.allclose(new[:, 1:], sincos_positions(32, (4, 8))[:, 1:], atol=1e-5)
    learnt = torch.randn(1, 17, 32, generator=torch.Generator().manual_seed(0))
    narrow = build_encoder("vit_base_patch16_224", img_size=(16, 64), args=STUDENT["model_args"])
    new = resampled({"pos_embed": learnt}, narrow, 32)["pos_embed"]  # as many, in other places
    grid = learnt[:, 1:].transpose(1, 2).reshape(1, 32, 4, 4)
    grid = F.interpolate(grid, (2, 8), mode="bicubic", antialias=True)
    assert torch.allclose(new[0, 1:], grid[0].flatten(1).T, atol=1e-6)
    back = find_weights(str(wide_run), flag="--init", model="x")
    square = create_vit(back.model, img_size=32, args=back.args)
    new = resampled(back.encoder, square, back.size)["pos_embed"]
    assert torch.allclose(new[:, 1:], sincos_positions(32, (4, 4))[:, 1:], atol=1e-5)


# --- stores that are read together ----------------------------------------------------------------


def test_another_shape_is_refused(
    wide_store: Path, finished_store: Callable[..., Path], tmp_path: Path
) -> None:
    """Of two teachers: one saw wide views, the other squares."""
    narrow = TargetCache(finished_store(codec="float16"))
    wide = TargetCache(wide_store)
    layers = [wide.layer, f"{narrow.path}::{narrow.layer}"]
    with pytest.raises(CacheError, match=r"other views|ratio|32 px where"):
        pretrain(str(wide_store), out=str(tmp_path / "run"), **SMALL, layer=layers)


# --- what comes after -----------------------------------------------------------------------------


def test_it_is_measured(wide_run: Path, photos: Path, tmp_path: Path) -> None:
    """By frozen features, of centre crops of its shape, and by training it further."""
    measured = evaluate("knn", checkpoint=str(wide_run), data=str(photos))
    assert measured["val_images"] == 4
    assert evaluate("knn", checkpoint="random", like=str(wide_run), data=str(photos))
    tuned = evaluate(
        "finetune", checkpoint=str(wide_run), data=str(photos), epochs=1, batch_size=8,
        num_workers=0, baseline="none", out=str(tmp_path / "ft.json"),
    )  # fmt: skip
    assert tuned["val_images"] == 4
    assert read_about(tmp_path / "ft" / "classifier.safetensors")["input_size"] == (32, 64)
    larger = evaluate(
        "finetune", checkpoint=str(wide_run), data=str(photos), epochs=1, batch_size=8, size=40,
        width=80, num_workers=0, baseline="none", out=str(tmp_path / "larger.json"),
    )  # fmt: skip
    assert larger["val_images"] == 4
    assert read_about(tmp_path / "larger" / "classifier.safetensors")["input_size"] == (40, 80)
    with pytest.raises(ConfigError, match="width 80 without size"):
        evaluate("finetune", checkpoint=str(wide_run), data=str(photos), width=80)
    ran = run_here("predict", tmp_path / "ft", photos, "--out", tmp_path / "named.csv")
    assert ran.code == 0, ran.err


def test_it_opens_elsewhere(wide_run: Path, tmp_path: Path) -> None:
    """In timm and transformers with the same features; detectron2 has no place for it."""
    images = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = encode(load_encoder(wide_run), images)
        for name in ("timm", "transformers"):
            folder = tmp_path / name
            assert run_here("export", wide_run, "--format", name, "--out", folder).code == 0
            if name == "timm":
                vit = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
                got = vit.forward_features(images)
            else:
                got = AutoModel.from_pretrained(folder).eval()(images).last_hidden_state
            assert torch.allclose(got, expected, atol=1e-5), name
            assert find_weights(str(folder), flag="--init", model="x").size == (32, 64)
    ran = run_here("export", wide_run, "--format", "detectron2", "--out", tmp_path / "d2")
    assert ran.code == 1
    assert "32 x 64 px (height x width)" in ran.err


def test_the_flags_of_a_view(photos: Path, teacher_files: dict[str, str], tmp_path: Path) -> None:
    """Height, width and ratio as one types them; crops of a square stay those of a square."""
    line = ["extract-targets", "--data", photos, "--views", 1, "--limit", 4, "--executor", "local"]
    line += [w for name, value in teacher_files.items() for w in (f"--{name}", value)]
    for size, ratio, expected in (
        ((32, 64), (), ((32, 64), (1.5, 8 / 3))),
        ((32, 64), (1, 3), ((32, 64), (1.0, 3.0))),
        ((32, 32), (), (32, (0.75, 4 / 3))),
    ):
        out = tmp_path / f"{size}{ratio}.zarr"
        flags = ["--img-size", size[0], "--img-width", size[1]]
        flags += ["--ratio", *ratio] if ratio else []
        ran = run_here(*line, *flags, "--out", out)
        assert ran.code == 0, ran.err
        law = TargetCache(out).view_spec
        assert (law.size, law.ratio) == expected
