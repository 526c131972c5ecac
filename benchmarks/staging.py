"""What an extraction does beside decoding and the teacher: arrays, checksums, shards.

    python -m benchmarks.staging [--rows 512]

A shard of int8 features [197, 512], written by us and by zarr-python to the same bytes. Then a
block of views whose pixels are ready and whose features cost nothing: views a second, and the share
of the feeding thread's time in which it writes a shard itself.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from benchmarks.measure import interleaved, parser, ratio, report
from benchmarks.reading import numbered
from milan.images.views import ViewSpec
from milan.store.codecs import Codec, Int8
from milan.store.format import CacheSpec
from pipeline.extraction import worker
from pipeline.extraction.growth import Part
from pipeline.extraction.hardware import Workers
from pipeline.teachers.load import Teacher
from pipeline.writing.shards import _write_arrays, create_arrays

_BATCH, _TOKENS, _CHANNELS = 64, 197, 512


def by_zarr(folder: Path, spec: CacheSpec, arrays: dict[str, np.ndarray]) -> None:
    """One shard, as zarr-python writes it."""
    for name, values in arrays.items():
        array = zarr.open_array(folder / name, config={"write_empty_chunks": False})
        array[0 : len(values), 0] = values


class FreeTeacher(Teacher):
    """Its features are there before it is asked."""

    def __init__(self) -> None:
        self.identity, self.texts, self.channels = {}, None, _CHANNELS
        self.features = torch.zeros(_BATCH, _TOKENS, _CHANNELS)
        self.attention = torch.rand(_BATCH, _TOKENS - 1) + 0.1

    def targets(self, pixels: np.ndarray | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same each time."""
        return self.features[: len(pixels)], self.attention[: len(pixels)]


class FreeCodec(Int8):
    """Its codes are there as well: a GPU computes them."""

    def encode(self, features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Random codes."""
        n = len(features)
        return _CODES[:n], np.ones((n, _TOKENS), np.float32)


_CODES = np.random.default_rng(0).integers(-127, 128, (_BATCH, _TOKENS, _CHANNELS), np.int8)


def feed(spec: CacheSpec, codec: Codec, folder: Path) -> tuple[float, float]:
    """(views a second, share of the feeding thread's time spent on shards) of four blocks."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    extractor = worker.Extractor(
        part=Part("000", spec, numbered(spec.rows)),
        codec=codec, root=str(folder), teacher=FreeTeacher(), device="cpu", batch_size=_BATCH,
        workers=Workers(1, 1, None),
    )  # fmt: skip
    pixels = np.zeros((1, 224, 224, 3), np.uint8)
    ready: dict[str, Any] = {"pixels": pixels, "crops": np.zeros((1, 5), np.int32), "digest": "d"}
    extractor._images = lambda rows: (worker._Rendered(row, **ready) for row in rows)  # type: ignore
    feeding, compute = [0.0], extractor._compute

    def timed(block: int) -> Any:
        began = time.perf_counter()
        computed = compute(block)
        feeding[0] += time.perf_counter() - began
        return computed

    extractor._compute = timed  # type: ignore[method-assign]
    began = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda b: extractor.run(b, [0], str(folder)), range(spec.blocks)))
    seconds = time.perf_counter() - began
    return spec.rows / seconds, max(0.0, 1 - feeding[0] / seconds)


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--rows", type=int, default=512)
    args = flags.parse_args()
    spec = CacheSpec(
        manifest="", rows=4 * args.rows, views=1, tokens=_TOKENS, channels=_CHANNELS, codec="int8",
        shard_size=args.rows, view_law=ViewSpec().law(), teacher={},
    )  # fmt: skip
    rng = np.random.default_rng(0)
    arrays = {
        "features": rng.integers(-127, 128, (args.rows, _TOKENS, _CHANNELS), np.int8),
        "scale": rng.random((args.rows, _TOKENS), np.float32),
        "attention": rng.random((args.rows, _TOKENS - 1), np.float32) + 0.1,
        "crop": np.ones((args.rows, 5), np.int32),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "shard")

        def fresh() -> Path:
            shutil.rmtree(folder, ignore_errors=True)
            create_arrays(folder, spec, {}, {})
            return folder

        cpu = interleaved(
            {
                "zarr": lambda: by_zarr(fresh(), spec, arrays),
                "ours": lambda: _write_arrays(fresh(), spec, 0, 0, arrays),
            },
            args.rounds,
            clock="cpu",
        )
        codec = FreeCodec("int8", "int8", fill=-128, scaled=True)
        rates = [feed(spec, codec, Path(name, "fed")) for _ in range(args.rounds)]
    views, share = (float(np.median(values)) for values in zip(*rates, strict=True))
    each = {who: 1000 * float(np.median(s)) / args.rows for who, s in cpu.items()}
    lines = [
        f"A view of a shard: {each['zarr']:.2f} ms of a core by zarr-python, {each['ours']:.2f} by "
        f"tensorstore, {ratio(cpu['zarr'], cpu['ours'])} times less.",
        f"A free teacher: {views:,.0f} views/s; the feeding thread waits for shards "
        f"{share:.1%} of the time.",
    ]
    report("staging", "python -m benchmarks.staging", lines, keep=args.keep)


if __name__ == "__main__":
    main()
