"""Memory traffic and kernels of a step of ViT-B/16 on a GPU, counted without one.

    python -m benchmarks.traffic [--micro 256] [--decode-fraction 0.25] [--keep]

A step of `milan pretrain` in bf16. Eager: it runs on tensors that have shapes and no memory; each
operator that is no view is a kernel, which reads its inputs and writes its outputs once. Compiled:
the same of each kernel that torch's compiler makes of student and loss for an A100
(benchmarks/gpu_kernels.py); blocks are alike but for the first, so two depths tell all of them.
Predictions, not measurements: what a cache holds is not left out, nor is what products read more
than once added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_kernels import CPU, GPU, Kernel, kernels_of
from benchmarks.measure import parser, report
from benchmarks.step import Case, case
from milan.core.device import autocast
from milan.models.kernels import choose_kernels
from milan.objectives.base import Prediction
from milan.training.compilation import StepLoss
from milan.training.memory import trial_batch
from milan.training.optim import adamw, gradient_norm

DEPTHS = {"encoder": 12, "decoder": 8}
PRODUCTS = ("mm", "addmm", "bmm", "_scaled_dot_product")
COPIES = ("clone", "copy_", "cat", "stack", "gather", "index", "scatter")
FREE = ("prim::device", "_unsafe_view", "empty", "empty_like", "detach", "new_empty")


def kind_of(name: str) -> str:
    """What an operator does, in a word."""
    if name.startswith(PRODUCTS):
        return "products"
    if name == "_to_copy":
        return "casts"
    return "copies" if name.startswith(COPIES) else "elementwise"


def size_of(tensors: Any) -> int:
    """Bytes of reading or writing each of these once; what is expanded counts as it is kept."""
    unique = {id(t): t for t in tree_leaves(tensors) if isinstance(t, torch.Tensor)}
    return sum(
        min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in unique.values()
    )


class Traffic(TorchDispatchMode):
    """Counts (bytes, kernels) by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        is_view = not writes and any(r.alias_info for r in func._schema.returns)
        if not is_view and name not in FREE:
            self.bytes[kind_of(name)] += size_of((args, kwargs)) + size_of(out)
            self.kernels[kind_of(name)] += 1
        return out


def built(micro: int, fraction: float, *, encoder: int, decoder: int) -> Case:
    """The student of so many blocks, with the kernels of a GPU; `fraction`: decode_fraction."""
    shape: dict[str, Any] = {
        "decode_fraction": fraction,
        "model_args": {"patch_size": 16, "depth": encoder},
        "decoder": {"depth": decoder},
    }
    made = case("bf16", micro, "ViT-B/16", 16, CPU, micro=micro, **shape)
    choose_kernels(made.student, GPU, "bf16")
    return made


def eager(micro: int, fraction: float) -> tuple[Traffic, Traffic, float]:
    """(a micro-batch's, an update's, products of an image in GFLOP) without compiling."""
    made = built(1, fraction, **DEPTHS)
    objective = made.settings.objective(made.targets)
    made.targets.codec.to(CPU)
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        batch = trial_batch(micro, made.student, made.targets, CPU)
        weights = {
            name: nn.Parameter(fake.from_tensor(p.data), p.requires_grad)
            for name, p in made.student.named_parameters()
        }
        network: Any = partial(_call, made.student, weights)
        with FlopCounterMode(display=False) as flops, Traffic() as step:
            with autocast(CPU, "bf16"):
                loss = StepLoss(objective, network, objective.loss)(batch)
            loss.backward()
        holder = nn.ParameterList(weights.values())
        optimiser = adamw(holder, CPU, weight_decay=0.05, beta2=0.95)
        optimiser.step()  # makes the moments
        with Traffic() as update:
            gradient_norm(holder)
            optimiser.step()
    return step, update, flops.get_total_flops() / micro / 1e9


def _call(student: nn.Module, weights: Mapping[str, torch.Tensor], *inputs: Any) -> torch.Tensor:
    return functional_call(student, dict(weights), inputs)


def counted(kernels: list[Kernel]) -> Counter[tuple[str, str]]:
    """("bytes" or "kernels", kind) of some kernels."""
    found: Counter[tuple[str, str]] = Counter()
    for kind, size in kernels:
        found["bytes", kind] += size
        found["kernels", kind] += 1
    return found


def student_kernels(micro: int, fraction: float, **depth: int) -> Counter[tuple[str, str]]:
    """`counted` of the student of so many blocks."""
    made = built(1, fraction, **depth)
    batch = trial_batch(micro, made.student, made.targets, CPU)
    mask = made.settings.objective(made.targets).mask(batch)
    return counted(kernels_of(made.student, torch.zeros(micro, 3, 224, 224), mask))


def compiled(micro: int, fraction: float) -> Counter[tuple[str, str]]:
    """`counted` of the whole step: blocks are alike but for the first, so two depths tell all."""
    made = built(1, fraction, encoder=1, decoder=1)
    objective = made.settings.objective(made.targets)
    batch = trial_batch(micro, made.student, made.targets, CPU)
    mask = objective.mask(batch)
    seen = 1 + mask.visible.shape[1] + mask.decoded.shape[1]
    tokens = torch.zeros(micro, seen, 512, dtype=torch.bfloat16, requires_grad=True)
    prediction = Prediction(tokens, torch.zeros(micro, 3, 224, 224), mask, batch)
    total = counted(kernels_of(objective.loss, prediction))
    few = dict.fromkeys(DEPTHS, 2)
    base = student_kernels(micro, fraction, **few)
    total.update(base)
    for part, depth in DEPTHS.items():
        more = student_kernels(micro, fraction, **few | {part: 3})
        for key in base.keys() | more.keys():
            total[key] += (depth - 2) * (more[key] - base[key])
    return total


def table(name: str, sizes: Mapping[str, int], kernels: Mapping[str, int], micro: int) -> list[str]:
    """MB an image and kernels by kind, the largest first."""
    lines = [f"| {name}, a micro-batch | MB an image | kernels |", "|---|---|---|"]
    kinds = sorted(sizes, key=lambda kind: -sizes[kind])
    for row, some in [*((kind, [kind]) for kind in kinds), ("together", kinds)]:
        size, count = (sum(counts[kind] for kind in some) for counts in (sizes, kernels))
        lines.append(f"| {row} | {size / micro / 1e6:.1f} | {count} |")
    return [*lines, ""]


def main() -> None:
    """Count and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--micro", type=int, default=256)
    flags.add_argument("--decode-fraction", type=float, default=1.0)
    args = flags.parse_args()
    torch.manual_seed(0)
    step, update, work = eager(args.micro, args.decode_fraction)
    fused = compiled(args.micro, args.decode_fraction)
    lines = [f"Products of an image: {work:.1f} GFLOP.", ""]
    lines += table("eager", step.bytes, step.kernels, args.micro)
    sizes, kernels = (
        {kind: count for (what, kind), count in fused.items() if what == part}
        for part in ("bytes", "kernels")
    )
    lines += table("compiled", sizes, kernels, args.micro)
    lines.append(
        f"The update of a step: {sum(update.bytes.values()) / 1e6:,.0f} MB, "
        f"{sum(update.kernels.values())} kernels."
    )
    command = f"python -m benchmarks.traffic --micro {args.micro}"
    if args.decode_fraction < 1:
        command += f" --decode-fraction {args.decode_fraction}"
    report("traffic", command, lines, keep=args.keep)


if __name__ == "__main__":
    main()
