"""A step of a small RILS student, alone or as one of several ranks, on images drawn by a seed."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from milan.core.distributed import Ranks, parallelise
from milan.core.launch import as_rank
from milan.core.progress import Progress
from milan.core.signals import Stop
from milan.models.masking import random_mask
from milan.models.rils import JointOutput, RilsStudent, rils_decoder
from milan.models.student import build_student
from milan.models.text_encoder import TextEncoder, TextShape
from milan.objectives.sentences import SentenceLoss
from milan.training.joint import JointStep

CPU = torch.device("cpu")
IMAGES, LENGTH = 12, 6
ACCEPTED = (0, 1, 2, 3, 5)
"""Images that are brought near to their captions, all others far: of three ranks one has none."""
Micro = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def student(dtype: torch.dtype, drop_path: float, *, reconstruct: bool) -> RilsStudent:
    torch.manual_seed(0)
    plain = build_student(
        "vit_base_patch16_224", img_size=16, target_width=32, decoder_kind="mae",
        model_args={
            "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2,
            "drop_path_rate": drop_path,
        },
        decoder=rils_decoder(32, 2),
    )  # fmt: skip
    text = TextEncoder(TextShape(20, LENGTH, width=16, heads=2, layers=1, joint=8))
    joint = RilsStudent(plain.encoder, plain.decoder, text, reconstruct=reconstruct)
    return joint.to(dtype)


def micro_batches(dtype: torch.dtype) -> list[Micro]:
    """Pixels, noise, ids and whether an image is to be accepted, an image each."""
    draw = torch.Generator().manual_seed(5)
    ids = torch.randint(1, 19, (IMAGES, LENGTH), generator=draw)
    ids[:, -1] = 19
    ids[3] = ids[1]  # a caption twice
    pixels = torch.randn(IMAGES, 3, 16, 16, generator=draw, dtype=torch.float64).to(dtype)
    noise = torch.rand(IMAGES, 16, generator=draw).clamp(1e-6, 1 - 1e-6)
    chosen = torch.tensor([row in ACCEPTED for row in range(IMAGES)])
    parts = [x.split(1) for x in (pixels, noise, ids, chosen)]
    return list(zip(*parts, strict=True))


def output(network: Any, batch: Micro) -> JointOutput:
    pixels, noise, ids, chosen = batch
    said = network(pixels, random_mask(noise, visible=4), ids)
    towards = torch.where(chosen, 10.0, -10.0)[:, None] * said.texts.detach()
    return said._replace(images=said.images + towards)


def step(
    ranks: Ranks, micro: int, *, dtype: torch.dtype, precision: str, drop_path: float, **loss: Any
) -> dict[str, Any]:
    """Loss, parts and gradients of one step over all ranks; `accepted` on each of them."""
    trained = student(dtype, drop_path, reconstruct=loss.get("weight", 1) > 0)
    network = parallelise(trained, ranks, "ddp")
    share = IMAGES // ranks.size
    mine = micro_batches(dtype)[ranks.rank * share :][:share]
    batches = [
        tuple(torch.cat(part) for part in zip(*mine[at : at + micro], strict=True))
        for at in range(0, share, micro)
    ]
    joint = JointStep(
        partial(output, network),
        partial(SentenceLoss(**loss), ranks=ranks),
        network=network, device=CPU, precision=precision,
    )  # fmt: skip
    found = joint.backward(batches, range(len(batches)), lambda value: 3 * value)
    means = [float(found.loss), *map(float, found.parts.values())]
    names = ("loss", *found.parts)
    sums = dict(zip(names, ranks.all_reduce_sum(means), strict=True))
    grads = {n: p.grad / 3 for n, p in trained.named_parameters() if p.grad is not None}
    return {
        "grads": grads,
        "parts": {name: value / ranks.size for name, value in sums.items()},
        "accepted": ranks.gather_objects(float(found.parts["accepted"])),
    }


def as_one_of(stop: Stop, progress: Progress, **given: Any) -> dict[str, Any]:
    """`step` in a process of its own."""
    torch.set_num_threads(1)
    with as_rank(Ranks.from_environment(), CPU, stop=stop, progress=progress) as (ranks, _):
        return step(ranks, **given)
