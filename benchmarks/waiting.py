"""The share of a training step that is data-loading time.

    python -m benchmarks.waiting [--images 96] [--steps 10] [--workers 2]

ViT-B/16 student with the published decoder at batch 16, float32, from an int8 store of ImageNet
photographs. JPEGs are decoded, cropped and verified in each step; teacher weights are random, since
only speed is measured. Prints the share of a step's time spent in `next(batches)`. The first step,
in which the workers start, is excluded.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.measure import parser, photos, report
from milan.training.pretrain import pretrain
from pipeline.extract import extract_targets


def main() -> None:
    """Measure and print."""
    flags = parser(__doc__.splitlines()[0])
    flags.add_argument("--images", type=int, default=96)
    flags.add_argument("--steps", type=int, default=10)
    flags.add_argument("--workers", type=int, default=2)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = folder / "targets.zarr"
        extract_targets(
            str(photos(folder / "photos", args.images)), out=str(store), pretrained="none",
            views=1, limit=args.images, executor="local",
        )  # fmt: skip
        pretrain(
            str(store), out=str(folder / "run"), epochs=40, batch_size=16, num_workers=args.workers,
            log_every=1, stop_after=args.steps + 1, save_every=1000,
        )  # fmt: skip
        lines = [
            json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()
        ][1:]
    shares = sorted(line["wait_share"] for line in lines)
    rates = sorted(line["images_per_second"] for line in lines)
    middle = len(shares) // 2
    rows = [
        f"Data-loading time: median {shares[middle]:.2%} of a step, worst {shares[-1]:.2%} "
        f"of {len(shares)} steps, at {rates[middle]:.2f} images/s."
    ]
    command = f"python -m benchmarks.waiting --images {args.images} --steps {args.steps}"
    command += f" --workers {args.workers}"
    report("waiting", command, rows, keep=args.keep)


if __name__ == "__main__":
    main()
