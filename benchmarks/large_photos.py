"""Throughput of a loader on 12-megapixel photographs, with and without stored views.

    python -m benchmarks.large_photos [--images 24] [--rounds 7]

The data are JPEGs of 4000 x 3000 pixels: enlarged ImageNet photographs if they are present, else
smooth noise. Grain is added, so that the files are as large as those of cameras. A small random
teacher writes three stores: without stored views, with jpeg:95 and with webp. One loader worker
reads each in training order, files in the page cache, targets included. The core time of one view
is measured for both ways too, as `milan plan` does it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import parser, photos, ratio, report
from milan.core.progress import NoProgress
from milan.data.dataset import open_cache
from milan.data.loader import training_loader
from milan.data.order import order_of
from milan.data.sampler import StepSampler
from pipeline.config import ExtractConfig
from pipeline.estimate.decoding import measure_decoding
from pipeline.extract import extract_targets
from pipeline.extraction.plan import plan

WIDTH, HEIGHT = 4000, 3000
WAYS = ("none", "jpeg:95", "webp")
TEACHER = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 224, "layers": 1, "width": 32, "patch_size": 16, "head_width": 16},
    "text_cfg": {"context_length": 4, "vocab_size": 8, "width": 8, "heads": 1, "layers": 1},
}  # fmt: skip


def enlarge(source: Path, folder: Path, count: int) -> Path:
    """Write `count` photographs of 12 megapixels to `folder`, from those of `source`."""
    folder.mkdir()
    files = [p for p in sorted(source.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    for i in range(count):
        rng = np.random.default_rng(i)
        with Image.open(files[i % len(files)], formats=["JPEG"]) as image:
            large = image.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 4, (HEIGHT, WIDTH, 1)).astype(np.int8)
        pixels = np.clip(np.asarray(large).astype(np.int16) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.jpg", quality=90)
    return folder


def loader_rate(store: Path, epochs: int) -> float:
    """Images a second of one loader worker, from the first batch on."""
    dataset = open_cache(store)
    batch = min(8, len(dataset))
    order = order_of(dataset.cache, seed=0, batch_size=batch)
    sampler = StepSampler(order, start=0, stop=epochs * order.steps, micro=batch)
    loader = iter(training_loader(dataset, sampler, features=True, num_workers=1))
    next(loader)
    start = time.perf_counter()
    count = sum(len(batch.rows) for batch in loader)
    return count / (time.perf_counter() - start)


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--images", type=int, default=24)
    args = flags.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = enlarge(photos(folder / "small", args.images), folder / "large", args.images)
        each = statistics.mean(path.stat().st_size for path in data.iterdir())
        (folder / "teacher.json").write_text(json.dumps(TEACHER))
        config = ExtractConfig(
            str(data), out=str(folder / "plan.zarr"), views=1, executor="local",
            shard_size=args.images, teacher=str(folder / "teacher.json"), pretrained="none",
        )  # fmt: skip
        stores, sizes = {}, {}
        for way in WAYS:
            stores[way] = folder / f"{way}.zarr"
            summary = extract_targets(replace(config, out=str(stores[way]), store_views=way))
            pixels = stores[way] / "generations/000/pixels"
            sizes[way] = sum(p.stat().st_size for p in pixels.rglob("*") if p.is_file())
            assert not summary["bad"]
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for (
                way
            ) in WAYS:  # interleaved, so that a slow minute hits all; stored views need more epochs
                rates[way].append(loader_rate(stores[way], 3 if way == "none" else 30))
        parts = measure_decoding(plan(config, NoProgress()))
    assert parts is not None
    lines = [
        f"{args.images} photographs of {WIDTH} x {HEIGHT}, {each / 1e6:.1f} MB each; views of 224 "
        "pixels.",
        "",
        "| views are | images/s of a loader worker (range) | against originals | bytes a view |",
        "|---|---|---|---|",
    ]
    for way, measured in rates.items():
        low, middle, high = min(measured), statistics.median(measured), max(measured)
        spread = f"{middle:,.1f} ({low:,.1f} to {high:,.1f})"
        gain = ratio(measured, rates["none"])
        size = "" if way == "none" else f"{sizes[way] / args.images:,.0f}"
        what = "rendered from originals" if way == "none" else f"stored, {way}"
        lines.append(f"| {what} | {spread} | {gain} | {size} |")
    lines += [
        "",
        f"Core time of a view: {parts.original * 1e3:.1f} ms from an original, "
        f"{parts.stored * 1e3:.2f} ms as jpeg:95, {parts.bytes:,.0f} bytes (`milan plan`).",
    ]
    command = f"python -m benchmarks.large_photos --images {args.images} --rounds {args.rounds}"
    report("large_photos", command, lines, keep=args.keep)


if __name__ == "__main__":
    main()
