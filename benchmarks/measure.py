"""How the benchmarks measure and report: interleaved rounds, medians, spreads, one table."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "imagenet-sample" / "train"
RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, *, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of each contender in each round, after one round of warming up.

    The contenders take turns, so that a slow minute of the machine hits all of them. With `clock`
    "cpu" seconds are those of this process on all cores; other processes then matter less.
    """
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds + 1):
        for name, run in contenders.items():
            start = now()
            run()
            if turn:
                seconds[name].append(now() - start)
        print(f"round {turn}/{rounds}", file=sys.stderr, flush=True)
    return seconds


def ratio(slow: list[float], fast: list[float]) -> str:
    """Median of the rounds' ratios slow / fast, with their range."""
    ratios = [a / b for a, b in zip(slow, fast, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def report(name: str, command: str, lines: list[str], *, keep: bool) -> None:
    """Print a result; with `keep` also write it to benchmarks/results/<name>.md."""
    import timm

    head = [
        f"# {name}",
        "",
        f"`{command}`, {time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores {platform.machine()}, "
        f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads",
        "",
    ]
    text = "\n".join([*head, *lines, ""])
    print(text)
    if keep:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.md").write_text(text)


def parser(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks have."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--keep", action="store_true", help="write benchmarks/results/NAME.md")
    flags.add_argument("--rounds", type=int, default=7)
    return flags


def photos(folder: Path, count: int) -> Path:
    """A folder of ImageNet photographs if present, else `noise_photos`."""
    return PHOTOS if PHOTOS.exists() else noise_photos(folder, count)


def noise_photos(folder: Path, count: int) -> Path:
    """A folder of `count` JPEGs of noise, 500 x 375 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (63, 84, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=92)
    return folder
