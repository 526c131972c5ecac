"""What reading costs: random rows, windows, targets in the loader, memory.

    python -m benchmarks.reading [--rounds 7]

Targets are artificial, [197, 512] int8 in shards of 1,024 rows, in a warm page cache. Random:
batches of 64 rows by TargetCache.read (features, scale, attention, all verified), against
tensorstore itself and zarr-python's `oindex`, which read the same rows of the same three arrays and
verify less. Window: all rows of a store in training order, against read() of the shard files into
fresh memory. Loader: photographs with targets, against the same without targets. A core: micro-
batches of 64 with targets and noise, of originals against ImageFolder's normalised floats, and of
stored views against the same views opened, decoded and compared by Pillow one by one, as milan did
before; in processor time, one process, files in the page cache. Memory: peak of a process that
opens a store, loads its manifest and order and reads 100 batches.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import torch
import zarr
from torchvision.datasets import ImageFolder

from benchmarks.images import theirs
from benchmarks.measure import interleaved, parser, photos, ratio, report
from benchmarks.synthetic import make_store
from milan.data.dataset import CachedDataset, open_cache
from milan.data.loader import CachedBatches, training_loader
from milan.data.order import order_of
from milan.data.sampler import Address, Kind, StepSampler
from milan.images.formats import open_picture
from milan.images.manifest import SCHEMA, Manifest, build_manifest
from milan.store.cache import TargetCache, Targets
from milan.store.generation import open_array

_ARRAYS = ("features", "scale", "attention")
_BATCH = 64


def numbered(rows: int) -> Manifest:
    """A manifest of `rows` images that do not exist."""
    keys = [f"class {i % 1000:03d}/image {i:09d}.jpg" for i in range(rows)]
    none: list[Any] = [None] * rows
    columns = dict.fromkeys(SCHEMA.names, none) | {"key": keys, "path": keys}
    return Manifest(pa.table(columns, schema=SCHEMA))


def random_rows(store: Path) -> dict[str, Callable[[], None]]:
    """Functions that read eight batches of 64 random rows, by each reader."""
    cache = TargetCache(store)
    root = cache.root
    raw = {name: open_array(root / name) for name in _ARRAYS}
    plain = {name: zarr.open_array(root / name, mode="r") for name in _ARRAYS}
    views = np.zeros(_BATCH, np.int64)
    rngs = {name: np.random.default_rng(0) for name in ("ours", "tensorstore", "oindex")}

    def batches(reader: str) -> list[np.ndarray]:
        # New rows in every round: rows just read would come from the reader's own cache.
        return [np.sort(rngs[reader].choice(cache.rows, _BATCH, replace=False)) for _ in range(8)]

    def ours() -> None:
        for rows in batches("ours"):
            cache.read(rows, views)

    def tensorstore() -> None:
        for rows in batches("tensorstore"):
            futures = [array[rows, views].read() for array in raw.values()]
            for future in futures:
                future.result()

    def oindex() -> None:
        for rows in batches("oindex"):
            for array in plain.values():
                _ = array.oindex[rows, 0]

    return {"ours": ours, "tensorstore": tensorstore, "oindex": oindex}


def windows(store: Path) -> dict[str, Callable[[], None]]:
    """Functions that read a whole store in training order, and as plain files."""
    cache = TargetCache(store)
    rows, views = order_of(cache, seed=0, batch_size=_BATCH).epoch(0)
    files = [
        p
        for name in _ARRAYS
        for p in sorted((Path(str(cache.root)) / name / "c").rglob("*"))
        if p.is_file()
    ]

    def ours() -> None:
        for at in range(0, len(rows), _BATCH):
            cache.read(rows[at : at + _BATCH], views[at : at + _BATCH])

    def plain() -> None:
        for file in files:
            file.read_bytes()

    return {"ours": ours, "read()": plain}


class _NoTargets(TargetCache):
    """Has crops and checksums, but reads no targets."""

    def read(self, rows: np.ndarray, views: np.ndarray, **_: bool) -> Any:
        return Targets(np.ones((len(rows), 196), np.float32))


def loader_rate(store: Path, targets: bool, epochs: int) -> float:
    """Images/s of one loader worker, from the first batch on, with or without `targets`."""
    dataset = open_cache(store)
    if not targets:
        dataset.cache.__class__ = _NoTargets
    order = order_of(dataset.cache, seed=0, batch_size=32)
    sampler = StepSampler(order, start=0, stop=epochs * order.steps, micro=32)
    loader = iter(training_loader(dataset, sampler, features=True, num_workers=1))
    next(loader)
    start = time.perf_counter()
    count = sum(len(batch.rows) for batch in loader)
    return count / (time.perf_counter() - start)


class _RowByRow(CachedDataset):
    """Reads stored views as milan did before: each by itself, decoded by Pillow."""

    def pixels(self, rows: np.ndarray, views: np.ndarray, seen: Any = None) -> np.ndarray:
        out = np.empty((len(rows), 224, 224, 3), np.uint8)
        for i in range(len(rows)):
            row, view = rows[i : i + 1], views[i : i + 1]
            out[i] = np.asarray(open_picture(self.cache.packed(row, view)[0]).convert("RGB"))
            checksum = google_crc32c.value(out[i].tobytes())
            assert checksum == self.cache.checksum(int(row[0]), int(view[0]))
        return out


def a_core(originals: Path, stored: Path, folder: ImageFolder) -> dict[str, Callable[[], None]]:
    """Functions that load every view once: ours, and what it is compared with."""

    def batches(dataset: CachedDataset) -> Callable[[], None]:
        source = CachedBatches(dataset, 0, True, None)
        rows = np.random.default_rng(0).permutation(dataset.good)

        def load() -> None:
            for at in range(0, len(rows), _BATCH):
                batch = rows[at : at + _BATCH]
                source.load(Address(Kind.TRAIN, 0, batch, np.zeros_like(batch)))

        return load

    def image_folder() -> None:
        for i in range(len(folder)):
            _ = folder[i]

    return {
        "ImageFolder": image_folder,
        "originals": batches(open_cache(originals)),
        "row by row": batches(_RowByRow(TargetCache(stored))),
        "stored views": batches(open_cache(stored)),
    }


def peak(store: Path, reading: bool) -> float:
    """Peak resident MB of a process that opens a store, and with `reading` reads from it."""
    code = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from milan.store.cache import TargetCache; from milan.data.order import *\n"
        "from milan.data.sampler import StepSampler\n"
        "cache = TargetCache(sys.argv[1]); cache.manifest\n"
        "if sys.argv[2] == 'True':\n"
        "    order = order_of(cache, seed=0, batch_size=64)\n"
        "    steps = min(100, order.steps * 20)\n"
        "    for _, _, rows, views, _ in StepSampler(order, start=0, stop=steps, micro=64):\n"
        "        cache.read(rows, views)\n"
        "status = Path('/proc/self/status').read_text()\n"
        "print(status.split('VmHWM:')[1].split()[0])\n"
    )
    command = [sys.executable, "-c", code, str(store), str(reading)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout) / 1000


def main() -> None:
    """Measure and print."""
    args = parser(__doc__.splitlines()[0]).parse_args()
    lines = ["| what | ratio (range) | goal |", "|---|---|---|"]
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:
        folder = Path(name)
        store = make_store(folder / "4.zarr", numbered(4096), shard_size=1024)
        contenders = random_rows(store)
        # Separately: zarr's copies would evict the other readers' data from the CPU's caches.
        for other, goal, rounds in (("oindex", "10", 1), ("tensorstore", "0.7", 4)):
            pair = {name: contenders[name] for name in (other, "ours")}
            seconds = interleaved(pair, rounds * args.rounds)
            rate = ratio(seconds[other], seconds["ours"])
            lines.append(f"| random rows: {other} / ours, seconds | {rate} | >= {goal} |")
        each = statistics.median(seconds["ours"]) / 8 * 1e3
        seconds = interleaved(windows(store), args.rounds)
        rate = ratio(seconds["read()"], seconds["ours"])
        lines.append(f"| window order: read() / ours, seconds | {rate} | >= 0.3 |")
        source = photos(folder / "photos", 96)
        manifest = build_manifest(source, seed=0)
        photo_store = make_store(
            folder / "photos.zarr", manifest, shard_size=len(manifest), root=source
        )
        rates: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(args.rounds):
            for targets in rates:
                rates[targets].append(loader_rate(photo_store, targets, 12))
        rate = ratio(rates[True], rates[False])
        lines.append(f"| loader: with / without targets, images/s | {rate} | >= 0.95 |")
        kept = make_store(
            folder / "kept.zarr", manifest, shard_size=len(manifest), root=source,
            stored_views="jpeg:95",
        )  # fmt: skip
        torch.set_num_threads(1)
        theirs_folder = theirs(source, floats=True)
        seconds = interleaved(a_core(photo_store, kept, theirs_folder), args.rounds, clock="cpu")
        for other, ours, goal in (
            ("ImageFolder", "originals", "1.5"), ("row by row", "stored views", "1.84"),
        ):  # fmt: skip
            rate = ratio(seconds[other], seconds[ours])
            lines.append(f"| a core: {other} / {ours}, seconds | {rate} | >= {goal} |")
        core = {
            name: len(theirs_folder) / statistics.median(times) for name, times in seconds.items()
        }
        small = make_store(folder / "s.zarr", numbered(1024), shard_size=1024)
        large = make_store(folder / "l.zarr", numbered(1_024_000), shard_size=1024)
        manifests = peak(large, False) - peak(small, False)
        few, many = peak(small, True), peak(large, True)
        lines.append(
            f"| memory: 1,024,000 rows ({many:.0f} MB, {manifests:.0f} of them opening and "
            f"manifest) / 1,024 rows ({few:.0f} MB) | {(many - manifests) / few:.2f} | <= 1.3 |"
        )
    lines += ["", f"A batch of 64 rows takes {each:.1f} ms. A core loads, in images/s:", ""]
    lines += [f"- {name}: {rate:,.0f}" for name, rate in core.items()]
    command = f"python -m benchmarks.reading --rounds {args.rounds}"
    report("reading", command, lines, keep=args.keep)


if __name__ == "__main__":
    # Loader workers know the classes of this file by its name, not as those of a script.
    from benchmarks import reading

    reading.main()
