"""How close each codec's features are to the teacher's, and what was tried for outlier channels.

    python -m benchmarks.codecs [--images 320]

Measured on the demo's teacher and data, and on Gaussian features of 512 channels, three of them
outliers as in CLIP's embeddings: two far from zero, one ten times as large.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.measure import parser, report
from milan.images.decode import decode
from milan.images.manifest import build_manifest
from milan.images.source import ImageSource
from milan.images.views import ViewSpec, render, view_of
from milan.store.codecs import CODECS, Int8
from pipeline.teachers.load import load_teacher
from pipeline.teachers.spec import TeacherSpec

_DATA = Path(__file__).resolve().parent.parent / "demo" / "data" / "test.parquet"


def demo_features(count: int) -> torch.Tensor:
    """Features [count, T, C] float32 of the demo's teacher, of whole images."""
    manifest = build_manifest(_DATA, seed=0).head(count)
    images, view_spec = ImageSource(manifest, _DATA.parent), ViewSpec(28, hflip=0.0)
    spec = TeacherSpec("demo/teacher/config.json", "demo/teacher/model.safetensors", "imagenet")
    teacher = load_teacher(spec, device="cpu")
    pixels = []
    for row in range(count):
        image = decode(images.read(row))
        view = view_of(view_spec, row, view=0, height=image.height, width=image.width)
        pixels.append(render(image, view, size=28))
    return teacher.targets(np.stack(pixels))[0].clone()


def outlier_features(count: int) -> torch.Tensor:
    """Gaussian features [count, 197, 512], with outlier channels."""
    features = torch.randn(count, 197, 512, generator=torch.Generator().manual_seed(0))
    features[..., 133] += 20
    features[..., 92] -= 8
    features[..., 7] *= 10
    return features


def cosines(codec, features: torch.Tensor, fitted: int) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """(mean, worst) cosine of the images after the first `fitted`, which fitted the codec."""
    unseen = features[fitted:]
    decoded = codec.decode(*codec.encode(unseen))
    cosine = torch.nn.functional.cosine_similarity(decoded, unseen, dim=-1)
    return float(cosine.mean()), float(cosine.min())


def ways_of_int8(features: torch.Tensor) -> list[tuple[str, float]]:
    """Mean 1 - cosine of int8: plain, with channel means removed, rotated, and as it is used."""
    flat = features.flatten(0, 1)
    mean, channels = flat.mean(0), flat.shape[1]
    rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0].float()
    plain = Int8("int8", "int8", fill=-128, scaled=True).fitted(torch.ones(1, channels))

    def round_trip(values: torch.Tensor) -> torch.Tensor:
        return plain.decode(*plain.encode(values))

    fitted = CODECS["int8"].fitted(flat)
    ways = {
        "one scale a token": round_trip(features),
        "channel means taken out": round_trip(features - mean) + mean,
        "rotated": round_trip(features @ rotation) @ rotation.T,
        "channel sizes divided out": fitted.decode(*fitted.encode(features)),
    }
    similarity = torch.nn.functional.cosine_similarity
    return [(name, float(1 - similarity(w, features, dim=-1).mean())) for name, w in ways.items()]


def without_rotation(features: torch.Tensor, fitted: int) -> float:
    """Mean cosine of faiss's product quantiser at 16 bytes a token, on plain unit vectors."""
    import faiss

    units = torch.nn.functional.normalize(features, dim=-1)
    sample, unseen = (u.flatten(0, 1).numpy() for u in (units[:fitted], units[fitted:]))
    faiss.omp_set_num_threads(1)
    quantiser = faiss.ProductQuantizer(units.shape[-1], 16, 8)
    quantiser.train(sample)
    decoded = torch.from_numpy(quantiser.decode(quantiser.compute_codes(unseen)))  # type: ignore
    return float(torch.nn.functional.cosine_similarity(decoded, torch.from_numpy(unseen)).mean())


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--images", type=int, default=320)
    args = flags.parse_args()
    torch.manual_seed(0)
    features = demo_features(args.images)
    fitted = args.images * 4 // 5
    lines = ["| codec | bytes a token | mean cosine | worst |", "|---|---|---|---|"]
    for name, codec in CODECS.items():
        if codec.coded and features.shape[2] % codec.width(128):
            continue
        fitted_codec = codec.fitted(features[:fitted].flatten(0, 1))
        mean, worst = cosines(fitted_codec, features, fitted)
        codes = fitted_codec.width(features.shape[2])
        size = codes * np.dtype(codec.dtype).itemsize + 4 * codec.scaled
        lines.append(f"| {name} | {size} | {mean:.6f} | {worst:.6f} |")
    lines += ["", f"pq:16 without the rotation: {without_rotation(features, fitted):.6f}."]
    lines += ["", "int8, mean 1 - cosine:", "", "| how | demo | outliers |", "|---|---|---|"]
    pairs = zip(ways_of_int8(features), ways_of_int8(outlier_features(64)), strict=True)
    lines += [f"| {name} | {a:.1e} | {b:.1e} |" for (name, a), (_, b) in pairs]
    command = f"python -m benchmarks.codecs --images {args.images}"
    report("codecs", command, lines, keep=args.keep)


if __name__ == "__main__":
    main()
