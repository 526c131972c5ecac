"""Extraction against a bare loop of decode and teacher forward.

    python -m benchmarks.extraction [--images 64] [--rounds 3]

ViT-B/16 (random weights: only speed is measured), one view an image, batches of 16, float32. The
bare loop reads, decodes, renders and runs the teacher, and stores nothing. Ours is an extraction in
one process, with staging, digests, commits and index. Loading the teacher is excluded on both
sides. Then, under Ray, two replicas of one thread on two cores are compared with one replica on one
core, from the first commit to the last.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.measure import interleaved, parser, photos, ratio, report
from milan.images.decode import decode
from milan.images.manifest import Manifest, build_manifest
from milan.images.source import ImageSource
from milan.images.views import ViewSpec, render, view_of
from pipeline.extract import extract_targets
from pipeline.teachers.load import Teacher, load_teacher
from pipeline.teachers.spec import TeacherSpec

_BATCH = 16


def bare(manifest: Manifest, teacher: Teacher) -> None:
    """The least that extraction must do: read, decode, render, forward."""
    images, spec = ImageSource(manifest, manifest.root), ViewSpec(teacher.size)
    for start in range(0, len(manifest), _BATCH):
        pixels = []
        for row in range(start, min(len(manifest), start + _BATCH)):
            image = decode(images.read(row))
            view = view_of(spec, row, view=0, height=image.height, width=image.width)
            pixels.append(render(image, view, size=spec.size))
        teacher.targets(np.stack(pixels))


def replicas(source: Path, folder: Path, count: int, images: int) -> float:
    """Images/s between the first commit and the last, with `count` one-thread replicas."""
    out = folder / f"ray-{count}.zarr"
    shutil.rmtree(out, ignore_errors=True)
    cores = sorted(os.sched_getaffinity(0))[:count]
    command = [
        str(Path(sys.executable).parent / "milan"), "extract-targets", "--data", str(source),
        "--out", str(out), "--pretrained", "none", "--views", "1", "--limit", str(images),
        "--shard-size", "8", "--batch-size", "8", "--replicas", str(count), "--num-workers", "1",
        "--precision", "fp32",
    ]  # fmt: skip
    subprocess.run(
        command, check=True, stdout=subprocess.DEVNULL,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )  # fmt: skip
    events = [json.loads(line) for line in (out / "extract.log.jsonl").read_text().splitlines()]
    commits = [event["seconds"] for event in events if event["event"] == "commit"]
    # Replicas do not start together: count from the time when each has finished a block.
    return 8 * (len(commits) - count) / (commits[-1] - commits[count - 1])


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.set_defaults(rounds=3)
    flags.add_argument("--images", type=int, default=64)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = photos(folder / "photos", args.images)
        manifest = build_manifest(source, seed=0, limit=args.images)
        teacher = load_teacher(TeacherSpec(pretrained="none"), device="cpu")
        ours_seconds: list[float] = []

        def ours() -> None:
            out = folder / "ours.zarr"
            shutil.rmtree(out, ignore_errors=True)
            summary = extract_targets(
                str(source), out=str(out), pretrained="none", views=1, limit=args.images,
                batch_size=_BATCH, executor="local", shard_size=args.images,
            )  # fmt: skip
            ours_seconds.append(summary["seconds"])

        contenders: dict[str, Callable[[], None]] = {
            "bare": lambda: bare(manifest, teacher),
            "ours": ours,
        }
        seconds = interleaved(contenders, args.rounds)
        measured = ours_seconds[1:]  # the first round warms up; loading the teacher is excluded
        one = replicas(source, folder, 1, args.images)
        two = replicas(source, folder, 2, args.images)
        middle = len(measured) // 2
        lines = [
            "| what | images/s |",
            "|---|---|",
            f"| bare loop | {args.images / sorted(seconds['bare'])[middle]:.2f} |",
            f"| extract-targets, local | {args.images / sorted(measured)[middle]:.2f} |",
            f"| one replica, one core | {one:.2f} |",
            f"| two replicas, two cores | {two:.2f} |",
            "",
            f"Ours at {ratio(seconds['bare'], measured)} of the bare loop's throughput; "
            f"two replicas at {two / one:.2f} of one.",
        ]
        command = f"python -m benchmarks.extraction --images {args.images} --rounds {args.rounds}"
        report("extraction", command, lines, keep=args.keep)


if __name__ == "__main__":
    main()
