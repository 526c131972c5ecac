"""A training step from the cache, against itself with the teacher online and the published step.

    python -m benchmarks.step [--batch 64] [--micro N] [--rounds 7] [--precision fp32 bf16]
        [--decode-fraction 0.25]

Both sides have a ViT-B student with the published decoder and random weights: only speed is
measured. The published step (`benchmarks/published.py`) gets normalised images. Ours gets a batch
as a loader worker returns it, and uses pretraining's own functions. `online` is ours after a
forward pass of our own teacher, as extraction runs it. All compute the gradient norm; none loads
data. Ours uses the micro-batches that pretraining would, or those of `--micro`. The published step
processes the batch at once, as published, or in micro-batches of `--published-micro`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.measure import interleaved, parser, ratio, report
from benchmarks.published import TOWERS, Published
from milan.config import PretrainConfig
from milan.core.device import MEAN, STD, autocast, normalise, pick_device
from milan.data.loader import Batch
from milan.images.views import ViewSpec
from milan.models.kernels import choose_kernels
from milan.models.student import Student
from milan.store.codecs import CODECS, Codec
from milan.training.build import Settings, micro_batch_of, resolve_defaults, student_of
from milan.training.compilation import StepLoss, compile_step
from milan.training.loop import Context
from milan.training.optim import adamw, gradient_norm
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec

PAIRS = (("ViT-B/16", 16), ("ViT-L/14", 16), ("ViT-L/14", 14))
"""Teacher, and the student's patch size."""


class Case(NamedTuple):
    """A step to be measured: what pretraining builds, on one micro-batch of random targets."""

    student: Student
    settings: Settings
    targets: Any
    """In a store's place: its codec, spec and view spec."""
    batch: Batch
    """On the CPU."""
    device: torch.device

    def run(self, size: int) -> Callable[[], None]:
        """A step of `size` images; with the setting `compile` on, compiled."""
        config, student, settings = self.settings.config, self.student, self.settings
        at_once = len(self.batch.rows)
        choose_kernels(student, self.device, settings.precision)
        optimiser = adamw(
            student, self.device, weight_decay=config.weight_decay, beta2=config.beta2
        )
        objective = settings.objective(self.targets)
        eager = StepLoss(objective, student, objective.loss)
        context = Context(Path(), self.device)
        loss_of = compile_step(eager, lambda: self.batch.to(self.device), settings, context)

        def step() -> None:
            optimiser.zero_grad(set_to_none=True)
            for _ in range(size // at_once):
                with autocast(self.device, settings.precision):
                    loss = loss_of(self.batch.to(self.device)) * (at_once / size)
                loss.backward()
            norm = gradient_norm(student)
            optimiser.step()
            loss.item(), norm.item()

        return step


def in_place_of_a_store(codec: Codec, *, size: int, patches: int, channels: int) -> Any:
    """What student and objective ask of a TargetCache, without any file."""
    targets: Any = SimpleNamespace(
        codec=codec,
        spec=SimpleNamespace(channels=channels, tokens=1 + patches, has_targets=True),
        view_spec=ViewSpec(size),
    )
    targets.parts, targets.masking = [targets], targets
    return targets


def case(
    precision: str,
    size: int,
    tower: str,
    patch: int,
    device: torch.device,
    *,
    micro: int | None = None,
    **settings_: Any,
) -> Case:
    """The step of `milan pretrain` with targets of `tower`, and further settings."""
    about = TOWERS[tower]
    patches, channels = (224 // about["patch"]) ** 2, about["joint"]
    settings = resolve_defaults(
        PretrainConfig(
            batch_size=size,
            micro_batch=micro,
            precision=precision,
            **{"compile": "off", "model_args": {"patch_size": patch}, **settings_},
        ),
        device,
    )
    codec = CODECS["int8"].fitted(torch.randn(16 * (1 + patches), channels))
    targets = in_place_of_a_store(codec, size=224, patches=patches, channels=channels)
    student = student_of(settings, targets).to(device).train()
    config = settings.config
    at_once = micro_batch_of(config, student, device)
    codes, scale = codec.encode(torch.randn(at_once, 1 + patches, channels))
    batch = Batch(
        torch.randint(0, 256, (at_once, 224, 224, 3), dtype=torch.uint8),
        torch.randn(at_once, patches).softmax(dim=1),
        torch.rand(at_once, student.patches).clamp(1e-6, 1 - 1e-6),
        torch.arange(at_once),
        torch.zeros(at_once, dtype=torch.int64),
        codes,
        scale,
    )
    return Case(student, settings, targets, batch, device)


def ours(
    precision: str,
    size: int,
    tower: str,
    patch: int,
    device: torch.device,
    *,
    micro: int | None = None,
    **settings: Any,
) -> Callable[[], None]:
    """The step of `milan pretrain`, on one batch of random targets."""
    return case(precision, size, tower, patch, device, micro=micro, **settings).run(size)


def online(
    step: Callable[[], None], precision: str, size: int, tower: str, device: torch.device
) -> Callable[[], None]:
    """Our step after what the cache saves: the teacher on the same views."""
    spec = TeacherSpec(f"{tower.replace('/', '-')}-quickgelu", "none", precision=precision)
    teacher = load_teacher(spec, device=str(device))
    pixels = np.random.default_rng(0).integers(0, 256, (size, 224, 224, 3), dtype=np.uint8)

    def both() -> None:
        teacher.targets(pixels)
        step()

    return both


def published(
    precision: str,
    size: int,
    tower: str,
    patch: int,
    device: torch.device,
    *,
    micro: int | None = None,
) -> Callable[[], None]:
    """The published step on one batch."""
    reference = Published(tower, patch=patch, device=device)
    pixels = torch.randint(0, 256, (size, 224, 224, 3), dtype=torch.uint8, device=device)
    images = normalise(pixels, MEAN, STD)

    def step() -> None:
        reference.step(images.split(micro or size), autocast(device, precision))

    return step


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--batch", type=int, default=64)
    flags.add_argument("--micro", type=int, help="default: as pretraining uses")
    flags.add_argument("--decode-fraction", type=float, default=1.0, help="of ours")
    flags.add_argument("--published-micro", type=int, help="default: the batch at once")
    flags.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    flags.add_argument("--pairs", nargs="+", type=int, default=[0, 1, 2], help="indexes of PAIRS")
    flags.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="what seconds mean")
    args = flags.parse_args()
    torch.manual_seed(0)
    device = pick_device("cuda" if torch.cuda.is_available() else "cpu")
    lines = [
        "| teacher | student's patch | precision | published, s | online, s | cached, s "
        "| published / cached (range) | online / cached (range) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for precision in args.precision:
        for tower, patch in (PAIRS[i] for i in args.pairs):
            arguments = (precision, args.batch, tower, patch, device)
            cached = ours(*arguments, micro=args.micro, decode_fraction=args.decode_fraction)
            seconds = interleaved(
                {
                    "published": published(*arguments, micro=args.published_micro),
                    "online": online(cached, precision, args.batch, tower, device),
                    "cached": cached,
                },
                args.rounds,
                clock=args.clock,
            )
            medians = " | ".join(f"{statistics.median(s):.2f}" for s in seconds.values())
            gains = " | ".join(
                ratio(seconds[slow], seconds["cached"]) for slow in ("published", "online")
            )
            row = f"| {tower} | {patch} | {precision} | {medians} | {gains} |"
            lines.append(row)
            print(row, flush=True)
    command = f"python -m benchmarks.step --batch {args.batch}"
    command += f" --micro {args.micro}" if args.micro else ""
    command += f" --decode-fraction {args.decode_fraction}" if args.decode_fraction < 1 else ""
    command += f" --published-micro {args.published_micro}" if args.published_micro else ""
    command += (
        f" --rounds {args.rounds} --clock {args.clock} --precision {' '.join(args.precision)}"
    )
    command += f" --pairs {' '.join(map(str, args.pairs))}"
    report("step", command, lines, keep=args.keep)


if __name__ == "__main__":
    main()
