"""Predict the peak memory of two steps, take them, and print both in bytes."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.step import in_place_of_a_store
from milan.config import PretrainConfig
from milan.core.device import autocast
from milan.data.loader import Batch
from milan.models.kernels import choose_kernels
from milan.store.codecs import CODECS
from milan.training.build import Settings, micro_batch_of, resolve_defaults, student_of
from milan.training.memory import peak_bytes
from milan.training.optim import adamw

CPU = torch.device("cpu")
SIZE, PATCHES, CHANNELS = 96, 144, 64
CODEC = CODECS["int8"].fitted(torch.ones(1, CHANNELS))
TARGETS = in_place_of_a_store(CODEC, size=SIZE, patches=PATCHES, channels=CHANNELS)


def status(key: str) -> int:
    """A size of this process in bytes, as its kernel tells."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def student_for(settings: Settings) -> Any:
    student = student_of(settings, TARGETS)
    choose_kernels(student, CPU, settings.precision)
    return student


def take(settings: Settings, count: int) -> None:
    """Two steps, in micro-batches of `count` images."""
    student, config = student_for(settings), settings.config
    optimiser = adamw(student, CPU, weight_decay=config.weight_decay, beta2=config.beta2)
    objective = settings.objective(TARGETS)
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
            with autocast(CPU, settings.precision):
                loss = objective.loss(objective.predict(student, batch))
            loss.backward()
        optimiser.step()


def main() -> None:
    given = {
        "model_args": {"patch_size": 8, "embed_dim": 64, "num_heads": 2, "depth": 12},
        "decoder": {"embed_dim": 64, "num_heads": 2, "depth": 8},
        **json.loads(sys.argv[1]),
    }
    settings = resolve_defaults(PretrainConfig(**given), CPU)
    student = student_for(settings)
    count = micro_batch_of(settings.config, student, CPU)
    predicted = peak_bytes(student, settings, TARGETS, CPU, count)
    del student
    take(settings, count)  # what libraries take at the first step is not the student's
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = status("VmRSS")
    take(settings, count)
    print(json.dumps([predicted, status("VmHWM") - before]))


main()
