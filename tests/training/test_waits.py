"""A step of pretraining queues its work on a GPU, in few kernels, and waits for none of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from counting import waits_of_a_step
from helpers import SMALL

import milan
from milan.config import PretrainConfig
from milan.store.cache import TargetCache
from milan.training import pretrain, supervised_run
from milan.training.build import resolve_defaults


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"objective": "pixels"},
        {"loss": "relation", "predict": "both", "deep_supervision": "1", "decode_fraction": 0.5},
        {"loss": "smooth-l1", "target_norm": "phi-s", "predict": "visible", "class_weight": 0.5},
    ],
    ids=["milan", "pixels", "relation", "phi-s"],
)
def test_nothing_waits_for_a_gpu(
    more: dict[str, Any], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No value is read, and nothing is copied, for any loss."""
    config = PretrainConfig(str(store), **{**SMALL, **more})
    settings = resolve_defaults(config, torch.device("cpu"))
    assert waits_of_a_step(settings, TargetCache(store), monkeypatch) == {}


@pytest.mark.parametrize(("precision", "wanted", "on"), [
    ("fp32", True, True), ("fp32", False, False), ("bf16", True, False),
])  # fmt: skip
def test_float32_is_multiplied_in_tf32(
    precision: str, wanted: bool, on: bool, store: Path, photos: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In pretraining and in fine-tuning, where float32 is asked for and TF32 not refused."""

    class Reached(Exception):
        pass

    def seen(device: torch.device, asked: bool, *_: object) -> object:
        raise Reached(asked)

    for module in (pretrain, supervised_run):
        monkeypatch.setattr(module, "tf32", seen)
    given: dict[str, Any] = {"precision": precision, "tf32": wanted, "report_to": "none"}
    with pytest.raises(Reached, match=str(on)):
        milan.pretrain(str(store), out=str(tmp_path / "run"), **{**SMALL, **given})
    shape = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 32, "num_heads": 2}
    with pytest.raises(Reached, match=str(on)):
        milan.finetune(
            "random", data=str(photos), model_args=shape, model="vit_tiny_patch16_224",
            batch_size=8, num_workers=0, out=str(tmp_path / "fine.json"), **given,
        )  # fmt: skip
