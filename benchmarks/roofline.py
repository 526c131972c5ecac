"""Floating-point operations of a step, and the share of this machine's throughput that it reaches.

    python -m benchmarks.roofline [--batch 16] [--precision fp32 bf16]

torch counts operations while the networks run. Matrix products are timed between the rounds of the
step, as large square ones and in the step's own shapes.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import interleaved, parser, report
from benchmarks.published import TOWERS, Tower
from benchmarks.step import ours
from milan.core.device import PRECISIONS
from milan.models.masking import random_mask
from milan.models.student import build_student

KINDS = {
    "products": ("mm", "bmm", "addmm", "linear_pointwise", "mkldnn_linear", "convolution"),
    "attention": ("attention", "softmax"),
    "optimiser": ("adamw",),
    "norms": ("layer_norm",),
    "activation": ("gelu",),
}
"""Kind of work: parts of its operators' names; the first kind that matches counts."""


def counted(run: torch.nn.Module, *inputs: object) -> float:
    """Floating-point operations of a forward pass, in 1e9; a multiply-add counts as 2."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run(*inputs)
    return counter.get_total_flops() / 1e9


def kinds(step: object) -> list[tuple[str, float]]:
    """(kind of operation, share of the step's CPU time), the largest first."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()  # type: ignore[operator]
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        name = event.key.lower()
        matching = (kind for kind, parts in KINDS.items() if any(part in name for part in parts))
        spent[next(matching, "the rest")] += event.self_cpu_time_total
    return [(kind, time / sum(spent.values())) for kind, time in spent.most_common()]


def main() -> None:
    """Count, measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    flags.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="what seconds mean")
    args = flags.parse_args()
    device = torch.device("cpu")
    image = torch.zeros(1, 3, 224, 224)
    lines = ["| one image | forward, GFLOP | in a step, GFLOP |", "|---|---|---|"]
    for name, about in TOWERS.items():
        # Only two depths are run: the blocks are alike, and each one more costs the same.
        one, two = (counted(Tower(**about | {"depth": d}), image) for d in (1, 2))
        teacher = one + (two - one) * (about["depth"] - 1)
        lines.append(f"| teacher {name}, where it runs online | {teacher:.1f} | {teacher:.1f} |")
    student = build_student("vit_base_patch16_224", img_size=224, target_width=512)
    mask = random_mask(torch.rand(1, 196).clamp(0.01, 0.99), visible=49)
    whole = counted(student, image, mask)
    decoder = counted(student.decoder, torch.zeros(1, 50, 768), mask)
    lines.append(f"| encoder, 50 tokens | {whole - decoder:.1f} | {3 * (whole - decoder):.1f} |")
    lines.append(f"| decoder, 147 of 197 tokens | {decoder:.1f} | {3 * decoder:.1f} |")
    lines += [
        "",
        "| precision | square products, GFLOP/s | its own | the step, GFLOP/s | share |",
        "|---|---|---|---|---|",
    ]
    profiles = []
    for precision in args.precision:
        dtype = PRECISIONS[precision] or torch.float32
        a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
        c, d = torch.randn(147 * args.batch, 512).to(dtype), torch.randn(512, 2048).to(dtype)
        step = ours(precision, args.batch, "ViT-B/16", 16, device)
        seconds = interleaved(
            {"square": lambda: a @ b, "own": lambda: c @ d, "step": step},  # noqa: B023
            args.rounds,
            clock=args.clock,
        )
        square, own, taken = (sorted(s)[len(s) // 2] for s in seconds.values())
        rates = 2 * 2048**3 / square / 1e9, 2 * c.shape[0] * 512 * 2048 / own / 1e9
        rate = 3 * whole * args.batch / taken
        lines.append(
            f"| {precision} | {rates[0]:.0f} | {rates[1]:.0f} | {rate:.0f} | "
            f"{rate / rates[0]:.0%} |"
        )
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in kinds(step))
        profiles.append(f"Where a step's time goes, {precision}: {shares}.")
    command = f"python -m benchmarks.roofline --batch {args.batch} --rounds {args.rounds}"
    report("roofline", f"{command} --clock {args.clock}", [*lines, "", *profiles], keep=args.keep)


if __name__ == "__main__":
    main()
