"""What each codec keeps of a teacher's features, and what was tried for outlier channels.

    python -m benchmarks.codecs [--images 320]

On the demo's teacher and data; and on Gaussian features of 512 channels, three of them outliers as
in CLIP's embeddings (two far from zero, one ten times as loud).
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
    """[count, T, C] of the demo's teacher, whole images."""
    manifest = build_manifest(_DATA, seed=0).head(count)
    images, law = ImageSource(manifest, _DATA.parent), ViewSpec(28, hflip=0.0)
    spec = TeacherSpec("demo/teacher/config.json", "demo/teacher/model.safetensors", "imagenet")
    teacher = load_teacher(spec, device="cpu")
    pixels = []
    for row in range(count):
        image = decode(images.read(row))
        view = view_of(law, row, view=0, height=image.height, width=image.width)
        pixels.append(render(image, view, size=28))
    return teacher.targets(np.stack(pixels))[0].clone()


def outlier_features(count: int) -> torch.Tensor:
    """[count, 197, 512] Gaussian, with outlier channels."""
    features = torch.randn(count, 197, 512, generator=torch.Generator().manual_seed(0))
    features[..., 133] += 20
    features[..., 92] -= 8
    features[..., 7] *= 10
    return features


def cosines(codec, features: torch.Tensor, fitted: int) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    """(mean, worst) cosine of the features after `fitted` images, by a codec fitted to those."""
    held = features[fitted:]
    codes, scale = codec.encode(held)
    back = codec.decode(torch.from_numpy(codes), None if scale is None else torch.from_numpy(scale))
    cosine = torch.nn.functional.cosine_similarity(back, held, dim=-1)
    return float(cosine.mean()), float(cosine.min())


def ways_of_int8(features: torch.Tensor) -> list[tuple[str, float]]:
    """Mean 1 - cosine of int8 alone, with each channel's mean taken out, rotated, and as it is."""
    flat = features.flatten(0, 1)
    mean, channels = flat.mean(0), flat.shape[1]
    turn = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0].float()
    plain = Int8("int8", "int8", fill=-128, scaled=True).fitted(torch.ones(1, channels))

    def run_block(values: torch.Tensor) -> torch.Tensor:
        codes, scale = plain.encode(values)
        return plain.decode(torch.from_numpy(codes), torch.from_numpy(scale))

    fitted = CODECS["int8"].fitted(flat)
    codes, scale = fitted.encode(features)
    assert scale is not None
    ways = {
        "one scale a token": run_block(features),
        "channel means taken out": run_block(features - mean) + mean,
        "rotated": run_block(features @ turn) @ turn.T,
        "channel sizes divided out": fitted.decode(
            torch.from_numpy(codes), torch.from_numpy(scale)
        ),
    }
    near = torch.nn.functional.cosine_similarity
    return [(name, float(1 - near(w, features, dim=-1).mean())) for name, w in ways.items()]


def unturned(features: torch.Tensor, fitted: int) -> float:
    """Mean cosine of faiss's product quantiser at 16 bytes a token, on plain unit vectors."""
    import faiss

    units = torch.nn.functional.normalize(features, dim=-1)
    sample, held = (u.flatten(0, 1).numpy() for u in (units[:fitted], units[fitted:]))
    faiss.omp_set_num_threads(1)
    quantiser = faiss.ProductQuantizer(units.shape[-1], 16, 8)
    quantiser.train(sample)
    back = torch.from_numpy(quantiser.decode(quantiser.compute_codes(held)))
    return float(torch.nn.functional.cosine_similarity(back, torch.from_numpy(held)).mean())


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
        made = codec.fitted(features[:fitted].flatten(0, 1))
        mean, worst = cosines(made, features, fitted)
        size = made.width(features.shape[2]) * np.dtype(made.dtype).itemsize + 4 * made.scaled
        lines.append(f"| {name} | {size} | {mean:.6f} | {worst:.6f} |")
    lines += ["", f"pq:16 without the rotation: {unturned(features, fitted):.6f}."]
    lines += ["", "int8, mean 1 - cosine:", "", "| how | demo | outliers |", "|---|---|---|"]
    pairs = zip(ways_of_int8(features), ways_of_int8(outlier_features(64)), strict=True)
    lines += [f"| {name} | {a:.1e} | {b:.1e} |" for (name, a), (_, b) in pairs]
    command = f"python -m benchmarks.codecs --images {args.images}"
    report("codecs", command, lines, keep=args.keep)


if __name__ == "__main__":
    main()
