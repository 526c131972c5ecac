"""Linear probes of an untrained encoder: as timm initialises it, and with the student's weights.

    python -m benchmarks.random_features

On the demo's encoder, and 100 images a class of its data. Shows how much of a probe's accuracy
random features alone give.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.measure import parser, report
from milan.config import PretrainConfig
from milan.core.config_resolver import read_section, resolve
from milan.core.device import MEAN, STD
from milan.evaluation.linear_probe import linear_probe
from milan.models.export import ENCODER, save_encoder
from milan.models.student import build_student


def main() -> None:
    """Measure and print."""
    args = parser(__doc__.splitlines()[0]).parse_args()
    probe = read_section("params.yaml", "linear_probe")
    settings = resolve(PretrainConfig, section="pretrain", params="params.yaml")
    model, shape = settings.model, settings.model_args
    with tempfile.TemporaryDirectory() as folder:
        student = build_student(model, img_size=28, target_width=64, model_args=shape)
        about = {"model": model, "model_args": shape, "input_size": 28, "mean": MEAN, "std": STD}
        file = Path(folder, ENCODER)
        save_encoder(file, student.encoder.state_dict(), about)
        probe |= {"baseline": "none", "shots": 100}
        by_timm = linear_probe(checkpoint="random", like=folder, **probe)["top1"]
        by_student = linear_probe(checkpoint=folder, **probe)["top1"]
    lines = [
        f"Top-1: {by_timm} % as timm initialises it, {by_student} % with the student's weights."
    ]
    report("random_features", "python -m benchmarks.random_features", lines, keep=args.keep)


if __name__ == "__main__":
    main()
