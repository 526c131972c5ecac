"""Before the first shard: the teacher runs on a sample of images, for three purposes.

- The codec is fitted to its output (channel sizes, codebooks).
- The codec's fidelity to its output is measured, on images that the codec was not fitted to.
- A few images become canaries: the store keeps their pixels and the teacher's output, so that a
  later run can check that its teacher is the same.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from milan.core.ahead import Ahead
from milan.core.machine import cpu_count, decoding_threads
from milan.core.paths import AnyPath
from milan.core.rng import mask_noise
from milan.errors import CacheError, ImageFault, TeacherError
from milan.images.source import ImageSource
from milan.images.views import ViewSpec, pack, render, unpack, view_of
from milan.models.masking import importance_mask, visible_count
from milan.store.codecs import Codec, codec_of
from milan.store.format import CacheSpec
from milan.store.generation import read_array
from pipeline.extraction.worker import raise_faults, target_faults
from pipeline.teachers.load import Teacher

# Images: to fit a codec, to fit codebooks, to measure fidelity, canaries.
_FIT, _FIT_PQ, _MEASURE, CANARIES = 32, 256, 32, 4
# Relative error of a token's features that another kernel or library may cause, by precision.
_TOLERANCE = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}


@dataclass
class Prepared:
    """The content of a new generation beside its spec."""

    codec: Codec
    fidelity: dict[str, Any]
    canaries: dict[str, np.ndarray]

    def tables(self) -> dict[str, np.ndarray]:
        """The arrays that the store keeps, by name."""
        codec = {f"codec/{name}": values for name, values in self.codec.tables.items()}
        return codec | {f"canary/{name}": values for name, values in self.canaries.items()}


def prepare(
    spec: CacheSpec, source: ImageSource, teacher: Teacher, *, batch: int, codec: Codec | None
) -> Prepared:
    """Fit, measure and keep canaries, on the first images that can be decoded (rows are shuffled).

    `codec` is that of the layer's first generation, if there is one: then no codec is fitted.
    Raises TeacherError for targets that are not finite.
    """
    unfitted = codec_of(spec.codec)
    if not spec.has_targets:
        return Prepared(unfitted, {}, {})
    fit_images = _FIT_PQ if unfitted.coded else _FIT
    rows, views = _first_views(spec, source, fit_images + _MEASURE)
    if not len(views):
        # No image can be decoded: the run will list them all as rejected.
        return Prepared(codec or unfitted.fitted(torch.eye(spec.channels)), {}, {})
    batches = np.array_split(views, -(-len(views) // batch))
    outputs = [teacher.targets(pixels) for pixels in batches]
    features = torch.cat([f.cpu() for f, _ in outputs]).clone()
    attention = torch.cat([a.cpu() for _, a in outputs]).clone()
    raise_faults(target_faults(features, attention).numpy(), rows)
    # Half of a small sample is for measuring; a single image is for both.
    cut = min(fit_images, len(views) // 2) if len(views) > 1 else 1
    codec = codec or unfitted.fitted(features[:cut].flatten(0, 1))
    measured = slice(cut if len(views) > 1 else 0, None)
    canary_features, canary_attention = teacher.targets(views[:CANARIES])
    canaries = {
        "pixels": views[:CANARIES],
        "features": canary_features.cpu().numpy().astype(np.float32),
        "attention": canary_attention.cpu().numpy().astype(np.float32),
    }
    return Prepared(codec, fidelity(codec, features[measured], attention[measured]), canaries)


def fidelity(codec: Codec, features: torch.Tensor, attention: torch.Tensor) -> dict[str, Any]:
    """How near stored targets are to the teacher's own: features [B, T, C], attention [B, N].

    `cosine` per token (mean, 1st percentile, worst) for class and patch tokens; `loss_floor`, the
    loss 2 - 2 cos of a student that predicts the teacher's features exactly; `attention_rank`,
    Spearman's correlation of stored and true attention; `mask_overlap`, the share of visible
    patches that masks sampled from either have in common.
    """
    decoded = codec.decode(*codec.encode(features))
    cosine = torch.nn.functional.cosine_similarity(decoded, features, dim=-1).double().clamp(max=1)
    stored = torch.from_numpy(attention.numpy().astype(np.float32))
    ranks, stored_ranks = (a.argsort(1).argsort(1).double() for a in (attention, stored))
    centred, stored_centred = (r - r.mean(1, keepdim=True) for r in (ranks, stored_ranks))
    rank = torch.nn.functional.cosine_similarity(centred, stored_centred, dim=1)
    rows = np.arange(len(features))
    noise = torch.from_numpy(mask_noise(0, rows * 0, rows, rows * 0, attention.shape[1]))
    visible = visible_count(attention.shape[1], 0.75) if attention.shape[1] > 3 else 1
    masks = [importance_mask(a, noise, visible=visible).boolean() for a in (attention, stored)]
    both = (~masks[0] & ~masks[1]).sum() / (~masks[0]).sum()
    return {
        "images": len(features),
        "codec": codec.name,
        "cosine": {"class": _spread(cosine[:, :1]), "patch": _spread(cosine[:, 1:])},
        "loss_floor": float((2 - 2 * cosine).mean()),
        "attention_rank": float(rank.mean()),
        "mask_overlap": float(both),
    }


_CLOSER = {
    "pq": "pq with more bytes a token, or --codec int8",
    "int8": "--codec float16, or a smaller --min-cosine",
    "float16": "a smaller --min-cosine: no codec is closer",
}


def check_min_cosine(report: dict[str, Any], minimum: float | None) -> None:
    """Raises CacheError if the mean cosine of class or patch tokens is below `minimum`."""
    if minimum is None or not report:
        return
    means = {kind: spread["mean"] for kind, spread in report["cosine"].items()}
    worst = min(means, key=lambda kind: means[kind])
    if means[worst] < minimum:
        raise CacheError(
            f"codec {report['codec']} keeps {worst} tokens at a mean cosine of {means[worst]:.5f}",
            expected=f"at least {minimum} (--min-cosine)",
            fix=_CLOSER[str(report["codec"]).partition(":")[0]],
        )


def check_canaries(root: AnyPath, teacher: Teacher) -> None:
    """Compare the teacher's output with that of the canaries in the generation at `root`.

    Raises TeacherError if the relative error of a token's features, or of an image's attention, is
    larger than other kernels and libraries can explain (_TOLERANCE).
    """
    if not (root / "canary").is_dir():
        return
    names = ("pixels", "features", "attention")
    canaries = {n: read_array(root / "canary" / n) for n in names}
    features, attention = teacher.targets(canaries["pixels"])
    bound = _TOLERANCE[teacher.identity["precision"]]
    for name, output in (("features", features), ("attention", attention)):
        stored = torch.from_numpy(canaries[name])
        error = (output.cpu().float() - stored).norm(dim=-1) / stored.norm(dim=-1)
        if not float(error.max()) <= bound:
            raise TeacherError(
                f"the teacher's {name} of the store's canary images are off by "
                f"{float(error.max()):.2g} (relative)",
                expected=f"at most {bound:.0e}: the teacher of {root.parent.parent}",
                fix="the same weight file, device and libraries, or --out another.zarr",
            )


def _first_views(spec: CacheSpec, source: ImageSource, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(rows [n], pixels uint8 [n, H, W, 3]): first views of the first n <= `count` images.

    Images that cannot be decoded are skipped.
    """
    view_spec = ViewSpec.from_law(spec.view_law)
    rows: list[int] = []
    views: list[np.ndarray] = []

    def first_view(row: int) -> np.ndarray | None:
        try:
            image = view_spec.decode(source.read(row))
        except ImageFault:
            return None
        address = {"view": spec.first_view, "height": image.shape[0], "width": image.shape[1]}
        view = view_of(view_spec, spec.first_row + row, **address)
        pixels = render(image, view, size=view_spec.size)
        stored = spec.stored_views
        return pixels if stored == "none" else unpack(pack(pixels, stored))

    threads, tried = decoding_threads(cpu_count()), range(min(spec.rows, 2 * count))
    with ThreadPoolExecutor(threads) as pool, Ahead(first_view, tried, pool, 2 * threads) as ahead:
        for row, pixels in enumerate(ahead):
            if pixels is not None:
                rows.append(spec.first_row + row)
                views.append(pixels)
            if len(views) == count:
                break
    empty = np.empty((0, *view_spec.shape, 3), np.uint8)
    return np.array(rows, np.int64), np.stack(views) if views else empty


def _spread(cosine: torch.Tensor) -> dict[str, float]:
    flat = cosine.flatten()
    return {
        "mean": float(flat.mean()),
        "p01": float(flat.quantile(0.01)) if flat.numel() < 1 << 24 else float(flat.min()),
        "worst": float(flat.min()),
    }
