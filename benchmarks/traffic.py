"""Memory traffic and kernels of a step of ViT-B/16 on a GPU, counted without one.

    python -m benchmarks.traffic [--micro 256] [--keep]

A step of `milan pretrain` in bf16. Eager: it runs on tensors that have shapes and no memory; each
operator that is no view is a kernel, which reads its inputs and writes its outputs once. Compiled:
the same of each kernel that torch's compiler makes of student and loss, which are not run. It fuses
as it does for a CPU, for no GPU is at hand; blocks are alike, so that two depths tell all of them.
Predictions, not measurements: what a cache holds is not left out, nor is what products and
attention read more than once added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import parser, report
from benchmarks.step import Case, case
from milan.core.device import autocast
from milan.models.kernels import choose_kernels
from milan.objectives.base import Prediction
from milan.training.compilation import StepLoss
from milan.training.memory import trial_batch
from milan.training.optim import adamw, gradient_norm

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
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


def built(micro: int, *, encoder: int, decoder: int) -> Case:
    """The student of so many blocks, with the kernels of a GPU."""
    shape = {"model_args": {"patch_size": 16, "depth": encoder}, "decoder": {"depth": decoder}}
    made = case("bf16", micro, "ViT-B/16", 16, CPU, micro=micro, **shape)
    choose_kernels(made.student, GPU, "bf16")
    return made


def eager(micro: int) -> tuple[Traffic, Traffic, float]:
    """(a micro-batch's, an update's, products of an image in GFLOP) without compiling."""
    made = built(1, **DEPTHS)
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


class _Lowered(BaseException):
    """Both graphs are compiled; nothing runs them."""


def lowered(compiled: Callable[..., object], *inputs: object) -> Counter[tuple[str, str]]:
    """("bytes" or "kernels", kind) of the graphs of a compiled function and of its gradient."""
    found: Counter[tuple[str, str]] = Counter()
    lower, done = GraphLowering.codegen, list[GraphLowering]()

    def counted(graph: GraphLowering) -> Any:
        code = lower(graph)
        for node in graph.scheduler.nodes:
            if size := node.get_read_write_buffers_sizes():
                name = str(getattr(node.node, "python_kernel_name", ""))
                name = name.removesuffix(".default").rpartition(".")[2]
                kind = kind_of(name) if node.is_extern() else "fused"
                found["bytes", kind] += size
                found["kernels", kind] += 1
        done.append(graph)
        if len(done) == 2:
            raise _Lowered
        return code

    torch._dynamo.reset()
    with (
        mock.patch.object(AsyncCompile, "cpp_pybinding", return_value=None),
        mock.patch.object(GraphLowering, "codegen", counted),
        torch._inductor.config.patch(fx_graph_cache=False, compile_threads=1),
        torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
        autocast(CPU, "bf16"),
        suppress(_Lowered),
    ):
        compiled(*inputs)
    assert len(done) == 2
    return found


def student_lowered(micro: int, **depth: int) -> Counter[tuple[str, str]]:
    """`lowered` of the student of so many blocks."""
    made = built(1, **depth)
    batch = trial_batch(micro, made.student, made.targets, CPU)
    mask = made.settings.objective(made.targets).mask(batch)
    images = torch.zeros(micro, 3, 224, 224)
    network = torch.compile(made.student, dynamic=False, fullgraph=True)
    return lowered(network, images, mask)


def compiled(micro: int) -> Counter[tuple[str, str]]:
    """`lowered` of the whole step: blocks are alike, so that two depths tell all."""
    made = built(1, encoder=1, decoder=1)
    objective = made.settings.objective(made.targets)
    batch = trial_batch(micro, made.student, made.targets, CPU)
    tokens = torch.zeros(micro, 197, 512, dtype=torch.bfloat16, requires_grad=True)
    images = torch.zeros(micro, 3, 224, 224)
    prediction = Prediction(tokens, images, objective.mask(batch), batch)
    total = lowered(torch.compile(objective.loss, dynamic=False, fullgraph=True), prediction)
    one = student_lowered(micro, encoder=1, decoder=1)
    total.update(one)
    for part, depth in DEPTHS.items():
        two = student_lowered(micro, **{"encoder": 1, "decoder": 1} | {part: 2})
        for key in one.keys() | two.keys():
            total[key] += (depth - 1) * (two[key] - one[key])
    return total


def main() -> None:
    """Count and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--micro", type=int, default=256)
    args = flags.parse_args()
    torch.manual_seed(0)
    step, update, work = eager(args.micro)
    fused = compiled(args.micro)
    lines = [
        f"Products of an image: {work:.1f} GFLOP.",
        "",
        "| a micro-batch | MB an image, eager | kernels | MB an image, compiled | kernels |",
        "|---|---|---|---|---|",
    ]
    kinds = ("products", "elementwise", "casts", "copies", "fused")
    for kind in (*kinds, "together"):
        some = kinds if kind == "together" else (kind,)
        cells = []
        for sizes, kernels in (
            (step.bytes, step.kernels),
            *[({k: fused["bytes", k] for k in kinds}, {k: fused["kernels", k] for k in kinds})],
        ):
            size, count = (sum(counts[k] for k in some) for counts in (sizes, kernels))
            cells.append(f"{size / args.micro / 1e6:.1f} | {count}")
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    lines += [
        "",
        f"The update of a step: {sum(update.bytes.values()) / 1e6:,.0f} MB, "
        f"{sum(update.kernels.values())} kernels.",
    ]
    report("traffic", f"python -m benchmarks.traffic --micro {args.micro}", lines, keep=args.keep)


if __name__ == "__main__":
    main()
