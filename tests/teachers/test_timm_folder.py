"""Teachers in a folder that timm opens: `timm:local-dir:FOLDER`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from milan.core.device import normalise
from milan.errors import TeacherError
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec

ARGS = {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 32}
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A ViT of arguments that no name of timm has, and a classifier that is not used."""
    path = tmp_path / "students" / "own"
    path.mkdir(parents=True)
    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **ARGS)
    save_file(model.state_dict(), path / "model.safetensors", metadata={"licence": "MIT"})
    config = {
        "architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": ARGS,
        "pretrained_cfg": {
            "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "classifier": "head",
            "pool_size": None,
        },
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_its_tokens_are_timms(folder: Path) -> None:
    """With its own mean and deviation; the layer is called as the folder, wherever it lies."""
    teacher = load_teacher(TeacherSpec(f"timm:local-dir:{folder}"), device="cpu")
    features, attention = teacher.targets(PIXELS)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = normalise(torch.from_numpy(PIXELS), [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    with torch.no_grad():
        assert torch.allclose(features, model.forward_features(images), atol=1e-5)
    assert attention.shape == (3, 16)
    assert (teacher.about["name"], teacher.about["licence"]) == ("timm:own", "MIT")
    assert teacher.identity["architecture"]["model_args"] == ARGS
    drawn = load_teacher(TeacherSpec(f"timm:local-dir:{folder}", "none"), device="cpu")
    assert drawn.identity["weights"] != teacher.identity["weights"]


def _without(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("config.json"), "config.json is no config of a model of timm: No such file"),
        (_without("model.safetensors"), "no weights at .*model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("[]"), "is no config of a model"),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps({"architecture": "vit_own", "pretrained_cfg": {}})
            ),
            "timm has no model 'vit_own'",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps({"architecture": "resnet18", "pretrained_cfg": {}})
            ),
            "its image tower is timm's resnet18",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps({"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {}})
            ),
            "model.safetensors",
        ),
    ],
)  # fmt: skip
def test_what_is_no_such_folder_is_refused(
    change: Callable[[Path], Any], message: str, folder: Path
) -> None:
    """In a line."""
    change(folder)
    with pytest.raises(TeacherError, match=message):
        load_teacher(TeacherSpec(f"timm:local-dir:{folder}"), device="cpu")
