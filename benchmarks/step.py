"""A training step from the cache against the same step with the teacher online.

    python -m benchmarks.step [--batch 16] [--rounds 7] [--precision fp32 bf16]

ViT-B/16 student with the published decoder, ViT-B/16 teacher (random weights: only speed is
measured), the same pixels, masks by the same law. Online: teacher forward, then the step. Cached:
int8 targets decoded, then the step. Loading is left out on both sides.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.measure import interleaved, parser, ratio, report
from milan.codecs import CODECS
from milan.device import MEAN, STD, autocast, normalise
from milan.masking import importance_mask, visible_count
from milan.model import build_student
from milan.objectives import feature_regression
from milan.train import decay_groups
from pipeline.teacher import TeacherSpec, load_teacher


def contenders(precision: str, size: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """The online and the cached step, sharing one student, its optimiser and one batch."""
    teacher = load_teacher(TeacherSpec(pretrained="none", precision=precision), device=str(device))
    student = build_student("vit_base_patch16_224", img_size=224, target_width=512).to(device)
    optimiser = torch.optim.AdamW(decay_groups(student, 0.05), lr=1e-4, betas=(0.9, 0.95))
    pixels = torch.randint(0, 256, (size, 224, 224, 3), dtype=torch.uint8, device=device)
    features, attention = teacher.targets(pixels)
    codes, scale = (torch.from_numpy(a).to(device) for a in CODECS["int8"].encode(features))
    attention, noise = attention.clone(), torch.rand(size, 196, device=device)

    def step(target: torch.Tensor, importance: torch.Tensor) -> None:
        mask = importance_mask(importance, noise, visible=visible_count(196, 0.75))
        optimiser.zero_grad(set_to_none=True)
        with autocast(device, precision):
            prediction = student(normalise(pixels, MEAN, STD), mask)
        feature_regression(prediction, target).backward()
        optimiser.step()
        if device.type == "cuda":
            torch.cuda.synchronize()

    def online() -> None:
        said, seen = teacher.targets(pixels)
        step(said.clone(), seen.clone())

    def cached() -> None:
        step(CODECS["int8"].decode(codes, scale), attention)

    return {"online": online, "cached": cached}


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    args = flags.parse_args()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lines = ["| precision | online, s | cached, s | online / cached (range) |", "|---|---|---|---|"]
    for precision in args.precision:
        seconds = interleaved(contenders(precision, args.batch, device), args.rounds)
        online, cached = (sorted(s)[len(s) // 2] for s in seconds.values())
        gain = ratio(seconds["online"], seconds["cached"])
        lines.append(f"| {precision} | {online:.2f} | {cached:.2f} | {gain} |")
    command = f"python -m benchmarks.step --batch {args.batch} --rounds {args.rounds}"
    report("step", command, lines, keep=args.keep)


if __name__ == "__main__":
    main()
