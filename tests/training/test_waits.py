"""A step of pretraining queues its work on a GPU and waits for none of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from counting import waits_of_a_step
from helpers import SMALL

from milan.config import PretrainConfig
from milan.store.cache import TargetCache
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
