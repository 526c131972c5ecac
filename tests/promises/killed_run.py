"""A run in a process of its own, to be killed; imports no more than it needs."""

from __future__ import annotations

from typing import Any

import torch

import milan.training.pretrain


def drive(store: str, out: str, settings: dict[str, Any]) -> None:
    """`milan.pretrain`, on one thread."""
    torch.set_num_threads(1)
    milan.training.pretrain.pretrain(store, out=out, **settings)
