"""Predict the peak memory of two steps, take them, and print both in bytes."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from milan.config import PretrainConfig
from milan.core.device import autocast
from milan.data.dataset import Batch
from milan.models.kernels import choose_kernels
from milan.store.codecs import CODECS
from milan.training.build import loss_function, optimiser_of, student_of
from milan.training.memory import peak_bytes
from milan.training.pretrain import in_micro_batches, resolve_defaults

CPU = torch.device("cpu")
SIZE, PATCHES, CHANNELS = 96, 144, 64
CODEC = CODECS["int8"].fitted(torch.ones(1, CHANNELS))
TARGETS: Any = SimpleNamespace(
    codec=CODEC,
    spec=SimpleNamespace(channels=CHANNELS, tokens=1 + PATCHES),
    view_spec=SimpleNamespace(size=SIZE),
)


def status(key: str) -> int:
    """A size of this process in bytes, as its kernel tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def student_for(config: PretrainConfig) -> Any:
    student = student_of(config, TARGETS)
    choose_kernels(student, CPU, config.precision)
    return student


def take(config: PretrainConfig) -> None:
    """Two steps."""
    student, count = student_for(config), config.micro_batch or 0
    optimiser = optimiser_of(student, config, CPU)
    loss_of = loss_function(student, config, TARGETS, CPU)
    batch = Batch(
        torch.zeros(count, SIZE, SIZE, 3, dtype=torch.uint8),
        torch.ones(count, PATCHES),
        torch.rand(count, PATCHES).clamp(0.01, 0.99),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, dtype=torch.int64),
        torch.ones(count, 1 + PATCHES, CHANNELS, dtype=torch.int8),
        torch.ones(count, 1 + PATCHES),
    )
    for _ in range(2):
        optimiser.zero_grad(set_to_none=True)
        for _ in range(config.batch_size // count):
            with autocast(CPU, config.precision):
                loss = loss_of(batch)
            loss.backward()
        optimiser.step()


def main() -> None:
    settings = {
        "model_args": {"patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 12},
        "decoder": {"embed_dim": 64, "num_heads": 2, "depth": 8},
        **json.loads(sys.argv[1]),
    }
    config = resolve_defaults(PretrainConfig(**settings), CPU)
    student = student_for(config)
    config = in_micro_batches(config, student, CPU)
    predicted = peak_bytes(student, config, TARGETS, CPU)
    del student
    take(config)  # libraries take what they take at the first step; it is not the student's
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    take(config)
    print(json.dumps([predicted, status("VmHWM") - before]))


main()
