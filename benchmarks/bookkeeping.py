"""What the driver's bookkeeping costs when a store has very many shards.

    python -m benchmarks.bookkeeping [--shards 20000] [--rows 4]

The store is artificial: its records are those that the planner uses for its estimate, with a few
rows instead of 1,024, and there are no array files. The steps, in this order: list the missing
shards of an empty generation; commit (record, digest, sizes; without moving files); list the
missing shards in a resumed run; finish; list them in the next run, from the shard table; open the
store and read the record of one shard. Memory is the peak of each step minus the memory before it,
as Linux counts it (pages of 4 KB), so the share of Arrow and the allocator is included. Last, one
record of 1,024 rows is written and parsed.
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


def artificial_spec(shards: int, rows: int, manifest: str) -> CacheSpec:
    """A generation of `shards` blocks of `rows` images, one view."""
    return CacheSpec(
        manifest=manifest, rows=shards * rows, views=1, tokens=197, channels=512, codec="float16",
        shard_size=rows, view_law=ViewSpec(224).law(), teacher={"weights": "none"},
    )  # fmt: skip


def open_writer(store: Store, spec: CacheSpec, manifest: Manifest) -> Writer:
    """A writer for `spec`; the manifest has a few images only, whatever the spec says."""
    files = {"manifest.parquet": manifest.to_parquet(), "fidelity.json": b"{}"}
    return store.generation(
        "generations/000", spec, lambda: (group_attributes(spec, {"name": "paper"}), {}, files)
    )


class Steps:
    """Seconds of steps, and bytes of memory at the peak of each."""

    def __init__(self) -> None:
        self.figures = dict[str, tuple[float, int]]()

    def run(self, name: str, step: Callable[[], Any]) -> Any:
        """Run a step and record its seconds and bytes."""
        gc.collect()
        # Free memory is returned first, or a step would reuse what the previous one freed.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before = _resident("VmRSS")
        started = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - started
        self.figures[name] = seconds, max(0, _resident("VmHWM") - before)
        return result


def _resident(name: str) -> int:
    """Resident bytes of this process: now (VmRSS), or at the peak (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


def bookkeeping(shards: int, rows: int, folder: Path) -> dict[str, tuple[float, int]]:
    """(seconds, bytes at the peak) of each step, by name."""
    (folder / "images").mkdir()
    (folder / "images" / "0.jpg").touch()
    manifest = build_manifest(folder / "images", seed=0)
    steps, path = Steps(), folder / "t.zarr"
    spec = artificial_spec(shards, rows, manifest.digest())
    store = Store(path)
    writer = steps.run("a writer", lambda: open_writer(store, spec, manifest))
    missing = steps.run("missing, of a new store", writer.missing)
    assert missing.sum() == shards
    records = writer.root / "records"
    # Without files: there is no array data here.
    template = {**made_up_record(spec, 0, 0), "files": []}

    def record_of(block: int) -> dict[str, Any]:
        return {**template, "block": block, "rows": list(spec.block_rows(block))}

    def write_all() -> None:
        for block in range(shards):
            data = canonical(record_of(block))
            (records / record_name(block, 0)).write_bytes(data)

    def commit_all() -> None:
        for block in range(shards):
            record = record_of(block)
            writer.shard_table.add(record, canonical(record))

    write_all()
    steps.run("commits, without files and fsync", commit_all)
    resumed = Writer(store, writer.name, spec)
    steps.run("missing, of a resumed store", resumed.missing)
    assert resumed.shard_table.known.all()
    steps.run("finish", lambda: resumed.store.publish(resumed.finish("paper/float16")))
    steps.run("missing, of a finished store", Writer(store, writer.name, spec).missing)
    store.close()
    cache = steps.run("open the store", lambda: TargetCache(path))
    steps.run("touch the first shard", lambda: cache.generations[0].record(0, 0))
    steps.run("touch another", lambda: cache.generations[0].record(shards - 1, 0))
    return steps.figures


def full_record() -> str:
    """A sentence: size and times of one record of 1,024 rows."""
    spec = artificial_spec(1, 1024, "none")
    record = made_up_record(spec, 0, 0)
    data = canonical(record)
    repeats = 50
    started = time.perf_counter()
    for _ in range(repeats):
        canonical(record)
    middle = time.perf_counter()
    for _ in range(repeats):
        json.loads(data)
    ended = time.perf_counter()
    return (
        f"A record of 1,024 rows has {len(data):,} bytes; it is written in "
        f"{(middle - started) / repeats * 1e3:.2f} ms and parsed in "
        f"{(ended - middle) / repeats * 1e3:.2f} ms."
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
