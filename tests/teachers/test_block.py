"""Targets of an inner block of a teacher: `--teacher-layer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import EXTRACTION

from milan.errors import ConfigError, MilanError
from milan.store.cache import TargetCache
from pipeline.extract import extract_targets
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec
from pipeline.verify import Audit, verify
from pipeline.zero_shot import zero_shot

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("kind", ["clip", "timm", "averages"])
def test_the_last_block_through_norm_and_projection_is_the_output(
    kind: str, teacher_files: dict[str, str]
) -> None:
    """The same tokens earlier; the attention is the whole tower's, whatever the block."""
    name, file, size = teacher_files["teacher"], teacher_files["pretrained"], None
    if kind != "clip":
        name = "timm:test_vit" if kind == "timm" else "timm:test_vit2"
        file, size = "none", 32
    plain = TeacherSpec(name, file, img_size=size)
    teacher = load_teacher(plain, device="cpu")
    features, attention = teacher.targets(PIXELS)
    count = len(teacher.tower.blocks)
    last = load_teacher(TeacherSpec(name, file, img_size=size, block=count), device="cpu")
    first = load_teacher(TeacherSpec(name, file, img_size=size, block=1), device="cpu")
    inner, same = last.targets(PIXELS)
    visual = teacher.visual
    with torch.no_grad():
        norm = visual.ln_post(inner) @ visual.proj if kind == "clip" else visual.norm(inner)
        norm = visual.fc_norm(norm) if kind == "averages" else norm
    assert torch.equal(attention, same)
    assert torch.allclose(norm[:, 1:], features[:, 1:], atol=1e-5)
    if kind == "averages":
        assert torch.allclose(inner[:, 0], inner[:, 1:].mean(dim=1), atol=1e-5)
    else:
        assert torch.allclose(norm[:, 0], features[:, 0], atol=1e-5)
    early, same = first.targets(PIXELS)
    assert torch.equal(attention, same)
    width = teacher.tower.width
    assert early.shape == inner.shape == (*features.shape[:2], width)
    assert not torch.equal(early, inner)
    assert first.identity == teacher.identity | {"channels": width, "block": 1}
    assert first.about["name"] == f"{teacher.about['name']}@1"
    assert first.about["block"] == f"block 1 of {count}"


def test_a_block_is_a_layer_of_the_store(
    photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """Beside the output; an audit runs the same block again."""
    out = tmp_path / "t.zarr"
    settings: dict[str, Any] = {**EXTRACTION, **teacher_files, "out": str(out), "limit": 8}
    extract_targets(str(photos), teacher_layer=1, **settings)
    extract_targets(str(photos), extend=True, **settings)
    block, own = TargetCache(out).layers
    assert block == own.replace("/", "@1/")
    cache = TargetCache(out, layer=block)
    assert (cache.spec.channels, cache.spec.teacher["block"]) == (32, 1)
    with pytest.raises(ConfigError, match=r"@1/.* has tokens of an inner block .* milan knn"):
        zero_shot("teacher", cache=str(out), layer=block, data=str(photos))
    verdict = verify(out, audit=Audit(4))  # of the first layer
    assert verdict.code == 0, verdict


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"teacher_layer": 3}, "--teacher-layer 3 of teacher .*; expected: 1 to 2"),
        ({"teacher_layer": 0}, "teacher_layer 0; expected: at least 1"),
        ({"teacher_layer": 1, "texts": True}, "--texts with --teacher-layer 1"),
        ({"teacher_layer": 1, "targets": "none"}, "--teacher-layer 1 with --targets none"),
    ],
)  # fmt: skip
def test_what_is_no_block_is_refused(
    more: dict[str, Any], message: str, photos: Path, teacher_files: dict[str, str], tmp_path: Path
) -> None:
    """In a line, before anything is written."""
    with pytest.raises(MilanError, match=message):
        extract_targets(str(photos), out=str(tmp_path / "t.zarr"), **teacher_files, **more)
    assert not (tmp_path / "t.zarr").exists()
