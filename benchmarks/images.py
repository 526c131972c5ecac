"""Decoding and rendering in the loader, against torchvision's ImageFolder with RandomResizedCrop.

    python -m benchmarks.images [--images 96] [--rounds 7]

Both run in one process with one thread and files in the page cache, as one loader worker does.
ImageFolder decodes, crops at random (bicubic, 224 pixels), flips, and makes a normalised float
tensor, as the published loaders of MAE and MILAN do; a second variant stops at a uint8 tensor. Ours
decodes, replays the stored crop, compares the checksum, and leaves normalising to the device. Then
the parts of ours are timed, and decoding and resizing by torchvision and torch. Views are not
rendered by these, because torch's resize gives other pixels than Pillow's.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.io import ImageReadMode, decode_jpeg

from benchmarks.measure import interleaved, parser, photos, ratio, report
from benchmarks.synthetic import make_store
from milan.core.device import MEAN, STD
from milan.data.dataset import CachedDataset, open_cache
from milan.images.decode import decode
from milan.images.manifest import build_manifest
from milan.images.views import View, checksum, render


def theirs(folder: Path, *, floats: bool) -> ImageFolder:
    """ImageFolder with the published recipe's transform."""
    steps = [
        transforms.RandomResizedCrop(
            224, scale=(0.2, 1.0), interpolation=transforms.InterpolationMode.BICUBIC
        ),
        transforms.RandomHorizontalFlip(),
    ]
    if floats:
        steps += [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    else:
        steps += [transforms.PILToTensor()]
    return ImageFolder(str(folder), transforms.Compose(steps))


def parts(dataset: CachedDataset) -> dict[str, Callable[[], object]]:
    """Each part of ours by itself, and the same part by torchvision or torch."""
    rows = np.arange(len(dataset))
    crops = [View.of(crop) for crop in dataset.cache.crops(rows, np.zeros_like(rows))]
    files = [dataset.source.read(row) for row in rows.tolist()]
    pictures = [decode(data) for data in files]
    pixels = [render(p, v, size=224) for p, v in zip(pictures, crops, strict=True)]
    tensors = [torch.from_numpy(np.array(p)).permute(2, 0, 1)[None] for p in pictures]

    def decode_torchvision() -> None:
        for data in files:
            decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)

    def resize_torch() -> None:
        for tensor, v in zip(tensors, crops, strict=True):
            crop = tensor[..., v.top : v.top + v.height, v.left : v.left + v.width]
            crop = crop.contiguous(memory_format=torch.channels_last)
            interpolate(crop, size=(224, 224), mode="bicubic", antialias=True)

    return {
        "decode, Pillow": lambda: [decode(data) for data in files],
        "decode, torchvision": decode_torchvision,
        "crop and resize, Pillow": lambda: [
            render(p, v, size=224) for p, v in zip(pictures, crops, strict=True)
        ],
        "crop and resize, torch": resize_torch,
        "checksum": lambda: [checksum(p) for p in pixels],
    }


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--images", type=int, default=96)
    args = flags.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = photos(folder / "photos", args.images)
        files = [p for p in sorted(source.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
        (folder / "set" / "one").mkdir(parents=True)
        for number, file in enumerate(files[: args.images]):
            (folder / "set" / "one" / f"{number:04d}.jpg").symlink_to(file)
        manifest = build_manifest(folder / "set", seed=0)
        count = len(manifest)
        store = make_store(folder / "t.zarr", manifest, shard_size=count, root=folder / "set")
        dataset = open_cache(store)
        floats, bytes_ = (theirs(folder / "set", floats=f) for f in (True, False))
        rows, views = np.arange(count), np.zeros(count, np.int64)
        contenders: dict[str, Callable[[], object]] = {
            "ImageFolder, normalised floats": lambda: [floats[i] for i in range(count)],
            "ImageFolder, uint8": lambda: [bytes_[i] for i in range(count)],
            "ours": lambda: dataset.pixels(rows, views),
        }
        seconds = interleaved(contenders | parts(dataset), args.rounds)
    lines = ["| what | ms an image |", "|---|---|"]
    for what, times in seconds.items():
        lines.append(f"| {what} | {statistics.median(times) / count * 1e3:.2f} |")
    lines += ["", "ImageFolder / ours, seconds (range); the goal is 1.5:", ""]
    for what in list(contenders)[:2]:
        lines.append(f"- {what}: {ratio(seconds[what], seconds['ours'])}")
    command = f"python -m benchmarks.images --images {args.images} --rounds {args.rounds}"
    report("images", command, lines, keep=args.keep)


if __name__ == "__main__":
    main()
