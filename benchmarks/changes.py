"""What each change to the published step gains by itself.

    python -m benchmarks.changes [--batch 16] [--precision fp32] [--only NAME ...]

Our step (`benchmarks.step`, ViT-B/16 student and teacher) is compared with itself with one thing
done the other way, in interleaved rounds. A ratio above 1 means that our way is faster. A batch of
16 is a single micro-batch; to compare micro-batches use `--batch 64 --only micro`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import torch
from timm.optim import param_groups_weight_decay

from benchmarks.measure import interleaved, parser, ratio, report
from benchmarks.step import ours
from milan.models import decoder, encoder, kernels
from milan.models.kernels import choose_kernels, has_onednn

_STUDENT = "benchmarks.step.choose_kernels"  # called with the student of a step


def _other_attention(student: torch.nn.Module, *arguments: Any) -> None:
    choose_kernels(student, *arguments)
    for module in student.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = not module.fused_attn  # type: ignore[assignment]


def _compiled(student: torch.nn.Module, *arguments: Any) -> None:
    choose_kernels(student, *arguments)
    student.compile()


def _all_patches(embed: Any, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    patches = embed(images)
    return patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[2]))


class _Reordering(decoder.PromptAttention):
    """Reorders its tokens first, as published; which order does not affect the time."""

    def forward(self, prompts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return super().forward(*(t.gather(1, _reversed(t)) for t in (prompts, x)))


def _reversed(tokens: torch.Tensor) -> torch.Tensor:
    order = torch.arange(tokens.shape[1] - 1, -1, -1, device=tokens.device)
    return order[None, :, None].expand_as(tokens)


def _plain_adamw(student: torch.nn.Module, *_: Any, weight_decay: float, **__: Any) -> Any:
    return torch.optim.AdamW(
        param_groups_weight_decay(student, weight_decay), lr=0.0, betas=(0.9, 0.95)
    )


class _Zeroing(torch.optim.AdamW):
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=False)


def _at_once(config: Any, *_: Any) -> Any:
    return config.batch_size


_USES_ONEDNN = kernels.prefers_onednn()
OTHERS: dict[str, tuple[str, Callable[[], AbstractContextManager[Any]]]] = {
    "attention": (
        "attention written out (bf16: fused)",
        lambda: patch(_STUDENT, _other_attention),
    ),
    "embedding": (
        "all patches embedded, then three quarters dropped",
        lambda: patch.object(encoder, "_embedded", _all_patches),
    ),
    "order": (
        "tokens reordered in every decoder block",
        lambda: patch.object(decoder, "PromptAttention", _Reordering),
    ),
    "adamw": ("AdamW by its default", lambda: patch("benchmarks.step.adamw", _plain_adamw)),
    "zeroed": ("gradients zeroed, not freed", lambda: patch.object(torch.optim, "AdamW", _Zeroing)),
    "products": (
        f"products by {'MKL' if _USES_ONEDNN else 'oneDNN'}",
        lambda: patch.object(kernels, "prefers_onednn", lambda: not _USES_ONEDNN and has_onednn()),
    ),
    "micro": ("the batch at once", lambda: patch("benchmarks.step.micro_batch_of", _at_once)),
    "compiled": ("torch.compile", lambda: patch(_STUDENT, _compiled)),
}
"""Name: (what is done the other way, a context in which such a step is built and run)."""


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--precision", default="fp32")
    flags.add_argument("--only", nargs="+", choices=OTHERS, default=list(OTHERS), metavar="NAME")
    args = flags.parse_args()
    torch.manual_seed(0)
    arguments = (args.precision, args.batch, "ViT-B/16", 16, torch.device("cpu"))
    lines = ["| the other way | its seconds / ours (range) |", "|---|---|"]
    for name in args.only:
        what, other_way = OTHERS[name]
        with other_way():
            reverted = ours(*arguments)
        contenders = {"reverted": _within(other_way, reverted), "ours": ours(*arguments)}
        seconds = interleaved(contenders, args.rounds)
        lines.append(f"| {what} | {ratio(seconds['reverted'], seconds['ours'])} |")
        print(lines[-1], flush=True)
    command = f"python -m benchmarks.changes --batch {args.batch} --rounds {args.rounds}"
    command += f" --precision {args.precision} --only {' '.join(args.only)}"
    report("changes", command, lines, keep=args.keep)


def _within(context: Callable[[], AbstractContextManager[Any]], step: Callable[[], None]) -> Any:
    def run() -> None:
        with context():
            step()

    return run


if __name__ == "__main__":
    main()
