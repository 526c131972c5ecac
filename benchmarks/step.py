"""A training step from the cache against the published step, teacher in the loop.

    python -m benchmarks.step [--batch 16] [--rounds 7] [--precision fp32 bf16]

ViT-B student and published decoder on both sides, random weights: only speed is measured. The
published step (`benchmarks/published.py`) is given normalised images; ours starts from what a
loader worker hands over and is made of pretraining's own parts. Loading is left out on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measure import interleaved, parser, ratio, report
from benchmarks.published import TOWERS, Published
from milan.codecs import CODECS
from milan.data import Batch
from milan.device import MEAN, STD, autocast, choose_attention, normalise
from milan.pretraining import resolved
from milan.settings import PretrainConfig
from milan.task import loss_function, optimiser_of, student_of

PAIRS = (("ViT-B/16", 16), ("ViT-L/14", 16), ("ViT-L/14", 14))
"""Teacher, and the student's patch size."""


def ours(
    precision: str, size: int, tower: str, patch: int, device: torch.device
) -> Callable[[], None]:
    """The step of `milan pretrain`, on one batch of random targets."""
    about = TOWERS[tower]
    patches, channels = (224 // about["patch"]) ** 2, about["joint"]
    config = resolved(
        PretrainConfig(batch_size=size, precision=precision, model_args={"patch_size": patch}),
        device,
    )
    features = torch.randn(size, 1 + patches, channels)
    codec = CODECS["int8"].fitted(features.flatten(0, 1))
    codes, scale = codec.encode(features)
    targets: Any = SimpleNamespace(
        codec=codec,
        spec=SimpleNamespace(channels=channels, tokens=1 + patches),
        view_spec=SimpleNamespace(size=224),
    )
    student = student_of(config, targets).to(device).train()
    choose_attention(student, device, precision)
    optimiser = optimiser_of(student, config, device)
    objective = loss_function(student, config, targets, device)
    batch = Batch(
        torch.randint(0, 256, (size, 224, 224, 3), dtype=torch.uint8),
        torch.randn(size, patches).softmax(dim=1),
        torch.rand(size, student.patches).clamp(1e-6, 1 - 1e-6),
        torch.arange(size),
        torch.zeros(size, dtype=torch.int64),
        torch.from_numpy(codes),
        None if scale is None else torch.from_numpy(scale),
    )

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        with autocast(device, precision):
            loss = objective(batch)
        loss.backward()
        optimiser.step()
        loss.item()

    return step


def published(
    precision: str, size: int, tower: str, patch: int, device: torch.device
) -> Callable[[], None]:
    """The published step on one batch."""
    reference = Published(tower, patch=patch, device=device)
    pixels = torch.randint(0, 256, (size, 224, 224, 3), dtype=torch.uint8, device=device)
    images = normalise(pixels, MEAN, STD)

    def step() -> None:
        reference.step(images, autocast(device, precision))

    return step


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    flags.add_argument("--pairs", nargs="+", type=int, default=[0, 1, 2], help="of PAIRS")
    args = flags.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        "| teacher | student's patch | precision | published, s | ours, s | gain (range) |",
        "|---|---|---|---|---|---|",
    ]
    for precision in args.precision:
        for tower, patch in (PAIRS[i] for i in args.pairs):
            given = (precision, args.batch, tower, patch, device)
            seconds = interleaved(
                {"published": published(*given), "ours": ours(*given)}, args.rounds
            )
            slow, fast = (sorted(s)[len(s) // 2] for s in seconds.values())
            gain = ratio(seconds["published"], seconds["ours"])
            row = f"| {tower} | {patch} | {precision} | {slow:.2f} | {fast:.2f} | {gain} |"
            lines.append(row)
            print(row, flush=True)
    command = f"python -m benchmarks.step --batch {args.batch} --rounds {args.rounds}"
    report("step", command, lines, keep=args.keep)


if __name__ == "__main__":
    main()
