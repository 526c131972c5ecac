"""Before the first shard: a sample of images is shown to the teacher, and three things are made.

- The codec is fitted to it (channel sizes, codebooks).
- The codec's fidelity is measured against the teacher's own output on images held back from that.
- A few images become canaries: their pixels and what the teacher says of them lie in the store, so
  that a later run can tell whether its teacher still says the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from milan.core.paths import AnyPath
from milan.core.rng import mask_noise
from milan.errors import CacheError, ImageFault, TeacherError
from milan.images.decode import decode
from milan.images.source import ImageSource
from milan.images.views import ViewSpec, pack, render, unpack, view_of
from milan.models.masking import importance_mask, visible_count
from milan.store.codecs import Codec, codec_of
from milan.store.format import CacheSpec
from milan.store.generation import open_array
from pipeline.extraction.worker import check_targets
from pipeline.teachers.load import Teacher

_FITTED, _FITTED_PQ, _HELD_BACK, CANARIES = 32, 256, 32, 4
# Relative error of a token's features that another kernel or library may cause.
_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}


@dataclass
class Prepared:
    """What a generation starts with beside its spec."""

    codec: Codec
    fidelity: dict[str, Any]
    canaries: dict[str, np.ndarray]

    def tables(self) -> dict[str, np.ndarray]:
        """Arrays by name, as a store keeps them."""
        kept = {f"codec/{name}": values for name, values in self.codec.tables.items()}
        return kept | {f"canary/{name}": values for name, values in self.canaries.items()}


def prepare(
    spec: CacheSpec, source: ImageSource, teacher: Teacher, *, batch: int, codec: Codec | None
) -> Prepared:
    """Fit, measure and keep canaries, on the first images that can be decoded (rows are shuffled).

    `codec` is that of an earlier generation, which stays.
    """
    fresh = codec_of(spec.codec)
    fitted = _FITTED_PQ if fresh.coded else _FITTED
    rows, views = _first_views(spec, source, fitted + _HELD_BACK)
    if not len(views):
        # Not one image to look at: the run itself will say so, image by image.
        return Prepared(codec or fresh.fitted(torch.eye(spec.channels)), {}, {})
    said = [teacher.targets(part) for part in np.array_split(views, -(-len(views) // batch))]
    features = torch.cat([f.cpu() for f, _ in said]).clone()
    attention = torch.cat([a.cpu() for _, a in said]).clone()
    check_targets(features, attention, rows)
    # Half of a small sample is held back; of a single image, the same is measured on.
    cut = min(fitted, len(views) // 2) if len(views) > 1 else 1
    codec = codec or fresh.fitted(features[:cut].flatten(0, 1))
    held = slice(cut if len(views) > 1 else 0, None)
    few = views[:CANARIES]
    told, seen = teacher.targets(few)
    canaries = {
        "pixels": few,
        "features": told.cpu().numpy().astype(np.float32),
        "attention": seen.cpu().numpy().astype(np.float32),
    }
    return Prepared(codec, fidelity(codec, features[held], attention[held]), canaries)


def fidelity(codec: Codec, features: torch.Tensor, attention: torch.Tensor) -> dict[str, Any]:
    """How near stored targets are to the teacher's own: features [B, T, C], attention [B, N].

    `cosine` per token (mean, 1st percentile, worst) for class and patch tokens; `loss_floor`, the
    2 - 2 cos that a perfect student would still show; `attention_rank`, Spearman's correlation of
    stored and true attention; `mask_overlap`, the share of visible patches that masks drawn from
    either have in common.
    """
    codes, scale = codec.encode(features)
    back = codec.decode(torch.from_numpy(codes), None if scale is None else torch.from_numpy(scale))
    cosine = torch.nn.functional.cosine_similarity(back, features, dim=-1).double().clamp(max=1)
    kept = torch.from_numpy(attention.numpy().astype(np.float32))
    ranks, kept_ranks = (a.argsort(1).argsort(1).double() for a in (attention, kept))
    centred, kept_centred = (r - r.mean(1, keepdim=True) for r in (ranks, kept_ranks))
    rank = torch.nn.functional.cosine_similarity(centred, kept_centred, dim=1)
    rows = np.arange(len(features))
    noise = torch.from_numpy(mask_noise(0, rows * 0, rows, rows * 0, attention.shape[1]))
    visible = visible_count(attention.shape[1], 0.75) if attention.shape[1] > 3 else 1
    masks = [importance_mask(a, noise, visible=visible).boolean() for a in (attention, kept)]
    both = (~masks[0] & ~masks[1]).sum() / (~masks[0]).sum()
    return {
        "images": len(features),
        "codec": codec.name,
        "cosine": {"class": _spread(cosine[:, :1]), "patch": _spread(cosine[:, 1:])},
        "loss_floor": float((2 - 2 * cosine).mean()),
        "attention_rank": float(rank.mean()),
        "mask_overlap": float(both),
    }


def check_min_cosine(report: dict[str, Any], floor: float | None) -> None:
    """Raises CacheError if the mean cosine of class or patch tokens is below `floor`."""
    if floor is None or not report:
        return
    means = {kind: spread["mean"] for kind, spread in report["cosine"].items()}
    worst = min(means, key=lambda kind: means[kind])
    if means[worst] < floor:
        raise CacheError(
            f"codec {report['codec']} keeps {worst} tokens at a mean cosine of {means[worst]:.5f}",
            expected=f"at least {floor} (--min-cosine)",
            fix="--codec int8 or float16, or pq with more bytes a token",
        )


def check_canaries(root: AnyPath, teacher: Teacher) -> None:
    """Compare the teacher with what it said of the canaries in the generation at `root`.

    Raises TeacherError if the relative error of a token's features, or of attention, is beyond
    what kernels and libraries may differ by.
    """
    if not (root / "canary").is_dir():
        return
    names = ("pixels", "features", "attention")
    kept = {n: np.asarray(open_array(root / "canary" / n).read().result()) for n in names}
    features, attention = teacher.targets(kept["pixels"])
    bound = _TOLERANCE[teacher.identity["precision"]]
    for name, now in (("features", features), ("attention", attention)):
        before = torch.from_numpy(kept[name])
        error = (now.cpu().float() - before).norm(dim=-1) / before.norm(dim=-1)
        if not float(error.max()) <= bound:
            raise TeacherError(
                f"the teacher's {name} of the store's canary images are off by "
                f"{float(error.max()):.2g} (relative)",
                expected=f"at most {bound:.0e}: the teacher that made {root.parent.parent}",
                fix="the same weight file, device and libraries, or --out another.zarr",
            )


def _first_views(spec: CacheSpec, source: ImageSource, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows [n], pixels uint8 [n, S, S, 3]): first views of the first n <= count good images."""
    law = ViewSpec.from_law(spec.view_law)
    rows: list[int] = []
    found: list[np.ndarray] = []
    for row in range(min(spec.rows, 2 * count)):
        if len(found) == count:
            break
        try:
            image = decode(source.read(row))
        except ImageFault:
            continue
        address = {"view": spec.first_view, "height": image.height, "width": image.width}
        view = view_of(law, spec.first_row + row, **address)
        rows.append(spec.first_row + row)
        pixels = render(image, view, size=law.size)
        stored = spec.stored_views
        found.append(pixels if stored == "none" else unpack(pack(pixels, stored)))
    none = np.empty((0, law.size, law.size, 3), np.uint8)
    return np.array(rows, np.int64), np.stack(found) if found else none


def _spread(cosine: torch.Tensor) -> dict[str, float]:
    flat = cosine.flatten()
    return {
        "mean": float(flat.mean()),
        "p01": float(flat.quantile(0.01)) if flat.numel() < 1 << 24 else float(flat.min()),
        "worst": float(flat.min()),
    }
