"""The plan against the run: bytes, files and time of `milan plan` and of the extraction itself.

    python -m benchmarks.planning [--images 48] [--views 2]

ViT-B/16 with random weights (only speed and size are measured) on ImageNet photographs, in one
process. The time compared is that of writing the shards. Loading the teacher, and the sample for
the fidelity report before the first shard, are excluded on both sides.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.measure import parser, photos, report
from milan.core.progress import NoProgress
from pipeline.config import ExtractConfig
from pipeline.estimate.cost import seconds_of
from pipeline.estimate.size import size_of_store
from pipeline.estimate.throughput import measure_throughput
from pipeline.extract import extract_targets
from pipeline.extraction.hardware import plan_workers
from pipeline.extraction.plan import plan


def main() -> None:
    """Plan, run, compare."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--images", type=int, default=48)
    flags.add_argument("--views", type=int, default=2)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = ExtractConfig(
            str(photos(folder / "photos", args.images)), out=str(folder / "t.zarr"),
            pretrained="none", views=args.views, limit=args.images, batch_size=16, shard_size=32,
            executor="local",
        )  # fmt: skip
        work = plan(config, NoProgress())
        workers = plan_workers(config, work.hardware)
        throughput = measure_throughput(work, workers, NoProgress())
        shards = [part.spec.shards for part in work.parts]
        seconds, sizes = seconds_of(work, workers, throughput, shards), size_of_store(work)
        summary = extract_targets(replace(config, yes=True))
        paths = list(Path(config.out).rglob("*"))
        total = sum(path.stat().st_size for path in paths if path.is_file())
        files = sum(path.is_file() for path in paths)
    rows = [
        ("bytes", f"{sizes.total:,}", f"{total:,}", sizes.total / total),
        ("files", f"{sizes.files:,}", f"{files:,}", sizes.files / files),
        ("seconds", f"{seconds:.1f}", f"{summary['seconds']:.1f}", seconds / summary["seconds"]),
    ]
    lines = [
        "| what | planned | run | planned / run |",
        "|---|---|---|---|",
        *(f"| {what} | {planned} | {run} | {ratio:.3f} |" for what, planned, run, ratio in rows),
        "",
        f"Throughput: {throughput.source}.",
    ]
    command = f"python -m benchmarks.planning --images {args.images} --views {args.views}"
    report("planning", command, lines, keep=args.keep)


if __name__ == "__main__":
    main()
