"""What the driver's bookkeeping costs when a store has very many shards.

    python -m benchmarks.bookkeeping [--shards 20000] [--rows 4]

A store on paper: records as the planner makes them up, of a few rows instead of 1,024, and no files
of arrays. Measured one after the other: what
has to be made of an empty generation; commits (record, digest, sizes; without moving files); what
a resumed run finds; finish; what the next run finds by the table of shards; opening the store and
touching one shard. Memory is what the process holds more at the peak of each step than before it,
as Linux counts it (pages of 4 KB), so Arrow's and the allocator's share is in it. Then one record
of 1,024 rows, written and parsed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import parser, report
from milan.images.manifest import Manifest, build_manifest
from milan.images.views import ViewSpec
from milan.store.cache import TargetCache
from milan.store.format import CacheSpec, canonical, record_name
from pipeline.estimate.size import made_up_record
from pipeline.writing.store import Store, Writer, group_attributes


def paper(shards: int, rows: int, manifest: str) -> CacheSpec:
    """A generation of `shards` blocks of `rows` images, one view."""
    return CacheSpec(
        manifest=manifest, rows=shards * rows, views=1, tokens=197, channels=512, codec="float16",
        shard_size=rows, view_law=ViewSpec(224).law(), teacher={"weights": "none"},
    )  # fmt: skip


def open_writer(store: Store, spec: CacheSpec, manifest: Manifest) -> Writer:
    """Its writer; the manifest is that of a few images, whatever the spec says."""
    files = {"manifest.parquet": manifest.to_parquet(), "fidelity.json": b"{}"}
    return store.generation(
        "generations/000", spec, lambda: (group_attributes(spec, {"name": "paper"}), {}, files)
    )


class Steps:
    """Times of steps, and what each holds at its peak."""

    def __init__(self) -> None:
        self.figures = dict[str, tuple[float, int]]()

    def run(self, name: str, step: Callable[[], Any]) -> Any:
        """Do a step and keep its seconds and bytes."""
        gc.collect()
        # What is free is given back, or a step would hide in what the one before it left.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _resident("VmRSS")
        started = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - started
        self.figures[name] = seconds, max(0, _resident("VmHWM") - before)
        return result


def _resident(name: str) -> int:
    """Bytes of this process in memory: now (VmRSS), or at the peak (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def bookkeeping(shards: int, rows: int, folder: Path) -> dict[str, tuple[float, int]]:
    """Seconds, and bytes at the peak, of each step by name."""
    (folder / "images").mkdir()
    (folder / "images" / "0.jpg").touch()
    manifest = build_manifest(folder / "images", seed=0)
    steps, path = Steps(), folder / "t.zarr"
    spec = paper(shards, rows, manifest.digest())
    store = Store(path)
    writer = steps.run("a writer", lambda: open_writer(store, spec, manifest))
    todo = steps.run("missing, of a new store", writer.missing)
    assert todo.sum() == shards
    records = writer.root / "records"
    # Without files: there is no array's data here to have a size.
    same = {**made_up_record(spec, 0, 0), "files": []}

    def record_of(block: int) -> dict[str, Any]:
        return {**same, "block": block, "rows": list(spec.block_rows(block))}

    def write() -> None:
        for block in range(shards):
            data = canonical(record_of(block))
            (records / record_name(block, 0)).write_bytes(data)

    def note() -> None:
        for block in range(shards):
            record = record_of(block)
            writer.shard_table.add(record, canonical(record))

    write()
    steps.run("commits, without files and fsync", note)
    resumed = Writer(store, writer.name, spec)
    steps.run("missing, of a resumed store", resumed.missing)
    assert resumed.shard_table.known.all()
    steps.run("finish", lambda: resumed.finish("paper/float16"))
    steps.run("missing, of a finished store", Writer(store, writer.name, spec).missing)
    store.close()
    cache = steps.run("open the store", lambda: TargetCache(path))
    steps.run("touch the first shard", lambda: cache.generations[0].record(0, 0))
    steps.run("touch another", lambda: cache.generations[0].record(shards - 1, 0))
    return steps.figures


def full_record() -> str:
    """What one record of 1,024 rows costs."""
    spec = paper(1, 1024, "none")
    record = made_up_record(spec, 0, 0)
    data = canonical(record)
    turns = 50
    started = time.perf_counter()
    for _ in range(turns):
        canonical(record)
    middle = time.perf_counter()
    for _ in range(turns):
        json.loads(data)
    ended = time.perf_counter()
    return (
        f"A record of 1,024 rows has {len(data):,} bytes; it is written in "
        f"{(middle - started) / turns * 1e3:.2f} ms and parsed in "
        f"{(ended - middle) / turns * 1e3:.2f} ms."
    )


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--shards", type=int, default=20_000)
    flags.add_argument("--rows", type=int, default=4)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        figures = bookkeeping(args.shards, args.rows, Path(name))
    lines = [
        f"{args.shards:,} shards, records of {args.rows} rows",
        "",
        "| step | seconds | us a shard | peak memory, MB | bytes a shard |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {seconds:.3f} | {seconds / args.shards * 1e6:.1f} "
            f"| {peak / 1e6:.2f} | {peak / args.shards:.0f} |"
            for name, (seconds, peak) in figures.items()
        ),
        "",
        full_record(),
    ]
    command = f"python -m benchmarks.bookkeeping --shards {args.shards} --rows {args.rows}"
    report("bookkeeping", command, lines, keep=args.keep)


if __name__ == "__main__":
    main()
